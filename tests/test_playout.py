"""The playout buffer by itself, with made-up clocks: no device, no thread, no waiting."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client
from client import Playout
from common import AudioFormat
from simulation import CAPTURED_MS, MONO, PoorWifi, Simulation, sinad_db, tone

STEREO = AudioFormat(48_000, 2)
CD = AudioFormat(44_100, 2)
QUIETLY_DB = 70.0


def loudest_step(samples: bytes, audio: AudioFormat) -> int:
    """Return the largest change between neighbouring frames, on any channel."""
    values = np.frombuffer(samples, "<i2").reshape(-1, audio.channels).astype(int)
    return int(np.abs(np.diff(values, axis=0)).max(initial=0))


def step_of_tone(audio: AudioFormat) -> int:
    """Return the largest step that the tone itself has."""
    return loudest_step(tone(audio, 0, audio.rate), audio)


def lead_ms(simulation: Simulation) -> float:
    """Return by how much sound is played late: the least lead there is with no lateness."""
    playout = simulation.playout
    return (playout.lead_s - playout.arrivals.edge_s) * 1000


# --- clocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ppm", [-500, -100, 0, 100, 500])
def test_clocks_that_differ_are_followed_without_being_heard(ppm: float) -> None:
    playout = Playout(MONO, STEREO)
    simulation = Simulation(playout, ppm=ppm)
    simulation.run(20)
    heard = simulation.run(20)
    assert playout.dropouts == 0
    assert playout.loop.clock_offset * 1e6 == pytest.approx(ppm, abs=10)
    assert np.median(sinad_db(heard, STEREO)) > 80
    assert np.percentile(sinad_db(heard, STEREO), 5) > QUIETLY_DB


def test_clocks_that_agree_leave_the_speed_alone() -> None:
    simulation = Simulation(Playout(MONO, MONO))
    simulation.run(40)
    speeds = [moment.speed for moment in simulation.moments if moment.now_s > 30]
    assert max(abs(speed - 1) for speed in speeds) < 2e-6


@settings(max_examples=8)
@given(
    ppm=st.integers(-500, 500),
    read_frames=st.sampled_from([64, 220, 240, 441]),
    bursts=st.sampled_from([None, 256, 512, 1_024, 2_048]),
    seed=st.integers(0, 1_000),
)
def test_no_card_and_no_clock_makes_a_dropout(
    ppm: int, read_frames: int, bursts: int | None, seed: int
) -> None:
    playout = Playout(MONO, CD)
    burst_frames = bursts if bursts and bursts > read_frames else None
    simulation = Simulation(
        playout, ppm=ppm, read_frames=read_frames, burst_frames=burst_frames, seed=seed
    )
    simulation.run(15)
    assert playout.dropouts == 0
    assert lead_ms(simulation) < 12


# --- the reserve ----------------------------------------------------------------------------


@pytest.mark.parametrize("burst_frames", [240, 1_024])
def test_a_quiet_network_has_no_dropout_at_the_start_and_little_delay(burst_frames: int) -> None:
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout, burst_frames=burst_frames)
    heard = simulation.run(3)
    assert playout.dropouts == 0
    assert lead_ms(simulation) < 8
    assert min(sinad_db(heard[-2 * MONO.rate * 2 :], MONO)) > 30


@pytest.mark.parametrize("seed", range(3))
def test_a_poor_network_is_learnt_and_forgotten_within_a_minute(seed: int) -> None:
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout, PoorWifi(seed, good_after_s=120))
    simulation.run(60)
    in_the_first_minute = playout.dropouts
    simulation.run(60)
    assert playout.dropouts - in_the_first_minute <= 2
    assert playout.dropouts <= 6
    assert lead_ms(simulation) < 200
    simulation.run(61)
    assert lead_ms(simulation) < 10


def test_what_a_dropout_was_for_is_kept_in_reserve_from_then_on() -> None:
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout)
    simulation.run(3)
    for _ in range(4):
        simulation.held_until_s = simulation.now_s + 0.06
        simulation.run(3)
    assert playout.dropouts == 1


def test_an_outage_is_not_kept_in_reserve() -> None:
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout)
    simulation.run(3)
    simulation.held_until_s = simulation.now_s + 2
    simulation.run(4)
    assert playout.dropouts == 1
    assert lead_ms(simulation) < 10


@pytest.mark.parametrize("still_s", [0.5, 3.0])
@pytest.mark.parametrize("told", [False, True])
def test_a_card_that_stood_still_has_dropped_out_though_all_sound_is_there(
    still_s: float, told: bool
) -> None:
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout)
    simulation.run(3)
    now_s = simulation.now_s + still_s
    playout.write(tone(MONO, 0, int(still_s * MONO.rate)), 0, now_s)
    playout.read(240, now_s, has_run_dry=told)
    assert playout.dropouts == 1


@pytest.mark.parametrize("latency_ms", [0, 20, 300])
def test_a_latency_that_the_user_fixed_stays(latency_ms: float) -> None:
    playout = Playout(MONO, MONO, latency_ms / 1000)
    simulation = Simulation(playout)
    simulation.run(3)
    simulation.held_until_s = simulation.now_s + 0.1
    simulation.run(10)
    assert lead_ms(simulation) == pytest.approx(latency_ms + CAPTURED_MS, abs=1)


@pytest.mark.parametrize("others", [[1_024], [24, 480]])  # another microphone, a cut packet of Opus
def test_a_latency_that_the_user_fixed_is_beside_a_block_of_the_length_that_they_have_now(
    others: list[int],
) -> None:
    playout = Playout(MONO, MONO, 0.01)
    simulation = Simulation(playout)
    simulation.run(3)
    for block_frames in others:
        simulation.block_frames = block_frames
        simulation.run(0.1)
    simulation.run(5)
    dropouts = playout.dropouts
    simulation.run(5)
    assert playout.dropouts == dropouts
    assert lead_ms(simulation) == pytest.approx(10 + MONO.milliseconds(others[-1]), abs=1)


def test_a_server_that_lost_time_is_heard_again_within_seconds() -> None:
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout)
    simulation.run(5)
    simulation.lose(2.0)
    simulation.run(4)
    assert min(sinad_db(simulation.run(1), MONO)) > 40
    assert lead_ms(simulation) < 15


# --- gaps -----------------------------------------------------------------------------------


def test_a_dropout_has_no_click() -> None:
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout)
    simulation.run(3)
    simulation.held_until_s = simulation.now_s + 0.1
    heard = simulation.run(1)
    assert playout.dropouts == 1
    assert loudest_step(heard, MONO) < 1.5 * step_of_tone(MONO)


@settings(max_examples=8)
@given(gap_frames=st.integers(1, 20_000))
def test_a_gap_has_no_click_and_keeps_the_time(gap_frames: int) -> None:
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout)
    simulation.run(2)
    before_ms = lead_ms(simulation)
    simulation.miss(gap_frames)
    heard = simulation.run(2)
    assert loudest_step(heard, MONO) < 1.5 * step_of_tone(MONO)
    assert lead_ms(simulation) == pytest.approx(before_ms, abs=2)


# --- conversion -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "card", [AudioFormat(rate, n) for rate in (44_100, 96_000) for n in (1, 2)]
)
@pytest.mark.parametrize("audio", [AudioFormat(8_000, 1), MONO, STEREO, AudioFormat(48_000, 6)])
def test_any_card_plays_any_sound_at_its_pitch_on_all_sides(
    audio: AudioFormat, card: AudioFormat
) -> None:
    simulation = Simulation(Playout(audio, card))
    simulation.run(2)
    heard = simulation.run(1)
    for side in range(card.channels):
        samples = np.frombuffer(heard, "<i2")[side :: card.channels].tobytes()
        assert min(sinad_db(samples, AudioFormat(card.rate, 1))) > 30


def test_stereo_is_mixed_into_mono() -> None:
    left = np.array([[1_000, 0]] * 4, "<i2").tobytes()
    assert client.to_samples(client.to_sound(left, STEREO, 1), 1) == b"\xf4\x01" * 4


@pytest.mark.parametrize("channels", [3, 4, 5, 6, 7, 8])
def test_a_film_is_heard_on_both_sides_of_two(channels: int) -> None:
    # Left, right and centre come first, in this order.
    alone = (16_384 * np.eye(3, channels)).astype("<i2").tobytes()
    left, right, centre = client.to_sound(alone, AudioFormat(48_000, channels), 2)
    assert left[0] == right[1] > 0
    assert left[1] == right[0] == 0
    assert centre[0] == centre[1] > 0


def test_what_is_too_loud_is_clipped() -> None:
    assert client.to_samples(np.array([[2.0], [-2.0]]), 1) == b"\xff\x7f\x00\x80"


# --- the end, and anything else -------------------------------------------------------------


def test_draining_plays_all_that_is_left_and_is_no_dropout() -> None:
    playout = Playout(MONO, MONO, 0.05)
    playout.write(tone(MONO, 0, 2_000), 0, 1.0)
    playout.drain()
    heard = b"".join(playout.read(240, 1 + n / 200) for n in range(12))
    assert playout.fill_frames == 0
    assert playout.dropouts == 0
    assert np.count_nonzero(np.frombuffer(heard, "<i2")) > 1_900


STEPS = st.lists(
    st.tuples(
        st.integers(0, 6_000),  # frames that arrive
        st.sampled_from([0, 0, 0, 1, 240, 100_000, 100_000_000]),  # frames missed before them
        st.integers(0, 12),  # reads that follow
        st.sampled_from([0.0, 0.001, 0.005, 0.1, 3.0]),  # how long each of them takes
    ),
    max_size=60,
)


@settings(max_examples=10)
@given(
    steps=STEPS,
    read_frames=st.integers(1, 2_048),
    audio=st.sampled_from([MONO, CD]),
    card=st.sampled_from([MONO, CD]),
)
def test_any_schedule_gives_what_is_asked_for_and_is_forgotten(
    steps: list[tuple[int, int, int, float]],
    read_frames: int,
    audio: AudioFormat,
    card: AudioFormat,
) -> None:
    playout = Playout(audio, card)
    simulation = Simulation(playout)
    for arriving, missed, reads, read_s in steps:
        playout.write(tone(audio, 0, arriving), missed, simulation.now_s)
        for _ in range(reads):
            simulation.now_s += read_s
            samples = playout.read(read_frames, simulation.now_s)
            assert len(samples) == read_frames * card.frame_bytes
    simulation.restart()
    simulation.run(8)
    dropouts = playout.dropouts
    simulation.run(2)
    assert playout.dropouts == dropouts
    assert min(sinad_db(simulation.run(0.5), card)) > 30


def test_a_buffer_that_nobody_uses_any_more_is_freed() -> None:
    playout = Playout(MONO, MONO)
    playout.read(240, 0.0)
    unused = weakref.ref(playout)
    del playout
    gc.collect()
    assert unused() is None
