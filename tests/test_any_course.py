"""Whatever breaks off and changes on the way, by chance: all arrives, and is told of once."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import client
import server
from common import Connection
from conversation import welcome
from peers import FakeServer, RawPeer
from ports import HOST
from proxy import UP, Cut, Proxy
from support import MIB, contents, make_file, partials

SIZES = (0, 1, 5_000, 70_000, 300_000, MIB + 1, 3 * MIB)
TIME_S = 10**9


def make_tree(root: Path, chance: random.Random) -> list[Path]:
    """Make a tree, whose folders are old; return its files."""
    files = []
    for number in range(chance.randint(2, 12)):
        place = root.joinpath(*chance.choices("ab", k=chance.randint(0, 2)))
        files.append(make_file(place / f"{number}", chance.choice(SIZES), seed=number))
    for folder, _, _ in os.walk(root):
        os.utime(folder, (TIME_S, TIME_S))
    return files


def harm(changed: list[Path], chance: random.Random) -> Callable[[int, int, bytes], bytes]:
    """Return what changes these files once they have been offered, and cuts a few connections."""
    cuts = [chance.choice((300, 3_000, 100_000, MIB)) for _ in range(chance.randint(0, 4))]

    def hook(direction: int, passed: int, data: bytes) -> bytes:
        if direction == UP and passed:
            while changed:
                make_file(changed.pop(), chance.choice(SIZES[:5]), seed=99)
        if direction == UP and cuts and passed + len(data) > cuts[-1]:
            raise Cut(data[: max(0, cuts.pop() - passed)])
        return data

    return hook


@pytest.mark.parametrize("seed", range(10))
def test_a_tree_arrives_through_cuts_and_changes(
    inbox: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: int,
) -> None:
    monkeypatch.setattr(client, "RETRY_WAITS_S", (0.01,))
    chance, tree = random.Random(seed), tmp_path / "tree"
    files = make_tree(tree, chance)
    store = server.Store(str(inbox), overwrite=chance.random() < 0.3)

    def serve(peer: RawPeer) -> None:
        welcome(peer)
        with Connection(peer.socket, f"{HOST}:1") as connection:
            server.handle_file_client(connection, store)

    changed = chance.sample(files, len(files) // 4)
    with FakeServer(serve) as fake, Proxy(fake.port, hook=harm(changed, chance)) as proxy:
        args = client.parse_arguments(["file", str(tree)])
        assert client.start_file_client(client.Address(HOST, proxy.port), args) == 0
    assert contents(inbox / "tree") == contents(tree)
    for place, _, _ in os.walk(inbox / "tree"):
        assert os.stat(place).st_mtime == TIME_S
    assert partials(inbox) == []
    told = [line for line in capsys.readouterr().out.splitlines() if "tree/ with " in line]
    assert len(told) == 1
    (count,) = re.findall(r"tree/ with (\d+) file", told[0])
    assert int(count) == len(files)
