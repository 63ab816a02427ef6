"""A pairing code, and clients in this process; conftest.py has the fixtures that go with it."""

from __future__ import annotations

import os
import random
import ssl
from pathlib import Path

import pytest

import client
import common
from common import TLS, Pairing
from support import HOST, Server

CODE = "KQ7M-2XFD-9WPA"
OTHER_CODE = "KQ7M-2XFD-9WPB"
NAME = "quarterly figures.txt"
CONTENT = b"nobody but the two of us shall read this\n" * 5000

JUNK = {
    "nothing": b"",
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "noise": random.Random(1).randbytes(1_000_000),
    "a huge frame": b"\x7f\xff\xff\xff" + b"x" * 100_000,
    "the beginning of TLS": b"\x16\x03\x01\x40\x00" + b"\x01" * 100,
    "broken TLS": b"\x16\x03\x01\x00\x10" + b"\x01" * 100_000,
    "an alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "text": "h\u00e9llo\n".encode() * 1000,
    "deep": b"\x00\x00\x0f\xff" + b"[" * 0xFFF,
    "a long number": b"\x00\x00\x0f\xff" + b"9" * 0xFFF,
}


def make_hasty(patched: pytest.MonkeyPatch) -> None:
    """Make a client in this process soon tired of waiting."""
    patched.setattr(client, "HANDSHAKE_TIMEOUT_S", 1.0)
    patched.setattr(common, "PROGRESS_TIMEOUT_S", 1.0)


def send_here(port: int, path: Path, code: str | None = None) -> int:
    """Send a file from this process, for what is to be done many times; return the exit status."""
    args = client.parse_arguments(["file", "--quiet", "--retry=0", str(path)])
    return client.start_file_client(client.Address(HOST, port, code), args)


def check_paired(running: Server, code: str, tmp_path: Path) -> None:
    """Fail unless a server with the pairing code serves a real client."""
    probe = tmp_path / f"probe {random.getrandbits(64):x}"
    probe.write_bytes(os.urandom(1000))
    assert send_here(running.port, probe, code) == 0
    assert (running.folder / probe.name).read_bytes() == probe.read_bytes()
    (running.folder / probe.name).unlink()


def pair_contexts(near_code: str, far_code: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the TLS contexts of a client and of a server that have run SPAKE2 with their codes."""
    near = Pairing(near_code, server_side=False)
    far = Pairing(far_code, server_side=True)
    return near.finish(far.share), far.finish(near.share)


def shake_hands_in_memory(near: ssl.SSLContext, far: ssl.SSLContext) -> None:
    """Let a client's and a server's context meet; raises what the client raises, or the server."""
    sides = [TLS(near, False), TLS(far, True)]
    done = [False, False]
    for _ in range(4):
        for index, side in enumerate(sides):
            done[index] = done[index] or side.shake_hands()
            sides[1 - index].feed(side.output())
    assert done == [True, True]
