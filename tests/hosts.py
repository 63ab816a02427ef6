"""Two machines and a third one between them: network namespaces, as root on Linux.

    near 10.77.1.2 ----- 10.77.1.1 between 10.77.2.1 ----- 10.77.2.2 far

``near`` has the client and ``far`` the server. All they say to each other goes through
``between``, which hears all of it and does not know the code. Import the fixtures to have them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import wave
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pairing import CODE
from support import ROOT, Program, Server

FAR = "10.77.2.2"
NEXT = "10.77.1.1"  # of the machine between, in the client's network
BAD_LINE = str(ROOT / "tests" / "bad_line.py")
SONG_RATE = 48_000
SONG_FRAMES = 120 * SONG_RATE
WAV_HEADER_BYTES = 44
FRAME_BYTES = 4  # stereo

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

    def limit_rate(self, rate: str) -> None:
        """Give the way to the server a rate, as tc writes it."""
        command = ["tc", "qdisc", "replace", "dev", "to-far", "root", "tbf", "rate", rate]
        command += ["burst", "256kb", "latency", "50ms"]
        subprocess.run([*self.at(self.between), *command], check=True, timeout=60)

    def set_forwarding(self, on: bool) -> None:
        """Have the machine between pass on packets, or not."""
        command = f"echo {int(on)} > /proc/sys/net/ipv4/ip_forward"
        subprocess.run([*self.at(self.between), "sh", "-c", command], check=True, timeout=60)

    @contextlib.contextmanager
    def bad_line(self) -> Iterator[None]:
        """Have packets lost, late, out of order and damaged; fail where it did no harm."""
        with self.line("bad") as line:
            yield
            assert {"lost", "damaged"} <= set(line.lines)

    @contextlib.contextmanager
    def line(self, kind: str) -> Iterator[Program]:
        """Have one of bad_line.py's lines between the machines."""
        macs = (mac_address(self.near), mac_address(self.far))
        arguments = [kind, "to-near", macs[0], "to-far", macs[1]]
        self.set_forwarding(False)
        try:
            with Program([*self.at(self.between), sys.executable, BAD_LINE, *arguments]) as line:
                line.wait_for("connected")
                yield line
                assert line.running(), line.text()
        finally:
            self.set_forwarding(True)


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
        # So that what passes between is complete packets, as it would be on a real cable.
        subprocess.run(
            [*hosts.at(host), sys.executable, BAD_LINE, "--no-offload", "cable"],
            check=True,
            timeout=60,
        )
    hosts.set_forwarding(True)
    return hosts


def mac_address(host: str) -> str:
    """Return the address of a machine's cable on that cable."""
    shown = subprocess.run(
        ["ip", "-n", host, "-json", "link", "show", "cable"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return str(json.loads(shown.stdout)[0]["address"])


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


@contextlib.contextmanager
def third_machine_listening(hosts: Hosts, record: Path) -> Iterator[None]:
    """Record every packet that goes through the machine between."""
    command = [*hosts.at(hosts.between), sys.executable, "-c", LISTEN_IN, str(record)]
    with Program(command) as listening:
        listening.wait_for("listening")
        yield


class at_rest:  # noqa: N801  (reads as a condition)
    """Tells whether something has not grown for a second."""

    def __init__(self, measure: Callable[[], int]) -> None:
        self._measure = measure
        self._size = -1
        self._since = 0.0

    def __call__(self) -> bool:
        """Look, and compare."""
        size, now = self._measure(), time.monotonic()
        if size != self._size:
            self._size, self._since = size, now
        return now - self._since > 1


# --- a song ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a song in stereo. The two samples of a frame are its number, from 1: 0 is silence."""
    path = tmp_path_factory.mktemp("song") / "song.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, SONG_RATE, 0, "NONE", ""))
        file.writeframes(array("I", range(1, SONG_FRAMES + 1)).tobytes())
    return path


def frames_in(heard: Path) -> int:
    """Return how many frames a recording has so far."""
    size = heard.stat().st_size if heard.exists() else 0
    return max(0, size - WAV_HEADER_BYTES) // FRAME_BYTES
