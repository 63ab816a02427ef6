"""By how much one sound is behind another, from how alike they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Signal = NDArray[np.float64]

HEARD = 0.5  # of a perfect correlation


def lag(one: Signal, other: Signal) -> float | None:
    """Return by how many samples `other` is behind `one`; None where they are not alike."""
    size = 2 * len(one)
    cross = np.fft.irfft(np.conj(np.fft.rfft(one, size)) * np.fft.rfft(other, size))
    at = int(np.argmax(cross))
    # The padding of `one`, if any, counts for nothing.
    scale = np.sqrt((one**2).sum() * (other**2).mean() * np.count_nonzero(one))
    if scale == 0 or cross[at] / scale < HEARD:
        return None
    before, here, after = cross[at - 1], cross[at], cross[(at + 1) % size]
    fraction = (before - after) / (2 * (before - 2 * here + after))
    return float((at + size // 2) % size - size // 2 + fraction)


def to_signal(samples: bytes, channels: int) -> Signal:
    """Return 16-bit samples as floats, a row a frame."""
    whole = samples[: len(samples) // (2 * channels) * 2 * channels]
    return np.frombuffer(whole, "<i2").reshape(-1, channels) / 32768.0
