"""JACK is used where a JACK device is named, and takes nobody along when it goes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import common
from jack import JackServer
from sound import Script, is_not_missed, port_of, read_wav, start_client, start_server
from sound_card import VirtualSoundCard
from support import ROOT
from waiting import wait_for


@pytest.fixture
def jack() -> Iterator[JackServer]:
    with JackServer() as server:
        yield server


def test_a_jack_server_that_dies_is_nothing_to_who_does_not_use_it(
    card: VirtualSoundCard, jack: JackServer
) -> None:
    is_not_missed(card, jack.environment(card.environment), jack.kill)


def test_jack_devices_that_die_are_waited_for(card: VirtualSoundCard, jack: JackServer) -> None:
    environment = jack.environment(card.environment)
    with (
        start_server(environment, "--input", "system") as sender,
        start_client(environment, port_of(sender), "--output", "system") as player,
    ):
        player.wait_for("Listening")
        jack.kill()
        player.wait_for("the loudspeaker system is gone")
        sender.wait_for("the microphone system is gone")
        jack.start()
        player.wait_for("the loudspeaker system is back")
        sender.wait_for("the microphone system is back")
        assert player.interrupt() == common.EXIT_OK
        assert sender.interrupt() == common.EXIT_INTERRUPTED


def test_a_jack_microphone_is_recorded_at_its_own_rate(jack: JackServer, tmp_path: Path) -> None:
    recording = tmp_path / "jack.wav"
    with start_server(jack.environment(), "--input", "system") as sender:
        arguments = ("--output", str(recording))
        with start_client(jack.environment(), port_of(sender), *arguments) as reader:
            wait_for(lambda: recording.exists() and recording.stat().st_size > 44_100 * 4, "1 s")
            assert reader.interrupt() == common.EXIT_OK
    audio, samples = read_wav(recording)
    assert audio == common.AudioFormat(44_100, 2)
    assert audio.frames_of(samples) >= 44_000


def test_a_rate_that_the_device_cannot_do_is_refused_with_its_own_format(jack: JackServer) -> None:
    arguments = ("--port", "0", "--input", "system", "--rate", "48000")
    with Script("server.py", jack.environment(), *arguments) as sender:
        assert sender.end() == common.EXIT_FAILED
        [line] = sender.lines
    assert "the microphone 'system' cannot be opened in 48000 Hz stereo (" in line
    assert "its own format is 44100 Hz stereo" in line


def test_jack_devices_are_listed_and_named_by_their_number(
    card: VirtualSoundCard, jack: JackServer
) -> None:
    environment = jack.environment(card.environment)
    with Script("server.py", environment, "--list-devices") as listing:
        assert listing.end() == common.EXIT_OK
        lines = listing.lines
    row = next(line for line in lines if "JACK Audio Connection Kit" in line)
    assert "default" in next(line for line in lines if line.startswith("*"))
    with start_server(environment, "--input", row.split()[0]) as sender:
        assert "Broadcasting system, 44100 Hz stereo" in sender.text()


def test_without_any_other_card_jack_is_the_default(
    silent_machine: dict[str, str], jack: JackServer
) -> None:
    with start_server(jack.environment(silent_machine)) as sender:
        assert "44100 Hz" in sender.text()
        assert sender.interrupt() == common.EXIT_INTERRUPTED


def test_ctrl_c_ends_also_where_jack_hangs(card: VirtualSoundCard, jack: JackServer) -> None:
    environment = jack.environment(card.environment)
    with (
        start_server(environment, "--input", "system") as sender,
        start_client(environment, port_of(sender), "--output", "system") as player,
    ):
        player.wait_for("Listening")
        with jack.hanging():
            player.wait_for("is gone")
            sender.wait_for("is gone")
            assert player.interrupt() == common.EXIT_OK
            assert sender.interrupt() == common.EXIT_INTERRUPTED


def test_what_speaks_to_jack_takes_no_module_from_the_current_folder(tmp_path: Path) -> None:
    """There may be what somebody has sent."""
    taken = tmp_path / "taken"
    (tmp_path / "queue.py").write_text(f"open({str(taken)!r}, 'w')")
    command = [sys.executable, str(ROOT / "client.py"), "audio", "--list-devices"]
    subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=60, check=True)
    assert not taken.exists()
