"""Whatever anyone sends to a server, with a code or without, it serves on and keeps nothing."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import server
from pairing import CODE, JUNK, send_here
from support import HOST, RawClient, Server, visible


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
    either: Server, code: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Check that afterwards a real client is served at once, and that nothing is left behind."""
    its_code = code if "paired" in request.node.name else None

    held = either.held()

    def check() -> None:
        probe = tmp_path / f"probe {random.getrandbits(64):x}"
        probe.write_bytes(b"x" * 1000)
        assert send_here(either.port, probe, its_code) == 0
        (either.folder / probe.name).unlink()
        either.wait_until_idle(held)

    check()
    memory = either.status_field("VmRSS")
    yield
    check()
    assert either.status_field("VmRSS") < memory + 10_000  # kB
    assert visible(either.folder) == []


@pytest.mark.usefixtures("still_well")
def test_openssl_s_client_gets_no_certificate(either: Server) -> None:
    for arguments in ([], ["-tls1_2"], ["-alpn", "h2"]):
        shown = run_tool("openssl", "s_client", "-connect", f"{HOST}:{either.port}", *arguments)
        assert "BEGIN CERTIFICATE" not in shown.stdout
    either.wait_for_output("it speaks TLS: a browser, or an older version of Socket Pair")


@pytest.mark.usefixtures("still_well")
def test_a_browser_is_told_what_this_is(either: Server) -> None:
    page = run_tool("curl", "-s", "-m", "60", f"http://{HOST}:{either.port}/")
    assert page.stdout.startswith("This is a Socket Pair server, not a web server")
    either.wait_for_output("not a Socket Pair client: it speaks HTTP, as a browser does")
    for _ in range(10):
        assert run_tool("curl", "-sk", "-m", "60", f"https://{HOST}:{either.port}/").returncode


@pytest.mark.usefixtures("still_well")
def test_a_port_scanner_does_no_harm(either: Server) -> None:
    run_tool("nmap", "-Pn", "-sV", "--version-all", "-p", str(either.port), HOST)


@pytest.mark.usefixtures("still_well")
def test_junk_does_no_harm(either: Server) -> None:
    for junk in JUNK.values():
        for hang_up in (True, False):
            with RawClient(either.port) as raw:
                raw.send(junk)
                if hang_up:
                    raw.hang_up()
                    raw.read_all()


@pytest.mark.parametrize("either", ["paired"], indirect=True)
@pytest.mark.usefixtures("still_well")
def test_whoever_is_silent_or_sends_a_byte_a_second_is_left_after_ten_seconds(
    either: Server,
) -> None:
    """A server without a code: test_misbehaving_clients.py."""
    hello = b"\x16\x03\x01\x02\x00" + bytes(55)
    with RawClient(either.port) as silent, RawClient(either.port) as slow:
        assert slow.is_left_while_it_sends(hello)
        silent.read_all()
    either.wait_for_output("made no progress for 10 s")


@pytest.mark.usefixtures("still_well")
def test_a_thousand_silent_connections_keep_nobody_out(
    either: Server, code: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    its_code = code if "paired" in request.node.name else None
    path = tmp_path / "in the crowd"
    path.write_bytes(b"x")
    with contextlib.ExitStack() as stack:
        for number in range(700):
            raw = stack.enter_context(RawClient(either.port))
            raw.send(b"\x16\x03" if number % 2 else b"")
        assert either.threads() < 2 * server.MAX_PENDING
        assert send_here(either.port, path, its_code) == 0
        either.wait_for_output("dropped: too many have not finished their handshake")
    (either.folder / path.name).unlink()
