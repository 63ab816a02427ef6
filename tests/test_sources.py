"""Whatever the user names has a name at the server, or a line that says why it is not sent."""

from __future__ import annotations

import contextlib
import ntpath
import os
import posixpath
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import client
from support import MIB, Server, as_root, contents, linux, make_file, make_partial, posix

if sys.platform != "win32":
    import fcntl


@pytest.mark.parametrize(
    ("path", "name"),
    [("/", "root"), ("//", "root"), ("/usr/", "usr"), ("/usr/.", "usr")],
)
def test_a_root_has_a_name(path: str, name: str) -> None:
    assert client.offered_name(path, posixpath) == name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("E:\\", "E"),
        ("\\\\server\\share", "share"),
        ("\\\\server\\share\\", "share"),
        ("\\\\server\\share\\x", "x"),
        ("C:\\Users\\me\\", "me"),
    ],
)
def test_a_drive_and_a_share_have_a_name(path: str, name: str) -> None:
    assert client.offered_name(path, ntpath) == name


@posix
def test_a_pipe_that_stands_in_a_files_place_by_now_is_not_waited_for(tmp_path: Path) -> None:
    found = os.stat(make_file(tmp_path / "file", 0))
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        client.look_up_file(str(tmp_path / "pipe"), "file", found)
    os.close(descriptor)


@posix
@pytest.mark.parametrize("year", [1601, 2300, 9999])
def test_a_date_far_away_does_no_harm(server: Server, tmp_path: Path, year: int) -> None:
    source = make_file(tmp_path / "old", 10)
    after = make_file(tmp_path / "after", 20)
    seconds = int((year - 1970) * 365.2425 * 86_400)
    os.utime(source, (seconds, seconds))
    result = server.send(source, after)
    assert result.status == 0, result
    assert set(contents(server.folder)) == {"old", "after"}


@posix
def test_a_broken_link_in_a_folder_is_a_line_and_no_failure(server: Server, tmp_path: Path) -> None:
    tree = make_file(tmp_path / "tree" / "x", 10).parent
    (tree / "broken").symlink_to("nowhere")
    (tree / "loop").symlink_to("loop")
    result = server.send(tree)
    assert result.status == 0, result
    assert result.error_lines == [
        f"{tree / name}: a broken link, left out" for name in ("broken", "loop")
    ]
    assert "without" not in result.stdout


@posix
def test_a_pipe_that_is_named_is_told_how_it_can_be_sent(server: Server, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = server.send(tmp_path / "pipe")
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"{tmp_path / 'pipe'}: a pipe, not a file: ")
    assert line.endswith(" file - --name NAME")


@linux
@pytest.mark.parametrize("path", [".", "x"])
def test_a_deleted_working_folder_is_named(server: Server, tmp_path: Path, path: str) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    delete = f'cd {folder} && rmdir {folder} && exec "$0" "$@"'
    result = server.send(path, wrapper=("sh", "-c", delete))
    assert result.status == 1
    assert "the folder that this command runs in is gone" in result.stderr


@linux
def test_virtual_files_arrive_with_what_they_hold(server: Server, tmp_path: Path) -> None:
    virtual = ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"]
    result = server.send(*virtual)
    assert result.status == 0, result
    for path in virtual:
        content = Path(path).read_bytes()
        assert content
        assert (server.folder / Path(path).name).read_bytes() == content


@linux
def test_the_size_of_a_folder_of_virtual_files_is_that_of_what_they_hold(server: Server) -> None:
    folder = Path("/sys/kernel/mm/transparent_hugepage/khugepaged")
    result = server.send(folder)
    assert result.status == 0, result
    sizes = [path.stat().st_size for path in (server.folder / folder.name).iterdir()]
    assert 0 < sum(sizes) < 1000
    assert f"with {len(sizes)} files ({sum(sizes)} bytes)" in result.stdout


def test_unfinished_files_of_a_server_are_left_out(server: Server, tmp_path: Path) -> None:
    tree = make_file(tmp_path / "tree" / "x", 10).parent
    partial = make_partial(tree, "y", b"begins")
    result = server.send(tree)
    assert result.status == 0, result
    assert result.error_lines == [f"{partial}: a server's unfinished file, left out"]
    assert set(contents(server.folder)) == {"tree/", "tree/x"}


def test_the_servers_own_folder_is_left_out_of_a_folder_around_it(
    server: Server, tmp_path: Path
) -> None:
    make_file(server.folder / "old", 10)
    make_file(tmp_path / "x", 20)
    result = server.send(tmp_path)
    assert result.status == 0, result
    assert result.error_lines == [f"{server.folder}: the server's own folder, left out"]
    assert set(contents(server.folder)) == {"old", f"{tmp_path.name}/", f"{tmp_path.name}/x"}


def test_the_servers_own_folder_is_not_sent_into_itself(server: Server, tmp_path: Path) -> None:
    make_file(server.folder / "old", 10)
    result = server.send(server.folder)
    assert result.status == 1
    assert "the server's own folder" in result.stderr
    assert set(contents(server.folder)) == {"old"}


@as_root
def test_a_folder_of_another_machine_with_the_numbers_of_the_servers_own_is_sent(
    server: Server, tmp_path: Path
) -> None:
    """As through a tunnel between two machines that were made from one image."""
    source = make_file(server.folder / "file", 10)
    boot_id = make_file(tmp_path / "boot_id", 0)
    boot_id.write_text("another machine's")
    hide = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    wrapper = ("unshare", "--mount", "sh", "-c", hide, str(boot_id))
    result = server.send(server.folder, wrapper=wrapper)
    assert result.status == 0, result
    arrived = server.folder / server.folder.name / "file"
    assert arrived.read_bytes() == source.read_bytes()


@contextlib.contextmanager
def leased(path: Path) -> Iterator[None]:
    """Have a lease on a file, as Samba has on those that its clients have open.

    It is given up as soon as another program asks for it.
    """
    with open(path, "r+b") as file:
        before = signal.signal(
            signal.SIGIO, lambda *_: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        )
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield
        finally:
            signal.signal(signal.SIGIO, before)


@linux
@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_a_file_that_another_program_has_a_lease_on_is_waited_for(
    server: Server, tmp_path: Path, size: int
) -> None:
    source = make_file(tmp_path / "file", size)
    with leased(source):
        assert server.send(source).status == 0


@linux
@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_a_file_that_is_there_is_compared_also_where_another_program_has_a_lease_on_it(
    server: Server, tmp_path: Path, size: int
) -> None:
    source = make_file(tmp_path / "file", size)
    server.folder.mkdir(exist_ok=True)
    there = shutil.copyfile(source, server.folder / "file")
    with leased(there):
        result = server.send(source)
    assert result.stdout.startswith("Already there as file, SHA-256 matches")
