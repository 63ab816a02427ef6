"""What both sides of Socket Pair agree on; ``server.py`` and ``client.py`` stand on it.

From the bottom up:

===================  ==============================================================
errors               ``SocketPairError`` and its kin: every failure a user may meet
text for people      ``escape``, ``format_bytes``, ``say``, ``complain``
pairing code         ``normalize_code``; ``Pairing``: SPAKE2, from which both sides make the one
                     certificate that TLS takes for this connection
the wire             every message as a value, ``encode_message`` and ``decode_message``, and the
                     whole conversation of both modes; ``AudioFormat``, ``AudioBlock``: sound
connection           ``TimedSocket``, ``TLS``, ``ReceiveBuffer``, ``ByteStream``, and on top of
                     them ``Connection``, which sends and receives messages; ``Deadline``;
                     ``SignsOfLife``, while a disk keeps the other side waiting
time                 ``TimeLine``: when each sample frame passes a sound card
local network        ``Announced``: what a server tells it; ``open_network``; ``disguise``: whether
                     both sides are on one machine
blocks and checksum  ``Blocks``; ``BlockPipeline``, where a second thread consumes them while the
                     next is filled; ``calculate_checksum``: SHA-256 of a file or its beginning
sound card           in five rooms: the *devices*, and what opens them: ``SoundSystem``, which is
                     *PortAudio*, or ``JackProcess``, PortAudio in a process that *JACK* may end;
                     one *in use*: ``SoundCard``; the *last words* of a C library
console              ``Console``: lines, questions and the status line; ``LevelMeter``
command line         arguments of both scripts; ``INTERRUPTS``: signals, and ``in_background``,
                     where the system lets none through; ``run``, which turns every end of a
                     program into its exit status
===================  ==============================================================

Neither this module nor ``client.py`` uses dataclasses: importing them, and inspect with them,
would be a tenth of all the time that a small file takes, Python's start included.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import queue
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, overload

if TYPE_CHECKING:
    import ssl
    from ipaddress import IPv4Interface, IPv6Interface
    from multiprocessing.connection import Connection as PipeConnection

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from zeroconf import Zeroconf

__version__ = "1.0.0"

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50007


# --- errors ---------------------------------------------------------------------------------

# What OpenSSL makes of the alerts with which a side turns down the other's certificate.
CERTIFICATE_ALERTS = {
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "TLSV1_ALERT_DECRYPT_ERROR",
    "TLSV1_ALERT_UNKNOWN_CA",
}


class SocketPairError(Exception):
    """Base of every failure that a user is told in one line, without a traceback."""


class ConnectionLost(SocketPairError):
    """The connection is gone or has come to a stop; trying again may help."""


class PeerClosed(ConnectionLost):
    """The other side closed the connection between two frames: a clean end."""

    def __init__(self) -> None:
        super().__init__("the other side closed the connection")


class ConnectionBroken(ConnectionLost):
    """The connection ended inside a frame, or the system reported it broken."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"connection lost: {reason}")


class PeerStalled(ConnectionLost):
    """The other side sent or took nothing for as long as it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the other side made no progress for {seconds:.0f} s")


class ProtocolError(SocketPairError):
    """The other side sent something that Socket Pair never sends."""


class BadField(ProtocolError):
    """A message has a field that it never has."""

    def __init__(self, field: str) -> None:
        super().__init__(f"received a message with a bad {field!r}")


class PeerRefused(SocketPairError):
    """The other side answered with an error of its own: its words, escaped, and their kind."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class FileShrunk(SocketPairError):
    """A file has fewer bytes than it had."""


class NotPaired(SocketPairError):
    """The TLS handshake failed; `wrong_code` if for want of the same pairing code."""

    def __init__(self, error: ssl.SSLError) -> None:
        import ssl  # noqa: PLC0415  (see make_tls_context)

        super().__init__(describe_error(error))
        is_refused = isinstance(error, ssl.SSLCertVerificationError)
        self.wrong_code = is_refused or error.reason in CERTIFICATE_ALERTS


# --- text for people ------------------------------------------------------------------------

PYTHON = sys.executable or "python3"  # the one that runs
# Those of requirements.txt that Debian 12 has as python3-NAME. Its av crashes when it encodes.
DEBIAN_PACKAGES = {"cryptography", "ifaddr", "numpy", "pyaudio", "spake2", "tqdm", "zeroconf"}
# What a package raises while it is imported that is missing, or is broken: built for another
# Python, another processor or another library.
LOAD_ERRORS = (
    ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, SyntaxError
)  # fmt: skip
# In less than the first, few bytes tell no speed; in less than the second, none do.
MIN_MEASURED_BYTES = 1024 * 1024
MIN_MEASURED_S, MIN_MEASURED_MANY_S = 1.0, 0.01


def escape(text: str, limit: int = 500) -> str:
    """Return `text` fit for a terminal: control codes spelled out, at most `limit` characters.

    File names and error texts come from the other side and may hold anything, sequences that
    move the cursor or rewrite earlier lines among them.
    """
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    if shown.isprintable():
        return shown
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


def cells(text: str) -> int:
    """Return how many columns of a terminal a line takes at most: wide characters take two."""
    if text.isascii():
        return len(text)
    import unicodedata  # noqa: PLC0415  (few lines need it)

    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def fit(text: str, columns: int) -> str:
    """Return `text`, or as much of its beginning as so many columns of a terminal hold."""
    while cells(text) > columns:
        text = text[: min(len(text) - 1, columns)]
    return text


def format_bytes(count: float) -> str:
    """Return a number of bytes in decimal units, as ``1.2 GB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    if unit == "bytes":
        return "1 byte" if count == 1 else f"{count:.0f} bytes"
    return f"{count:.1f} {unit}"


def tells_speed(count: int, seconds: float) -> bool:
    """Return whether so many bytes in so long tell a speed: a few, or a moment, tell none."""
    return seconds >= (MIN_MEASURED_S if count < MIN_MEASURED_BYTES else MIN_MEASURED_MANY_S)


def format_duration(seconds: float) -> str:
    """Return a time span as ``1:02:03``, or ``2:03`` under an hour."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def format_tenths(seconds: float) -> str:
    """Return a time span as `format_duration` does, with tenths of a second: ``2:03.4``."""
    tenths = int(round(seconds * 10, 6) + 0.5)  # a sum of blocks is not exactly half of one
    return f"{format_duration(tenths // 10)}.{tenths % 10}"


def counted(number: int, noun: str) -> str:
    """Return a number of things in words, as ``1 listener``, ``2 listeners``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_error(error: Exception) -> str:
    """Return what went wrong in words, an OSError's without number and path: ``no space left``."""
    kind = type(error).__name__  # where there are none, as of zeroconf on a machine that is busy
    if isinstance(error, OSError):
        if reason := getattr(error, "reason", ""):  # of ssl's
            return str(reason).replace("_", " ").lower()
        # What create_server() adds in brackets is for programmers.
        return (error.strerror or str(error) or kind).partition(" (while")[0].lower()
    return "out of memory" if isinstance(error, MemoryError) else str(error) or kind


def shell_line(*words: str) -> str:
    """Return `words` as a shell here takes them for just these."""
    if sys.platform == "win32":
        import subprocess  # noqa: PLC0415  (only advice needs it)

        return subprocess.list2cmdline(words)
    import shlex  # noqa: PLC0415

    return shlex.join(words)


def how_to_install(*packages: str) -> str:
    """Return the line that installs Python packages for this Python.

    Debian and Ubuntu refuse pip outside of a virtual environment (PEP 668), and have their own.
    """
    import sysconfig  # noqa: PLC0415  (see shell_line)

    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if sys.prefix != sys.base_prefix or not os.path.exists(marker):
        return shell_line(PYTHON, "-m", "pip", "install", *packages)
    if DEBIAN_PACKAGES.issuperset(packages) and (apt := apt_install()):
        return f"{apt} {' '.join(f'python3-{package}' for package in packages)}"
    environment = shell_line(PYTHON, "-m", "venv", "--system-site-packages", ".venv")
    if apt := apt_install():
        environment = f"{apt} python3-venv && {environment}"
    return f"{environment} && . .venv/bin/activate && pip install {' '.join(packages)}"


def apt_install() -> str:
    """Return what installs packages of Debian and Ubuntu; empty on other systems."""
    import shutil  # noqa: PLC0415  (see shell_line)

    if sys.platform == "win32" or not shutil.which("apt"):
        return ""
    return "apt install" if os.geteuid() == 0 else "sudo apt install"


def first_line(error: BaseException) -> str:
    """Return the first line of what `error` says, harmless to print."""
    return escape(str(error).strip().partition("\n")[0])


def format_address(host: str, port: int) -> str:
    """Return an address as it is written: ``127.0.0.1:50007``, ``[::1]:50007``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """Return whether a numeric address is this machine's own, which no other can reach."""
    return address == "::1" or address.removeprefix("::ffff:").startswith("127.")


def is_numeric(host: str) -> bool:
    """Return whether `host` is an address, rather than a name that somebody is asked for."""
    family, address = socket.AF_INET, host
    if ":" in host:
        family, address = socket.AF_INET6, host.partition("%")[0]
    try:
        socket.inet_pton(family, address)
    except (OSError, ValueError):  # ValueError: characters that no address has
        return False
    return True


def say(text: str) -> None:
    """Print a line for people on standard output, at once.

    Raises BrokenPipeError, and SocketPairError as where that is a file on a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = describe_error(error)
        raise SocketPairError(f"cannot write to standard output: {reason}") from error


def complain(text: str) -> None:
    """Print what went wrong on standard error, at once; nobody is told where that takes nothing."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


# --- pairing code ---------------------------------------------------------------------------
#
# A pairing code is proved without being told: both sides run SPAKE2 (RFC 9382), whose outcome is
# the same key on both sides if they have the same code. From that key both make one certificate,
# for this connection alone, and present it to each other in TLS 1.3, trusting nothing else. Who has
# another code learns that, and nothing more: each guess takes a connection, and nothing that
# travels lets codes be tried elsewhere.

CODE_LENGTH = 8  # 40 bits, if they are random
CLIENT_ID = b"Socket Pair client"
SERVER_ID = b"Socket Pair server"
CERTIFICATE_LABEL = b"Socket Pair certificate, version 2"
# A self-signed X.509 certificate for an Ed25519 key, all of it but the key and the signature. The
# builder of the package cryptography makes the same, and takes 50 ms to load.
CERTIFICATE_HEAD = bytes.fromhex("3081da")
CERTIFICATE_BODY = bytes.fromhex(
    "30818da003020102020101300506032b6570"  # version 3, serial number 1, Ed25519
    "30163114301206035504030c0b536f636b65742050616972"  # issuer: CN=Socket Pair
    "3020170d3730303130313030303030305a180f39393939313233313030303030305a"  # 1970 to 9999
    "30163114301206035504030c0b536f636b65742050616972"  # subject: CN=Socket Pair
    "302a300506032b6570032100"  # Ed25519, and the public key follows
)
CERTIFICATE_TAIL = bytes.fromhex("300506032b6570034100")  # Ed25519, and the signature follows
PRIVATE_KEY_HEAD = bytes.fromhex("302e020100300506032b657004220420")  # PKCS #8; the seed follows

SEQUENCES = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ 01234567890 1QAZ2WSX3EDC4RFV5TGB6YHN7UJM8IK 1Q2W3E4R5T6Y7U8I9O0P"
    " QWERTYUIOPASDFGHJKLZXCVBNM QWERTZUIOPASDFGHJKLYXCVBNM AZERTYUIOPQSDFGHJKLMWXCVBN"
)
# What stands in instructions in place of a code, and what people take first.
PLACEHOLDERS = (
    "YOUR|MY|THE|OUR|A|SOME|EXAMPLE|SAMPLE|TEST|SECRET|PAIRING|SOCKET|PAIR|INSERT|ENTER|CHANGE|PUT"
    "|CHOOSE|REPLACE|SET|USE|TYPE|ONE|OF|OWN|NEW|HERE|ME|THIS|WITH|IT|CODE|PASSWORD|PASSPHRASE|KEY"
    "|PASSWRD|TODO|FIXME|XXX|ADMIN|LETMEIN|WELCOME|ILOVEYOU|TRUSTNO|QWERTY|ASDF|ABC|ABCD|PASS|WORD"
)
PLACEHOLDER_DIGITS = 4  # that such a code may have besides
VOWELS = "AEIOUY"
LONGEST_WORD = 11  # longer, letters alone may be several words


def normalize_code(text: str) -> str:
    """Return what counts of a pairing code: neither case nor spaces nor dashes do.

    People read codes out and type them, and a messenger turns a dash into a longer one. Raises
    ArgumentTypeError of argparse, with the reason, where it is no code or one that is soon guessed.
    """
    import unicodedata  # noqa: PLC0415  (most transfers do without a pairing code)

    code = "".join(
        char
        for char in unicodedata.normalize("NFKC", text).upper()
        if not char.isspace() and unicodedata.category(char) != "Pd"
    )
    if len(code) < CODE_LENGTH:
        raise argparse.ArgumentTypeError(
            f"a pairing code has at least {CODE_LENGTH} letters and digits"
        )
    if weakness := find_weakness(code):
        raise argparse.ArgumentTypeError(
            f"no server takes that pairing code, as it is soon guessed: {weakness}"
        )
    return code


def find_weakness(code: str) -> str:
    """Return what makes a normalized code one of the first that are guessed; empty if nothing."""
    period = (code + code).index(code, 1)
    if period <= 3:
        return "it repeats itself"
    if code in SEQUENCES or code in SEQUENCES[::-1]:
        return "it is a sequence"
    letters = "".join(filter(str.isalpha, code))
    is_nearly_all_letters = len(code) - len(letters) <= PLACEHOLDER_DIGITS
    if is_nearly_all_letters and re.fullmatch(f"({PLACEHOLDERS})+", letters):
        return "it is a placeholder, or what people take first"
    if len(code) <= LONGEST_WORD and looks_like_a_word(code):
        return "it looks like one word: mix in digits, or take several words"
    return ""


def looks_like_a_word(code: str) -> bool:
    """Return whether `code` is all letters, and can be pronounced."""
    if not code.isalpha():
        return False
    pattern = "".join("v" if char in VOWELS else "c" for char in code)
    is_mixed = 0.2 <= pattern.count("v") / len(pattern) <= 0.7
    return not code.isascii() or (is_mixed and "cccc" not in pattern and "vvvv" not in pattern)


def require_pairing_packages() -> None:
    """Load what pairing codes need, which takes a while; raises SocketPairError without it."""
    try:
        import cryptography  # noqa: F401, PLC0415
        import spake2  # noqa: F401, PLC0415
    except LOAD_ERRORS as error:
        raise SocketPairError(
            f"pairing codes need the packages spake2 and cryptography ({first_line(error)}): "
            f"{how_to_install('spake2', 'cryptography')}"
        ) from None


class Pairing:
    """One side's part in SPAKE2, for one connection: `share` goes to the other side.

    Made in some milliseconds; the first one loads the packages. Raises SocketPairError where they
    are missing.
    """

    def __init__(self, code: str, *, server_side: bool) -> None:
        require_pairing_packages()
        from spake2 import SPAKE2_A, SPAKE2_B  # noqa: PLC0415

        side = SPAKE2_B if server_side else SPAKE2_A
        password = code.encode("utf-8", "surrogatepass")
        self._server_side = server_side
        self._spake2 = side(password, idA=CLIENT_ID, idB=SERVER_ID)
        self.share: bytes = self._spake2.start()

    def finish(self, share: bytes) -> ssl.SSLContext:
        """Return a TLS context that works only with a side that has the same code. Call it once.

        `share` is the other side's. Whoever made it has tried one code by it, right or wrong.
        Raises ProtocolError where it is no share.
        """
        try:
            key: bytes = self._spake2.finish(share)
        except Exception as error:  # spake2 raises several, that are no kin
            raise ProtocolError(f"received a bad share ({describe_error(error)})") from error
        seed = hashlib.sha256(CERTIFICATE_LABEL + key).digest()
        return make_tls_context(seed, server_side=self._server_side)


def make_tls_context(seed: bytes, *, server_side: bool) -> ssl.SSLContext:
    """Return what lets in whoever has the same `seed` of 32 bytes, and nobody else.

    Each side presents the certificate that the seed makes, and trusts nothing but that. Raises
    SocketPairError.
    """
    # Here, as it takes as long to import as all else that a file on this machine needs.
    import ssl  # noqa: PLC0415

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate stands for the code, not for a host
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        # With a ticket that it never read, a client that hangs up would reset the connection.
        context.num_tickets = 0
    certificate = make_certificate(seed)
    context.load_verify_locations(cadata=certificate)
    try:
        load_identity(context, seed, certificate)
    except OSError as error:
        raise SocketPairError(f"cannot use the pairing code: {describe_error(error)}") from error
    return context


def make_certificate(seed: bytes) -> bytes:
    """Return the certificate of the Ed25519 key that `seed` makes, always the same, as DER."""
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

    key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    body = CERTIFICATE_BODY + raw_bytes(key.public_key())
    return CERTIFICATE_HEAD + body + CERTIFICATE_TAIL + key.sign(body)


def raw_bytes(key: Ed25519PublicKey) -> bytes:
    """Return the 32 bytes of a public key."""
    if hasattr(key, "public_bytes_raw"):
        return key.public_bytes_raw()
    # Until version 40 of cryptography; that takes 20 ms to load.
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        PublicFormat,
    )

    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def load_identity(context: ssl.SSLContext, seed: bytes, certificate: bytes) -> None:
    """Have `context` present `certificate`, whose key `seed` makes. Raises OSError.

    OpenSSL loads a key from a file only. The file is in memory where the system has such, and
    else one that only this user can open, for a moment; the key is worth nothing after this
    connection's handshake.
    """
    import base64  # noqa: PLC0415  (only pairing needs it)
    import ssl  # noqa: PLC0415

    key = base64.encodebytes(PRIVATE_KEY_HEAD + seed).decode("ascii")
    pem = f"-----BEGIN PRIVATE KEY-----\n{key}-----END PRIVATE KEY-----\n"
    identity = f"{pem}{ssl.DER_cert_to_PEM_cert(certificate)}".encode()
    if sys.platform == "linux" and os.path.exists("/proc/self/fd"):
        with open(os.memfd_create("identity"), "wb", buffering=0) as file:
            file.write(identity)
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="socket-pair-") as folder:
        path = os.path.join(folder, "identity.pem")
        with open(path, "wb") as file:
            file.write(identity)
        context.load_cert_chain(path)


# --- the wire -------------------------------------------------------------------------------
#
# All that travels, as values without a socket. A **frame** is a 4-byte big-endian length and that
# many bytes. A **message** is a frame that holds a JSON object, whose "type" is the name of a class
# below in lower case. Each class has its fields, and how they are encoded, decoded and checked,
# side by side; whatever bytes come, decoding raises ProtocolError alone.
#
# Either side may answer with an Error, which ends the conversation. It begins with:
#
#     client  Hello     which protocol it speaks, and the mode it wants; how it wants the sound
#     server  Welcome   the same; in audio mode also the sound's format
#
# With a pairing code all of that is encrypted, and this comes first, the only thing that is not:
#
#     client  Hello     which protocol it speaks, and PAIRING in place of the mode
#     client  Pair      its share of SPAKE2
#     server  Pair      the same
#     both              the handshake of TLS 1.3, by which each proves that it has the code
#
# Files, any number of times until the client hangs up:
#
#     client  Offer     up to 1,000 files and folders
#     server  Held      of which entries something is here already: how many bytes
#     client  Prefixes  the SHA-256 of that many first bytes of its own files
#     server  Start     for each entry: the offset to send from, or its outcome
#     client            for each entry to send, in order: segments (a length and so many bytes),
#                       then END_OF_FILE and the 32-byte SHA-256 of the whole, or GIVEN_UP;
#                       STILL_HERE every second in which a disk or a pipe gives it nothing
#     server  Results   the outcomes of entries, told as soon as there is nothing else to do
#
# Held and Prefixes are left out where nothing is held. Whoever hashes for long, or waits for a slow
# disk, sends Hashing every second meanwhile.
#
# Sound: each frame of the server's holds an AudioBlock, the last one a StreamEnd. A client that
# wants Opus is sent OpusBlocks; an AudioBlock is a sign of life there, and empty. A client that
# plays in step asks for the server's time at any moment:
#
#     client  TimeRequest
#     server  TimeReply    in front of the next block

PROTOCOL = 2
MODES = ("file", "audio")
PAIRING = "pairing"
FINDING = "finding"  # in place of a mode, by who only asks whether a server is there
# Kinds of an Error that the other side has words of its own for.
CODE_WANTED = "code wanted"
NO_CODE = "no code"
WAIT = "wait"
BUSY = "busy"
REFUSAL_KINDS = (CODE_WANTED, NO_CODE, WAIT, BUSY)

SHARE_BYTES = 33  # of SPAKE2: which side it is, and a point of the curve
LENGTH = struct.Struct("!I")
MAX_FRAME_BYTES = 1024 * 1024
MAX_HELLO_BYTES = 4 * 1024
MAX_JSON_VALUES = 32_000  # of JSON in a frame; the longest offer has six thousand
MAX_JSON_QUOTES = 64_000  # around strings; the longest offer has ten thousand
# Deeper than any message. Python 3.13 follows JSON for thousands of levels, past the end of a small
# stack, as a listener's thread has.
MAX_JSON_DEPTH = 16
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# Up to its end or that of all: else one without an end is looked through from each of its quotes.
JSON_STRING = rb'(?s)"[^"\\]*(?:\\.[^"\\]*)*"?'  # compiled where it is used, as few need it

Fields = dict[str, Any]
T = TypeVar("T")
A = TypeVar("A", bound="Message")
B = TypeVar("B", bound="Message")
C = TypeVar("C", bound="Message")


def encode_frame(content: bytes) -> bytes:
    """Return `content` as a frame."""
    return LENGTH.pack(len(content)) + content


def encode_message(message: Message) -> bytes:
    """Return the frame that holds `message`.

    Where a class does not encode its fields itself, they go as they are. Those that are None, or as
    they are by default, are left out.
    """
    fields: Fields = getattr(message, "_encode", message._asdict)()
    usual = message._field_defaults
    given = {name: value for name, value in fields.items() if value not in (None, usual.get(name))}
    typed = {"type": type(message).__name__.lower(), **given}
    return encode_frame(json.dumps(typed, separators=(",", ":")).encode())


def decode_message(content: bytes, expected: Iterable[type[Message]]) -> Message:
    """Return the message in a frame's `content`, of one of the types `expected`, or an Error.

    Raises ProtocolError where it is no such message.
    """
    check_size(content)
    try:
        check_depth(content)
        fields = json.loads(content.decode())  # of bytes it would take UTF-16 as well
    except ValueError:
        raise ProtocolError("received a message that is not JSON") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise ProtocolError("received a message without a type")
    kinds: list[type[Message]] = [*expected, Error]
    for kind in kinds:
        if fields["type"] == kind.__name__.lower():
            return kind._decode(fields)
    raise ProtocolError(f"unexpected message {escape(fields['type'], 40)!r}")


def check_size(content: bytes) -> None:
    """Raise ProtocolError where JSON would take far more memory than it has bytes.

    ``[{},{},{}]`` does, at thirty times as many; so do many strings, but not long ones.
    """
    is_large = content.count(b'"') - content.count(b'\\"') > MAX_JSON_QUOTES
    if not is_large and count_values(content) > MAX_JSON_VALUES:
        bare = without_strings(content)  # which takes far longer
        is_large = count_values(bare) > MAX_JSON_VALUES
    if is_large:
        raise ProtocolError("received a message of too many parts")


def check_depth(content: bytes) -> None:
    """Raise ValueError where JSON is far deeper than any message, or brackets have no end."""
    if content.count(b"[") + content.count(b"{") > MAX_JSON_DEPTH:
        brackets = without_strings(content).translate(None, NO_BRACKETS)
        for _ in range(MAX_JSON_DEPTH):
            brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")  # the innermost
        if brackets:
            raise ValueError


def without_strings(content: bytes) -> bytes:
    """Return JSON without its strings."""
    if b'\\"' in content:
        return re.sub(JSON_STRING, b"", content)
    return b"".join(content.split(b'"')[::2])  # far faster


def count_values(content: bytes) -> int:
    """Return about how many values JSON has; what looks like some inside strings counts as well."""
    return sum(map(content.count, (b"{", b"[", b",")))


def require(fields: Fields, field: str, kind: type[T]) -> T:
    """Return `fields[field]`, which must be of type `kind`; raises ProtocolError if not."""
    value = fields.get(field)
    # bool is a kind of int to Python, but never to a peer.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadField(field)
    return value


def require_number(fields: Fields, field: str, allowed: range) -> int:
    """Return `fields[field]`, a whole number that is `allowed`, as `require` does."""
    value = require(fields, field, int)
    if value not in allowed:
        raise BadField(field)
    return value


def optional_number(fields: Fields, field: str, allowed: range) -> int | None:
    """Do what `require_number` does, or return None where there is no such field."""
    value: int | None = fields.get(field)
    if value is None or (type(value) is int and value in allowed):
        return value
    raise BadField(field)


# handshake


class Hello(NamedTuple):
    """The first message of a client; `opus_kbit` a second is how it wants the sound, or as PCM."""

    protocol: int
    mode: str
    opus_kbit: int | None = None

    @classmethod
    def _decode(cls, fields: Fields) -> Hello:
        protocol, mode = require(fields, "protocol", int), require(fields, "mode", str)
        return cls(protocol, mode, optional_number(fields, "opus_kbit", OPUS_KBIT_PER_S))


class Sound(NamedTuple):
    """What a listener has to know of the server's sound.

    `stream` names the numbering of its sample frames: a client that comes back to the same one
    can tell how many it has missed. With `sync_ms` every listener plays each sample frame so long
    after its capture; without, as soon as it can. With `opus_kbit` a second it comes as Opus.
    """

    rate: int
    channels: int
    stream: str
    sync_ms: int | None = None
    opus_kbit: int | None = None

    @property
    def audio(self) -> AudioFormat:
        """The format of its samples; of Opus, that which it is decoded to."""
        return AudioFormat(self.rate, self.channels)

    @classmethod
    def decode(cls, fields: Fields) -> Sound:
        """Return what a Welcome tells of the sound; raises ProtocolError where that is wrong."""
        sound = cls(
            require_number(fields, "rate", SAMPLE_RATES),
            require_number(fields, "channels", CHANNEL_COUNTS),
            require(fields, "stream", str),
            optional_number(fields, "sync_ms", SYNC_MS),
            optional_number(fields, "opus_kbit", OPUS_KBIT_PER_S),
        )
        if sound.opus_kbit and (sound.rate != OPUS_RATE or sound.channels not in OPUS_CHANNELS):
            raise ProtocolError(f"received Opus with {sound.audio.describe()}")
        return sound


class Welcome(NamedTuple):
    """The answer to a Hello; `sound` is there in audio mode, and there alone.

    `folder` is the one that files go to, see `disguise`, told on this machine alone: a client that
    sends a folder around it leaves it out.
    """

    protocol: int
    mode: str
    sound: Sound | None = None
    folder: tuple[int, int] | None = None

    def _encode(self) -> Fields:
        sound = {} if self.sound is None else self.sound._asdict()
        return {"protocol": self.protocol, "mode": self.mode, **sound, "folder": self.folder}

    @classmethod
    def _decode(cls, fields: Fields) -> Welcome:
        protocol, mode = require(fields, "protocol", int), require(fields, "mode", str)
        folder: tuple[int, int] | None = None
        match fields.get("folder"):
            case [int(device), int(inode)]:
                folder = device, inode
        return cls(protocol, mode, Sound.decode(fields) if mode == "audio" else None, folder)


class Pair(NamedTuple):
    """One side's share of SPAKE2, see `Pairing`."""

    share: bytes

    def _encode(self) -> Fields:
        return {"share": self.share.hex()}

    @classmethod
    def _decode(cls, fields: Fields) -> Pair:
        share = require(fields, "share", str)
        if not re.fullmatch(f"[0-9a-f]{{{2 * SHARE_BYTES}}}", share):
            raise BadField("share")
        return cls(bytes.fromhex(share))


class Error(NamedTuple):
    """Why a side ends the conversation: in words, and as one of the ``REFUSAL_KINDS``."""

    error: str
    kind: str = ""

    @classmethod
    def _decode(cls, fields: Fields) -> Error:
        kind = fields.get("kind")
        if fields.get("code_wanted") is True:  # a server of protocol 1
            kind = CODE_WANTED
        return cls(require(fields, "error", str), kind if kind in REFUSAL_KINDS else "")


# files

MAX_BATCH_ENTRIES = 1000  # of files and folders in an offer
FILE_SIZES = range(2**63)
# The years from 1000 BC to 11,000, further than any file system goes.
MTIMES_NS = range(-(2**68), 2**68 + 1)
PERMISSIONS = range(0o1000)
MAX_RUN_CHARS = 32
MAX_HELD_LENGTHS = 100  # of one file that a server may ask about
# Measured with tests/bench/files.py: 1 MiB stays in a core's cache while it is received, hashed
# and written; smaller blocks cost more hand-overs, larger ones more trips to memory.
SEGMENT_BYTES = 1024 * 1024
PARTIAL_SUFFIX = ".socketpair-part"  # of the names of files that are not complete
# Lengths of segments that are none.
END_OF_FILE = 0
GIVEN_UP = 0xFFFFFFFF
STILL_HERE = 0xFFFFFFFE


class Entry(NamedTuple):
    """A file or folder in an offer. `path` has "/" between folders.

    A `size` of None is unknown until the end, as that of a pipe. `mode` is the source's nine
    permission bits, None where it has no such thing.
    """

    path: str
    size: int | None = None
    mtime_ns: int | None = None
    mode: int | None = None
    is_folder: bool = False

    def encode(self) -> Fields:
        """Return it as an item of an Offer."""
        fields = self._asdict()
        fields["folder"] = fields.pop("is_folder")
        return fields

    @classmethod
    def decode(cls, item: Any) -> Entry:
        """Return the entry in an item of an Offer; raises ProtocolError."""
        if not isinstance(item, dict):
            raise BadField("entries")
        return cls(
            require(item, "path", str),
            optional_number(item, "size", FILE_SIZES),
            optional_number(item, "mtime_ns", MTIMES_NS),
            optional_number(item, "mode", PERMISSIONS),
            bool(item.get("folder")),
        )


class Outcome(NamedTuple):
    """What has become of an entry.

    `kind` is "saved" or "already" (the same content was there), and `text` the name that it has at
    the server; or "failed", and `text` the reason.
    """

    kind: str
    text: str

    def encode(self) -> Fields:
        """Return it as an item of a Start or a Results."""
        return {self.kind: self.text}

    @classmethod
    def decode(cls, item: Any) -> Outcome:
        """Return the outcome in an item of a Start or a Results; raises ProtocolError."""
        if isinstance(item, dict):
            for kind in ("failed", "already", "saved"):
                if kind in item:
                    return cls(kind, require(item, kind, str))
        raise BadField("entries")


class Offer(NamedTuple):
    """A batch of files and folders that the client would send.

    What cannot be read of one is refused by itself: in its place stands an Outcome. `run` is the
    same in all offers of one run of the client, over lost connections, and in no others.
    """

    entries: Sequence[Entry | Outcome]
    run: str = ""

    def _encode(self) -> Fields:
        return {"entries": [entry.encode() for entry in self.entries], "run": self.run}

    @classmethod
    def _decode(cls, fields: Fields) -> Offer:
        items = require(fields, "entries", list)
        if len(items) > MAX_BATCH_ENTRIES:
            raise ProtocolError(f"received an offer of more than {MAX_BATCH_ENTRIES} files")
        run = require(fields, "run", str)[:MAX_RUN_CHARS] if "run" in fields else ""
        return cls([cls._decode_entry(item) for item in items], run)

    @staticmethod
    def _decode_entry(item: Any) -> Entry | Outcome:
        try:
            return Entry.decode(item)
        except ProtocolError as error:
            return Outcome("failed", str(error))


class Held(NamedTuple):
    """Of which entries something is at the server: their indexes, rising, and how many bytes."""

    entries: Sequence[tuple[int, Sequence[int]]]

    @classmethod
    def _decode(cls, fields: Fields) -> Held:
        entries: list[tuple[int, Sequence[int]]] = []
        for item in require(fields, "entries", list):
            match item:
                case [int(index), [*lengths]] if (
                    type(index) is int
                    and index > (entries[-1][0] if entries else -1)
                    and len(lengths) <= MAX_HELD_LENGTHS
                    and all(type(length) is int and length >= 0 for length in lengths)
                ):
                    entries.append((index, lengths))
                case _:
                    raise BadField("entries")
        return cls(entries)


class Hashing(NamedTuple):
    """A sign of life of whoever hashes for long."""

    @classmethod
    def _decode(cls, _fields: Fields) -> Hashing:
        return cls()


class Prefixes(NamedTuple):
    """The answer to Held: for each of its entries the SHA-256 of each length, in hexadecimal.

    One is empty where it is not told: the file cannot be read so far, or the length is too near to
    the one before, from which the bytes between could be guessed.
    """

    entries: Sequence[Sequence[str]]

    @classmethod
    def _decode(cls, fields: Fields) -> Prefixes:
        entries = require(fields, "entries", list)
        for entry in entries:
            if not isinstance(entry, list) or not all(isinstance(each, str) for each in entry):
                raise BadField("entries")
        return cls(entries)


class Start(NamedTuple):
    """The answer to an Offer: for each entry the offset to send from, or what has become of it."""

    entries: Sequence[int | Outcome]

    def _encode(self) -> Fields:
        return {
            "entries": [
                {"offset": entry} if isinstance(entry, int) else entry.encode()
                for entry in self.entries
            ]
        }

    @classmethod
    def _decode(cls, fields: Fields) -> Start:
        return cls(
            [
                require_number(item, "offset", FILE_SIZES)
                if isinstance(item, dict) and "offset" in item
                else Outcome.decode(item)
                for item in require(fields, "entries", list)
            ]
        )


class Results(NamedTuple):
    """What has become of entries, by their indexes in the offer."""

    entries: Sequence[tuple[int, Outcome]]

    def _encode(self) -> Fields:
        return {"entries": [(index, outcome.encode()) for index, outcome in self.entries]}

    @classmethod
    def _decode(cls, fields: Fields) -> Results:
        entries = []
        for item in require(fields, "entries", list):
            match item:
                case [int(index), outcome] if type(index) is int:
                    entries.append((index, Outcome.decode(outcome)))
                case _:
                    raise BadField("entries")
        return cls(entries)


# sound

SAMPLE_BYTES = 2
SAMPLE_RATES = range(1_000, 384_001)
CHANNEL_COUNTS = range(1, 33)
# A server that cannot keep up joins blocks, up to this.
MAX_BLOCK_MS = 1_000
BLOCK_HEADER = struct.Struct("!QQ")  # the number of the first sample frame, and `captured_ns`
# In place of that number; what follows the header is a reason, or TIMES.
END_OF_STREAM = 2**64 - 1
TIME_REPLY = 2**64 - 2
TIMES = struct.Struct("!QQ")  # `received_ns` and `answered_ns`
CLOCK_NS = range(2**63)  # what a clock can show
SYNC_MS = range(10, 10_001)
OPUS_RATE = 48_000  # Opus' own, whatever it was made of
OPUS_KBIT_PER_S = range(6, 511)
DEFAULT_OPUS_KBIT = 96
OPUS_CHANNELS = (1, 2)
OPUS_FRAMES = 480  # sample frames in a packet: 10 ms
MAX_OPUS_FRAMES = 5_760  # a packet never holds more (RFC 6716)
# The byte in front of a packet: all of it counts, or what an OPUS_PART_HEADER says.
OPUS_WHOLE, OPUS_PART = 0, 1
OPUS_PART_HEADER = struct.Struct("!BHH")  # that byte, `skipped` and `frames`


class AudioFormat(NamedTuple):
    """How the server's sound is sampled: 16-bit little-endian, channels interleaved.

    A **sample** is one number; a **sample frame** is one sample of each channel.
    """

    rate: int
    channels: int

    @property
    def frame_bytes(self) -> int:
        """The size of a sample frame."""
        return SAMPLE_BYTES * self.channels

    def frames_of(self, samples: bytes | bytearray | memoryview) -> int:
        """Return how many whole sample frames `samples` holds."""
        return len(samples) // self.frame_bytes

    def frames_in(self, milliseconds: float) -> int:
        """Return how many sample frames last `milliseconds`."""
        return round(self.rate * milliseconds / 1000)

    def milliseconds(self, frames: float) -> float:
        """Return how long `frames` last."""
        return frames / self.rate * 1000

    def describe(self) -> str:
        """Return the format in words, as ``48000 Hz mono``."""
        return f"{self.rate} Hz {describe_channels(self.channels)}"

    @property
    def max_block_bytes(self) -> int:
        """The size of the content of the largest frame that holds a block."""
        return BLOCK_HEADER.size + self.frames_in(MAX_BLOCK_MS) * self.frame_bytes


def describe_channels(channels: int) -> str:
    """Return a number of channels in words."""
    return {1: "mono", 2: "stereo"}.get(channels, f"{channels} channels")


class AudioBlock(NamedTuple):
    """Consecutive sample frames of the server's sound, at most ``MAX_BLOCK_MS`` of them.

    `first_frame` counts from the start of the server: a listener that missed blocks sees by it
    how many sample frames. `captured_ns` is the server's monotonic clock when the last one had been
    captured, in nanoseconds. A block without samples only says that the server is still there.
    """

    first_frame: int
    captured_ns: int
    samples: bytes

    def encode(self) -> bytes:
        """Return the block as a frame."""
        return encode_frame(BLOCK_HEADER.pack(self.first_frame, self.captured_ns) + self.samples)


class OpusBlock(NamedTuple):
    """A packet of Opus, in place of an `AudioBlock`; its sample frames are those of ``OPUS_RATE``.

    Of those that it is decoded to, `skipped` come before the first that counts, and `frames` count.
    Some are skipped in the first packet of an encoder alone: a decoder also begins anew with it.
    """

    first_frame: int
    captured_ns: int
    packet: bytes
    skipped: int = 0
    frames: int = OPUS_FRAMES

    def encode(self) -> bytes:
        """Return the block as a frame."""
        header = BLOCK_HEADER.pack(self.first_frame, self.captured_ns)
        if (self.skipped, self.frames) == (0, OPUS_FRAMES):
            return encode_frame(header + bytes([OPUS_WHOLE]) + self.packet)
        part = OPUS_PART_HEADER.pack(OPUS_PART, self.skipped, self.frames)
        return encode_frame(header + part + self.packet)

    @classmethod
    def decode(cls, first_frame: int, captured_ns: int, content: bytes) -> OpusBlock:
        """Return the block that has `content` behind its header; raises ProtocolError."""
        skipped, frames, start = 0, OPUS_FRAMES, 1
        if content[0] == OPUS_PART and len(content) > OPUS_PART_HEADER.size:
            _, skipped, frames = OPUS_PART_HEADER.unpack_from(content)
            start = OPUS_PART_HEADER.size
        elif content[0] != OPUS_WHOLE or len(content) == 1:
            raise ProtocolError("received a bad packet of Opus")
        if skipped + frames > MAX_OPUS_FRAMES:
            raise ProtocolError("received a packet of Opus with too much sound")
        return cls(first_frame, captured_ns, content[start:], skipped, frames)


class StreamEnd(NamedTuple):
    """The last frame of the server's sound, and why it ends; what came before it is complete."""

    reason: str

    def encode(self) -> bytes:
        """Return the end as a frame."""
        return encode_frame(BLOCK_HEADER.pack(END_OF_STREAM, 0) + self.reason.encode())


class TimeRequest(NamedTuple):
    """A client's question for the server's time, when it was asked by the client's own clock."""

    asked_ns: int

    @classmethod
    def _decode(cls, fields: Fields) -> TimeRequest:
        return cls(require_number(fields, "asked_ns", CLOCK_NS))


class TimeReply(NamedTuple):
    """The server's answer: when the request came and when the reply went, by its own clock.

    All three are nanoseconds of a monotonic clock.
    """

    asked_ns: int
    received_ns: int
    answered_ns: int

    def encode(self) -> bytes:
        """Return the reply as a frame."""
        header = BLOCK_HEADER.pack(TIME_REPLY, self.asked_ns)
        return encode_frame(header + TIMES.pack(self.received_ns, self.answered_ns))


Heard = AudioBlock | StreamEnd | TimeReply


def decode_sound(content: bytes, audio: AudioFormat) -> Heard:
    """Return what a frame's `content` holds of sound in the format `audio`.

    Raises ProtocolError where it is none of what a listener is sent.
    """
    if len(content) < BLOCK_HEADER.size:
        raise ProtocolError("received a block of sound without a header")
    first_frame, captured_ns = BLOCK_HEADER.unpack_from(content)
    samples = content[BLOCK_HEADER.size :]
    if first_frame == END_OF_STREAM:
        return StreamEnd(escape(samples.decode(errors="replace"), 200))
    if first_frame == TIME_REPLY and len(samples) == TIMES.size:
        return TimeReply(captured_ns, *TIMES.unpack(samples))
    if len(samples) % audio.frame_bytes:
        raise ProtocolError("received a block of sound that ends inside a sample frame")
    return AudioBlock(first_frame, captured_ns, samples)


def decode_opus(content: bytes, audio: AudioFormat) -> Heard | OpusBlock:
    """Do what `decode_sound` does, where the sound comes as Opus."""
    if len(content) > BLOCK_HEADER.size:
        first_frame, captured_ns = BLOCK_HEADER.unpack_from(content)
        if first_frame not in (END_OF_STREAM, TIME_REPLY):
            return OpusBlock.decode(first_frame, captured_ns, content[BLOCK_HEADER.size :])
    return decode_sound(content, audio)


Message = (
    Hello | Welcome | Pair | Error | Offer | Held | Hashing | Prefixes | Start | Results
    | TimeRequest
)  # fmt: skip


# --- connection -----------------------------------------------------------------------------

HANDSHAKE_TIMEOUT_S = 10.0
PROGRESS_TIMEOUT_S = 60.0
LINGER_TIMEOUT_S = 1.0
ARRIVAL_CHECK_S = 0.02
FLUSH_INTERVAL_S = 1.0
LINGER = struct.Struct("HH" if sys.platform == "win32" else "ii")
SO_NWRITE = 0x1024  # of macOS
# Of Linux: what has not gone out (whatever SO_SNDBUF says, it takes 64 KiB in small writes).
SIOCOUTQNSD = 0x894B
MIN_RTT_US = struct.Struct("=148xI")  # of Linux's struct tcp_info
MAX_ROUND_TRIP_S = 1.0  # that is believed: what is kept for it may be late
ENDED_INSIDE = "it ended in the middle of a frame"
SIGN_INTERVAL_S = 1.0
RECEIVE_BYTES = 256 * 1024
SEND_BYTES = 64 * 1024  # with more, the other side waits longer, and TLS leaves a core's cache
TLS_RECORD_BYTES = 16 * 1024
# What has to move before a connection counts as busy again; and the slowest that a frame may come.
PROGRESS_BYTES = 16 * 1024
SLOWEST_FRAME_BYTES_PER_S = 4 * 1024


class Deadline:
    """A moment by which something must be done, and what is left until then."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Return the seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())


class Limits(threading.local):
    """By when each thread's waits in a socket have to end."""

    deadline: Deadline | None = None


class TimedSocket:
    """A connected stream socket with a limit to every wait.

    No call waits longer than ``PROGRESS_TIMEOUT_S`` without any byte moving, nor beyond the end of
    the `limit` it stands in. One thread may read while another writes. Owns the socket.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.sent_bytes = 0
        self._socket = sock
        self._unsent = memoryview(b"")  # the rest of what was begun
        self._limits = Limits()
        self._heard_s = self._progress_s = time.monotonic()
        self._moved_bytes = 0  # since `_progress_s`
        sock.setblocking(False)
        self.set_option(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set_option(self, level: int, option: int, value: int | bytes) -> None:
        """Set an option of the socket, where the system has it."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(level, option, value)

    def close(self) -> None:
        """Close the socket and wake whoever waits in it. Never blocks. Idempotent."""
        self.wake()
        self._socket.close()

    def abort(self) -> None:
        """Close the socket, and have the other side know at once that nothing more comes.

        What the system has still to send is thrown away. Never blocks. Idempotent.
        """
        self.set_option(socket.SOL_SOCKET, socket.SO_LINGER, LINGER.pack(1, 0))
        self.stop_reading()  # a socket that a thread waits in is not closed yet
        self._socket.close()

    def wake(self) -> None:
        """Break the connection under whoever waits in it. For any thread. Idempotent."""
        self._shut_down(socket.SHUT_RDWR)

    def stop_reading(self) -> None:
        """End what whoever reads waits for; writing goes on. For any thread. Idempotent."""
        self._shut_down(socket.SHUT_RD)

    def _shut_down(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(how)

    # waiting

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Let everything inside the ``with`` block take `seconds` together, not each.

        An outer limit stays in force. What other threads do meanwhile is not limited.
        """
        outer = self._limits.deadline
        if outer is None or outer.remaining() > seconds:
            self._limits.deadline = Deadline(seconds)
        try:
            yield
        finally:
            self._limits.deadline = outer

    def _wait(self, *, to_write: bool) -> None:
        """Block until the socket can be read, or written; raises PeerStalled."""
        limit = self._limits.deadline
        if limit is None:
            self._wait_while_draining(to_write=to_write)
        elif not wait_for_socket(self._socket, limit.remaining(), to_write=to_write):
            raise PeerStalled(limit.seconds)

    def _wait_while_draining(self, *, to_write: bool) -> None:
        """Do so for as long as what the system has taken before still arrives, on a slow line.

        Who waits to write also waits for as long as the other side gives signs of life.
        """
        while True:
            arrived, heard_s = self._arrived_bytes(), self._heard_s
            if wait_for_socket(self._socket, PROGRESS_TIMEOUT_S, to_write=to_write):
                return
            is_alive = to_write and self._heard_s > heard_s  # as another thread has heard
            if self._arrived_bytes() <= arrived and not is_alive:
                raise PeerStalled(PROGRESS_TIMEOUT_S)

    def _arrived_bytes(self) -> int:
        return self.sent_bytes - count_unacknowledged(self._socket)

    # progress, which any thread may ask for

    def note_progress(self) -> None:
        """Count as busy for now: work is done for the other side."""
        self._progress_s, self._moved_bytes = time.monotonic(), 0

    def idle_s(self) -> float:
        """Return for how many seconds less than ``PROGRESS_BYTES`` have moved."""
        return time.monotonic() - self._progress_s

    def silent_s(self) -> float:
        """Return for how many seconds nothing has been received."""
        return time.monotonic() - self._heard_s

    def _note_moved(self, count: int) -> None:
        self._moved_bytes += count
        if self._moved_bytes >= PROGRESS_BYTES:
            self.note_progress()

    # bytes as they travel

    def _receive_raw(self, size: int) -> bytes:
        """Return some bytes, `size` at most; none at the end. Raises ConnectionLost."""
        data = self._once_readable(lambda: self._socket.recv(size))
        self._note_moved(len(data))
        return data

    def _receive_raw_into(self, view: memoryview) -> int:
        """Receive into `view`; return how many bytes: none at the end. Raises ConnectionLost."""
        count = self._once_readable(lambda: self._socket.recv_into(view))
        self._note_moved(count)
        return count

    def _once_readable(self, receive: Callable[[], T]) -> T:
        while True:
            try:
                received = receive()
            except BlockingIOError:
                self._wait(to_write=False)
            except OSError as error:
                raise ConnectionBroken(describe_error(error)) from error
            else:
                self._heard_s = time.monotonic()
                return received

    def _send_unsent(self) -> bool:
        """Send what the system takes now of what is unsent; return whether it took anything.

        Raises ConnectionBroken.
        """
        try:
            count = self._socket.send(self._unsent) if self._unsent else 0
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionBroken(describe_error(error)) from error
        self.sent_bytes += count
        self._note_moved(count)
        self._unsent = self._unsent[count:]
        return count > 0

    def _send_all(self, data: bytes | memoryview) -> None:
        """Send `data`; blocks until the system has taken it. Raises ConnectionLost."""
        self._unsent = memoryview(data)
        while self._unsent:
            if not self._send_unsent():
                self._wait(to_write=True)


def count_unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes the system has taken that have not arrived, as far as it tells."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):  # closed
            return sock.getsockopt(socket.SOL_SOCKET, SO_NWRITE)
    if sys.platform == "linux":
        import termios  # noqa: PLC0415  (Windows has none)

        return ask_for_count(sock, termios.TIOCOUTQ)  # SIOCOUTQ; PowerPC's and MIPS' are others
    return 0


def ask_for_count(sock: socket.socket, request: int) -> int:
    """Return what an ioctl of Linux tells of what `sock` sends; 0 on other systems."""
    if sys.platform == "linux":
        import fcntl  # noqa: PLC0415  (Windows has none)

        with contextlib.suppress(OSError, ValueError):  # closed
            count = fcntl.ioctl(sock.fileno(), request, bytes(4))
            return int.from_bytes(count, sys.byteorder)
    return 0


def wait_for_socket(sock: socket.socket, seconds: float, *, to_write: bool) -> bool:
    """Block until `sock` can be read, or written, or is broken; return False after `seconds`."""
    with contextlib.suppress(OSError, ValueError):  # closed by another thread
        if sys.platform == "win32":
            sockets = ([], [sock], [sock]) if to_write else ([sock], [], [sock])
            return any(select.select(*sockets, seconds))
        poller = select.poll()
        poller.register(sock, select.POLLOUT if to_write else select.POLLIN)
        return bool(poller.poll(math.ceil(seconds * 1000)))
    return True


class TLS:
    """Encrypts and decrypts for a `ByteStream`, which moves the bytes. For any thread.

    Not an ssl.SSLSocket: OpenSSL's objects are not for two threads at once, and Python makes
    the one wait for the other only since 3.13. Here a lock is held while bytes are worked on, and
    never while they are waited for. Also, a system call moves far more than a record of 16 KiB.
    """

    def __init__(self, context: ssl.SSLContext, server_side: bool) -> None:
        import ssl  # noqa: PLC0415  (see make_tls_context)

        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side)
        self._lock = threading.Lock()
        self._ssl_error = ssl.SSLError
        self._wants_more = ssl.SSLWantReadError
        self.ended = False  # by the other side's close_notify

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        with self._lock:
            self._incoming.write(data)

    def shake_hands(self) -> bool:
        """Continue the handshake; return False if more must be fed first. Raises NotPaired."""
        with self._lock:
            try:
                self._object.do_handshake()
            except self._wants_more:
                return False
            except self._ssl_error as error:
                raise NotPaired(error) from error
        return True

    def pending(self) -> int:
        """Return how many bytes have been fed, or decrypted, that are not read yet."""
        with self._lock:
            return self._incoming.pending + self._object.pending()

    def decrypt_into(self, view: memoryview) -> int:
        """Fill `view` as far as possible; return how many bytes. Raises ConnectionBroken.

        0 means that more must be fed first, unless the other side has `ended` it.
        """
        have = 0
        try:
            with self._lock, contextlib.suppress(self._wants_more):
                while have < len(view) and not self.ended:
                    count = int(self._object.read(len(view) - have, view[have:]))
                    self.ended = not count
                    have += count
        except OSError as error:
            raise ConnectionBroken(describe_error(error)) from error
        return have

    def encrypt(self, data: bytes | memoryview) -> bytes:
        """Return `data` encrypted. Raises ConnectionBroken."""
        with self._lock:
            try:
                self._object.write(data)
            except OSError as error:
                raise ConnectionBroken(describe_error(error)) from error
            return self._outgoing.read()

    def output(self) -> bytes:
        """Return what is to be sent for the handshake."""
        with self._lock:
            return self._outgoing.read()

    def end(self) -> bytes:
        """Return close_notify, encrypted, which says that this was all."""
        with self._lock, contextlib.suppress(self._ssl_error):
            self._object.unwrap()
        return self.output()


class ReceiveBuffer(bytearray):
    """Bytes that have arrived, and that nobody has read yet."""

    def take(self, size: int) -> bytes:
        """Return up to `size` of them, which are gone then."""
        data = bytes(self[:size])
        del self[:size]
        return data


class ByteStream(TimedSocket):
    """Exact bytes over a `TimedSocket`, perhaps encrypted.

    Reads are buffered: one system call brings many small frames. Writes are too, where the
    caller asks for it with `queue`; `flush` or `write` sends them.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        super().__init__(sock, peer)
        self._received = ReceiveBuffer()
        self._queued = bytearray()
        self._queued_until = 0.0
        self._tls: TLS | None = None

    def close(self) -> None:
        """Close the socket and wake whoever waits in it. Never blocks. Idempotent."""
        self._end_tls()
        super().close()

    def finish(self) -> None:
        """Give the other side a moment to read all that was sent, and to hang up.

        Closing at once, with something of its unread here, could reset the connection, and the
        last words be lost. Takes no longer than a `limit` that it stands in.
        """
        self._end_tls()
        deadline = self._limits.deadline or Deadline(LINGER_TIMEOUT_S)
        with contextlib.suppress(OSError, ConnectionLost), self.limit(deadline.remaining()):
            self._socket.shutdown(socket.SHUT_WR)
            while self._receive_raw(RECEIVE_BYTES) and deadline.remaining():
                pass

    def wait_until_arrived(self) -> None:
        """Block until all that was sent has arrived, as far as the system tells.

        What comes meanwhile is dropped, also after `stop_reading`: as `finish` says. Takes no
        longer than that.
        """
        deadline = self._limits.deadline or Deadline(LINGER_TIMEOUT_S)
        with contextlib.suppress(OSError):  # the other side is gone
            while True:
                with contextlib.suppress(BlockingIOError):
                    self._socket.recv(RECEIVE_BYTES)
                if not (count_unacknowledged(self._socket) and deadline.remaining()):
                    return
                time.sleep(ARRIVAL_CHECK_S)  # no system tells when it has

    def _end_tls(self) -> None:
        """Send close_notify, unless something was cut off. Never blocks."""
        if self._tls and not self._unsent:
            with contextlib.suppress(OSError):
                self._socket.send(self._tls.end())

    def start_tls(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        """Encrypt all that follows; blocks for the handshake.

        Raises NotPaired, and what `read` and `write` raise.
        """
        tls = TLS(context, server_side)
        tls.feed(self._received.take(len(self._received)))
        try:
            while not tls.shake_hands():
                self._send_all(tls.output())
                data = self._receive_raw(RECEIVE_BYTES)
                if not data:
                    raise PeerClosed
                tls.feed(data)
        except NotPaired:
            with contextlib.suppress(ConnectionLost):
                self._send_all(tls.output())  # which says why
            raise
        self._send_all(tls.output())
        self._tls = tls

    # reading

    def read(self, size: int, ahead: int = RECEIVE_BYTES) -> bytes:
        """Return exactly `size` bytes; blocks until they are there.

        Receives up to `ahead` bytes at once while it waits, for the reads to come.

        Raises PeerClosed when the connection ended before the first of them, ConnectionBroken
        when it ended later, PeerStalled when they did not come in time. Whatever has arrived stays
        buffered then, so that the caller may try again.
        """
        if len(self._received) < size:
            self._wait_for(size, ahead)
        return self._received.take(size)

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes, which stay unread; blocks and raises as `read` does."""
        self._wait_for(size)
        return bytes(self._received[:size])

    def read_some(self, view: memoryview, seconds: float) -> int:
        """Fill `view`, or as much as comes within `seconds`, at least a byte; return how much.

        Blocks and raises as `read` does, but not before what has come has been returned.
        """
        buffered = self._received.take(len(view))
        view[: len(buffered)] = buffered
        have = len(buffered) or self._receive_into(view)
        if not have:
            raise ConnectionBroken(ENDED_INSIDE)
        if have < len(view):  # a small file is there already
            with contextlib.suppress(ConnectionLost), self.limit(seconds):
                while have < len(view) and (count := self._receive_into(view[have:])):
                    have += count
        return have

    def buffered(self) -> int:
        """Return how many bytes have arrived that nobody has read yet, encrypted perhaps."""
        return len(self._received) + (self._tls.pending() if self._tls else 0)

    def wait_for_peer(self, seconds: float) -> bool:
        """Block for `seconds`; return True at once when the other side speaks or hangs up."""
        return bool(self.buffered()) or wait_for_socket(self._socket, seconds, to_write=False)

    def is_gone(self) -> bool:
        """Return whether the other side has hung up, and all is read that it had sent."""
        if self.buffered():
            return False
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _wait_for(self, size: int, ahead: int = RECEIVE_BYTES) -> None:
        """Block until at least `size` bytes are buffered; raises as `read` does."""
        while (missing := size - len(self._received)) > 0:
            data = self._receive(max(ahead, missing))
            if not data:
                raise ConnectionBroken(ENDED_INSIDE) if self._received else PeerClosed()
            self._received += data

    def _receive(self, size: int) -> bytes:
        """Return some bytes, decrypted, of `size` at most; none at a clean end."""
        if self._tls is None:
            return self._receive_raw(size)
        record = bytearray(min(size, TLS_RECORD_BYTES))
        return bytes(record[: self._receive_into(memoryview(record))])

    def _receive_into(self, view: memoryview) -> int:
        """Receive into `view`, decrypted; return how many bytes: none at a clean end."""
        tls = self._tls
        if tls is None:
            return self._receive_raw_into(view)
        while not (count := tls.decrypt_into(view)) and not tls.ended:
            data = self._receive_raw(RECEIVE_BYTES)
            if not data:
                raise ConnectionBroken("it was cut off")
            tls.feed(data)
        return count

    # writing

    def write(self, data: bytes | memoryview) -> None:
        """Send `data` after all that is queued; blocks until the system has taken it.

        Raises PeerStalled or ConnectionBroken.
        """
        self.flush()
        self._seal_and_send(memoryview(data))

    def queue(self, data: bytes | memoryview) -> None:
        """Keep a copy of `data` for the next `flush`; what is large is sent at once.

        Sends by itself once a good deal has gathered, or some of it has waited for a second. Blocks
        and raises as `write` does.
        """
        if len(data) > SEND_BYTES:
            self.write(data)
            return
        if not self._queued:
            self._queued_until = time.monotonic() + FLUSH_INTERVAL_S
        self._queued += data
        if len(self._queued) >= SEND_BYTES or time.monotonic() >= self._queued_until:
            self.flush()

    def flush(self) -> None:
        """Send what is queued or was offered; blocks and raises as `write` does."""
        self._send_all(self._unsent)
        if self._queued:
            data, self._queued = self._queued, bytearray()
            self._seal_and_send(memoryview(data))

    def offer(self, data: bytes) -> bool:
        """Send `data` as far as the system takes it, the rest with the next call. Never blocks.

        Return False, and leave `data` out, while some of what was accepted before is unsent.
        Raises ConnectionBroken.
        """
        self._send_unsent()
        if self._unsent:
            return False
        self._unsent = memoryview(self._seal(data))
        self._send_unsent()
        return True

    def in_transit(self) -> int:
        """Return how many bytes are queued, or on their way as far as known. For any thread."""
        return len(self._queued) + count_unacknowledged(self._socket)

    def unsent(self) -> int:
        """Return how many bytes the system has taken that have not gone out; 0 where not Linux."""
        return ask_for_count(self._socket, SIOCOUTQNSD)

    def round_trip_s(self) -> float:
        """Return how long the quickest way there and back has taken; 0 where not Linux."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError, struct.error):  # closed, or an old kernel
                info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, MIN_RTT_US.size)
                shortest_us: int = MIN_RTT_US.unpack(info)[0]
                return min(shortest_us / 1e6, MAX_ROUND_TRIP_S)
        return 0.0

    def _seal_and_send(self, view: memoryview) -> None:
        step = SEND_BYTES if self._tls else max(1, len(view))
        for start in range(0, len(view), step):
            self._send_all(self._seal(view[start : start + step]))

    def _seal(self, data: bytes | memoryview) -> bytes | memoryview:
        """Return `data` as it is sent: encrypted, if the stream is. Raises ConnectionBroken."""
        return self._tls.encrypt(data) if self._tls else data


class Connection(ByteStream):
    """A `ByteStream` in frames and messages. Use it in a ``with`` block, or close it."""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_frame(self, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """Return the content of the next frame; blocks and raises as `wait_for_frame` does."""
        return self.read(self.wait_for_frame(max_bytes))[LENGTH.size :]

    def wait_for_frame(self, max_bytes: int = MAX_FRAME_BYTES) -> int:
        """Block until the next frame is there; return its size. Raises as `read` does.

        From its first byte on it has to come at a fair speed. Raises ProtocolError, before it
        reads any further, where the frame declares more than `max_bytes`.
        """
        self._wait_for(1, min(RECEIVE_BYTES, LENGTH.size + max_bytes))
        with self.limit(PROGRESS_TIMEOUT_S):
            self._wait_for(LENGTH.size)
        header = self.peek(LENGTH.size)
        (size,) = LENGTH.unpack(header)
        if size > max_bytes:
            raise ProtocolError(f"not Socket Pair's protocol (received {header!r})")
        # Nothing is taken before all is there: a wait that was too long can be resumed.
        with self.limit(PROGRESS_TIMEOUT_S + size / SLOWEST_FRAME_BYTES_PER_S):
            self._wait_for(LENGTH.size + size)
        return LENGTH.size + int(size)

    def send(self, message: Message) -> None:
        """Send a message, after all that is queued; blocks and raises as `write` does."""
        self.queue(encode_message(message))
        self.flush()
        self.note_progress()  # what is said to the other side is an answer, or a sign of work

    @overload
    def receive(self, first: type[A], /, *, max_bytes: int = ...) -> A: ...

    @overload
    def receive(self, first: type[A], second: type[B], /, *, max_bytes: int = ...) -> A | B: ...

    @overload
    def receive(
        self, first: type[A], second: type[B], third: type[C], /, *, max_bytes: int = ...
    ) -> A | B | C: ...

    def receive(self, *expected: type[Any], max_bytes: int = MAX_FRAME_BYTES) -> Any:
        """Return the next message, of one of the types `expected`; blocks as `read_frame` does.

        Raises PeerRefused where the other side reports an Error instead, ProtocolError where it
        sends anything else, and what `read_frame` raises.
        """
        message = decode_message(self.read_frame(max_bytes), expected)
        if isinstance(message, Error):
            raise PeerRefused(escape(message.error), message.kind)
        return message


class SignsOfLife:
    """Tells the other side every second that this one lives, while a disk keeps it waiting.

    That is inside the ``with`` block, in which nothing else is written. `send` sends a sign, and
    may be changed outside of it. The thread that calls it ends with `stop`, or with the connection.
    """

    def __init__(self, send: Callable[[], object]) -> None:
        self.send = send
        self._due_s = math.inf
        self._lock = threading.Lock()  # held while a sign is sent
        self._is_over = threading.Event()
        self._lost: ConnectionLost | None = None
        threading.Thread(target=self._run, name="signs of life", daemon=True).start()

    def __enter__(self) -> None:
        self._due_s = time.monotonic() + SIGN_INTERVAL_S

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._due_s = math.inf

    def is_on(self) -> bool:
        """Return whether some thread is in the ``with`` block. For any thread."""
        return self._due_s < math.inf

    def check(self, _count: int = 0) -> None:
        """Raise ConnectionLost if a sign could not be sent. Also for an `on_progress`."""
        if self._lost:
            raise self._lost

    def stop(self) -> None:
        """Send none any more. Idempotent."""
        self._is_over.set()

    def _run(self) -> None:
        try:
            while not self._is_over.wait(SIGN_INTERVAL_S / 2):
                with self._lock:
                    if time.monotonic() >= self._due_s:
                        self.send()
                        self._due_s = time.monotonic() + SIGN_INTERVAL_S
        except ConnectionLost as error:  # whoever writes next finds that out as well
            self._lost = error


# --- time -----------------------------------------------------------------------------------

# What sound is timed by, in seconds and in nanoseconds: time.monotonic goes in steps of 16 ms on
# Windows before Python 3.13, and is the same clock elsewhere.
clock_s, clock_ns = time.perf_counter, time.perf_counter_ns
# The median of the sightings of so long: a thread that is held up now and then does not move it.
LINE_WINDOW_S = 0.2
LINE_GAP_WINDOW_S = 0.1  # at the start, and after a gap, while sound is heard at a wrong time
# Standard deviations: of such a median; of a speed that is not known yet; of how a speed wanders
# within a second.
LINE_MEDIAN_SD_S = 60e-6
LINE_SPEED_SD = 150e-6
LINE_SPEED_WALK = 3e-6
# No card is further from the rate that it names: a line that runs faster or slower has been told
# wrong times, as by a sound system that a stall has confused.
LINE_MAX_SPEED_ERROR = 500e-6
# What is off by more is a step (an xrun, a suspended machine) if the next window agrees with it, or
# so many do not.
LINE_STEP_S = 0.0015
LINE_STEP_WINDOWS = 5


def clamp(value: float, most: float) -> float:
    """Return `value`, or what is nearest to it from ``-most`` to `most`."""
    return max(-most, min(most, value))


def median(values: Iterable[float]) -> float:
    """Return the middle one of some values, the upper one of an even number."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


class TimeLine:
    """When each sample frame passes a sound card: a straight line through jittery sightings.

    A Kalman filter over medians of the sightings, of the time and of the speed: it settles as fast
    as they allow, and then stays still. Not for two threads at once. Reads no clock: the caller
    gives the time.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._stretch = 0.0  # how much longer a sample frame takes than by the rate's name
        self._frame = 0
        self._time_s = -math.inf
        # Variances, of the time and the stretch, and their covariance.
        self._time_var, self._stretch_var, self._covariance = 0.0, LINE_SPEED_SD**2, 0.0
        self._window_s = 0.0
        self._errors_s: list[float] = []  # in this window
        self._off_windows = 0
        self._off_s = 0.0  # by how much the last of them
        self._is_interrupted = True

    @property
    def is_off(self) -> bool:
        """Whether it is about to step: it was interrupted, or the last window looked like it."""
        return self._is_interrupted or self._off_windows > 0

    def interrupt(self) -> None:
        """Step to what the next sightings say, however little that is: the card had a gap."""
        self._errors_s, self._window_s = [], 0.0
        self._is_interrupted = True

    def see(self, frame: int, time_s: float) -> float:
        """Note that `frame` was seen to pass at `time_s`; return when it does by the line.

        `frame` must not be lower than any before. Steps where sightings are off for long.
        """
        frames = frame - self._frame
        if self._time_s == -math.inf:
            self._time_s = time_s
        else:
            self._time_s += frames * self._period_s
            self._window_s += frames / self._rate
        self._frame = frame
        self._errors_s.append(time_s - self._time_s)
        if self._window_s >= (LINE_GAP_WINDOW_S if self._is_interrupted else LINE_WINDOW_S):
            self._end_window()
        return self._time_s

    def _end_window(self) -> None:
        error_s, span_s = median(self._errors_s), self._window_s
        self._errors_s, self._window_s = [], 0.0
        if self._is_interrupted:
            self._step(error_s)
        elif abs(error_s) <= LINE_STEP_S:
            self._off_windows = 0
            self._correct(error_s, span_s)
        else:
            agrees = self._off_windows > 0 and abs(error_s - self._off_s) < LINE_STEP_S / 2
            self._off_windows, self._off_s = self._off_windows + 1, error_s
            if agrees or self._off_windows == LINE_STEP_WINDOWS:
                self._step(error_s)

    def _step(self, error_s: float) -> None:
        """Leave out an error that the card's speed has not made.

        What has changed the time may have changed the speed as well: a sound system that takes
        other blocks from then on rounds other numbers.
        """
        self._time_s += error_s
        self._time_var, self._covariance = LINE_MEDIAN_SD_S**2, 0.0
        self._stretch_var = max(self._stretch_var, LINE_SPEED_SD**2)
        self._off_windows, self._is_interrupted = 0, False

    def _correct(self, error_s: float, span_s: float) -> None:
        """Take in that the line was off by `error_s` after `span_s` more."""
        self._time_var += span_s * (2 * self._covariance + span_s * self._stretch_var)
        self._covariance += span_s * self._stretch_var
        self._stretch_var += LINE_SPEED_WALK**2 * span_s
        total_var = self._time_var + LINE_MEDIAN_SD_S**2
        time_gain, stretch_gain = self._time_var / total_var, self._covariance / total_var
        self._time_s += time_gain * error_s
        self._stretch = clamp(self._stretch + stretch_gain * error_s, LINE_MAX_SPEED_ERROR)
        self._stretch_var -= stretch_gain * self._covariance
        self._covariance *= 1 - time_gain
        self._time_var *= 1 - time_gain

    @property
    def _period_s(self) -> float:
        return (1 + self._stretch) / self._rate

    @property
    def speed(self) -> float:
        """How fast sample frames pass, in parts of the usual rate."""
        return 1 / (1 + self._stretch)

    def at(self, frame: float) -> float:
        """Return when `frame` passes by the line, as of the latest sighting."""
        return self._time_s + (frame - self._frame) * self._period_s


# --- local network --------------------------------------------------------------------------

# Of DNS-SD (RFC 6763): what servers announce on the local network.
SERVICE_TYPE = "_socket-pair._tcp.local."


class Announced(NamedTuple):
    """What a server tells the local network of itself, never its pairing code.

    It travels as the TXT record of DNS-SD. Anyone on the network can say anything there.
    """

    name: str  # the machine's
    mode: str
    has_code: bool

    def to_txt(self) -> dict[str, str]:
        """Return it as a TXT record's keys and values."""
        return {"name": self.name, "mode": self.mode, "pairing": "yes" if self.has_code else "no"}

    @classmethod
    def from_txt(cls, txt: Mapping[bytes, bytes | None]) -> Announced:
        """Return what somebody tells; what is missing is empty."""
        name, mode, pairing = (
            (txt.get(key) or b"").decode(errors="replace") for key in (b"name", b"mode", b"pairing")
        )
        return cls(name, mode, pairing != "no")


def own_interfaces() -> list[IPv4Interface | IPv6Interface]:
    """Return this machine's addresses beyond loopback, each with its network.

    Raises ImportError without zeroconf, which brings ifaddr.
    """
    # Here, as it takes a while and few need it.
    from ipaddress import ip_interface  # noqa: PLC0415

    import ifaddr  # noqa: PLC0415

    found = [
        ip_interface(f"{address.ip if address.is_IPv4 else address.ip[0]}/{address.network_prefix}")
        for adapter in ifaddr.get_adapters()
        for address in adapter.ips
    ]
    return [interface for interface in found if not interface.is_loopback]


def open_network(addresses: Sequence[str] = ()) -> Zeroconf:
    """Return what speaks multicast DNS on the networks of these own addresses, or on all.

    Close it. Raises OSError, and ImportError without zeroconf.
    """
    import logging  # noqa: PLC0415  (see own_interfaces)

    import zeroconf  # noqa: PLC0415

    for library in ("zeroconf", "asyncio"):  # this program itself tells what matters of them
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if addresses:
        return zeroconf.Zeroconf(list(addresses))
    try:
        return zeroconf.Zeroconf(zeroconf.InterfaceChoice.All, ip_version=zeroconf.IPVersion.All)
    except OSError:  # there is no IPv6
        return zeroconf.Zeroconf(zeroconf.InterfaceChoice.All)


def disguise(folder: tuple[int, int]) -> tuple[int, int]:
    """Return a folder's device and inode as a Welcome has them, or these from there.

    On another machine nothing comes of it: its folders may have the same numbers, and through a
    tunnel its clients come from the server's own address.
    """
    machine = socket.gethostname()
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        machine = file.read()
    key = int.from_bytes(hashlib.sha256(machine.encode()).digest()[:8], "big")
    return folder[0] ^ key, folder[1] ^ key


# --- blocks and checksum --------------------------------------------------------------------

PIPELINE_BLOCKS = 4


class Blocks:
    """One reused block of `size` bytes: filled by the caller, consumed as it is given."""

    def __init__(self, consume: Callable[[memoryview], object], size: int = SEGMENT_BYTES) -> None:
        self._consume = consume
        self._block = memoryview(bytearray(size))

    def take(self) -> memoryview:
        """Return a block to fill."""
        return self._block

    def give(self, block: memoryview) -> None:
        """Have a filled block consumed, or the part of one that counts."""
        self._consume(block)


class BlockPipeline(Blocks):
    """A few reused blocks, filled by one thread and consumed by another.

    While the thread that made the pipeline fills the next block (from a socket or a file), a
    thread of the pipeline's own calls `consume` on those before, in order: hashing and
    writing release the interpreter's lock, so both really run at once. The end of the
    ``with`` block waits until all is consumed. What `consume` raises is raised by the next
    `give` or there, and what is given after that is passed over.
    """

    def __init__(self, consume: Callable[[memoryview], object]) -> None:
        self._consume = consume
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        for _ in range(PIPELINE_BLOCKS):
            self._free.put(memoryview(bytearray(SEGMENT_BYTES)))
        self._thread = threading.Thread(target=self._run, name="block pipeline", daemon=True)
        self._thread.start()

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        self._given.put(None)
        self._thread.join()
        if error is None:
            self._raise_error()

    def take(self) -> memoryview:
        """Return a block to fill; blocks while all are still to be consumed."""
        return self._free.get()

    def give(self, block: memoryview) -> None:
        """Hand over a filled block, or the part of one that counts. Never blocks."""
        self._given.put(block)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (view := self._given.get()) is not None:
            if self._error is None:
                try:
                    self._consume(view)
                except BaseException as error:  # noqa: BLE001  (raised in the other thread)
                    self._error = error
            self._free.put(memoryview(view.obj))


def blocks_for(
    size: int | None, consume: Callable[[memoryview], object]
) -> contextlib.AbstractContextManager[Blocks]:
    """Return the blocks that suit a file of `size` bytes: a small one is not worth a thread."""
    if size is not None and size <= SEGMENT_BYTES:
        return contextlib.nullcontext(Blocks(consume, size))
    return BlockPipeline(consume)


def open_to_read(path: str, flags: int = 0, dir_fd: int | None = None) -> int:
    """Return the descriptor of a file; waits for no pipe, but for who has a lease on a file.

    As Samba has, which gives it up when it is asked to. Raises OSError.
    """
    flags |= os.O_RDONLY | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), dir_fd=dir_fd)
    except BlockingIOError:
        return os.open(path, flags, dir_fd=dir_fd)


def calculate_checksum(
    path: str | os.PathLike[str] | int,
    length: int | None = None,
    *,
    digest: hashlib._Hash | None = None,
    on_progress: Callable[[int], object] = lambda count: None,
) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, read block by block.

    `path` may also be the descriptor of an open file, which is read from where it stands and
    stays open. With `length`, only that many first bytes count. `digest` is a SHA-256 object
    to use, which the caller may go on updating. `on_progress` is told the bytes of each block.

    Blocks until done. Raises OSError where the file cannot be read, and FileShrunk where it has
    fewer than `length` bytes.
    """
    digest = hashlib.sha256() if digest is None else digest
    left = sys.maxsize if length is None else length
    view = memoryview(bytearray(min(left, SEGMENT_BYTES)))
    with open(path, "rb", buffering=0, closefd=not isinstance(path, int)) as file:
        while left and (count := file.readinto(view[:left])):
            digest.update(view[:count])
            on_progress(count)
            left -= count
    if length is not None and left:
        raise FileShrunk("the file is shorter than it was")
    return digest.hexdigest()


# --- sound card: devices --------------------------------------------------------------------

LONGEST_AWAY_S = 3.0  # what PortAudio tells of a block is no time if it is more


class AudioUnavailable(SocketPairError):
    """No sound card, or none that does what is asked; its words say what would help."""


class Direction(NamedTuple):
    """Which way sound goes through a sound card, in PortAudio's word, and in the user's."""

    kind: str  # "input" or "output"; so is the option called
    noun: str

    @property
    def option(self) -> str:
        """The option that chooses another device."""
        return f"--{self.kind}"

    @property
    def none_found(self) -> str:
        """What there is to say without any device."""
        advice = f"plug one in, or use {self.option} FILE.wav or {self.option} -"
        return f"no {self.noun} found: {advice}"

    def seconds_away(self, times: Mapping[str, float]) -> float:
        """Return in how many seconds a block's first frame is heard, or how long ago captured.

        `times` are PortAudio's of one callback. Their clock is not Python's, so that only a
        difference tells anything. 0 where it does not, as some sound systems leave one of them out.
        """
        if self.kind == "input":
            away_s = times["current_time"] - times["input_buffer_adc_time"]
        else:
            away_s = times["output_buffer_dac_time"] - times["current_time"]
        return away_s if 0 < away_s < LONGEST_AWAY_S else 0.0


MICROPHONE = Direction("input", "microphone")
SPEAKER = Direction("output", "loudspeaker")


class BlockInfo(NamedTuple):
    """What a callback is told of a block.

    The first of its `frames` is heard in `away_s` seconds, or was captured so long ago: 0 where the
    card does not tell. With `is_after_gap` the card had run dry before it (underrun), or had lost
    sound (overrun). `lost_s` is for how many seconds the device had been away, mostly 0.
    """

    frames: int
    away_s: float
    is_after_gap: bool
    lost_s: float = 0.0


# Called with what was captured, or None. Returns what to play, or None.
Exchange = Callable[[bytes | None, BlockInfo], bytes | None]


class Device(NamedTuple):
    """A device as PortAudio describes it for one direction.

    Its `number` may be another device's once PortAudio has started anew; its name and its sound
    system stay. `channels` are the most that it has.
    """

    number: int
    name: str
    host_api: str
    channels: int
    rate: int

    @property
    def shown(self) -> str:
        """The name, fit for a terminal."""
        return escape(self.name, 60)

    @property
    def own_format(self) -> AudioFormat:
        """The device's default rate, and the most channels it has up to two."""
        return AudioFormat(self.rate, min(2, self.channels))

    def among(self, devices: Sequence[Device]) -> Device | None:
        """Return which of `devices` this one is, by its name and sound system; None if none.

        Of several that share these, that of the same number if there is one.
        """
        same = [d for d in devices if (d.name, d.host_api) == (self.name, self.host_api)]
        return min(same, key=lambda device: device.number != self.number, default=None)


def meant_devices(wanted: str | None, devices: Sequence[Device]) -> Sequence[Device]:
    """Return those of `devices` that `wanted` means: none, one, or several that it is a part of.

    A whole name or a number wins over a part of a name; case is ignored. Windows shows one device
    through several sound systems: the first that has any is meant. None means the first.
    """
    if wanted is None:
        return devices[:1]
    folded = wanted.casefold()
    exact = [d for d in devices if folded in (d.name.casefold(), str(d.number))]
    if exact or wanted.isdecimal():
        return sorted(exact, key=lambda device: device.name != wanted)[:1]
    parts = [device for device in devices if folded in device.name.casefold()]
    return [device for device in parts if device.host_api == parts[0].host_api]


def describe_choice(devices: Sequence[Device]) -> str:
    """Return the numbers and names of `devices` in a line."""
    return ", ".join(f"{device.number} {device.shown}" for device in sorted(devices))


class StreamSettings(NamedTuple):
    """How a card is to be opened: sound of this format, `block_ms` at once through `exchange`.

    PortAudio makes a card's buffer of some three such blocks, and PyAudio lets nothing else be
    chosen. A card that runs dry again and again gets `longest_block_ms` at once, if that is more.
    A thread of PortAudio's calls `exchange`.
    """

    audio: AudioFormat
    block_ms: float
    exchange: Exchange
    longest_block_ms: float = 0.0


# --- sound card: PortAudio ------------------------------------------------------------------

GAP_FLAGS = 0x02 | 0x04  # of a callback: paInputOverflow, paOutputUnderflow
PYAUDIO_VERSION = (0, 2, 12)  # before that, its callbacks fail with Python 3.10 and newer


@contextlib.contextmanager
def portaudio_errors() -> Iterator[None]:
    """Raise AudioUnavailable for what PortAudio reports in the ``with`` block."""
    try:
        yield
    except OSError as error:
        reason = escape(str(error.args[-1] if error.args else error))
        raise AudioUnavailable(f"the sound system does not work ({reason})") from error


def import_pyaudio() -> Any:
    """Return PyAudio, loaded only now: files are sent without, and start faster.

    Raises AudioUnavailable where it is missing or too old.
    """
    try:
        import pyaudio  # noqa: PLC0415
    except LOAD_ERRORS as error:
        reason = f"cannot be loaded ({first_line(error)})"
    else:
        if tuple(map(int, pyaudio.__version__.split(".")[:3])) >= PYAUDIO_VERSION:
            return pyaudio
        reason = f"fails with this Python as {pyaudio.__version__}, Ubuntu 22.04's"
    advice = how_to_install("pyaudio")
    if "pip" in advice and (apt := apt_install()):  # which has to compile it
        advice = f"{apt} gcc python3-dev portaudio19-dev && {advice}"
    raise AudioUnavailable(f"sound needs PyAudio, which {reason}: {advice}")


class SoundSystem:
    """PortAudio, from its start to its end, for one direction of sound.

    It knows the devices there were at its start. Raises AudioUnavailable where PyAudio is not
    installed or PortAudio fails. `close` it; its streams end with it. Every call may block for as
    long as a sound system hangs.
    """

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self._pyaudio = import_pyaudio()
        with portaudio_errors():
            self._portaudio = self._pyaudio.PyAudio()

    def close(self) -> None:
        """Release the sound cards; ends the streams that are open. Idempotent."""
        self._portaudio.terminate()

    def devices(self) -> list[Device]:
        """Return the devices that sound can go through, the default one first."""
        with portaudio_errors():
            count = self._portaudio.get_device_count()
            usable = [each for each in map(self._describe, range(count)) if each.channels > 0]
        default = None
        with contextlib.suppress(OSError):
            default_api = self._portaudio.get_default_host_api_info()
            default = default_api[f"default{self._direction.kind.title()}Device"]
        return sorted(usable, key=lambda device: device.number != default)

    def _describe(self, number: int) -> Device:
        fields = self._portaudio.get_device_info_by_index(number)
        name = fields["name"]
        if isinstance(name, bytes):  # PyAudio could not decode it
            name = name.decode("utf-8", "surrogateescape")
        api = self._portaudio.get_host_api_info_by_index(fields["hostApi"])["name"]
        channels = fields[f"max{self._direction.kind.title()}Channels"]
        return Device(number, name, str(api), channels, round(fields["defaultSampleRate"]))

    def open(self, device: Device, settings: StreamSettings) -> Stream:
        """Have PortAudio's own thread call `settings.exchange` for every block.

        Raises AudioUnavailable where there is no device of that name and sound system now, or it
        does not do it, saying what its own format is.
        """
        audio, kind = settings.audio, self._direction.kind
        now = device.among(self.devices())
        if now is None:
            raise AudioUnavailable(f"there is no {self._direction.noun} {device.shown!r} now")

        def callback(
            samples: bytes | None, frames: int, times: Mapping[str, float], status: int
        ) -> tuple[bytes | None, int]:
            away_s = self._direction.seconds_away(times)
            info = BlockInfo(frames, away_s, bool(status & GAP_FLAGS))
            return settings.exchange(samples, info), self._pyaudio.paContinue

        try:
            return self._portaudio.open(
                rate=audio.rate,
                channels=audio.channels,
                format=self._pyaudio.paInt16,
                frames_per_buffer=audio.frames_in(settings.block_ms),
                stream_callback=callback,
                **{kind: True, f"{kind}_device_index": now.number},
            )
        except (OSError, ValueError) as error:
            raise AudioUnavailable(
                f"the {self._direction.noun} {now.shown!r} cannot be opened in {audio.describe()} "
                f"({escape(str(error.args[-1]))}): its own format is {now.own_format.describe()}. "
                f"Is another program using it? {self._direction.option} takes another "
                "(see --list-devices)"
            ) from error


# --- sound card: JACK -----------------------------------------------------------------------

JACK = "JACK Audio Connection Kit"  # as PortAudio calls that sound system
# What keeps PortAudio from JACK's library, and from PipeWire's that stands in for it.
WITHOUT_JACK = {"JACK_DEFAULT_SERVER": "none", "PIPEWIRE_NOJACK": "1"}
JACK_START_S = 10.0
JACK_PROGRAM = (  # which takes no module from the current folder, as -c would
    "import sys; sys.path[0] = sys.argv[1]; import common; common.run(common.serve_jack)"
)


@functools.cache
def hide_jack() -> dict[str, str]:
    """Keep PortAudio in this process from JACK; return the environment in which it is there.

    PortAudio's JACK part aborts its process where a JACK server that was there has gone, and waits
    for ten minutes where one has stopped, whichever sound card is in use.
    """
    before = dict(os.environ)
    os.environ.update(WITHOUT_JACK)
    return before


class JackProcess:
    """A process of its own in which PortAudio uses JACK: what ends it does not end this one.

    It runs `serve_jack`, and ends with `close`, or after this process at JACK's next block.
    `request` is a Direction, to learn its `devices`; or also a Device, an AudioFormat and the
    length of a block in milliseconds, to open that one: then sound flows through it as through a
    stream of PyAudio's. Raises AudioUnavailable with its words.
    """

    def __init__(self, *request: Direction | Device | AudioFormat | float) -> None:
        import multiprocessing.connection  # noqa: PLC0415  (only JACK needs them)
        import subprocess  # noqa: PLC0415

        folder = os.path.dirname(os.path.abspath(__file__))
        with portaudio_errors():
            self._link, far = multiprocessing.Pipe()
            with far:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", JACK_PROGRAM, folder],
                    stdin=far.fileno(),
                    stdout=2,
                    env=hide_jack(),
                    start_new_session=True,  # Ctrl+C is for this process
                )
        try:
            self.devices = self._ask(request)
        except BaseException:
            self.close()
            raise

    def _ask(self, request: object) -> list[Device]:
        try:
            self._link.send(request)
            if not self._link.poll(JACK_START_S):
                raise AudioUnavailable(f"JACK does not answer within {JACK_START_S:.0f} s")
            answer = self._link.recv()
        except (EOFError, OSError):
            raise AudioUnavailable("JACK does not work: what speaks to it has ended") from None
        if isinstance(answer, AudioUnavailable):
            raise answer
        devices: list[Device] = answer
        return devices

    def exchange_blocks(self, exchange: Exchange) -> None:
        """Call `exchange` for every block of the stream that is open there; blocks till its end."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                played = exchange(*self._link.recv())
                if played is not None:
                    self._link.send(played)

    def is_active(self) -> bool:
        """Return whether it has not ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it at once. Idempotent."""
        self._process.kill()
        self._process.wait()


def find_jack_devices(direction: Direction, others: Sequence[Device]) -> list[Device]:
    """Return JACK's devices, numbered after the `others`; blocks while PortAudio starts."""
    if sys.platform in ("win32", "darwin"):
        return []
    try:
        with contextlib.closing(JackProcess(direction)) as process:
            found = [device for device in process.devices if device.host_api == JACK]
    except AudioUnavailable:
        return []
    first = max((device.number for device in others), default=-1) + 1
    return [device._replace(number=first + place) for place, device in enumerate(found)]


def serve_jack(_argv: Sequence[str]) -> int:
    """Be the other process of a JackProcess: answer its request, and exchange blocks if it opens.

    The other side is connected to standard input. Returns once the stream has died; PortAudio is
    never ended, as that is what a lost JACK server does not allow.
    """
    from multiprocessing.connection import Connection  # noqa: PLC0415

    link = Connection(sys.stdin.fileno())
    direction, *how = link.recv()
    try:
        if how:
            exchange_until_lost(link, direction, *how)
        else:
            link.send(SoundSystem(direction).devices())
    except AudioUnavailable as error:
        link.send(error)
    return EXIT_OK


def exchange_until_lost(
    link: PipeConnection, direction: Direction, device: Device, audio: AudioFormat, block_ms: float
) -> None:
    """Exchange blocks with the other process until the stream dies, or that process has ended."""
    answered = threading.Event()

    def exchange(samples: bytes | None, info: BlockInfo) -> bytes | None:
        answered.wait()
        try:
            link.send((samples, info))
            played: bytes | None = link.recv() if direction == SPEAKER else None
        except (EOFError, OSError):
            os._exit(EXIT_OK)
        return played

    settings = StreamSettings(audio, block_ms, exchange)
    stream = SoundSystem(direction).open(device, settings)
    link.send([device])
    answered.set()
    with contextlib.suppress(OSError):
        while stream.is_active():
            time.sleep(CARD_CHECK_S)


# --- sound card: in use ---------------------------------------------------------------------

CARD_CHECK_S = 0.25
CARD_TIMEOUT_S = 4.0
CARD_RETRY_S = 1.0
# A sound system that hangs is left to the end of the process.
CARD_CLOSE_S = 1.0
# A card that has so many gaps within so long has too small a buffer for its machine.
GAPS, GAPS_S = 4, 30.0

Stream = Any  # PyAudio's, whose methods raise OSError once it has died; or a JackProcess


class OpenCard:
    """A card's stream, as it was asked for, and when sound last flowed.

    PortAudio's thread exchanges blocks; all else is for the thread that watches. `lost_s` is since
    when the device was away.
    """

    def __init__(
        self,
        open_stream: Callable[[StreamSettings], Stream],
        settings: StreamSettings,
        lost_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.has_begun = False
        self._lost_s = lost_s
        self._gaps_s: deque[float] = deque(maxlen=GAPS)
        self._stream = open_stream(settings._replace(exchange=self._exchange))
        self.last_s = clock_s()  # to open it may have taken long

    def _exchange(self, samples: bytes | None, info: BlockInfo) -> bytes | None:
        """Pass a block on."""
        self.last_s = clock_s()
        if not self.has_begun and self._lost_s is not None:
            info = info._replace(lost_s=self.last_s - self._lost_s)
        self.has_begun = True
        if info.is_after_gap:
            self._gaps_s.append(self.last_s)
        return self.settings.exchange(samples, info)

    def is_lost(self) -> bool:
        """Return whether the device has gone, or gives no sound."""
        try:
            return clock_s() - self.last_s > CARD_TIMEOUT_S or not self._stream.is_active()
        except OSError:
            return True

    def needs_longer_blocks(self) -> bool:
        """Return whether it runs dry again and again, and its blocks may be longer."""
        gaps_s, settings = list(self._gaps_s), self.settings
        is_dry = len(gaps_s) == GAPS and gaps_s[-1] - gaps_s[0] < GAPS_S
        return is_dry and settings.block_ms < settings.longest_block_ms

    def close(self) -> None:
        """Release the device; blocks while the sound system takes its time."""
        with contextlib.suppress(OSError):
            self._stream.close()


class SoundCard:
    """One device in use, waited for whenever it has gone; never is another taken in its place.

    The constructor finds the device, which takes a while; `open` opens it. Both raise
    AudioUnavailable. `complain` is told when the device goes, and when sound flows again. One
    thread may call all this; Ctrl+C reaches it also where a sound system hangs.
    """

    def __init__(
        self, direction: Direction, wanted: str | None, complain: Callable[[str], object]
    ) -> None:
        self._system, self.device = in_background(lambda: find_device(direction, wanted))
        self._direction, self._complain = direction, complain
        self._what = f"the {direction.noun} {self.device.shown}"
        self._lock = threading.Lock()  # held by whoever calls PortAudio; guards what follows
        self._card: OpenCard | None = None
        # While the device is away: how it is to be opened, and since when.
        self._away: tuple[StreamSettings, float] | None = None
        self._is_told = False  # that it is gone
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sound card", daemon=True)
        self._thread.start()

    def open(self, settings: StreamSettings) -> None:
        """Let sound flow from now on, or once a device that is away is back.

        A card that is open is closed first; after a failure, another format can be tried. One that
        is away cannot be tried, and takes its own format alone.
        """
        in_background(lambda: self._open(settings))

    def close(self) -> None:
        """Release the device, unless the sound system hangs. Idempotent."""
        self._is_over.set()
        self._thread.join(CARD_CLOSE_S)

    def _open(self, settings: StreamSettings) -> None:
        with self._lock:
            self._close_card()
            if self._away is None:
                self._card = OpenCard(self._open_stream, settings)
            elif settings.audio != self.device.own_format:
                raise AudioUnavailable(f"{self._what} is gone")
            else:
                self._away = settings, self._away[1]

    def _open_stream(self, settings: StreamSettings) -> Stream:
        if self.device.host_api != JACK:
            return self._system.open(self.device, settings)
        process = JackProcess(self._direction, self.device, settings.audio, settings.block_ms)
        exchanging = functools.partial(process.exchange_blocks, settings.exchange)
        threading.Thread(target=exchanging, name="JACK", daemon=True).start()
        return process

    def _close_card(self) -> None:
        card, self._card = self._card, None
        if card is not None:
            card.close()

    # its thread, which has to look: PyAudio tells nobody that a stream has ended

    def _watch(self) -> None:
        looked_s = clock_s()
        while not self._is_over.wait(CARD_CHECK_S if self._card else CARD_RETRY_S):
            with self._lock:
                if self._card and clock_s() - looked_s > CARD_TIMEOUT_S:
                    self._card.last_s = clock_s()  # it was this process that stood still
                self._look_after()
                looked_s = clock_s()
        with self._lock:
            self._close_card()
            self._system.close()

    def _look_after(self) -> None:
        """Bring the device back where it has gone, and tell of both."""
        card = self._card
        if card is not None and not card.is_lost():
            if self._away and card.has_begun:
                self._away = None
                self._tell_back()
            elif card.needs_longer_blocks() and self.device.host_api != JACK:  # whose are JACK's
                self._lengthen_blocks(card)
        elif self._away:
            self._tell_gone()
            settings, lost_s = self._away
            # It may have been back for a moment that nobody has seen.
            self._open_anew(settings, card.last_s if card and card.has_begun else lost_s)
        elif card is not None:
            self._tell_gone()  # first: a sound system that hangs does not let the stream be closed
            self._open_anew(card.settings, card.last_s)

    def _tell_gone(self) -> None:
        """Tell it, once until it is back."""
        if not self._is_told:
            self._is_told = True
            option = self._direction.option
            self._complain(f"{self._what} is gone: waiting for it ({option} would take another)")

    def _tell_back(self) -> None:
        """Tell it, unless the device was only opened anew."""
        if self._is_told:
            self._is_told = False
            self._complain(f"{self._what} is back")

    def _lengthen_blocks(self, card: OpenCard) -> None:
        settings = card.settings._replace(block_ms=card.settings.longest_block_ms)
        self._complain(
            f"{self._what} ran dry {GAPS} times in {GAPS_S:.0f} s: it gets "
            f"{settings.block_ms:g} ms at once from now on"
        )
        self._open_anew(settings, card.last_s)

    def _open_anew(self, settings: StreamSettings, lost_s: float) -> None:
        """Try to; it is back once sound flows."""
        self._away = settings, lost_s
        self._close_card()
        with contextlib.suppress(Exception):  # whatever it was, it is tried again
            self._system.close()
            self._system = SoundSystem(self._direction)  # which sees what was plugged in
            self._card = OpenCard(self._open_stream, settings, lost_s)


def find_device(direction: Direction, wanted: str | None) -> tuple[SoundSystem, Device]:
    """Return the device that `wanted` names or numbers, or the default, and PortAudio.

    JACK is asked only where there is no such device without it. Raises AudioUnavailable where there
    is none or several, saying which.
    """
    hide_jack()
    system = SoundSystem(direction)
    devices = system.devices()
    meant = meant_devices(wanted, devices)
    if not meant:
        meant = meant_devices(wanted, with_jack := find_jack_devices(direction, devices))
        devices += with_jack
    if len(meant) == 1:
        return system, meant[0]
    if wanted is None or not devices:
        raise AudioUnavailable(direction.none_found)
    noun, shown = direction.noun, repr(escape(wanted))
    if not meant:
        there_are = describe_choice(devices)
        raise AudioUnavailable(f"no {noun} matches {shown}; there are: {there_are}")
    one = "give one's number or whole name"
    raise AudioUnavailable(f"several {noun}s match {shown}, {one}: {describe_choice(meant)}")


def list_devices(direction: Direction) -> int:
    """Print the table of devices, JACK's too; return the exit status."""
    say(in_background(lambda: describe_devices(direction)))
    return EXIT_OK


def describe_devices(direction: Direction) -> str:
    """Return a table of the devices, by their numbers, with a star at the default one."""
    hide_jack()
    devices = SoundSystem(direction).devices()
    devices += find_jack_devices(direction, devices)
    if not devices:
        return direction.none_found
    width = max(len(device.host_api) for device in devices)
    lines = [
        f"{'':2}{'no.':>4}  {'channels':>8}  {'rate':>7}  {'system':<{width}}  {direction.noun}"
    ]
    for device in sorted(devices):
        mark = "*" if device is devices[0] else ""
        lines.append(
            f"{mark:2}{device.number:>4}  {device.channels:>8}  {device.rate:>7}  "
            f"{device.host_api:<{width}}  {device.shown}"
        )
    return "\n".join(
        [*lines, f"* unless {direction.option} gives another's number or name, or a part of it"]
    )


# --- sound card: last words -----------------------------------------------------------------

LAST_WORDS_BYTES = 4096
LAST_WORDS_LINES = 3
LAST_WORDS_WAIT_S = 0.1  # in which they are gathered
ABORT_LIMIT_S = 5


class LastWords:
    """The last of what C libraries print on `descriptor`, gathered by a thread of its own."""

    def __init__(self) -> None:
        reading, self.descriptor = os.pipe()
        if sys.platform != "win32":
            os.set_blocking(self.descriptor, False)  # rather lose words than hold up who says them
        self._text = b""
        self._handler: object = None
        threading.Thread(target=self._gather, args=(reading,), name="words", daemon=True).start()

    def _gather(self, reading: int) -> None:
        while words := os.read(reading, LAST_WORDS_BYTES):
            self._text = (self._text + words)[-LAST_WORDS_BYTES:]

    def text(self) -> str:
        """Return the last lines as one, fit for a terminal."""
        lines = self._text.decode(errors="replace").splitlines()
        return " / ".join(escape(line) for line in lines[-LAST_WORDS_LINES:] if line.strip())

    def show_at_abort(self, descriptor: int) -> None:
        """Have the process end with a line on `descriptor` and status 1 where C code aborts it."""
        if sys.platform == "win32":
            return
        import ctypes  # noqa: PLC0415  (only sound needs it)

        def show(_signal: int) -> None:
            # Called from C: Python's own handlers would run too late, as abort() waits for none.
            signal.alarm(ABORT_LIMIT_S)
            time.sleep(LAST_WORDS_WAIT_S)
            said = self.text() or "nothing"
            with contextlib.suppress(OSError):
                os.write(
                    descriptor, f"a sound library has ended this process, saying: {said}\n".encode()
                )
            os._exit(EXIT_FAILED)

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(show)  # which must live on
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, self._handler)
        libc.signal(signal.SIGSEGV, self._handler)


def quiet_libraries(verbose: bool) -> None:
    """Keep what PortAudio, ALSA and JACK print off the terminal for good, unless `verbose`.

    They write to descriptor 2 from C, while sound runs and also while all ends. It leads into a
    pipe now; ``sys.stderr``, and so all that Python prints, goes to where it led before. What
    they said last is shown where one of them aborts the process.
    """
    if verbose or sys.stderr is not sys.__stderr__:
        return
    real = os.dup(2)
    words = LastWords()
    os.dup2(words.descriptor, 2)
    os.close(words.descriptor)
    sys.stderr = open(real, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    words.show_at_abort(real)


# --- console --------------------------------------------------------------------------------

STATUS_INTERVAL_S = 0.1
NO_STATUS_INTERVAL_S = 3600.0
CTRL_C_ECHO = "^C"  # what a terminal shows of it
METER_BLOCKS = 64  # of sound, which come in STATUS_INTERVAL_S
METER_CLIP_SHOWS = 20
METER_COLUMNS = 24
METER_TEXT = "[]  -60 dB CLIP  "  # what else the meter takes
METER_FLOOR_DB = -60.0
METER_SINK_DB_PER_S = 12.0
FULL_SCALE = 32767 / 32768


class LevelMeter:
    """A bar that follows the loudness in decibels, the peak of the last seconds, and clipping.

    One thread calls `hear`, another `show`.
    """

    def __init__(self) -> None:
        self._heard: deque[bytes] = deque(maxlen=METER_BLOCKS)
        self._latest = b""
        self._peak_db = METER_FLOOR_DB
        self._clip_shows = 0

    def hear(self, samples: bytes) -> None:
        """Take a block of sound, or an empty one where there is none now. Never blocks."""
        self._heard.append(samples)

    def show(self, columns: int = METER_COLUMNS) -> str:
        """Return the bar for what was heard since, or that there is none; every 0.1 s."""
        if self._heard:
            self._latest = b"".join(self._heard.popleft() for _ in range(len(self._heard)))
        if not self._latest:
            return "waiting for sound"
        values = memoryview(self._latest).cast("h")
        lowest, highest = min(values), max(values)
        level = max(-lowest, highest) / 32768
        self._clip_shows = METER_CLIP_SHOWS if level >= FULL_SCALE else self._clip_shows - 1
        return self._bar(level, columns) + (" CLIP" if self._clip_shows > 0 else "")

    def _bar(self, level: float, columns: int) -> str:
        level_db = max(METER_FLOOR_DB, 20 * math.log10(max(level, 1e-9)))
        sunk_db = self._peak_db - METER_SINK_DB_PER_S * STATUS_INTERVAL_S
        self._peak_db = max(level_db, sunk_db, METER_FLOOR_DB)
        filled, peak = (
            min(columns - 1, round((1 - shown_db / METER_FLOOR_DB) * columns))
            for shown_db in (level_db, self._peak_db)
        )
        bar = "".join(
            "#" if column < filled else "|" if column == peak else "-" for column in range(columns)
        )
        return f"[{bar}] {self._peak_db:4.0f} dB"


class Console:
    """What the user sees: lines, and on a terminal a status line below them, often rewritten.

    Lines go to standard output, or to standard error where the other carries data; problems and
    the status line always go to standard error. `quiet` leaves only problems. For any thread.
    """

    def __init__(self, quiet: bool, data_on_stdout: bool = False) -> None:
        self._quiet = quiet
        self._data_on_stdout = data_on_stdout
        # Whether there is a terminal that shows a status line.
        self.has_status = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._status_width = 0
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print a line of information."""
        if not self._quiet:
            self._print(text, complain if self._data_on_stdout else say)

    def complain(self, text: str) -> None:
        """Print a line about a problem."""
        self._print(text, complain)

    def ask(self, question: str) -> str:
        """Return the user's answer to `question`; blocks until there is one.

        Whoever prints something else meanwhile waits for it. An answer that does not come from a
        terminal is printed, so that the output reads like the session it was. Raises
        SocketPairError at the end of input.
        """
        name = question.strip(": ")
        # Standard output may carry data; and who types looks at the terminal.
        aside = self._data_on_stdout or (sys.stdin.isatty() and not sys.stdout.isatty())
        stream = sys.stderr if aside else sys.stdout
        with self._lock:
            self._show("")
            try:
                if aside or "readline" not in sys.modules:
                    # Without readline, input() has C write the question to descriptor 2: see
                    # quiet_libraries.
                    print(question, end="", file=stream, flush=True)
                    question = ""
                answer = input(question)
            except KeyboardInterrupt:
                complain("")  # what comes next is not to stand behind the question
                raise
            except EOFError:
                raise SocketPairError(f"\nno answer to {name!r}: end of input") from None
            if not sys.stdin.isatty():
                print(escape(answer), file=stream, flush=True)
        return answer

    def _print(self, text: str, put: Callable[[str], object]) -> None:
        with self._lock:
            self._show("")
            put(text)

    @property
    def columns(self) -> int:
        """How wide a status line may be: its terminal's width without what Ctrl+C adds."""
        import shutil  # noqa: PLC0415  (it takes a while, and files do without)

        columns = 0
        with contextlib.suppress(OSError, ValueError):  # Windows asks of 0, 1 and 2 alone
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        columns = columns or shutil.get_terminal_size().columns  # of standard output
        return max(1, columns - 1 - len(CTRL_C_ECHO))

    def show_status(self, text: str) -> None:
        """Replace the status line; does nothing without a terminal."""
        with self._lock:
            if self.has_status:
                self._show(fit(text, self.columns))

    @property
    def status_interval_s(self) -> float:
        """For how long a status line stays as it is: without a terminal, nobody need look."""
        return STATUS_INTERVAL_S if self.has_status else NO_STATUS_INTERVAL_S

    def show_loudness(self, meter: LevelMeter, beside: str) -> None:
        """Show `meter`, its bar as long as the terminal has room for, and `beside` it the rest."""
        if not self.has_status:
            return
        room = self.columns - len(METER_TEXT) - len(beside)
        self.show_status(f"{meter.show(max(1, min(METER_COLUMNS, room)))}  {beside}")

    def end_status(self) -> None:
        """Clear the status line, and show none from now on."""
        with self._lock:
            self._show("")
            self.has_status = False

    def _show(self, text: str) -> None:
        if self.has_status and (text or self._status_width):
            width = cells(text)
            shown = text + " " * (self._status_width - width)
            if not text:  # clear also what Ctrl+C has left behind the line
                shown = " " * (self._status_width + len(CTRL_C_ECHO)) + "\r"
            try:
                print(f"\r{shown}", end="", file=sys.stderr, flush=True)
            except OSError:  # the terminal is gone
                self.has_status, width = False, 0
            self._status_width = width


# --- command line ---------------------------------------------------------------------------

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
CODE_VARIABLE = "SOCKET_PAIR_CODE"
STDIN = "-"  # in place of the name of a file
MAX_SIGNALS = 4096  # that may have come since somebody waited for one
MAX_USAGE_CHARS = 5_000  # of what is wrong with arguments, which may be shown once more
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
HELP_COLUMNS = 78


class Parser(argparse.ArgumentParser):
    """A parser that tells what is wrong in one line, without all that there is."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        shown = escape(message, MAX_USAGE_CHARS)
        self.exit(EXIT_USAGE, f"{self.prog}: error: {shown} (see {self.prog} --help)\n")


def make_parser(description: str, examples: str, host_help: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that both scripts have; the caller checks the mode."""
    parser = Parser(
        description=description,
        epilog=examples,
        # With no width, argparse would import shutil at every start.
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=HELP_COLUMNS),
    )
    parser.add_argument(
        "mode",
        nargs="?",
        metavar=f"{{{','.join(MODES)}}}",
        help="asked for if left out",
    )
    parser.add_argument("--version", action="version", version=f"Socket Pair {__version__}")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="say more")
    volume.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    parser.add_argument(
        "--host", type=name_given, default=DEFAULT_HOST, help=f"{host_help} (%(default)s)"
    )
    parser.add_argument(
        "--port", type=number(int, 0, 65_535), default=DEFAULT_PORT, help="the port (%(default)s)"
    )
    pairing = parser.add_mutually_exclusive_group()
    pairing.add_argument(
        "--code",
        type=normalize_code,
        help=f"pairing code (or set {CODE_VARIABLE}, as arguments show in ps)",
    )
    pairing.add_argument("--open", action="store_true", help="do without a pairing code")
    return parser


def ask_mode(console: Console) -> str:
    """Ask for the mode until the answer is one."""
    while True:
        answer = console.ask("Mode (file/audio): ").strip().lower()
        for mode in MODES:
            if answer and mode.startswith(answer):
                return mode
        console.say("please type file or audio")


def refuse_other_mode(
    parser: argparse.ArgumentParser, args: argparse.Namespace, options: Mapping[str, Sequence[str]]
) -> None:
    """Exit with status 2 where `options` of the mode that was not chosen have been given.

    While no mode is chosen, all may be.
    """
    for mode, names in options.items():
        for name in names:
            given = getattr(args, name) != parser.get_default(name)
            if given and args.mode not in (None, mode):
                parser.error(f"--{name.replace('_', '-')} is for {mode} mode")


def take_code_from_environment(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Have the environment's pairing code count where neither --code nor --open was given.

    Exits with status 2 where it can be none.
    """
    text = os.environ.pop(CODE_VARIABLE, "")  # not for child processes
    if text and not (args.code or args.open):
        try:
            args.code = normalize_code(text)
        except argparse.ArgumentTypeError as error:
            parser.error(f"{CODE_VARIABLE}: {error}")


def name_given(text: str) -> str:
    """Return `text` as what a machine or a device is called, for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name")
    return text


Number = TypeVar("Number", int, float)


def number(kind: type[Number], low: Number, high: Number) -> Callable[[str], Number]:
    """Return what makes a number from `low` to `high` of an argument's text, for argparse."""
    noun = "whole number" if kind is int else "number"

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} from {low:.10g} to {high:.10g}")

    return parse


class Terminated(BaseException):
    """Raised in the main thread by SIGTERM, as KeyboardInterrupt is by Ctrl+C."""


class Interrupts:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt and Terminated in the main thread.

    One at a time: while the program deals with one, another ends it at once, with its exit status
    and without a word, unless the program has called `arm` for it. So does one in a destructor.
    """

    def __init__(self) -> None:
        self._is_armed = False

    @functools.cached_property
    def _sockets(self) -> tuple[socket.socket, socket.socket]:
        """What `wait` reads, and what wakes it: made late, so as not to be a standard stream."""
        woken, waker = socket.socketpair()
        woken.setblocking(False)
        waker.setblocking(False)
        return woken, waker

    def take(self) -> None:
        """Begin, also where a shell has started the program in the background, without SIGINT.

        Before that, up to the end of parsing the command line, signals just end the program:
        argparse does not bear an exception everywhere.
        """
        self._is_armed = True
        sys.unraisablehook = self._end_in_destructor
        signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._interrupt)

    def arm(self) -> None:
        """Have the next signal raise its exception again."""
        self._is_armed = True

    def wait(self, seconds: float) -> None:
        """Block the main thread for `seconds`; a signal and `wake` end that at once.

        Unlike time.sleep, it also sees a signal that came just before, or to another thread.
        """
        woken, _ = self._sockets
        if wait_for_socket(woken, seconds, to_write=False):
            woken.recv(MAX_SIGNALS)

    def wake(self) -> None:
        """End the main thread's wait, or the next one. For any thread."""
        with contextlib.suppress(BlockingIOError):  # it has long been told
            self._sockets[1].send(b"\0")

    def _interrupt(self, number: int, _frame: object) -> None:
        if not self._is_armed:
            os._exit(128 + number)
        self._is_armed = False
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _end_in_destructor(self, unraisable: Any) -> None:
        """End the program where its exception came up where Python can only print it."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            os._exit(EXIT_INTERRUPTED)
        if isinstance(unraisable.exc_value, Terminated):
            os._exit(EXIT_TERMINATED)
        sys.__unraisablehook__(unraisable)


INTERRUPTS = Interrupts()


def in_background(work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises.

    It is done by a thread of its own, so that Ctrl+C gets through where the system hangs.
    """
    from concurrent.futures import ThreadPoolExecutor, wait  # noqa: PLC0415  (few need it)

    future = ThreadPoolExecutor(1, "in background").submit(work)
    while wait([future], timeout=0.5).not_done:
        pass  # Windows lets Ctrl+C through only in between
    return future.result()


def with_host(host: str, work: Callable[[], T]) -> T:
    """Do as `in_background` does with `work`, which looks up `host`; at once for an address.

    Whoever knows a name may not answer for long, and then the C library lets no signal through.
    """
    return work() if is_numeric(host) else in_background(work)


def exit_status_of(main: Callable[[Sequence[str]], int]) -> int:
    """Run `main` on the command line's arguments; return its exit status, also after an error."""
    try:
        return main(sys.argv[1:])
    except SocketPairError as error:
        complain(str(error))
        return EXIT_FAILED
    except BrokenPipeError:  # nobody reads the output: nothing more to say then
        return EXIT_FAILED
    except OSError as error:
        where = f"{escape(str(error.filename))}: " if error.filename else ""
        complain(f"{where}{describe_error(error)}")
        return EXIT_FAILED
    except Exception as error:
        if sys.flags.dev_mode:  # python3 -X dev
            raise
        complain(describe_unexpected(error))
        return EXIT_FAILED


def describe_unexpected(error: Exception) -> str:
    """Return what to tell of an error that nobody has dealt with."""
    if is_exhausted(error):
        return "out of memory, threads or open files: close other programs, and try again"
    return f"internal error: {escape(repr(error))} (python3 -X dev shows where)"


def is_exhausted(error: Exception) -> bool:
    """Return whether the system has no more memory, threads or open files to give."""
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        return True
    # What Python, OpenSSL, and the system's loader of libraries say.
    words = ("start new thread", "malloc failure", "failed to map segment", "Too many open files")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main` on the command line's arguments and exit with the status it returns.

    Every other end also gets its status here: SocketPairError (1, with its line), Ctrl+C (130),
    SIGTERM (143), a closed standard output (1). The exit is immediate, so that a thread that
    still waits in a socket cannot hold it up: whoever prints flushes.
    """
    # Where they were closed at the start, input is empty, and output goes nowhere.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # A name that is typed may be no text, as names in arguments may.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = exit_status_of(main)
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except Terminated:
        status = EXIT_TERMINATED
    os._exit(status)
