"""What the tests stand on: real processes, real sockets, and no wait without a limit.

====================  =============================================================
waiting               ``wait_for`` polls a condition; nothing here sleeps for luck
processes             ``Process`` is a script running, ``Server`` one that listens,
                      ``Server.send`` runs a client to its end
``RawClient``         the protocol by hand, for what a real client never does
``Link``              a TCP link that counts, holds, slows and cuts
files                 ``make_file``, ``partials``, ``contents`` ...
====================  =============================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
# For whatever ends by itself, on a loaded machine of two cores.
LIMIT_S = 120.0
PARTIAL_SUFFIX = ".socketpair-part"
MIB = 1024 * 1024

T = TypeVar("T")

posix = pytest.mark.skipif(os.name != "posix", reason="has no such links and times")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# Root may read and write everything, so for the tests of permissions it does without that right.
WITHOUT_PRIVILEGE: tuple[str, ...] = ()
if hasattr(os, "geteuid") and os.geteuid() == 0 and sys.platform == "linux":
    _RIGHTS = "-dac_override,-dac_read_search"
    WITHOUT_PRIVILEGE = ("setpriv", f"--bounding-set={_RIGHTS}", f"--inh-caps={_RIGHTS}", "--")

with_permissions = pytest.mark.skipif(
    sys.platform == "win32" or (not WITHOUT_PRIVILEGE and os.geteuid() == 0),
    reason="nothing is forbidden here",
)
as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root, to make a small disk"
)


# --- waiting --------------------------------------------------------------------------------


def wait_for(condition: Callable[[], T], timeout: float = 60.0, what: str = "") -> T:
    """Return what `condition` returns as soon as it is true; fail after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:g} s: {what or condition}")
        time.sleep(0.01)
    return value


# --- processes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How a process has ended, and what it has printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        """The lines of standard error."""
        return self.stderr.splitlines()


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment that scripts run in, the same on every machine."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SOCKET_PAIR")}
    return {**env, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", **(changes or {})}


class Process:
    """A script running. Use it in a ``with`` block, which always ends it.

    Its output gathers in files, so that it can be looked at meanwhile and never fills a pipe.
    """

    def __init__(
        self,
        script: str,
        *args: str | bytes | os.PathLike[str],
        stdin: bytes | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        with contextlib.ExitStack() as stack:
            self._stdout = stack.enter_context(tempfile.TemporaryFile())
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            source: Any = subprocess.DEVNULL if stdin is None else stdin
            if isinstance(stdin, bytes):
                source = stack.enter_context(tempfile.TemporaryFile())
                source.write(stdin)
                source.seek(0)
            self.popen = subprocess.Popen(
                [*wrapper, sys.executable, str(ROOT / script), *args],
                stdin=source,
                stdout=self._stdout,
                stderr=self._stderr,
                env=environment(env),
                cwd=cwd,
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what is left of it. May be called twice."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(LIMIT_S)
        if self.popen.stdin:
            self.popen.stdin.close()
        self._stack.close()

    @staticmethod
    def _read(file: Any) -> str:
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode("utf-8", "surrogateescape")

    def stdout(self) -> str:
        """Return what it has printed on standard output so far."""
        return self._read(self._stdout)

    def stderr(self) -> str:
        """Return what it has printed on standard error so far."""
        return self._read(self._stderr)

    def wait(self, timeout: float = LIMIT_S) -> Result:
        """Wait until it ends by itself."""
        try:
            status = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; {self.stdout()!r} {self.stderr()!r}") from None
        return Result(status, self.stdout(), self.stderr())

    def wait_for_output(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Wait until `pattern` is found in what it prints."""

        def found() -> re.Match[str] | None:
            output = self.stdout() + self.stderr()
            match = re.search(pattern, output)
            if match is None and self.popen.poll() is not None:
                output = self.stdout() + self.stderr()
                match = re.search(pattern, output)
                assert match, f"ended ({self.popen.returncode}) without {pattern!r}: {output}"
            return match

        match = wait_for(found, timeout, pattern)
        assert match is not None
        return match

    def running(self) -> bool:
        """Tell whether it has not ended yet."""
        return self.popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """Kill it as kill -9 does, and wait until it is gone."""
        self.popen.kill()
        self.popen.wait(LIMIT_S)

    # what Linux knows about it

    def status_field(self, name: str) -> int:
        """Return a number of /proc/PID/status, 0 where the process has ended."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{self.popen.pid}/status").read_text()
            if match := re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE):
                return int(match[1])
        return 0

    def threads(self) -> int:
        """Return how many threads it has."""
        return self.status_field("Threads")

    def descriptors(self) -> int:
        """Return how many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))

    def peak_mib(self) -> float:
        """Return the most memory that it has had, in MiB."""
        return self.status_field("VmHWM") / 1024


class Server(Process):
    """A server that takes files into `folder`, listening when the constructor returns.

    Leaving the ``with`` block checks that it never printed a traceback.
    """

    def __init__(
        self,
        folder: Path,
        *args: str,
        port: int = 0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        arguments = ("file", "--port", str(port), "--folder", str(folder), *args)
        super().__init__("server.py", *arguments, env=env, cwd=cwd, wrapper=wrapper)
        self.folder = folder
        try:
            found = self.wait_for_output(r"Receiving into .* on (\S+):(\d+) - Ctrl\+C to stop\n")
        except BaseException:
            self.close()
            raise
        self.port = int(found[2])

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.check_log()
        finally:
            self.close()

    def check_log(self) -> None:
        """Fail where the server met an error that it does not know."""
        log = self.stdout() + self.stderr()
        assert "Traceback" not in log, log
        assert "internal error" not in log, log

    def client(
        self, *args: str | bytes | os.PathLike[str], port: int | None = None, **options: Any
    ) -> Process:
        """Start a client of this server, at another `port` if it goes through a link."""
        return start_client(self.port if port is None else port, *args, **options)

    def send(
        self, *args: str | bytes | os.PathLike[str], port: int | None = None, **options: Any
    ) -> Result:
        """Run a client of this server to its end."""
        return send(self.port if port is None else port, *args, **options)

    def held(self) -> tuple[int, int]:
        """Return the counts of the threads and the descriptors that it has."""
        return self.threads(), self.descriptors()

    def wait_until_idle(self, held: tuple[int, int]) -> None:
        """Wait until it has let go of all that it did not hold at first."""
        wait_for(lambda: self.held() == held, what=f"{held} threads and descriptors")

    def check_serves(self, tmp_path: Path) -> None:
        """Fail unless a real client is served."""
        source = tmp_path / f"still served {random.getrandbits(64):x}"
        source.write_bytes(os.urandom(1000))
        result = self.send(source)
        assert result.status == 0, result
        assert (self.folder / source.name).read_bytes() == source.read_bytes()


def start_client(port: int, *args: str | bytes | os.PathLike[str], **options: Any) -> Process:
    """Start a client of whatever listens on `port`."""
    return Process("client.py", "file", "--port", str(port), *args, **options)


def send(
    port: int,
    *args: str | bytes | os.PathLike[str],
    timeout: float = LIMIT_S,
    **options: Any,
) -> Result:
    """Run a client to its end; it must never show a traceback."""
    with start_client(port, *args, **options) as client:
        result = client.wait(timeout)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def run_script(script: str, *args: str, **options: Any) -> Result:
    """Run a script to its end; it must never show a traceback."""
    with Process(script, *args, **options) as process:
        result = process.wait()
    assert "Traceback" not in result.stderr, result.stderr
    return result


# --- the protocol by hand -------------------------------------------------------------------


def frame(content: bytes) -> bytes:
    """Return a frame."""
    return struct.pack("!I", len(content)) + content


def message(kind: str, **fields: Any) -> bytes:
    """Return a message."""
    return frame(json.dumps({"type": kind, **fields}).encode())


HELLO = message("hello", protocol=1, mode="file")
END_OF_FILE = struct.pack("!I", 0)
GIVEN_UP = struct.pack("!I", 0xFFFFFFFF)


class RawClient:
    """A client that says what it is told to. Use it in a ``with`` block."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port), timeout=60)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes, all of them or as many as the server takes before it hangs up."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def hang_up(self) -> None:
        """Send no more."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection at once, so that the server sees it broken."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read_all(self) -> bytes:
        """Return all that the server sends until it hangs up."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := self.socket.recv(65536):
                data += chunk
        return data

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.socket.recv(size - len(data))
            assert chunk, f"the server hung up after {data!r}"
            data += chunk
        return data

    def receive(self) -> dict[str, Any]:
        """Return the server's next message."""
        (size,) = struct.unpack("!I", self._read(4))
        value = json.loads(self._read(size))
        assert isinstance(value, dict)
        return value

    def greet(self) -> RawClient:
        """Shake hands as a real client does."""
        self.send(HELLO)
        assert self.receive()["type"] == "welcome"
        return self

    def offer(self, *entries: Any) -> dict[str, Any]:
        """Offer files; return what the server says to that."""
        self.send(message("offer", entries=list(entries)))
        return self.receive()

    def send_file(self, path: str, content: bytes) -> dict[str, Any]:
        """Send a file that the server has not got; return what becomes of it."""
        start = self.offer({"path": path, "size": len(content)})
        if start["type"] != "start" or "offset" not in start["entries"][0]:
            return dict(start["entries"][0])
        segments = [content[at : at + MIB] for at in range(0, len(content), MIB)]
        self.send(b"".join(map(frame, segments)) + END_OF_FILE + hashlib.sha256(content).digest())
        return self.receive_result()

    def receive_result(self) -> dict[str, Any]:
        """Return what has become of the one file under way."""
        answer = self.receive()
        assert answer["type"] == "results", answer
        ((_, outcome),) = answer["entries"]
        return dict(outcome)


# --- a link that misbehaves -----------------------------------------------------------------


class Link:
    """A TCP link to a server on this machine, in whose middle one can do harm.

    With `hold_at`, it passes on that many bytes of each connection on their way to the server,
    and then waits for `release`. `cut` breaks all connections. Use it in a ``with`` block.
    """

    def __init__(
        self, port: int, hold_at: int | None = None, on_bytes: Callable[[int], object] | None = None
    ) -> None:
        self._target = port
        self._hold_at = hold_at
        self._on_bytes = on_bytes
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self.connections = 0
        self.passed = 0  # bytes towards the server, of all connections
        self.recorded = bytearray()  # those bytes, the first 16 MiB of them
        self._listener = socket.socket()
        # Small, so that a client soon feels that the link is held.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        self._listener.bind((HOST, 0))
        self._listener.listen(64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def hold(self, at: int) -> None:
        """Pass on only `at` bytes of each connection that is made from now on."""
        with self._changed:
            self._hold_at = at

    def release(self) -> None:
        """Hold nothing any more."""
        with self._changed:
            self._hold_at = None
            self._changed.notify_all()

    def cut(self) -> None:
        """Break all connections, as a cable that is pulled out does to one that notices."""
        with self._changed:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def wait_until_held(self) -> None:
        """Wait until as many bytes have passed as may."""
        wait_for(
            lambda: self._hold_at is not None and self.passed >= self._hold_at,
            what=f"{self._hold_at} bytes have passed, {self.passed} have",
        )

    def wait_until_passed(self, count: int, client: Process) -> None:
        """Wait until `count` bytes have passed, or `client` has ended."""
        try:
            wait_for(lambda: self.passed >= count or not client.running(), LIMIT_S)
        except AssertionError:
            said = client.stdout() + client.stderr()
            raise AssertionError(f"{self.passed} of {count} bytes have passed: {said}") from None

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((HOST, self._target), timeout=60)
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.settimeout(None)
            with self._changed:
                self.connections += 1
                self._sockets |= {near, far}
            threading.Thread(target=self._pass_up, args=(near, far), daemon=True).start()
            threading.Thread(target=self._pass_down, args=(far, near), daemon=True).start()

    def _pass_up(self, near: socket.socket, far: socket.socket) -> None:
        count = 0
        with contextlib.suppress(OSError):
            while True:
                with self._changed:
                    while self._hold_at is not None and count >= self._hold_at:
                        if self._closed:
                            return
                        self._changed.wait(1)
                    room = 65536 if self._hold_at is None else min(65536, self._hold_at - count)
                data = near.recv(room)
                if not data:
                    break
                if self._on_bytes:
                    self._on_bytes(len(data))
                far.sendall(data)
                count += len(data)
                with self._changed:
                    self.passed += len(data)
                    if len(self.recorded) < 16 * MIB:
                        self.recorded += data
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_WR)

    @staticmethod
    def _pass_down(far: socket.socket, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(65536):
                near.sendall(data)
        # The server is gone: so is the link, with what is held in it.
        for sock in (near, far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def hold_and(server: Server, link: Link, client: Process, change: object) -> None:
    """Wait until a transfer is half way, have something happen, and let it go on."""
    wait_for(lambda: partial_size(server.folder) > 8 * MIB)
    assert callable(change)
    change()
    link.release()


# --- files ----------------------------------------------------------------------------------


def make_file(path: Path, size: int, seed: int = 1) -> Path:
    """Make a file of `size` bytes that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def make_sparse(path: Path, size: int) -> Path:
    """Make a file of `size` bytes that takes no room, with something at its beginning and end."""
    with open(path, "wb") as file:
        file.truncate(size)
        file.write(b"begins")
        file.seek(size - 4)
        file.write(b"ends")
    return path


def sha256(path: Path) -> str:
    """Return a file's SHA-256, by other code than that under test."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def partials(folder: Path) -> list[Path]:
    """Return the partial files in `folder` and below."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for place, _, names in os.walk(folder):
            found += [Path(place) / name for name in names if name.endswith(PARTIAL_SUFFIX)]
    return found


def partial_size(folder: Path) -> int:
    """Return how many bytes partial files in `folder` hold."""
    total = 0
    for path in partials(folder):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def visible(folder: Path) -> list[str]:
    """Return the names in `folder` that are not hidden."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def make_partial(folder: Path, name: str, content: bytes) -> Path:
    """Make a partial file as a server leaves it behind."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.0123456789{PARTIAL_SUFFIX}"
    path.write_bytes(content)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, the hidden ones too, and every folder (with b"")."""
    found: dict[str, bytes] = {}
    for place, folders, names in os.walk(folder):
        base = Path(place)
        for name in folders:
            found[f"{(base / name).relative_to(folder)}/"] = b""
        for name in names:
            path = base / name
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def control_codes(text: str) -> set[str]:
    """Return the control codes in `text`, but for line ends."""
    return {char for char in text if not char.isprintable() and char != "\n"}


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def small_disk(path: Path, size_mib: int) -> Iterator[Path]:
    """Give a file system of so many MiB at `path`; only root can."""
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(path)],
        check=True,
        timeout=60,
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=60)
