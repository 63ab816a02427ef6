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
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support import ROOT, Program, environment, wait_for

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

    def run(self, script: str, **env: str) -> Program:
        """Return a running shell script, to be used in a ``with`` block, which ends all of it."""
        command = [*self._wrapper, "sh", "-c", script]
        env = {**self.env, **env}
        return Program(command, cwd=self.folder, env=env, merged=True, group=True)

    def recipe(self, name: str, **env: str) -> Program:
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
    with Program([*unshare, "sh", "-c", script], stdin=subprocess.PIPE) as holder:
        wait_for(lambda: holder.stdout() or not holder.running(), "the network is up")
        target = str(holder.popen.pid)
        enter = ("nsenter", "--target", target, "--user", "--net", "--preserve-credentials")
        yield enter if holder.running() else ()


@pytest.fixture
def workplace(tmp_path: Path, network: tuple[str, ...]) -> Workplace:
    folder = tmp_path / "workplace"
    folder.mkdir()
    return Workplace(folder, network)
