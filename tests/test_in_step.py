"""A player knows how late it plays against all others, whatever the clocks and the card do.

Plain logic with made-up clocks: no socket, no sound card, no real time.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import (
    BURST_REQUESTS,
    InStep,
    Leaving,
    ServerClock,
    Sync,
    SyncedPlayout,
    load_converters,
)
from common import AudioFormat, TimeLine
from sound import bound_offset

load_converters()

SERVER = AudioFormat(48_000, 1)
AFTER_S = 0.08


def drifting(offset_s: float, ppm: float) -> Callable[[float], float]:
    """Return a clock that shows `offset_s` in the beginning, and runs fast by `ppm`."""
    return lambda true_s: offset_s + true_s * (1 + ppm / 1e6)


class Player:
    """A player that takes 5 ms at once, `late_s` later than it is to, in made-up time.

    True time is the server's sound card's. The server's clock and the player's have an offset and
    a drift against it.
    """

    def __init__(
        self, server_ppm: float, player_ppm: float, card: AudioFormat, late_s: float, seed: int
    ) -> None:
        self._chance = random.Random(seed)
        self._server = drifting(500.0, server_ppm)
        self._own = drifting(7.0, player_ppm)
        self._clock = ServerClock()
        self._line = TimeLine(SERVER.rate)
        self._late_s = late_s
        self.step = InStep(Sync(self._clock, AFTER_S), SERVER, card.rate)
        self._block_frames = card.frames_in(5)
        self._block_s = self._block_frames / card.rate

    def run(self, seconds: float) -> float:
        """Let time go by; return how late the player believes to be at its end."""
        due_s = late_s = 0.0
        while due_s < seconds:
            self._exchange(due_s)
            captured = self._capture(due_s)
            ahead_s = 0.02 + self._chance.gauss(0, 100e-6)
            read_s = due_s - 0.02 + self._chance.expovariate(1 / 200e-6)
            self.step.note_block(240, captured[0], captured[1], self._own(due_s - 0.02))
            frame = (due_s - AFTER_S - self._late_s) * SERVER.rate
            self.step.leaving.note_read(self._block_frames, self._own(read_s), ahead_s)
            late_s = self.step.late_s(frame + self._block_s * SERVER.rate)
            due_s += self._block_s
        return late_s

    def _exchange(self, now_s: float) -> None:
        if self._clock.wants_request(self._own(now_s)):
            there_s = now_s + 100e-6 + self._chance.expovariate(1 / 20e-6)
            back_s = there_s + 1e-3 + self._chance.expovariate(1 / 20e-6)
            stamps = (now_s, there_s, there_s + 0.9e-3, back_s)
            self._clock.take(
                bound_offset(
                    self._own(stamps[0]),
                    self._server(stamps[1]),
                    self._server(stamps[2]),
                    self._own(stamps[3]),
                )
            )

    def _capture(self, now_s: float) -> tuple[int, float]:
        frame = int(now_s * SERVER.rate)
        seen_s = self._server(frame / SERVER.rate + self._chance.expovariate(1 / 50e-6))
        return frame, self._line.see(frame, seen_s)


@given(
    server_ppm=st.floats(-50, 50),
    player_ppm=st.floats(-50, 50),
    late_s=st.floats(-0.01, 0.01),
    rate=st.sampled_from([44_100, 48_000]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_a_player_knows_how_late_it_is_within_a_third_of_a_millisecond(
    server_ppm: float, player_ppm: float, late_s: float, rate: int, seed: int
) -> None:
    player = Player(server_ppm, player_ppm, AudioFormat(rate, 2), late_s, seed)
    assert player.run(20.0) == pytest.approx(late_s, abs=350e-6)


def known_clock() -> ServerClock:
    """Return a server's clock that shows the same as the player's."""
    clock = ServerClock()
    for _ in range(BURST_REQUESTS):
        clock.take(bound_offset(0.0, 0.0, 0.0, 0.0))
    return clock


def test_a_player_knows_what_its_network_and_card_need() -> None:
    step = InStep(Sync(known_clock(), AFTER_S), SERVER, 48_000)
    for number in range(3_000):
        now_s = number * 0.0025
        held_s = 0.12 if number == 2_500 else 0.0
        step.note_block(120, number * 120, now_s - 0.004, now_s + held_s)
        step.leaving.note_read(240, now_s, 0.015)
    assert step.needed_s == pytest.approx(0.004 + 0.0025 + 0.12 + 0.015 + 0.005, abs=1e-6)


@pytest.mark.parametrize(
    ("held_from", "held_until", "need_s"), [(0.0, 0.5, 0.005), (9.9, 10.0, 0.005), (0.0, 10, 3.005)]
)
def test_an_outage_is_no_need_unless_all_is_that_late(
    held_from: float, held_until: float, need_s: float
) -> None:
    step = InStep(Sync(known_clock(), AFTER_S), SERVER, 48_000)
    for number in range(1_000):
        now_s = number * 0.01
        held_s = 3.0 if held_from <= now_s < held_until else 0.0
        step.note_block(240, number * 240, now_s, now_s + held_s)
        assert step.needed_s < 1 or now_s - held_from > 1
    assert step.needed_s == pytest.approx(need_s, abs=1e-6)


def test_a_card_that_does_not_tell_when_it_plays_is_taken_as_constant() -> None:
    step = InStep(Sync(known_clock(), AFTER_S), SERVER, 48_000)
    for number in range(1_000):
        step.note_block(240, number * 240, number * 0.005, number * 0.005)
        step.leaving.note_read(240, number * 0.005, 0.0)
    assert step.leaving.is_untold
    assert step.late_s(1_000 * 240) == pytest.approx(-AFTER_S, abs=0.006)


@pytest.mark.parametrize("after_s", [0.08, 3.0])
def test_sound_is_kept_until_it_is_due(after_s: float) -> None:
    audio = AudioFormat(8_000, 1)
    playout = SyncedPlayout(audio, audio, InStep(Sync(known_clock(), after_s), audio, audio.rate))
    noise = np.random.default_rng(1).normal(0, 4_000, int(5 * audio.rate)).astype("<i2").tobytes()
    heard = b""
    for start in range(0, len(noise), 160):
        now_s = (start + 160) / 2 / audio.rate
        playout.write(noise[start:][:160], 0, now_s, now_s)
        heard += playout.read(80, now_s - 0.005, 0.01)
    assert (playout.is_playing, playout.dropouts) == (True, 0)
    assert heard.count(0, -2 * audio.rate) < audio.rate / 10


@pytest.mark.parametrize("card_rate", [8_000, 16_000, 44_100, 48_000, 96_000])
def test_cards_of_any_rate_play_together(card_rate: int) -> None:
    card = AudioFormat(card_rate, 1)
    playout = SyncedPlayout(SERVER, card, InStep(Sync(known_clock(), AFTER_S), SERVER, card_rate))
    seconds = np.arange(2 * SERVER.rate) / SERVER.rate
    click = (20_000 * np.exp(-(((seconds - 1.5) / 0.001) ** 2))).astype("<i2").tobytes()
    heard = b""
    for number in range(200):
        now_s = (number + 1) / 100
        playout.write(click[number * 960 :][:960], 0, now_s, now_s)
        heard += playout.read(card_rate // 100, now_s, 0.01)
    # What is read first leaves 20 ms after the first sample frame was captured.
    place = np.average(np.arange(len(heard) // 2), weights=np.abs(np.frombuffer(heard, "<i2")))
    assert place / card_rate + 0.02 == pytest.approx(1.5 + AFTER_S, abs=100e-6)


def test_what_comes_last_is_played_when_it_is_due_though_the_sound_ends_before() -> None:
    audio = AudioFormat(8_000, 1)
    playout = SyncedPlayout(audio, audio, InStep(Sync(known_clock(), 1.0), audio, audio.rate))
    heard = b""
    for number in range(200):
        now_s = (number + 1) / 100
        if number < 50:
            playout.write(b"\0\x40" * 80, 0, now_s, now_s)
        elif number == 50:
            playout.drain()
        heard += playout.read(80, now_s, 0.01)
    loud = np.flatnonzero(np.frombuffer(heard, "<i2") > 8_000)
    # What is read first leaves 20 ms after the first sample frame was captured.
    assert loud[0] / audio.rate == pytest.approx(1.0 - 0.02, abs=0.01)
    assert loud[-1] / audio.rate == pytest.approx(1.5 - 0.02, abs=0.03)  # with its fading out
    assert (playout.fill_frames, playout.dropouts) == (0, 0)


class Card:
    """A sound card in made-up time, which takes 10 ms at once, `ahead_s` before they leave."""

    def __init__(self, ahead_s: float = 0.03) -> None:
        self.leaving = Leaving(48_000)
        self.ahead_s = ahead_s
        self.leaves_s = 100.0  # the next sample frame
        self._chance = random.Random(1)

    def run(self, seconds: float, told: Callable[[float], float] = lambda _now_s: 0.0) -> float:
        """Let time go by in which the card tells so much too much; return how far off at most.

        Of the first 0.35 s, in which the line steps, nothing counts.
        """
        worst_s = 0.0
        for number in range(round(seconds * 100)):
            now_s = self.leaves_s - self.ahead_s + self._chance.expovariate(1 / 50e-6)
            self.leaving.note_read(480, now_s, self.ahead_s + told(number / 100))
            self.leaves_s += 0.01
            if number > 35:
                worst_s = max(worst_s, abs(self.leaving.next_s - self.leaves_s))
        return worst_s


def smoothed(now_s: float) -> float:
    """Return by how much PulseAudio told too little, so long after a stumble (measured)."""
    return -4e-3 * min(now_s / 4, 1.0) * (1.0 if now_s < 5 else 0.7 ** (now_s - 5))


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("later_s", [0.004, 0.03, 0.3])
def test_after_a_stumble_a_card_is_known_at_once_though_it_tells_wrong_times_for_seconds(
    later_s: float, is_told: bool
) -> None:
    card = Card()
    card.run(20.0)
    card.leaves_s += later_s
    if is_told:
        card.leaving.line.interrupt()
    assert card.run(15.0, smoothed) < 800e-6


@pytest.mark.parametrize("longer_s", [0.0006, 0.01, -0.0006, -0.01])
def test_a_card_that_takes_sound_earlier_and_keeps_it_longer_plays_no_later(
    longer_s: float,
) -> None:
    card = Card()
    card.run(20.0)
    card.ahead_s += longer_s
    assert card.run(10.0) < 150e-6


def test_a_card_that_takes_sound_irregularly_is_known_by_what_it_tells() -> None:
    card = Card()
    chance = random.Random(1)
    for _ in range(2_000):
        card.ahead_s = 0.03 + chance.choice([0.0, 0.005, 0.01])
        card.run(0.01)
    assert abs(card.leaving.next_s - card.leaves_s) < 150e-6


def test_what_a_card_tells_for_long_is_believed_in_the_end() -> None:
    card = Card()
    card.run(20.0)
    card.run(12.0, lambda _now_s: 0.004)
    assert card.leaving.next_s - card.leaves_s == pytest.approx(0.004, abs=150e-6)
