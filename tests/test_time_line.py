"""When a sample frame passes a sound card is known far better than a callback tells.

Plain logic: made-up callbacks, no sound card.
"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import TimeLine

RATE = 48_000


def late(chance: random.Random) -> float:
    """Return how late a callback may be: some tenths of a millisecond, and now and then more."""
    return chance.expovariate(1 / 300e-6) + (5e-3 if chance.random() < 0.001 else 0)


@given(
    ppm=st.floats(-200, 200),
    block=st.sampled_from([120, 240, 256, 480, 1024]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_late_callbacks_move_the_line_by_less_than_250_us(
    ppm: float, block: int, seed: int
) -> None:
    chance = random.Random(seed)
    line = TimeLine(RATE)
    period_s = 1 / (RATE * (1 + ppm / 1e6))
    for frame in range(0, 60 * RATE, block):
        true_s = 1000 + frame * period_s
        seen_s = line.see(frame, true_s + late(chance))
        if frame > RATE:  # the first callback of all may be any late
            assert abs(seen_s - true_s) < 2e-3
        if frame > 30 * RATE:  # half of the callbacks are later than this
            assert abs(seen_s - true_s - 300e-6 * math.log(2)) < 250e-6


@pytest.mark.parametrize("step_s", [0.03, -0.03, 5.0])
def test_a_step_in_the_sound_is_followed_within_a_second(step_s: float) -> None:
    chance = random.Random(1)
    line = TimeLine(RATE)
    for frame in range(0, 20 * RATE, 240):
        true_s = frame / RATE + (step_s if frame > 10 * RATE else 0)
        seen_s = line.see(frame, true_s + late(chance) / 10)
        if not 10 * RATE <= frame < 10.7 * RATE:
            assert abs(seen_s - true_s) < 1e-3


def test_a_single_callback_that_is_held_up_moves_nothing() -> None:
    line = TimeLine(RATE)
    for frame in range(0, 20 * RATE, 240):
        true_s = frame / RATE
        seen_s = line.see(frame, true_s + (0.2 if frame == 10 * RATE else 0))
        assert abs(seen_s - true_s) < 1e-6


def test_wrong_times_for_some_seconds_do_not_teach_a_speed_that_no_card_has() -> None:
    line = TimeLine(RATE)
    for frame in range(0, 20 * RATE, 240):
        wrong_s = 1.2e-3 * max(0.0, frame / RATE - 10)  # as a stalled sound system tells them
        line.see(frame, frame / RATE + wrong_s)
        assert abs(line.speed - 1) < 510e-6


@pytest.mark.parametrize("step_s", [0.0005, 0.002, 0.02, 0.5])
def test_after_a_gap_the_line_is_right_at_once_and_the_speed_stays(step_s: float) -> None:
    line, speed = TimeLine(RATE), 1 + 200e-6
    for frame in range(0, 60 * RATE, 480):
        line.see(frame, frame / (RATE * speed))
    line.interrupt()
    learnt = line.speed
    for frame in range(60 * RATE, 62 * RATE, 480):
        true_s = frame / (RATE * speed) + step_s
        # The card takes three blocks at once, and tells a wrong delay meanwhile.
        wrong_s = -0.6 * step_s if frame < 60 * RATE + 3 * 480 else 0.0
        seen_s = line.see(frame, true_s + wrong_s)
        if frame >= 60.1 * RATE:
            assert not line.is_off
            assert abs(seen_s - true_s) < 100e-6
    assert abs(line.speed - learnt) < 5e-6
