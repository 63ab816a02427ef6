"""Two machines and a third one between them: network namespaces, as root on Linux.

    near 10.77.1.2 ----- 10.77.1.1 between 10.77.2.1 ----- 10.77.2.2 far

``near`` has the client and ``far`` the server. All they say to each other goes through
``between``, which hears all of it and does not know the code.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import MIB, Process, Result, Server, make_file, partial_size, sha256, wait_for

FAR = "10.77.2.2"
CODE = "KQ7M-2XFD-9WPA"

LISTEN_IN = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire:
    print("listening", flush=True)
    with open(sys.argv[1], "wb", buffering=0) as record:
        while True:
            record.write(wire.recv(65536))
"""


def ip(*arguments: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=60)


@dataclass(frozen=True)
class Hosts:
    """The three machines, by the names of their namespaces."""

    near: str
    between: str
    far: str

    @staticmethod
    def at(host: str) -> tuple[str, ...]:
        """Return what runs a command on a machine."""
        return ("ip", "netns", "exec", host)

    def set_cable(self, state: str) -> None:
        """Put the client's cable in (up) or out (down), at its other end."""
        ip("-n", self.between, "link", "set", "to-near", state)

    def shape(self, *arguments: str) -> bool:
        """Give the way to the server a traffic rule of tc; False if the kernel has not got it."""
        command = ["tc", "qdisc", "replace", "dev", "to-far", "root", *arguments]
        done = subprocess.run(
            [*self.at(self.between), *command], capture_output=True, timeout=60, check=False
        )
        return done.returncode == 0


def make_hosts(stack: contextlib.ExitStack) -> Hosts:
    """Make the machines and their cables, which the stack takes away again."""
    hosts = Hosts(*(f"sp{os.getpid()}-{name}" for name in ("near", "between", "far")))
    for host in (hosts.near, hosts.between, hosts.far):
        ip("netns", "add", host)
        stack.callback(ip, "netns", "delete", host)
        ip("-n", host, "link", "set", "lo", "up")
    for host, number, name in ((hosts.near, 1, "to-near"), (hosts.far, 2, "to-far")):
        ip("-n", host, "link", "add", "cable", "type", "veth", "peer", name, "netns", hosts.between)
        ip("-n", host, "address", "add", f"10.77.{number}.2/24", "dev", "cable")
        ip("-n", hosts.between, "address", "add", f"10.77.{number}.1/24", "dev", name)
        ip("-n", host, "link", "set", "cable", "up")
        ip("-n", hosts.between, "link", "set", name, "up")
        ip("-n", host, "route", "add", "default", "via", f"10.77.{number}.1")
    forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
    subprocess.run([*hosts.at(hosts.between), "sh", "-c", forward], check=True, timeout=60)
    return hosts


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need root on Linux")
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need iproute2")
    with contextlib.ExitStack() as stack:
        try:
            made = make_hosts(stack)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made


@pytest.fixture
def far(hosts: Hosts, inbox: Path) -> Iterator[Server]:
    """Give a server with a code on the far machine."""
    with Server(inbox, "--host", FAR, "--code", CODE, wrapper=hosts.at(hosts.far)) as running:
        yield running


def send(hosts: Hosts, server: Server, path: Path, *arguments: str, host: str = "") -> Result:
    """Send a file to the far machine, from the near one or from `host`; return how it went."""
    with server.client(
        path, "--host", FAR, *arguments, wrapper=hosts.at(host or hosts.near)
    ) as client:
        return client.wait()


@contextlib.contextmanager
def third_machine_listening(hosts: Hosts, record: Path) -> Iterator[None]:
    """Record every packet that goes through the machine between."""
    command = [*hosts.at(hosts.between), sys.executable, "-c", LISTEN_IN, str(record)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield
        finally:
            process.kill()


def test_the_command_that_the_server_prints_works_on_the_other_machine(
    hosts: Hosts, inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "report.bin", 3 * MIB)
    with Server(inbox, "--host", "0.0.0.0", wrapper=hosts.at(hosts.far)) as server:
        command = server.wait_for_output(r"\n    python (client\.py .*)\n")[1].split()
        assert command[command.index("--host") + 1] == FAR
        with Process(*command, source, wrapper=hosts.at(hosts.near)) as client:
            result = client.wait()
        assert result.status == 0, result
    assert sha256(inbox / source.name) == sha256(source)


def test_a_third_machine_without_the_code_sees_nothing(
    hosts: Hosts, far: Server, tmp_path: Path
) -> None:
    source = tmp_path / "unmistakable name.txt"
    source.write_bytes(b"an unmistakable text " * 5000)
    for arguments, readable in ((("--code", CODE), False), (("--open",), True)):
        record = tmp_path / f"record {arguments[0]}"
        with contextlib.ExitStack() as stack:
            server = far
            if readable:  # so that it would be noticed if the record were empty
                server = stack.enter_context(
                    Server(tmp_path / "open", "--host", FAR, "--open", wrapper=hosts.at(hosts.far))
                )
            stack.enter_context(third_machine_listening(hosts, record))
            assert send(hosts, server, source, *arguments).status == 0
        heard = record.read_bytes()
        assert len(heard) > source.stat().st_size
        for secret in (source.name.encode(), b"unmistakable text", b"offer", b"hello"):
            assert (secret in heard) == readable
        assert not any(part in heard for part in (CODE.encode(), CODE.replace("-", "").encode()))
    for guess in ((), ("--open",), ("--code", "KQ7M-2XFD-9WPB")):
        assert send(hosts, far, source, *guess, host=hosts.between).status == 1
    far.wait_for_output(r"10\.77\.2\.1:\d+: turned away: no pairing code\n")
    far.wait_for_output(r"10\.77\.2\.1:\d+: turned away: wrong pairing code\n")


def test_a_cable_pulled_out_in_the_middle_of_a_file_and_put_back(
    hosts: Hosts, far: Server, inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "large.bin", 64 * MIB)
    assert hosts.shape("tbf", "rate", "200mbit", "burst", "256kb", "latency", "50ms")
    with far.client(source, "--host", FAR, "--code", CODE, wrapper=hosts.at(hosts.near)) as client:
        wait_for(lambda: partial_size(inbox) > 8 * MIB, what="the file is under way")
        hosts.set_cable("down")
        try:
            wait_for(at_rest(inbox), what="nothing arrives any more")
            assert client.running()
        finally:
            hosts.set_cable("up")
        result = client.wait()
    assert result.status == 0, result
    assert sha256(inbox / source.name) == sha256(source)


class at_rest:  # noqa: N801  (reads as a condition)
    """Tells whether a folder's partial files have not grown for a second."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._size = -1
        self._since = 0.0

    def __call__(self) -> bool:
        """Look, and compare."""
        size, now = partial_size(self._folder), time.monotonic()
        if size != self._size:
            self._size, self._since = size, now
        return now - self._since > 1


def test_a_machine_that_is_gone_is_told(hosts: Hosts, tmp_path: Path) -> None:
    source = make_file(tmp_path / "small.bin", 100)
    arguments = ("client.py", "file", "--host", "10.77.2.99", "--code", CODE, str(source))
    with Process(*arguments, wrapper=hosts.at(hosts.near)) as client:
        result = client.wait()
    assert result.status == 1
    assert "no server at 10.77.2.99:50007" in result.stderr


def test_a_bad_line(hosts: Hosts, far: Server, inbox: Path, tmp_path: Path) -> None:
    if not hosts.shape("netem", "loss", "2%", "delay", "20ms", "5ms", "corrupt", "0.5%"):
        pytest.skip("the kernel has no netem")
    source = make_file(tmp_path / "over a bad line.bin", 4 * MIB)
    try:
        result = send(hosts, far, source, "--code", CODE)
    finally:
        hosts.shape("pfifo")
    assert result.status == 0, result
    assert sha256(inbox / source.name) == sha256(source)
