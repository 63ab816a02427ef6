"""What those can do who have no code is bounded; TLS carries both ways at once."""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import threading

import pytest

import common
import server
from common import Connection, make_tls_context, normalize_code
from pairing import CODE
from server import Lobby, Patience
from support import HOST


class FakeConnection:
    """Stands for a connection in the lobby."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.woken = False

    def wake(self) -> None:
        """Take note of being put out."""
        self.woken = True


def test_the_crowdiest_address_gives_way_in_the_lobby() -> None:
    lobby = Lobby(4)
    patient = FakeConnection("patient")
    flood = [FakeConnection(f"flood {number}") for number in range(10)]
    lobby.enter(patient, "192.0.2.1")  # type: ignore[arg-type]
    for each in flood:
        lobby.enter(each, "192.0.2.66")  # type: ignore[arg-type]
    assert not patient.woken
    assert [each.woken for each in flood] == [True] * 7 + [False] * 3
    assert lobby.leave(patient)  # type: ignore[arg-type]
    assert not lobby.leave(patient)  # type: ignore[arg-type]
    assert not lobby.leave(flood[0])  # type: ignore[arg-type]


def test_patience_runs_out_and_comes_back() -> None:
    now_s = 0.0
    patience = Patience(lambda: now_s)
    waits = []
    for _ in range(server.FREE_TRIES + 9):
        patience.note_wrong_code("192.0.2.1")
        started_s = now_s
        while patience.refuses("192.0.2.1"):
            now_s += 0.5
        waits.append(now_s - started_s)
    assert waits == [0.0] * server.FREE_TRIES + [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert not patience.refuses("192.0.2.2")
    patience.note_wrong_code("192.0.2.1")
    patience.note_right_code("192.0.2.1")
    assert not patience.refuses("192.0.2.1")


def test_patience_knows_one_with_many_ipv6_addresses_and_forgets_the_oldest() -> None:
    patience = Patience(lambda: 0.0)
    for number in range(server.FREE_TRIES + 1):
        patience.note_wrong_code(f"2001:db8::{number:x}%eth0")
    assert patience.refuses("2001:db8::abcd")
    assert not patience.refuses("2001:db8:0:1::1")
    for number in range(server.MAX_KNOWN_HOSTS):
        patience.note_wrong_code(f"10.0.{number // 256}.{number % 256}")
    assert not patience.refuses("2001:db8::abcd")


def test_both_ends_may_read_and_write_at_once(tls: ssl.SSLContext) -> None:
    far_tls = make_tls_context(normalize_code(CODE), server_side=True)
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
        near.start_tls(tls, server_side=False)
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


def test_a_connection_cut_off_by_the_network_is_not_a_clean_end(tls: ssl.SSLContext) -> None:
    far_tls = make_tls_context(normalize_code(CODE), server_side=True)
    for cut in (True, False):
        with socket.create_server((HOST, 0)) as listener:
            near_socket = socket.create_connection(listener.getsockname())
            far_socket, _ = listener.accept()
        with Connection(near_socket, "far") as near, Connection(far_socket, "near") as far:
            shaking = threading.Thread(
                target=far.start_tls, args=(far_tls,), kwargs={"server_side": True}
            )
            shaking.start()
            near.start_tls(tls, server_side=False)
            shaking.join(60)
            near.send(common.Hashing())
            if cut:
                near_socket.shutdown(socket.SHUT_WR)
            else:
                near.close()
            far.receive(common.Hashing)
            with pytest.raises(common.ConnectionBroken if cut else common.PeerClosed):
                far.receive(common.Hashing)
