"""The jitter buffer by itself, with made-up clocks: no device, no thread, no waiting."""

from __future__ import annotations

import itertools
import math
import random
import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client
from client import JitterBuffer
from common import AudioFormat

MONO = AudioFormat(48_000, 1)
STEREO = AudioFormat(44_100, 2)
DAY_S = 24 * 3600


def tone(audio: AudioFormat, frames: int, start: int = 0) -> bytes:
    """Return a soft tone in which no two neighbouring samples are far apart."""
    values = (int(8000 * math.sin((start + n) / 40)) for n in range(frames))
    return b"".join(struct.pack("<h", value) * audio.channels for value in values)


def largest_step(audio: AudioFormat, samples: bytes) -> int:
    """Return the largest change between neighbouring frames, on any channel."""
    values = array("h", samples)
    pairs = zip(values, values[audio.channels :], strict=False)
    return max((abs(after - before) for before, after in pairs), default=0)


class Simulation:
    """A buffer between a server's clock and a sound card's, with a network in between."""

    def __init__(self, buffer: JitterBuffer, block_frames: int, ppm: float = 0.0) -> None:
        self.buffer = buffer
        self._samples = tone(buffer.audio, block_frames)
        self._block_frames = block_frames
        self._ratio = 1 + ppm / 1e6
        self._origin = 0.0
        self._sent = 0
        self._reads = 0

    def set_offset(self, ppm: float) -> None:
        """Let the server's clock be ahead by `ppm` from now on."""
        self._origin = (
            self._reads * self._block_frames * (self._ratio - 1 - ppm / 1e6) + self._origin
        )
        self._ratio = 1 + ppm / 1e6

    def run(self, seconds: float, delay_frames: float = 0) -> list[int]:
        """Play for `seconds`, blocks coming `delay_frames` late; return the fill at each read."""
        fills = []
        for _ in range(round(seconds * self.buffer.audio.rate / self._block_frames)):
            self._reads += 1
            due = self._reads * self._block_frames * self._ratio + self._origin - delay_frames
            while (self._sent + 1) * self._block_frames <= due:
                self._sent += 1
                self.buffer.write(self._samples)
            fills.append(self.buffer.fill_frames)
            self.buffer.read(self._block_frames)
        return fills


def test_what_is_written_is_played_unchanged_after_the_first_fade() -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=5)
    sent = tone(MONO, 48_000)
    heard = b""
    for start in range(0, len(sent), 480):
        buffer.write(sent[start : start + 480])
        heard += buffer.read(240)
    fade_bytes = MONO.frames_in(client.FADE_MS) * 2
    silent_bytes = len(heard) - len(heard.lstrip(b"\0")) // 480 * 480
    assert heard[-4800:] in sent
    assert sent[fade_bytes : fade_bytes + 4800] in heard
    assert silent_bytes > 0
    assert buffer.statistics.dropouts == 0


def test_it_waits_for_the_target_before_it_plays() -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=10)
    buffer.write(tone(MONO, 240 + 479))
    assert buffer.read(240) == bytes(480)
    buffer.write(tone(MONO, 1))
    assert buffer.read(240) != bytes(480)


def test_a_dropout_is_counted_and_fades() -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=0)
    buffer.write(tone(MONO, 240) + struct.pack("<h", 20_000) * 100)
    buffer.read(240)
    heard = buffer.read(240)
    assert buffer.statistics.dropouts == 1
    assert largest_step(MONO, heard[100:]) < 1_000
    assert heard[-2:] == b"\0\0"


def test_a_gap_is_counted_and_fades() -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=5)
    loud = struct.pack("<h", 20_000) * 480
    buffer.write(loud)
    heard = buffer.read(240)
    buffer.write(loud, gap_frames=4_800)
    heard += buffer.read(240) + buffer.read(240)
    assert buffer.statistics.missed_frames == 4_800
    assert largest_step(MONO, heard) < 1_000


def test_a_gap_leaves_the_delay_as_it_was() -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=5)
    simulation = Simulation(buffer, 240)
    before = simulation.run(2)[-1]
    buffer.read(240)  # the time that the missed block would have filled
    buffer.write(tone(MONO, 240), gap_frames=240)
    simulation.run(2)
    assert abs(simulation.run(0.1)[-1] - before) <= MONO.frames_in(client.JUMP_MS)


@pytest.mark.parametrize("stall_s", [0.1, 0.5, 2.0])
def test_after_a_stall_the_delay_is_back_within_a_second(stall_s: float) -> None:
    buffer = JitterBuffer(MONO)
    simulation = Simulation(buffer, 240)
    before = max(simulation.run(3)[-100:])
    simulation.run(stall_s, delay_frames=stall_s * MONO.rate)
    simulation.run(1)
    assert max(simulation.run(0.5)) <= before + MONO.frames_in(client.MAX_RAISE_MS) + 240


def test_a_burst_is_cut_down_without_a_click() -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=5)
    buffer.write(tone(MONO, 480))
    heard = buffer.read(240)
    buffer.write(tone(MONO, 24_000, start=480))
    heard += buffer.read(240) + buffer.read(240)
    assert buffer.statistics.late_frames > 23_000
    assert largest_step(MONO, heard) < 1_000


@pytest.mark.parametrize("ppm", [-500, -100, 0, 100, 500])
@pytest.mark.parametrize("audio", [MONO, STEREO])
def test_clocks_that_differ_are_followed(ppm: float, audio: AudioFormat) -> None:
    buffer = JitterBuffer(audio, fixed_target_ms=10)
    simulation = Simulation(buffer, audio.frames_in(5), ppm)
    fills = simulation.run(120)
    assert buffer.statistics.dropouts == 0
    assert max(fills[400:]) < audio.frames_in(30)
    corrections = buffer.statistics.doubled_frames - buffer.statistics.dropped_frames
    assert corrections == pytest.approx(-ppm * 120 * audio.rate / 1e6, abs=audio.frames_in(10))


def test_a_day_passes_without_a_dropout_or_growing_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    # Few samples a second and long blocks, so that a day takes seconds. The target that suits a
    # longer block is longer, too; all other time spans are the real ones.
    monkeypatch.setattr(client, "MIN_TARGET_MS", 20)
    audio = AudioFormat(2_000, 1)
    buffer = JitterBuffer(audio)
    simulation = Simulation(buffer, audio.frames_in(10), ppm=500)
    first_hour = simulation.run(3600)
    rest = simulation.run(DAY_S / 2 - 3600)
    simulation.set_offset(-500)
    rest += simulation.run(DAY_S / 2)
    assert buffer.statistics.dropouts == 0
    assert max(rest) <= max(first_hour) + audio.frames_in(10)


def test_the_target_rises_after_dropouts_and_sinks_again() -> None:
    buffer = JitterBuffer(MONO)
    simulation = Simulation(buffer, 240)
    simulation.run(client.START_PHASE_MS / 1000)
    start = buffer.target_frames
    for _ in range(5):
        simulation.run(0.05, delay_frames=2_400)
        simulation.run(1)
    raised = buffer.target_frames
    simulation.run(120)
    assert raised > start
    assert buffer.target_frames < raised


def test_a_fixed_target_stays() -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=20)
    simulation = Simulation(buffer, 240)
    for _ in range(5):
        simulation.run(1)
        simulation.run(0.05, delay_frames=4_800)
    simulation.run(60)
    assert buffer.target_frames == 960


def test_draining_plays_the_last_sample_and_is_no_dropout() -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=50)
    buffer.write(tone(MONO, 200) + struct.pack("<h", 12_345))
    buffer.drain()
    assert struct.pack("<h", 12_345) in buffer.read(240)
    assert buffer.fill_frames == 0
    assert buffer.statistics.dropouts == 0


Step = tuple[int, int, int]
STEPS = st.lists(
    st.tuples(
        st.integers(0, 6_000),  # frames that arrive
        st.sampled_from([0, 0, 0, 1, 240, 100_000]),  # frames missed before them
        st.integers(0, 12),  # reads that follow
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(steps=STEPS, read_frames=st.integers(1, 1_024), audio=st.sampled_from([MONO, STEREO]))
def test_any_schedule_gives_what_is_asked_for_within_bounds(
    steps: list[Step], read_frames: int, audio: AudioFormat
) -> None:
    buffer = JitterBuffer(audio)
    for arriving, missed, reads in steps:
        buffer.write(tone(audio, arriving), missed)
        assert buffer.fill_frames <= audio.frames_in(client.BUFFER_LIMIT_MS)
        for _ in range(reads):
            assert len(buffer.read(read_frames)) == read_frames * audio.frame_bytes
        assert buffer.target_frames <= audio.frames_in(client.MAX_TARGET_MS)


@settings(max_examples=30)
@given(steps=STEPS)
def test_any_schedule_is_forgotten_a_second_after_it_ends(steps: list[Step]) -> None:
    buffer = JitterBuffer(MONO, fixed_target_ms=10)
    for arriving, missed, reads in steps:
        buffer.write(tone(MONO, arriving), missed)
        for _ in range(reads):
            buffer.read(240)
    simulation = Simulation(buffer, 240)
    simulation.run(1)
    dropouts = buffer.statistics.dropouts
    fills = simulation.run(1)
    assert buffer.statistics.dropouts == dropouts
    assert max(fills) <= 480 + 240 + MONO.frames_in(client.JUMP_MS)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), jitter_ms=st.integers(0, 40))
def test_any_jitter_is_learned(seed: int, jitter_ms: int) -> None:
    rng = random.Random(seed)
    buffer = JitterBuffer(MONO)
    arrivals = sorted(
        (n * 240 + rng.uniform(0, MONO.frames_in(jitter_ms)) for n in range(12_000)), reverse=True
    )
    samples = tone(MONO, 240)
    dropouts_at = {}
    for read in itertools.count():
        while arrivals and arrivals[-1] <= read * 240:
            arrivals.pop()
            buffer.write(samples)
        if not arrivals:
            break
        buffer.read(240)
        dropouts_at[read] = buffer.statistics.dropouts
    last = max(dropouts_at)
    assert dropouts_at[last] - dropouts_at[last // 2] <= 3


@pytest.mark.parametrize("audio", [MONO, STEREO])
def test_the_quietest_step_is_found(audio: AudioFormat) -> None:
    values = [0, 900, 1_700, 1_701, 2_600, 9_000]
    samples = b"".join(struct.pack("<h", value) * audio.channels for value in values)
    assert client.quietest_step(audio, samples) == 2
