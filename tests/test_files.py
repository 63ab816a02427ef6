"""Files from one script to the other, as users run them: what arrives, and what is said."""

from __future__ import annotations

import os
import re
import select
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

import client
from common import Keepalive
from support import (
    HOST,
    LIMIT_S,
    MIB,
    ROOT,
    Link,
    Process,
    RawClient,
    Result,
    Server,
    contents,
    control_codes,
    environment,
    free_port,
    make_file,
    make_partial,
    make_sparse,
    partial_size,
    run_script,
    send,
    sha256,
    visible,
    wait_for,
)

posix = pytest.mark.skipif(os.name != "posix", reason="has no such links and times")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def in_terminal(
    script: str, *args: str, cwd: Path | None = None, width: int = 100
) -> pexpect.spawn[str]:
    """Start a script in a pseudo-terminal, as a user does."""
    env = {**environment(), "TERM": "xterm", "HOME": str(cwd or ROOT), "INPUTRC": os.devnull}
    return pexpect.spawn(
        sys.executable,
        [str(ROOT / script), *args],
        cwd=cwd,
        env=env,
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 100),
    )


def matched(terminal: pexpect.spawn[str]) -> str:
    """Return the group of the pattern that was expected last."""
    assert isinstance(terminal.match, re.Match)
    return str(terminal.match[1])


def expect_end(terminal: pexpect.spawn[str]) -> tuple[int | None, str]:
    """Wait until a script in a terminal ends; return its status and what it printed last."""
    terminal.expect(pexpect.EOF)
    terminal.close()
    return terminal.exitstatus, terminal.before or ""


# --- the prompts --------------------------------------------------------------------------------


def test_the_classic_session_in_two_terminals(tmp_path: Path) -> None:
    source = make_file(tmp_path / "report.pdf", 3 * MIB)
    server = in_terminal("server.py", "--port", "0", cwd=tmp_path)
    try:
        server.expect_exact("Mode (file/audio): ")
        server.sendline("file")
        server.expect(r"Receiving into received/ on 127\.0\.0\.1:(\d+) - Ctrl\+C to stop\r\n")
        port = matched(server)
        client = in_terminal("client.py", "--port", port, cwd=tmp_path)
        client.expect_exact("Mode (file/audio): ")
        client.sendline("file")
        client.expect_exact("File name: ")
        client.sendline("report.pdf")
        client.expect(r"report\.pdf: 100%.*3\.\d*M/3\.\d*M.*B/s")
        client.expect(r"Saved as report\.pdf, SHA-256 matches \((\w{8})\.\.\.\)\r\n")
        assert matched(client) == sha256(source)[:8]
        assert expect_end(client) == (0, "")
        server.expect_exact("saved as received/report.pdf")
        server.sendintr()
        assert expect_end(server)[0] == 130
    finally:
        server.close(force=True)
    assert (tmp_path / "received" / "report.pdf").read_bytes() == source.read_bytes()


def test_the_classic_session_through_pipes(tmp_path: Path) -> None:
    source = make_file(tmp_path / "report.pdf", 1000)
    with Process("server.py", "--port", "0", stdin=b"file\n", cwd=tmp_path) as server:
        port = server.wait_for_output(r"on 127\.0\.0\.1:(\d+) - Ctrl\+C to stop\n")[1]
        assert server.stdout().splitlines() == [
            "Mode (file/audio): file",
            f"Receiving into received/ on 127.0.0.1:{port} - Ctrl+C to stop",
        ]
        result = run_script("client.py", "--port", port, stdin=b"file\nreport.pdf\n", cwd=tmp_path)
    assert result.status == 0
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "Mode (file/audio): file",
        "File name: report.pdf",
        f"Saved as report.pdf, SHA-256 matches ({sha256(source)[:8]}...)",
    ]
    assert (tmp_path / "received" / "report.pdf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_an_unknown_mode_is_asked_for_again(script: str, tmp_path: Path) -> None:
    result = run_script(script, stdin=b"files\n\nvideo\n", cwd=tmp_path)
    assert result.status == 1
    assert result.stdout.count("Mode (file/audio): ") == 4
    assert result.stdout.count("please type file or audio") == 3


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_the_mode_may_be_typed_in_capitals_and_with_blanks(script: str, tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_script(script, "--port", port, stdin=b" File \nx\n", cwd=tmp_path)
    assert result.stdout.count("Mode (file/audio): ") == 1
    assert "please type" not in result.stdout


@pytest.mark.parametrize(
    ("script", "args"),
    [("server.py", ()), ("client.py", ()), ("client.py", ("file",))],
)
def test_end_of_input_at_a_prompt_ends_with_one_line(
    script: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    result = run_script(script, *args, cwd=tmp_path)
    assert result.status == 1
    assert [line for line in result.error_lines if line] == [
        line for line in result.error_lines if "end of input" in line
    ]
    assert "end of input" in result.stderr


def test_ctrl_c_at_a_prompt_is_no_error_message(tmp_path: Path) -> None:
    for script in ("server.py", "client.py"):
        terminal = in_terminal(script, cwd=tmp_path)
        terminal.expect_exact("Mode (file/audio): ")
        terminal.sendintr()
        status, printed = expect_end(terminal)
        assert status == 130
        assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("plain.txt", "  plain.txt  "),
        ("a file.txt", "'a file.txt'"),
        ("a file.txt", '"a file.txt"'),
        ("a file.txt", "a file.txt"),
        ("a file.txt", r"a\ file.txt"),
        ("home.txt", "~/home.txt"),
        ("home.txt", "'~/home.txt'"),
        ("'quoted'", "'quoted'"),
        ("back\\slash", "back\\slash"),
        (" blank", " blank"),
        ("café.txt", "café.txt"),
    ],
)
def test_the_file_prompt_takes_names_as_people_write_them(
    server: Server, tmp_path: Path, name: str, typed: str
) -> None:
    source = make_file(tmp_path / "home" / name, 100)
    result = run_script(
        "client.py",
        "file",
        "--port",
        str(server.port),
        stdin=f"\n{typed}\n".encode(),
        cwd=source.parent,
        env={"HOME": str(source.parent), "USERPROFILE": str(source.parent)},
    )
    assert result.status == 0, result
    assert result.stdout.startswith("File name: \nFile name: "), "an empty answer is asked again"
    assert contents(server.folder) == {name: source.read_bytes()}


def test_tab_completes_names_in_a_terminal(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="this Python was built without readline")
    make_file(tmp_path / "home" / "some folder" / "unmistakable name.txt", 100)
    client = in_terminal("client.py", "--port", str(server.port), "file", cwd=tmp_path / "home")
    client.expect_exact("File name: ")
    client.send("so\t")
    client.expect_exact("some folder/")
    client.send("unm\t")
    client.expect_exact("unmistakable name.txt")
    client.send("\r")
    client.expect_exact("Saved as unmistakable name.txt")
    assert expect_end(client)[0] == 0


def test_tab_completes_below_the_home_folder(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="this Python was built without readline")
    make_file(tmp_path / "home" / "unmistakable.txt", 100)
    client = in_terminal("client.py", "--port", str(server.port), "file", cwd=tmp_path / "home")
    client.expect_exact("File name: ")
    client.send("~/unm\t")
    client.expect_exact("istakable.txt")
    client.send("\r")
    client.expect_exact("Saved as unmistakable.txt")
    assert expect_end(client)[0] == 0


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["server.py", "client.py"])
@pytest.mark.parametrize("port", ["-1", "65536", "x", "", "1.5", "٣", "99999999999999999999"])
def test_a_bad_port_is_a_wrong_argument(script: str, port: str) -> None:
    result = run_script(script, "file", f"--port={port}")
    assert result.status == 2
    assert "--port" in result.error_lines[-1]


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "*", "..", "x" * 300])
def test_an_address_that_is_not_this_machines_is_one_line(host: str, tmp_path: Path) -> None:
    result = run_script("server.py", "file", "--port", "0", f"--host={host}", cwd=tmp_path)
    assert result.status == 1
    assert result.error_lines[-1].startswith(f"cannot listen on {host}"), result


@pytest.mark.parametrize("count", ["0", "-1", "many", ""])
def test_a_bad_number_of_clients_is_a_wrong_argument(count: str) -> None:
    result = run_script("server.py", "file", f"--max-clients={count}")
    assert result.status == 2
    assert "--max-clients" in result.error_lines[-1]


@pytest.mark.parametrize(
    "command",
    [
        "client.py file -",
        "client.py file - - --name x",
        "client.py file some --name x",
        "client.py file some --latency 20",
        "client.py file some --find --host 192.0.2.1",
        "client.py audio some",
        "client.py video",
        "client.py file -q -v some",
        "client.py file --unknown",
        "server.py file --rate 48000",
        "server.py audio --overwrite",
    ],
)
def test_arguments_that_make_no_sense_are_refused(command: str) -> None:
    script, *args = command.split()
    result = run_script(script, *args)
    assert result.status == 2
    assert result.error_lines[-1].startswith(f"{script}: error: ")


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_help_and_version_are_there(script: str) -> None:
    assert re.fullmatch(r"Socket Pair \d+\.\d+\.\d+\n", run_script(script, "--version").stdout)
    shown = run_script(script, "--help")
    assert shown.status == 0
    assert "examples:" in shown.stdout
    assert script in shown.stdout


# --- what arrives -------------------------------------------------------------------------------


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
    log = server.stdout() + server.stderr()
    assert len(log.splitlines()) == 1 + len(names)
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
    assert (server.folder / "sub" / "empty.bin").read_bytes() == b""


def test_a_pipe_that_pauses_arrives_whole_among_other_files(server: Server, tmp_path: Path) -> None:
    first, last = make_file(tmp_path / "first", 10), make_file(tmp_path / "last", 20)
    args = ("-", "--name", "piped")
    with server.client(first, *args, last, stdin=subprocess.PIPE) as client:
        pipe = client.popen.stdin
        assert pipe
        for part in (b"one ", b"two ", b"three"):
            pipe.write(part)
            pipe.flush()
            assert not select.select([], [], [], 0.1)[0]
        assert client.running()
        assert not (server.folder / "piped").exists()
        pipe.close()
        assert client.wait().status == 0
    assert contents(server.folder) == {
        "first": first.read_bytes(),
        "last": last.read_bytes(),
        "piped": b"one two three",
    }


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
    assert f"{tree}/dangling: no such file" in result.error_lines
    assert "/dev/zero: not a file or a folder" in result.error_lines


def test_each_folder_counts_its_own_failures(server: Server, tmp_path: Path) -> None:
    for name, failures in (("one", 1), ("two", 0), ("three", 2)):
        make_file(tmp_path / name / "x", 10)
        for number in range(failures):
            (tmp_path / name / f"dangling {number}").symlink_to("nowhere")
    result = server.send("missing", "one", "two", "three", "missing too", cwd=tmp_path)
    assert result.status == 1
    lines = result.stdout.splitlines()
    assert [re.findall(r"\w+/ with|\d that failed", line) for line in lines] == [
        ["one/ with", "1 that failed"],
        ["two/ with"],
        ["three/ with", "2 that failed"],
    ]
    assert len(result.error_lines) == 5


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


@linux
def test_a_large_file_arrives_in_little_memory(server: Server, tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "large", 1024 * MIB)
    result, peak = send_measured(server, source)
    assert result.status == 0, result
    arrived = server.folder / "large"
    try:
        assert arrived.stat().st_size == 1024 * MIB
        with open(arrived, "rb") as file:
            assert file.read(8) == b"begins\0\0"
            file.seek(-6, os.SEEK_END)
            assert file.read() == b"\0\0ends"
        assert 0 < peak < 80, "the client's memory in MiB"
        assert server.peak_mib() < 80, "the server's memory in MiB"
    finally:
        arrived.unlink()


@linux
def test_a_file_over_4_gib_is_gone_on_with_in_little_memory(server: Server, tmp_path: Path) -> None:
    """Most of it is there already, as holes: a disk takes long to write so much."""
    size = 4 * 1024 * MIB + 5
    source = make_sparse(tmp_path / "large", size)
    partial = make_partial(server.folder, "large", b"begins")
    os.truncate(partial, size - 9 * MIB)
    with Link(server.port) as link:
        result, peak = send_measured(server, source, port=link.port)
        assert 9 * MIB < link.passed < 10 * MIB
    assert result.status == 0, result
    assert visible(server.folder) == ["large"]
    arrived = server.folder / "large"
    assert arrived.stat().st_size == size
    with open(arrived, "rb") as file:
        file.seek(-6, os.SEEK_END)
        assert file.read() == b"\0\0ends"
    assert 0 < peak < 80, "the client's memory in MiB"
    assert server.peak_mib() < 80, "the server's memory in MiB"


def send_measured(server: Server, source: Path, port: int | None = None) -> tuple[Result, float]:
    """Run a client to its end; return also the most memory that it was seen to have, in MiB."""
    peak = 0.0
    with server.client(source, port=port) as client:

        def ended() -> bool:
            nonlocal peak
            peak = max(peak, client.peak_mib())
            return not client.running()

        wait_for(ended, 240)
        return client.wait(), peak


@linux
def test_each_further_transfer_takes_little_memory(server: Server, tmp_path: Path) -> None:
    transfers = 6
    source = make_file(tmp_path / "large", 40 * MIB)
    with Link(server.port, hold_at=24 * MIB) as link:
        args = ("-", "--name", "x")
        clients = []
        try:
            for _ in range(transfers):
                with open(source, "rb") as file:
                    clients.append(server.client(*args, port=link.port, stdin=file.fileno()))
            wait_for(lambda: link.passed == transfers * 24 * MIB)
            wait_for(lambda: partial_size(server.folder) > transfers * 20 * MIB)
            assert server.peak_mib() < 80 + 24 * (transfers - 1)
            assert max(client.peak_mib() for client in clients) < 80
            link.release()
            for client in clients:
                assert client.wait().status == 0
        finally:
            for client in clients:
                client.close()
    assert len(visible(server.folder)) == transfers


# --- names that are taken -----------------------------------------------------------------------


def test_the_same_content_is_not_sent_again(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 20 * MIB)
    assert server.send(source).status == 0
    with Link(server.port) as link:
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
    with Server(inbox, "--overwrite") as server, Link(server.port, hold_at=16 * MIB) as link:
        with server.client(source, port=link.port) as client:
            wait_for(lambda: partial_size(inbox) > 8 * MIB)
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


# --- resuming -----------------------------------------------------------------------------------


def test_a_partial_file_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 20 * MIB)
    make_partial(server.folder, "file.bin", source.read_bytes()[: 15 * MIB + 3])
    with Link(server.port) as link:
        result = server.send(source, port=link.port)
        assert 5 * MIB - 3 <= link.passed < 6 * MIB, "only the rest is sent"
    assert result.status == 0, result
    assert "file.bin: going on after the first 15.7 MB\n" in result.stdout
    assert contents(server.folder) == {"file.bin": source.read_bytes()}
    assert f"SHA-256 matches ({sha256(source)[:8]}...)" in result.stdout


def test_a_partial_file_that_is_complete_needs_no_byte(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 5 * MIB)
    make_partial(server.folder, "file.bin", source.read_bytes())
    with Link(server.port) as link:
        assert server.send(source, port=link.port).status == 0
        assert link.passed < 10_000
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


@pytest.mark.parametrize("damage", ["first byte", "last byte", "too long", "another", "empty"])
def test_a_damaged_partial_file_is_never_trusted(
    server: Server, tmp_path: Path, damage: str
) -> None:
    source = make_file(tmp_path / "file.bin", 3 * MIB)
    good = source.read_bytes()
    half = good[: len(good) // 2]
    damaged = {
        "first byte": bytes([half[0] ^ 1]) + half[1:],
        "last byte": half[:-1] + bytes([half[-1] ^ 1]),
        "too long": good + b"more",
        "another": os.urandom(MIB),
        "empty": b"",
    }
    make_partial(server.folder, "file.bin", damaged[damage])
    result = server.send(source)
    assert result.status == 0, result
    assert contents(server.folder) == {"file.bin": good}


def test_the_longest_good_partial_file_of_several_is_used(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 10 * MIB)
    good = source.read_bytes()
    for number, content in enumerate((good[:MIB], good[: 8 * MIB], os.urandom(9 * MIB))):
        partial = make_partial(server.folder, "file.bin", content)
        partial.rename(partial.with_name(f".file.bin.{number}.socketpair-part"))
    with Link(server.port) as link:
        assert server.send(source, port=link.port).status == 0
        assert link.passed < 3 * MIB
    assert contents(server.folder) == {"file.bin": good}


def test_a_partial_file_of_another_name_is_left_alone(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 3 * MIB)
    other = make_partial(server.folder, "file.bin", source.read_bytes()[:MIB])
    assert server.send(source).status == 0
    assert other.stat().st_size == MIB


def test_a_file_under_way_is_hidden_and_kept_when_the_client_is_killed(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    with Link(server.port, hold_at=20 * MIB) as link:
        with server.client(source, port=link.port) as client:
            wait_for(lambda: partial_size(server.folder) > 18 * MIB)
            assert visible(server.folder) == []
            client.kill()
        link.cut()
        server.wait_for_output(r"[\d.]+ MB of file\.bin are kept for the next run")
        assert visible(server.folder) == []
    with Link(server.port) as second:
        assert server.send(source, port=second.port).status == 0
        assert second.passed < 14 * MIB
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


def test_a_changed_source_is_not_mixed_with_its_partial_file(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 4 * MIB)
    make_partial(server.folder, "file.bin", source.read_bytes()[: 2 * MIB])
    make_file(source, 4 * MIB, seed=2)
    assert server.send(source).status == 0
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


# --- reconnecting -------------------------------------------------------------------------------


def test_the_client_comes_back_by_itself_when_the_link_breaks(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    small = make_file(tmp_path / "small", 10)
    with Link(server.port, hold_at=30 * MIB) as link:
        with server.client(small, source, port=link.port) as client:
            wait_for(lambda: partial_size(server.folder) > 28 * MIB)
            link.release()
            link.cut()
            result = client.wait()
        assert link.connections == 2
        assert link.passed < 44 * MIB, "goes on, and does not begin again"
    assert result.status == 0, result
    assert "trying again in 0.5 s" in result.stderr
    assert contents(server.folder) == {
        "file.bin": source.read_bytes(),
        "small": small.read_bytes(),
    }
    assert result.stdout.count(" as small, SHA-256 matches") == 1


def test_a_small_file_is_reported_while_a_large_one_is_under_way(
    server: Server, tmp_path: Path
) -> None:
    small = make_file(tmp_path / "small", 10)
    large = make_file(tmp_path / "large", 30 * MIB)
    with (
        Link(server.port, hold_at=20 * MIB) as link,
        server.client(small, large, port=link.port) as client,
    ):
        client.wait_for_output("Saved as small", 20)
        link.release()
        assert client.wait().status == 0


def test_the_client_comes_back_to_a_server_that_was_killed(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    with Server(inbox) as first:
        link = Link(first.port, hold_at=30 * MIB)
        with link, first.client(source, port=link.port) as client:
            wait_for(lambda: partial_size(inbox) > 28 * MIB)
            first.kill()
            client.wait_for_output(r"trying again in")
            link.release()
            assert visible(inbox) == []
            with Server(inbox, port=first.port):
                result = client.wait()
        assert link.passed < 44 * MIB
    assert result.status == 0, result
    assert contents(inbox) == {"file.bin": source.read_bytes()}


def test_the_client_gives_up_in_the_end(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    with (
        Server(inbox) as server,
        Link(server.port, hold_at=16 * MIB) as link,
        server.client(source, port=link.port) as client,
    ):
        link.wait_until_held()
        server.kill()
        result = client.wait()
    assert result.status == 1
    waits = re.findall(r"trying again in ([\d.]+) s", result.stderr)
    assert waits == ["0.5", "1", "2", "4", "8"]
    assert "trying again" not in result.error_lines[-1]
    assert visible(inbox) == []


def test_a_pipe_that_was_cut_off_is_not_sent_in_part(server: Server, tmp_path: Path) -> None:
    after = make_file(tmp_path / "after", 10)
    source = make_file(tmp_path / "source", 30 * MIB)
    with Link(server.port, hold_at=16 * MIB) as link, open(source, "rb") as file:
        args = ("-", after, "--name", "piped")
        with server.client(*args, port=link.port, stdin=file.fileno()) as client:
            wait_for(lambda: partial_size(server.folder) > 8 * MIB)
            link.release()
            link.cut()
            result = client.wait()
    assert result.status == 1
    assert "standard input cannot be sent a second time" in result.stderr
    assert contents(server.folder) == {"after": after.read_bytes()}


# --- many at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 5 * MIB])
def test_eight_clients_with_one_name_lose_nothing(
    server: Server, tmp_path: Path, size: int
) -> None:
    sources = [make_file(tmp_path / str(seed) / "same.bin", size, seed) for seed in range(8)]
    clients = [server.client(source) for source in sources]
    try:
        results = [client.wait() for client in clients]
    finally:
        for client in clients:
            client.close()
    assert [result.status for result in results] == [0] * 8, results
    found = contents(server.folder)
    assert sorted(found.values()) == sorted(source.read_bytes() for source in sources)
    assert set(found) == {"same.bin"} | {f"same ({number}).bin" for number in range(1, 8)}


def test_eight_clients_with_one_content_do_no_harm(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "same.bin", 5 * MIB)
    clients = [server.client(source) for _ in range(8)]
    try:
        results = [client.wait() for client in clients]
    finally:
        for client in clients:
            client.close()
    assert [result.status for result in results] == [0] * 8, results
    found = contents(server.folder)
    assert found["same.bin"] == source.read_bytes()
    assert set(found.values()) == {source.read_bytes()}, "each copy is whole, and none is partial"


def test_one_slow_client_does_not_hold_up_others(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "slow.bin", 20 * MIB)
    other = make_file(tmp_path / "other.bin", 2 * MIB)
    with (
        Link(server.port, hold_at=10 * MIB) as link,
        server.client(source, port=link.port) as client,
    ):
        link.wait_until_held()
        assert server.send(other).status == 0
        link.release()
        assert client.wait().status == 0
    assert contents(server.folder) == {
        "slow.bin": source.read_bytes(),
        "other.bin": other.read_bytes(),
    }


# --- what is shown ------------------------------------------------------------------------------


def test_the_server_logs_a_line_for_each_file(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 2_000_000)
    server.send(source)
    pattern = (
        r"\d\d:\d\d:\d\d 127\.0\.0\.1:\d+ sent 2\.0 MB in \d+\.\d\d s "
        r"\([\d.]+ [kMG]B/s\), SHA-256 (\w{8}), saved as (.*)\n"
    )
    found = server.wait_for_output(pattern)
    assert found[1] == sha256(source)[:8]
    assert found[2] == str(server.folder / "file.bin")
    assert server.stderr() == ""


@posix
def test_lines_for_the_journal_have_no_time_of_their_own(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    port = free_port()
    # systemd gives a service a socket to its journal as both, and tells which one it is.
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        status = os.fstat(theirs.fileno())
        server = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "server.py"),
                "file",
                f"--port={port}",
                f"--folder={inbox}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=theirs.fileno(),
            stderr=theirs.fileno(),
            env=environment({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}),
        )
        try:
            wait_for(lambda: send(port, source).status == 0)
        finally:
            server.terminate()
            assert server.wait(LIMIT_S) == 143
        theirs.close()
        lines = b"".join(iter(lambda: ours.recv(65536), b"")).decode().splitlines()
    assert lines[0].startswith("Receiving into")
    assert re.fullmatch(r"127\.0\.0\.1:\d+ sent 1\.0 kB in .*, saved as .*/file\.bin", lines[1])


def test_a_quiet_client_says_only_what_went_wrong(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    result = server.send("-q", source, tmp_path / "missing")
    assert result.stdout == ""
    assert result.error_lines == [f"{tmp_path / 'missing'}: no such file"]
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


def test_a_quiet_server_says_nothing(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    port = free_port()
    args = ("file", "-q", "--port", str(port), "--folder", str(inbox))
    with Process("server.py", *args) as server:
        wait_for(lambda: send(port, source).status == 0)
        assert contents(inbox) == {"file.bin": source.read_bytes()}
        assert server.stdout() + server.stderr() == ""


def test_a_bar_is_shown_on_a_terminal_only(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 5 * MIB)
    client = in_terminal("client.py", "file", "--port", str(server.port), str(source))
    status, shown = expect_end(client)
    assert status == 0
    assert re.search(r"file\.bin: 100%\|.*\| 5\.24M/5\.24M", shown)
    source = make_file(tmp_path / "second.bin", 5 * MIB)
    client = in_terminal("client.py", "file", "--port", str(server.port), "-q", str(source))
    assert expect_end(client) == (0, "")
    source = make_file(tmp_path / "third.bin", 5 * MIB)
    result = server.send(source)
    assert result.stderr == ""
    assert "%" not in result.stdout


def test_many_files_share_one_bar(server: Server, tmp_path: Path) -> None:
    for number in range(30):
        make_file(tmp_path / "many" / f"{number}", 100_000, seed=number)
    client = in_terminal(
        "client.py",
        "file",
        "--port",
        str(server.port),
        "-v",
        str(tmp_path / "many"),
        str(tmp_path / "gone"),
    )
    status, shown = expect_end(client)
    assert status == 1
    assert re.search(r"30 files: 100%\|.*\| 3\.00M/3\.00M", shown)
    assert shown.count("Saved as many/") == 30
    assert "gone: no such file" in shown
    assert "Saved many/ with 30 files" in shown
    for line in re.split(r"[\r\n]+", shown):
        assert not re.search(r"\S.*(Saved|no such).*%\|", line), "a line torn by the bar"


def test_a_large_file_among_many_has_its_own_bar(server: Server, tmp_path: Path) -> None:
    large = make_sparse(tmp_path / "large.bin", 70 * MIB)
    small = make_file(tmp_path / "small.bin", 10)
    client = in_terminal("client.py", "file", "--port", str(server.port), str(small), str(large))
    status, shown = expect_end(client)
    assert status == 0
    assert "large.bin: " in shown
    assert "2 files: 100%" in shown
    assert "small.bin: " not in shown


def test_without_tqdm_files_go_too(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    blocked = tmp_path / "blocked" / "tqdm.py"
    make_file(blocked, 0)
    blocked.write_text("raise ImportError")
    env = {**environment(), "PYTHONPATH": str(blocked.parent)}
    client = pexpect.spawn(
        sys.executable,
        [str(ROOT / "client.py"), "file", "--port", str(server.port), str(source)],
        env=env,
        encoding="utf-8",
        timeout=60,
    )
    status, shown = expect_end(client)
    assert status == 0
    assert "pip install tqdm" in shown
    assert "Saved as file.bin" in shown


def test_data_on_standard_output_that_nobody_reads_is_no_traceback(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, str(ROOT / "client.py"), "file", "--port", str(server.port), str(source)],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(),
        timeout=LIMIT_S,
        check=False,
    )
    os.close(writer)
    assert b"Traceback" not in process.stderr
    assert process.returncode == 1


def test_the_client_needs_no_package_for_files(server: Server, tmp_path: Path) -> None:
    """Without the environment's packages, as on a bare machine."""
    source = make_file(tmp_path / "file.bin", 1000)
    command = [sys.executable, "-S", str(ROOT / "client.py"), "file", "--port", str(server.port)]
    process = subprocess.run(
        [*command, str(source)],
        capture_output=True,
        env=environment(),
        timeout=LIMIT_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


def test_many_names_that_take_much_of_a_message_arrive(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(600):
        make_file(tree / ("\x01" * 240 + str(number)), 0)
    result = server.send(tree)
    assert result.status == 0, result
    assert contents(server.folder / "tree") == contents(tree)


@posix
def test_many_results_from_a_deep_folder_arrive(server: Server, tmp_path: Path) -> None:
    deep = server.folder.joinpath(*(letter * 250 for letter in "abcdefghijklm"))
    deep.mkdir(parents=True)
    (server.folder / "short").symlink_to(deep)
    tree = tmp_path / "short"
    for number in range(600):
        make_file(tree / f"file {number}", 10, seed=number)
    for line in ("600 files", "600 there already"):
        result = server.send(tree)
        assert result.status == 0, result
        assert line in result.stdout
    assert contents(deep) == contents(tree)


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


def test_standard_input_from_a_terminal_has_a_bar(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "source", 3 * MIB)
    command = (
        f"cat {source} | {sys.executable} {ROOT / 'client.py'} file - --name z --port {server.port}"
    )
    child = pexpect.spawn("sh", ["-c", command], timeout=60, encoding="utf-8")
    child.expect("Saved as z")
    child.expect(pexpect.EOF)
    assert "Traceback" not in (child.before or "")
    assert (server.folder / "z").read_bytes() == source.read_bytes()
