"""What most tests import: programs and peers from their modules, marks, and files.

====================  =============================================================
``waiting``           ``wait_for`` polls a condition; nothing sleeps for luck
``processes``         ``Program`` running, ``Process`` a script, ``Server`` one that listens
``peers``             ``RawClient``, ``FakeServer``: the protocol by hand
``proxy``             ``Proxy``: a link that holds, changes, cuts and records
``ports``             ``free_port``: one that nobody else gets
here                  marks; ``make_file``, ``partials``, ``contents`` ...
====================  =============================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peers import END_OF_FILE, GIVEN_UP, HELLO, FakeServer, RawClient, RawPeer, frame, message
from ports import HOST, free_port
from processes import (
    ROOT,
    Process,
    Program,
    Result,
    Server,
    environment,
    run_script,
    send,
    start_client,
)
from proxy import DOWN, UP, Cut, Proxy
from waiting import LIMIT_S, background, wait_for

__all__ = [
    "DOWN",
    "END_OF_FILE",
    "GIVEN_UP",
    "HELLO",
    "HOST",
    "LIMIT_S",
    "ROOT",
    "UP",
    "Cut",
    "FakeServer",
    "Process",
    "Program",
    "Proxy",
    "RawClient",
    "RawPeer",
    "Result",
    "Server",
    "background",
    "environment",
    "frame",
    "free_port",
    "message",
    "run_script",
    "send",
    "start_client",
    "wait_for",
]

PARTIAL_SUFFIX = ".socketpair-part"
MIB = 1024 * 1024

posix = pytest.mark.skipif(os.name != "posix", reason="has no such links and times")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# Root may read, write and listen anywhere: the tests of permissions do without those rights.
WITHOUT_PRIVILEGE: tuple[str, ...] = ()
if hasattr(os, "geteuid") and os.geteuid() == 0 and sys.platform == "linux":
    _RIGHTS = "-dac_override,-dac_read_search,-net_bind_service"
    WITHOUT_PRIVILEGE = ("setpriv", f"--bounding-set={_RIGHTS}", f"--inh-caps={_RIGHTS}", "--")

with_permissions = pytest.mark.skipif(
    sys.platform == "win32" or (not WITHOUT_PRIVILEGE and os.geteuid() == 0),
    reason="nothing is forbidden here",
)
as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root may make such a disk or file"
)


@contextlib.contextmanager
def half_way(
    server: Server,
    *args: str | Path,
    hold_at: int = 16 * MIB,
    written: int = 8 * MIB,
    **options: Any,
) -> Iterator[tuple[Process, Proxy]]:
    """Give a client in the middle of its first large file, and the proxy that holds it there.

    `hold_at` bytes have passed, of which over `written` are in the server's partial file.
    """
    with (
        Proxy(server.port, hold_at=hold_at) as proxy,
        server.client(*args, port=proxy.port, **options) as client,
    ):
        wait_for(lambda: partial_size(server.folder) > written)
        yield client, proxy


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
    """Make a partial file as a server leaves it behind, of a client on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.{hashlib.sha256(HOST.encode()).hexdigest()[:8]}89{PARTIAL_SUFFIX}"
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


def finished(folder: Path) -> dict[str, bytes]:
    """Return what `contents` does, without the partial files."""
    found = contents(folder)
    return {name: found[name] for name in found if not name.endswith(PARTIAL_SUFFIX)}


def control_codes(text: str) -> set[str]:
    """Return the control codes in `text`, but for line ends."""
    return {char for char in text if not char.isprintable() and char != "\n"}


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
