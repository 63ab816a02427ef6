"""Where the machine is at an end, or nobody reads the log: an answer, and work goes on."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import common
import server
from pairing import send_here
from processes import environment
from support import (
    HOST,
    ROOT,
    Process,
    RawClient,
    Server,
    frame,
    free_port,
    make_file,
    message,
    partials,
    posix,
    wait_for,
)


def greet(connection: common.Connection, _hello: common.Hello) -> None:
    """Serve a client that wants nothing."""


@contextlib.contextmanager
def serving(
    handle: Callable[[common.Connection, common.Hello], None] = greet,
    besides: Sequence[socket.socket] = (),
) -> Iterator[int]:
    """Serve in this process, also at the sockets `besides`; give the port."""
    endpoint = server.Endpoint("file", [*server.open_sockets(HOST, 0), *besides], None, None)
    welcome = common.Welcome(common.PROTOCOL, "file")
    running = server.Server(endpoint, handle, max_clients=4, welcome=lambda *_: welcome)
    running.start(announce=False)
    try:
        yield endpoint.port
    finally:
        running.stop()
        running.clients.finish(60)


def test_a_client_is_told_that_the_server_is_busy_where_there_is_no_thread_for_it(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("client "):
            raise RuntimeError("can't start new thread")
        start(thread)

    with serving() as port:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert send_here(port, source) == 1
    assert "busy" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("can't start new thread"), OSError(errno.EMFILE, "Too many")],
)
def test_running_out_of_memory_or_threads_ends_one_client_and_is_no_internal_error(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(connection: common.Connection, _hello: common.Hello) -> None:
        raise error

    with caplog.at_level(logging.INFO, "socket-pair"), serving(handle) as port:
        with RawClient(port) as raw:
            assert "busy" in raw.greet().receive()["error"]
        wait_for(lambda: "dropped: out of memory, threads or open files" in caplog.text)
    assert "internal error" not in caplog.text


def test_a_server_that_cannot_wait_for_clients_just_now_takes_them_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = iter([OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()])
    select = selectors.DefaultSelector.select

    def fail_first(*args: Any) -> Any:
        if error := next(errors, None):
            raise error
        return select(*args)

    monkeypatch.setattr(selectors.DefaultSelector, "select", fail_first)
    with serving() as port, RawClient(port) as raw:
        raw.greet()
        assert next(errors, None) is None


@posix
def test_a_connection_without_an_address_is_left_and_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS gives those that were reset before they were accepted, and these always are."""
    monkeypatch.chdir(tmp_path)  # as such a name has to be short
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as nameless:
        listening.bind("socket")
        listening.listen()
        with serving(besides=[listening]) as port:
            nameless.settimeout(60)
            nameless.connect("socket")
            assert not nameless.recv(1)
            with RawClient(port) as raw:
                raw.greet()


@posix
@pytest.mark.parametrize(("current", "wanted"), [(256, server.MACOS_OPEN_FILES), (65_536, 65_536)])
def test_a_system_that_takes_no_number_without_end_is_asked_for_many_open_files(
    monkeypatch: pytest.MonkeyPatch, current: int, wanted: int
) -> None:
    """As macOS, where a process has 256 to begin with: as many silent clients would take all."""
    import resource  # noqa: PLC0415  (Windows has none)

    asked: list[int] = []

    def limit(_: int, limits: tuple[int, int]) -> None:
        if limits[0] == resource.RLIM_INFINITY:
            raise ValueError("current limit exceeds maximum limit")
        asked.append(limits[0])

    monkeypatch.setattr(resource, "getrlimit", lambda _: (current, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", limit)
    server.raise_open_file_limit()
    assert asked == [wanted]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors")
def test_folders_that_cannot_be_entered_are_closed_at_once(inbox: Path) -> None:
    make_file(inbox / "a" / "b" / "file", 1)
    store = server.Store(str(inbox))
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        for number in range(50):
            with contextlib.suppress(server.Refused):
                server.Folders(store).find(f"a/b/file/{number}")
            assert len(os.listdir("/proc/self/fd")) <= before + 1
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory, threads or open files: "),
        (RuntimeError("can't start new thread"), "out of memory, threads or open files: "),
        (ImportError("a.so: Too many open files"), "out of memory, threads or open files: "),
        (KeyError("\x1b[31m"), r"internal error: KeyError('\x1b[31m')"),
    ],
)
def test_what_nobody_has_dealt_with_is_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_argv: Sequence[str]) -> int:
        raise error

    assert common.exit_status_of(fail) == common.EXIT_FAILED
    printed = capsys.readouterr()
    assert printed.err.startswith(said)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_server_whose_output_nobody_reads_takes_files_all_the_same(
    inbox: Path, tmp_path: Path
) -> None:
    port = free_port()
    for number in range(3000):
        make_file(tmp_path / "many" / f"a file with quite a long name {number}", 10, number)
    reading, writing = os.pipe()
    command = [sys.executable, str(ROOT / "server.py"), "file", f"--port={port}", "-v"]
    with subprocess.Popen(
        [*command, f"--folder={inbox}"], stdout=writing, stderr=writing, env=environment()
    ) as running:
        os.close(writing)
        try:
            wait_for(lambda: os.read(reading, 1))
            assert send_here(port, tmp_path / "many") == 0
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 143
        finally:
            running.kill()
            os.close(reading)
    assert len(os.listdir(inbox / "many")) == 3000


def test_nobody_waits_for_a_look_up_that_waits_for_a_file_in_use(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("RELEASE_TIMEOUT_S", "TAKEOVER_TIMEOUT_S", "SILENT_S"):
        monkeypatch.setattr(server, limit, 1e6)
    store = server.Store(str(inbox))
    inbox.mkdir()
    film = {"path": "film", "size": 1 << 30}
    with (
        serving(lambda connection, _: server.handle_file_client(connection, store)) as port,
        RawClient(port) as user,
        RawClient(port) as waiting,
        RawClient(port) as other,
    ):
        assert user.greet().offer(film)["type"] == "start"
        user.send(frame(b"the beginning"))
        wait_for(lambda: partials(inbox))
        waiting.greet().send(message("offer", entries=[film]))
        wait_for(lambda: store.leases._changed._waiters)  # type: ignore[attr-defined]
        assert other.greet().send_file("small", b"?") == {"saved": "small"}
        user.hang_up()
        assert waiting.receive()["type"] == "held"


class Slow(common.Console):
    """A console that has room for no line until it may."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.may = threading.Event()
        self.printed = 0

    def show_status(self, _text: str) -> None:
        """Make room for a line."""
        self.may.wait(60)
        self.printed += 1


def test_lines_that_nobody_reads_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "MAX_WAITING_LINES", 10)
    slow = Slow()
    with contextlib.closing(server.BackgroundLog(slow)) as log:
        for number in range(1000):
            log.handle(logging.makeLogRecord({"msg": f"line {number}", "levelno": logging.INFO}))
        slow.may.set()
        wait_for(lambda: slow.printed >= 10)
        log.handle(logging.makeLogRecord({"msg": "the last", "levelno": logging.INFO}))
    captured = capsys.readouterr()
    lines = [line.partition(" ")[2] for line in captured.out.splitlines()]  # without the time
    left_out = [int(line.split()[2]) for line in captured.err.splitlines()]
    assert lines[0] == "line 0"
    assert lines[-1] == "the last"
    assert sum(left_out) + len(lines) == 1001
    assert len(lines) < 20


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_a_storm_of_signals_is_no_traceback_and_no_death_by_signal(
    script: str, server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 30_000_000)
    args = {
        "server.py": ("file", "--port=0", f"--folder={tmp_path / 'other'}"),
        "client.py": ("file", f"--port={server.port}", str(source)),
    }
    dice = random.Random(script)
    for number in range(12):
        with Process(script, *args[script]) as process:
            # From when Python runs the script; before that there is only Python itself.
            wait_for(lambda process=process: is_running_script(process))  # type: ignore[misc]
            signal.sigtimedwait([], dice.uniform(0.0, 0.3))
            for _ in range(10):
                if process.running():
                    process.signal(dice.choice([signal.SIGINT, signal.SIGTERM]))
                signal.sigtimedwait([], dice.uniform(0.0, 0.01))
            result = process.wait()
        assert result.status in (0, 130, 143), f"round {number}: {result}"
        assert "Traceback" not in result.stderr, f"round {number}: {result}"
        (server.folder / source.name).unlink(missing_ok=True)


def is_running_script(process: Process) -> bool:
    """Return whether a process has taken care of SIGTERM, or has ended."""
    with contextlib.suppress(FileNotFoundError):
        status = Path(f"/proc/{process.popen.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1) or not process.running()
    return True
