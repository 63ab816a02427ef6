"""A signal that is known again: tones in an order that nothing else has, over and over."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

RATE = 48_000
TONES_HZ = (700, 1900, 1100, 2700, 1500, 2300)
ROUND = "".join(str(number) for number in range(len(TONES_HZ)))  # as `hear` has it
TONE_S = 0.4
LEVEL = 12_000
WINDOW_S = 0.1
NEAR_HZ = 25.0
# A window is of one tone where so much of its power is at it.
PURE = 0.8
LOUD = 1_000


def make_melody(seconds: float) -> bytes:
    """Return the tones, mono 16-bit samples at ``RATE``."""
    t = np.arange(int(seconds * RATE)) / RATE
    pitches = np.array(TONES_HZ)[(t / TONE_S).astype(int) % len(TONES_HZ)]
    samples: bytes = (LEVEL * np.sin(2 * np.pi * pitches * t)).astype("<i2").tobytes()
    return samples


def write_melody(path: Path, seconds: float) -> None:
    """Write the tones to a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(make_melody(seconds))


def hear(samples: bytes) -> str:
    """Return the tones in `samples` in their order, each as its number, without repeats."""
    values = np.frombuffer(samples[: len(samples) // 2 * 2], "<i2").astype(float)
    size = int(WINDOW_S * RATE)
    windows = values[: values.size // size * size].reshape(-1, size)
    heard = "".join(name_tone(window) for window in windows)
    return "".join(
        tone for place, tone in enumerate(heard) if place == 0 or heard[place - 1] != tone
    )


def name_tone(window: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    """Return the number of the tone that a window is full of, if it is."""
    power = np.abs(np.fft.rfft(window * np.hanning(window.size))) ** 2
    hertz = np.fft.rfftfreq(window.size, 1 / RATE)
    for number, tone in enumerate(TONES_HZ):
        share = power[np.abs(hertz - tone) <= NEAR_HZ].sum() / max(1.0, power.sum())
        if share > PURE and np.abs(window).max() > LOUD:
            return str(number)
    return ""


def is_melody(samples: bytes) -> bool:
    """Return whether all the tones are in `samples`, in their order, and in no other."""
    heard = hear(samples)
    return len(heard) >= len(ROUND) and heard in ROUND * (len(heard) // len(ROUND) + 2)


def has_melody(samples: bytes) -> bool:
    """Return whether all the tones follow each other somewhere in `samples`.

    Where a machine is busy, some may be lost between a microphone and its server, and in snapcast.
    """
    heard = hear(samples)
    places = range(len(heard) - len(ROUND) + 1)
    return any(heard[place : place + len(ROUND)] in ROUND * 2 for place in places)
