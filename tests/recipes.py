"""What runs the README's recipes as they stand there: each is read from it, and given to a shell.

``read_recipe`` reads one, a ``Workplace`` is a copy of the three modules where ``python3`` is this
one, ``Shell`` is a recipe running. As root on Linux they have a network of their own, so that the
ports that they name are free. Import ``network`` and ``workplace`` to have the fixtures.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from support import LIMIT_S, ROOT, environment, wait_for

README = (ROOT / "README.md").read_text()
MODULES = ("common.py", "server.py", "client.py")


def read_block(mark: str, language: str) -> str:
    """Return the block of text in `language` that stands in the README under `mark`."""
    found = re.search(rf"<!-- {mark} -->\n+```{language}\n(.*?)```\n", README, re.DOTALL)
    assert found, f"the README has no {mark!r}"
    return found[1]


def read_recipe(name: str) -> str:
    """Return the shell commands that stand in the README under `name`."""
    return read_block(f"recipe: {name}", "sh")


class Shell:
    """A recipe running, with all that it has started; its output gathers in `output`."""

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self.output = ""
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output += line

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def wait_for(self, text: str) -> None:
        """Wait until `text` was printed."""
        wait_for(lambda: text in self.output or self._died(), LIMIT_S, f"{text!r} is printed")
        assert text in self.output, self.output

    def _died(self) -> bool:
        return self._process.poll() is not None and not self._reader.is_alive()

    def wait(self) -> int:
        """Wait until all has ended by itself; return the exit status."""
        status = self._process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        return status


class Workplace:
    """A folder to run recipes in, and the network that they have."""

    def __init__(self, folder: Path, wrapper: Sequence[str]) -> None:
        self.folder = folder
        self._wrapper = wrapper
        for module in MODULES:
            shutil.copy(ROOT / module, folder)
        python = folder / "bin" / "python3"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        self.env = environment({"PATH": f"{python.parent}:{os.environ['PATH']}"})

    def run(self, script: str, **env: str) -> Shell:
        """Return a running shell script, to be used in a ``with`` block."""
        command = [*self._wrapper, "sh", "-c", script]
        return Shell(command, self.folder, {**self.env, **env})

    def recipe(self, name: str, **env: str) -> Shell:
        """Return a running recipe of the README, to be used in a ``with`` block."""
        return self.run(read_recipe(name), **env)


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[str, ...]]:
    """Give what runs a command in a network of its own; nothing where there can be none."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        yield ()
    elif os.geteuid() == 0:
        with root_network(f"sp{os.getpid()}-recipes") as wrapper:
            yield wrapper
    else:
        with user_network() as wrapper:
            yield wrapper


@contextlib.contextmanager
def root_network(name: str) -> Iterator[tuple[str, ...]]:
    """Have a network, as root."""
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=60)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True, timeout=60)
        yield ("ip", "netns", "exec", name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=60)


@contextlib.contextmanager
def user_network() -> Iterator[tuple[str, ...]]:
    """Have a network, as any user, where the system lets users have one; else give nothing."""
    unshare = ["unshare", "--user", "--net", "--map-current-user", "--keep-caps"]
    script = "ip link set lo up && echo up && exec cat"
    with subprocess.Popen(
        [*unshare, "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as holder:
        assert holder.stdout is not None
        up = holder.stdout.readline() == b"up\n"
        target = str(holder.pid)
        enter = ("nsenter", "--target", target, "--user", "--net", "--preserve-credentials")
        yield enter if up else ()
        # At the end of its input the holder ends, and the network with it.


@pytest.fixture
def workplace(tmp_path: Path, network: tuple[str, ...]) -> Workplace:
    folder = tmp_path / "workplace"
    folder.mkdir()
    return Workplace(folder, network)
