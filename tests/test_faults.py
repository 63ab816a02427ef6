"""What goes wrong: a clear line, the right exit status, nothing lost, and others are served."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import (
    END_OF_FILE,
    GIVEN_UP,
    HELLO,
    HOST,
    MIB,
    WITHOUT_PRIVILEGE,
    Link,
    Process,
    RawClient,
    Server,
    contents,
    control_codes,
    frame,
    free_port,
    make_file,
    make_partial,
    message,
    partial_size,
    partials,
    run_script,
    send,
    small_disk,
    start_client,
    visible,
    wait_for,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
with_permissions = pytest.mark.skipif(
    sys.platform == "win32" or (not WITHOUT_PRIVILEGE and os.geteuid() == 0),
    reason="nothing is forbidden here",
)
as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root, to make a small disk"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give a disk of 16 MiB."""
    with small_disk(tmp_path / "disk", 16) as path:
        yield path


# --- sources that cannot be sent ----------------------------------------------------------------


def test_a_missing_file_fails_and_the_others_arrive(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 1000)
    missing = tmp_path / "missing"
    result = server.send(missing, source, "", "a\nb")
    assert result.status == 1
    assert result.error_lines[0] == f"{missing}: no such file"
    assert len(result.error_lines) == 3
    assert contents(server.folder) == {"file": source.read_bytes()}


@with_permissions
def test_an_unreadable_file_fails_and_the_others_arrive(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    source = make_file(tree / "file", 1000)
    for number, size in enumerate((0, 1000, 3 * MIB)):
        make_file(tree / f"secret {number}", size).chmod(0)
    (tree / "closed").mkdir(mode=0)
    result = server.send(tree, wrapper=WITHOUT_PRIVILEGE)
    (tree / "closed").chmod(0o700)
    assert result.status == 1
    expected = {f"{tree / name}: permission denied" for name in os.listdir(tree) if name != "file"}
    assert set(result.error_lines) == expected
    assert "without 4 that failed" in result.stdout
    assert (server.folder / "tree" / "file").read_bytes() == source.read_bytes()
    assert set(contents(server.folder)) <= {"tree/", "tree/closed/", "tree/file"}


def hold_and(server: Server, link: Link, client: Process, change: object) -> None:
    """Wait until a transfer is half way, have something happen, and let it go on."""
    wait_for(lambda: partial_size(server.folder) > 8 * MIB)
    assert callable(change)
    change()
    link.release()


@pytest.mark.parametrize("how", ["grows", "shrinks", "is truncated", "changes", "is touched"])
def test_a_file_that_changes_while_it_is_sent_is_refused(
    server: Server, tmp_path: Path, how: str
) -> None:
    source = make_file(tmp_path / "log", 40 * MIB)
    after = make_file(tmp_path / "after", 1000)

    def change() -> None:
        if how == "is touched":
            os.utime(source)
            return
        with open(source, "r+b") as file:
            if how == "grows":
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            elif how == "changes":
                file.seek(-100, os.SEEK_END)
                file.write(b"other")
            else:
                file.truncate(0 if how == "is truncated" else 39 * MIB)

    with (
        Link(server.port, hold_at=16 * MIB) as link,
        server.client(source, after, port=link.port) as client,
    ):
        hold_and(server, link, client, change)
        result = client.wait()
    assert result.status == 1
    assert result.error_lines == [f"{source}: it changed while it was sent"]
    assert contents(server.folder) == {"after": after.read_bytes()}
    assert "log" in server.stderr()


def test_a_file_that_is_replaced_while_it_is_sent_arrives_as_it_was(
    server: Server, tmp_path: Path
) -> None:
    """As editors save: the open file stays what it was."""
    source = make_file(tmp_path / "doc", 40 * MIB)
    before = source.read_bytes()
    other = make_file(tmp_path / "new", 1000, seed=2)
    with (
        Link(server.port, hold_at=16 * MIB) as link,
        server.client(source, port=link.port) as client,
    ):
        hold_and(server, link, client, lambda: other.replace(source))
        result = client.wait()
    assert result.status == 0, result
    assert contents(server.folder) == {"doc": before}


# --- a server that cannot take it ---------------------------------------------------------------


@with_permissions
def test_a_folder_without_permission_fails_and_the_others_arrive(
    inbox: Path, tmp_path: Path
) -> None:
    closed = make_file(tmp_path / "closed" / "x", 1000).parent
    source = make_file(tmp_path / "file", 1000)
    inbox.mkdir()
    (inbox / "closed").mkdir(mode=0o500)
    with Server(inbox, wrapper=WITHOUT_PRIVILEGE) as server:
        result = server.send(closed, source)
    assert result.status == 1
    assert result.error_lines[0] == f"{closed / 'x'}: permission denied"
    assert contents(inbox) == {"closed/": b"", "file": source.read_bytes()}


@with_permissions
def test_a_server_that_may_not_write_does_not_start(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for folder in (closed, closed / "new"):
        result = run_script(
            "server.py", "file", "--port=0", f"--folder={folder}", wrapper=WITHOUT_PRIVILEGE
        )
        assert result.status == 1
        assert len(result.error_lines) == 1
        assert str(folder) in result.stderr
        assert "permission" in result.stderr


def test_a_server_whose_folder_is_a_file_does_not_start(tmp_path: Path) -> None:
    taken = make_file(tmp_path / "taken", 10)
    for folder in (taken, taken / "deeper"):
        result = run_script("server.py", "file", "--port=0", f"--folder={folder}")
        assert result.status == 1
        assert len(result.error_lines) == 1
        assert str(folder) in result.stderr


def test_the_folder_is_made_again_if_it_goes_away(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 1000)
    server.folder.rmdir()
    result = server.send(source)
    assert (result.status == 0) == (server.folder / "file").exists()
    assert len(result.error_lines) <= 1
    server.folder.mkdir(exist_ok=True)
    server.check_serves(tmp_path)


@as_root
def test_a_file_too_large_for_the_disk_is_refused_before_it_is_sent(
    disk: Path, tmp_path: Path
) -> None:
    large = make_file(tmp_path / "large", 17 * MIB)
    small = make_file(tmp_path / "small", MIB)
    with Server(disk) as server, Link(server.port) as link:
        result = server.send(large, small, port=link.port)
        assert link.passed < 2 * MIB
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"{large}: the disk is too full (17.8 MB needed, ")
    assert contents(disk) == {"small": small.read_bytes()}


@as_root
def test_files_that_are_too_large_together_are_refused_one_by_one(
    disk: Path, tmp_path: Path
) -> None:
    sources = [make_file(tmp_path / f"file {number}", 6 * MIB, number) for number in range(4)]
    with Server(disk) as server:
        result = server.send(*sources)
    assert result.status == 1
    assert len(result.error_lines) == 2
    assert visible(disk) == ["file 0", "file 1"]
    assert partials(disk) == []


@as_root
def test_a_disk_that_fills_up_in_the_middle_is_survived(disk: Path, tmp_path: Path) -> None:
    large = make_file(tmp_path / "large", 14 * MIB)
    small = make_file(tmp_path / "small", 1000)
    with (
        Server(disk) as server,
        Link(server.port, hold_at=10 * MIB) as link,
        server.client(large, small, port=link.port) as client,
    ):
        hold_and(server, link, client, lambda: make_file(disk / "other", 4 * MIB))
        result = client.wait()
        assert result.status == 1
        assert result.error_lines == [f"{large}: no space left on device"]
        assert visible(disk) == ["other", "small"]
        assert partials(disk) == []
        assert "large: no space left on device" in server.stderr()
        (disk / "other").unlink()
        assert server.send(large).status == 0
    assert (disk / "large").read_bytes() == large.read_bytes()


@as_root
def test_a_pipe_larger_than_the_disk_stops_soon(disk: Path, tmp_path: Path) -> None:
    small = make_file(tmp_path / "small", 1000)
    with Server(disk) as server, open("/dev/zero", "rb") as endless:
        result = server.send("-", "--name", "endless", small, stdin=endless.fileno())
        assert result.status == 1
        assert result.error_lines == ["endless: no space left on device"]
        assert contents(disk) == {"small": small.read_bytes()}


def test_a_folder_where_a_file_should_go_stays(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "name", 1000)
    other = make_file(tmp_path / "other", 1000)
    make_file(server.folder / "name" / "inside", 10)
    result = server.send(source, other)
    assert result.status == 1
    assert result.error_lines == [f"{source}: a folder of that name is there already"]
    assert set(contents(server.folder)) == {"name/", "name/inside", "other"}


def test_a_folder_is_not_overwritten(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "name", 1000)
    make_file(inbox / "name" / "inside", 10)
    with Server(inbox, "--overwrite") as server:
        assert server.send(source).status == 1
        result = server.send("-", "--name", "name", stdin=b"x")
        assert result.status == 1
        assert "a folder of that name" in result.stderr
    assert set(contents(inbox)) == {"name/", "name/inside"}


def test_a_file_where_a_folder_should_go_stays(server: Server, tmp_path: Path) -> None:
    tree = make_file(tmp_path / "name" / "deep" / "x", 1000).parent.parent
    (tree / "empty").mkdir()
    other = make_file(tmp_path / "other", 1000)
    make_file(server.folder / "name", 10)
    result = server.send(tree, other)
    assert result.status == 1
    assert f"{tree / 'deep' / 'x'}: a file stands where a folder should go" in result.error_lines
    assert set(contents(server.folder)) == {"name", "other"}
    assert (server.folder / "name").stat().st_size == 10


def test_links_in_the_folder_lead_no_file_out(server: Server, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (server.folder / "tree").symlink_to(outside)
    (server.folder / "up").symlink_to("..")
    tree = make_file(tmp_path / "tree" / "x", 1000).parent
    up = make_file(tmp_path / "up" / "outside" / "x", 1000).parent.parent
    result = server.send(tree, up)
    assert result.status == 1
    assert f"{tree / 'x'}: a symbolic link there leads out of the folder" in result.error_lines
    assert os.listdir(outside) == []


# --- no server, or another ----------------------------------------------------------------------


def test_no_server_is_one_line(tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    port = free_port()
    result = send(port, source)
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"no server at 127.0.0.1:{port} (connection refused)")
    assert "python server.py file" in line


@pytest.mark.parametrize(
    "host", ["no.such.host.invalid", "a\x1b[2J", "", "..", "x" * 300, "ü" * 70]
)
def test_a_host_that_does_not_exist_is_one_line(tmp_path: Path, host: str) -> None:
    source = make_file(tmp_path / "file", 10)
    result = send(1, source, f"--host={host}")
    assert result.status == 1
    assert len(result.error_lines) == 1
    assert control_codes(result.stderr) == set()


def test_a_port_in_use_is_one_line(server: Server, tmp_path: Path) -> None:
    result = run_script("server.py", "file", f"--port={server.port}", f"--folder={tmp_path / 'x'}")
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"cannot listen on 127.0.0.1:{server.port}: address already in use")
    assert "--port" in line


def test_a_server_may_start_again_at_once_on_its_port(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    with Server(inbox) as first:
        assert first.send(source).status == 0
        first.signal(signal.SIGINT)
        assert first.wait().status == 130
    with Server(inbox, port=first.port) as second:
        second.check_serves(tmp_path)


def test_audio_on_a_file_server_is_told_so(server: Server) -> None:
    with RawClient(server.port) as client:
        client.send(message("hello", protocol=1, mode="audio"))
        answer = client.receive()
        assert answer["type"] == "error"
        assert "this server is in file mode" in answer["error"]
        assert client.read_all() == b""


@pytest.mark.parametrize("protocol", [0, 2, 10**30])
def test_another_protocol_is_told_so(server: Server, protocol: int) -> None:
    with RawClient(server.port) as client:
        client.send(message("hello", protocol=protocol, mode="file"))
        assert "protocol 1" in client.receive()["error"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "before it answered"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not a Socket Pair server"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "is not a Socket Pair server"),
        (b"\0\0\0\x02{}", "is not a Socket Pair server"),
        (b"\0\0", "connection lost"),
        (message("error", error="no \x1b[2J thanks"), r"no \x1b[2J thanks"),
        (message("welcome") + message("start", entries=[]), "start for another offer"),
        (message("welcome") + message("start", entries=[1]), "received a start"),
        (message("welcome") + message("start", entries=[{"offset": 5}]), "not asked about"),
        (message("welcome") + message("start", entries=[{"offset": -1}]), "bad 'offset'"),
        (message("welcome") + message("held", entries=[[7, [1]]]), "held that is not one"),
        (message("welcome") + message("results", entries=[]), "unexpected message"),
        (
            message("welcome") + message("start", entries=[{"failed": "\x1b[2J"}]),
            r"\x1b[2J",
        ),
        (
            message("welcome")
            + message("start", entries=[{"offset": 0}])
            + message("results", entries=[[3, {"saved": "x"}]]),
            "a result of a file that was not sent",
        ),
    ],
    ids=str,
)
def test_a_server_that_talks_nonsense_is_one_line(tmp_path: Path, answer: bytes, told: str) -> None:
    source = make_file(tmp_path / "file", 10)
    with (
        socket.create_server((HOST, 0)) as listener,
        Process(
            "client.py", "file", str(source), "--port", str(listener.getsockname()[1])
        ) as client,
    ):
        listener.settimeout(60)
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(60)
            assert peer.recv(65536), "the client speaks first"
            if answer:
                peer.sendall(answer)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass
        listener.close()
        result = client.wait()
    assert result.status == 1
    assert "Traceback" not in result.stderr
    assert told in result.stderr
    assert control_codes(result.stderr) == set()


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_client_that_is_stopped_half_way_goes_on_next_time(
    server: Server, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    with (
        Link(server.port, hold_at=30 * MIB) as link,
        server.client(source, port=link.port) as client,
    ):
        wait_for(lambda: partial_size(server.folder) > 28 * MIB)
        client.signal(number)
        result = client.wait()
    assert result.status == status
    assert "Traceback" not in result.stderr
    if number == signal.SIGINT:
        assert "the same command goes on from here" in result.stderr
    server.wait_for_output("are kept for the next run")
    assert visible(server.folder) == []
    with Link(server.port) as second:
        assert server.send(source, port=second.port).status == 0
        assert second.passed < 14 * MIB
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_client_can_be_stopped_while_it_waits_to_come_back(
    inbox: Path, tmp_path: Path, number: signal.Signals
) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    with (
        Server(inbox) as server,
        Link(server.port, hold_at=16 * MIB) as link,
        server.client(source, port=link.port) as client,
    ):
        link.wait_until_held()
        server.kill()
        client.wait_for_output("trying again in 4 s")
        client.signal(number)
        result = client.wait(8)
    assert result.status == 128 + number
    assert "Traceback" not in result.stderr


def test_a_client_can_be_stopped_while_it_reads_a_silent_pipe(server: Server) -> None:
    with server.client("-", "--name", "x", stdin=subprocess.PIPE) as client:
        wait_for(lambda: partials(server.folder))
        client.signal(signal.SIGINT)
        result = client.wait()
    assert result.status == 130
    assert "Traceback" not in result.stderr
    wait_for(lambda: not partials(server.folder), what="a pipe cannot be gone on with")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_idle_server_stops_at_once(inbox: Path, number: signal.Signals, status: int) -> None:
    with Server(inbox) as server:
        server.signal(number)
        result = server.wait()
    assert result.status == status
    assert result.stderr == ("\nstopped\n" if number == signal.SIGINT else "")


def test_ctrl_c_on_the_server_lets_transfers_finish_and_takes_no_more(
    inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    with (
        Server(inbox) as server,
        Link(server.port, hold_at=16 * MIB) as link,
        server.client(source, port=link.port) as client,
    ):
        wait_for(lambda: partial_size(inbox) > 8 * MIB)
        server.signal(signal.SIGINT)
        server.wait_for_output(r"finishing 1 under way - Ctrl\+C again to stop at once")
        assert "no server at" in server.send(source).stderr
        assert server.running()
        link.release()
        assert client.wait().status == 0
        assert server.wait().status == 130
    assert contents(inbox) == {"file.bin": source.read_bytes()}


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_the_server_at_once(
    inbox: Path, tmp_path: Path, second: signal.Signals
) -> None:
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    with (
        Server(inbox) as server,
        Link(server.port, hold_at=16 * MIB) as link,
        server.client(source, port=link.port) as client,
    ):
        wait_for(lambda: partial_size(inbox) > 8 * MIB)
        server.signal(signal.SIGINT)
        server.wait_for_output("finishing 1 under way")
        server.signal(second)
        assert server.wait().status == 128 + second
        assert partial_size(inbox) > 8 * MIB
        assert visible(inbox) == []
        client.wait_for_output("trying again")
        link.release()
        with Server(inbox, port=server.port):
            assert client.wait().status == 0
    assert contents(inbox) == {"file.bin": source.read_bytes()}


def test_ctrl_c_while_clients_connect_is_no_traceback(inbox: Path) -> None:
    for round_number in range(6):
        with Server(inbox) as server:
            gone = threading.Event()

            def connect(port: int = server.port, gone: threading.Event = gone) -> None:
                while not gone.is_set():
                    try:
                        socket.create_connection((HOST, port), timeout=60).close()
                    except OSError:
                        gone.set()

            knocking = [threading.Thread(target=connect, daemon=True) for _ in range(3)]
            for thread in knocking:
                thread.start()
            wait_for(lambda server=server: server.stderr())  # type: ignore[misc]
            server.signal(signal.SIGINT)
            try:
                result = server.wait()
            finally:
                gone.set()
            for thread in knocking:
                thread.join(60)
            assert "Traceback" not in result.stderr, f"round {round_number}"
            assert result.status == 130


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_a_signal_at_any_moment_of_the_start_is_no_traceback(
    script: str, server: Server, tmp_path: Path
) -> None:
    """From 20 ms on; before that there is only Python itself."""
    source = make_file(tmp_path / "file.bin", 20 * MIB)
    args = {
        "server.py": ("file", "--port=0", f"--folder={tmp_path / 'other'}"),
        "client.py": ("file", f"--port={server.port}", str(source)),
    }
    delays = random.Random(3)
    for _ in range(10):
        with Process(script, *args[script]) as process:
            wait_for(lambda process=process: process.threads() >= 1)  # type: ignore[misc]
            signal.sigtimedwait([], delays.uniform(0.0, 0.3))
            if process.running():
                process.signal(signal.SIGTERM)
            result = process.wait()
            assert result.status in (0, 143, -signal.SIGTERM)
            assert "Traceback" not in result.stderr


# --- clients that misbehave ---------------------------------------------------------------------


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
    "a hello of 5 kB": message("hello", protocol=1, mode="file", padding="x" * 5000),
    "an array": frame(b"[]"),
    "no JSON": frame(b"{"),
    "deep nesting": frame(b"[" * 4000),
    "no mode": message("hello", protocol=1),
    "a mode that is a list": message("hello", protocol=1, mode=["file"]),
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
    log = server.stderr()
    assert 1 <= len(log.splitlines()) <= 2
    assert control_codes(log) == set()
    assert visible(server.folder) == []
    server.check_serves(tmp_path)


WRONG_CONTENT = {
    "a wrong checksum": frame(b"1234") + END_OF_FILE + bytes(32),
    "an early end": frame(b"12") + END_OF_FILE + hashlib.sha256(b"12").digest(),
    "given up": frame(b"12") + GIVEN_UP,
    "another order": frame(b"4321") + END_OF_FILE + hashlib.sha256(b"1234").digest(),
}


@pytest.mark.parametrize("said", WRONG_CONTENT.values(), ids=WRONG_CONTENT.keys())
def test_content_that_is_not_what_was_offered_is_never_saved(server: Server, said: bytes) -> None:
    with RawClient(server.port).greet() as client:
        assert client.offer(ENTRY)["entries"] == [{"offset": 0}]
        client.send(said)
        assert "failed" in client.receive_result()
        assert contents(server.folder) == {}
        assert "saved" in client.send_file("next", b"good"), "the conversation goes on"
    assert contents(server.folder) == {"next": b"good"}


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
    "x" * 256,
    "/".join(["x"] * 20_000),
    ".x.0.socketpair-part",
    "\ud800",
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
        peers = [stack.enter_context(RawClient(server.port)) for _ in range(21)]
        peers[-1].send(HELLO[:6])
        wait_for(lambda: server.threads() > 21)
        server.check_serves(tmp_path)
        for peer in peers:
            assert peer.read_all() == b"", "within the socket's time limit of 60 s"
        result = client.wait()
    assert result.status == 1
    (line,) = result.error_lines
    assert line.endswith(": the other side made no progress for 10 s before it answered")
    server.wait_until_idle(before)
    assert server.stderr().count("the other side made no progress for 10 s") == 21


def test_more_clients_than_allowed_are_told_so(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    with Server(inbox, "--max-clients", "2") as server:
        with RawClient(server.port).greet(), RawClient(server.port).greet():
            result = server.send(source)
            assert result.status == 1
            assert len(result.error_lines) == 1
            assert "this server is busy with 2 clients" in result.stderr
        wait_for(lambda: server.threads() == 1)
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
            wait_for(lambda: os.strerror(errno.EMFILE).lower() in server.stderr().lower())
        finally:
            for client in held:
                client.socket.close()
        wait_for(lambda: server.threads() == 1)
        server.check_serves(tmp_path)


@linux
def test_a_thousand_connections_leave_nothing_behind(server: Server, tmp_path: Path) -> None:
    server.check_serves(tmp_path)
    wait_for(lambda: server.threads() == 1)
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
