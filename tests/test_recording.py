"""Into a file or a pipe every sample arrives as it was captured."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import client
import common
from common import AudioFormat
from processes import ROOT
from sound import (
    MONO,
    OTHER_HZ,
    Script,
    is_heard,
    is_part,
    lasts,
    make_tone,
    numbered_frames,
    port_of,
    read_wav,
    start_client,
    start_server,
    until_whole,
    write_wav,
)
from sound_card import VirtualSoundCard
from waiting import wait_for

END_LIMIT_S = 15.0  # in which a recording hears what the loudspeaker has said last


@pytest.mark.parametrize("audio", [MONO, AudioFormat(44_100, 2)])
def test_a_wav_file_arrives_sample_for_sample(
    card: VirtualSoundCard, tmp_path: Path, audio: AudioFormat
) -> None:
    sent = numbered_frames(audio.rate, audio.channels)
    write_wav(tmp_path / "sent.wav", sent, audio)
    recording = tmp_path / "heard.wav"
    arguments = ("--output", str(recording), "--seconds", "1.5")
    with start_server(card, "--input", str(tmp_path / "sent.wav")) as sender:
        until_whole(
            lambda: start_client(card, port_of(sender), *arguments),
            recording,
            is_whole=lambda: lasts(recording, 1.5),
        )
    heard_format, heard = read_wav(recording)
    assert heard_format == audio
    assert heard in sent * 3  # it is played over and over


def test_a_pipe_arrives_sample_for_sample_and_ends(card: VirtualSoundCard, tmp_path: Path) -> None:
    sent = numbered_frames(40_000, 2)

    def arrives() -> bool:
        said = send_through_pipe(card, sent, tmp_path / "heard.raw")
        heard = (tmp_path / "heard.raw").read_bytes()
        assert len(heard) == len(sent)
        is_whole = "missed" not in said  # as it does where the machine stands still
        assert heard == sent if is_whole else is_part(heard, sent)
        return is_whole

    wait_for(arrives, "all of the sound is heard")


def send_through_pipe(card: VirtualSoundCard, sent: bytes, path: Path) -> str:
    """Have a server send what comes through a pipe; return what a client says that writes it."""
    arguments = ("--input", "-", "--rate", "32000", "--channels", "2")
    with (
        path.open("wb") as heard,
        start_server(card, *arguments, stdin=subprocess.PIPE) as sender,
        start_client(card, port_of(sender), "--output", "-", stdout=heard) as reader,
    ):
        reader.wait_for("Listening")
        sender.wait_for("listening")
        assert sender.popen.stdin is not None
        sender.popen.stdin.write(sent)
        sender.popen.stdin.close()
        assert reader.end() == common.EXIT_OK
        assert sender.end() == common.EXIT_OK
        assert "standard input is at its end" in reader.text()
        return reader.text()


def test_a_pipe_without_sound_is_a_failure(silent_machine: dict[str, str]) -> None:
    arguments = ("--input", "-", "--port", "0")
    with Script("server.py", silent_machine, *arguments) as sender:
        assert sender.end() == common.EXIT_FAILED
        assert any("there was no sound on standard input" in line for line in sender.lines)


def test_a_recording_beside_playing_is_valid_after_kill_9(
    card: VirtualSoundCard, tmp_path: Path
) -> None:
    recording = tmp_path / "talk.wav"
    with (
        start_server(card) as sender,
        start_client(card, port_of(sender), "--record", str(recording)) as player,
    ):
        wait_for(lambda: recording.exists() and recording.stat().st_size > 50_000, "a recording")
        player.kill()
    audio, samples = read_wav(recording)
    assert audio == MONO
    uncounted = recording.stat().st_size - client.WAV_HEADER.size - len(samples)
    # It is killed between a block, in which much may have gathered, and the header counting it.
    assert 0 <= uncounted <= audio.frames_in(common.MAX_BLOCK_MS) * audio.frame_bytes


def test_a_reader_that_goes_ends_the_client_quietly_and_what_is_recorded_stays(
    card: VirtualSoundCard, tmp_path: Path
) -> None:
    write_wav(tmp_path / "sent.wav", numbered_frames(48_000), MONO)
    recording = tmp_path / "heard.wav"
    reading, writing = os.pipe()
    with start_server(card, "--input", str(tmp_path / "sent.wav")) as sender:
        arguments = ("--output", "-", "--record", str(recording))
        with start_client(card, port_of(sender), *arguments, stdout=writing) as player:
            os.close(writing)
            wait_for(lambda: recording.exists() and recording.stat().st_size > 9_000, "sound")
            os.close(reading)
            assert player.end() == common.EXIT_OK
            assert "heard" in player.lines[-1]
            assert "pipe" not in player.text()
    assert len(read_wav(recording)[1]) == recording.stat().st_size - client.WAV_HEADER.size


def test_raw_samples_are_not_written_to_a_terminal(card: VirtualSoundCard) -> None:
    with Script("client.py", card, "--output", "-", terminal=True) as player:
        assert player.end() == common.EXIT_FAILED
        assert "terminal" in player.text()


@pytest.mark.parametrize("sync", [(), ("--sync", "3000")])
def test_what_comes_last_is_played_before_the_client_ends(
    card: VirtualSoundCard, sync: tuple[str, ...]
) -> None:
    wait_for(lambda: is_heard_to_the_end(card, *sync), "the end of the sound", 240)


def is_heard_to_the_end(card: VirtualSoundCard, *sync: str) -> bool:
    """Play a short sound; return whether its end was heard, as where no card stands still then."""
    with (
        start_server(card, "--input", "-", *sync, stdin=subprocess.PIPE) as sender,
        start_client(card, port_of(sender)) as player,
        card.record() as said,
    ):
        sender.wait_for("listening")
        assert sender.popen.stdin is not None
        sender.popen.stdin.write(make_tone(4) + make_tone(0.3, OTHER_HZ))
        sender.popen.stdin.close()
        assert player.end() == common.EXIT_OK
        assert sender.end() == common.EXIT_OK
        with contextlib.suppress(AssertionError):
            wait_for(
                lambda: is_heard(OTHER_HZ, said.samples()), "the end of the sound", END_LIMIT_S
            )
        return is_heard(OTHER_HZ, said.samples())


def test_a_standard_output_that_is_closed_takes_no_sound() -> None:
    client_py = ["client.py", "audio", "--output", "-", "--port", "1", "--seconds", "1"]
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, *client_py]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == common.EXIT_FAILED
    assert ended.stderr == "cannot write to standard output: it is closed\n"


def test_a_wav_that_is_full_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WAV_LIMIT_BYTES", client.WAV_HEADER.size + 2_001)
    (tmp_path / "talk.wav").write_bytes(b"somebody else's")
    files = client.RecordingFiles(str(tmp_path / "talk.wav"), common.Console(quiet=True))
    writer = client.WavWriter(files, MONO)
    sent = numbered_frames(2_500)
    writer.write(sent[:3_000])
    writer.write(sent[3_000:])
    writer.close()
    parts = [read_wav(tmp_path / f"talk ({number}).wav")[1] for number in (1, 2, 3)]
    assert b"".join(parts) == sent
    assert len(parts[0]) == 2_000
    assert (tmp_path / "talk.wav").read_bytes() == b"somebody else's"


def test_a_gap_becomes_silence_of_its_length(tmp_path: Path) -> None:
    output = client.RecordingFiles(str(tmp_path / "gap.wav"), common.Console(quiet=True)).open(MONO)
    output.write(b"\1\1" * 10, 0)
    output.write(b"\2\2" * 10, 60_000)
    output.close()
    assert read_wav(tmp_path / "gap.wav")[1] == b"\1\1" * 10 + bytes(120_000) + b"\2\2" * 10
