"""A player knows the server's clock, whatever the two clocks and the network between them do.

Plain logic with made-up clocks and networks: no socket, no real time.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client
import server
from client import OffsetBounds, ServerClock
from sound import bound_offset

BLOCK_S = 0.0025

Clock = Callable[[float], float]  # from true time to what it shows
Delay = Callable[[random.Random], float]


def drifting(offset_s: float, ppm: float) -> Clock:
    return lambda true_s: offset_s + true_s * (1 + ppm / 1e6)


def quiet(chance: random.Random) -> float:
    return 100e-6 + chance.expovariate(1 / 20e-6)


def queued(chance: random.Random) -> float:
    """Return a delay behind what is held up for 3 ms in the mean, and is held up itself.

    So does DESIGN.md's poor Wi-Fi, where now and then all is held up for a tenth of a second.
    """
    late_s = chance.expovariate(1 / 3e-3) + chance.expovariate(1 / 3e-3)
    return 300e-6 + late_s + (0.1 if chance.random() < 0.02 else 0)


class Exchange:
    """A client and a server that exchange the time over a made-up network."""

    def __init__(self, server: Clock, up: Delay, down: Delay, seed: int = 1) -> None:
        self.clock = ServerClock()
        self.server = server
        self._up, self._down = up, down
        self._chance = random.Random(seed)
        self._on_the_way: list[tuple[float, OffsetBounds]] = []
        self._block = 0
        self.asked_at_s: list[float] = []

    def run(self, until_s: float) -> None:
        """Let blocks come until then; each is an opportunity to ask, as in `Listening`."""
        while (now_s := self._block * BLOCK_S) < until_s:
            self._block += 1
            if self.clock.wants_request(now_s):
                self.asked_at_s.append(now_s)
                there_s = now_s + self._up(self._chance)
                answered_s = there_s + self._chance.random() * BLOCK_S
                back_s = answered_s + self._down(self._chance)
                bounds = bound_offset(now_s, self.server(there_s), self.server(answered_s), back_s)
                self._on_the_way.append((back_s, bounds))
            for arrival in [each for each in self._on_the_way if each[0] <= now_s]:
                self._on_the_way.remove(arrival)
                self.clock.take(arrival[1])

    def error_s(self) -> float:
        """Return how far off the client is that asks for the server's time now."""
        now_s = self._block * BLOCK_S
        return now_s + self.clock.offset_at(now_s) - self.server(now_s)

    def worst_error_s(self, from_s: float, until_s: float) -> float:
        """Let time go by, and return how far off the client was at most between these moments."""
        worst_s = 0.0
        while from_s < until_s:
            self.run(from_s)
            worst_s = max(worst_s, abs(self.error_s()))
            from_s += 0.1
        return worst_s


@given(offset_s=st.floats(-1e6, 1e6), ppm=st.floats(-100, 100), seed=st.integers(0, 1_000_000))
@settings(max_examples=25, deadline=None)
def test_on_a_quiet_network_the_servers_clock_is_known_within_50_us(
    offset_s: float, ppm: float, seed: int
) -> None:
    exchange = Exchange(drifting(offset_s, ppm), quiet, quiet, seed)
    assert exchange.worst_error_s(1.0, 60.0) < 50e-6


@pytest.mark.parametrize("seed", range(5))
def test_behind_queued_sound_the_servers_clock_is_known_within_half_a_millisecond(
    seed: int,
) -> None:
    exchange = Exchange(drifting(5.0, 40), quiet, queued, seed)
    assert exchange.worst_error_s(30.0, 120.0) < 500e-6


@pytest.mark.parametrize("jump_s", [5.0, -5.0, 0.02])
@pytest.mark.parametrize("moment_s", [40.0, 40.5, 41.0, 41.5, 42.0])
def test_a_jump_of_the_clock_is_followed_within_three_seconds(
    jump_s: float, moment_s: float
) -> None:
    steady = drifting(0.0, 20)
    exchange = Exchange(
        lambda true_s: steady(true_s) + (jump_s if true_s > moment_s else 0), quiet, quiet
    )
    exchange.run(moment_s)
    exchange.run(moment_s + 3)
    assert abs(exchange.error_s()) < 50e-6


def test_a_jump_of_the_clock_in_the_middle_of_a_burst_is_followed() -> None:
    exchange = Exchange(drifting(3.0, 10), quiet, quiet)
    exchange.run(30.0)
    for number in range(client.BURST_REQUESTS):
        asked_s = 30.0 + number / 100
        ahead_s = 8.0 if number > 3 else 3.0
        exchange.clock.take(
            bound_offset(asked_s, asked_s + ahead_s, asked_s + 8.0, asked_s + 0.0002)
        )
    exchange.clock.wants_request(30.1 + client.BURST_TIMEOUT_S)
    assert exchange.clock.offset_at(30.1) == pytest.approx(8.0, abs=200e-6)


def test_a_clock_that_is_slewed_is_followed() -> None:
    exchange = Exchange(lambda true_s: true_s + max(0, true_s - 30) * 400e-6, quiet, quiet)
    assert exchange.worst_error_s(30.0, 60.0) < 1.5e-3
    assert exchange.worst_error_s(60.0, 90.0) < 100e-6


def test_requests_that_nobody_answers_are_asked_again() -> None:
    clock = ServerClock()
    asked = [clock.wants_request(number * BLOCK_S) for number in range(2_000)]
    assert sum(asked) >= 4 * client.BURST_REQUESTS
    assert not clock.is_known


def test_a_player_asks_no_more_than_a_server_allows() -> None:
    exchange = Exchange(drifting(3.0, 10), quiet, quiet)
    exchange.run(120.0)
    allowance: float = server.REQUESTS_AT_ONCE
    for before_s, now_s in itertools.pairwise([0.0, *exchange.asked_at_s]):
        gained = (now_s - before_s) / server.REQUEST_SPACING_S
        allowance = min(server.REQUESTS_AT_ONCE, allowance + gained) - 1
        assert allowance > server.REQUESTS_AT_ONCE / 4
    assert len(exchange.asked_at_s) < 120 * 4
