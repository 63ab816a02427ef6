"""A place is held by progress: who makes none gives way to others, and is not waited for."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import common
import server
from common import Connection, PeerStalled
from peers import socket_pair
from server import Client, Clients, LimitedLog
from support import (
    HELLO,
    HOST,
    FakeServer,
    RawPeer,
    Server,
    background,
    contents,
    make_file,
    message,
    wait_for,
)

HERE, ELSEWHERE, FAR = "192.0.2.1", "192.0.2.66", "192.0.2.99"


class Ends:
    """Real connections, both ends of which are in this process."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def client(self, origin: str) -> Client:
        """Return a client of the server's that has just been accepted."""
        near, far = socket_pair()
        self._stack.enter_context(far)
        return Client(self._stack.enter_context(Connection(near, "peer")), origin)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Ends() as made:
        yield made


def test_the_most_common_origin_gives_way_at_the_handshake(ends: Ends) -> None:
    clients = Clients(max_served=9, max_pending=4)
    patient = ends.client(HERE)
    flood = [ends.client(ELSEWHERE) for _ in range(10)]
    for each in (patient, *flood):
        clients.add(each)
    assert not patient.eviction
    assert [bool(each.eviction) for each in flood] == [True] * 7 + [False] * 3
    assert clients.admit(patient)
    assert not clients.admit(flood[0])


def test_the_idlest_of_the_most_common_origin_gives_way_to_who_has_fewer_places(ends: Ends) -> None:
    clients = Clients(max_served=3)
    origin = [ends.client(ELSEWHERE) for _ in range(3)]
    for each in origin:
        clients.add(each)
        assert clients.admit(each)
    origin[0].connection.note_progress()
    origin[2].connection.note_progress()
    newcomer = ends.client(HERE)
    clients.add(newcomer)
    assert clients.admit(newcomer)
    assert [bool(each.eviction) for each in origin] == [False, True, False]
    assert origin[1].connection.wait_for_peer(0)  # it is broken


def test_a_busy_client_gives_way_to_no_more_of_its_own_origin(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = Clients(max_served=2)
    served = [ends.client(HERE), ends.client(ELSEWHERE)]
    for each in served:
        clients.add(each)
        assert clients.admit(each)
    late = [ends.client(HERE), ends.client(ELSEWHERE), ends.client(FAR)]
    for each in late:
        clients.add(each)
        assert not clients.admit(each)
    monkeypatch.setattr(server, "IDLE_S", 0.0)
    assert clients.admit(late[0])


def test_nobody_waits_for_the_idle_when_the_server_stops(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "IDLE_S", 1800.0)
    clients = Clients(max_served=9)
    idle, busy = ends.client(HERE), ends.client(HERE)
    for each in (idle, busy):
        clients.add(each)
        assert clients.admit(each)
    idle.connection._progress_s -= 3600
    with background(clients.finish):
        wait_for(lambda: idle.eviction)
        assert not busy.eviction
        clients.remove(idle)
        clients.remove(busy)


def test_a_frame_that_comes_byte_by_byte_takes_no_longer_than_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(common, "PROGRESS_TIMEOUT_S", 1.0)
    gone = threading.Event()

    def trickle(peer: RawPeer) -> None:
        for byte in message("hello", protocol=2, mode="file") * 10:
            peer.send(bytes([byte]))
            if gone.wait(0.2):
                return

    with (
        FakeServer(trickle) as fake,
        Connection(socket.create_connection((HOST, fake.port)), "peer") as connection,
    ):
        with pytest.raises(PeerStalled):
            connection.receive(common.Hello)
        gone.set()


def hold_place(port: int) -> socket.socket:
    """Take a place from another address of this machine, and begin a frame that never ends."""
    sock = socket.create_connection((HOST, port), timeout=60, source_address=("127.0.0.2", 0))
    sock.sendall(HELLO)
    assert sock.recv(1000)
    sock.sendall(b"\0\0\1")
    return sock


def test_an_honest_client_gets_in_where_another_address_holds_all_places(
    inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file", 1000)
    with Server(inbox, "--max-clients", "8") as running, contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(hold_place(running.port))
        result = running.send(source)
        assert (result.status, result.stderr) == (0, "")
        running.wait_for_output("dropped: all places are taken, and it was the idlest")
    assert contents(inbox) == {"file": source.read_bytes()}


def test_ctrl_c_waits_for_the_busy_and_not_for_who_holds_a_place(inbox: Path) -> None:
    with Server(inbox) as running, hold_place(running.port):
        running.signal(signal.SIGINT)
        running.wait_for_output("finishing 1 under way")
        running.wait_for_output("dropped: the server stops, and it was idle")
        assert running.wait().status == 130


def test_turning_many_away_is_some_lines_and_a_number(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    turned_away = LimitedLog(50, 0.5, lambda: now_s)
    with caplog.at_level(logging.INFO, "socket-pair"):
        for number in range(50 + 990):
            turned_away.write(f"192.0.2.{number}: no")
        assert len(caplog.messages) == 50
        turned_away.write("198.51.100.1: no", host="198.51.100.1")
        now_s += 1.0
        turned_away.write("192.0.2.1: no")
    assert caplog.messages[50:] == [
        "and 990 more lines were left out",
        "198.51.100.1: no",
        "192.0.2.1: no",
    ]
