"""Within one run, and beside others, nothing is lost, kept twice or held by who is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import string
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import SILENT_S, remove_old_leftovers
from support import (
    MIB,
    Process,
    Proxy,
    Server,
    contents,
    free_port,
    half_way,
    linux,
    make_file,
    make_partial,
    partial_size,
    partials,
    posix,
    start_client,
    visible,
    wait_for,
)


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_overwriting_never_replaces_what_the_same_run_has_saved(
    inbox: Path, tmp_path: Path, size: int
) -> None:
    sources = [make_file(tmp_path / folder / "x", size, seed) for seed, folder in enumerate("ab")]
    old = make_file(inbox / "x", size, seed=7).read_bytes()
    with Server(inbox, "--overwrite") as server:
        result = server.send(*sources)
        assert result.status == 0, result
    assert old not in contents(inbox).values()
    assert contents(inbox) == {"x": sources[0].read_bytes(), "x (1)": sources[1].read_bytes()}


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_overwriting_never_replaces_what_the_same_run_has_found_there(
    inbox: Path, tmp_path: Path, size: int
) -> None:
    sources = [make_file(tmp_path / folder / "x", size, seed) for seed, folder in enumerate("ab")]
    with Server(inbox, "--overwrite") as server:
        for _ in range(2):
            result = server.send(*sources)
            assert result.status == 0, result
    assert "Already there as x (1), " in result.stdout
    assert contents(inbox) == {"x": sources[0].read_bytes(), "x (1)": sources[1].read_bytes()}


def test_overwriting_never_replaces_what_the_same_run_saved_before_it_was_cut_off(
    inbox: Path, tmp_path: Path
) -> None:
    first = make_file(tmp_path / "a" / "x", MIB, 1)
    second = make_file(tmp_path / "b" / "x", 8 * MIB, 2)
    with Server(inbox, "--overwrite") as server, Proxy(server.port, hold_at=5 * MIB) as link:
        with start_client(link.port, first, second) as client:
            wait_for((inbox / "x").exists)
            wait_for(lambda: link.passed >= 5 * MIB)
            link.cut()
            link.release()
            result = client.wait()
        assert result.status == 0, result
    assert contents(inbox) == {"x": first.read_bytes(), "x (1)": second.read_bytes()}


def test_the_same_file_named_twice_is_kept_once(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 1000)
    large = make_file(tmp_path / "large", 3 * MIB)
    result = server.send(source, large, source, large)
    assert result.status == 0, result
    assert result.stdout.count("Already there as ") == 2
    assert visible(server.folder) == ["file", "large"]


def test_the_same_content_under_one_name_by_two_clients_is_kept_once(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file", 20 * MIB)
    with half_way(server, source, hold_at=10 * MIB) as (client, proxy):
        assert server.send(source).status == 0
        proxy.release()
        result = client.wait()
        assert result.status == 0
        assert "Already there as file, " in result.stdout
    assert visible(server.folder) == ["file"]


def test_a_client_takes_over_from_its_connection_that_fell_silent(
    server: Server, tmp_path: Path
) -> None:
    """As after a change of address, of which no word reaches the server."""
    source = make_file(tmp_path / "file", 40 * MIB)
    with half_way(server, source, hold_at=30 * MIB, written=28 * MIB) as (client, _):
        client.signal(signal.SIGSTOP)  # and its connection stays
        stopped_s = time.monotonic()
        wait_for(lambda: time.monotonic() - stopped_s > SILENT_S, "what counts as silence")
        with Proxy(server.port) as second:
            result = server.send(source, port=second.port)
            assert result.status == 0, result
            assert second.passed < 14 * MIB, "goes on, and does not begin again"
    assert contents(server.folder) == {"file": source.read_bytes()}


def test_a_folder_that_is_deleted_while_the_server_runs_is_made_anew(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "tree" / "file", 1000).parent
    assert server.send(source).status == 0
    shutil.rmtree(server.folder)
    assert server.send(source).status == 0
    assert set(contents(server.folder)) == {"tree/", "tree/file"}


@linux
def test_a_week_later_what_nobody_has_finished_is_removed(inbox: Path) -> None:
    old, new = (make_partial(inbox / "deep", name, b"x") for name in ("old", "new"))
    kept = make_file(inbox / "deep" / "old", 10)
    week_ago = time.time() - 8 * 24 * 3600
    for path in (old, kept):
        os.utime(path, (week_ago, week_ago))
    with Server(inbox):
        wait_for(lambda: partials(inbox) == [new])
    assert kept.exists()


@linux
def test_a_tree_too_deep_to_look_for_leftovers_does_not_end_the_server(
    inbox: Path, tmp_path: Path
) -> None:
    make_file(inbox / "/".join("d" * 40) / "file", 1)
    with Server(inbox, wrapper=("prlimit", "--nofile=32:32", "--")) as server:
        server.check_serves(tmp_path)
    remove_old_leftovers(str(tmp_path / "gone"))


@contextlib.contextmanager
def deep_tree(top: Path, name: str, depth: int) -> Iterator[int]:
    """Have so many folders inside each other in `top`, more than a path has room for.

    Gives a descriptor of the innermost.
    """
    place = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=place)
        inner = os.open(name, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    try:
        yield place
    finally:
        os.close(place)
        subprocess.run(["rm", "-r", str(top / name)], check=True, timeout=60)


@linux
def test_a_tree_too_deep_to_look_through_keeps_no_old_partial_file_beside_it(inbox: Path) -> None:
    week_ago = time.time() - 8 * 24 * 3600
    for letter in string.ascii_lowercase:
        os.utime(make_partial(inbox / letter, "old", b"x"), (week_ago, week_ago))
    with deep_tree(inbox / "m", "d", 2_000):
        remove_old_leftovers(str(inbox))
        assert [letter for letter in os.listdir(inbox) if os.listdir(inbox / letter)] == ["m"]
        assert os.listdir(inbox / "m") == ["d"]


@linux
def test_an_old_partial_file_is_removed_whose_path_is_longer_than_the_system_takes(
    inbox: Path, tmp_path: Path
) -> None:
    inbox.mkdir()
    old = make_partial(tmp_path, "old", b"x")
    week_ago = time.time() - 8 * 24 * 3600
    os.utime(old, (week_ago, week_ago))
    with deep_tree(inbox, "d" * 250, 20) as innermost:
        os.rename(old, old.name, dst_dir_fd=innermost)
        remove_old_leftovers(str(inbox))
        assert os.listdir(innermost) == []


@posix
def test_an_old_partial_file_behind_a_link_is_left_alone(inbox: Path, tmp_path: Path) -> None:
    inbox.mkdir()
    old = make_partial(tmp_path / "elsewhere", "old", b"x")
    week_ago = time.time() - 8 * 24 * 3600
    os.utime(old, (week_ago, week_ago))
    (inbox / "folder").symlink_to(old.parent)
    (inbox / old.name).symlink_to(old)
    remove_old_leftovers(str(inbox))
    assert old.exists()


def test_what_came_of_a_segment_is_kept(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 900_000)
    with Proxy(server.port, hold_at=500_000) as link:
        with server.client(source, port=link.port) as client:
            link.wait_until_held()
            client.kill()
        link.cut()
        wait_for(lambda: partial_size(server.folder) > 400_000)
    with Proxy(server.port) as second:
        assert server.send(source, port=second.port).status == 0
        assert second.passed < 500_000
    assert contents(server.folder) == {"file": source.read_bytes()}


@linux
def test_the_receivers_terminal_shows_who_sends_what_and_how_far_it_is(
    inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "film.mkv", 20 * MIB)
    port = free_port()
    arguments = ("server.py", "file", "--port", str(port), "--folder", str(inbox))
    with Process(*arguments, terminal=True) as server:
        server.wait_for_output(r"Ctrl\+C to stop")
        with (
            Proxy(port, hold_at=10 * MIB) as link,
            start_client(link.port, source) as client,
        ):
            server.wait_for_output(r"film\.mkv \d+ % of 21\.0 MB, [\d.]+ .B/s from 127\.0\.0\.1")
            link.release()
            assert client.wait().status == 0
        server.wait_for_output(r"1 file from 127|, saved as .*film\.mkv")
