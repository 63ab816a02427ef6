"""Many listeners of an Icecast, each an HTTP connection of its own, read by one thread.

    python tests/http_crowd.py http://127.0.0.1:8000/live.opus --count 200 --keep one.opus

Ends when every listener has heard ``--seconds`` of sound. One picked at random then is what is
kept. The exit status is 1, and a line says why, where one was refused, dropped or left behind.
How far each is, the Ogg pages tell that it received: each has the number of its last sample.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import selectors
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

if sys.platform != "win32":
    import resource

CONNECT_LIMIT_S = 60.0
SILENCE_LIMIT_S = 60.0
RECEIVE_BYTES = 1 << 16
RATE = 48_000  # Ogg counts Opus in these, whatever it was made from
PAGE = b"OggS\0"
GRANULE = struct.Struct("<q")
GRANULE_AT = 6
PAGE_START_BYTES = GRANULE_AT + GRANULE.size
ANSWER = b"HTTP/1.0 200 OK\r\n"
# A listener so far behind the foremost has not kept up: Icecast's pages are of a second.
BEHIND_LIMIT_S = 3.0


class Listener:
    """One listener. `data` is the stream without HTTP's header, where it is to be kept."""

    def __init__(self, host: str, port: int, path: str, keep: bool) -> None:
        self.data = bytearray()
        self.first_granule = 0
        self.granule = 0
        self.received_bytes = 0
        self.gone = False
        self._keep = keep
        self._header: bytes | None = b""
        self._pending = b""
        self.sock = socket.create_connection((host, port), CONNECT_LIMIT_S)
        self.sock.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        self.sock.setblocking(False)

    @property
    def heard_s(self) -> float:
        """How much sound has come since the first page of it."""
        return (self.granule - self.first_granule) / RATE

    def receive(self) -> None:
        """Take what has arrived."""
        data = b""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            pass
        self.gone = not data
        if self._header is not None:
            data = self._take_header(self._header + data)
        self.received_bytes += len(data)
        if self._keep:
            self.data += data
        self._follow(self._pending + data)

    def _take_header(self, data: bytes) -> bytes:
        """Return what comes behind the header, once it is complete."""
        header, end, rest = data.partition(b"\r\n\r\n")
        self._header = None if end else data
        if end and not header.startswith(ANSWER):
            self.gone = True
        return rest

    def _follow(self, data: bytes) -> None:
        """Take the position of the last page that begins in `data`."""
        self._pending = data[-PAGE_START_BYTES + 1 :]
        start = data.rfind(PAGE, 0, max(0, len(data) - PAGE_START_BYTES + len(PAGE)))
        if start < 0:
            return
        (granule,) = GRANULE.unpack_from(data, start + GRANULE_AT)
        if granule > 0:  # not of the headers, nor a page without an end of a packet
            self.first_granule = self.first_granule or granule
            self.granule = granule


class Crowd:
    """All the listeners; use it in a ``with`` block, which hangs up."""

    def __init__(self, url: str, count: int, keep: bool = False) -> None:
        parts = urlsplit(url)
        self.listeners: list[Listener] = []
        self._selector = selectors.DefaultSelector()
        for _ in range(count):
            listener = Listener(str(parts.hostname), parts.port or 80, parts.path, keep)
            self.listeners.append(listener)
            self._selector.register(listener.sock, selectors.EVENT_READ, listener)
            self.read(0)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self.listeners:
            listener.sock.close()
        self._selector.close()

    def read(self, timeout_s: float) -> bool:
        """Take what has arrived; return whether something has within `timeout_s`."""
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            listener: Listener = key.data
            listener.receive()
            if listener.gone:
                self._selector.unregister(listener.sock)
        return bool(ready)

    def kept_up(self) -> int:
        """Return how many are there still, and about where the foremost is."""
        foremost = max(listener.granule for listener in self.listeners)
        limit = foremost - BEHIND_LIMIT_S * RATE
        return sum(not each.gone and each.granule >= max(1, limit) for each in self.listeners)


def allow_many_connections() -> None:
    """Raise this process's own limit of open files as far as it may."""
    if sys.platform != "win32":
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(argv: Sequence[str] | None = None) -> int:
    """Listen; return 0 where every listener has kept up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--keep", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    allow_many_connections()
    with Crowd(arguments.url, arguments.count, keep=True) as crowd:
        while any(each.heard_s < arguments.seconds and not each.gone for each in crowd.listeners):
            if not crowd.read(SILENCE_LIMIT_S):
                break
        kept_up = crowd.kept_up()
        picked = random.randrange(arguments.count)
        arguments.keep.write_bytes(crowd.listeners[picked].data)
        gone = sum(each.gone for each in crowd.listeners)
        print(f"{kept_up} of {arguments.count} kept up, {gone} were refused or dropped")
        print(f"number {picked} is kept", flush=True)
    return 0 if kept_up == arguments.count else 1


if __name__ == "__main__":
    sys.exit(main())
