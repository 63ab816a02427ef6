"""A file that cannot be read or kept fails with its reason, and the others arrive."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import (
    MIB,
    WITHOUT_PRIVILEGE,
    Proxy,
    RawClient,
    Server,
    as_root,
    contents,
    half_way,
    make_file,
    partial_size,
    partials,
    run_script,
    visible,
    with_permissions,
)

# --- sources that cannot be sent ------------------------------------------------------------


def test_a_missing_file_fails_and_the_others_arrive(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 1000)
    missing = tmp_path / "missing"
    result = server.send(missing, source, "", "a\nb")
    assert result.status == 1
    assert result.error_lines[0] == f"{missing}: no such file"
    assert result.error_lines[1] == "'': no such file"
    assert len(result.error_lines) == 3
    assert contents(server.folder) == {"file": source.read_bytes()}


@with_permissions
def test_an_unreadable_file_fails_and_the_others_arrive(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    source = make_file(tree / "file", 1000)
    for number, size in enumerate((0, 1000, 3 * MIB)):
        make_file(tree / f"secret {number}", size).chmod(0)
    (tree / "closed").mkdir(mode=0)
    result = server.send(tree, wrapper=WITHOUT_PRIVILEGE)
    (tree / "closed").chmod(0o700)
    assert result.status == 1
    expected = {f"{tree / name}: permission denied" for name in os.listdir(tree) if name != "file"}
    assert set(result.error_lines) == expected
    assert "without 4 that failed" in result.stdout
    server.wait_for_output(r"failed tree/secret 1: the client cannot read it, or it has changed")
    assert (server.folder / "tree" / "file").read_bytes() == source.read_bytes()
    assert set(contents(server.folder)) <= {"tree/", "tree/closed/", "tree/file"}


# --- a server that cannot take it -----------------------------------------------------------


@with_permissions
def test_a_folder_without_permission_fails_and_the_others_arrive(
    inbox: Path, tmp_path: Path
) -> None:
    closed = make_file(tmp_path / "closed" / "x", 1000).parent
    source = make_file(tmp_path / "file", 1000)
    inbox.mkdir()
    (inbox / "closed").mkdir(mode=0o500)
    with Server(inbox, wrapper=WITHOUT_PRIVILEGE) as server:
        result = server.send(closed, source)
    assert result.status == 1
    assert result.error_lines[0] == f"{closed / 'x'}: at the server: permission denied"
    assert contents(inbox) == {"closed/": b"", "file": source.read_bytes()}


@with_permissions
def test_a_server_that_may_not_write_does_not_start(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for folder in (closed, closed / "new"):
        result = run_script(
            "server.py", "file", "--port=0", f"--folder={folder}", wrapper=WITHOUT_PRIVILEGE
        )
        assert result.status == 1
        assert len(result.error_lines) == 1
        assert str(folder) in result.stderr
        assert "permission" in result.stderr


@as_root
def test_a_server_on_a_read_only_file_system_says_so(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=60)
    for folder in (disk, disk / "new"):
        result = run_script("server.py", "file", "--port=0", f"--folder={folder}")
        assert result.status == 1
        (line,) = result.error_lines
        assert line.startswith(f"--folder {folder}: ")
        assert line.endswith("read-only file system")


def test_a_server_whose_folder_is_a_file_does_not_start(tmp_path: Path) -> None:
    taken = make_file(tmp_path / "taken", 10)
    for folder in (taken, taken / "deeper"):
        result = run_script("server.py", "file", "--port=0", f"--folder={folder}")
        assert result.status == 1
        assert len(result.error_lines) == 1
        assert str(folder) in result.stderr


def test_the_folder_is_made_again_if_it_goes_away(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 1000)
    server.folder.rmdir()
    result = server.send(source)
    assert (result.status == 0) == (server.folder / "file").exists()
    assert len(result.error_lines) <= 1
    server.folder.mkdir(exist_ok=True)
    server.check_serves(tmp_path)


@as_root
def test_a_file_too_large_for_the_disk_is_refused_before_it_is_sent(
    disk: Path, tmp_path: Path
) -> None:
    large = make_file(tmp_path / "large", 17 * MIB)
    small = make_file(tmp_path / "small", MIB)
    with Server(disk) as server, Proxy(server.port) as link:
        result = server.send(large, small, port=link.port)
        assert link.passed < 2 * MIB
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"{large}: at the server: the disk is too full (17.8 MB needed, ")
    assert contents(disk) == {"small": small.read_bytes()}


@as_root
def test_files_that_are_too_large_together_are_refused_one_by_one(
    disk: Path, tmp_path: Path
) -> None:
    sources = [make_file(tmp_path / f"file {number}", 6 * MIB, number) for number in range(4)]
    with Server(disk) as server:
        result = server.send(*sources)
    assert result.status == 1
    assert len(result.error_lines) == 2
    assert visible(disk) == ["file 0", "file 1"]
    assert partials(disk) == []


@as_root
def test_the_rest_of_a_file_under_way_is_kept_free_for_it(disk: Path, tmp_path: Path) -> None:
    large = make_file(tmp_path / "large", 12 * MIB)
    with Server(disk) as server, half_way(server, large, hold_at=10 * MIB) as (client, proxy):
        result = server.send(make_file(tmp_path / "other", 4 * MIB))
        (line,) = result.error_lines
        assert "at the server: the disk is too full (4.2 MB needed, " in line
        proxy.release()
        assert client.wait().status == 0
    assert visible(disk) == ["large"]


@as_root
def test_space_that_is_reserved_and_not_used_is_there_for_others(
    disk: Path, tmp_path: Path
) -> None:
    small = make_file(tmp_path / "small", 8 * MIB)
    with Server(disk) as server, RawClient(server.port).greet() as idle:
        start = idle.offer(*({"path": f"{each}", "size": 7 * MIB} for each in range(3)))
        assert [each.get("offset") for each in start["entries"]] == [0, 0, None]
        assert server.send(small).status == 0
    assert visible(disk) == ["small"]


@as_root
def test_a_disk_that_fills_up_in_the_middle_is_survived(disk: Path, tmp_path: Path) -> None:
    large = make_file(tmp_path / "large", 14 * MIB)
    small = make_file(tmp_path / "small", 1000)
    with (
        Server(disk) as server,
        half_way(server, large, small, hold_at=10 * MIB) as (client, proxy),
    ):
        make_file(disk / "other", 4 * MIB)
        proxy.release()
        result = client.wait()
        assert result.status == 1
        assert result.error_lines == [f"{large}: at the server: no space left on device"]
        assert visible(disk) == ["other", "small"]
        assert partial_size(disk) > 8 * MIB, "what has come stays for the next run"
        server.wait_for("large: no space left on device")
        (disk / "other").unlink()
        with Proxy(server.port) as second:
            assert server.send(large, port=second.port).status == 0
            assert second.passed < 6 * MIB
    assert (disk / "large").read_bytes() == large.read_bytes()
    assert partials(disk) == []


@as_root
def test_a_pipe_larger_than_the_disk_stops_soon(disk: Path, tmp_path: Path) -> None:
    small = make_file(tmp_path / "small", 1000)
    with Server(disk) as server, open("/dev/zero", "rb") as endless:
        result = server.send("-", "--name", "endless", small, stdin=endless.fileno())
        assert result.status == 1
        assert result.error_lines == ["endless: at the server: no space left on device"]
        assert contents(disk) == {"small": small.read_bytes()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_that_name_stays_and_the_file_goes_beside(
    inbox: Path, tmp_path: Path, overwrite: bool
) -> None:
    source = make_file(tmp_path / "name.txt", 1000)
    make_file(inbox / "name.txt" / "inside", 10)
    (inbox / "piped").mkdir()
    with Server(inbox, *(["--overwrite"] if overwrite else [])) as server:
        result = server.send(source, "-", "--name", "piped", stdin=b"x")
        assert result.status == 0, result
        assert "Saved as name (1).txt, " in result.stdout
        assert "Saved as piped (1), " in result.stdout
    found = contents(inbox)
    assert set(found) == {"name.txt/", "name.txt/inside", "name (1).txt", "piped/", "piped (1)"}
    assert found["name (1).txt"] == source.read_bytes()


def test_a_file_where_a_folder_should_go_stays(server: Server, tmp_path: Path) -> None:
    tree = make_file(tmp_path / "name" / "deep" / "x", 1000).parent.parent
    (tree / "empty").mkdir()
    other = make_file(tmp_path / "other", 1000)
    make_file(server.folder / "name", 10)
    result = server.send(tree, other)
    assert result.status == 1
    assert (
        f"{tree / 'deep' / 'x'}: at the server: "
        "a file or a symbolic link stands where a folder should go" in result.error_lines
    )
    assert set(contents(server.folder)) == {"name", "other"}
    assert (server.folder / "name").stat().st_size == 10


def test_links_in_the_folder_lead_no_file_out(server: Server, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (server.folder / "tree").symlink_to(outside)
    (server.folder / "up").symlink_to("..")
    tree = make_file(tmp_path / "tree" / "x", 1000).parent
    up = make_file(tmp_path / "up" / "outside" / "x", 1000).parent.parent
    result = server.send(tree, up)
    assert result.status == 1
    assert (
        f"{tree / 'x'}: at the server: a file or a symbolic link stands where a folder should go"
        in result.error_lines
    )
    assert os.listdir(outside) == []
