"""What both sides say about sound: the meter, the summary, and sound that is not to be had."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

import common
from common import LevelMeter
from processes import Process
from sound import (
    MONO,
    Script,
    ends_with_one_line,
    make_tone,
    port_of,
    start_client,
    start_server,
    until_whole,
    write_wav,
)
from sound_card import RATE
from support import posix, wait_for

if sys.platform != "win32":
    import fcntl
    import termios

QUIET = array("h", [100, -100] * 60).tobytes()
LOUDEST = array("h", [32_767, -32_768] * 60).tobytes()


# --- the meter ------------------------------------------------------------------------------


def test_the_meter_shows_clipping_for_a_while_wherever_it_was_in_the_sound() -> None:
    meter = LevelMeter()
    for samples in (QUIET, LOUDEST, QUIET):
        meter.hear(samples)
    assert "CLIP" in meter.show()
    meter.hear(QUIET)
    assert "CLIP" in meter.show()
    for _ in range(common.METER_CLIP_SHOWS):
        meter.hear(QUIET)
        shown = meter.show()
    assert "CLIP" not in shown
    assert "dB" in shown


def test_the_meter_says_where_there_is_no_sound() -> None:
    meter = LevelMeter()
    assert meter.show() == "waiting for sound"
    meter.hear(QUIET)
    assert "dB" in meter.show()
    assert "dB" in meter.show()  # as where blocks are longer than the time between two looks
    meter.hear(b"")
    assert meter.show() == "waiting for sound"


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_narrow_terminal_shortens_the_bar_not_what_stands_beside_it(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    console = common.Console(quiet=False)
    console.has_status = True
    meter = LevelMeter()
    meter.hear(LOUDEST)
    console.show_loudness(meter, "1 dropout")
    shown = capsys.readouterr().err
    assert shown.endswith("|]    0 dB CLIP  1 dropout")
    assert len(shown) < columns


@posix
def test_a_status_line_fits_its_own_terminal_wherever_standard_output_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near, far = os.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    with open(far, "w") as terminal, open(near, "rb", buffering=0) as shown:
        monkeypatch.setattr(sys, "stderr", terminal)
        console = common.Console(quiet=False, data_on_stdout=True)
        console.show_status(200 * "x")
        (line,) = re.findall(rb"x+", shown.read(1000))
    assert 40 < len(line) < 50


def test_clipping_shows_at_a_terminal(silent_machine: dict[str, str], tmp_path: Path) -> None:
    write_wav(tmp_path / "loud.wav", LOUDEST * 400, MONO)
    arguments = ("--port", "0", "--input", str(tmp_path / "loud.wav"))
    with Script("server.py", silent_machine, *arguments, terminal=True) as sender:
        sender.wait_for("CLIP")


# --- the summary ----------------------------------------------------------------------------


def test_the_shortest_time_is_heard_and_told_in_tenths(
    silent_machine: dict[str, str], tmp_path: Path
) -> None:
    write_wav(tmp_path / "tone.wav", make_tone(1), MONO)
    with start_server(silent_machine, "--input", str(tmp_path / "tone.wav")) as sender:
        recording = tmp_path / "heard.wav"
        arguments = ("--output", str(recording), "--seconds", "0.05")

        def hears_all() -> bool:
            """Listen; return whether the server did not stand still, for longer than that."""
            recording.unlink(missing_ok=True)
            with start_client(silent_machine, port_of(sender), *arguments) as reader:
                assert reader.end() == common.EXIT_OK
            assert reader.lines[-1].startswith(("heard 0:00.0", "heard 0:00.1"))
            return reader.lines[-1] == "heard 0:00.1"

        wait_for(hears_all)
    assert recording.stat().st_size == 44 + 2 * RATE // 20


def test_less_heard_than_asked_for_is_said(silent_machine: dict[str, str], tmp_path: Path) -> None:
    sound = make_tone(1)
    with start_server(silent_machine, "--input", "-", stdin=subprocess.PIPE) as sender:
        output = ("--output", str(tmp_path / "heard.wav"), "--seconds", "30")
        with start_client(silent_machine, port_of(sender), *output) as reader:
            reader.wait_for("Listening")
            sender.wait_for("listening")
            assert sender.popen.stdin is not None
            sender.popen.stdin.write(sound)
            sender.popen.stdin.close()
            assert reader.end() == common.EXIT_OK
            assert reader.lines[-1].startswith("heard 0:01.0 of 0:30.0")


def test_time_spans_are_told_in_tenths() -> None:
    spans = [0, 0.04, sum([0.005] * 10), 59.94, 59.96, 3_661.25]
    told = [common.format_tenths(span) for span in spans]
    assert told == ["0:00.0", "0:00.0", "0:00.1", "0:59.9", "1:00.0", "1:01:01.3"]


# --- asked -----------------------------------------------------------------------------------


def test_the_question_for_the_mode_is_no_part_of_the_sound(
    silent_machine: dict[str, str], tmp_path: Path
) -> None:
    write_wav(tmp_path / "tone.wav", make_tone(1), MONO)
    heard = tmp_path / "heard.raw"
    with start_server(silent_machine, "--input", str(tmp_path / "tone.wav")) as sender:

        def listen() -> Process:
            with heard.open("wb") as output:
                return Process(
                    *("client.py", "--port", port_of(sender), "--output", "-", "--seconds", "0.1"),
                    stdin=b"sound\naudio\n",
                    stdout=output,
                    env=silent_machine,
                )

        assert "Mode (file/audio): audio" in until_whole(listen).stderr()
    assert heard.stat().st_size == 2 * RATE // 10


def test_sound_on_standard_input_is_no_answer(silent_machine: dict[str, str]) -> None:
    arguments = ("server.py", "--port", "0", "--input", "-")
    with Process(*arguments, stdin=make_tone(0.2), env=silent_machine) as sender:
        result = sender.wait()
    assert result.status == common.EXIT_OK
    assert "0:00.2 of sound" in result.stdout


# --- refused --------------------------------------------------------------------------------


def test_raw_sound_is_not_read_from_a_terminal(silent_machine: dict[str, str]) -> None:
    arguments = ("--port", "0", "--input", "-")
    with Script("server.py", silent_machine, *arguments, terminal=True) as sender:
        ends_with_one_line(sender, "--input -", "not for a terminal")
