"""Any sound card plays the server's sound: real JACK at 44,100 Hz; and one that cannot at all."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import common
from common import AudioFormat
from jack import JackServer
from simulation import sinad_db
from sound import (
    MONO,
    TONE_HZ,
    lasts,
    make_tone,
    port_of,
    read_wav,
    start_client,
    start_server,
    until_whole,
    write_wav,
)
from sound_card import VirtualSoundCard
from waiting import LIMIT_S, wait_for

CARD = AudioFormat(44_100, 2)


@pytest.fixture
def jack(card: VirtualSoundCard) -> Iterator[dict[str, str]]:
    """Give the environment of a JACK server that takes 1,024 frames at a time, at 44,100 Hz."""
    with JackServer(rate=44_100, period=1_024) as server:
        yield {**server.environment(card.environment), "JACK_NO_START_SERVER": "1"}


def playing_ports(environment: dict[str, str]) -> list[str]:
    """Return the ports that the client plays into."""
    ports = subprocess.run(
        ["jack_lsp"], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return [port for port in ports.stdout.split() if ":out_" in port]


def test_jack_plays_mono_on_both_sides_at_its_own_rate(
    card: VirtualSoundCard, jack: dict[str, str], tmp_path: Path
) -> None:
    write_wav(tmp_path / "tone.wav", make_tone(10), MONO)
    with (
        start_server(card, "--input", str(tmp_path / "tone.wav")) as sender,
        start_client(jack, port_of(sender), "--output", "system", "--delay", "5") as player,
    ):
        player.wait_for("Listening")
        wait_for(lambda: len(playing_ports(jack)) == 2, "the client's ports")
        # Of the right pitch and whole, but where a busy machine holds it up.
        wait_for(
            lambda: min(record_sides_db(jack, tmp_path / "heard.wav")) > 30, "a pure tone", LIMIT_S
        )
        assert player.interrupt() == common.EXIT_OK
        assert player.text().count("--delay does nothing") == 1


def record_sides_db(environment: dict[str, str], path: Path) -> list[float]:
    """Record what the client plays; return how pure a tone each side has where it is purest."""
    recorder = ["jack_rec", "-f", str(path), "-d", "3", "-b", "16", *playing_ports(environment)]
    subprocess.run(recorder, env=environment, check=True, capture_output=True, timeout=60)
    audio, samples = read_wav(path)
    assert audio == CARD
    sides = np.frombuffer(samples, "<i2").reshape(-1, 2).T
    return [max(sinad_db(side.tobytes(), AudioFormat(44_100, 1), TONE_HZ)) for side in sides]


def test_a_listener_without_a_loudspeaker_still_records(
    silent_machine: dict[str, str], card: VirtualSoundCard, tmp_path: Path
) -> None:
    write_wav(tmp_path / "tone.wav", make_tone(2), MONO)
    recording = tmp_path / "talk.wav"
    arguments = ("--record", str(recording), "--seconds", "1")
    with start_server(card, "--input", str(tmp_path / "tone.wav")) as sender:
        player = until_whole(
            lambda: start_client(silent_machine, port_of(sender), *arguments),
            recording,
            is_whole=lambda: lasts(recording, 1),
        )
    assert "recording without playing" in player.text()
