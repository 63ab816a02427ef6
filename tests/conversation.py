"""Both sides of a file conversation in this process, for tests that play one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import server
from common import Connection
from peers import RawPeer, socket_pair
from waiting import background


@contextlib.contextmanager
def real_server(folder: Path, overwrite: bool = False) -> Iterator[RawPeer]:
    """Give the client's end of a conversation with a server, hands shaken.

    The server must have ended soon after the ``with`` block, which hangs up.
    """
    near, far = socket_pair()

    def serve() -> None:
        with Connection(far, "client") as connection:
            server.handle_file_client(connection, server.Store(str(folder), overwrite))

    with RawPeer(near) as peer, background(serve):
        yield peer
        peer.hang_up()
