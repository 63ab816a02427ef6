"""Ctrl+C and SIGTERM at any moment: the right status, nothing lost, no traceback."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support import (
    HOST,
    LIMIT_S,
    MIB,
    ROOT,
    Process,
    Proxy,
    Server,
    as_root,
    contents,
    half_way,
    linux,
    make_file,
    partial_size,
    partials,
    visible,
    wait_for,
)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_client_that_is_stopped_half_way_resumes_next_time(
    server: Server, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    with half_way(server, source, hold_at=30 * MIB, written=28 * MIB) as (client, _):
        client.signal(number)
        result = client.wait()
    assert result.status == status
    assert "Traceback" not in result.stderr
    if number == signal.SIGINT:
        assert "the same command resumes from here" in result.stderr
    server.wait_for_output("are kept for the next run")
    assert visible(server.folder) == []
    with Proxy(server.port) as second:
        assert server.send(source, port=second.port).status == 0
        assert second.passed < 14 * MIB
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_client_can_be_stopped_while_it_waits_to_come_back(
    inbox: Path, tmp_path: Path, number: signal.Signals
) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    with Server(inbox) as server, half_way(server, source) as (client, _):
        server.kill()
        client.wait_for_output("trying again in 4 s")
        client.signal(number)
        result = client.wait()
    assert result.status == 128 + number
    assert "Traceback" not in result.stderr


def test_a_client_can_be_stopped_while_it_reads_a_silent_pipe(server: Server) -> None:
    with server.client("-", "--name", "x", stdin=subprocess.PIPE) as client:
        assert client.popen.stdin is not None
        client.popen.stdin.write(b"the last for long")
        client.popen.stdin.flush()
        wait_for(lambda: partial_size(server.folder), "what the pipe had is there")
        client.signal(signal.SIGINT)
        result = client.wait()
    assert result.status == 130
    assert result.error_lines[-1] == "interrupted"
    wait_for(lambda: not partials(server.folder), what="a pipe cannot be resumed")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_idle_server_stops_at_once(inbox: Path, number: signal.Signals, status: int) -> None:
    with Server(inbox) as server:
        server.signal(number)
        result = server.wait()
    assert result.status == status
    assert result.stderr == ("\nstopped\n" if number == signal.SIGINT else "")


STOP_AS_IT_BEGINS = """
import os, signal, threading, time, common, server
begin = threading.Thread._bootstrap
def stop_and_begin(thread):
    if thread.name == "accept":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
    begin(thread)
threading.Thread._bootstrap = stop_and_begin
common.run(server.main)
"""


@linux
def test_a_server_that_stops_as_it_begins_to_accept_says_nothing(inbox: Path) -> None:
    command = [sys.executable, "-c", STOP_AS_IT_BEGINS, "file", "--port=0", f"--folder={inbox}"]
    for _ in range(5):
        result = subprocess.run(
            command, cwd=ROOT, stderr=subprocess.PIPE, timeout=LIMIT_S, check=False
        )
        assert result.returncode == 130
        assert b"Traceback" not in result.stderr


STOP_BEHIND_THE_MAIN_THREAD = """
import os, signal, threading, common
def wait(_argv):
    common.INTERRUPTS.take()
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    common.INTERRUPTS.wait(10 * 60)
common.run(wait)
"""


@linux
def test_a_signal_that_another_thread_has_taken_ends_a_wait_at_once() -> None:
    command = [sys.executable, "-c", STOP_BEHIND_THE_MAIN_THREAD]
    result = subprocess.run(command, cwd=ROOT, timeout=LIMIT_S, check=False)
    assert result.returncode == 130


def test_ctrl_c_on_the_server_lets_transfers_finish_and_takes_no_more(
    inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    with Server(inbox) as server, half_way(server, source) as (client, proxy):
        server.signal(signal.SIGINT)
        server.wait_for_output(r"finishing 1 under way - Ctrl\+C again to stop at once")
        # Soon, and not by another client: one that stands still for 10 s is waited for no longer.
        wait_for(lambda: is_refused(server.port), "nobody else gets in")
        assert server.running()
        proxy.release()
        assert client.wait().status == 0
        assert server.wait().status == 130
    assert contents(inbox) == {"file.bin": source.read_bytes()}


def is_refused(port: int) -> bool:
    """Return whether nobody listens."""
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == errno.ECONNREFUSED


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_the_server_at_once(
    inbox: Path, tmp_path: Path, second: signal.Signals
) -> None:
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    with Server(inbox) as server, half_way(server, source) as (client, proxy):
        server.signal(signal.SIGINT)
        server.wait_for_output("finishing 1 under way")
        server.signal(second)
        assert server.wait().status == 128 + second
        assert partial_size(inbox) > 8 * MIB
        assert visible(inbox) == []
        client.wait_for_output("trying again")
        proxy.release()
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


@linux
@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_a_signal_at_any_moment_of_the_start_is_no_traceback(
    script: str, server: Server, tmp_path: Path
) -> None:
    """How far a start is shows in the memory that it has taken."""
    source = make_file(tmp_path / "file.bin", 20 * MIB)
    args = {
        "server.py": ("file", "--port=0", f"--folder={tmp_path / 'other'}"),
        "client.py": ("file", f"--port={server.port}", str(source)),
    }
    chance, most = random.Random(3), server.status_field("VmRSS")
    for _ in range(10):
        with Process(script, *args[script]) as process:
            wait_until_grown(process, chance.uniform(0, most))
            process.signal(signal.SIGTERM)
            result = process.wait()
            assert result.status in (0, 143, -signal.SIGTERM)
            assert "Traceback" not in result.stderr


def wait_until_grown(process: Process, size: float) -> None:
    """Wait until a process has taken so many kB of memory, or has ended."""
    wait_for(lambda: process.status_field("VmRSS") >= size or not process.running())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_destructor_ends_a_program_without_a_word(
    number: signal.Signals, status: int
) -> None:
    program = f"""
import signal, common
class Left:
    def __del__(self):
        signal.raise_signal({int(number)})
def main(argv):
    common.INTERRUPTS.take()
    Left()
    return 0
common.run(main)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (status, "", "")


@as_root
@pytest.mark.parametrize(
    "command",
    [
        ("client.py", "file", __file__, "--host=server.example"),
        ("client.py", "file", __file__, "--host=192.168.1.555"),  # mistyped, so it may be a name
        ("server.py", "file", "--host=server.example", "--port=0"),
    ],
)
def test_ctrl_c_ends_either_at_once_while_nobody_answers_for_the_servers_name(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    # An address of its own for each process: another run of the tests may be here at once.
    resolver = f"127.7.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
    (tmp_path / "resolv.conf").write_text(f"nameserver {resolver}\noptions timeout:30 attempts:5\n")
    setup = f'mount --bind "{tmp_path}/resolv.conf" /etc/resolv.conf && exec "$@"'
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((resolver, 53))
        silent.settimeout(LIMIT_S)
        wrapper = ("unshare", "--mount", "sh", "-c", setup, "sh")
        with Process(*command, wrapper=wrapper) as process:
            silent.recv(1000)
            process.signal(signal.SIGINT)
            assert process.wait(60).status == 130
