"""Whoever stands between the two reads nothing, and changes nothing unnoticed."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import normalize_code
from pairing import CODE, CONTENT, NAME, check_paired, send_here, visible_files
from support import HOST, Process, RawClient, Server, free_port


class Tap:
    """A link to a server, all of whose bytes are recorded.

    `change` and `cut` name a byte by its direction (0 is towards the server) and its number: the
    one is changed on its way, the other and all that follow do not arrive.
    """

    def __init__(
        self,
        port: int,
        change: tuple[int, int] | None = None,
        cut: tuple[int, int] | None = None,
    ) -> None:
        self.recorded = (bytearray(), bytearray())
        self._target = port
        self._change = change
        self._cut = cut
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                with near, socket.create_connection((HOST, self._target), timeout=60) as far:
                    ways = [
                        threading.Thread(target=self._pass, args=(*way,), daemon=True)
                        for way in ((0, near, far), (1, far, near))
                    ]
                    for thread in ways:
                        thread.start()
                    for thread in ways:
                        thread.join(60)

    def _pass(self, direction: int, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(self._harm(direction, data))
                self.recorded[direction].extend(data)
                if self._cut and self._cut[0] == direction:
                    assert len(self.recorded[direction]) < self._cut[1]
            target.shutdown(socket.SHUT_WR)
        except (OSError, AssertionError):
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _harm(self, direction: int, data: bytes) -> bytes:
        passed = len(self.recorded[direction])
        if self._cut and self._cut[0] == direction:
            return data[: max(0, self._cut[1] - passed)]
        if self._change and self._change[0] == direction:
            at = self._change[1] - passed
            if 0 <= at < len(data):
                return data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]
        return data


def record(running: Server, path: Path, tls: ssl.SSLContext | None) -> tuple[bytes, bytes]:
    """Send a file through a tap; return all that went to the server, and all that came back."""
    with Tap(running.port) as tap:
        assert send_here(tap.port, path, tls) == 0
    return bytes(tap.recorded[0]), bytes(tap.recorded[1])


def samples(length: int, count: int) -> list[int]:
    """Return numbers below `length`: all of the first few, the last ones, and some between."""
    generator = random.Random(length)
    between = [generator.randrange(length) for _ in range(count)]
    return sorted({*range(0, min(length, 12), 3), *between, length - 1})


def test_neither_names_nor_content_can_be_read_on_the_way(
    paired: Server, server_without_code: Server, source: Path, tls: ssl.SSLContext
) -> None:
    secrets = [NAME.encode(), CONTENT[:20], b"offer", b"hello", b"entries", b"SHA-256"]
    open_way, _ = record(server_without_code, source, None)
    assert all(secret in open_way for secret in secrets[:5])  # so this would be noticed
    for direction in record(paired, source, tls):
        assert not any(secret in direction for secret in secrets)
        assert normalize_code(CODE).encode() not in direction
    upwards, _ = record(paired, source, tls)
    assert len(upwards) < 20_000  # the second time it is there already


@pytest.fixture
def server_without_code(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "open inbox") as running:
        yield running


def test_the_same_conversation_never_looks_the_same(
    paired: Server, source: Path, tls: ssl.SSLContext
) -> None:
    records = []
    for _ in range(2):
        records.append(record(paired, source, tls)[0][300:])
        (paired.folder / NAME).unlink()
    assert records[0] != records[1]
    # Recorded, it is worth nothing.
    with RawClient(paired.port) as raw:
        raw.send(records[0])
        raw.hang_up()
        raw.read_all()
    assert not (paired.folder / NAME).exists()
    check_paired(paired, tls, source.parent)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("harm", ["change", "cut"])
def test_whatever_is_changed_or_cut_off_on_the_way_nothing_wrong_arrives(
    harm: str, paired: Server, tmp_path: Path, tls: ssl.SSLContext
) -> None:
    held = paired.held()
    path = tmp_path / NAME
    path.write_bytes(CONTENT[:3000])
    lengths = [len(way) for way in record(paired, path, tls)]
    (paired.folder / NAME).unlink()
    memory = paired.status_field("VmRSS")
    for direction in (0, 1):
        for number in samples(lengths[direction], 40):
            place = (direction, number)
            tap = Tap(paired.port, **{harm: place})
            with tap:
                status = send_here(tap.port, path, tls)
            arrived = paired.folder / NAME
            if status == 0:
                assert arrived.read_bytes() == path.read_bytes()
            if arrived.exists():
                assert arrived.read_bytes() == path.read_bytes()
                arrived.unlink()
    check_paired(paired, tls, tmp_path)
    paired.wait_until_idle(held)
    assert paired.status_field("VmRSS") < memory + 10_000  # kB
    assert visible_files(paired.folder) == set()


@pytest.mark.parametrize("code", [CODE, None])
def test_sound_crosses_and_with_a_code_no_sample_can_be_heard_on_the_way(
    code: str | None, tmp_path: Path
) -> None:
    samples = random.Random(1).randbytes(2 * 48_000 * 10)
    with wave.open(str(tmp_path / "in.wav"), "wb") as file:
        file.setparams((1, 2, 48_000, 0, "NONE", ""))
        file.writeframes(samples)
    both = ("audio", *(("--code", code) if code else ()), "--port")
    port, heard = free_port(), tmp_path / "out.wav"
    with Process("server.py", *both, str(port), "--input", str(tmp_path / "in.wav")) as server:
        server.wait_for_output("Broadcasting")
        arguments = ("--output", str(heard), "--seconds", "1")
        with Tap(port) as tap, Process("client.py", *both, str(tap.port), *arguments) as listener:
            result = listener.wait()
        if code:
            refused = Process("client.py", "audio", "--port", str(port), *arguments)
            with refused:
                assert refused.wait().status == 1
    assert result.status == 0, result
    with wave.open(str(heard)) as file:
        played = file.readframes(10**6)
    assert len(played) > 48_000
    assert samples.find(played) >= 0
    assert (played[1000:1016] in tap.recorded[1]) == (code is None)
