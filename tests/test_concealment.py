"""A gap is concealed: what fills it is nearer to what was lost than silence is, and has no click.

The measure is log-spectral distance, usual for speech: the root mean square, over frequencies, of
the difference of two spectra in dB, here of the first 20 ms of a gap with what is around it.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import common
from client import Concealment, load_converters

load_converters()

RATE = 48_000
GAP_S = 0.02
AROUND_S = 0.005
HEARD_HZ = 8_000
FLOOR_DB = -80.0
GAPS = 40

Signal = NDArray[np.float64]


def voice(seconds: float, rng: np.random.Generator) -> Signal:
    """Return what is like a vowel: a pitch that wavers, three formants, some breath."""
    t = np.arange(int(seconds * RATE)) / RATE
    pitch_hz = rng.uniform(90, 220) * (1 + 0.02 * np.sin(2 * np.pi * 5 * t))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / RATE
    sound = 0.002 * rng.standard_normal(len(t))
    for number in range(1, 40):
        hertz = number * pitch_hz.mean()
        formants = sum(np.exp(-(((hertz - f) / 250) ** 2)) for f in (600, 1_400, 2_600))
        sound = sound + 0.1 * (formants + 0.02) * np.sin(number * phase)
    return sound


def chord(seconds: float, rng: np.random.Generator) -> Signal:
    """Return what is like music: three notes with overtones, some noise."""
    t = np.arange(int(seconds * RATE)) / RATE
    root_hz = rng.uniform(110, 330)
    notes = [root_hz * ratio * overtone for ratio in (1, 1.25, 1.5) for overtone in (1, 2, 3, 4)]
    noise: Signal = 0.002 * rng.standard_normal(len(t))
    return sum((0.1 * np.sin(2 * np.pi * hertz * t) for hertz in notes), noise)


def spectrum_db(sound: Signal) -> Signal:
    """Return a spectrum in dB, as far as it is heard, not below the floor."""
    amplitudes = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    amplitudes = amplitudes[: int(HEARD_HZ * len(sound) / RATE)]
    shown: Signal = np.maximum(20 * np.log10(amplitudes + 1e-12), FLOOR_DB)
    return shown


def distances_db(sound: Signal, gap: int) -> tuple[float, float]:
    """Return how far a concealed gap and a silent one are from what was lost."""
    size, around = int(GAP_S * RATE), int(AROUND_S * RATE)
    concealment = Concealment(sound[:gap, None].astype(np.float32), RATE)
    concealed, silent = sound.copy(), sound.copy()
    concealed[gap : gap + size] = concealment.take(size)[:, 0]
    silent[gap : gap + size] = 0
    part = slice(gap - around, gap + size + around)
    lost_db = spectrum_db(sound[part])
    concealed_db, silent_db = (
        float(np.sqrt(np.mean((spectrum_db(filled[part]) - lost_db) ** 2)))
        for filled in (concealed, silent)
    )
    return concealed_db, silent_db


@pytest.mark.parametrize("make", [voice, chord])
def test_a_concealed_gap_is_nearer_to_what_was_lost_than_silence(make: object) -> None:
    assert callable(make)
    rng = np.random.default_rng(1)
    found = np.array(
        [distances_db(make(0.3, rng), int(rng.uniform(0.1, 0.2) * RATE)) for _ in range(GAPS)]
    )
    concealed_db, silent_db = found.mean(axis=0)
    print(f"{make}: {concealed_db:.1f} dB concealed, {silent_db:.1f} dB silent")
    assert concealed_db < 0.75 * silent_db


@pytest.mark.parametrize("make", [voice, chord])
def test_a_concealment_begins_without_a_click_and_ends_in_silence(make: object) -> None:
    assert callable(make)
    rng = np.random.default_rng(2)
    for _ in range(GAPS):
        sound = make(0.1, rng)
        filling = Concealment(sound[:, None].astype(np.float32), RATE).take(RATE // 10)[:, 0]
        joined = np.concatenate([sound[-100:], filling])
        assert np.abs(np.diff(joined)).max() < 2 * np.abs(np.diff(sound)).max()
        assert np.abs(filling[RATE // 20 :]).max() < 1e-9


@pytest.mark.parametrize("frames", [0, 1, 50, 700])
def test_too_little_to_go_on_with_is_silence(frames: int) -> None:
    assert not Concealment(np.zeros((frames, 2), np.float32), RATE).take(100).any()


def test_at_the_lowest_rate_a_period_too_short_for_a_seam_is_silence() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        noise = rng.standard_normal((40, 1)).astype(np.float32)
        assert len(Concealment(noise, common.SAMPLE_RATES[0]).take(5)) == 5
