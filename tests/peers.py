"""Peers that say what they are told to: the protocol by hand, for what a real one never does.

``RawClient`` talks to a server, ``FakeServer`` has one function or one answer for all its clients.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common import PROTOCOL
from ports import HOST
from waiting import LIMIT_S

if TYPE_CHECKING:
    from typing_extensions import Self

MIB = 1024 * 1024
PEER_LIMIT_S = 60.0


def frame(content: bytes) -> bytes:
    """Return a frame."""
    return struct.pack("!I", len(content)) + content


def message(kind: str, **fields: Any) -> bytes:
    """Return a message."""
    return frame(json.dumps({"type": kind, **fields}).encode())


HELLO = message("hello", protocol=PROTOCOL, mode="file")
END_OF_FILE = struct.pack("!I", 0)
GIVEN_UP = struct.pack("!I", 0xFFFFFFFF)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected TCP sockets of this machine."""
    with socket.create_server((HOST, 0)) as listening:
        near = socket.create_connection(listening.getsockname(), timeout=PEER_LIMIT_S)
        far, _ = listening.accept()
        far.settimeout(PEER_LIMIT_S)
        return near, far


class RawPeer:
    """One end of a connection, in the hands of a test. Use it in a ``with`` block."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.socket.settimeout(PEER_LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes, all of them or as many as the other side takes before it hangs up."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def hang_up(self) -> None:
        """Send no more."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection at once, so that the other side sees it broken."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read_all(self) -> bytes:
        """Return all that the other side sends until it hangs up."""
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while chunk := self.socket.recv(65536):
                data += chunk
        return bytes(data)

    def is_left_while_it_sends(self, data: bytes) -> bool:
        """Send a byte a second; return whether the other side hangs up before the last."""
        self.socket.settimeout(1.0)
        return any(self._is_left_after(bytes([byte])) for byte in data)

    def _is_left_after(self, byte: bytes) -> bool:
        self.send(byte)
        try:
            return not self.socket.recv(100)
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def read(self, size: int) -> bytes:
        """Return exactly so many bytes."""
        data = b""
        while len(data) < size:
            chunk = self.socket.recv(size - len(data))
            assert chunk, f"the other side hung up after {data!r}"
            data += chunk
        return data

    def receive(self) -> dict[str, Any]:
        """Return the other side's next message."""
        (size,) = struct.unpack("!I", self.read(4))
        value = json.loads(self.read(size))
        assert isinstance(value, dict)
        return value


class RawClient(RawPeer):
    """A client of whatever listens on `port`."""

    def __init__(self, port: int) -> None:
        super().__init__(socket.create_connection((HOST, port), timeout=PEER_LIMIT_S))

    def greet(self, mode: str = "file") -> Self:
        """Shake hands as a real client does."""
        self.send(message("hello", protocol=PROTOCOL, mode=mode))
        assert self.receive()["type"] == "welcome"
        return self

    def offer(self, *entries: Any) -> dict[str, Any]:
        """Offer files; return what the server says to that."""
        self.send(message("offer", entries=list(entries)))
        return self.receive()

    def send_file(self, path: str, content: bytes) -> dict[str, Any]:
        """Send a file that the server has not got; return what becomes of it."""
        start = self.offer({"path": path, "size": len(content)})
        if start["type"] != "start" or "offset" not in start["entries"][0]:
            return dict(start["entries"][0])
        segments = [content[at : at + MIB] for at in range(0, len(content), MIB)]
        self.send(b"".join(map(frame, segments)) + END_OF_FILE + hashlib.sha256(content).digest())
        return self.receive_result()

    def receive_result(self) -> dict[str, Any]:
        """Return what has become of the one file under way."""
        answer = self.receive()
        assert answer["type"] == "results", answer
        ((_, outcome),) = answer["entries"]
        return dict(outcome)


class FakeServer:
    """Serves one client after another as `serve` does, on a `port` of its own.

    Where `serve` is bytes, each client is sent these once it has spoken, and nothing else. Use it
    in a ``with`` block.
    """

    def __init__(self, serve: bytes | Callable[[RawPeer], object]) -> None:
        self._answer = serve
        self._listening = socket.create_server((HOST, 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT_S)
        self._listening.close()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:  # the test is over
                return
            with RawPeer(sock) as peer, contextlib.suppress(OSError):
                self._serve(peer)

    def _serve(self, peer: RawPeer) -> None:
        if not isinstance(self._answer, bytes):
            self._answer(peer)
            return
        peer.socket.recv(65536)
        peer.send(self._answer)
        peer.hang_up()
        peer.read_all()
