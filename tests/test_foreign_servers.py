"""A client that meets something other than its server says so in one line, and tells it nothing."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

import pytest

from common import Connection, SocketPairError, make_tls_context, normalize_code
from pairing import JUNK, OTHER_CODE, send_here
from support import HOST, FakeServer, RawPeer


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
    tls: ssl.SSLContext,
    source: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with FakeServer(answer) as fake:
        assert send_here(fake.port, source, tls if with_code else None) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{HOST}:{fake.port}" in line


def test_a_client_with_a_code_tells_a_server_without_it_nothing(
    tls: ssl.SSLContext, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_tls_context(normalize_code(OTHER_CODE), server_side=True)
    other.verify_mode = ssl.CERT_NONE  # it would take anyone
    heard: list[bytes] = []

    def serve(peer: RawPeer) -> None:
        with contextlib.suppress(SocketPairError), Connection(peer.socket, "client") as connection:
            connection.start_tls(other, server_side=True)
            heard.append(connection.read(1))

    with FakeServer(serve) as fake:
        assert send_here(fake.port, source, tls) == 1
    assert heard == []
    assert capfd.readouterr().err == f"{HOST}:{fake.port} has another pairing code\n"
