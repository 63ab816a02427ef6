"""Ports of this machine that nobody else gets, also where it runs these tests twice at once."""

from __future__ import annotations

import os
import socket
import sys
from collections import deque

HOST = "127.0.0.1"
MOST_HELD = 64  # far more than any test needs, and far less than a process may have open

_held: deque[int] = deque()  # descriptors


def free_port() -> int:
    """Return a port on which nothing listens, but whom it is given to.

    On Linux a socket that never listens holds it, until so many more have been: the system gives it
    to nobody who asks for any port, also while a server on it is started anew.
    """
    if len(_held) == MOST_HELD:
        os.close(_held.popleft())
    with socket.socket() as sock:
        if sys.platform == "linux":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        if sys.platform == "linux":
            _held.append(sock.detach())
        return port
