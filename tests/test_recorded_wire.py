"""What version 1 said on the wire: recorded before the wire was parted from the sockets.

``wire_v1.json`` holds all bytes of six conversations, both ways, in hexadecimal, as a real server
and a real client exchanged them (only ``hashing``, said once a second, stands there once). Each
message is decoded, and encoded again to the very same bytes; and a server in this process answers
the recorded client, once hands are shaken, as it did.

A change of the protocol that is meant changes some of these messages. Their classes are then taken
out of ``UNCHANGED``, which names those that are as they were, and what a test compares by value is
mended. Nothing is recorded anew: this is what clients and servers of version 1 say.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import common
from common import (
    AudioBlock,
    AudioFormat,
    Error,
    Hashing,
    Held,
    Hello,
    Message,
    Outcome,
    Prefixes,
    Results,
    Start,
    StreamEnd,
    Welcome,
    decode_message,
    decode_sound,
    encode_message,
)
from conversation import real_server
from support import contents, make_file, make_partial

RECORDED = json.loads(Path(__file__).with_name("wire_v1.json").read_text())
UNCHANGED: list[type[Message]] = [
    Hello,
    Welcome,
    Held,
    Hashing,
    Prefixes,
    Start,
    Results,
]
SOUND = AudioFormat(8_000, 2)


class Recorded:
    """What one side said, read from its beginning."""

    def __init__(self, content: bytes) -> None:
        self._bytes = content

    @classmethod
    def named(cls, name: str, way: str) -> Recorded:
        """Return one of the file's: "up" is what the client said, "down" the server."""
        return cls(bytes.fromhex(RECORDED[name][way]))

    def __bool__(self) -> bool:
        return bool(self._bytes)

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        data, self._bytes = self._bytes[:size], self._bytes[size:]
        assert len(data) == size
        return data

    def frame(self) -> bytes:
        """Return the content of the next frame."""
        return self.take(common.LENGTH.unpack(self.take(common.LENGTH.size))[0])

    def has_message(self) -> bool:
        """Return whether a message comes next; no recorded file begins like one."""
        return self._bytes[common.LENGTH.size :].startswith(b'{"type":')

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._bytes))


def messages() -> Iterator[tuple[str, bytes]]:
    """Yield the content of every frame that holds a message, with where it stands."""
    for name, ways in RECORDED.items():
        for way in ways:
            recorded, number = Recorded.named(name, way), 0
            while recorded and recorded.has_message():
                yield f"{name}, {way} {number}", recorded.frame()
                number += 1


MESSAGES = dict(messages())


@pytest.mark.parametrize("content", MESSAGES.values(), ids=MESSAGES.keys())
def test_a_recorded_message_is_decoded_and_encoded_to_the_same_bytes(content: bytes) -> None:
    kinds = {kind.__name__.lower(): kind for kind in UNCHANGED}
    kind = kinds.get(json.loads(content)["type"])
    if kind is not None:
        assert encode_message(decode_message(content, [kind])) == common.encode_frame(content)


def test_every_kind_of_message_was_recorded() -> None:
    recorded = {json.loads(content)["type"] for content in MESSAGES.values()}
    assert recorded >= {kind.__name__.lower() for kind in UNCHANGED}


def test_recorded_messages_mean_what_they_meant() -> None:
    down = Recorded.named("files", "down")
    assert decode_message(down.frame(), [Welcome]) == Welcome(1, "file")
    assert decode_message(down.frame(), [Held]) == Held([(0, [40]), (1, [1, 200])])
    start = decode_message(down.frame(), [Start])
    assert start == Start(
        [
            Outcome("already", "same.txt"),
            200,
            0,
            0,
            Outcome("failed", "a folder of that name is there already"),
            *[0] * 5,
        ]
    )
    refusal = decode_message(Recorded.named("code wanted", "down").frame(), [Welcome])
    assert isinstance(refusal, Error)
    assert refusal.kind == common.CODE_WANTED


def test_recorded_sound_is_decoded_and_encoded_to_the_same_bytes() -> None:
    down = Recorded.named("sound", "down")
    welcome = decode_message(down.frame(), [Welcome])
    assert isinstance(welcome, Welcome)
    assert welcome.sound is not None
    assert welcome.sound.audio == SOUND
    played, sound = b"", decode_sound(content := down.frame(), SOUND)
    while isinstance(sound, AudioBlock):
        assert sound.first_frame * SOUND.frame_bytes == len(played)
        assert sound.encode() == common.encode_frame(content)
        played += sound.samples
        sound = decode_sound(content := down.frame(), SOUND)
    assert sound == StreamEnd("standard input is at its end")
    assert sound.encode() == common.encode_frame(content)
    assert played == bytes(range(200)) * 2
    assert not down


# Where a folder had a file's name, version 1 refused the file; now it gets a number. So that the
# rest can be replayed, its entry is changed into one that is refused as well.
REFUSED_THEN, REFUSED_NOW = b'"taken"', b'"../xx"'
REASONS = {  # then and now
    "a folder of that name is there already": "the path is not one inside the folder",
    "the client gave up in the middle of it": "the client cannot read it, or it has changed there",
}


def replay(name: str, inbox: Path) -> tuple[list[Message], list[Message]]:
    """Say to a server in this process what a client said; return its answers and those of then."""
    up, down = Recorded.named(name, "up"), Recorded.named(name, "down")
    up.frame(), down.frame()  # the handshake
    with real_server(inbox) as peer:
        peer.send(up.rest().replace(REFUSED_THEN, REFUSED_NOW))
        peer.hang_up()
        answers = Recorded(peer.read_all())
    return merge_results(answers), merge_results(down)


def merge_results(said: Recorded) -> list[Message]:
    """Return the messages of a server; how many results it told at once is left to chance."""
    merged: list[Message] = []
    results: list[tuple[int, Outcome]] = []
    while said:
        message = decode_message(said.frame(), [Held, Start, Results])
        if isinstance(message, Results):
            results += message.entries
        else:
            merged.append(message)
    return [*merged, Results(results)]


def test_a_client_of_version_1_is_answered_as_it_was(inbox: Path) -> None:
    same = make_file(inbox / "same.txt", 40, seed=1).read_bytes()
    resumed = random.Random(2).randbytes(300)
    make_partial(inbox, "resumed.bin", resumed[:200])
    make_file(inbox / ".resumed.bin.1.socketpair-part", 1)
    answers, recorded = replay("files", inbox)
    expected = repr(recorded)
    for then, now in REASONS.items():
        expected = expected.replace(then, now)
    assert repr(answers) == expected
    found = contents(inbox)
    assert found["same.txt"] == same
    assert found["resumed.bin"] == resumed
    assert found["piped"] == b"from a pipe"
    assert found.keys() == {
        *("Gr\u00fc\u00dfe \n.txt", "piped", "resumed.bin", "same.txt"),
        ".resumed.bin.1.socketpair-part",  # may be the beginning of what another sends
        *("tree/", "tree/empty file", "tree/empty folder/", "tree/program"),
    }


def test_a_pipe_of_version_1_that_paused_arrives_whole(inbox: Path) -> None:
    inbox.mkdir()
    answers, recorded = replay("slow pipe", inbox)
    assert answers == recorded
    assert contents(inbox) == {"slow": b"onetwo"}
