"""Killed without warning, at any moment: the next run ends with the same files, all whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import (
    MIB,
    PARTIAL_SUFFIX,
    Proxy,
    Server,
    contents,
    make_file,
    partials,
    sha256,
)

ROUNDS = 8


class Watch:
    """Looks at a folder all the time: under a final name, only what is complete may stand."""

    def __init__(self, folder: Path, wanted: dict[str, bytes]) -> None:
        self._folder = folder
        self._sizes = {name: len(content) for name, content in wanted.items()}
        self._wrong: list[str] = []
        self._rounds = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self._rounds > 0
        assert self._wrong == []

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self._rounds += 1
            for place, _, names in os.walk(self._folder):
                for name in names:
                    if not name.endswith(PARTIAL_SUFFIX):
                        self._look_at(Path(place) / name)

    def _look_at(self, path: Path) -> None:
        name = str(path.relative_to(self._folder))
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            if size != self._sizes.get(name):
                self._wrong.append(f"{name} with {size} bytes")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with large and small files."""
    folder = tmp_path / "tree"
    for number in range(3):
        make_file(folder / f"large {number}", 24 * MIB + number, seed=number)
    for number in range(120):
        make_file(folder / "small" / f"{number}", number * 500, seed=number)
    return folder


def expected(tree: Path) -> dict[str, bytes]:
    """Return what the server should have in the end."""
    found = {f"tree/{name}": content for name, content in contents(tree).items()}
    return {"tree/": b"", **found}


def check_complete(inbox: Path, wanted: dict[str, bytes]) -> None:
    """Fail unless exactly what was sent is there, byte for byte."""
    assert partials(inbox) == []
    found = contents(inbox)
    assert set(found) == set(wanted)
    for name, content in wanted.items():
        assert hashlib.sha256(found[name]).digest() == hashlib.sha256(content).digest(), name


def moments(seed: int, sizes: int) -> Iterator[int]:
    """Yield counts of bytes after which to kill, spread over all that is to be sent."""
    chance = random.Random(seed)
    for number in range(ROUNDS):
        yield int(sizes * (number + chance.random()) / ROUNDS)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_client_killed_again_and_again_gets_there(
    server: Server, tmp_path: Path, tree: Path, seed: int
) -> None:
    wanted = expected(tree)
    total = sum(map(len, wanted.values()))
    with Watch(server.folder, wanted), Proxy(server.port) as link:
        for moment in moments(seed, total):
            with server.client(tree, port=link.port) as client:
                link.wait_until_passed(moment, client)
                client.kill()
        result = server.send(tree, port=link.port)
        assert result.status == 0, result
        # Killed in the middle of one file, what has arrived of it is not sent again.
        assert link.passed < total + ROUNDS * 6 * MIB
    check_complete(server.folder, wanted)


@pytest.mark.parametrize("seed", [3, 4])
def test_a_server_killed_again_and_again_gets_there(
    inbox: Path, tmp_path: Path, tree: Path, seed: int
) -> None:
    """With one client all the time, which comes back by itself."""
    wanted = expected(tree)
    total = sum(map(len, wanted.values()))
    servers = contextlib.ExitStack()
    with servers, Watch(inbox, wanted):
        server = servers.enter_context(Server(inbox))
        with Proxy(server.port) as link, server.client(tree, port=link.port) as client:
            for moment in moments(seed, total):
                link.wait_until_passed(moment, client)
                server.kill()
                server = servers.enter_context(Server(inbox, port=server.port))
            result = client.wait()
        assert "Traceback" not in result.stderr
        if result.status != 0:  # its last attempts fell into the times without a server
            result = server.send(tree)
        assert result.status == 0, result
    check_complete(inbox, wanted)


@pytest.mark.parametrize("seed", [5])
def test_both_killed_at_any_moment_get_there(
    inbox: Path, tmp_path: Path, tree: Path, seed: int
) -> None:
    chance = random.Random(seed)
    wanted = expected(tree)
    total = sum(map(len, wanted.values()))
    with Watch(inbox, wanted):
        for moment in (0, 1, 100, *moments(seed, total)):
            with (
                Server(inbox) as server,
                Proxy(server.port) as link,
                server.client(tree, port=link.port) as client,
            ):
                link.wait_until_passed(moment, client)
                for process in chance.sample([client, server], 2):
                    process.kill()
        with Server(inbox) as server:
            result = server.send(tree)
            assert result.status == 0, result
    check_complete(inbox, wanted)


def test_a_server_killed_while_it_replaces_files_leaves_old_or_new(
    inbox: Path, tmp_path: Path
) -> None:
    """With --overwrite, each name holds the one content or the other at any moment."""
    chance = random.Random(7)
    sources = [make_file(tmp_path / str(seed) / "file", 6 * MIB, seed) for seed in range(2)]
    digests = {sha256(source) for source in sources}
    with Server(inbox) as server:
        assert server.send(sources[0]).status == 0
    for number in range(ROUNDS):
        with (
            Server(inbox, "--overwrite") as server,
            Proxy(server.port) as link,
            server.client(sources[(number + 1) % 2], port=link.port) as client,
        ):
            link.wait_until_passed(int(6 * MIB * chance.random() ** 0.2), client)  # mostly late
            server.kill()
            client.kill()
        assert sha256(inbox / "file") in digests
    with Server(inbox, "--overwrite") as server:
        assert server.send(sources[1]).status == 0
    assert contents(inbox) == {"file": sources[1].read_bytes()}
