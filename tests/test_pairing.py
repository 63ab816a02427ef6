"""Who may connect: pairing codes, real TLS on real sockets, and whatever anyone may send."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pexpect
import pytest

import client
import common
import server
from common import Connection, NotPaired, SocketPairError, make_tls_context, normalize_code
from server import Lobby, Patience
from support import HOST, ROOT, Process, RawClient, Server, environment, free_port, wait_for

CODE = "KQ7M-2XFD-9WPA"
OTHER_CODE = "KQ7M-2XFD-9WPB"
CERTIFICATE_SHA256 = "b3370082128140fa8a75b4cbc5cbe5d5b9b724d3f95cf1f2e2704a6864e67daa"
NAME = "quarterly figures.txt"
CONTENT = b"nobody but the two of us shall read this\n" * 5000
WITHOUT_CRYPTOGRAPHY = "raise ImportError('not installed')"


@pytest.fixture(scope="module")
def tls() -> ssl.SSLContext:
    return make_tls_context(normalize_code(CODE), server_side=False)


@pytest.fixture
def paired(inbox: Path) -> Iterator[Server]:
    with Server(inbox, "--code", CODE) as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a client in this process soon tired of waiting, and never come back."""
    monkeypatch.setattr(client, "RETRY_WAITS_S", ())
    monkeypatch.setattr(client, "HANDSHAKE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(common, "PROGRESS_TIMEOUT_S", 1.0)


def send_here(port: int, path: Path, tls: ssl.SSLContext | None = None) -> int:
    """Send a file from this process, for what is to be done many times; return the exit status."""
    address = client.Address(HOST, port)
    if tls:
        address.__dict__["tls"] = tls
    return client.start_file_client(address, [str(path)], quiet=True)


def check_paired(running: Server, tls: ssl.SSLContext, tmp_path: Path) -> None:
    """Fail unless a server with the pairing code serves a real client at once."""
    probe = tmp_path / f"probe {random.getrandbits(64):x}"
    probe.write_bytes(os.urandom(1000))
    started = time.monotonic()
    assert send_here(running.port, probe, tls) == 0
    assert time.monotonic() - started < 5
    assert (running.folder / probe.name).read_bytes() == probe.read_bytes()
    (running.folder / probe.name).unlink()


# --- codes ----------------------------------------------------------------------------------


def test_new_codes_have_sixty_bits_and_nothing_that_looks_alike() -> None:
    codes = {server.make_code() for _ in range(1000)}
    assert len(codes) == 1000
    for code in codes:
        assert re.fullmatch(r"([A-HJ-NP-Z2-9]{4}-){2}[A-HJ-NP-Z2-9]{4}", code)
    assert len(set(server.CODE_ALPHABET)) == 32


@pytest.mark.parametrize(
    "typed",
    [
        "KQ7M-2XFD-9WPA",
        "kq7m 2xfd 9wpa",
        " kq7m2xfd9wpa\n",
        "KQ7M\N{EN DASH}2XFD\N{EM DASH}9WPA",
        "\N{FULLWIDTH LATIN SMALL LETTER K}Q7M\N{NO-BREAK SPACE}2XFD 9WPA",
    ],
)
def test_a_code_is_the_same_however_it_is_typed(typed: str) -> None:
    assert normalize_code(typed) == "KQ7M2XFD9WPA"


@pytest.mark.parametrize(
    "typed", ["", "KQ7M-2XFD-9WP", "- - - - - - - - -", "a b c d e f g h i j k"]
)
def test_what_counts_of_a_code_has_twelve_characters(typed: str) -> None:
    with pytest.raises(ValueError, match="at least 12"):
        normalize_code(typed)


def shake_hands_in_memory(near: ssl.SSLContext, far: ssl.SSLContext) -> None:
    """Let a client's and a server's context meet; raises what the client raises, or the server."""
    sides = [common.TLS(near, False), common.TLS(far, True)]
    done = [False, False]
    for _ in range(4):
        for index, side in enumerate(sides):
            done[index] = done[index] or side.shake_hands()
            sides[1 - index].feed(side.output())
    assert done == [True, True]


def test_the_same_code_makes_the_same_key_on_both_sides(tls: ssl.SSLContext) -> None:
    shake_hands_in_memory(tls, make_tls_context(normalize_code(CODE), server_side=True))
    for_another = make_tls_context(normalize_code(OTHER_CODE), server_side=True)
    with pytest.raises(NotPaired) as caught:
        shake_hands_in_memory(tls, for_another)
    assert caught.value.wrong_code


@dataclass
class Loaded:
    """What a TLS context was given, and how it lay on the disk."""

    content: bytes
    folder_mode: int
    neighbours: int


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Loaded]:
    """Return the list of what TLS contexts are given from now on."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[Loaded] = []
    load = ssl.SSLContext.load_cert_chain

    def spy(context: ssl.SSLContext, path: str, *args: Any, **options: Any) -> None:
        file = Path(path)
        mode = file.parent.stat().st_mode
        seen.append(Loaded(file.read_bytes(), mode, len(list(tmp_path.iterdir()))))
        load(context, path, *args, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    return seen


def test_the_certificate_never_changes(loaded: list[Loaded]) -> None:
    # Two versions of this program, or of the library, must derive the same from a code.
    make_tls_context(normalize_code(CODE), server_side=True)
    begin = loaded[0].content.index(b"-----BEGIN CERTIFICATE-----")
    certificate = ssl.PEM_cert_to_DER_cert(loaded[0].content[begin:].decode())
    assert hashlib.sha256(certificate).hexdigest() == CERTIFICATE_SHA256


def test_the_key_is_never_on_the_disk_unencrypted(loaded: list[Loaded], tmp_path: Path) -> None:
    make_tls_context(normalize_code(CODE), server_side=True)
    (seen,) = loaded
    assert seen.content.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert b"BEGIN PRIVATE KEY" not in seen.content
    assert seen.neighbours == 1
    if os.name == "posix":
        assert seen.folder_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []


# --- both scripts ---------------------------------------------------------------------------


def test_a_file_crosses_with_the_right_code_however_it_is_typed(
    paired: Server, source: Path
) -> None:
    result = paired.send(source, "--code", "kq7m 2xfd 9wpa")
    assert (result.status, result.stderr) == (0, "")
    assert (paired.folder / NAME).read_bytes() == CONTENT


def test_the_code_can_come_from_the_environment(inbox: Path, source: Path) -> None:
    env = {"SOCKET_PAIR_CODE": CODE}
    with Server(inbox, env=env) as running:
        assert running.send(source).status == 1
        assert running.send(source, env=env).status == 0
        # Said aloud, --open means to do without.
        assert running.send(source, "--open", env=env).status == 1


def test_a_wrong_code_is_told_in_one_line_on_both_sides(paired: Server, source: Path) -> None:
    result = paired.send(source, "--code", OTHER_CODE)
    assert result.status == 1
    assert result.error_lines == [f"127.0.0.1:{paired.port} has another pairing code"]
    paired.wait_for_output(r"127\.0\.0\.1:\d+: turned away: wrong pairing code\n")
    assert not paired.folder.joinpath(NAME).exists()


def test_without_a_code_or_a_terminal_the_client_says_what_is_wanted(
    paired: Server, source: Path
) -> None:
    result = paired.send(source, stdin=b"KQ7M-2XFD-9WPA\n")
    assert result.status == 1
    assert result.error_lines == [
        "this server wants its pairing code: give it with --code CODE or SOCKET_PAIR_CODE"
    ]
    paired.wait_for_output(r"127\.0\.0\.1:\d+: turned away: no pairing code\n")


def test_a_code_is_told_to_be_unwanted_where_the_server_is_open(
    server: Server, source: Path
) -> None:
    result = server.send(source, "--code", CODE)
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"127.0.0.1:{server.port} takes no pairing code: leave out --code")
    server.wait_for_output(r"turned away: it asked for TLS, and this server has no pairing code\n")
    assert server.send(source).status == 0


def test_on_a_terminal_the_client_asks_for_the_code(paired: Server, source: Path) -> None:
    child = pexpect.spawn(
        sys.executable,
        [str(ROOT / "client.py"), "file", "--port", str(paired.port), str(source)],
        env=environment(),
        encoding="utf-8",
        timeout=60,
    )
    with contextlib.closing(child):
        child.expect_exact("Pairing code: ")
        child.sendline("too short")
        child.expect_exact("a pairing code has at least 12 letters and digits")
        child.expect_exact("Pairing code: ")
        child.sendline("kq7m 2xfd 9wpb")
        child.expect_exact("has another pairing code\r\nPairing code: ")
        child.sendline("kq7m 2xfd 9wpa")
        child.expect_exact(f"Saved as {NAME}")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0


@pytest.mark.parametrize("script", ["server.py", "client.py"])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--code", "KQ7M-2XFD-9WP"), "at least 12 letters and digits"),
        (("--code", CODE, "--open"), "not allowed with argument"),
    ],
)
def test_wrong_arguments_end_with_status_2(
    script: str, arguments: tuple[str, ...], complaint: str
) -> None:
    with Process(script, "file", *arguments) as process:
        result = process.wait()
    assert result.status == 2
    assert complaint in result.stderr


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_without_the_package_there_is_one_line(script: str, tmp_path: Path, source: Path) -> None:
    (tmp_path / "cryptography.py").write_text(WITHOUT_CRYPTOGRAPHY)
    arguments = ["file", "--port", str(free_port()), "--code", CODE]
    if script == "client.py":
        arguments.append(str(source))
    with Process(script, *arguments, env={"PYTHONPATH": str(tmp_path)}) as process:
        result = process.wait()
    assert result.status == 1
    assert result.error_lines == [
        "pairing codes need the package cryptography: pip install cryptography"
    ]


def test_without_a_code_the_package_is_not_loaded(
    tmp_path: Path, inbox: Path, source: Path
) -> None:
    (tmp_path / "cryptography.py").write_text(WITHOUT_CRYPTOGRAPHY)
    env = {"PYTHONPATH": str(tmp_path)}
    with Server(inbox, env=env) as running:
        assert running.send(source, env=env).status == 0


def test_beyond_this_machine_the_server_makes_a_code_and_says_what_to_type(
    inbox: Path, source: Path
) -> None:
    with Server(inbox, "--host", "0.0.0.0") as running:
        shown = running.wait_for_output(
            r"Pairing code: (\S+)\nOn the other machine:\n    python (client\.py file .*)\n"
        )
        command = shown[2].replace(server.THIS_MACHINE, HOST).split()
        assert command[command.index("--code") + 1] == shown[1]
        assert command[command.index("--port") + 1] == str(running.port)
        assert command[command.index("--host") + 1] != "0.0.0.0"
        with Process(*command, source) as typed:
            assert typed.wait().status == 0
        assert (inbox / NAME).read_bytes() == CONTENT


def test_a_quiet_server_still_says_its_new_code(inbox: Path) -> None:
    port = str(free_port())
    arguments = ("file", "-q", "--host", "0.0.0.0", "--port", port, "--folder", str(inbox))
    with Process("server.py", *arguments) as quiet:
        quiet.wait_for_output(r"^Pairing code: \S+\nOn the other machine:\n    python client\.py ")


def test_a_known_code_is_not_shown_and_left_to_the_prompt(inbox: Path) -> None:
    with Server(inbox, "--host", "0.0.0.0", "--code", CODE) as running:
        shown = running.wait_for_output(r"On the other machine:\n    (.*)\n")
        assert "--code" not in shown[1]
        assert CODE not in running.stdout() + running.stderr()


def test_open_says_what_it_means_and_the_client_has_to_say_it_too(
    inbox: Path, source: Path
) -> None:
    with Server(inbox, "--host", "0.0.0.0", "--open") as running:
        shown = running.wait_for_output(r"    python client\.py file --host (\S+) .*--open\n")
        (warning,) = running.stderr().splitlines()
        assert warning.startswith("--open: anyone who can reach this port may send files here")
        assert running.send(source).status == 0  # from this machine itself
        if shown[1] != server.THIS_MACHINE:
            with Process(
                "client.py", "file", "--host", shown[1], "--port", str(running.port), source
            ) as process:
                result = process.wait()
            assert result.status == 1
            assert "add --open" in result.stderr


def test_a_name_with_several_addresses_is_listened_on_at_all_of_them(
    inbox: Path, source: Path
) -> None:
    found = {str(each[4][0]) for each in socket.getaddrinfo("localhost", None)}
    with Server(inbox, "--host", "localhost") as running:
        for address in found:
            result = running.send(source, "--host", address)
            assert result.status == 0, result
    assert visible_files(inbox) == {NAME}


def visible_files(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if not name.startswith(".")}


def test_both_ip_versions_at_once(inbox: Path, source: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with Server(inbox, "--host", "::", "--code", CODE) as running:
        for address in ("127.0.0.1", "::1"):
            assert running.send(source, "--host", address, "--code", CODE).status == 0


# --- what someone between the two can do ----------------------------------------------------


class Tap:
    """A link to a server, all of whose bytes are recorded.

    `change` and `cut` name a byte by its direction (0 is towards the server) and its number: the
    one is changed on its way, the other and all that follow do not arrive.
    """

    def __init__(
        self,
        port: int,
        change: tuple[int, int] | None = None,
        cut: tuple[int, int] | None = None,
    ) -> None:
        self.recorded = (bytearray(), bytearray())
        self._target = port
        self._change = change
        self._cut = cut
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                with near, socket.create_connection((HOST, self._target), timeout=60) as far:
                    ways = [
                        threading.Thread(target=self._pass, args=(*way,), daemon=True)
                        for way in ((0, near, far), (1, far, near))
                    ]
                    for thread in ways:
                        thread.start()
                    for thread in ways:
                        thread.join(60)

    def _pass(self, direction: int, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(self._harm(direction, data))
                self.recorded[direction].extend(data)
                if self._cut and self._cut[0] == direction:
                    assert len(self.recorded[direction]) < self._cut[1]
            target.shutdown(socket.SHUT_WR)
        except (OSError, AssertionError):
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _harm(self, direction: int, data: bytes) -> bytes:
        passed = len(self.recorded[direction])
        if self._cut and self._cut[0] == direction:
            return data[: max(0, self._cut[1] - passed)]
        if self._change and self._change[0] == direction:
            at = self._change[1] - passed
            if 0 <= at < len(data):
                return data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]
        return data


def record(running: Server, path: Path, tls: ssl.SSLContext | None) -> tuple[bytes, bytes]:
    """Send a file through a tap; return all that went to the server, and all that came back."""
    with Tap(running.port) as tap:
        assert send_here(tap.port, path, tls) == 0
    return bytes(tap.recorded[0]), bytes(tap.recorded[1])


def samples(length: int, count: int) -> list[int]:
    """Return numbers below `length`: all of the first few, the last ones, and some between."""
    generator = random.Random(length)
    between = [generator.randrange(length) for _ in range(count)]
    return sorted({*range(0, min(length, 12), 3), *between, length - 1})


def test_neither_names_nor_content_can_be_read_on_the_way(
    paired: Server, server_without_code: Server, source: Path, tls: ssl.SSLContext
) -> None:
    secrets = [NAME.encode(), CONTENT[:20], b"offer", b"hello", b"entries", b"SHA-256"]
    open_way, _ = record(server_without_code, source, None)
    assert all(secret in open_way for secret in secrets[:5])  # so this would be noticed
    for direction in record(paired, source, tls):
        assert not any(secret in direction for secret in secrets)
        assert normalize_code(CODE).encode() not in direction
    upwards, _ = record(paired, source, tls)
    assert len(upwards) < 20_000  # the second time it is there already


@pytest.fixture
def server_without_code(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "open inbox") as running:
        yield running


def test_the_same_conversation_never_looks_the_same(
    paired: Server, source: Path, tls: ssl.SSLContext
) -> None:
    records = []
    for _ in range(2):
        records.append(record(paired, source, tls)[0][300:])
        (paired.folder / NAME).unlink()
    assert records[0] != records[1]
    # Recorded, it is worth nothing.
    with RawClient(paired.port) as raw:
        raw.send(records[0])
        raw.hang_up()
        raw.read_all()
    assert not (paired.folder / NAME).exists()
    check_paired(paired, tls, source.parent)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("harm", ["change", "cut"])
def test_whatever_is_changed_or_cut_off_on_the_way_nothing_wrong_arrives(
    harm: str, paired: Server, tmp_path: Path, tls: ssl.SSLContext
) -> None:
    held = paired.held()
    path = tmp_path / NAME
    path.write_bytes(CONTENT[:3000])
    lengths = [len(way) for way in record(paired, path, tls)]
    (paired.folder / NAME).unlink()
    memory = paired.status_field("VmRSS")
    for direction in (0, 1):
        for number in samples(lengths[direction], 40):
            place = (direction, number)
            tap = Tap(paired.port, **{harm: place})
            with tap:
                status = send_here(tap.port, path, tls)
            arrived = paired.folder / NAME
            if status == 0:
                assert arrived.read_bytes() == path.read_bytes()
            if arrived.exists():
                assert arrived.read_bytes() == path.read_bytes()
                arrived.unlink()
    check_paired(paired, tls, tmp_path)
    paired.wait_until_idle(held)
    assert paired.status_field("VmRSS") < memory + 10_000  # kB
    assert visible_files(paired.folder) == set()


@pytest.mark.parametrize("code", [CODE, None])
def test_sound_crosses_and_with_a_code_no_sample_can_be_heard_on_the_way(
    code: str | None, tmp_path: Path
) -> None:
    samples = random.Random(1).randbytes(2 * 48_000 * 10)
    with wave.open(str(tmp_path / "in.wav"), "wb") as file:
        file.setparams((1, 2, 48_000, 0, "NONE", ""))
        file.writeframes(samples)
    both = ("audio", *(("--code", code) if code else ()), "--port")
    port, heard = free_port(), tmp_path / "out.wav"
    with Process("server.py", *both, str(port), "--input", str(tmp_path / "in.wav")) as server:
        server.wait_for_output("Broadcasting")
        arguments = ("--output", str(heard), "--seconds", "1")
        with Tap(port) as tap, Process("client.py", *both, str(tap.port), *arguments) as listener:
            result = listener.wait()
        if code:
            refused = Process("client.py", "audio", "--port", str(port), *arguments)
            with refused:
                assert refused.wait().status == 1
    assert result.status == 0, result
    with wave.open(str(heard)) as file:
        played = file.readframes(10**6)
    assert len(played) > 48_000
    assert samples.find(played) >= 0
    assert (played[1000:1016] in tap.recorded[1]) == (code is None)


# --- what anyone can send -------------------------------------------------------------------


def run_tool(*command: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """Run a program that talks to the server; skip where it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


@pytest.fixture(params=["paired", "open"])
def either(request: pytest.FixtureRequest, inbox: Path) -> Iterator[Server]:
    """Give a server with a code, then one without."""
    with Server(inbox, *(["--code", CODE] if request.param == "paired" else [])) as running:
        yield running


@pytest.fixture
def still_well(
    either: Server, tls: ssl.SSLContext, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Check that afterwards a real client is served at once, and that nothing is left behind."""
    code = tls if "paired" in request.node.name else None

    held = either.held()

    def check() -> None:
        probe = tmp_path / f"probe {random.getrandbits(64):x}"
        probe.write_bytes(b"x" * 1000)
        assert send_here(either.port, probe, code) == 0
        (either.folder / probe.name).unlink()
        either.wait_until_idle(held)

    check()
    memory = either.status_field("VmRSS")
    yield
    check()
    assert either.status_field("VmRSS") < memory + 10_000  # kB
    assert visible_files(either.folder) == set()


@pytest.mark.usefixtures("still_well")
def test_openssl_s_client(either: Server, request: pytest.FixtureRequest) -> None:
    for arguments in ([], ["-tls1_2"], ["-alpn", "socket-pair"]):
        run_tool("openssl", "s_client", "-connect", f"{HOST}:{either.port}", *arguments)
    logged = "speaks TLS as a browser" if "paired" in request.node.name else "asked for TLS"
    either.wait_for_output(logged)


@pytest.mark.usefixtures("still_well")
def test_a_browser(either: Server) -> None:
    page = run_tool("curl", "-s", "--http0.9", "-m", "20", f"http://{HOST}:{either.port}/")
    assert page.stdout.startswith("This is a Socket Pair server, not a web server")
    either.wait_for_output("not a Socket Pair client: it speaks HTTP, as a browser does")
    for _ in range(10):
        assert run_tool("curl", "-sk", "-m", "20", f"https://{HOST}:{either.port}/").returncode


@pytest.mark.usefixtures("still_well")
def test_a_port_scanner(either: Server) -> None:
    run_tool("nmap", "-Pn", "-sV", "--version-all", "-p", str(either.port), HOST)


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


@pytest.mark.usefixtures("still_well")
def test_junk(either: Server) -> None:
    for junk in JUNK.values():
        for hang_up in (True, False):
            with RawClient(either.port) as raw:
                raw.send(junk)
                if hang_up:
                    raw.hang_up()
                    raw.read_all()


@pytest.mark.usefixtures("still_well")
def test_silence_and_a_byte_a_second_take_ten_seconds(either: Server) -> None:
    hello = b"\x16\x03\x01\x02\x00" + bytes(512)
    with RawClient(either.port) as silent, RawClient(either.port) as slow:
        started = time.monotonic()
        slow.socket.settimeout(1.0)
        for byte in hello:
            slow.send(bytes([byte]))
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                if not slow.socket.recv(100):
                    break
                continue
            if time.monotonic() - started > 30:
                break
        assert time.monotonic() - started < 12
        silent.socket.settimeout(12)
        silent.read_all()
        assert time.monotonic() - started < 13


@pytest.mark.usefixtures("still_well")
def test_a_thousand_silent_connections_keep_nobody_out(
    either: Server, tls: ssl.SSLContext, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    code = tls if "paired" in request.node.name else None
    path = tmp_path / "in the crowd"
    path.write_bytes(b"x")
    with contextlib.ExitStack() as stack:
        for number in range(700):
            raw = stack.enter_context(RawClient(either.port))
            raw.send(b"\x16\x03" if number % 2 else b"")
        assert either.threads() < 2 * server.MAX_UNFINISHED
        started = time.monotonic()
        assert send_here(either.port, path, code) == 0
        assert time.monotonic() - started < 3
        either.wait_for_output("dropped: too many have not finished their handshake")
    (either.folder / path.name).unlink()


def test_a_certificate_of_another_code_is_refused_by_the_server_itself(
    paired: Server, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    # One that does not check the server's certificate, as a real client does first.
    other = make_tls_context(normalize_code(OTHER_CODE), server_side=False)
    other.verify_mode = ssl.CERT_NONE
    with Connection(socket.create_connection((HOST, paired.port)), "server") as connection:
        connection.start_tls(other, server_side=False)
        with pytest.raises(SocketPairError):
            connection.send("hello", protocol=common.PROTOCOL, mode="file")
            connection.receive("welcome")
    paired.wait_for_output("turned away: wrong pairing code")
    check_paired(paired, tls, tmp_path)


def test_many_wrong_codes_are_slowed_down_and_a_right_one_served_after_a_wait(
    paired: Server, tls: ssl.SSLContext, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = make_tls_context(normalize_code(OTHER_CODE), server_side=False)
    for _ in range(server.FREE_TRIES):
        assert send_here(paired.port, source, wrong) == 1
    assert send_here(paired.port, source, tls) == 0  # who mistypes at times is not locked out
    for _ in range(server.FREE_TRIES + 1):
        assert send_here(paired.port, source, wrong) == 1
    capfd.readouterr()
    assert send_here(paired.port, source, tls) == 1
    assert "too many wrong pairing codes" in capfd.readouterr().err
    paired.wait_for_output("turned away: too many wrong pairing codes came from its address")
    wait_for(lambda: send_here(paired.port, source, tls) == 0, 20)


# --- servers that are none of ours ----------------------------------------------------------


def answer_once(answer: bytes) -> tuple[int, threading.Thread]:
    """Have a server answer one client with `answer` and hang up; return its port."""
    listener = socket.create_server((HOST, 0))

    def run() -> None:
        with listener, contextlib.suppress(OSError):
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(60)
                sock.recv(65536)
                sock.sendall(answer)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return listener.getsockname()[1], thread


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
    port, thread = answer_once(answer)
    assert send_here(port, source, tls if with_code else None) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{HOST}:{port}" in line
    thread.join(60)


def test_a_client_with_a_code_tells_a_server_without_it_nothing(
    tls: ssl.SSLContext, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_tls_context(normalize_code(OTHER_CODE), server_side=True)
    other.verify_mode = ssl.CERT_NONE  # it would take anyone
    heard: list[bytes] = []
    listener = socket.create_server((HOST, 0))

    def run() -> None:
        with listener, contextlib.suppress(SocketPairError):
            sock, _ = listener.accept()
            with Connection(sock, "client") as connection:
                connection.start_tls(other, server_side=True)
                heard.append(connection.read(1))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    assert send_here(port, source, tls) == 1
    thread.join(60)
    assert heard == []
    assert capfd.readouterr().err == f"{HOST}:{port} has another pairing code\n"


# --- the bounds, by themselves --------------------------------------------------------------


class FakeConnection:
    """Stands for a connection in the lobby."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.woken = False

    def wake(self) -> None:
        """Take note of being put out."""
        self.woken = True


def test_the_crowdiest_address_gives_way_in_the_lobby() -> None:
    lobby = Lobby(4)
    patient = FakeConnection("patient")
    flood = [FakeConnection(f"flood {number}") for number in range(10)]
    lobby.enter(patient, "192.0.2.1")  # type: ignore[arg-type]
    for each in flood:
        lobby.enter(each, "192.0.2.66")  # type: ignore[arg-type]
    assert not patient.woken
    assert [each.woken for each in flood] == [True] * 7 + [False] * 3
    assert lobby.leave(patient)  # type: ignore[arg-type]
    assert not lobby.leave(patient)  # type: ignore[arg-type]
    assert not lobby.leave(flood[0])  # type: ignore[arg-type]


def test_patience_runs_out_and_comes_back() -> None:
    now_s = 0.0
    patience = Patience(lambda: now_s)
    waits = []
    for _ in range(server.FREE_TRIES + 9):
        patience.note_wrong_code("192.0.2.1")
        started_s = now_s
        while patience.refuses("192.0.2.1"):
            now_s += 0.5
        waits.append(now_s - started_s)
    assert waits == [0.0] * server.FREE_TRIES + [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert not patience.refuses("192.0.2.2")
    patience.note_wrong_code("192.0.2.1")
    patience.note_right_code("192.0.2.1")
    assert not patience.refuses("192.0.2.1")


def test_patience_knows_one_with_many_ipv6_addresses_and_forgets_the_oldest() -> None:
    patience = Patience(lambda: 0.0)
    for number in range(server.FREE_TRIES + 1):
        patience.note_wrong_code(f"2001:db8::{number:x}%eth0")
    assert patience.refuses("2001:db8::abcd")
    assert not patience.refuses("2001:db8:0:1::1")
    for number in range(server.MAX_KNOWN_HOSTS):
        patience.note_wrong_code(f"10.0.{number // 256}.{number % 256}")
    assert not patience.refuses("2001:db8::abcd")


def test_both_ends_may_read_and_write_at_once(tls: ssl.SSLContext) -> None:
    far_tls = make_tls_context(normalize_code(CODE), server_side=True)
    with socket.create_server((HOST, 0)) as listener:
        near_socket = socket.create_connection(listener.getsockname())
        far_socket, _ = listener.accept()
    blocks = [random.Random(number).randbytes(200_000) for number in range(100)]
    received: dict[str, bytes] = {}

    def read(name: str, connection: Connection) -> None:
        digest = hashlib.sha256()
        for block in blocks:
            digest.update(connection.read(len(block)))
        received[name] = digest.digest()

    def write(connection: Connection) -> None:
        for block in blocks:
            connection.write(block)

    with Connection(near_socket, "far") as near, Connection(far_socket, "near") as far:
        shaking = threading.Thread(
            target=far.start_tls, args=(far_tls,), kwargs={"server_side": True}
        )
        shaking.start()
        near.start_tls(tls, server_side=False)
        shaking.join(60)
        threads = [
            threading.Thread(target=read, args=("near", near)),
            threading.Thread(target=read, args=("far", far)),
            threading.Thread(target=write, args=(near,)),
            threading.Thread(target=write, args=(far,)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    expected = hashlib.sha256(b"".join(blocks)).digest()
    assert received == {"near": expected, "far": expected}


def test_a_connection_cut_off_by_the_network_is_not_a_clean_end(tls: ssl.SSLContext) -> None:
    far_tls = make_tls_context(normalize_code(CODE), server_side=True)
    for cut in (True, False):
        with socket.create_server((HOST, 0)) as listener:
            near_socket = socket.create_connection(listener.getsockname())
            far_socket, _ = listener.accept()
        with Connection(near_socket, "far") as near, Connection(far_socket, "near") as far:
            shaking = threading.Thread(
                target=far.start_tls, args=(far_tls,), kwargs={"server_side": True}
            )
            shaking.start()
            near.start_tls(tls, server_side=False)
            shaking.join(60)
            near.send("last")
            if cut:
                near.socket.shutdown(socket.SHUT_WR)
            else:
                near.close()
            far.receive("last")
            with pytest.raises(common.ConnectionBroken if cut else common.PeerClosed):
                far.receive("more")
