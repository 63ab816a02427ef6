"""What those can do who have no code is bounded; TLS carries both ways at once."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest

import common
import server
from common import Connection
from pairing import CODE, pair_contexts
from peers import socket_pair
from server import RateLimiter
from support import background


def guess_limiter(clock: Callable[[], float]) -> RateLimiter:
    return RateLimiter(server.FREE_GUESSES, server.GUESS_SPACING_S, clock)


def test_guesses_from_an_address_are_slowed_down_and_a_right_one_forgives_them() -> None:
    now_s = 0.0
    limiter = guess_limiter(lambda: now_s)
    waits = []
    for _ in range(server.FREE_GUESSES + 6):
        wait_s = limiter.reserve("192.0.2.1", server.GUESS_SPACING_S)
        assert wait_s is not None
        waits.append(wait_s)
        now_s += wait_s
    assert waits == [0.0] * server.FREE_GUESSES + [server.GUESS_SPACING_S] * 6
    assert limiter.reserve("192.0.2.2") == 0
    limiter.forget("192.0.2.1")
    assert limiter.reserve("192.0.2.1") == 0


def test_guesses_at_once_are_as_slow_as_one_after_the_other() -> None:
    limiter = guess_limiter(lambda: 0.0)
    waits = [limiter.reserve("192.0.2.1", server.GUESS_SPACING_S) for _ in range(256)]
    free = server.FREE_GUESSES
    assert waits[: free + 1] == [0.0] * free + [server.GUESS_SPACING_S]
    assert set(waits[free + 1 :]) == {None}


def test_what_is_given_back_does_not_count() -> None:
    now_s = 0.0
    limiter = RateLimiter(3, 1.0, lambda: now_s)
    assert [limiter.reserve("a", 9.0, 2) for _ in range(2)] == [0.0, 1.0]
    limiter.give_back("a", 2)
    assert [limiter.reserve("a", 9.0) for _ in range(3)] == [0.0, 1.0, 2.0]
    now_s = 100.0
    limiter.give_back("a", 1)
    assert [limiter.reserve("a") for _ in range(4)] == [0.0, 0.0, 0.0, None]


def test_the_limiter_remembers_a_bounded_number_and_forgets_the_oldest() -> None:
    limiter = guess_limiter(lambda: 0.0)
    for _ in range(server.FREE_GUESSES):
        limiter.reserve("2001:db8::/64")
    assert limiter.reserve("2001:db8::/64") is None
    for number in range(server.MAX_REMEMBERED):
        limiter.reserve(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert limiter.reserve("2001:db8::/64") == 0


@pytest.mark.parametrize(
    ("host", "own", "origin"),
    [
        ("192.0.2.1", "192.0.2.9", "192.0.2.1"),
        ("2001:db8::5", "2001:db8::9", "2001:db8::5"),  # a neighbour
        ("2001:db8:0:1::5", "2001:db8::9", "2001:db8:0:1::/64"),  # may have all of these
        ("fe80::5%eth0", "fe80::9%eth0", "fe80::5%eth0"),
        ("::1", "::1", "::1"),
        ("192.0.2.1", "::ffff:192.0.2.9", "192.0.2.1"),
    ],
)
def test_only_elsewhere_one_is_taken_to_have_many_addresses(
    host: str, own: str, origin: str
) -> None:
    assert server.origin_of(host, own) == origin


@contextlib.contextmanager
def tls_ends() -> Iterator[tuple[Connection, Connection, socket.socket]]:
    """Give both ends of a connection over TLS, and the first one's socket."""
    near_tls, far_tls = pair_contexts(CODE, CODE)
    near_socket, far_socket = socket_pair()
    with Connection(near_socket, "far") as near, Connection(far_socket, "near") as far:
        with background(lambda: far.start_tls(far_tls, server_side=True)):
            near.start_tls(near_tls, server_side=False)
        yield near, far, near_socket


def test_both_ends_may_read_and_write_at_once() -> None:
    blocks = [random.Random(number).randbytes(200_000) for number in range(100)]
    received: dict[str, bytes] = {}

    def read(name: str, connection: Connection) -> None:
        digest = hashlib.sha256()
        for block in blocks:
            digest.update(connection.read(len(block)))
        received[name] = digest.digest()

    def write(connection: Connection) -> None:
        for block in blocks:
            connection.write(block)

    with tls_ends() as (near, far, _), contextlib.ExitStack() as stack:
        for name, end in (("near", near), ("far", far)):
            stack.enter_context(background(partial(read, name, end)))
            stack.enter_context(background(partial(write, end)))
    expected = hashlib.sha256(b"".join(blocks)).digest()
    assert received == {"near": expected, "far": expected}


@pytest.mark.parametrize("cut", [True, False])
def test_a_connection_cut_off_by_the_network_is_not_a_clean_end(cut: bool) -> None:
    with tls_ends() as (near, far, near_socket):
        near.send(common.Hashing())
        if cut:
            near_socket.shutdown(socket.SHUT_WR)
        else:
            near.close()
        far.receive(common.Hashing)
        with pytest.raises(common.ConnectionBroken if cut else common.PeerClosed):
            far.receive(common.Hashing)
