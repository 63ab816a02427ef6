"""Slow disks and slow lines take long, and break nothing."""

from __future__ import annotations

import itertools
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import client
import common
from conversation import honest_server
from peers import FakeServer, socket_pair
from support import (
    UP,
    Proxy,
    Server,
    background,
    contents,
    linux,
    make_file,
    partial_size,
    run_script,
    wait_for,
)

with_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="delays system calls")
KIB = 1024


def slowed(call: str, delay_ms: int, *paths: Path, which: str = "1+") -> tuple[str, ...]:
    """Return what runs a program whose system calls about `paths` take so long."""
    about = [word for path in paths for word in ("-P", str(path))]
    delay = f"inject={call}:delay_exit={delay_ms * 1000}:when={which}"
    return ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", *about, "-e", delay)


@with_strace
@pytest.mark.parametrize("call", ["openat", "newfstatat"])
def test_files_that_are_slow_to_open_or_look_up_are_sent_meanwhile(
    server: Server, tmp_path: Path, call: str
) -> None:
    """Small as they are, they do not wait for each other."""
    trees = (tmp_path / f"tree {number}" for number in itertools.count())

    def is_sent_meanwhile() -> bool:
        """Send a tree; return whether the first file was seen there without the last."""
        tree = next(trees)
        arrived = server.folder / tree.name
        sources = [make_file(tree / f"{number:02}", 100, seed=number) for number in range(12)]
        with server.client(tree, wrapper=slowed(call, 300, *sources)) as client:
            wait_for((arrived / "00").exists)
            is_seen = client.running() and not (arrived / "11").exists()
            assert client.wait().status == 0
        assert contents(arrived) == contents(tree)
        return is_seen

    wait_for(is_sent_meanwhile, "a look that does not come too late")


@with_strace
@pytest.mark.parametrize(
    ("call", "is_held"),
    [("newfstatat", False), ("openat", True), ("openat", False)],
    ids=["looked up", "compared", "sent"],
)
def test_one_call_of_a_disk_that_takes_too_long_costs_no_connection(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, is_held: bool
) -> None:
    """Longer than the server waits for a client that says nothing."""
    source = make_file(tmp_path / "tree" / "file", 100 * KIB)
    inbox.mkdir()
    if is_held:
        make_file(inbox / "tree" / "file", 100 * KIB)
    monkeypatch.setattr(common, "PROGRESS_TIMEOUT_S", 8.0)  # of the server, in this process
    with FakeServer(honest_server(inbox)) as fake:
        arguments = ("file", "--port", str(fake.port), "--retry", "0", str(source.parent))
        result = run_script(
            "client.py", *arguments, wrapper=slowed(call, 12_000, source, which="1")
        )
    assert result.status == 0, result
    assert contents(inbox / "tree") == {"file": source.read_bytes()}


def limited(bytes_per_s: float) -> Callable[[int, int, bytes], bytes]:
    """Return what makes a link to the server so slow."""

    def hook(direction: int, _passed: int, data: bytes) -> bytes:
        if direction == UP:
            time.sleep(len(data) / bytes_per_s)
        return data

    return hook


def test_what_came_over_a_slow_line_that_breaks_is_kept(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 600 * KIB)
    with (
        Proxy(server.port, hook=limited(100 * KIB)) as proxy,
        server.client(source, port=proxy.port) as client,
    ):
        proxy.wait_until_passed(200 * KIB, client)
        proxy.cut()
        wait_for(lambda: partial_size(server.folder) >= 150 * KIB)
        result = client.wait()
    assert result.status == 0, result
    assert "resuming after the first" in result.stdout
    assert proxy.passed < 700 * KIB
    assert contents(server.folder) == {"file": source.read_bytes()}


def test_the_bar_follows_what_has_arrived(server: Server, tmp_path: Path) -> None:
    """Not what the system has taken, which is all of it at once."""
    source = make_file(tmp_path / "file", 900 * KIB)
    with (
        Proxy(server.port, hold_at=200 * KIB) as proxy,
        server.client(source, port=proxy.port, terminal=True) as client,
    ):
        client.expect(r" [1-9]\d%")
        assert "100%" not in client.text()
        proxy.release()
        assert client.wait().status == 0


@linux
def test_a_line_that_still_drains_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply is waited for as long as what was sent before still leaves, and no longer."""
    monkeypatch.setattr(common, "PROGRESS_TIMEOUT_S", 6.0)
    near, far = socket_pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
    drained = threading.Event()

    def drain() -> None:
        for _ in range(80):  # for longer than that
            time.sleep(0.1)
            far.recv(4_500)
        drained.set()

    with far, common.Connection(near, "server") as connection, background(drain):
        connection.write(bytes(400 * KIB))
        with pytest.raises(common.PeerStalled):
            connection.read(1)
        assert drained.is_set()


@linux
def test_a_long_line_with_some_loss_is_sent_over_by_bbr_where_the_system_has_it() -> None:
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    near, far = socket_pair()
    with far, common.Connection(near, "server") as connection:
        before = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        client.prefer_bbr(connection)
        now = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert now.rstrip(b"\0") == (b"bbr" if "bbr" in allowed else before.rstrip(b"\0"))
