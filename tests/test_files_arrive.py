"""Files and folders arrive as they are, whatever their names, sizes and kinds."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from support import (
    MIB,
    WITHOUT_PRIVILEGE,
    RawClient,
    Server,
    contents,
    control_codes,
    linux,
    make_file,
    posix,
    sha256,
    visible,
    wait_for,
    with_permissions,
)

if sys.platform != "win32":
    import fcntl
    import termios

# --- what arrives ---------------------------------------------------------------------------


def test_files_and_folders_arrive_as_they_are(server: Server, tmp_path: Path) -> None:
    one = make_file(tmp_path / "one.bin", 3 * MIB + 17)
    empty = make_file(tmp_path / "empty", 0)
    tree = tmp_path / "tree"
    make_file(tree / "deep" / "er" / "two.bin", 5000, seed=2)
    make_file(tree / "three.bin", 1, seed=3)
    make_file(tree / "nothing", 0)
    (tree / "empty folder" / "inner").mkdir(parents=True)
    result = server.send(one, empty, tree)
    assert result.status == 0, result
    assert result.stderr == ""
    assert contents(server.folder) == {
        "one.bin": one.read_bytes(),
        "empty": b"",
        "tree/": b"",
        **{f"tree/{name}": content for name, content in contents(tree).items()},
    }
    lines = result.stdout.splitlines()
    assert lines[0] == f"Saved as one.bin, SHA-256 matches ({sha256(one)[:8]}...)"
    assert lines[1] == "Saved as empty, SHA-256 matches (e3b0c442...)"
    assert lines[2] == "Saved tree/ with 3 files (5.0 kB), every SHA-256 matches"
    assert len(lines) == 3


def test_an_empty_folder_arrives(server: Server, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = server.send(tmp_path / "empty")
    assert result.status == 0
    assert contents(server.folder) == {"empty/": b""}
    assert result.stdout == "Saved empty/ with 0 files (0 bytes)\n"


def test_a_folder_that_is_there_already_is_said_to_be(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(3):
        make_file(tree / f"{number}", 1000, seed=number)
    assert server.send(tree).status == 0
    known = "tree/ with 3 files (3.0 kB), every SHA-256 matches"
    assert server.send(tree).stdout == f"Already there as {known}\n"
    make_file(tree / "0", 1000, seed=9)
    assert server.send(tree, "--verbose").stdout.endswith(f"Saved {known}, 2 there already\n")


@pytest.mark.parametrize("path", [".", "./", "../here", "../here/"])
def test_a_folder_named_in_an_odd_way_keeps_its_name(
    server: Server, tmp_path: Path, path: str
) -> None:
    make_file(tmp_path / "here" / "x", 10)
    assert server.send(path, cwd=tmp_path / "here").status == 0
    assert set(contents(server.folder)) == {"here/", "here/x"}


def test_the_largest_name_and_a_deep_tree_arrive(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make_file(tree / ("x" * 255), 10)
    make_file(tree / "é" / ("é" * 127), 10)
    make_file(tree.joinpath(*(["d"] * 300)) / "deep", 10)
    result = server.send(tree)
    assert result.status == 0, result
    assert contents(server.folder / "tree") == contents(tree)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 4 * MIB, 9 * MIB + 5])
def test_files_of_sizes_around_a_segment_arrive(server: Server, tmp_path: Path, size: int) -> None:
    source = make_file(tmp_path / "file", size)
    assert server.send(source).status == 0
    assert contents(server.folder) == {"file": source.read_bytes()}


@linux
def test_odd_names_arrive_and_never_reach_a_terminal_raw(server: Server, tmp_path: Path) -> None:
    tree = os.fsencode(tmp_path / "tree")
    os.mkdir(tree)
    names = [
        "Grüße, 世界 🎉".encode(),
        b"'single' \"double\" `back`",
        b"-rf",
        b"--help",
        b"~",
        b"*?[a]",
        b"a\\b",
        b"C:",
        b"CON",
        b" blanks ",
        b"...",
        b"line\nbreak\r",
        b"\x1b[2J\x1b]0;away\x07 control \x9b",
        "\u202eright to left, \u200b zero width".encode(),
        b"not UTF-8 \xff\xfe caf\xe9",
        b"$(touch injected)",
        b"%s%n{0}",
    ]
    for number, name in enumerate(names):
        with open(os.path.join(tree, name), "wb") as file:
            file.write(b"%d" % number)
    result = server.send("-v", tree)
    assert result.status == 0, result
    arrived = os.fsencode(server.folder / "tree")
    assert sorted(os.listdir(arrived)) == sorted(names)
    for number, name in enumerate(names):
        with open(os.path.join(arrived, name), "rb") as file:
            assert file.read() == b"%d" % number
    server.wait_for(", saved as ", times=len(names))
    log = server.text()
    assert log.count(", saved as ") == len(names)
    for printed in (log, result.stdout, result.stderr):
        assert control_codes(printed) == set()


@linux
def test_odd_names_are_escaped_where_they_fail(server: Server, tmp_path: Path) -> None:
    (server.folder / "in the way").mkdir()
    for name in (b"\x1b[2J gone", b"\xff\x07 gone"):
        result = server.send(os.fsencode(tmp_path) + b"/" + name)
        assert result.status == 1
        assert control_codes(result.stdout + result.stderr) == set()
        assert "no such file" in result.stderr
    with RawClient(server.port).greet() as client:
        verdict = client.offer(
            {"path": "../\x1b[2J", "size": 1}, {"path": "\x1b]0;x\x07/..", "size": 1}
        )
    assert all("failed" in entry for entry in verdict["entries"])
    wait_for(lambda: server.stderr().count("failed") == 2)
    assert control_codes(server.stdout() + server.stderr()) == set()


def test_names_with_a_leading_dash_come_after_two_dashes(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "-rf", 10)
    assert server.send("--", "-rf", cwd=tmp_path).status == 0
    assert contents(server.folder) == {"-rf": source.read_bytes()}


def test_messages_reach_a_stream_that_knows_only_ascii(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "Grüße.txt", 10)
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = server.send(source, env=env)
    assert result.status == 0, result
    assert "Saved as Gr" in result.stdout
    assert contents(server.folder) == {"Grüße.txt": source.read_bytes()}


def test_standard_input_arrives_under_its_name(server: Server, tmp_path: Path) -> None:
    content = os.urandom(3 * MIB + 1)
    result = server.send("-", "--name", "dump.bin", stdin=content)
    assert result.status == 0, result
    assert contents(server.folder) == {"dump.bin": content}
    result = server.send("-", "--name", "sub/empty.bin", stdin=b"")
    assert result.status == 0, result
    assert result.stdout == "Saved as sub/empty.bin, SHA-256 matches (e3b0c442...)\n"
    assert (server.folder / "sub" / "empty.bin").read_bytes() == b""


@posix
def test_a_standard_input_that_is_closed_arrives_as_an_empty_file(server: Server) -> None:
    closed = ("sh", "-c", 'exec "$@" <&-', "sh")
    result = server.send("-", "--name", "empty", wrapper=closed)
    assert result.status == 0, result
    assert contents(server.folder) == {"empty": b""}


@posix
def test_a_pipe_that_pauses_arrives_whole_among_other_files(server: Server, tmp_path: Path) -> None:
    first, last = make_file(tmp_path / "first", 10), make_file(tmp_path / "last", 20)
    args = ("-", "--name", "piped")
    with server.client(first, *args, last, stdin=subprocess.PIPE) as client:
        pipe = client.popen.stdin
        assert pipe
        for part in (b"one ", b"two ", b"three"):
            pipe.write(part)
            pipe.flush()
            wait_for(lambda: is_empty(pipe), "the client has taken it")
        assert client.running()
        assert not (server.folder / "piped").exists()
        pipe.close()
        assert client.wait().status == 0
    assert contents(server.folder) == {
        "first": first.read_bytes(),
        "last": last.read_bytes(),
        "piped": b"one two three",
    }


def is_empty(pipe: IO[bytes]) -> bool:
    """Return whether nothing that was written to a pipe is still in it."""
    return fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4)


@linux
def test_folders_in_a_folder_of_a_group_are_of_that_group(server: Server, tmp_path: Path) -> None:
    make_file(tmp_path / "tree" / "below" / "file", 10)
    server.folder.chmod(0o2770)
    assert server.send(tmp_path / "tree").status == 0
    for folder in ("tree", "tree/below"):
        assert (server.folder / folder).stat().st_mode & stat.S_ISGID, folder


@pytest.mark.parametrize("name", ["../out", "/abs", "a/../../b", ".", "..", "x\n\x1b[2J/../y"])
def test_a_name_for_standard_input_leads_nowhere_else(
    server: Server, tmp_path: Path, name: str
) -> None:
    result = server.send("-", "--name", name, stdin=b"content")
    assert result.status == 1
    assert contents(server.folder) == {}
    assert set(visible(tmp_path)) == {"inbox"}


def test_times_and_the_executable_bit_arrive(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    program = make_file(tree / "bin" / "program", 100)
    program.chmod(0o755)
    plain = make_file(tree / "plain", 100)
    plain.chmod(0o644)
    times = {
        program: 1_000_000_000_123_456_789,
        plain: 1,
        tree / "bin": 500_000_000 * 10**9,
        tree: 600_000_000 * 10**9,
    }
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))
    assert server.send(tree).status == 0
    for path, time_ns in times.items():
        assert (server.folder / path.relative_to(tmp_path)).stat().st_mtime_ns == time_ns
    assert (server.folder / "tree" / "bin" / "program").stat().st_mode & 0o111
    assert not (server.folder / "tree" / "plain").stat().st_mode & 0o111
    assert stat.S_IMODE((server.folder / "tree" / "plain").stat().st_mode) & 0o600 == 0o600


def test_a_time_before_1970_arrives(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "old", 10)
    os.utime(source, ns=(-(10**18), -(10**18)))
    assert server.send(source).status == 0
    assert (server.folder / "old").stat().st_mtime_ns == -(10**18)


def test_links_to_files_are_followed_and_links_to_folders_are_not(
    server: Server, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    real = make_file(tmp_path / "elsewhere" / "real", 100)
    tree.mkdir()
    (tree / "file").symlink_to(real)
    (tree / "folder").symlink_to(real.parent)
    (tree / "loop").symlink_to(".")
    result = server.send(tree)
    assert result.status == 0
    assert contents(server.folder) == {"tree/": b"", "tree/file": real.read_bytes()}
    assert not (server.folder / "tree" / "file").is_symlink()
    assert sum("a link to a folder, not followed" in line for line in result.error_lines) == 2


def test_a_named_link_to_a_folder_is_followed(server: Server, tmp_path: Path) -> None:
    make_file(tmp_path / "real" / "x", 10)
    (tmp_path / "link").symlink_to("real")
    assert server.send(tmp_path / "link").status == 0
    assert set(contents(server.folder)) == {"link/", "link/x"}


@linux
def test_what_is_neither_file_nor_folder_is_not_waited_for(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make_file(tree / "x", 10)
    os.mkfifo(tree / "pipe")
    (tree / "dangling").symlink_to("nowhere")
    result = server.send(tree, "/dev/zero")
    assert result.status == 1
    assert set(contents(server.folder)) == {"tree/", "tree/x"}
    assert f"{tree}/pipe: not a file or a folder" in result.error_lines
    assert f"{tree}/dangling: a broken link, left out" in result.error_lines
    assert "/dev/zero: not a file or a folder" in result.error_lines


@with_permissions
def test_each_folder_counts_its_own_failures(server: Server, tmp_path: Path) -> None:
    for name, failures in (("one", 1), ("two", 0), ("three", 2)):
        make_file(tmp_path / name / "x", 10)
        for number in range(failures):
            make_file(tmp_path / name / f"secret {number}", 10).chmod(0)
    named = ("missing", "two/missing", "one", "two", "three", "missing too")
    result = server.send(*named, cwd=tmp_path, wrapper=WITHOUT_PRIVILEGE)
    assert result.status == 1
    lines = result.stdout.splitlines()
    assert [re.findall(r"\w+/ with|\d that failed", line) for line in lines] == [
        ["one/ with", "1 that failed"],
        ["two/ with"],
        ["three/ with", "2 that failed"],
    ]
    assert len(result.error_lines) == 6


def test_two_thousand_small_files_arrive(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "many"
    for number in range(2000):
        make_file(tree / f"{number % 20}" / f"file {number}", number % 700, seed=number)
    result = server.send(tree)
    assert result.status == 0, result
    assert contents(server.folder / "many") == contents(tree)
    assert "Saved many/ with 2000 files" in result.stdout
    again = server.send(tree)
    assert again.status == 0
    assert contents(server.folder / "many") == contents(tree), "no second copies"


# --- what is shown --------------------------------------------------------------------------


def test_many_names_that_take_much_of_a_message_arrive(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(600):
        make_file(tree / ("\x01" * 240 + str(number)), 0)
    result = server.send(tree)
    assert result.status == 0, result
    assert contents(server.folder / "tree") == contents(tree)


@with_permissions
def test_two_folders_of_one_name_each_count_their_own_files(server: Server, tmp_path: Path) -> None:
    """Also those that the server has already, which it tells before all others."""
    for number, name in enumerate(("a/x/one", "b/x/two", "b/x/sub/three")):
        make_file(tmp_path / name, 10, seed=number)
    named = ("a/x/", "./b/x")
    assert server.send(*named, cwd=tmp_path).status == 0
    make_file(tmp_path / "a" / "x" / "new", 10, seed=7)
    (tmp_path / "b" / "x" / "sub").chmod(0)
    result = server.send(*named, cwd=tmp_path, wrapper=WITHOUT_PRIVILEGE)
    assert result.stdout.splitlines() == [
        "Saved x/ with 2 files (20 bytes), every SHA-256 matches, 1 there already",
        "Saved x/ with 1 file (10 bytes), every SHA-256 matches, 1 there already, "
        "without 1 that failed",
    ]
