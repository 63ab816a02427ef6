"""Whoever stands between the two reads nothing, and changes nothing unnoticed."""

from __future__ import annotations

import random
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import normalize_code
from pairing import CODE, CONTENT, NAME, check_paired, make_hasty, send_here
from sound import until_whole
from support import DOWN, UP, Cut, Process, Proxy, RawClient, Server, free_port, visible, wait_for


class Harm:
    """A hook for a proxy, which does harm at one byte: `number` of those in `direction`.

    "change" changes it on its way; with "cut", it and all that follow do not arrive.
    """

    def __init__(self, harm: str, direction: int, number: int) -> None:
        self._harm = harm
        self._direction = direction
        self._number = number

    def __call__(self, direction: int, passed: int, data: bytes) -> bytes:
        """Do it, where the byte is in `data`."""
        at = self._number - passed
        if direction != self._direction or not 0 <= at < len(data):
            return data
        if self._harm == "cut":
            raise Cut(data[:at])
        return data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]


def record(running: Server, path: Path, code: str | None) -> tuple[bytes, bytes]:
    """Send a file through a proxy; return all that went to the server, and all that came back."""
    with Proxy(running.port) as proxy:
        assert send_here(proxy.port, path, code) == 0
    return bytes(proxy.recorded[UP]), bytes(proxy.recorded[DOWN])


def samples(length: int, count: int) -> list[int]:
    """Return numbers below `length`: all of the first few, the last ones, and some between."""
    generator = random.Random(length)
    between = [generator.randrange(length) for _ in range(count)]
    return sorted({*range(0, min(length, 12), 3), *between, length - 1})


def test_neither_names_nor_content_can_be_read_on_the_way(
    paired: Server, server_without_code: Server, source: Path, code: str
) -> None:
    secrets = [NAME.encode(), CONTENT[:20], b"offer", b'"file"', b"entries", b"SHA-256"]
    open_way, _ = record(server_without_code, source, None)
    assert all(secret in open_way for secret in secrets[:5])  # so this would be noticed
    for direction in record(paired, source, code):
        assert not any(secret in direction for secret in secrets)
        assert normalize_code(CODE).encode() not in direction
    upwards, _ = record(paired, source, code)
    assert len(upwards) < 20_000  # the second time it is there already


@pytest.fixture
def server_without_code(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "open inbox") as running:
        yield running


def test_the_same_conversation_never_looks_the_same(
    paired: Server, source: Path, code: str
) -> None:
    records = []
    for _ in range(2):
        records.append(record(paired, source, code)[0])
        (paired.folder / NAME).unlink()
    shares = [each[each.index(b'"share"') :] for each in records]
    assert shares[0][:80] != shares[1][:80]
    assert shares[0][200:] != shares[1][200:]
    # Recorded, it is worth nothing.
    with RawClient(paired.port) as raw:
        raw.send(records[0])
        raw.hang_up()
        raw.read_all()
    assert not (paired.folder / NAME).exists()
    check_paired(paired, code, source.parent)


@pytest.mark.parametrize("harm", ["change", "cut"])
def test_whatever_is_changed_or_cut_off_on_the_way_nothing_wrong_arrives(
    harm: str, paired: Server, tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = paired.held()
    path = tmp_path / NAME
    path.write_bytes(CONTENT[:3000])
    lengths = [len(way) for way in record(paired, path, code)]
    (paired.folder / NAME).unlink()
    memory = paired.status_field("VmRSS")
    for direction in (UP, DOWN):
        for number in samples(lengths[direction], 40):
            with (
                monkeypatch.context() as patched,
                Proxy(paired.port, hook=Harm(harm, direction, number)) as proxy,
            ):
                make_hasty(patched)
                status = send_here(proxy.port, path, code)
            arrived = paired.folder / NAME
            if status == 0:
                assert arrived.read_bytes() == path.read_bytes()
            if arrived.exists():
                assert arrived.read_bytes() == path.read_bytes()
                arrived.unlink()
            # The right code, after which the wrong ones are forgiven.
            wait_for(lambda: send_here(paired.port, path, code) == 0)
            arrived.unlink()
    check_paired(paired, code, tmp_path)
    paired.wait_until_idle(held)
    assert paired.status_field("VmRSS") < memory + 10_000  # kB
    assert visible(paired.folder) == []


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
        with Proxy(port) as proxy:
            until_whole(lambda: Process("client.py", *both, str(proxy.port), *arguments), heard)
        if code:
            refused = Process("client.py", "audio", "--port", str(port), *arguments)
            with refused:
                assert refused.wait().status == 1
    with wave.open(str(heard)) as file:
        played = file.readframes(10**6)
    assert len(played) > 48_000
    assert played in samples * 2  # it is played over and over
    assert (played[1000:1016] in proxy.recorded[DOWN]) == (code is None)
