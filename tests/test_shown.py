"""What both scripts say about files: the bar, the lines, the log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import FINDING, PROTOCOL
from support import (
    MIB,
    ROOT,
    Process,
    Program,
    Proxy,
    RawClient,
    Server,
    contents,
    free_port,
    make_file,
    make_sparse,
    message,
    posix,
    send,
    sha256,
    start_client,
    wait_for,
)

if sys.platform != "win32":
    import pty


def test_the_server_logs_a_line_for_each_file(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 20_000_000)
    server.send(source)
    pattern = (
        r"\d\d:\d\d:\d\d 127\.0\.0\.1:\d+ sent 20\.0 MB in \d+\.\d\d s "
        r"\([\d.]+ [kMG]B/s\), SHA-256 (\w{8}), saved as (.*)\n"
    )
    found = server.wait_for_output(pattern)
    assert found[1] == sha256(source)[:8]
    assert found[2] == str(server.folder / "file.bin")
    assert server.stderr() == ""


def test_a_file_too_small_to_measure_has_no_speed_in_the_log(
    server: Server, tmp_path: Path
) -> None:
    server.send(make_file(tmp_path / "file.bin", 111))
    server.wait_for_output(r" sent 111 bytes, SHA-256 \w{8}, saved as .*file\.bin\n")


@posix
def test_only_the_line_of_a_saved_file_has_the_words_that_go_before_its_path(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "x, saved as "
    folder.mkdir()
    make_sparse(folder / "film", 64 * MIB)
    server.send(folder)
    server.send(folder)
    assert server.send("-", "--name", "y, saved as /../z").status == 1
    server.wait_for_output("offers what is there already: .*")
    server.wait_for_output("failed y.*")
    lines = (server.stdout() + server.stderr()).splitlines()
    assert any("begins to send" in line for line in lines)
    saved = [line.partition(", saved as ")[2] for line in lines if ", saved as " in line]
    assert saved == [str(server.folder / folder.name / "film")]


@contextlib.contextmanager
def served_for_journal(
    inbox: Path, source: Path, *streams: str
) -> Iterator[tuple[Process, socket.socket]]:
    """Run a server of which `streams` go to systemd's journal, once it has `source`.

    Gives it, and the journal's end, of which no other end is open here.
    """
    port = free_port()
    # systemd gives a service a socket to its journal, and tells which one it is.
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        status = os.fstat(theirs.fileno())
        options: dict[str, Any] = dict.fromkeys(streams, theirs.fileno())
        options["env"] = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        with Process(
            "server.py", "file", f"--port={port}", f"--folder={inbox}", **options
        ) as server:
            theirs.close()
            wait_for(lambda: send(port, source).status == 0)
            yield server, ours


@posix
def test_lines_for_the_journal_have_no_time_of_their_own(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    with served_for_journal(inbox, source, "stdout", "stderr") as (server, journal):
        printed = b""
        while b", saved as " not in printed:  # the log is as late as the machine is busy
            printed += journal.recv(65536)
        server.signal(signal.SIGTERM)
        assert server.wait().status == 143
        lines = b"".join([printed, *iter(lambda: journal.recv(65536), b"")]).decode().splitlines()
    assert lines[0].startswith("Receiving into")
    assert re.fullmatch(r"127\.0\.0\.1:\d+ sent 1\.0 kB, .*, saved as .*/file\.bin", lines[-1])


@posix
def test_lines_for_a_file_have_a_time_where_problems_go_to_the_journal(
    inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    with served_for_journal(inbox, source, "stderr") as (server, _):
        server.wait_for_output(r"\d\d:\d\d:\d\d 127\.0\.0\.1:\d+ sent 1\.0 kB, .*, saved as ")


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


def test_a_quiet_server_that_serves_nobody_ends_without_a_word(inbox: Path) -> None:
    port = free_port()
    args = ("file", "-q", "--port", str(port), "--folder", str(inbox))
    with Process("server.py", *args) as server:
        wait_for(lambda: is_there(port))
        server.signal(signal.SIGINT)
        result = server.wait()
    assert (result.status, result.stdout, result.stderr) == (130, "", "")


def is_there(port: int) -> bool:
    """Return whether a server answers who only asks that."""
    with contextlib.suppress(OSError), RawClient(port) as client:
        client.send(message("hello", protocol=PROTOCOL, mode=FINDING))
        return bool(client.receive()["type"] == "error")
    return False


@posix
def test_a_server_outlives_its_terminal(inbox: Path, tmp_path: Path) -> None:
    """As one that a shell has disowned, on whose status line nobody looks any more."""
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    near, far = pty.openpty()
    port = free_port()
    with Process(
        *("server.py", "file", f"--port={port}", f"--folder={inbox}"), stderr=far
    ) as server:
        os.close(far)
        server.wait_for("Receiving into")
        with (
            Proxy(port, hold_at=16 * MIB) as proxy,
            start_client(proxy.port, "--retry=5", source) as client,
        ):
            shown = b""
            while b"file.bin" not in shown:
                shown += os.read(near, 1000)
            os.close(near)
            proxy.release()
            assert client.wait().status == 0
        assert send(port, source).status == 0
    assert contents(inbox) == {"file.bin": source.read_bytes()}


def test_a_bar_is_shown_on_a_terminal_only(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 5 * MIB)
    result = server.send(source, terminal=True)
    assert result.status == 0
    assert re.search(r"file\.bin: 100%\|.*\| 5\.24M/5\.24M", result.stdout)
    source = make_file(tmp_path / "second.bin", 5 * MIB)
    result = server.send("-q", source, terminal=True)
    assert (result.status, result.stdout) == (0, "")
    source = make_file(tmp_path / "third.bin", 5 * MIB)
    result = server.send(source)
    assert result.stderr == ""
    assert "%" not in result.stdout


def test_a_terminal_that_knows_only_ascii_has_a_bar_of_it(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 5 * MIB)
    result = server.send(source, terminal=True, env={"PYTHONIOENCODING": "ascii"})
    assert result.status == 0
    assert re.search(r"file\.bin: 100%\|#+\| 5\.24M/5\.24M", result.stdout)


def test_many_files_share_one_bar(server: Server, tmp_path: Path) -> None:
    for number in range(30):
        make_file(tmp_path / "many" / f"{number}", 100_000, seed=number)
    result = server.send("-v", tmp_path / "many", tmp_path / "gone", terminal=True)
    assert result.status == 1
    shown = result.stdout
    assert re.search(r"30 files: 100%\|.*\| 3\.00M/3\.00M", shown)
    assert shown.count("Saved as many/") == 30
    assert "gone: no such file" in shown
    assert "Saved many/ with 30 files" in shown
    for line in re.split(r"[\r\n]+", shown):
        assert not re.search(r"\S.*(Saved|no such).*%\|", line), "a line torn by the bar"


def test_a_large_file_among_many_has_its_own_bar(server: Server, tmp_path: Path) -> None:
    large = make_sparse(tmp_path / "large.bin", 70 * MIB)
    small = make_file(tmp_path / "small.bin", 10)
    result = server.send(small, large, terminal=True)
    assert result.status == 0
    assert "large.bin: " in result.stdout
    assert "2 files: 100%" in result.stdout
    assert "small.bin: " not in result.stdout


def test_without_tqdm_files_go_too(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    blocked = tmp_path / "blocked" / "tqdm.py"
    make_file(blocked, 0)
    blocked.write_text("raise ImportError")
    result = server.send(source, env={"PYTHONPATH": str(blocked.parent)}, terminal=True)
    assert result.status == 0
    assert "pip install tqdm" in result.stdout
    assert "Saved as file.bin" in result.stdout


def test_data_on_standard_output_that_nobody_reads_is_no_traceback(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 1000)
    reader, writer = os.pipe()
    os.close(reader)
    result = server.send(source, stdout=writer)
    os.close(writer)
    assert result.status == 1


def test_the_client_needs_no_package_for_files(server: Server, tmp_path: Path) -> None:
    """Without the environment's packages, as on a bare machine."""
    source = make_file(tmp_path / "file.bin", 1000)
    result = server.send(source, python=(sys.executable, "-S"))
    assert result.status == 0, result
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


def test_standard_input_from_a_terminal_has_a_bar(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "source", 3 * MIB)
    command = (
        f"cat {source} | {sys.executable} {ROOT / 'client.py'} file - --name z --port {server.port}"
    )
    with Program(["sh", "-c", command], terminal=True) as shell:
        result = shell.wait()
    assert result.status == 0
    assert re.search(r"z: 3\.\d+M", result.stdout), result.stdout
    assert "Saved as z" in result.stdout
    assert "Traceback" not in result.stdout
    assert (server.folder / "z").read_bytes() == source.read_bytes()
