"""Throws bad messages at the framing and at both sides; by hand, a million of them.

    python tests/fuzz/messages.py --count 1000000 [--seed N] [--target NAME]

A target takes the bytes that the other side is to have sent, and raises where this side does
anything but what it promises: it may refuse, in a line fit for a terminal, and nothing else.
The inputs are real conversations, damaged as bytes or as messages. With atheris installed
(``pip install atheris``), ``--atheris`` lets it look for inputs that reach new code instead.

No sockets here: a `Wire` stands for one, so that a million take minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import listening

import client
import common
import server
from common import Connection, SocketPairError

Target = Callable[[bytes], None]

CODE = "KQ7M2XFD9WPA"
SEED = hashlib.sha256(b"a session key").digest()
CONTENT = b"a few bytes of content\n" * 20
MAX_ANSWER_BYTES = 4 * 1024 * 1024


# --- what stands for the other side ---------------------------------------------------------


class Wire:
    """Stands for a socket whose other side has sent `incoming`, and then hung up."""

    def __init__(self, incoming: bytes) -> None:
        self._incoming = memoryview(incoming)
        self.sent = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return what comes next."""
        data = bytes(self._incoming[:size])
        if not flags & socket.MSG_PEEK:
            self._incoming = self._incoming[len(data) :]
        return data

    def recv_into(self, view: memoryview) -> int:
        """Fill `view` with what comes next."""
        data = self.recv(len(view))
        view[: len(data)] = data
        return len(data)

    def send(self, data: memoryview) -> int:
        """Take an answer; the other side never reads it."""
        self.sent += len(data)
        assert self.sent < MAX_ANSWER_BYTES, "an answer without end"
        return len(data)

    def fileno(self) -> int:
        """Be no descriptor."""
        return -1

    def getpeername(self) -> tuple[str, int]:
        """Return this machine's address."""
        return ("127.0.0.1", 9)

    def settimeout(self, seconds: float | None) -> None:
        """Never wait."""

    setblocking = settimeout

    def setsockopt(self, *_: Any) -> None:
        """Have no options."""

    def shutdown(self, how: int) -> None:
        """Be gone already."""

    def close(self) -> None:
        """Be gone already."""


def connection_from(incoming: bytes) -> Connection:
    return Connection(Wire(incoming), "peer")  # type: ignore[arg-type]


class PrintableLog(logging.Handler):
    """Fails where a log line holds a control code."""

    def emit(self, record: logging.LogRecord) -> None:
        """Check a line."""
        check_printable(record.getMessage())


def check_printable(text: str) -> None:
    assert text.isprintable(), f"control codes in {text!r}"


# --- targets --------------------------------------------------------------------------------


@contextlib.contextmanager
def all_targets() -> Iterator[dict[str, Target]]:
    """Give each target by its name, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, quiet_log():
        place = Path(folder)
        yield {
            "framing": fuzz_framing,
            "handshake": fuzz_handshake,
            "files": FileServer(place / "server"),
            "client": FileClient(place / "client"),
            "listener": listening.Listener(Wire, None),
            "opus-listener": listening.Listener(Wire, 96),
            "pairing-server": fuzz_pairing_server,
            "pairing-client": fuzz_pairing_client,
            "tls-server": TLSSide(server_side=True),
            "tls-client": TLSSide(server_side=False),
        }


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    handler = PrintableLog()
    server.log.addHandler(handler)
    server.log.propagate = False
    server.log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        server.log.removeHandler(handler)
        server.log.propagate = True
        server.log.setLevel(logging.NOTSET)


def fuzz_framing(data: bytes) -> None:
    """Read messages until something is wrong, or the other side has hung up."""
    connection = connection_from(data)
    with contextlib.suppress(SocketPairError):
        while True:
            connection.receive(
                common.Hello, common.Offer, common.Start, max_bytes=common.MAX_HELLO_BYTES
            )


def fuzz_handshake(data: bytes) -> None:
    """Let in a client, of a server without a code."""
    endpoint = server.Endpoint("file", [], None, None)
    welcome = common.Welcome(common.PROTOCOL, "file")
    serving = server.Server(endpoint, lambda *_: None, max_clients=2, welcome=lambda *_: welcome)
    guest = server.Client(connection_from(data), "127.0.0.1")
    serving.clients.add(guest)
    serving._converse(guest)
    serving.stop()


class FileServer:
    """The server's side of the file conversation; nothing may appear outside its folder."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._inbox = place / "inbox"
        self._inbox.mkdir(parents=True)
        (place / "canary").write_bytes(b"untouched")
        self._count = 0

    def __call__(self, data: bytes) -> None:
        """Take a client's files."""
        self._count += 1
        if self._count % 500 == 0:
            self._clean()
        with (
            mock.patch.object(server, "RELEASE_TIMEOUT_S", 0.0),
            mock.patch.object(server, "TAKEOVER_TIMEOUT_S", 0.0),
        ):
            server.handle_file_client(connection_from(data), server.Store(str(self._inbox)))
        assert sorted(os.listdir(self._place)) == ["canary", "inbox"]
        assert (self._place / "canary").read_bytes() == b"untouched"

    def _clean(self) -> None:
        """Begin with an empty folder, where a tree may be deeper than a path can be long."""
        for place, folders, names in os.walk(self._inbox, topdown=False):
            for name in names:
                os.unlink(os.path.join(place, name))
            for name in folders:
                os.rmdir(os.path.join(place, name))


class FileClient:
    """The client's side, sending two files."""

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True)
        self._paths = [str(place / "a.txt"), str(place / "b.txt")]
        for path in self._paths:
            Path(path).write_bytes(CONTENT)

    def __call__(self, data: bytes) -> None:
        """Send the files to a server."""
        printed = io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                mock.patch.object(socket, "create_connection", lambda *_, **__: Wire(data))
            )
            stack.enter_context(contextlib.redirect_stdout(printed))
            stack.enter_context(contextlib.redirect_stderr(printed))
            address = client.Address("127.0.0.1", 9)
            args = client.parse_arguments(["file", "--retry=0", *self._paths])
            status = client.start_file_client(address, args)
        assert status in (0, 1)
        if status == 1:
            assert printed.getvalue(), "failed without a word"
        for line in printed.getvalue().splitlines():
            check_printable(line)
        for path in self._paths:
            assert Path(path).read_bytes() == CONTENT


def fuzz_pairing_server(data: bytes) -> None:
    """Take a client of a server with a code; nobody without it may get past the handshake."""
    gate = server.Gate(CODE)
    try:
        gate.let_in(connection_from(data), "127.0.0.1")
    except SocketPairError as error:
        check_printable(str(error))
    else:
        raise AssertionError("let in without the code")


def fuzz_pairing_client(data: bytes) -> None:
    """Shake hands with a server, with a code; it has to prove that as well."""
    try:
        client.shake_hands(connection_from(data), CODE, client.FILE_HELLO)
    except SocketPairError as error:
        check_printable(str(error))
    else:
        raise AssertionError("took a server for one with the code")


class TLSSide:
    """One side of TLS after SPAKE2; nobody without the code may get past the handshake."""

    def __init__(self, server_side: bool) -> None:
        self._context = common.make_tls_context(SEED, server_side=server_side)
        self._server_side = server_side

    def __call__(self, data: bytes) -> None:
        """Shake hands."""
        connection = connection_from(data)
        try:
            connection.start_tls(self._context, server_side=self._server_side)
        except SocketPairError as error:
            check_printable(str(error))
        else:
            raise AssertionError("let in without the code")


# --- conversations --------------------------------------------------------------------------


def frame(content: bytes) -> bytes:
    return struct.pack("!I", len(content)) + content


def entry(path: str, size: int | None, **more: Any) -> dict[str, Any]:
    return {"path": path, "size": size, "mtime_ns": 10**18, "mode": 0o644, **more}


def segments(content: bytes) -> bytes:
    return frame(content) + frame(b"") + hashlib.sha256(content).digest()


HELLO = {"type": "hello", "protocol": 2, "mode": "file"}
WELCOME = {"type": "welcome", "protocol": 2, "mode": "file"}
PAIRING = {"type": "hello", "protocol": 2, "mode": "pairing"}
# Of both sides, with another code.
SHARES = [common.Pairing("another code", server_side=side).share.hex() for side in (False, True)]
SHA = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)

# What one side says: messages, and bytes that are none.
Conversation = list["dict[str, Any] | bytes"]

CONVERSATIONS: dict[str, list[Conversation]] = {
    "framing": [[HELLO, {"type": "offer", "entries": []}, {"type": "error", "error": "no"}]],
    "handshake": [[HELLO], [b"GET / HTTP/1.1\r\n\r\n"], [b"\x16\x03\x01\x02\x00" + bytes(512)]],
    "files": [
        [
            {
                "type": "offer",
                "entries": [
                    entry("a.txt", SIZE),
                    entry("folder/b.txt", SIZE, mode=0o755),
                    entry("pipe", None),
                    {"path": "folder", "mtime_ns": 0, "folder": True},
                ],
            },
            {"type": "hashing"},
            segments(CONTENT) * 3,
        ],
        [
            {"type": "offer", "entries": [entry("a.txt", SIZE), entry("again.txt", SIZE)]},
            {"type": "prefixes", "entries": [[SHA], [SHA]]},
            segments(CONTENT),
            struct.pack("!I", 0xFFFFFFFE) + struct.pack("!I", 0xFFFFFFFF),
            {"type": "offer", "entries": [entry("more.txt", SIZE)]},
            segments(CONTENT),
        ],
        [
            {"type": "offer", "entries": [entry("../x", 1), entry("a//b", 1), entry("a.txt", 0)]},
            {"type": "prefixes", "entries": [[SHA]]},
            segments(b""),
        ],
    ],
    "client": [
        [
            WELCOME,
            {"type": "start", "entries": [{"offset": 0}, {"offset": 0}]},
            {"type": "results", "entries": [[0, {"saved": "a.txt"}], [1, {"saved": "b (1).txt"}]]},
        ],
        [
            WELCOME,
            {"type": "hashing"},
            {"type": "held", "entries": [[0, [10, 100]], [1, [SIZE]]]},
            {"type": "start", "entries": [{"offset": 100}, {"already": "b.txt"}]},
            {"type": "results", "entries": [[0, {"failed": "no space left on device"}]]},
        ],
        [{"type": "error", "error": "this server is busy", "kind": ""}],
        [WELCOME, {"type": "error", "error": "not now"}],
    ],
    "pairing-server": [
        [PAIRING, {"type": "pair", "share": SHARES[0]}, b"\x16\x03\x01\x02\x00" + bytes(512)],
        [PAIRING, {"type": "pair", "share": "41" + 32 * "00"}, HELLO],
        [HELLO],
        [b"\x16\x03\x01\x02\x00" + bytes(512)],
    ],
    "pairing-client": [
        [{"type": "pair", "share": SHARES[1]}, b"\x16\x03\x03\x02\x00" + bytes(512)],
        [{"type": "pair", "share": "42" + 32 * "00"}, WELCOME],
        [{"type": "error", "error": "no \x1b[2J", "kind": "no code"}],
        [WELCOME],
    ],
    "tls-server": [],
    "tls-client": [],
    **listening.CONVERSATIONS,
}


def record_tls() -> None:
    """Add what both sides of a real TLS handshake say: replayed, it must not let anyone in."""
    near = common.TLS(common.make_tls_context(SEED, server_side=False), False)
    far = common.TLS(common.make_tls_context(SEED, server_side=True), True)
    said = {"tls-server": b"", "tls-client": b""}
    for _ in range(3):
        near.shake_hands()
        said["tls-server"] += (data := near.output())
        far.feed(data)
        far.shake_hands()
        said["tls-client"] += (data := far.output())
        near.feed(data)
    for name, data in said.items():
        CONVERSATIONS[name] = [[data], [b"\x15\x03\x03\x00\x02\x02\x31"], [b"HTTP/1.1 400 Bad\r\n"]]


# --- damage ---------------------------------------------------------------------------------

NASTY: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        7,
        1000,
        -1,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        2**64,
        10**300,
        1.5,
        1e308,
    ),
    *("", "a", "..", "../x", "/etc/passwd", "a/../../x", "C:\\x", "a\0b", "\x1b[2J\x07", "\ud800"),
    *("x" * 300, "a/" * 3000, ".socketpair-part", "CON", "\u202egpj.exe", SHA, SHA.upper()),
    *([], [[]], [0], [[0, []]], [None] * 1001, {}, {"path": "a"}, {"offset": 0}),
    *({"offset": 10**9}, {"saved": 1}, {"type": "error"}),
    *(
        "hello",
        "pair",
        "pairing",
        SHARES[0],
        "offer",
        "start",
        "held",
        "results",
        "prefixes",
        "error",
        "file",
        "audio",
    ),
]


def damage_value(value: Any, dice: random.Random) -> Any:
    """Return `value` with something in it replaced, left out or doubled."""
    if dice.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return dice.choice(NASTY)
    if isinstance(value, dict):
        key = dice.choice(list(value))
        changed = dict(value)
        if dice.random() < 0.15:
            del changed[key]
        else:
            changed[key] = damage_value(value[key], dice)
        return changed
    at = dice.randrange(len(value))
    how = dice.random()
    if how < 0.1:
        return value[:at] + value[at + 1 :]
    if how < 0.2:
        return value[:at] + value[at : at + 1] * dice.randrange(2, 5) + value[at + 1 :]
    return [*value[:at], damage_value(value[at], dice), *value[at + 1 :]]


def damage_bytes(data: bytes, dice: random.Random) -> bytes:
    """Return `data` with some bytes changed, cut out, doubled, put in or cut off."""
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + dice.choice((1, 1, 4, 30)))
        before, struck, after = data[:at], data[at:end], data[end:]
        noise = dice.randbytes(dice.randrange(1, 8))
        data = dice.choice(
            (
                before + dice.randbytes(len(struck)) + after,
                before + after,
                before + struck + struck + after,
                before + noise + struck + after,
                before + b"\xff\xff\xff\xfe" + struck + after,
                before,
            )
        )
    return data


def encode(part: Any) -> bytes:
    """Return a message, or bytes, as they are sent."""
    return part if isinstance(part, bytes) else frame(json.dumps(part).encode())


def make_input(name: str, dice: random.Random) -> bytes:
    """Return a damaged conversation for a target."""
    how = dice.random()
    if how < 0.02:
        return dice.randbytes(dice.randrange(200))
    parts = list(dice.choice(CONVERSATIONS[name]))
    if how < 0.6:
        at = dice.randrange(len(parts))
        part = parts[at]
        if not isinstance(part, bytes):
            parts[at] = damage_value(part, dice)
    if how > 0.5:
        return damage_bytes(b"".join(map(encode, parts)), dice)
    return b"".join(map(encode, parts))


# --- by hand --------------------------------------------------------------------------------


def run_random(targets: dict[str, Target], count: int, seed: int) -> None:
    """Give each target its part of `count` damaged conversations."""
    # TLS is slow, and its parsing is OpenSSL's: a twentieth each; so is SPAKE2.
    weights = {name: 1 if name.startswith(("tls", "pairing")) else 6 for name in targets}
    for name, target in targets.items():
        share = count * weights[name] // sum(weights.values())
        dice = random.Random(f"{seed} {name}")
        started = time.monotonic()
        for number in range(share):
            data = make_input(name, dice)
            try:
                target(data)
            except BaseException:
                print(f"{name}: input {number} of seed {seed}: {data!r}")
                raise
        seconds = time.monotonic() - started
        print(f"{name}: {share} inputs in {seconds:.0f} s, none got through", flush=True)


def run_atheris(target: Target, name: str, arguments: list[str]) -> None:
    """Let atheris look for inputs, beginning with the real conversations."""
    atheris = importlib.import_module("atheris")  # which only few have

    with tempfile.TemporaryDirectory() as corpus:
        for number, parts in enumerate(CONVERSATIONS[name]):
            Path(corpus, str(number)).write_bytes(b"".join(map(encode, parts)))
        atheris.instrument_all()
        atheris.Setup([sys.argv[0], corpus, *arguments], target)
        atheris.Fuzz()


def main() -> None:
    """Fuzz until done; a traceback with its input is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=list(CONVERSATIONS))
    parser.add_argument("--atheris", action="store_true", help="needs --target")
    args, rest = parser.parse_known_args()
    record_tls()
    with all_targets() as targets:
        if args.atheris:
            run_atheris(targets[args.target], args.target, rest)
        else:
            chosen = {args.target: targets[args.target]} if args.target else targets
            run_random(chosen, args.count, args.seed)


if __name__ == "__main__":
    main()
