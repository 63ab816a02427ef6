"""A client that meets something other than its server says so in one line, and tells it nothing."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

import pytest

import common
from common import Connection, Error, Hello, Pair, Pairing, SocketPairError, normalize_code
from pairing import JUNK, OTHER_CODE, send_here
from support import HOST, FakeServer, RawPeer, message


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("with_code", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"\x15\x03\x03\x00\x01\x02",
        b"\x15\x03",
        bytes(1000),
        JUNK["noise"],
        JUNK["deep"],
    ],
)
def test_a_server_of_something_else_is_told_in_one_line(
    answer: bytes,
    with_code: bool,
    code: str,
    source: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with FakeServer(answer) as fake:
        assert send_here(fake.port, source, code if with_code else None) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{HOST}:{fake.port}" in line


def test_a_client_with_a_code_tells_a_server_without_it_nothing(
    code: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[bytes] = []

    def serve(peer: RawPeer) -> None:
        with contextlib.suppress(SocketPairError), Connection(peer.socket, "client") as connection:
            connection.receive(Hello)
            pairing = Pairing(normalize_code(OTHER_CODE), server_side=True)
            context = pairing.finish(connection.receive(Pair).share)
            context.verify_mode = ssl.CERT_NONE  # it would take anyone
            connection.send(Pair(pairing.share))
            connection.start_tls(context, server_side=True)
            heard.append(connection.read(1))

    with FakeServer(serve) as fake:
        assert send_here(fake.port, source, code) == 1
    assert heard == []
    told = capfd.readouterr().err
    assert told == f"{HOST}:{fake.port} has another pairing code: check it there\n"


@pytest.mark.parametrize("kind", ["no code", "code wanted", "wait", "", "more"])
def test_no_answer_makes_a_client_with_a_code_advise_to_do_without(
    kind: str, code: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[bytes] = []

    def serve(peer: RawPeer) -> None:
        peer.receive()
        peer.receive()
        peer.send(common.encode_message(Error("no", kind)))
        heard.append(peer.read_all())

    with FakeServer(serve) as fake:
        assert send_here(fake.port, source, code) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "--open" not in line
    assert "--code" not in line
    assert heard == [b""]


def test_a_server_of_protocol_1_is_told_to_be_old(
    code: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paired = {"error": "this server wants its pairing code: ...", "code_wanted": True}
    with FakeServer(message("error", **paired)) as fake:
        assert send_here(fake.port, source, code) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"{HOST}:{fake.port} is of an older version of Socket Pair: update it"
    old = {"error": "this server speaks protocol 1, not 2: update one"}
    with FakeServer(message("error", **old)) as fake:
        assert send_here(fake.port, source, code) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith('says: "this server speaks protocol 1, not 2: update one"')
