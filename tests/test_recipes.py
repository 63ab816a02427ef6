"""The README's recipes, run as they stand there: each is read from it, and given to a shell.

They run in a copy of the three modules, where ``python`` is this one, and as root on Linux in a
network of their own, so that the ports that they name are free.
"""

from __future__ import annotations

import configparser
import contextlib
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import common
import server
from support import LIMIT_S, ROOT, environment, make_file, sha256, wait_for

README = (ROOT / "README.md").read_text()
MODULES = ("common.py", "server.py", "client.py")


def read_recipe(name: str) -> str:
    """Return the shell commands that stand in the README under `name`."""
    found = re.search(rf"<!-- recipe: {name} -->\n+```sh\n(.*?)```\n", README, re.DOTALL)
    assert found, f"the README has no recipe {name!r}"
    return found[1]


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
        python = folder / "bin" / "python"
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
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        yield ()
        return
    name = f"sp{os.getpid()}-recipes"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=60)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True, timeout=60)
        yield ("ip", "netns", "exec", name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=60)


@pytest.fixture
def workplace(tmp_path: Path, network: tuple[str, ...]) -> Workplace:
    folder = tmp_path / "workplace"
    folder.mkdir()
    return Workplace(folder, network)


# --- files ------------------------------------------------------------------------------------


def test_a_folder_goes_as_one_archive(workplace: Workplace) -> None:
    photos = workplace.folder / "photos"
    (photos / "summer").mkdir(parents=True)
    sources = [make_file(photos / "a.jpg", 300_000), make_file(photos / "summer" / "b c.jpg", 7)]
    with workplace.run("exec python server.py file") as server:
        server.wait_for("Receiving into")
        with workplace.recipe("files-tar") as client:
            assert client.wait() == 0, client.output
    with tarfile.open(workplace.folder / "received" / "photos.tar") as archive:
        for source in sources:
            member = archive.extractfile(str(source.relative_to(workplace.folder)))
            assert member is not None
            assert member.read() == source.read_bytes()


def test_the_files_that_find_finds_are_sent(workplace: Workplace) -> None:
    photos = workplace.folder / "photos"
    (photos / "summer").mkdir(parents=True)
    names = ["a.jpg", "with 'quotes' and spaces.jpg", "-dash.jpg", "two\nlines.jpg", "grün.jpg"]
    for name in names:
        make_file(photos / "summer" / name, 1000)
    make_file(photos / "no photo.txt", 1000)
    old = make_file(photos / "old.jpg", 1000)
    os.utime(old, (0, 0))
    with workplace.run("exec python server.py file") as server:
        server.wait_for("Receiving into")
        with workplace.recipe("files-find") as client:
            assert client.wait() == 0, client.output
    received = workplace.folder / "received"
    assert sorted(path.name for path in received.iterdir()) == sorted(names)
    for name in names:
        assert sha256(received / name) == sha256(photos / "summer" / name)


def test_each_saved_file_is_handed_on(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "sent"
    folder.mkdir()
    names = ["a.txt", "with  'quotes' and spaces ", "x, SHA-256 00, saved as a.txt", "-v"]
    names += ["two\nlines", "two\\nlines", "\\0101", "an escape \x1b[31m", "grün\u2028\n"]
    for number, name in enumerate(names):
        make_file(folder / name, 1000 + number)
    last = make_file(tmp_path / "last", 1)
    with workplace.recipe("files-hand-on") as server:
        server.wait_for("Receiving into")
        with workplace.run(
            'python client.py file "$SENT"/* "$SENT" "$LAST"', SENT=str(folder), LAST=str(last)
        ) as client:
            assert client.wait() == 0, client.output
        done = workplace.folder / "done" / "received"
        wait_for(lambda: is_complete(done / "last.gz"), LIMIT_S, "the last file is handed on")
    for name in names:
        for handed_on in (done / f"{name}.gz", done / "sent" / f"{name}.gz"):
            assert gzip.decompress(handed_on.read_bytes()) == (folder / name).read_bytes()


def is_complete(archive: Path) -> bool:
    """Tell whether a gzip file is all there."""
    with contextlib.suppress(EOFError, OSError):
        return bool(gzip.decompress(archive.read_bytes()))
    return False


# --- services ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["socket-pair.service", "socket-pair-sound.service"])
def test_the_services_commands_are_understood(unit: str) -> None:
    found = re.search(rf"<!-- unit: {unit} -->\n```ini\n(.*?)```\n", README, re.DOTALL)
    assert found
    parser = configparser.ConfigParser(delimiters="=", interpolation=None)
    parser.read_string(found[1])
    python, script, *arguments = parser["Service"]["ExecStart"].split()
    assert python.removesuffix("bin/python") == script.removesuffix("server.py") + ".venv/"
    assert server.parse_arguments(arguments).mode == ("audio" if "sound" in unit else "file")
    assert str(common.EXIT_TERMINATED) in parser["Service"]["SuccessExitStatus"].split()
