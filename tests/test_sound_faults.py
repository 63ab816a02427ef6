"""What may go wrong with sound, and what a terminal shows of it: one clear line each."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

import common
from common import AudioBlock
from pairing import CODE
from sound import (
    MONO,
    Script,
    ends_with_one_line,
    let_pass,
    make_tone,
    pack_welcome,
    port_of,
    start_client,
    start_server,
    write_wav,
)
from sound_card import (
    VirtualSoundCard,
)
from support import FakeServer, RawClient, frame

# --- at a terminal --------------------------------------------------------------------------


def test_the_pairing_code_is_asked_for_where_the_user_sees_it(
    card: VirtualSoundCard, tmp_path: Path
) -> None:
    with (
        start_server(card, "--code", CODE) as sender,
        start_client(card, port_of(sender), terminal=True) as player,
    ):
        player.wait_for("Pairing code: ")
        shown = player.text()
        let_pass(card, sender, 1, tmp_path, "--code", CODE)
        assert player.text() == shown, "no status line comes over the question"
        player.type(CODE + "\n")
        player.wait_for("Listening")
        player.wait_for_output(r"  0:(0[1-9]|[1-5]\d)")  # on a busy machine it leaves some out
        player.type("\x03")
        assert player.end() == common.EXIT_OK


def test_ctrl_c_before_anything_was_heard_is_status_130(card: VirtualSoundCard) -> None:
    with (
        start_server(card, "--code", CODE) as sender,
        start_client(card, port_of(sender), terminal=True) as player,
    ):
        player.wait_for("Pairing code: ")
        player.type("\x03")
        assert player.end() == common.EXIT_INTERRUPTED
    with start_client(card, "1") as player:
        player.wait_for("looking for it")
        assert player.interrupt() == common.EXIT_INTERRUPTED


# --- what may go wrong ----------------------------------------------------------------------


def test_a_server_that_is_busy_when_it_comes_back_is_waited_for(
    silent_machine: dict[str, str], tmp_path: Path
) -> None:
    write_wav(tmp_path / "tone.wav", make_tone(1), MONO)
    tone = ("--input", str(tmp_path / "tone.wav"), "--max-clients", "1")
    output = ("--output", str(tmp_path / "heard.wav"))
    with start_server(silent_machine, *tone) as sender:
        player = start_client(silent_machine, port := port_of(sender), *output)
        player.wait_for("Listening")
        sender.kill()
    with player:
        player.wait_for("looking for it")
        player.signal(signal.SIGSTOP)
        with start_server(silent_machine, *tone, "--port", port):
            with start_client(silent_machine, port, *output) as other:
                other.wait_for("Listening")
                player.signal(signal.SIGCONT)
                player.wait_for("this server is busy with 1 client: try again later - looking")
                assert other.interrupt() == common.EXIT_OK
            player.wait_for("Listening", times=2)


def test_no_microphone_and_no_loudspeaker_are_a_line_each(silent_machine: dict[str, str]) -> None:
    with Script("server.py", silent_machine, "--port", "0") as sender:
        ends_with_one_line(sender, "no microphone", "--input")
    with Script("client.py", silent_machine) as player:
        ends_with_one_line(player, "no loudspeaker", "--output")


def test_no_pyaudio_is_a_line(card: VirtualSoundCard, tmp_path: Path) -> None:
    (tmp_path / "pyaudio.py").write_text("raise ImportError('not here')\n")
    environment = {**card.environment, "PYTHONPATH": str(tmp_path)}
    with Script("server.py", environment, "--port", "0") as sender:
        ends_with_one_line(sender, "PyAudio", "pip install")


def test_a_name_that_no_device_has_is_a_line(card: VirtualSoundCard) -> None:
    with start_client(card, "1", "--output", "gramophone") as player:
        ends_with_one_line(player, "gramophone", "pulse")
    with start_client(card, "1", "--output", "talk.mp3") as player:
        ends_with_one_line(player, "talk.mp3", "of files, only .wav, .flac, .opus are written")


def test_devices_are_listed(card: VirtualSoundCard) -> None:
    for name in ("server.py", "client.py"):
        with Script(name, card, "--list-devices") as script:
            assert script.end() == common.EXIT_OK
            assert "channels" in script.lines[0]
            assert any(line.startswith("*") and "ALSA" in line for line in script.lines)
            assert "ALSA lib" not in script.text()


@pytest.mark.parametrize(
    "frames",
    [
        (pack_welcome(rate=0),),
        (pack_welcome(channels=1_000_000),),
        (pack_welcome(), b"\xff\xff\xff\xff"),
        (pack_welcome(), common.LENGTH.pack(3) + b"abc"),
        (pack_welcome(), AudioBlock(0, 0, b"odd").encode()),
        (pack_welcome(), AudioBlock(9, 0, b"ok").encode(), AudioBlock(0, 0, b"no").encode()),
    ],
)
def test_a_bad_server_is_a_line(
    card: VirtualSoundCard, tmp_path: Path, frames: tuple[bytes, ...]
) -> None:
    output = str(tmp_path / "x.wav")
    with (
        FakeServer(b"".join(frames)) as fake,
        start_client(card, str(fake.port), "-q", "--output", output) as reader,
    ):
        ends_with_one_line(reader)


def test_a_message_that_is_nested_as_deeply_as_can_be_does_not_end_a_broadcast(
    silent_machine: dict[str, str],
) -> None:
    """On the small stack of a listener's thread, Python 3.13 crashes where it is parsed."""
    with start_server(silent_machine, "--input", "-", stdin=subprocess.PIPE) as sender:
        port = int(port_of(sender))
        with RawClient(port) as stranger:
            stranger.send(frame(b"[" * common.MAX_HELLO_BYTES))
            stranger.read_all()
        sender.wait_for("received a message that is not JSON")
        with RawClient(port) as listener:
            listener.greet("audio")


def test_standard_input_is_meant_where_a_file_has_its_sign_for_a_name_as_well(
    silent_machine: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "-").write_bytes(b"no sound")
    options = {"cwd": tmp_path, "stdin": subprocess.PIPE}
    with start_server(silent_machine, "--input", "-", **options) as sender:
        assert "Broadcasting standard input" in sender.text()


def test_seconds_end_a_client_that_finds_no_server(card: VirtualSoundCard, tmp_path: Path) -> None:
    output = str(tmp_path / "x.wav")
    with start_client(card, "1", "--output", output, "--seconds", "1") as reader:
        assert reader.end() == common.EXIT_FAILED
        assert "no server" in reader.lines[-1]


@pytest.mark.parametrize("arguments", [("--rate", "0"), ("--rate", "x"), ("--channels", "9")])
def test_wrong_arguments_are_status_2(
    silent_machine: dict[str, str], arguments: tuple[str, str]
) -> None:
    with Script("server.py", silent_machine, *arguments) as sender:
        assert sender.end() == common.EXIT_USAGE


@pytest.mark.parametrize("end", ["os.abort()", "import ctypes; ctypes.string_at(0)"])
def test_a_library_that_ends_the_process_has_its_last_words_shown(
    card: VirtualSoundCard, tmp_path: Path, end: str
) -> None:
    # In the place of PyAudio, as nothing real is known that still does this.
    (tmp_path / "pyaudio.py").write_text(
        "import os, sys\n"
        "__version__ = '0.2.14'\n"
        "paContinue = paInt16 = 0\n"
        "def PyAudio():\n"
        "    for _ in range(2_000):\n"
        "        os.write(2, b'chatter\\n')\n"
        "    os.write(2, b'lib.c:7: Assertion failed.\\n')\n"
        f"    {end}\n"
    )
    environment = {**card.environment, "PYTHONPATH": str(tmp_path)}
    with Script("server.py", environment, "--port", "0") as sender:
        ends_with_one_line(sender, "sound library", "lib.c:7: Assertion failed.")
