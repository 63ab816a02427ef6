"""Whatever a client sends, holds back or breaks off, the server goes on serving others."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import socket
import struct
from pathlib import Path

import pytest

from support import (
    END_OF_FILE,
    HELLO,
    HOST,
    MIB,
    RawClient,
    Server,
    contents,
    control_codes,
    frame,
    linux,
    make_file,
    make_partial,
    message,
    start_client,
    visible,
    wait_for,
)


def conversation() -> bytes:
    """Return all that a client says to send a few files and a folder."""
    files = {"one.bin": bytes(range(256)) * 40, "tree/two": b"2" * 3000, "tree/none": b""}
    entries: list[object] = [{"path": path, "size": len(data)} for path, data in files.items()]
    entries += [{"path": "tree", "folder": True}, {"path": "pipe", "size": None}]
    said = HELLO + message("offer", entries=entries)
    for data in [*files.values(), b"piped"]:
        for at in range(0, len(data), 4096):
            said += frame(data[at : at + 4096])
        said += END_OF_FILE + hashlib.sha256(data).digest()
    return said


def sample_positions(said: bytes, count: int) -> list[int]:
    """Return the positions at which messages and segments begin and end, and some more."""
    offer = len(HELLO)
    places = {0, 1, 3, 4, 5, offer - 1, offer, offer + 4, len(said) - 1, len(said) - 32}
    places |= set(random.Random(5).sample(range(len(said)), count - len(places)))
    return sorted(places)


def clean(folder: Path) -> None:
    """Empty a folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


@linux
@pytest.mark.parametrize("end", ["hang up", "reset"])
def test_a_client_may_hang_up_anywhere(server: Server, tmp_path: Path, end: str) -> None:
    said = conversation()
    before = server.held()
    for position in sample_positions(said, 40):
        with RawClient(server.port) as client:
            client.send(said[:position])
            if end == "reset":
                client.reset()
            else:
                client.hang_up()
                client.read_all()
        server.wait_until_idle(before)
        whole = {"one.bin": bytes(range(256)) * 40, "tree/two": b"2" * 3000, "tree/none": b""}
        for name, content in contents(server.folder).items():
            hidden = os.path.basename(name).startswith(".")
            assert hidden or name == "tree/" or content == whole[name]
        clean(server.folder)
    server.check_serves(tmp_path)


@linux
def test_the_whole_of_that_conversation_is_a_good_one(server: Server) -> None:
    with RawClient(server.port) as client:
        client.send(conversation())
        client.hang_up()
        client.read_all()
    assert contents(server.folder) == {
        "one.bin": bytes(range(256)) * 40,
        "tree/": b"",
        "tree/two": b"2" * 3000,
        "tree/none": b"",
        "pipe": b"piped",
    }
    assert server.stderr() == ""


@linux
def test_a_client_may_hang_up_anywhere_while_it_resumes(server: Server, tmp_path: Path) -> None:
    content = os.urandom(9000)
    digest = hashlib.sha256(content[:4000]).hexdigest()
    said = HELLO + message("offer", entries=[{"path": "x", "size": 9000}])
    said += message("prefixes", entries=[[digest]])
    said += frame(content[4000:]) + END_OF_FILE + hashlib.sha256(content).digest()
    before = server.held()
    for position in [*sample_positions(said, 25), len(said)]:
        make_partial(server.folder, "x", content[:4000])
        with RawClient(server.port) as client:
            client.send(said[:position])
            client.hang_up()
            client.read_all()
        server.wait_until_idle(before)
        found = contents(server.folder)
        if position == len(said):
            assert found == {"x": content}
        else:
            (name,) = found
            assert name.endswith(".socketpair-part")
            assert content.startswith(found[name])
            assert len(found[name]) >= 4000, "what was there is kept"
        clean(server.folder)
    server.check_serves(tmp_path)


IDLE_THREADS = 4  # that wait for Ctrl+C, accept, keep the clients, and write the log


ENTRY = {"path": "x", "size": 4}


OFFER = message("offer", entries=[ENTRY])


JUNK = {
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "an SSH banner": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "zeros": bytes(1000),
    "random bytes": random.Random(1).randbytes(100_000),
    "the longest length": b"\xff" * 8,
    "a frame of 2 MiB": struct.pack("!I", 2 * MIB) + bytes(MIB),
    "a hello of 5 kB": message("hello", protocol=2, mode="file", padding="x" * 5000),
    "an array": frame(b"[]"),
    "no JSON": frame(b"{"),
    "deep nesting": frame(b"[" * 4000),
    "no mode": message("hello", protocol=2),
    "a mode that is a list": message("hello", protocol=2, mode=["file"]),
    "a protocol that is true": message("hello", protocol=True, mode="file"),
    "an offer first": OFFER,
    "a second hello": HELLO + HELLO,
    "no entries": HELLO + message("offer"),
    "entries that are none": HELLO + message("offer", entries=[1, "x", None]),
    "an entry without path": HELLO + message("offer", entries=[{"size": 1}]),
    "a path that is a number": HELLO + message("offer", entries=[{"path": 1, "size": 1}]),
    "a negative size": HELLO + message("offer", entries=[{"path": "x", "size": -1}]),
    "an endless size": HELLO + message("offer", entries=[{"path": "x", "size": 2**64}]),
    "a size that is a text": HELLO + message("offer", entries=[{"path": "x", "size": "1"}]),
    "a time beyond all": HELLO + message("offer", entries=[{**ENTRY, "mtime_ns": 2**63}]),
    "a time that is a text": HELLO + message("offer", entries=[{**ENTRY, "mtime_ns": "now"}]),
    "too many entries": HELLO + message("offer", entries=[ENTRY] * 1001),
    "prefixes nobody asked for": HELLO + message("prefixes", entries=[]),
    "deep nesting in an offer": HELLO + frame(b'{"type":"offer","entries":' + b"[" * 500_000),
    "a long number": HELLO + frame(b'{"type":"offer","entries":[' + b"9" * 100_000 + b"]}"),
    "NaN as a size": HELLO + frame(b'{"type":"offer","entries":[{"path":"x","size":NaN}]}'),
    "more than was offered": HELLO + OFFER + frame(b"12345"),
    "a segment too long": HELLO + OFFER + struct.pack("!I", MIB + 1) + bytes(1000),
    "another offer inside": HELLO + OFFER + OFFER,
    "an error": HELLO + message("error", error="\x1b[2J"),
    "a large file whose name is no text": HELLO
    + message("offer", entries=[{"path": "\ud800", "size": 100 * MIB}])
    + frame(b"1234"),
}


@linux
@pytest.mark.parametrize("said", JUNK.values(), ids=JUNK.keys())
def test_nonsense_from_a_client_is_a_line_in_the_log(
    server: Server, tmp_path: Path, said: bytes
) -> None:
    before = server.held()
    with RawClient(server.port) as client:
        client.send(said)
        client.hang_up()
        client.read_all()
    server.wait_until_idle(before)
    wait_for(server.stderr, "a line in the log")
    server.check_serves(tmp_path)  # whose line comes after all of these
    log = server.stderr()
    assert 1 <= len(log.splitlines()) <= 3
    assert control_codes(log) == set()
    assert len(visible(server.folder)) == 1


BAD_PATHS = [
    "",
    "/",
    "/x",
    ".",
    "..",
    "../x",
    "../../../../tmp/x",
    "/etc/cron.d/x",
    "a/../../x",
    "a/./x",
    "a//x",
    "a/",
    "nul\0x",
    "x" * 5000,
    "/".join(["x"] * 20_000),
    ".x.0.socketpair-part",
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: repr(path[:20]))
def test_a_path_that_leads_elsewhere_is_refused(server: Server, tmp_path: Path, path: str) -> None:
    with RawClient(server.port).greet() as client:
        start = client.offer({"path": path, "size": 1}, {"path": path, "folder": True})
        assert "failed" in start["entries"][0]
        if "failed" not in start["entries"][1]:  # a folder is made when its turn comes
            assert "failed" in client.receive_result()
        assert "saved" in client.send_file("next", b"good")
    assert contents(server.folder) == {"next": b"good"}
    assert visible(tmp_path) == ["inbox"]


def test_a_path_deeper_than_the_system_takes_fails_alone(server: Server) -> None:
    path = "/".join(["d" * 200] * 60)
    with RawClient(server.port).greet() as client:
        assert "failed" in json.dumps(client.offer({"path": path, "size": 1}))
        assert "saved" in client.send_file("next", b"good")
    assert (server.folder / "next").read_bytes() == b"good"
    assert not [path for path in server.folder.rglob("*") if path.is_file() and path.name != "next"]


@linux
def test_silent_and_slow_peers_are_left_after_the_handshake_limit(
    server: Server, tmp_path: Path
) -> None:
    """On either side; in one test, as it takes the limit's 10 s."""
    source = make_file(tmp_path / "file", 10)
    before = server.held()
    with contextlib.ExitStack() as stack:
        silent_server = stack.enter_context(socket.create_server((HOST, 0)))
        client = stack.enter_context(start_client(silent_server.getsockname()[1], source))
        peers = [stack.enter_context(RawClient(server.port)) for _ in range(20)]
        peers[-1].send(HELLO[:6])
        slow = stack.enter_context(RawClient(server.port))
        wait_for(lambda: server.threads() > 21)
        server.check_serves(tmp_path)
        assert slow.is_left_while_it_sends(HELLO)
        for peer in peers:
            assert peer.read_all() == b"", "within the socket's time limit of 60 s"
        result = client.wait()
    assert result.status == 1
    (line,) = result.error_lines
    assert line.endswith(": the other side made no progress for 10 s before it answered")
    server.wait_until_idle(before)
    server.wait_for("the other side made no progress for 10 s", times=21)
    assert server.stderr().count("the other side made no progress for 10 s") == 21


def test_more_clients_than_allowed_are_told_so(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    with Server(inbox, "--max-clients", "2") as server:
        with RawClient(server.port).greet(), RawClient(server.port).greet():
            result = server.send(source)
            assert result.status == 1
            assert len(result.error_lines) == 1
            assert "this server is busy with 2 clients" in result.stderr
        wait_for(lambda: server.threads() <= IDLE_THREADS)
        server.check_serves(tmp_path)


@linux
def test_silent_connections_do_not_keep_real_clients_out(inbox: Path, tmp_path: Path) -> None:
    with Server(inbox, "--max-clients", "2") as server:
        silent = [RawClient(server.port) for _ in range(20)]
        try:
            server.check_serves(tmp_path)
        finally:
            for client in silent:
                client.socket.close()


@linux
def test_a_server_out_of_descriptors_recovers(inbox: Path, tmp_path: Path) -> None:
    limit = ("prlimit", "--nofile=24:24", "--")
    with Server(inbox, wrapper=limit) as server:
        held = []
        try:
            for _ in range(40):
                held.append(RawClient(server.port))
                held[-1].send(HELLO)
            wait_for(lambda: os.strerror(errno.EMFILE).lower() in server.stderr().lower())
        finally:
            for client in held:
                client.socket.close()
        wait_for(lambda: server.threads() <= IDLE_THREADS)
        server.check_serves(tmp_path)


@linux
def test_a_thousand_connections_leave_nothing_behind(server: Server, tmp_path: Path) -> None:
    server.check_serves(tmp_path)
    wait_for(lambda: server.threads() <= IDLE_THREADS)
    before, memory = server.held(), server.status_field("VmRSS")
    for number in range(1000):
        with RawClient(server.port) as client:
            if number % 2:
                client.send(HELLO if number % 4 == 1 else b"junk" * 10)
                client.hang_up()
                client.read_all()
    server.wait_until_idle(before)
    assert server.status_field("VmRSS") < memory + 8 * 1024
    server.check_serves(tmp_path)
