"""A server, a network and a listener's sound card in virtual time, around the real `Playout`.

What lasts three minutes takes seconds, and nothing that the machine does meanwhile changes it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client import CALLBACK_WAIT_S, Playout, load_converters
from common import AudioFormat

load_converters()

MONO = AudioFormat(48_000, 1)
TONE_HZ = 997.0
AMPLITUDE = 12_000
CAPTURED_MS, READ_MS = 3.0, 5.0


SINAD_WINDOW_S = 0.25


class Moment(NamedTuple):
    """What can be seen of a playout at one read; times in seconds, of the simulation."""

    now_s: float
    lead_s: float
    target_s: float
    edge_s: float
    speed: float
    dropouts: int


def tone(audio: AudioFormat, first: int, frames: int, hertz: float = TONE_HZ) -> bytes:
    """Return `frames` of a tone that began at frame 0, the same on all channels."""
    phase = 2 * np.pi * hertz / audio.rate * np.arange(first, first + frames)
    values = np.rint(AMPLITUDE * np.sin(phase)).astype("<i2")
    return np.repeat(values, audio.channels).tobytes()


def quiet_network(seed: int = 1) -> Callable[[float], float]:
    """Return the delays of a network that is never late by much."""
    rng = random.Random(seed)
    return lambda now_s: abs(rng.gauss(0, 0.0003))


class PoorWifi:
    """The delays of DESIGN.md's poor Wi-Fi: 3 ms in the mean, and every 3 to 12 s all is held."""

    HOLDS_S = (0.04, 0.06, 0.06, 0.08, 0.15)

    def __init__(self, seed: int, good_after_s: float = math.inf) -> None:
        self._rng = random.Random(seed)
        self._good_after_s = good_after_s
        self._next_hold_s = self._rng.uniform(3, 12)

    def __call__(self, now_s: float) -> float:
        """Return by how long what is read at `now_s` is delayed."""
        if now_s >= self._good_after_s:
            return 0.0
        delay_s = self._rng.expovariate(1 / 0.003)
        if now_s >= self._next_hold_s:
            self._next_hold_s = now_s + self._rng.uniform(3, 12)
            delay_s += self._rng.choice(self.HOLDS_S)
        return delay_s


class Simulation:
    """Plays a server's tone through `playout`.

    The server's clock is `ppm` ahead of the sound card's. `delay` returns how long the network's
    relay keeps what it has just read; what comes meanwhile waits. The card asks for `read_frames`
    at a time, as often as it has to for `burst_frames` at once.
    """

    def __init__(
        self,
        playout: Playout,
        delay: Callable[[float], float] | None = None,
        *,
        ppm: float = 0.0,
        read_frames: int | None = None,
        burst_frames: int | None = None,
        seed: int = 1,
    ) -> None:
        self.playout = playout
        self.now_s = 0.0
        self.moments: list[Moment] = []
        self.heard = bytearray()
        self.held_until_s = 0.0
        self._delay = delay or quiet_network(seed)
        self._rate = playout.audio.rate * (1 + ppm / 1e6)
        self.block_frames = playout.audio.frames_in(CAPTURED_MS)
        self._read_frames = read_frames or playout.card.frames_in(READ_MS)
        self._burst_frames = burst_frames or self._read_frames
        self._rng = random.Random(seed)
        self._captured_frames = 0
        self._missed_frames = 0
        self._lost_s = 0.0
        self._read_count = 0
        self._relayed: list[tuple[bytes, int]] = []
        self._relay_free_s = 0.0

    def run(self, seconds: float) -> bytes:
        """Go on for `seconds`; return what is heard meanwhile."""
        before = len(self.heard)
        end_s = self.now_s + seconds
        while self._next_read_s() < end_s:
            self._read(self._next_read_s() + abs(self._rng.gauss(0, 0.0001)))
        self.now_s = end_s
        return bytes(self.heard[before:])

    def _next_read_s(self) -> float:
        bursts = self._read_count * self._read_frames // self._burst_frames
        return bursts * self._burst_frames / self.playout.card.rate

    def _read(self, now_s: float) -> None:
        self._read_count += 1
        self._arrive(now_s)
        if self.playout.lacks(self._read_frames):
            self._arrive(now_s + CALLBACK_WAIT_S)
        self.heard += self.playout.read(self._read_frames, now_s)
        self.moments.append(
            Moment(
                now_s,
                self.playout.lead_s,
                self.playout.target.seconds,
                self.playout.arrivals.edge_s,
                self.playout.speed,
                self.playout.dropouts,
            )
        )

    def _arrive(self, now_s: float) -> None:
        """Let all arrive that the relay has passed on by `now_s`."""
        while (arrival_s := max(self._relay_free_s, self.held_until_s)) <= now_s:
            for samples, missed_frames in self._relayed:
                self.playout.write(samples, missed_frames, arrival_s)
            self._relayed = []
            read_s = max(arrival_s, self._captured_s())
            if read_s > now_s:
                return
            while self._captured_s() <= read_s:
                self._relayed.append(self._capture())
            self._relay_free_s = read_s + self._delay(read_s)

    def _captured_s(self) -> float:
        """Return when the next block has been captured."""
        return self._lost_s + (self._captured_frames + self.block_frames) / self._rate

    def _capture(self) -> tuple[bytes, int]:
        """Return the next block, and how many frames were missed before it."""
        first, missed_frames = self._captured_frames, self._missed_frames
        self._captured_frames += self.block_frames
        self._missed_frames = 0
        return tone(self.playout.audio, first, self.block_frames), missed_frames

    def miss(self, frames: int) -> None:
        """Let the next `frames` not get through to the listener, who is told how many."""
        self._missed_frames += frames
        self._captured_frames += frames

    def lose(self, seconds: float) -> None:
        """Let the server stand still for `seconds`: it captures, and numbers, nothing."""
        self._lost_s += seconds

    def restart(self) -> None:
        """Let all begin now, what was captured before being lost."""
        self._read_count = math.ceil(self.now_s * self.playout.card.rate / self._read_frames)
        self._lost_s = self.now_s - self._captured_frames / self._rate


def sinad_db(samples: bytes, audio: AudioFormat, hertz: float = TONE_HZ) -> list[float]:
    """Return signal to noise and distortion of a tone in each ``SINAD_WINDOW_S``, channel 0.

    The frequency is fitted as well: another clock's is no distortion. Silence is -99 dB.
    """
    values = np.frombuffer(samples, "<i2")[:: audio.channels].astype(float)
    frames = int(audio.rate * SINAD_WINDOW_S)
    return [
        _sinad_db(values[start : start + frames], hertz / audio.rate)
        for start in range(0, len(values) - frames + 1, frames)
    ]


def _sinad_db(window: NDArray[np.float64], cycles: float) -> float:
    if window.std() < 1:
        return -99.0
    n = np.arange(len(window))
    for _ in range(4):
        turn = 2 * np.pi * cycles * n
        columns = np.stack(
            [np.sin(turn), np.cos(turn), np.ones(len(n)), n * np.cos(turn), -n * np.sin(turn)], 1
        )
        fit, *_ = np.linalg.lstsq(columns, window, rcond=None)
        cycles += (fit[0] * fit[3] + fit[1] * fit[4]) / (fit[0] ** 2 + fit[1] ** 2) / (2 * np.pi)
    fit, *_ = np.linalg.lstsq(columns[:, :3], window, rcond=None)
    rest: Any = window - columns[:, :3] @ fit
    return float(10 * np.log10((fit[0] ** 2 + fit[1] ** 2) / 2 / np.mean(rest**2)))
