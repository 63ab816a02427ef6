"""A file whose content changes while it is sent is refused; any other change does no harm."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import client
from common import calculate_checksum
from support import (
    MIB,
    Result,
    Server,
    contents,
    finished,
    half_way,
    make_file,
    partials,
    posix,
    sha256,
)


@posix
def test_a_change_whose_time_is_set_back_is_noticed(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "log", 40 * MIB)
    found = os.stat(source)

    def change() -> None:
        with open(source, "r+b") as file:
            file.write(b"other")
        os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))

    result = send_and(server, source, change)
    assert result.status == 1
    assert result.error_lines == [f"{source}: it changed while it was sent"]
    assert finished(server.folder) == {}


def send_and(server: Server, source: Path, change: Callable[[], object]) -> Result:
    """Send a file of 40 MiB, and `change` it when 16 MiB have passed."""
    with half_way(server, source) as (client, proxy):
        change()
        proxy.release()
        return client.wait()


@posix
@pytest.mark.parametrize("how", ["mode", "name", "link"])
def test_a_file_of_which_only_the_metadata_change_is_sent(
    server: Server, tmp_path: Path, how: str
) -> None:
    source = make_file(tmp_path / "log", 40 * MIB)
    content = source.read_bytes()
    changes: dict[str, Callable[[], object]] = {
        "mode": lambda: source.chmod(0o600),
        "name": lambda: source.rename(tmp_path / "other"),
        "link": lambda: os.link(source, tmp_path / "other"),
    }
    result = send_and(server, source, changes[how])
    assert result.status == 0, result
    assert contents(server.folder) == {"log": content}


def test_a_file_that_grows_and_is_emptied_while_it_is_compared_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_file(tmp_path / "log", 100_000)
    transfer = client.UnderWay(client.look_up(str(source)), 0, 0, None)

    def rotate_and_hash(descriptor: int, length: int, **options: Any) -> str:
        os.truncate(source, 0)
        return calculate_checksum(descriptor, length, **options)

    monkeypatch.setattr(client, "calculate_checksum", rotate_and_hash)
    checksum = sha256(source)
    with client.open_file(str(source)) as file:
        content = client.Content(transfer, file)
        assert content.read_into(memoryview(bytearray(100_000))) == 100_000
        with open(source, "ab") as writing:
            writing.write(b"more")
        with pytest.raises(client.FileChanged):
            content.compare(checksum, lambda _count: None)


def test_a_file_that_only_grows_is_sent_as_it_was_offered(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "log", 40 * MIB)
    content = source.read_bytes()

    def grow() -> None:
        with open(source, "ab") as file:
            file.write(b"more")

    result = send_and(server, source, grow)
    assert result.status == 0, result
    assert "as it was: it has grown since" in result.stdout
    assert contents(server.folder) == {"log": content}


def test_a_file_that_grows_and_changes_is_refused(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "log", 40 * MIB)

    def change() -> None:
        with open(source, "r+b") as file:
            file.write(b"other")
            file.seek(0, os.SEEK_END)
            file.write(b"more")

    result = send_and(server, source, change)
    assert result.status == 1
    assert finished(server.folder) == {}


def test_lengths_that_would_tell_a_file_byte_by_byte_are_not_answered(tmp_path: Path) -> None:
    path = make_file(tmp_path / "file", 10_000)
    source = client.look_up_file(str(path), "file", os.stat(path))
    asked = [1, 2, 4096, 4097, 9000, 10_000]
    assert list(client.hash_prefixes(source, asked, lambda size: None)) == [4096, 9000, 10_000]


@pytest.mark.parametrize("how", ["shrinks", "is truncated", "changes", "is touched"])
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
            if how == "changes":
                file.seek(-100, os.SEEK_END)
                file.write(b"other")
            else:
                file.truncate(0 if how == "is truncated" else 39 * MIB)

    with half_way(server, source, after) as (client, proxy):
        change()
        proxy.release()
        result = client.wait()
    assert result.status == 1
    assert result.error_lines == [f"{source}: it changed while it was sent"]
    assert finished(server.folder) == {"after": after.read_bytes()}
    assert partials(server.folder), "what came of it stays for the next run"
    server.wait_for("failed log")


def test_a_file_that_is_replaced_while_it_is_sent_arrives_as_it_was(
    server: Server, tmp_path: Path
) -> None:
    """As editors save: the open file stays what it was."""
    source = make_file(tmp_path / "doc", 40 * MIB)
    before = source.read_bytes()
    other = make_file(tmp_path / "new", 1000, seed=2)
    result = send_and(server, source, lambda: other.replace(source))
    assert result.status == 0, result
    assert contents(server.folder) == {"doc": before}
