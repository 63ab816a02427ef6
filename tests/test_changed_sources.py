"""A file that changes while it is sent is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import client
from common import Keepalive
from support import (
    MIB,
    Proxy,
    Server,
    contents,
    hold_and,
    make_file,
    posix,
    wait_for,
)


@posix
def test_a_change_whose_time_is_set_back_is_noticed(tmp_path: Path) -> None:
    path = make_file(tmp_path / "file", 1000)
    found = os.stat(path)
    source = client.Source.from_stat(str(path), "file", found)
    with open(path, "rb", buffering=0) as file:
        source.check_unchanged(file)
        wait_for(lambda: set_back(path, found) != found.st_ctime_ns, what="the clock moves on")
        with pytest.raises(client.FileChanged):
            source.check_unchanged(file)


def set_back(path: Path, found: os.stat_result) -> int:
    """Change a file and restore its modification time; return the time of its status."""
    path.write_bytes(bytes(found.st_size))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    return os.stat(path).st_ctime_ns


@posix
def test_a_file_that_changes_while_it_is_compared_counts_as_changed(tmp_path: Path) -> None:
    path = make_file(tmp_path / "file", 1000)
    source = client.Source.from_stat(str(path), "file", os.stat(path))
    with open(path, "ab") as file:
        file.write(b"more")
    client.hash_prefixes(source, [1000], Keepalive(lambda: None))
    assert source.digests == {}


@pytest.mark.parametrize("how", ["grows", "shrinks", "is truncated", "changes", "is touched"])
def test_a_file_that_changes_while_it_is_sent_is_refused(
    server: Server, tmp_path: Path, how: str
) -> None:
    source = make_file(tmp_path / "log", 40 * MIB)
    after = make_file(tmp_path / "after", 1000)

    def change() -> None:
        if how == "is touched":
            os.utime(source)
            return
        with open(source, "r+b") as file:
            if how == "grows":
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            elif how == "changes":
                file.seek(-100, os.SEEK_END)
                file.write(b"other")
            else:
                file.truncate(0 if how == "is truncated" else 39 * MIB)

    with (
        Proxy(server.port, hold_at=16 * MIB) as link,
        server.client(source, after, port=link.port) as client,
    ):
        hold_and(server, link, client, change)
        result = client.wait()
    assert result.status == 1
    assert result.error_lines == [f"{source}: it changed while it was sent"]
    assert contents(server.folder) == {"after": after.read_bytes()}
    assert "log" in server.stderr()


def test_a_file_that_is_replaced_while_it_is_sent_arrives_as_it_was(
    server: Server, tmp_path: Path
) -> None:
    """As editors save: the open file stays what it was."""
    source = make_file(tmp_path / "doc", 40 * MIB)
    before = source.read_bytes()
    other = make_file(tmp_path / "new", 1000, seed=2)
    with (
        Proxy(server.port, hold_at=16 * MIB) as link,
        server.client(source, port=link.port) as client,
    ):
        hold_and(server, link, client, lambda: other.replace(source))
        result = client.wait()
    assert result.status == 0, result
    assert contents(server.folder) == {"doc": before}
