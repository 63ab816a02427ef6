"""What a bad server may send to a listener: sound, its end, the server's time, and Opus.

`Listener` is a target of messages.py; `CONVERSATIONS` are what it damages.
"""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

import client
import common
import server
from common import (
    AudioBlock,
    AudioFormat,
    SocketPairError,
    Sound,
    StreamEnd,
    TimeReply,
    Welcome,
    encode_message,
)

MONO = AudioFormat(48_000, 1)
BLOCK_FRAMES = 120
LISTENED_S = 1.0
READ_FRAMES = 240


class Player(client.Speaker, client.SpeakerOutput):
    """A loudspeaker without a card: a destination and its output around a real playout buffer."""

    def __init__(self, delay_s: float) -> None:
        client.load_converters()
        self._delay_s = delay_s
        self._now_s = 0.0

    def open(self, audio: AudioFormat, sync: client.Sync | None) -> Player:
        """Begin to play sound of this format."""
        if sync is None:
            self._playout = client.Playout(audio, MONO)
        else:
            step = client.InStep(sync, audio, MONO.rate, self._delay_s)
            self._playout = client.SyncedPlayout(audio, MONO, step)
        return self

    def resume(self, sync: client.Sync | None) -> None:
        """Continue with another connection."""
        if isinstance(self._playout, client.SyncedPlayout) and sync is not None:
            self._playout.step.begin(sync)

    def write(self, samples: bytes, gap_frames: int, captured_s: float) -> None:
        """Take sound, and have the card read some."""
        self._now_s += 0.0025
        self._playout.write(samples, gap_frames, self._now_s, captured_s)
        played = self._playout.read(READ_FRAMES, self._now_s, 0.01)
        assert len(played) == READ_FRAMES * MONO.frame_bytes
        assert self._playout.describe().isprintable()

    def drain(self) -> None:
        """Nothing is left to wait for."""

    def close(self) -> None:
        """Nothing to release."""

    def status(self) -> str:
        """Return nothing: no one looks."""
        return ""

    summary = status


class Listener:
    """The client's side in audio mode, which plays what it is sent."""

    def __init__(self, connect: Callable[[bytes], Any], opus_kbit: int | None) -> None:
        self._connect = connect
        self._opus_kbit = opus_kbit

    def __call__(self, data: bytes) -> None:
        """Listen to a server for a moment."""
        printed = io.StringIO()
        address = client.Address("127.0.0.1", 9)
        connections = iter([self._connect(data)])

        def connect(*_: Any, **__: Any) -> Any:
            for connection in connections:
                return connection
            raise SocketPairError("once is enough")

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(socket, "create_connection", connect))
            stack.enter_context(mock.patch.object(client, "RECONNECT_WAIT_S", 0.0))
            stack.enter_context(contextlib.redirect_stderr(printed))
            stack.enter_context(contextlib.suppress(SocketPairError))
            console = common.Console(quiet=False, data_on_stdout=True)
            listening = client.Listening(
                address, [Player(0.0)], LISTENED_S, console, self._opus_kbit
            )
            listening.run()
        for line in printed.getvalue().splitlines():
            assert line.isprintable(), f"not fit for a terminal: {line!r}"


def numbered(count: int, audio: AudioFormat) -> Iterator[tuple[int, int, bytes]]:
    """Give number, time and samples of each block of a tone."""
    frames = np.arange(count * BLOCK_FRAMES)
    tone = (8000 * np.sin(frames * 0.13)).astype("<i2").repeat(audio.channels).tobytes()
    size = BLOCK_FRAMES * audio.frame_bytes
    for place in range(count):
        yield place * BLOCK_FRAMES, place * 2_500_000, tone[place * size : (place + 1) * size]


def blocks(count: int, audio: AudioFormat = MONO) -> list[bytes]:
    """Return so many blocks of a tone, as frames."""
    return [AudioBlock(*fields).encode() for fields in numbered(count, audio)]


def opus_blocks(count: int) -> bytes:
    """Return the packets of Opus that a server sends in place of so many blocks."""
    encoding = server.OpusEncoding(MONO, 96)
    heard = (AudioBlock(*fields) for fields in numbered(count, MONO))
    return b"".join([*map(encoding.encode, heard), encoding.finish()])


def welcome(audio: AudioFormat, sync_ms: int | None = None, opus_kbit: int | None = None) -> bytes:
    return encode_message(Welcome(2, "audio", Sound(*audio, "a stream", sync_ms, opus_kbit)))


END = StreamEnd("the microphone has gone").encode()
CONVERSATIONS: dict[str, list[list[Any]]] = {
    "listener": [
        [welcome(MONO), *blocks(12), END],
        [welcome(AudioFormat(44_100, 2)), *blocks(6, AudioFormat(44_100, 2))],
        [
            welcome(MONO, sync_ms=80),
            *(TimeReply(place, place + 1_000, place + 2_000).encode() for place in range(20)),
            *blocks(12),
            TimeReply(2**62, 1, 2**63 - 1).encode(),
            AudioBlock(10**9, 2**63 - 1, bytes(240)).encode(),
            AudioBlock(10**9 + 120, 0, b"").encode(),
        ],
    ],
    "opus-listener": [
        [welcome(MONO, opus_kbit=96), opus_blocks(64), END],
        [welcome(MONO, sync_ms=80, opus_kbit=96), opus_blocks(64)],
    ],
}
