"""What `--record` and `--output` write: WAV, FLAC and Opus, valid whenever the client is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

import client
import common
import server
from common import AudioFormat
from sound import (
    MONO,
    TONE_HZ,
    Script,
    decode,
    ends_with_one_line,
    level,
    make_tone,
    numbered_frames,
    port_of,
    read_wav,
    start_client,
    start_server,
    until_whole,
    write_wav,
)
from sound_card import RATE
from support import run_script, small_disk
from waiting import ends_soon, wait_for

STEREO = AudioFormat(44_100, 2)
QUIET = common.Console(quiet=True)
ENDINGS = [".wav", ".flac", ".opus"]


def codec_of(path: Path) -> str:
    """Return what ffprobe takes a file for."""
    command = ["ffprobe", "-v", "error", "-of", "json", "-show_streams", str(path)]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True)
    (stream,) = json.loads(done.stdout)["streams"]
    return str(stream["codec_name"])


@pytest.fixture
def sender(tmp_path: Path, silent_machine: dict[str, str]) -> Iterator[Script]:
    """Give a server that plays a tone over and over."""
    write_wav(tmp_path / "tone.wav", make_tone(1), MONO)
    with start_server(silent_machine, "--input", str(tmp_path / "tone.wav")) as running:
        yield running


def record(machine: dict[str, str], port: str, path: Path) -> Script:
    """Return a client that records."""
    return start_client(machine, port, "--output", str(path))


# --- what is written ------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 8])
def test_opus_has_each_of_so_many_channels_at_its_place(tmp_path: Path, channels: int) -> None:
    audio = AudioFormat(48_000, channels)
    tone = array("h", make_tone(1)[:96_000])
    sent = array("h", bytes(2 * channels * len(tone)))
    for place in range(channels):
        sent[place::channels] = array("h", (value * (place + 1) // 8 for value in tone))
    output = client.RecordingFiles(str(tmp_path / "talk.opus"), QUIET).open(audio)
    output.write(sent.tobytes(), 0)
    output.close()
    heard = array("h")
    for part in server.DecodedFile(str(tmp_path / "talk.opus"), None, None).read_once():
        heard.frombytes(part)
    assert len(heard) == len(sent)
    for place in range(channels):
        loud = max(heard[place::channels][4_800:-4_800])
        assert loud == pytest.approx(max(sent[place::channels]), rel=0.06)


@pytest.mark.parametrize("channels", [5, 7, 9])
def test_opus_is_not_recorded_with_more_channels_or_mixed_up_ones(
    tmp_path: Path, channels: int
) -> None:
    files = client.RecordingFiles(str(tmp_path / "talk.opus"), QUIET)
    with pytest.raises(common.SocketPairError, match=f"cannot hold .* {channels} channels: record"):
        files.open(AudioFormat(48_000, channels))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("audio", [MONO, STEREO, AudioFormat(96_000, 6)])
def test_flac_has_every_sample(tmp_path: Path, audio: AudioFormat) -> None:
    sent = numbered_frames(30_001, audio.channels)
    output = client.RecordingFiles(str(tmp_path / "talk.flac"), QUIET).open(audio)
    for start in range(0, len(sent), 960 * audio.frame_bytes):
        output.write(sent[start : start + 960 * audio.frame_bytes], 0)
    output.close()
    assert codec_of(tmp_path / "talk.flac") == "flac"
    assert decode(tmp_path / "talk.flac", audio) == sent


@pytest.mark.parametrize("audio", [MONO, STEREO])
def test_opus_has_the_tone_and_the_length(tmp_path: Path, audio: AudioFormat) -> None:
    sent = make_tone(2)
    output = client.RecordingFiles(str(tmp_path / "talk.opus"), QUIET).open(audio)
    for start in range(0, len(sent), 480):
        output.write(sent[start : start + 480], 0)
    output.close()
    assert codec_of(tmp_path / "talk.opus") == "opus"
    heard = decode(tmp_path / "talk.opus", MONO)
    seconds = len(sent) / audio.frame_bytes / audio.rate
    assert abs(len(heard) / 2 / RATE - seconds) < 0.001
    pitch = TONE_HZ * audio.rate * audio.channels / RATE
    assert level(heard[9_600:-9_600], pitch) > 9_000


def test_a_tone_is_recorded_beside_the_pipe_that_it_goes_through(
    sender: Script, tmp_path: Path, silent_machine: dict[str, str]
) -> None:
    recording, heard = tmp_path / "talk.flac", tmp_path / "heard.raw"
    arguments = ("--output", "-", "--record", str(recording), "--seconds", "2")

    def listen() -> Script:
        with heard.open("wb") as output:
            return start_client(silent_machine, port_of(sender), *arguments, stdout=output)

    until_whole(listen, recording, is_whole=lambda: heard.stat().st_size == 2 * RATE * 2)
    samples = heard.read_bytes()
    assert decode(recording, MONO) == samples


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_recording_is_valid_up_to_the_last_second_after_kill_9(
    sender: Script, tmp_path: Path, silent_machine: dict[str, str], ending: str
) -> None:
    recording, beside = tmp_path / f"talk{ending}", tmp_path / "beside.wav"
    arguments = ("--output", str(recording), "--record", str(beside))

    def is_kept() -> bool:
        """Kill a client that records twice; return whether this one has all that the other has.

        But for the last second, and half of another for how far it may be behind the other: on a
        machine that stands still it is further.
        """
        for path in (recording, beside):
            path.unlink(missing_ok=True)
        with start_client(silent_machine, port_of(sender), *arguments) as killed:
            wait_for(lambda: beside.exists() and beside.stat().st_size > 4 * RATE * 2, "4 s")
            killed.kill()
        heard = decode(recording, MONO)
        is_tone = level(heard[-RATE:], TONE_HZ) > 9_000
        return is_tone and len(heard) > beside.stat().st_size - 1.5 * RATE * 2

    wait_for(is_kept, "a recording up to the last second")


def test_a_kill_at_its_birth_leaves_a_valid_wav_or_none(tmp_path: Path) -> None:
    code = (
        "import sys, client, common\n"
        "files = client.RecordingFiles(sys.argv[1], common.Console(quiet=True))\n"
        "print(flush=True)\n"
        "while True: files.open(common.AudioFormat(48_000, 1)).close()\n"
    )
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", code, str(folder / "talk.wav")]
        environment = {**os.environ, "PYTHONPATH": str(Path(client.__file__).parent)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            wait_for(lambda: len(os.listdir(folder)) > number, "recordings")  # noqa: B023
            process.send_signal(signal.SIGKILL)
        for path in folder.glob("talk*.wav"):
            assert read_wav(path) == (MONO, b"")


# --- names ----------------------------------------------------------------------------------


def test_a_server_that_comes_back_in_the_same_format_goes_into_the_same_file(
    tmp_path: Path, silent_machine: dict[str, str]
) -> None:
    write_wav(tmp_path / "sent.wav", numbered_frames(48_000), MONO)
    arguments = ("--input", str(tmp_path / "sent.wav"))
    recording = tmp_path / "out" / "talk.wav"
    recording.parent.mkdir()
    with start_server(silent_machine, *arguments) as first:
        port = port_of(first)
        listening = record(silent_machine, port, recording)
        listening.wait_for("Listening")
        first.kill()
    with listening, start_server(silent_machine, "--port", port, *arguments):
        listening.wait_for("Listening", times=2)
        size = recording.stat().st_size
        wait_for(lambda: recording.stat().st_size > size, "more sound")
        assert listening.interrupt() == common.EXIT_OK
    assert os.listdir(recording.parent) == ["talk.wav"]


def test_recordings_of_one_name_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_RECORDINGS", 3)
    files = client.RecordingFiles(str(tmp_path / "talk.wav"), QUIET)
    for _ in range(3):
        files.open(MONO).close()
    with pytest.raises(common.SocketPairError, match="another name"):
        files.open(MONO)
    assert sorted(os.listdir(tmp_path)) == ["talk (1).wav", "talk (2).wav", "talk.wav"]


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_a_recording_that_cannot_be_begun_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    files = client.RecordingFiles(str(tmp_path / "talk.wav"), QUIET)
    with (
        pytest.raises(common.SocketPairError, match="cannot record: no space left"),
        files.create(),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_where_there_are_no_hard_links_a_recording_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for name in ("talk.wav", "talk (1).wav"):
        client.RecordingFiles(str(tmp_path / "talk.wav"), QUIET).open(MONO).close()
        assert read_wav(tmp_path / name) == (MONO, b"")
    assert sorted(os.listdir(tmp_path)) == ["talk (1).wav", "talk.wav"]


@pytest.mark.parametrize("option", ["--record", "--output"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder.wav", "it is a folder"),
        ("nowhere/talk.wav", "no such folder"),
    ],
)
def test_what_cannot_be_recorded_into_is_a_line(
    silent_machine: dict[str, str], tmp_path: Path, option: str, name: str, words: str
) -> None:
    (tmp_path / "folder.wav").mkdir()
    arguments = ["--port", "1", option, str(tmp_path / name)]
    if option == "--record":
        arguments += ["--output", str(tmp_path / "beside.wav")]
    with Script("client.py", silent_machine, *arguments) as listening:
        ends_with_one_line(listening, name, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("talk.xyz", "only .wav, .flac, .opus are written"),
        ("", "only .wav, .flac, .opus are written"),
        (".", "only .wav, .flac, .opus are written"),
        ("-", "use --output - for standard output"),
    ],
)
def test_what_no_recording_can_be_is_a_wrong_argument(
    tmp_path: Path, name: str, words: str
) -> None:
    result = run_script("client.py", "audio", "--record", name, cwd=tmp_path)
    assert result.status == common.EXIT_USAGE
    assert len(result.error_lines) == 1
    assert "argument --record: " in result.error_lines[0]
    assert words in result.error_lines[0]


@pytest.mark.parametrize("ending", [".flac", ".opus"])
def test_without_av_a_line_says_what_would_help(
    without_av: dict[str, str], tmp_path: Path, ending: str
) -> None:
    with record(without_av, "1", tmp_path / f"talk{ending}") as listening:
        ends_with_one_line(listening, "the package av", "install")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_ends_a_recording_with_a_line_and_what_was_written_is_valid(
    tmp_path: Path, ending: str
) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        recording = disk / f"talk{ending}"
        output = client.RecordingFiles(str(recording), QUIET).open(STEREO)
        with pytest.raises(common.SocketPairError, match="cannot record: no space left"):
            fill(output)
        ends_soon(lambda: close_failed(output))
        command = ["ffmpeg", "-v", "error", "-i", str(recording), "-f", "null", "-"]
        subprocess.run(command, check=True, timeout=60)


def fill(output: client.RecordingOutput) -> None:
    """Write noise until that fails."""
    for _ in range(6_000):
        output.write(os.urandom(STEREO.frame_bytes * 4_410), 0)


def close_failed(output: client.RecordingOutput) -> None:
    """Close an output that has failed, and says so again."""
    with pytest.raises(common.SocketPairError):
        output.close()
