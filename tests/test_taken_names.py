"""Nothing is lost or sent twice where a name is taken already."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import (
    MIB,
    Proxy,
    Server,
    contents,
    half_way,
    make_file,
    sha256,
    visible,
)

# --- names that are taken -------------------------------------------------------------------


def test_the_same_content_is_not_sent_again(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 20 * MIB)
    assert server.send(source).status == 0
    with Proxy(server.port) as link:
        result = server.send(source, port=link.port)
        assert link.passed < 10_000
    assert result.status == 0
    digest = sha256(source)[:8]
    assert result.stdout == f"Already there as file.bin, SHA-256 matches ({digest}...)\n"
    assert visible(server.folder) == ["file.bin"]


def test_another_content_goes_beside_and_is_known_again(server: Server, tmp_path: Path) -> None:
    sources = [make_file(tmp_path / str(seed) / "file.tar.gz", 1000, seed) for seed in range(3)]
    names = ["file.tar.gz", "file.tar (1).gz", "file.tar (2).gz"]
    for source, name in zip(sources, names, strict=True):
        result = server.send(source)
        assert result.stdout.startswith(f"Saved as {name}, ")
    for source, name in zip(sources, names, strict=True):
        result = server.send(source)
        assert result.status == 0
        assert result.stdout.startswith(f"Already there as {name}, ")
    assert contents(server.folder) == {
        name: source.read_bytes() for source, name in zip(sources, names, strict=True)
    }


def test_many_of_one_name_and_size_are_known_again_by_their_times(
    server: Server, tmp_path: Path
) -> None:
    sources = [make_file(tmp_path / str(seed) / "file", 1000, seed) for seed in range(20)]
    for time_s, source in enumerate(sources):
        os.utime(source, (time_s, time_s))
    for word in ("Saved as file", "Already there as file"):
        for source in sources:
            assert server.send(source).stdout.startswith(word)
    assert len(contents(server.folder)) == 20


def test_many_of_one_name_are_known_again_in_one_run(server: Server, tmp_path: Path) -> None:
    sources = [make_file(tmp_path / str(size) / "file", size) for size in range(1000, 1030)]
    for word in ("Saved as file", "Already there as file"):
        result = server.send(*sources)
        assert all(line.startswith(word) for line in result.stdout.splitlines()), result
    assert len(contents(server.folder)) == len(sources)


def test_a_file_in_a_folder_that_goes_beside_is_mentioned(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "tree" / "x", 1000)
    server.send(tmp_path / "tree")
    make_file(source, 1000, seed=2)
    result = server.send(tmp_path / "tree")
    assert result.status == 0
    assert "Saved as tree/x (1), " in result.stdout


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x." + "y" * 253, "." + "z" * 254])
def test_a_second_file_of_the_longest_name_is_kept_too(
    server: Server, tmp_path: Path, name: str
) -> None:
    sources = [make_file(tmp_path / str(seed) / name, 1000, seed) for seed in range(2)]
    for source in sources:
        result = server.send(source)
        assert result.status == 0, result
    found = contents(server.folder)
    assert found.pop(name) == sources[0].read_bytes()
    assert list(found.values()) == [sources[1].read_bytes()]


def test_files_of_one_name_in_one_go_are_all_kept(server: Server, tmp_path: Path) -> None:
    sources = [make_file(tmp_path / str(seed) / "x.txt", 1000, seed) for seed in range(3)]
    assert server.send(*sources).status == 0
    found = contents(server.folder)
    assert sorted(found) == ["x (1).txt", "x (2).txt", "x.txt"]
    assert sorted(found.values()) == sorted(source.read_bytes() for source in sources)


def test_one_content_is_kept_once_also_beside_another_file_of_its_name(
    server: Server, tmp_path: Path
) -> None:
    make_file(server.folder / "x", 1000, seed=9)
    sources = [make_file(tmp_path / place / "x", 1000) for place in "ab"]
    result = server.send(*sources)
    assert result.status == 0, result
    assert "Already there as x (1), " in result.stdout
    assert sorted(contents(server.folder)) == ["x", "x (1)"]


def test_files_of_one_name_are_all_known_again(server: Server, tmp_path: Path) -> None:
    sources = [make_file(tmp_path / str(seed) / "x.txt", 3 * MIB, seed) for seed in range(3)]
    server.send(*sources)
    with Proxy(server.port) as link:
        result = server.send(*sources, port=link.port)
        assert link.passed < MIB
    assert result.status == 0, result
    assert result.stdout.count("Already there") == 3


def test_a_large_file_is_not_taken_for_another_of_its_size(server: Server, tmp_path: Path) -> None:
    """Alike but for the last byte."""
    source = make_file(tmp_path / "file", 8 * MIB)
    first = source.read_bytes()
    server.send(source)
    source.write_bytes(first[:-1] + bytes([first[-1] ^ 1]))
    assert server.send(source).status == 0
    assert contents(server.folder) == {"file": first, "file (1)": source.read_bytes()}


def test_overwriting_replaces_in_one_step(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 30 * MIB)
    old = make_file(inbox / "file", 1000, seed=2).read_bytes()
    with Server(inbox, "--overwrite") as server:
        with half_way(server, source) as (client, link):
            assert (inbox / "file").read_bytes() == old, "until the new one is complete"
            before = (inbox / "file").stat().st_ino
            link.release()
            while client.running():
                assert (inbox / "file").stat().st_size in (1000, 30 * MIB)
            assert client.wait().status == 0
        assert (inbox / "file").stat().st_ino != before
        assert server.send(source).stdout.startswith("Already there as file, ")
    assert contents(inbox) == {"file": source.read_bytes()}


def test_overwriting_never_writes_through_a_link(inbox: Path, tmp_path: Path) -> None:
    precious = make_file(tmp_path / "precious", 100, seed=2)
    before = precious.read_bytes()
    source = make_file(tmp_path / "file", 1000)
    inbox.mkdir()
    (inbox / "file").symlink_to(precious)
    with Server(inbox, "--overwrite") as server:
        assert server.send(source).status == 0
    assert precious.read_bytes() == before
    assert not (inbox / "file").is_symlink()
    assert (inbox / "file").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("target", ["../precious", "../missing", "missing", "file"])
def test_a_name_that_is_a_link_is_taken(inbox: Path, tmp_path: Path, target: str) -> None:
    precious = make_file(tmp_path / "precious", 1000, seed=2)
    before = precious.read_bytes()
    source = make_file(tmp_path / "file", 1000)
    inbox.mkdir()
    (inbox / "file").symlink_to(target)
    with Server(inbox) as server:
        assert server.send(source).status == 0
        assert server.send("-", "--name", "file", stdin=b"piped").status == 0
    assert precious.read_bytes() == before
    assert (inbox / "file").is_symlink()
    assert (inbox / "file (1)").read_bytes() == source.read_bytes()
    assert (inbox / "file (2)").read_bytes() == b"piped"
    assert visible(tmp_path) == ["file", "inbox", "precious"]


# --- many at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 5 * MIB])
def test_eight_clients_with_one_name_lose_nothing(
    server: Server, tmp_path: Path, size: int
) -> None:
    sources = [make_file(tmp_path / str(seed) / "same.bin", size, seed) for seed in range(8)]
    send_at_once(server, sources)
    found = contents(server.folder)
    assert sorted(found.values()) == sorted(source.read_bytes() for source in sources)
    assert set(found) == {"same.bin"} | {f"same ({number}).bin" for number in range(1, 8)}


def send_at_once(server: Server, sources: list[Path]) -> None:
    """Send each file by a client of its own, all at the same time."""
    clients = [server.client(source) for source in sources]
    try:
        results = [client.wait() for client in clients]
    finally:
        for client in clients:
            client.close()
    assert [result.status for result in results] == [0] * len(sources), results


def test_eight_clients_with_one_content_do_no_harm(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "same.bin", 5 * MIB)
    send_at_once(server, [source] * 8)
    found = contents(server.folder)
    assert found["same.bin"] == source.read_bytes()
    assert set(found.values()) == {source.read_bytes()}, "each copy is whole, and none is partial"


def test_one_slow_client_does_not_hold_up_others(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "slow.bin", 20 * MIB)
    other = make_file(tmp_path / "other.bin", 2 * MIB)
    with half_way(server, source, hold_at=10 * MIB) as (client, link):
        assert server.send(other).status == 0
        link.release()
        assert client.wait().status == 0
    assert contents(server.folder) == {
        "slow.bin": source.read_bytes(),
        "other.bin": other.read_bytes(),
    }
