"""Broken off, a transfer resumes where it stopped, and trusts nothing unchecked."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest

from common import STATUS_INTERVAL_S
from pairing import CODE, OTHER_CODE
from support import (
    LIMIT_S,
    MIB,
    PARTIAL_SUFFIX,
    WITHOUT_PRIVILEGE,
    FakeServer,
    Proxy,
    RawPeer,
    Server,
    contents,
    finished,
    half_way,
    linux,
    make_file,
    make_partial,
    message,
    sha256,
    visible,
    with_permissions,
)

# --- resuming -------------------------------------------------------------------------------


def test_a_partial_file_is_resumed(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 20 * MIB)
    make_partial(server.folder, "file.bin", source.read_bytes()[: 15 * MIB + 3])
    with Proxy(server.port) as link:
        result = server.send(source, port=link.port)
        assert 5 * MIB - 3 <= link.passed < 6 * MIB, "only the rest is sent"
    assert result.status == 0, result
    assert "file.bin: resuming after the first 15.7 MB\n" in result.stdout
    assert contents(server.folder) == {"file.bin": source.read_bytes()}
    assert f"SHA-256 matches ({sha256(source)[:8]}...)" in result.stdout


def test_a_partial_file_that_is_complete_needs_no_byte(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 5 * MIB)
    make_partial(server.folder, "file.bin", source.read_bytes())
    with Proxy(server.port) as link:
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
        partial.rename(partial.with_name(partial.name.replace("89.", f"8{number}.")))
    with Proxy(server.port) as link:
        assert server.send(source, port=link.port).status == 0
        assert link.passed < 3 * MIB
    assert contents(server.folder) == {"file.bin": good}


@pytest.mark.parametrize("broken_off", [0, 1, 2])
def test_of_several_files_with_one_name_the_one_that_was_broken_off_is_resumed(
    server: Server, tmp_path: Path, broken_off: int
) -> None:
    sources = [make_file(tmp_path / str(seed) / "x", 10 * MIB, seed) for seed in range(3)]
    make_partial(server.folder, "x", sources[broken_off].read_bytes()[: 8 * MIB])
    with Proxy(server.port) as link:
        assert server.send(*sources, port=link.port).status == 0
        assert link.passed < 23 * MIB
    assert sorted(contents(server.folder).values()) == sorted(
        source.read_bytes() for source in sources
    )


def test_a_partial_file_of_another_name_is_left_alone(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 3 * MIB)
    other = make_partial(server.folder, "file.bin", source.read_bytes()[:MIB])
    assert server.send(source).status == 0
    assert other.stat().st_size == MIB


def test_a_strangers_thousands_of_partial_files_hide_none_of_ones_own(
    server: Server, tmp_path: Path
) -> None:
    sources = [make_file(tmp_path / f"file {number}", 100_000, number) for number in range(5)]
    for source in sources:
        make_partial(server.folder, source.name, source.read_bytes()[:50_000])
    for number in range(5_000):
        name = f"file {number % 5}" if number % 50 < 5 else f"other {number}"
        (server.folder / f".{name}.00000000{number}{PARTIAL_SUFFIX}").touch()
    result = server.send(*sources)
    assert result.status == 0, result
    assert result.stdout.count("resuming after the first 50.0 kB") == 5
    assert finished(server.folder) == {source.name: source.read_bytes() for source in sources}


def test_a_file_under_way_is_hidden_and_kept_when_the_client_is_killed(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    with half_way(server, source, hold_at=20 * MIB, written=18 * MIB) as (client, _):
        assert visible(server.folder) == []
        client.kill()
    server.wait_for_output(r"[\d.]+ MB of file\.bin are kept for the next run")
    assert visible(server.folder) == []
    with Proxy(server.port) as second:
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


@with_permissions
def test_what_came_of_a_file_that_cannot_be_read_for_now_is_resumed_later(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 20 * MIB)
    make_partial(server.folder, "file.bin", source.read_bytes()[: 15 * MIB])
    source.chmod(0)
    result = server.send(source, wrapper=WITHOUT_PRIVILEGE)
    assert result.error_lines == [f"{source}: permission denied"]
    source.chmod(0o600)
    with Proxy(server.port) as link:
        assert server.send(source, port=link.port).status == 0
        assert link.passed < 6 * MIB, "only the rest is sent"
    assert contents(server.folder) == {"file.bin": source.read_bytes()}


# --- reconnecting ---------------------------------------------------------------------------


def test_the_client_comes_back_by_itself_when_the_link_breaks(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    small = make_file(tmp_path / "small", 10)
    with half_way(server, small, source, hold_at=30 * MIB, written=28 * MIB) as (client, link):
        link.cut()
        link.release()
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
    with half_way(server, small, large) as (client, link):
        client.wait_for_output("Saved as small")
        link.release()
        assert client.wait().status == 0


def test_the_client_comes_back_to_a_server_that_was_killed(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    with (
        Server(inbox) as first,
        half_way(first, source, hold_at=30 * MIB, written=28 * MIB) as (client, link),
    ):
        first.kill()
        client.wait_for_output(r"trying again in")
        link.release()
        assert visible(inbox) == []
        with Server(inbox, port=first.port):
            result = client.wait()
    assert link.passed < 44 * MIB
    assert result.status == 0, result
    assert contents(inbox) == {"file.bin": source.read_bytes()}


@linux
def test_a_folder_begun_by_a_server_that_was_killed_gets_its_permissions(
    inbox: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    make_file(tree / "large", 40 * MIB)
    tree.chmod(0o755)
    with Server(inbox) as first, half_way(first, tree):
        first.kill()
    assert (inbox / "tree").stat().st_mode & 0o777 == 0o700, "nobody else's until it is whole"
    with Server(inbox) as second:
        assert second.send(tree).status == 0
    assert (inbox / "tree").stat().st_mode & 0o7777 == 0o755


def test_a_server_that_comes_back_with_another_code_is_asked_once(
    inbox: Path, tmp_path: Path
) -> None:
    """Each try would count as a wrong guess there."""
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    with (
        Server(inbox, "--code", CODE) as first,
        half_way(first, source, "--code", CODE) as (client, link),
    ):
        first.kill()
        client.wait_for_output(r"trying again in")
        link.release()
        with Server(inbox, "--code", OTHER_CODE, port=first.port) as second:
            result = client.wait()
            second.wait_for_output("wrong pairing code")
            assert second.stderr().count("wrong pairing code") == 1
    assert result.status == 1
    assert "pairing code: check it there; what has arrived is kept" in result.error_lines[-1]


def test_no_bar_is_drawn_over_the_question_for_the_code_of_a_server_that_has_one_now(
    inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "file.bin", 40 * MIB)
    with Server(inbox) as first, half_way(first, source, terminal=True) as (client, link):
        first.kill()
        client.wait_for_output(r"trying again in")
        link.release()
        with Server(inbox, "--code", CODE, port=first.port):
            client.expect("Pairing code: ")
            time.sleep(5 * STATUS_INTERVAL_S)
            assert client.rest() == ""
            client.type(f"{CODE}\r")
            assert client.wait().status == 0
    assert contents(inbox) == {"file.bin": source.read_bytes()}


def test_the_client_gives_up_in_the_end(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    with Server(inbox) as server, half_way(server, "--retry", "3", source) as (client, _):
        server.kill()
        result = client.wait()
    assert result.status == 1
    waits = re.findall(r"trying again in ([\d.]+) s", result.stderr)
    assert waits[0] == "0.5"  # those after it are cut short where the client stood still
    assert "gave up after 3 s: what has arrived is kept, and the same command" in result.stderr
    assert "trying again" not in result.error_lines[-1]
    assert visible(inbox) == []


def test_a_pipe_that_was_cut_off_is_not_sent_in_part(server: Server, tmp_path: Path) -> None:
    after = make_file(tmp_path / "after", 10)
    source = make_file(tmp_path / "source", 30 * MIB)
    args = ("-", after, "--name", "piped")
    with (
        open(source, "rb") as file,
        half_way(server, *args, stdin=file.fileno()) as (client, link),
    ):
        link.cut()
        link.release()
        result = client.wait()
    assert result.status == 1
    assert "standard input cannot be sent a second time" in result.stderr
    assert contents(server.folder) == {"after": after.read_bytes()}


def test_nothing_is_waited_for_where_all_there_was_to_send_is_a_pipe_that_was_cut_off(
    server: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "source", 30 * MIB)
    args = ("-", "--name", "piped", "--retry", "1000")
    with (
        open(source, "rb") as file,
        half_way(server, *args, stdin=file.fileno()) as (client, link),
    ):
        link.cut()
        result = client.wait()
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith("piped: ")
    assert line.endswith("; standard input cannot be sent a second time")


def test_a_server_that_hangs_up_and_takes_nothing_more_is_left_at_once(
    server: Server, tmp_path: Path
) -> None:
    """Its end of the connection is closed, and no reset ever comes: as from behind a firewall."""
    source = make_file(tmp_path / "file.bin", 30 * MIB)
    over = threading.Event()

    def hang_up(peer: RawPeer) -> None:
        peer.receive()
        peer.send(message("welcome", protocol=2, mode="file"))
        peer.receive()
        peer.send(message("start", entries=[{"offset": 0}]))
        peer.read(1000)
        peer.hang_up()
        over.wait(LIMIT_S)

    with FakeServer(hang_up) as fake, server.client(source, port=fake.port) as client:
        client.wait_for_output(r"the other side (.*); trying again")
        over.set()
        assert "the other side closed the connection; trying again" in client.stderr()
