"""A real JACK server without hardware: ``jackd`` with its dummy driver, of a name of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from sound_card import stop_process
from waiting import COMMAND_LIMIT_S, LIMIT_S, wait_for


def take_name() -> tuple[str, IO[bytes]]:
    """Return a name that no running server has, and the file whose lock says so.

    JACK has room for eight names on a machine, and one of a server that was killed stays taken
    until there is another of that name: so it is always the first that is free.
    """
    number = 0
    while True:
        name = f"socket-pair-{number}"
        lock = Path(tempfile.gettempdir(), f"{name}.lock").open("ab")  # noqa: SIM115 - held as long as the name
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return name, lock
        except BlockingIOError:
            lock.close()
            number += 1


class JackServer:
    """A JACK server whose one device is called ``system``. Use it in a ``with`` block."""

    def __init__(self, rate: int = 44_100, period: int = 256) -> None:
        self.name, self._lock = take_name()
        # It ends with this process, as the next server of its name would be taken for it.
        self._command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "jackd",
            "--no-realtime",
            "-n",
            self.name,
            "-d",
            "dummy",
        ]
        self._command += ["-r", str(rate), "-p", str(period)]
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Return an environment whose JACK server is this one."""
        return {**base, "JACK_DEFAULT_SERVER": self.name}

    def __enter__(self) -> JackServer:
        try:
            self.start()
        except BaseException:
            self.kill()
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            stop_process(self._process)
        self._lock.close()

    def start(self) -> None:
        """Start the server; blocks until it takes clients."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self._is_ready, "the start of JACK", LIMIT_S)

    def _is_ready(self) -> bool:
        found = subprocess.run(
            ["jack_lsp", "-s", self.name],
            env={**os.environ, "JACK_NO_START_SERVER": "1"},
            capture_output=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
        return b"system:" in found.stdout

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Have the server answer nobody inside the ``with`` block."""
        if self._process is None:
            raise RuntimeError("there is no server")
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the server without a chance to tell its clients."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(COMMAND_LIMIT_S)
