"""Sound between two machines, past a third one that does not know the code; see hosts.py."""

from __future__ import annotations

import contextlib
import signal
import wave
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from hosts import (
    FAR,
    FRAME_BYTES,
    SONG_FRAMES,
    SONG_RATE,
    WAV_HEADER_BYTES,
    Hosts,
    at_rest,
    frames_in,
    hosts,
    song,
    third_machine_listening,
)
from pairing import CODE
from sound import lasts, until_whole
from support import Process, wait_for

__all__ = ["hosts", "song"]


@contextlib.contextmanager
def singing(hosts: Hosts, song: Path, *arguments: str) -> Iterator[tuple[Process, str]]:
    """Play the song over and over on the far machine; give the server and its port."""
    command = ("server.py", "audio", "--host", FAR, "--port", "0", "--input", str(song))
    with Process(*command, *arguments, wrapper=hosts.at(hosts.far)) as server:
        port = server.wait_for_output(r"Broadcasting .*:(\d+) - Ctrl\+C to stop\n")[1]
        yield server, port
        server.signal(signal.SIGINT)
        result = server.wait()
        assert result.status == 130, result
        assert "Traceback" not in result.stderr, result


def listener(hosts: Hosts, port: str, heard: Path, *arguments: str, host: str = "") -> Process:
    """Start to record on the near machine, or on `host`."""
    command = ("client.py", "audio", "--host", FAR, "--port", port, "--output", str(heard))
    return Process(*command, *arguments, wrapper=hosts.at(host or hosts.near))


def find_silence(heard: Path) -> list[range]:
    """Return where a recording is silent; fail where the song is not at its place in it."""
    with wave.open(str(heard)) as file:
        assert (file.getframerate(), file.getnchannels()) == (SONG_RATE, 2)
        numbers = array("I", file.readframes(file.getnframes()))
    silence: list[range] = []
    for place, number in enumerate(numbers):
        if number:
            assert number == (numbers[0] - 1 + place) % SONG_FRAMES + 1, place
        elif silence and silence[-1].stop == place:
            silence[-1] = range(silence[-1].start, place + 1)
        else:
            silence.append(range(place, place + 1))
    return silence


def goes_on(heard: Path, before: int) -> bool:
    """Tell whether a recording has been silent since then, and then a second of it was not."""
    silence = [each for each in find_silence(heard) if each.start >= before]
    return bool(silence) and silence[-1].stop + SONG_RATE < frames_in(heard)


@pytest.mark.parametrize("lost", [False, True], ids=["for a second", "until it is lost"])
def test_a_cable_pulled_out_in_the_middle_of_a_song_and_put_back(
    hosts: Hosts, song: Path, tmp_path: Path, lost: bool
) -> None:
    heard = tmp_path / "heard.wav"
    with (
        singing(hosts, song, "--code", CODE) as (server, port),
        listener(hosts, port, heard, "--code", CODE) as client,
    ):
        wait_for(lambda: frames_in(heard) > SONG_RATE, what="the song is heard")
        before = frames_in(heard)
        hosts.set_cable("down")
        try:
            wait_for(at_rest(lambda: frames_in(heard)), what="nothing is heard any more")
            if lost:
                client.wait_for_output("looking for it")
                server.wait_for_output(r"10\.77\.1\.2:\d+: left \(took nothing for 5 s\)\n")
        finally:
            hosts.set_cable("up")
        wait_for(lambda: goes_on(heard, before), what="a second of the song after what was missed")
        client.signal(signal.SIGINT)
        result = client.wait()
    assert result.status == 0, result
    assert "Traceback" not in result.stderr
    # A line for each loss; none where the connection lived, as after a second it mostly does.
    assert len(result.error_lines) == result.stdout.count("Listening to ") - 1, result
    assert all("looking for it until Ctrl+C" in line for line in result.error_lines), result
    assert result.error_lines or not lost

    silence = find_silence(heard)
    assert silence[-1].start >= before  # those before, if any, are of a machine that stood still
    missed = sum(map(len, silence))
    assert missed > (4 if lost else 0.25) * SONG_RATE
    assert f"missed {missed * 1000 / SONG_RATE:.0f} ms" in result.stdout


def test_sound_arrives_over_a_line_as_long_as_around_the_earth(
    hosts: Hosts, song: Path, tmp_path: Path
) -> None:
    heard = tmp_path / "heard.wav"
    with (
        singing(hosts, song, "--code", CODE) as (_, port),
        hosts.line("long"),
        listener(hosts, port, heard, "--code", CODE, "--seconds", "4") as client,
    ):
        result = client.wait()
    assert result.status == 0, result
    # The machine may stand still for a moment, and the line with it.
    assert sum(map(len, find_silence(heard))) < frames_in(heard) / 8


def test_a_third_machine_without_the_code_hears_nothing(
    hosts: Hosts, song: Path, tmp_path: Path
) -> None:
    for arguments, audible in ((("--code", CODE), False), (("--open",), True)):
        record, heard = tmp_path / f"record {arguments[0]}", tmp_path / f"heard {arguments[0]}.wav"
        with singing(hosts, song, *arguments) as (server, port):
            with third_machine_listening(hosts, record):
                listen = partial(listener, hosts, port, heard, *arguments, "--seconds", "1")
                until_whole(listen, heard, is_whole=partial(lasts, heard, 1))
            if not audible:
                for guess in ((), ("--open",), ("--code", "KQ7M-2XFD-9WPB")):
                    stolen = tmp_path / "stolen.wav"
                    with listener(hosts, port, stolen, *guess, host=hosts.between) as thief:
                        result = thief.wait()
                    assert result.status == 1, result
                    assert not frames_in(stolen)
                server.wait_for_output(r"10\.77\.2\.1:\d+: was asked for the pairing code\n")
                server.wait_for_output(r"10\.77\.2\.1:\d+: turned away: wrong pairing code\n")
        samples, wire = heard.read_bytes()[WAV_HEADER_BYTES:], record.read_bytes()
        assert len(wire) > len(samples)
        parts = [samples[at : at + 8 * FRAME_BYTES] for at in range(0, len(samples), 6000)]
        found = sum(part in wire for part in parts)
        # In the open, a part can be cut in two by the end of a packet.
        assert found >= len(parts) / 2 if audible else not found
