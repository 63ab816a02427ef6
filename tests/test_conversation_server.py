"""A client in this process that lies at each step: the server saves nothing wrong, and ends."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import server
from common import (
    END_OF_FILE,
    GIVEN_UP,
    LENGTH,
    PARTIAL_SUFFIX,
    SEGMENT_BYTES,
    STILL_HERE,
    Entry,
    Error,
    Hashing,
    Held,
    Hello,
    Message,
    Offer,
    Outcome,
    Prefixes,
    Results,
    Start,
    encode_frame,
)
from conversation import read_message, real_server, say, segments
from peers import RawPeer
from server import FOLDER_GONE
from support import LIMIT_S, MIB, contents, make_partial, partials, wait_for

CONTENT = b"what is sent " * 40
HELD = CONTENT[:200]
OFFER = Offer([Entry("file", len(CONTENT))])
NO_FOLDER = "a file or a symbolic link stands where a folder should go"
GOOD = hashlib.sha256(HELD).hexdigest()
REST = segments(CONTENT[len(HELD) :], hashlib.sha256(CONTENT).digest())


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Return what the server logs."""
    caplog.set_level(logging.INFO, "socket-pair")
    return caplog


def start_of(peer: RawPeer) -> Start:
    message = read_message(peer, Start)
    assert isinstance(message, Start)
    return message


def outcomes_of(peer: RawPeer, count: int = 1) -> dict[int, Outcome]:
    """Return the next results, at least `count` of them."""
    found: dict[int, Outcome] = {}
    while len(found) < count:
        message = read_message(peer, Results)
        assert isinstance(message, Results), message
        found |= dict(message.entries)
    return found


def is_refused(peer: RawPeer) -> bool:
    """Return whether the server says why it ends the conversation, and ends it."""
    message = read_message(peer, Results)
    return isinstance(message, Error) and bool(message.error) and peer.read_all() == b""


# --- an honest client ---------------------------------------------------------------------------


def test_files_folders_and_pipes_are_saved(inbox: Path) -> None:
    entries = [
        Entry("file", len(CONTENT)),
        Entry("tree/empty", 0),
        Entry("tree", is_folder=True),
        Entry("pipe"),
    ]
    inbox.mkdir()
    with real_server(inbox) as peer:
        peer.send(say(Offer(entries)))
        assert start_of(peer).entries == [0, 0, 0, 0]
        peer.send(segments(CONTENT) + segments(b"") + LENGTH.pack(STILL_HERE) + segments(b"piped"))
        names = ["file", "empty", "tree", "pipe"]
        assert outcomes_of(peer, 4) == {
            index: Outcome("saved", name) for index, name in enumerate(names)
        }
    assert contents(inbox) == {"file": CONTENT, "pipe": b"piped", "tree/": b"", "tree/empty": b""}


def test_offers_may_come_before_the_last_one_is_done(inbox: Path) -> None:
    inbox.mkdir()
    with real_server(inbox) as peer:
        peer.send(
            say(OFFER) + segments(CONTENT) + say(Offer([Entry("next", 4)])) + segments(b"next")
        )
        assert start_of(peer).entries == [0]
        assert outcomes_of(peer) == {0: Outcome("saved", "file")}
        assert start_of(peer).entries == [0]
        assert outcomes_of(peer) == {0: Outcome("saved", "next")}


# --- about what is held -------------------------------------------------------------------------


def resume(peer: RawPeer, answer: bytes) -> None:
    """Offer a file whose beginning the server has; answer its question with `answer`."""
    peer.send(say(OFFER))
    assert read_message(peer, Held) == Held([(0, [len(HELD)])])
    peer.send(answer)


def test_the_right_prefix_is_resumed(inbox: Path) -> None:
    make_partial(inbox, "file", HELD)
    with real_server(inbox) as peer:
        resume(peer, say(Hashing(), Hashing(), Prefixes([[GOOD]])))
        assert start_of(peer).entries == [len(HELD)]
        peer.send(REST)
        assert outcomes_of(peer) == {0: Outcome("saved", "file")}
    assert contents(inbox) == {"file": CONTENT}


def test_a_client_hears_that_the_server_lives_also_while_what_it_gave_up_is_put_away(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next offer waits for that."""
    keep, told = server.PartialFile.keep, []

    def look_and_keep(partial: server.PartialFile) -> int:
        told.append(partial._place.holder._signs.is_on())
        return keep(partial)

    monkeypatch.setattr(server.PartialFile, "keep", look_and_keep)
    make_partial(inbox, "file", HELD)
    with real_server(inbox) as peer:
        resume(peer, say(Prefixes([[GOOD]])))
        assert start_of(peer).entries == [len(HELD)]
        peer.send(LENGTH.pack(GIVEN_UP))
        assert outcomes_of(peer)[0].kind == "failed"
    assert told == [True]


def test_signs_of_life_that_gather_while_the_server_reads_for_long_are_not_too_many(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a client that reads a file of hundreds of gigabytes meanwhile."""
    monkeypatch.setattr(server, "SIGNS_AT_ONCE", 3)
    monkeypatch.setattr(server, "SIGN_SPACING_S", 0.01)
    is_told, read = threading.Event(), server.LookedUp.read

    def read_later(*args: Any) -> Any:
        is_told.wait(LIMIT_S)
        return read(*args)

    monkeypatch.setattr(server.LookedUp, "read", read_later)
    make_partial(inbox, "file", HELD)
    with real_server(inbox) as peer:
        resume(peer, b"")
        began_s = time.monotonic()
        peer.send(say(*[Hashing()] * 10, Prefixes([[GOOD]])))
        wait_for(lambda: time.monotonic() - began_s > 10 * server.SIGN_SPACING_S)
        is_told.set()
        assert start_of(peer).entries == [len(HELD)]
        peer.send(REST)
        assert outcomes_of(peer) == {0: Outcome("saved", "file")}


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [""],
        ["0" * 64],
        [GOOD.upper()],
        [GOOD[:-1]],
        [GOOD + "0"],
        ["0" * 64, GOOD],
    ],
    ids=lambda answer: repr(answer)[:30],
)
def test_any_other_prefix_begins_anew(inbox: Path, answer: list[str]) -> None:
    make_partial(inbox, "file", HELD)
    with real_server(inbox) as peer:
        resume(peer, say(Prefixes([answer])))
        assert start_of(peer).entries == [0]
        peer.send(segments(CONTENT))
        assert outcomes_of(peer) == {0: Outcome("saved", "file")}
    assert contents(inbox) == {"file": CONTENT}


@pytest.mark.parametrize(
    "answer",
    [Prefixes([]), Prefixes([[GOOD], [GOOD]]), OFFER, Hello(1, "file"), Error("\x1b[2J")],
    ids=lambda answer: type(answer).__name__,
)
def test_an_answer_to_another_question_ends_it_and_keeps_what_is_held(
    inbox: Path, answer: Message, log: pytest.LogCaptureFixture
) -> None:
    partial = make_partial(inbox, "file", HELD)
    with real_server(inbox) as peer:
        resume(peer, say(answer))
        assert isinstance(answer, Error) or is_refused(peer)
    (record,) = log.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().isprintable()
    assert partial.read_bytes() == HELD


def test_a_prefix_that_was_confirmed_is_still_checked_against_the_whole(inbox: Path) -> None:
    """As when its file changes after it was asked."""
    other = b"another content " * 30
    make_partial(inbox, "file", HELD)
    with real_server(inbox) as peer:
        resume(peer, say(Prefixes([[GOOD]])))
        assert start_of(peer).entries == [len(HELD)]
        rest = CONTENT[len(HELD) :]
        peer.send(segments(rest, hashlib.sha256((other + rest)[: len(CONTENT)]).digest()))
        assert outcomes_of(peer)[0].kind == "failed"
    assert set(contents(inbox)) <= {path.name for path in partials(inbox)}


def test_what_another_address_may_continue_is_kept_where_only_its_beginning_is_the_same(
    inbox: Path,
) -> None:
    """As of two machines' disk images."""
    content = bytes(3 * MIB)
    other = make_partial(inbox, "image", content[:MIB] + b"other" * 1000)
    other = other.rename(other.with_name(f".image.{'0' * 10}{PARTIAL_SUFFIX}"))
    own = make_partial(inbox, "image", content[:MIB])
    with real_server(inbox) as peer:
        peer.send(say(Offer([Entry("image", len(content))])))
        held = read_message(peer, Held)
        assert isinstance(held, Held)
        ((_, lengths),) = held.entries
        told = [hashlib.sha256(content[:length]).hexdigest() for length in lengths]
        peer.send(say(Prefixes([told])))
        assert start_of(peer).entries == [own.stat().st_size]
    assert other.stat().st_size == MIB + 5000


def test_a_file_counts_as_there_already_only_by_its_checksum(inbox: Path) -> None:
    inbox.mkdir()
    (inbox / "file").write_bytes(CONTENT)
    whole = hashlib.sha256(CONTENT).hexdigest()
    with real_server(inbox) as peer:
        for answer, verdict in ((whole, Outcome("already", "file")), (GOOD, 0)):
            peer.send(say(OFFER))
            assert read_message(peer, Held) == Held([(0, [len(CONTENT)])])
            peer.send(say(Prefixes([[answer]])))
            assert start_of(peer).entries == [verdict]
        peer.send(segments(CONTENT[::-1]))
        assert outcomes_of(peer) == {0: Outcome("saved", "file (1)")}
    assert contents(inbox) == {"file": CONTENT, "file (1)": CONTENT[::-1]}


def test_contents_that_are_sent_under_a_name_count_as_guesses_at_what_is_there(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More entries of one path than are compared before they are sent."""
    monkeypatch.setattr(server, "MISMATCH_SPACING_S", 1e9)
    inbox.mkdir()
    (inbox / "pin").write_bytes(b"0099")
    with real_server(inbox) as peer:
        peer.send(say(Offer([Entry("pin", 4)] * 100)))
        held = read_message(peer, Held)
        assert isinstance(held, Held)
        peer.send(say(Prefixes([[""]] * len(held.entries))))
        assert start_of(peer).entries == [0] * 100
        peer.send(b"".join(segments(b"%04d" % guess) for guess in range(100)))
        assert {each.kind for each in outcomes_of(peer, 100).values()} == {"saved"}
        # An empty file tells nothing: it is known again, also where no guess is left.
        peer.send(say(Offer([Entry("empty", 0)])))
        assert start_of(peer).entries == [0]
        (inbox / "empty").touch()
        peer.send(segments(b""))
        assert [each.kind for each in outcomes_of(peer, 1).values()] == ["already"]


# --- about the content --------------------------------------------------------------------------


DIGEST = hashlib.sha256(CONTENT).digest()


@pytest.mark.parametrize(
    "said",
    [
        segments(CONTENT[:-1], DIGEST),
        segments(CONTENT[:-1] + b"?", DIGEST),
        segments(b"", DIGEST),
        segments(CONTENT[:-1]),
        segments(CONTENT, bytes(32)),
        segments(CONTENT[::-1], DIGEST),
        encode_frame(CONTENT) + LENGTH.pack(GIVEN_UP),
        LENGTH.pack(GIVEN_UP),
    ],
    ids=["cut", "changed", "empty", "short", "no digest", "order", "given up late", "given up"],
)
def test_what_is_not_as_it_was_offered_is_not_saved_and_the_next_file_is(
    inbox: Path, said: bytes
) -> None:
    inbox.mkdir()
    with real_server(inbox) as peer:
        peer.send(say(OFFER))
        assert start_of(peer).entries == [0]
        peer.send(said)
        assert outcomes_of(peer)[0].kind == "failed"
        assert "file" not in contents(inbox)
        peer.send(say(Offer([Entry("next", 4)])) + segments(b"next"))
        assert start_of(peer).entries == [0]
        assert outcomes_of(peer) == {0: Outcome("saved", "next")}
    assert contents(inbox)["next"] == b"next"


@pytest.mark.parametrize(
    "said",
    [
        encode_frame(CONTENT + b"?"),
        encode_frame(CONTENT) + encode_frame(b"?"),
        LENGTH.pack(SEGMENT_BYTES + 1),
        LENGTH.pack(STILL_HERE - 1),
    ],
    ids=["one more", "another segment", "too long", "a length that is none"],
)
def test_a_segment_that_cannot_be_ends_the_conversation(inbox: Path, said: bytes) -> None:
    inbox.mkdir()
    with real_server(inbox) as peer:
        peer.send(say(OFFER))
        assert start_of(peer).entries == [0]
        peer.send(said)
        assert is_refused(peer)
    assert "file" not in contents(inbox)


# --- hanging up ---------------------------------------------------------------------------------

STEPS = {
    "nothing": b"",
    "an offer": say(OFFER),
    "half an answer": say(OFFER, Prefixes([[GOOD]]))[:-10],
    "an answer": say(OFFER, Prefixes([[GOOD]])),
    "half a length": say(OFFER, Prefixes([[GOOD]])) + b"\0\0",
    "half a segment": say(OFFER, Prefixes([[GOOD]])) + REST[:20],
    "a segment": say(OFFER, Prefixes([[GOOD]])) + encode_frame(CONTENT[len(HELD) :]),
    "half a digest": say(OFFER, Prefixes([[GOOD]])) + REST[:-1],
}


@pytest.mark.parametrize("how", ["hang up", "reset"])
@pytest.mark.parametrize("said", STEPS.values(), ids=STEPS.keys())
def test_hanging_up_at_any_step_keeps_what_there_was(inbox: Path, said: bytes, how: str) -> None:
    make_partial(inbox, "file", HELD)
    with real_server(inbox) as peer:
        peer.send(said)
        if how == "reset":
            peer.reset()
        else:
            peer.hang_up()
            peer.read_all()
    ((name, content),) = contents(inbox).items()
    assert name.startswith(".file.")
    assert CONTENT.startswith(content)
    assert content.startswith(HELD)
    with real_server(inbox) as peer:  # and the next run goes on from there
        peer.send(say(OFFER))
        held = read_message(peer, Held)
        assert held == Held([(0, [len(content)])])
        peer.send(say(Prefixes([[hashlib.sha256(content).hexdigest()]])))
        assert start_of(peer).entries == [len(content)]
        rest = CONTENT[len(content) :]
        end = LENGTH.pack(END_OF_FILE) + hashlib.sha256(CONTENT).digest()
        peer.send((encode_frame(rest) if rest else b"") + end)
        assert outcomes_of(peer) == {0: Outcome("saved", "file")}
    assert contents(inbox) == {"file": CONTENT}


def test_what_was_kept_and_has_been_saved_since_is_not_told_as_kept_when_the_client_is_lost(
    inbox: Path, log: pytest.LogCaptureFixture
) -> None:
    content = bytes(100_000)
    begun = content[:90_000]
    offer = say(Offer([Entry("file", len(content))]))
    with real_server(inbox) as peer:
        peer.send(offer)
        assert start_of(peer).entries == [0]
        peer.send(encode_frame(begun) + LENGTH.pack(GIVEN_UP))
        assert outcomes_of(peer)[0].kind == "failed"
        peer.send(offer)
        assert read_message(peer, Held) == Held([(0, [len(begun)])])
        peer.send(say(Prefixes([[hashlib.sha256(begun).hexdigest()]])))
        assert start_of(peer).entries == [len(begun)]
        peer.send(segments(content[len(begun) :], hashlib.sha256(content).digest()))
        assert outcomes_of(peer) == {0: Outcome("saved", "file")}
        peer.send(b"\0\0")
    assert "in the middle of a frame" in log.messages[-1]
    assert "kept" not in log.messages[-1]


def test_a_file_of_which_nothing_comes_leaves_no_folder(inbox: Path) -> None:
    with real_server(inbox) as peer:
        peer.send(say(Offer([Entry("a/b/lost", 3), Entry("a/c/kept", 1)])))
        start_of(peer)
        peer.send(LENGTH.pack(STILL_HERE) + LENGTH.pack(GIVEN_UP) + segments(b"x"))
        assert [each.kind for each in outcomes_of(peer, 2).values()] == ["failed", "saved"]
    assert contents(inbox) == {"a/": b"", "a/c/": b"", "a/c/kept": b"x"}


@pytest.mark.parametrize("has_open_folders", [True, False], ids=["open", "by path"])
def test_a_file_where_a_folder_should_go_fails_what_is_in_it_and_the_folder(
    inbox: Path, monkeypatch: pytest.MonkeyPatch, has_open_folders: bool
) -> None:
    monkeypatch.setattr(server, "HAS_OPEN_FOLDERS", has_open_folders and server.HAS_OPEN_FOLDERS)
    inbox.mkdir()
    (inbox / "a").write_bytes(b"a file")
    with real_server(inbox) as peer:
        peer.send(say(Offer([Entry("a/x", 1), Entry("a", is_folder=True)])))
        inside, folder = start_of(peer).entries
        assert inside == Outcome("failed", NO_FOLDER)
        assert folder == 0
        assert outcomes_of(peer) == {1: Outcome("failed", NO_FOLDER)}
    assert contents(inbox) == {"a": b"a file"}


def test_a_folder_that_is_removed_costs_one_file_at_most(inbox: Path) -> None:
    with real_server(inbox) as peer:
        peer.send(say(Offer([Entry(f"a/b/{number}", 1) for number in range(4)])))
        start_of(peer)
        for number in range(2):
            peer.send(segments(b"x"))
            assert outcomes_of(peer) == {number: Outcome("saved", str(number))}
        shutil.rmtree(inbox / "a")
        peer.send(segments(b"x"))
        reason = outcomes_of(peer)[2]
        assert reason in {Outcome("saved", "2"), Outcome("failed", FOLDER_GONE)}
        peer.send(segments(b"x"))
        assert outcomes_of(peer) == {3: Outcome("saved", "3")}
    assert contents(inbox)["a/b/3"] == b"x"


def test_one_name_offered_twice_is_saved_twice(inbox: Path) -> None:
    inbox.mkdir()
    with real_server(inbox) as peer:
        peer.send(say(Offer([Entry("file", 3), Entry("file", 3)])))
        assert start_of(peer).entries == [0, 0]
        peer.send(segments(b"one") + segments(b"two"))
        assert outcomes_of(peer, 2) == {
            0: Outcome("saved", "file"),
            1: Outcome("saved", "file (1)"),
        }
    assert contents(inbox) == {"file": b"one", "file (1)": b"two"}


def test_a_partial_file_that_is_written_to_meanwhile_is_not_trusted(inbox: Path) -> None:
    content = bytes(2 * SEGMENT_BYTES)  # a small one has no name at all
    inbox.mkdir()
    with real_server(inbox) as peer:
        peer.send(say(Offer([Entry("file", len(content))])))
        assert start_of(peer).entries == [0]
        peer.send(encode_frame(content[:SEGMENT_BYTES]))
        (partial,) = wait_for(lambda: partials(inbox), what="a partial file")
        with open(partial, "ab") as file:
            file.write(b"somebody else's" * SEGMENT_BYTES)
        peer.send(segments(content[SEGMENT_BYTES:], hashlib.sha256(content).digest()))
        assert outcomes_of(peer)[0].kind == "failed"
    assert not (inbox / "file").exists()
