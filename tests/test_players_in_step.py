"""With --sync all loudspeakers of a server play at once, sample for sample, on real cards."""

from __future__ import annotations

import re
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import common
from likeness import lag, to_signal
from sound import Script, port_of, read_wav, start_server
from sound_card import RATE, SPEAKER_MONITOR, Recording, StereoCard, stop_process
from waiting import wait_for

WINDOW_FRAMES = RATE // 4
IN_STEP_MS = 2.0  # on a busy machine; tests/bench/in_step.py measures an idle one


@pytest.fixture
def stereo(tmp_path: Path) -> Iterator[StereoCard]:
    """Give a card with a player's place on each side, and noise at its microphone."""
    noise = np.random.default_rng(1).normal(0, 4000, 240 * RATE)
    path = tmp_path / "noise.raw"
    path.write_bytes(np.convolve(noise, np.ones(4) / 2, "same").astype("<i2").tobytes())
    card = StereoCard()
    with card:
        player = card.play_file(path)
        yield card
        stop_process(player)


def start_player(card: StereoCard, side: str, port: str, *arguments: str) -> Script:
    """Return a client that plays on one side."""
    environment = card.on(side)
    return Script("client.py", environment, "--port", port, *arguments)


def apart_ms(heard: Recording) -> float | None:
    """Return by how much the right side was late of late; None unless it has been steady."""
    sides = to_signal(heard.tail(1.0), 2)
    windows = [sides[start:][:WINDOW_FRAMES] for start in range(0, RATE, WINDOW_FRAMES)]
    lags = [lag(window[:, 0], window[:, 1]) for window in windows if len(window) == WINDOW_FRAMES]
    known = [each / RATE * 1000 for each in lags if each is not None]
    if len(known) < 4 or max(known) - min(known) > IN_STEP_MS:
        return None
    return statistics.median(known)


def are_apart_by(heard: Recording, expected_ms: float) -> bool:
    found_ms = apart_ms(heard)
    return found_ms is not None and abs(found_ms - expected_ms) < IN_STEP_MS


@pytest.mark.parametrize("delay_ms", [0, 15, -15])
def test_two_players_are_together_but_for_their_delay(stereo: StereoCard, delay_ms: int) -> None:
    with (
        start_server(stereo, "--sync", "150") as server,
        start_player(stereo, "left", port_of(server), "--latency", "60") as left,
        start_player(stereo, "right", port_of(server), f"--delay={delay_ms}") as right,
        Recording(SPEAKER_MONITOR, stereo.environment, channels=2) as heard,
    ):
        left.wait_for("--latency does nothing")
        left.wait_for("in step 150 ms after the microphone")
        right.wait_for("in step 150 ms after the microphone")
        wait_for(lambda: are_apart_by(heard, delay_ms), "two players in step", 120)


def test_a_player_that_wants_opus_is_in_step_with_one_that_does_not(stereo: StereoCard) -> None:
    with (
        start_server(stereo, "--sync", "150") as server,
        start_player(stereo, "left", port_of(server)),
        start_player(stereo, "right", port_of(server), "--opus"),
        Recording(SPEAKER_MONITOR, stereo.environment, channels=2) as heard,
    ):
        wait_for(lambda: are_apart_by(heard, 0), "two players in step", 120)


def test_a_player_that_was_suspended_is_in_step_again(stereo: StereoCard) -> None:
    with (
        start_server(stereo, "--sync", "150") as server,
        start_player(stereo, "left", port_of(server)),
        start_player(stereo, "right", port_of(server)) as right,
        Recording(SPEAKER_MONITOR, stereo.environment, channels=2) as heard,
    ):
        wait_for(lambda: are_apart_by(heard, 0), "two players in step", 120)
        right.signal(signal.SIGSTOP)
        wait_for(lambda: apart_ms(heard) is None, "silence of the player that is suspended", 60)
        right.signal(signal.SIGCONT)
        wait_for(lambda: are_apart_by(heard, 0), "two players in step again", 120)


def test_players_are_together_again_after_the_server_was_started_anew(stereo: StereoCard) -> None:
    with start_server(stereo, "--sync", "150") as server:
        port = port_of(server)
        left, right = (start_player(stereo, side, port) for side in ("left", "right"))
        with left, right, Recording(SPEAKER_MONITOR, stereo.environment, channels=2) as heard:
            wait_for(lambda: are_apart_by(heard, 0), "two players in step", 120)
            server.kill()
            left.wait_for("looking for it")
            right.wait_for("looking for it")
            with start_server(stereo, "--sync", "150", "--port", port):
                left.wait_for("Listening", times=2)
                right.wait_for("Listening", times=2)
                wait_for(lambda: are_apart_by(heard, 0), "two players in step again", 120)


def test_a_player_that_cannot_keep_the_time_says_which_it_could(stereo: StereoCard) -> None:
    with (
        start_server(stereo, "--sync", "200") as server,
        start_player(stereo, "left", port_of(server), "--delay=-190") as left,
    ):
        left.wait_for("this player cannot keep 10 ms")
        needed, wanted = re.findall(r"need (\d+): --sync (\d+) on", left.text())[0]
        assert 200 <= int(wanted) - int(needed) <= 210


def test_a_recording_is_not_shifted(stereo: StereoCard, tmp_path: Path) -> None:
    path = tmp_path / "talk.wav"
    with start_server(stereo, "--sync", "1000") as server:

        def begins_with_sound() -> bool:
            """Record; return whether sound comes at once, as where no card stands still."""
            path.unlink(missing_ok=True)
            arguments = ("--output", str(path), "--seconds", "2")
            with start_player(stereo, "left", port_of(server), *arguments) as recorder:
                assert recorder.end() == common.EXIT_OK
                assert "in step" not in recorder.text()
            audio, samples = read_wav(path)
            is_loud = np.abs(to_signal(samples, 1)[: RATE // 10]).max(initial=0) > 0.01
            return bool(is_loud and audio.frames_of(samples) > RATE)

        wait_for(begins_with_sound)
