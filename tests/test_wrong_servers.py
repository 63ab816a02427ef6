"""No server, or one that is none: one clear line each."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import common
from support import (
    ROOT,
    WITHOUT_PRIVILEGE,
    FakeServer,
    RawClient,
    RawPeer,
    Server,
    control_codes,
    free_port,
    linux,
    make_file,
    message,
    run_script,
    send,
)

WELCOME = message("welcome", protocol=common.PROTOCOL, mode="file")


def test_no_server_is_one_line(tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    port = free_port()
    result = send(port, source)
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"no server at 127.0.0.1:{port} (connection refused)")
    assert line.endswith(f"{ROOT / 'server.py'} file --port {port}")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a\x1b[2J", "..", "x" * 300, "ü" * 70])
def test_a_host_that_does_not_exist_is_one_line(tmp_path: Path, host: str) -> None:
    source = make_file(tmp_path / "file", 10)
    result = send(1, source, f"--host={host}")
    assert result.status == 1
    assert len(result.error_lines) == 1
    assert control_codes(result.stderr) == set()


@pytest.mark.parametrize("script", ["client.py", "server.py"])
def test_an_empty_host_is_a_wrong_argument(script: str) -> None:
    result = run_script(script, "file", "--host=")
    assert result.status == 2
    assert "an empty name" in result.stderr


@linux
def test_a_port_that_only_root_may_take_is_one_line(tmp_path: Path) -> None:
    result = run_script("server.py", "file", "--port=7", cwd=tmp_path, wrapper=WITHOUT_PRIVILEGE)
    assert result.status == 1
    (line,) = result.error_lines
    assert line.endswith(
        "permission denied; --port takes another: those below 1024 are mostly root's"
    )


def test_a_port_in_use_is_one_line(server: Server, tmp_path: Path) -> None:
    result = run_script("server.py", "file", f"--port={server.port}", f"--folder={tmp_path / 'x'}")
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"cannot listen on 127.0.0.1:{server.port}: address already in use")
    assert "--port" in line


def test_a_server_may_start_again_at_once_on_its_port(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    with Server(inbox) as first:
        assert first.send(source).status == 0
        first.signal(signal.SIGINT)
        assert first.wait().status == 130
    with Server(inbox, port=first.port) as second:
        second.check_serves(tmp_path)


def test_audio_on_a_file_server_is_told_so(server: Server) -> None:
    with RawClient(server.port) as client:
        client.send(message("hello", protocol=common.PROTOCOL, mode="audio"))
        answer = client.receive()
        assert answer["type"] == "error"
        assert "this server is in file mode" in answer["error"]
        assert client.read_all() == b""


@pytest.mark.parametrize("protocol", [0, 1, 10**30])
def test_another_protocol_is_told_so(server: Server, protocol: int) -> None:
    with RawClient(server.port) as client:
        client.send(message("hello", protocol=protocol, mode="file"))
        assert "protocol 2" in client.receive()["error"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "before it answered"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not a Socket Pair server"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "is not a Socket Pair server"),
        (b"\0\0\0\x02{}", "is not a Socket Pair server"),
        (b"\0\0", "connection lost"),
        (message("error", error="no \x1b[2J thanks"), r"no \x1b[2J thanks"),
        (WELCOME + message("start", entries=[1]), "received a message with a bad 'entries'"),
        (WELCOME + message("start", entries=[{"offset": -1}]), "bad 'offset'"),
        (WELCOME + 2 * message("held", entries=[]), "a second held"),
        (WELCOME + 100_000 * message("hashing"), "signs of life without end"),
        (
            WELCOME + message("start", entries=[{"offset": 0}]) + message("results", entries=[]),
            "results without a result",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_server_that_talks_nonsense_is_one_line(tmp_path: Path, answer: bytes, told: str) -> None:
    source = make_file(tmp_path / "file", 10)
    with FakeServer(answer) as fake:
        result = send(fake.port, source)
    assert result.status == 1
    (line,) = result.error_lines
    assert told in line
    assert control_codes(line) == set()


def test_a_server_that_takes_a_part_and_hangs_up_is_not_tried_for_ever(tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 3_000_000)
    start = WELCOME + message("start", entries=[{"offset": 0}])

    def take_a_part(peer: RawPeer) -> None:
        peer.send(start)
        peer.read(1_000_000)
        peer.reset()

    with FakeServer(take_a_part) as fake:
        result = send(fake.port, source, "--retry=1")
    assert result.status == 1
    assert "gave up after 1 s" in result.error_lines[-1]


def test_a_checksum_is_claimed_only_of_all_that_was_sent(tmp_path: Path) -> None:
    """A server that saves after a comparison of the beginning alone has got nothing."""
    source = make_file(tmp_path / "file", 10_000)
    answer = (
        WELCOME
        + message("held", entries=[[0, [5000]]])
        + message("start", entries=[{"saved": "file"}])
    )
    with FakeServer(answer) as fake:
        result = send(fake.port, source)
    assert result.status == 1
    assert "SHA-256 matches" not in result.stdout
    assert "a file that was not compared" in result.stderr
