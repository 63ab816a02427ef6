"""Any sound file plays, over and over and without a gap, or one line says why it does not."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import common
import server
from common import AudioFormat
from sound import (
    MONO,
    Script,
    decode,
    ends_with_one_line,
    heard_from_the_start,
    is_part,
    lasts,
    numbered_frames,
    port_of,
    read_wav,
    start_client,
    start_server,
    until_whole,
    write_wav,
)

STEREO = AudioFormat(44_100, 2)
FRAMES = 60_000  # with the loop's seam well inside two seconds
PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")


def encode(source: Path, target: Path, *options: str) -> Path:
    """Make `target` of the sound in `source` by ffmpeg; return it."""
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(source), *options, str(target)]
    subprocess.run(command, check=True, timeout=60)
    return target


def chunk(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    """Return a chunk of a WAV file, whose `size` may be wrong."""
    return struct.pack("<4sI", kind, len(content) if size is None else size) + content


def wav(*chunks: bytes) -> bytes:
    """Return a WAV file of these chunks."""
    return chunk(b"RIFF", b"WAVE" + b"".join(chunks))


def pcm_format(audio: AudioFormat = MONO, encoding: int = 1, bits: int = 16) -> bytes:
    """Return the chunk that tells a WAV file's format."""
    frame_bytes = audio.channels * bits // 8
    fields = (encoding, audio.channels, audio.rate, audio.rate * frame_bytes, frame_bytes, bits)
    extension = struct.pack("<HHI", 22, bits, 3) + PCM_GUID if encoding == 0xFFFE else b""
    return chunk(b"fmt ", struct.pack("<HHIIHH", *fields) + extension)


def read_twice(path: Path, rate: int | None = None, channels: int | None = None) -> bytes:
    """Return what a file gives when it is read to its end and again."""
    sound = server.find_sound(str(path), rate, channels)
    return b"".join(itertools.chain(sound.read_once(), sound.read_once()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a plain WAV file."""
    path = tmp_path / "sound.wav"
    write_wav(path, numbered_frames(FRAMES, 2), STEREO)
    return path


# --- what plays -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["song.flac", "song.aiff", "song.w64", "song.caf", "song.wv", "song.au", "24.wav"]
)
def test_a_lossless_file_goes_out_sample_for_sample_over_and_over(
    source: Path, name: str, silent_machine: dict[str, str]
) -> None:
    options = ["-c:a", "pcm_s24le"] if name == "24.wav" else []
    song = encode(source, source.with_name(name), *options)
    heard = source.with_name("heard.wav")
    arguments = ("--output", str(heard), "--seconds", "3")
    with start_server(silent_machine, "--input", str(song)) as sender:
        until_whole(
            lambda: start_client(silent_machine, port_of(sender), *arguments),
            heard,
            is_whole=lambda: lasts(heard, 3),
        )
    audio, samples = read_wav(heard)
    assert audio == STEREO
    assert samples in numbered_frames(FRAMES, 2) * 5


@pytest.mark.parametrize(
    ("name", "options"),
    [("song.mp3", ()), ("song.ogg", ("-c:a", "libvorbis")), ("song.opus", ()), ("song.m4a", ())],
)
def test_a_lossy_file_gives_what_ffmpeg_hears_in_it(
    source: Path, name: str, options: tuple[str, ...]
) -> None:
    song = encode(source, source.with_name(name), *options)
    own = AudioFormat(48_000, 2) if name == "song.opus" else STEREO
    assert server.find_sound(str(song), None, None).audio == own
    heard = memoryview(read_twice(song)).cast("h")
    expected = memoryview(2 * decode(song, own)).cast("h")
    assert len(heard) == len(expected)
    # Other versions of FFmpeg round in other ways.
    assert max(abs(one - other) for one, other in zip(heard, expected, strict=True)) <= 2


@pytest.mark.parametrize("excess", [1, 8])
def test_a_wav_file_whose_size_counts_its_own_header_or_a_byte_that_is_missing_is_whole(
    source: Path, excess: int
) -> None:
    song = encode(source, source.with_name("song24.wav"), "-c:a", "pcm_s24le")
    content = song.read_bytes()
    song.write_bytes(struct.pack("<4sI", b"RIFF", len(content) - 8 + excess) + content[8:])
    assert read_twice(song) == 2 * numbered_frames(FRAMES, 2)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_alaw"])
def test_a_wav_file_of_another_encoding_is_converted(source: Path, codec: str) -> None:
    song = encode(source, source.with_name("song.wave"), "-c:a", codec, "-f", "wav")
    assert read_twice(song) == 2 * decode(song, STEREO)


def test_a_file_is_converted_to_the_rate_and_channels_asked_for(source: Path) -> None:
    sound = server.find_sound(str(source), 48_000, 1)
    assert sound.audio == MONO
    frames = len(b"".join(sound.read_once())) // 2
    assert abs(frames - FRAMES * 48_000 / STEREO.rate) < 2


def test_mono_is_as_loud_on_either_side_of_stereo(tmp_path: Path) -> None:
    write_wav(tmp_path / "mono.wav", numbered_frames(999), MONO)
    heard = memoryview(read_twice(tmp_path / "mono.wav", channels=2)).cast("h")
    assert heard[0::2].tobytes() == heard[1::2].tobytes() == 2 * numbered_frames(999)


def test_a_rate_out_of_range_is_converted(tmp_path: Path) -> None:
    write_wav(tmp_path / "slow.wav", bytes(160), AudioFormat(100, 1))
    sound = server.find_sound(str(tmp_path / "slow.wav"), None, None)
    assert sound.audio == MONO
    assert len(b"".join(sound.read_once())) == MONO.frames_in(800) * 2


SAMPLES = numbered_frames(1_000)
HEADERS: dict[str, tuple[bytes, bytes]] = {
    "extensible": (wav(pcm_format(encoding=0xFFFE), chunk(b"data", SAMPLES)), SAMPLES),
    "size 0": (b"RIFF\0\0\0\0WAVE" + pcm_format() + chunk(b"data", SAMPLES, 0), SAMPLES),
    "size unknown": (wav(pcm_format(), chunk(b"data", SAMPLES, 0xFFFF_FFFF)), SAMPLES),
    "half a frame more": (wav(pcm_format(), chunk(b"data", SAMPLES + b"x")), SAMPLES),
    "killed in a frame": (wav(pcm_format(), chunk(b"data", SAMPLES + b"x", 0)), SAMPLES),
    "other chunks": (
        wav(chunk(b"JUNK", b"abc") + b"\0", pcm_format(), chunk(b"data", SAMPLES), b"LIST"),
        SAMPLES,
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wav_file_with_a_header_of_its_own_kind_plays_without_av(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    content, samples = HEADERS[name]
    (tmp_path / "x.wav").write_bytes(content)
    assert read_twice(tmp_path / "x.wav") == 2 * samples


@pytest.mark.parametrize("frames", [1, 6, 7, 199, 9_999])
def test_a_file_comes_in_blocks_of_any_size_without_a_gap(tmp_path: Path, frames: int) -> None:
    write_wav(tmp_path / "short.wav", numbered_frames(7, 2), STEREO)
    parts = server.over_and_over(server.find_sound(str(tmp_path / "short.wav"), None, None))
    blocks = list(server.in_blocks(itertools.islice(parts, 200), 4 * frames))
    assert [len(each) for each in blocks[:-1]] == [4 * frames] * (len(blocks) - 1)
    assert b"".join(blocks) == 200 * numbered_frames(7, 2)


# --- what does not --------------------------------------------------------------------------


def test_more_channels_than_can_be_sent_are_a_line(
    tmp_path: Path, silent_machine: dict[str, str]
) -> None:
    write_wav(tmp_path / "many.wav", bytes(8_000), AudioFormat(48_000, 40))
    arguments = ("--port", "0", "--input", str(tmp_path / "many.wav"))
    with Script("server.py", silent_machine, *arguments) as sender:
        ends_with_one_line(sender, "many.wav", "40 channels cannot be mixed")


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 0), (0, 1)])
def test_a_wav_file_without_channels_or_rate_is_told_as_that(
    tmp_path: Path, rate: int, channels: int
) -> None:
    path = tmp_path / "none.wav"
    write_wav(path, bytes(8_000), AudioFormat(48_000, 1))
    header = bytearray(path.read_bytes())
    header[22:28] = struct.pack("<HI", channels, rate)
    path.write_bytes(header)
    with pytest.raises(server.Unplayable, match=f"it has {channels} channels at {rate} Hz"):
        server.find_sound(str(path), None, None)


def cut(path: Path) -> None:
    """Leave off a file's last quarter, and half a frame."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4 + 1])


CUT = {
    "cut.wav": "pcm_s16le",
    "cut.flac": "flac",
    "cut.aiff": "pcm_s16be",
    "24.wav": "pcm_s24le",
    "float.wav": "pcm_f32le",
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_stops_half_way_plays_to_there_and_ends_with_status_1(
    source: Path, name: str, silent_machine: dict[str, str]
) -> None:
    sound = numbered_frames(4 * STEREO.rate, 2)
    write_wav(source, sound, STEREO)
    song = encode(source, source.with_name(name), "-c:a", CUT[name])
    cut(song)
    heard = source.with_name("heard.wav")
    with heard_from_the_start(silent_machine, song, "--output", str(heard)) as (sender, writer):
        assert writer.end() == common.EXIT_OK
        assert f"The sound has ended: {song} cannot be read any further" in writer.text()
        assert sender.end() == common.EXIT_FAILED
        assert f"{song} cannot be read any further" in sender.text()
    samples = read_wav(heard)[1]
    assert len(samples) > FRAMES
    # What a client that stands still was too slow for is silence, and told.
    assert is_part(samples, sound) if "missed" in writer.text() else samples in sound


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing.mp3": (lambda path: None, "no such file"),
    "folder.wav": (Path.mkdir, "it is not a file"),
    "fifo.wav": (make_fifo, "it is not a file"),
    "empty.wav": (Path.touch, "FFmpeg"),
    "noise.wav": (lambda path: path.write_bytes(b"\x93" * 4_000), "FFmpeg"),
    "half.flac": (lambda path: path.write_bytes(b"fLaC\0\0\0\x22"), "FFmpeg"),
    "silent.wav": (lambda path: path.write_bytes(wav(pcm_format(), chunk(b"data", b""))), "no s"),
    "text": (lambda path: path.write_text("not a sound\n" * 99), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_sound_is_a_line(
    tmp_path: Path, silent_machine: dict[str, str], name: str
) -> None:
    make, words = BAD[name]
    make(tmp_path / name)
    arguments = ("--port", "0", "--input", str(tmp_path / name))
    with Script("server.py", silent_machine, *arguments) as sender:
        ends_with_one_line(sender, f"cannot play {tmp_path / name}: ", words)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.mp3", "MP3"),
        ("a.flac", "FLAC"),
        ("a.opus", "OPUS"),
        ("a.m4a", "M4A"),
        ("a.aiff", "AIFF"),
    ],
)
def test_without_av_a_line_says_what_a_file_is_and_what_would_help(
    source: Path, without_av: dict[str, str], name: str, kind: str
) -> None:
    song = encode(source, source.with_name(name))
    with Script("server.py", without_av, "--port", "0", "--input", str(song)) as sender:
        ends_with_one_line(sender, f"it is {kind}", "the package av", "install")


def test_without_av_an_ending_is_harmless_to_print(
    tmp_path: Path, without_av: dict[str, str]
) -> None:
    song = tmp_path / "a.\x1b[2J"
    song.write_bytes(b"no sound")
    with Script("server.py", without_av, "--port", "0", "--input", str(song)) as sender:
        ends_with_one_line(sender, r"it is \x1b[2J")
        assert "\x1b" not in sender.text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("-c:a", "pcm_s24le"), "24-bit samples"), (("-c:a", "pcm_f32le"), "floating-point samples")],
)
def test_without_av_a_wav_of_another_encoding_is_a_line(
    source: Path, without_av: dict[str, str], arguments: tuple[str, ...], words: str
) -> None:
    song = encode(source, source.with_name("other.wav"), *arguments)
    with Script("server.py", without_av, "--port", "0", "--input", str(song)) as sender:
        ends_with_one_line(sender, words, "the package av", "install")


def test_without_av_a_format_that_is_not_the_files_is_a_line(
    source: Path, without_av: dict[str, str]
) -> None:
    arguments = ("--port", "0", "--input", str(source), "--rate", "48000")
    with Script("server.py", without_av, *arguments) as sender:
        ends_with_one_line(sender, "44100 Hz stereo", "the package av", "install")


@given(
    data=st.binary(max_size=80)
    | st.builds(
        lambda content, at, put: content[:at] + put + content[at + len(put) :],
        st.sampled_from([content for content, _ in HEADERS.values()]),
        st.integers(0, 120),
        st.binary(max_size=12),
    )
)
def test_no_bytes_make_the_wav_reader_raise_anything_but_its_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "mangled.wav"
    path.write_bytes(data)
    try:
        sound = server.PlainWav(str(path))
        for part in sound.read_once():
            assert part
    except server.Unplayable as error:
        assert str(error).isprintable()
