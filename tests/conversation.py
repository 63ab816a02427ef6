"""Both sides of a file conversation in this process, for tests that play one of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import server
from common import Connection, Hello, Message, Welcome, decode_message, encode_message
from peers import RawPeer, socket_pair
from ports import HOST
from waiting import background


@contextlib.contextmanager
def real_server(folder: Path, overwrite: bool = False) -> Iterator[RawPeer]:
    """Give the client's end of a conversation with a server, hands shaken.

    The server must have ended soon after the ``with`` block, which hangs up.
    """
    near, far = socket_pair()

    def serve() -> None:
        with Connection(far, f"{HOST}:1") as connection:
            server.handle_file_client(connection, server.Store(str(folder), overwrite))

    with RawPeer(near) as peer, background(serve):
        yield peer
        peer.hang_up()


def say(*messages: Message) -> bytes:
    """Return messages as they go over the wire."""
    return b"".join(map(encode_message, messages))


def segments(content: bytes, digest: bytes | None = None) -> bytes:
    """Return a small file as it goes over the wire, with its SHA-256 or another `digest`."""
    end = common.LENGTH.pack(common.END_OF_FILE) + (digest or hashlib.sha256(content).digest())
    return (common.encode_frame(content) if content else b"") + end


def read_message(peer: RawPeer, *kinds: type[Message]) -> Message:
    """Return the next message that the other side says."""
    (size,) = common.LENGTH.unpack(peer.read(common.LENGTH.size))
    return decode_message(peer.read(size), kinds)


def welcome(peer: RawPeer) -> None:
    """Shake hands with a client as a server does."""
    assert read_message(peer, Hello) == Hello(common.PROTOCOL, "file")
    peer.send(say(Welcome(common.PROTOCOL, "file")))


def honest_server(folder: Path) -> Callable[[RawPeer], None]:
    """Return what serves the clients of a FakeServer as the real server does."""

    def serve(peer: RawPeer) -> None:
        welcome(peer)
        with Connection(peer.socket, "client") as connection:
            server.handle_file_client(connection, server.Store(str(folder)))

    return serve
