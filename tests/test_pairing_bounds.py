"""What those can do who have no code is bounded; TLS carries both ways at once."""

from __future__ import annotations

import hashlib
import random
import socket
import threading

import pytest

import common
import server
from common import Connection
from pairing import CODE, pair_contexts
from server import RateLimiter
from support import HOST


def test_guesses_from_an_address_are_slowed_down_and_a_right_one_forgives_them() -> None:
    now_s = 0.0
    limiter = RateLimiter(lambda: now_s)
    waits = []
    for _ in range(server.FREE_GUESSES + 6):
        wait_s = limiter.reserve("192.0.2.1")
        assert wait_s is not None
        waits.append(wait_s)
        now_s += wait_s
    assert waits == [0.0] * server.FREE_GUESSES + [1, 2, 4, 5, 5, 5]
    assert limiter.reserve("192.0.2.2") == 0
    limiter.forgive("192.0.2.1")
    assert limiter.reserve("192.0.2.1") == 0


def test_guesses_at_once_are_as_slow_as_one_after_the_other() -> None:
    limiter = RateLimiter(lambda: 0.0)
    waits = [limiter.reserve("192.0.2.1") for _ in range(256)]
    assert waits[: server.FREE_GUESSES + 2] == [0.0] * server.FREE_GUESSES + [1, 3]
    assert set(waits[server.FREE_GUESSES + 2 :]) == {None}


def test_the_limiter_remembers_a_bounded_number_and_forgets_the_oldest() -> None:
    limiter = RateLimiter(lambda: 0.0)
    for _ in range(server.FREE_GUESSES):
        limiter.reserve("2001:db8::/64")
    for number in range(server.MAX_KNOWN_CROWDS):
        limiter.reserve(f"10.0.{number // 256}.{number % 256}")
    assert limiter.reserve("2001:db8::/64") == 0


@pytest.mark.parametrize(
    ("host", "own", "crowd"),
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
    host: str, own: str, crowd: str
) -> None:
    assert server.crowd_of(host, own) == crowd


def test_both_ends_may_read_and_write_at_once() -> None:
    near_tls, far_tls = pair_contexts(CODE, CODE)
    with socket.create_server((HOST, 0)) as listener:
        near_socket = socket.create_connection(listener.getsockname())
        far_socket, _ = listener.accept()
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

    with Connection(near_socket, "far") as near, Connection(far_socket, "near") as far:
        shaking = threading.Thread(
            target=far.start_tls, args=(far_tls,), kwargs={"server_side": True}
        )
        shaking.start()
        near.start_tls(near_tls, server_side=False)
        shaking.join(60)
        threads = [
            threading.Thread(target=read, args=("near", near)),
            threading.Thread(target=read, args=("far", far)),
            threading.Thread(target=write, args=(near,)),
            threading.Thread(target=write, args=(far,)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    expected = hashlib.sha256(b"".join(blocks)).digest()
    assert received == {"near": expected, "far": expected}


def test_a_connection_cut_off_by_the_network_is_not_a_clean_end() -> None:
    near_tls, far_tls = pair_contexts(CODE, CODE)
    for cut in (True, False):
        with socket.create_server((HOST, 0)) as listener:
            near_socket = socket.create_connection(listener.getsockname())
            far_socket, _ = listener.accept()
        with Connection(near_socket, "far") as near, Connection(far_socket, "near") as far:
            shaking = threading.Thread(
                target=far.start_tls, args=(far_tls,), kwargs={"server_side": True}
            )
            shaking.start()
            near.start_tls(near_tls, server_side=False)
            shaking.join(60)
            near.send(common.Hashing())
            if cut:
                near_socket.shutdown(socket.SHUT_WR)
            else:
                near.close()
            far.receive(common.Hashing)
            with pytest.raises(common.ConnectionBroken if cut else common.PeerClosed):
                far.receive(common.Hashing)
