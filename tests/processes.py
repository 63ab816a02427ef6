"""Programs running, with pipes or at a terminal of their own, and always ended.

``Program`` runs any command, ``Process`` one of the two scripts, ``Server`` one that listens and
takes files. ``start_client``, ``send`` and ``run_script`` start what most tests need.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeVar

from ports import free_port
from waiting import LIMIT_S, wait_for

if TYPE_CHECKING:
    from typing_extensions import Self

if sys.platform != "win32":
    import fcntl
    import pty
    import termios

ROOT = Path(__file__).resolve().parent.parent
TERMINAL_SIZE = (40, 100)  # lines and columns
TERMINAL_ENV = {"TERM": "xterm", "INPUTRC": os.devnull}
CTRL_C = "\x03"

T = TypeVar("T")
Argument = str | bytes | os.PathLike[str]


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

    def check_no_mistake(self) -> None:
        """Fail where the program met an error that it does not know."""
        assert "Traceback" not in self.stderr, self.stderr
        assert "internal error" not in self.stderr, self.stderr


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment that scripts run in, the same on every machine."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SOCKET_PAIR")}
    return {**env, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", **(changes or {})}


# --- any program ----------------------------------------------------------------------------


class Program:
    """A command running. Use it in a ``with`` block, which always ends it.

    Its output gathers in files, so that it can be looked at meanwhile and never fills a pipe.
    `stdout` and `stderr` lead it elsewhere. With `merged`, what it prints on standard error
    gathers in `stdout`, in the order in which it came; so does all of it with `terminal`, which
    gives it a terminal of its own. With `group`, all that it has started ends with it.
    """

    def __init__(
        self,
        command: Sequence[Argument],
        *,
        stdin: bytes | int | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | None = None,
        merged: bool = False,
        terminal: bool = False,
        group: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self._group = group
        self._expected = 0  # how far `expect` has read
        self._printed = ("", "")  # on both streams, once it is closed
        with contextlib.ExitStack() as stack:
            self._stdout = stack.enter_context(tempfile.TemporaryFile())
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self._terminal = stack.enter_context(Terminal(self._stdout)) if terminal else None
            streams: dict[str, Any] = {
                "stdin": self._open_input(stdin, stack),
                "stdout": self._stdout if stdout is None else stdout,
                "stderr": (self._stdout if merged else self._stderr) if stderr is None else stderr,
                "start_new_session": group,
            }
            if self._terminal:
                streams, env = self._terminal.streams(), {**TERMINAL_ENV, **(env or {})}
            self.popen: subprocess.Popen[bytes] = subprocess.Popen(
                command, env=environment(env), cwd=cwd, **streams
            )
            if self._terminal:
                self._terminal.follow()
            self._stack = stack.pop_all()

    @staticmethod
    def _open_input(stdin: bytes | int | None, stack: contextlib.ExitStack) -> Any:
        if not isinstance(stdin, bytes):
            return subprocess.DEVNULL if stdin is None else stdin
        source = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        source.write(stdin)
        source.seek(0)
        return source

    def __enter__(self) -> Self:
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
        if self._group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
        elif self.running():
            self.popen.kill()
        self.popen.wait(LIMIT_S)
        if self.popen.stdin:
            self.popen.stdin.close()
        if not self._stdout.closed:
            self._printed = (self.stdout(), self.stderr())
        self._stack.close()

    # what it prints

    def _read(self, file: Any) -> str:
        if file.closed:
            return self._printed[file is self._stderr]
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode("utf-8", "surrogateescape")

    def stdout(self) -> str:
        """Return what it has printed on standard output, or at its terminal, so far."""
        return self._read(self._stdout)

    def stderr(self) -> str:
        """Return what it has printed on standard error so far."""
        return self._read(self._stderr)

    def text(self) -> str:
        """Return all that it has printed so far."""
        return self.stdout() + self.stderr()

    @property
    def lines(self) -> list[str]:
        """All lines that it has printed so far."""
        return self.text().splitlines()

    def wait_for(self, text: str, times: int = 1, timeout: float = 60.0) -> None:
        """Wait until `text` stands so often in what it prints."""
        self._wait_for(lambda: self.text().count(text) >= times, text, timeout)

    def wait_for_output(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Wait until `pattern` is found in what it prints."""
        return self._wait_for(lambda: re.search(pattern, self.text()), pattern, timeout)

    def expect(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Wait until `pattern` is found behind what was expected before."""
        match = self._wait_for(lambda: re.search(pattern, self.rest()), pattern, timeout)
        self._expected += match.end()
        return match

    def rest(self) -> str:
        """Return what it has printed behind what was expected last."""
        return self.text()[self._expected :]

    def _wait_for(self, look: Callable[[], T | None], what: str, timeout: float) -> T:
        """Return what `look` finds; fail, with all that was printed, where it never does."""

        def found() -> T | None:
            ended = self._has_ended()
            value = look()
            assert value or not ended, f"ended ({self.popen.returncode}) without {what!r}"
            return value

        try:
            value = wait_for(found, f"printed {what!r}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; printed was:\n{self.text()}") from None
        assert value is not None
        return value

    # how it runs and ends

    def _has_ended(self) -> bool:
        """Tell whether it has ended and will print no more."""
        return not self.running() and not (self._terminal and self._terminal.following())

    def running(self) -> bool:
        """Tell whether it has not ended yet."""
        return self.popen.poll() is None

    def wait(self, timeout: float = LIMIT_S) -> Result:
        """Wait until it ends by itself, and all that it printed is there."""
        try:
            status = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; {self.stdout()!r} {self.stderr()!r}") from None
        wait_for(self._has_ended)
        return Result(status, self.stdout(), self.stderr())

    def type(self, keys: str) -> None:
        """Press `keys` at its terminal, one of which may be ``CTRL_C``."""
        assert self._terminal
        self._terminal.type(keys)

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


class Terminal:
    """A pseudo-terminal for one program; all that it shows goes to `record`.

    `streams` are for Popen, and then `follow`, once.
    """

    def __init__(self, record: IO[bytes]) -> None:
        self._record = record
        self._near, self._far = pty.openpty()
        fcntl.ioctl(self._far, termios.TIOCSWINSZ, struct.pack("HHHH", *TERMINAL_SIZE, 0, 0))
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.ident:
            self._thread.join(LIMIT_S)
        os.close(self._near)

    def streams(self) -> dict[str, Any]:
        """Return what has Popen start a program at this terminal, which rules it."""
        return {
            **dict.fromkeys(("stdin", "stdout", "stderr"), self._far),
            "start_new_session": True,
            "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        }

    def follow(self) -> None:
        """Record from now on, until nobody has the other end open."""
        os.close(self._far)
        self._thread.start()

    def following(self) -> bool:
        """Tell whether more may come."""
        return self._thread.is_alive()

    def _follow(self) -> None:
        with contextlib.suppress(OSError):  # so ends a terminal that nobody has open any more
            while data := os.read(self._near, 4096):
                os.write(self._record.fileno(), data)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._near, keys.encode())


# --- the two scripts ------------------------------------------------------------------------


class Process(Program):
    """A script running, by this Python or as `python` says."""

    def __init__(
        self,
        script: str,
        *args: Argument,
        wrapper: Sequence[str] = (),
        python: Sequence[str] = (sys.executable,),
        **options: Any,
    ) -> None:
        super().__init__([*wrapper, *python, str(ROOT / script), *args], **options)


class Server(Process):
    """A server that takes files into `folder`, listening when the constructor returns.

    Leaving the ``with`` block checks that it never printed a traceback.
    """

    def __init__(
        self,
        folder: Path,
        *args: str,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        port = free_port() if port is None else port
        arguments = ("file", "--port", str(port), "--folder", str(folder), *args)
        super().__init__("server.py", *arguments, env=env, cwd=cwd, wrapper=wrapper)
        self.folder = folder
        try:
            found = self.wait_for_output(
                r"Receiving into .* on (?:.* and )?(\S+):(\d+) - Ctrl\+C to stop\n"
            )
        except BaseException:
            self.close()
            raise
        self.port = int(found[2])

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
        """Return the counts of the threads and the descriptors that it has once it has started."""
        descriptors = wait_for(self._count_of_idle, "its start")
        return self.threads(), descriptors

    def _count_of_idle(self) -> int:
        """Return how many descriptors it has while it waits for clients and has no folder open.

        0 where it does not, say as it looks for old leftovers. All is told by one listing.
        """
        folder = f"/proc/{self.popen.pid}/fd"
        with contextlib.suppress(FileNotFoundError):  # one that has just been closed
            targets = [os.readlink(f"{folder}/{number}") for number in os.listdir(folder)]
            if "anon_inode:[eventpoll]" in targets and not any(map(os.path.isdir, targets)):
                return len(targets)
        return 0

    def wait_until_idle(self, held: tuple[int, int]) -> None:
        """Wait until it has released all that it did not hold at first."""
        wait_for(
            lambda: (self.threads(), self.descriptors()) == held,
            what=f"{held} threads and descriptors",
        )

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
    result.check_no_mistake()
    return result


def run_script(script: str, *args: str, **options: Any) -> Result:
    """Run a script to its end; it must never show a traceback."""
    with Process(script, *args, **options) as process:
        result = process.wait()
    result.check_no_mistake()
    return result
