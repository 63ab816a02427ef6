"""Two machines and a third one between them: network namespaces, as root on Linux.

    near 10.77.1.2 ----- 10.77.1.1 between 10.77.2.1 ----- 10.77.2.2 far

``near`` has the client and ``far`` the server. All they say to each other goes through
``between``, which hears all of it and does not know the code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import wave
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import (
    MIB,
    ROOT,
    Process,
    Program,
    Result,
    Server,
    make_file,
    partial_size,
    sha256,
    wait_for,
)

FAR = "10.77.2.2"
NEXT = "10.77.1.1"  # of the machine between, in the client's network
CODE = "KQ7M-2XFD-9WPA"
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
        macs = (mac_address(self.near), mac_address(self.far))
        arguments = ["to-near", macs[0], "to-far", macs[1]]
        self.set_forwarding(False)
        try:
            with Program([*self.at(self.between), sys.executable, BAD_LINE, *arguments]) as line:
                line.wait_for("connected")
                yield
                assert line.running(), line.text()
                assert {"lost", "damaged"} <= set(line.lines)
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
    with Program(command) as listening:
        listening.wait_for("listening")
        yield


def test_the_command_that_the_server_prints_works_on_the_other_machine(
    hosts: Hosts, inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "report.bin", 3 * MIB)
    with Server(inbox, "--host", "0.0.0.0", wrapper=hosts.at(hosts.far)) as server:
        command = server.wait_for_output(r"\n    python3 (client\.py .*)\n")[1].split()
        assert command[command.index("--host") + 1] == FAR
        code = server.wait_for_output(r"Pairing code: (\S+)\n")[1]
        assert code not in command  # where ps would show it
        typed = {"SOCKET_PAIR_CODE": code}
        with Process(*command, source, wrapper=hosts.at(hosts.near), env=typed) as client:
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
        for secret in (source.name.encode(), b"unmistakable text", b"offer", b'"file"'):
            assert (secret in heard) == readable
        assert not any(part in heard for part in (CODE.encode(), CODE.replace("-", "").encode()))
    for guess in ((), ("--open",), ("--code", "KQ7M-2XFD-9WPB")):
        assert send(hosts, far, source, *guess, host=hosts.between).status == 1
    far.wait_for_output(r"10\.77\.2\.1:\d+: was asked for the pairing code\n")
    far.wait_for_output(r"10\.77\.2\.1:\d+: turned away: wrong pairing code\n")


def test_a_cable_pulled_out_in_the_middle_of_a_file_and_put_back(
    hosts: Hosts, far: Server, inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "large.bin", 64 * MIB)
    hosts.limit_rate("200mbit")
    with far.client(source, "--host", FAR, "--code", CODE, wrapper=hosts.at(hosts.near)) as client:
        wait_for(lambda: partial_size(inbox) > 8 * MIB, what="the file is under way")
        hosts.set_cable("down")
        try:
            wait_for(at_rest(lambda: partial_size(inbox)), what="nothing arrives any more")
            assert client.running()
        finally:
            hosts.set_cable("up")
        result = client.wait()
    assert result.status == 0, result
    assert sha256(inbox / source.name) == sha256(source)


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


def test_a_machine_that_is_gone_is_told(hosts: Hosts, tmp_path: Path) -> None:
    source = make_file(tmp_path / "small.bin", 100)
    arguments = ("client.py", "file", "--host", "10.77.2.99", "--code", CODE, str(source))
    with Process(*arguments, wrapper=hosts.at(hosts.near)) as client:
        result = client.wait()
    assert result.status == 1
    assert "no way to 10.77.2.99:50007 (no route to host)" in result.stderr


def test_a_file_arrives_whole_over_a_line_that_loses_and_damages_packets(
    hosts: Hosts, far: Server, inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "over a bad line.bin", 4 * MIB)
    with hosts.bad_line():
        result = send(hosts, far, source, "--code", CODE)
    assert result.status == 0, result
    assert sha256(inbox / source.name) == sha256(source)


# --- finding each other ---------------------------------------------------------------------


def find(hosts: Hosts, *arguments: str | Path, answers: bytes, host: str) -> Result:
    """Look for servers on `host`; return how it went."""
    with Process(
        "client.py", "--find", *arguments, stdin=answers, wrapper=hosts.at(host)
    ) as client:
        return client.wait()


def find_until_listed(hosts: Hosts, listed: str, *arguments: str | Path, host: str) -> str:
    """Look again until a line begins with `listed`; return its number there."""

    def look() -> re.Match[str] | None:
        result = find(hosts, *arguments, answers=b"", host=host)
        assert result.status == 1, result
        return re.search(rf"^ +(\d+)  {listed}", result.stdout, re.MULTILINE)

    found = wait_for(look, what=f"{listed} is listed")
    assert found is not None
    return found[1]


def find_until_sent(hosts: Hosts, *arguments: str, answers: bytes, host: str) -> Result:
    """Look again, where the servers' answers were late, until all went well; return how."""

    def look() -> Result | None:
        result = find(hosts, *arguments, answers=answers, host=host)
        assert result.status == 0 or "no server" in result.stderr, result
        return None if result.status else result

    found = wait_for(look, what="a server is found")
    assert found is not None
    return found


def test_a_server_is_found_and_picked_by_its_number(
    hosts: Hosts, inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "report.bin", 3 * MIB)
    record = tmp_path / "record"
    machine = re.escape(socket.gethostname()[:30])
    with (
        third_machine_listening(hosts, record),
        Server(
            inbox, "--host", "0.0.0.0", "--code", CODE, wrapper=hosts.at(hosts.between)
        ) as server,
    ):
        # Of the server's two addresses, each client is shown the one on its own network.
        for host, address in ((hosts.near, "10.77.1.1"), (hosts.far, "10.77.2.1")):
            listed = rf"file   {re.escape(address)}:{server.port} +pairing code +{machine}\n"
            number = find_until_listed(hosts, listed, host=host)
        answers = f"7\nx\n\n{number}\n{source}\n".encode()
        result = find_until_sent(hosts, "--code", CODE, answers=answers, host=hosts.near)
        assert result.stdout.count("Type a number from 1 to 1, or only Enter") == 4
        assert result.stdout.count("Looking for servers") == 2  # an empty answer looks again
        assert sha256(inbox / source.name) == sha256(source)
    heard = record.read_bytes()
    assert b"_socket-pair" in heard
    assert b"mode=file" in heard
    assert not any(part in heard for part in (CODE.encode(), CODE.replace("-", "").encode()))
    result = find(hosts, answers=b"1\n", host=hosts.near)
    assert result.status == 1
    assert "no server announces itself here" in result.stderr


def test_find_shows_only_what_was_asked_for(hosts: Hosts, inbox: Path, song: Path) -> None:
    quiet = ("--host", "10.77.1.1", "--open", "--no-announce")
    with (
        Server(inbox, *quiet, wrapper=hosts.at(hosts.between)),
        Process(
            *("server.py", "audio", "--host", "10.77.1.1", "--port", "0", "--open"),
            *("--input", str(song)),
            wrapper=hosts.at(hosts.between),
        ) as singer,
    ):
        port = singer.wait_for_output(r"Broadcasting .*:(\d+) - Ctrl\+C to stop\n")[1]
        listed = rf"audio  10\.77\.1\.1:{port} +needs --open +\S+\n"
        number = find_until_listed(hosts, listed, host=hosts.near)
        assert number == "1"  # the server of files keeps quiet
        result = find(hosts, "file", answers=b"1\n", host=hosts.near)
        assert result.status == 1
        assert "no server in file mode announces itself" in result.stderr
        heard = song.with_name("heard.wav")
        arguments = ("--open", "--output", str(heard), "--seconds", "1")
        find_until_sent(hosts, *arguments, answers=b"1\n", host=hosts.near)
        assert frames_in(heard) == SONG_RATE
        # Its network ends at its own cable: the other one hears nothing of it.
        assert find(hosts, answers=b"1\n", host=hosts.far).status == 1


ANNOUNCE_GHOSTS = """
import select, socket, struct, sys
def pack(*parts): return b"".join(bytes([len(part)]) + part for part in parts) + bytes(1)
service = b"_socket-pair", b"_tcp", b"local"
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
    sock.bind(("", 5353))
    number = 0
    while True:
        number += 1
        name = pack(b"ghost %d" % (number % 3000), *service)
        answer = pack(*service) + struct.pack("!HHIH", 12, 1, 120, len(name)) + name
        sock.sendto(struct.pack("!6H", 0, 0x8400, 0, 1, 0, 0) + answer, ("224.0.0.251", 5353))
        select.select([], [], [], 0.0005)
"""


def test_names_that_nobody_answers_for_hide_no_server(hosts: Hosts, inbox: Path) -> None:
    command = [*hosts.at(hosts.between), sys.executable, "-c", ANNOUNCE_GHOSTS, NEXT]
    with (
        Server(inbox, "--host", NEXT, "--open", wrapper=hosts.at(hosts.between)) as server,
        Program(command),
    ):
        listed = rf"file   10\.77\.1\.1:{server.port} +needs --open "
        assert find_until_listed(hosts, listed, host=hosts.near) == "1"


# --- sound ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a song in stereo. The two samples of a frame are its number, from 1: 0 is silence."""
    path = tmp_path_factory.mktemp("song") / "song.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, SONG_RATE, 0, "NONE", ""))
        file.writeframes(array("I", range(1, SONG_FRAMES + 1)).tobytes())
    return path


@contextlib.contextmanager
def singing(hosts: Hosts, song: Path, *arguments: str) -> Iterator[tuple[Process, str]]:
    """Play the song over and over on the far machine; give the server and its port."""
    command = ("server.py", "audio", "--host", FAR, "--port", "0", "--input", str(song))
    with Process(*command, *arguments, wrapper=hosts.at(hosts.far)) as server:
        port = server.wait_for_output(r"Broadcasting .*:(\d+) - Ctrl\+C to stop\n")[1]
        yield server, port
        server.signal(signal.SIGINT)
        result = server.wait()
        assert result.status == 130, result
        assert "Traceback" not in result.stderr, result


def listener(hosts: Hosts, port: str, heard: Path, *arguments: str, host: str = "") -> Process:
    """Start to record on the near machine, or on `host`."""
    command = ("client.py", "audio", "--host", FAR, "--port", port, "--output", str(heard))
    return Process(*command, *arguments, wrapper=hosts.at(host or hosts.near))


def frames_in(heard: Path) -> int:
    """Return how many frames a recording has so far."""
    size = heard.stat().st_size if heard.exists() else 0
    return max(0, size - WAV_HEADER_BYTES) // FRAME_BYTES


def find_silence(heard: Path) -> list[range]:
    """Return where a recording is silent; fail where the song is not at its place in it."""
    with wave.open(str(heard)) as file:
        assert (file.getframerate(), file.getnchannels()) == (SONG_RATE, 2)
        numbers = array("I", file.readframes(file.getnframes()))
    silence: list[range] = []
    for place, number in enumerate(numbers):
        if number:
            assert number == (numbers[0] - 1 + place) % SONG_FRAMES + 1, place
        elif silence and silence[-1].stop == place:
            silence[-1] = range(silence[-1].start, place + 1)
        else:
            silence.append(range(place, place + 1))
    return silence


@pytest.mark.parametrize("lost", [False, True], ids=["for a second", "until it is lost"])
def test_a_cable_pulled_out_in_the_middle_of_a_song_and_put_back(
    hosts: Hosts, song: Path, tmp_path: Path, lost: bool
) -> None:
    heard = tmp_path / "heard.wav"
    with (
        singing(hosts, song, "--code", CODE) as (server, port),
        listener(hosts, port, heard, "--code", CODE) as client,
    ):
        wait_for(lambda: frames_in(heard) > SONG_RATE, what="the song is heard")
        before = frames_in(heard)
        hosts.set_cable("down")
        try:
            wait_for(at_rest(lambda: frames_in(heard)), what="nothing is heard any more")
            if lost:
                client.wait_for_output("looking for it")
                server.wait_for_output(r"10\.77\.1\.2:\d+: left \(took nothing for 5 s\)\n")
        finally:
            hosts.set_cable("up")
        silent = frames_in(heard)
        wait_for(lambda: frames_in(heard) > silent, what="the song goes on")
        again = frames_in(heard)
        wait_for(lambda: frames_in(heard) > again + 3 * SONG_RATE, what="and on")
        client.signal(signal.SIGINT)
        result = client.wait()
    assert result.status == 0, result
    assert "Traceback" not in result.stderr
    # A line for each loss; none where the connection lived, as after a second it mostly does.
    assert len(result.error_lines) == result.stdout.count("Listening to ") - 1, result
    assert all("looking for it until Ctrl+C" in line for line in result.error_lines), result
    assert len(result.error_lines) == 1 or not lost

    silence = find_silence(heard)
    assert silence
    assert silence[0].start >= before
    assert silence[-1].stop < frames_in(heard) - SONG_RATE
    missed = sum(map(len, silence))
    assert missed > (4 if lost else 0.25) * SONG_RATE
    assert f"missed {missed * 1000 / SONG_RATE:.0f} ms" in result.stdout


def test_a_third_machine_without_the_code_hears_nothing(
    hosts: Hosts, song: Path, tmp_path: Path
) -> None:
    for arguments, audible in ((("--code", CODE), False), (("--open",), True)):
        record, heard = tmp_path / f"record {arguments[0]}", tmp_path / f"heard {arguments[0]}.wav"
        with singing(hosts, song, *arguments) as (server, port):
            with (
                third_machine_listening(hosts, record),
                listener(hosts, port, heard, *arguments, "--seconds", "1") as client,
            ):
                result = client.wait()
                assert result.status == 0, result
            if not audible:
                for guess in ((), ("--open",), ("--code", "KQ7M-2XFD-9WPB")):
                    stolen = tmp_path / "stolen.wav"
                    with listener(hosts, port, stolen, *guess, host=hosts.between) as thief:
                        result = thief.wait()
                    assert result.status == 1, result
                    assert not frames_in(stolen)
                server.wait_for_output(r"10\.77\.2\.1:\d+: was asked for the pairing code\n")
                server.wait_for_output(r"10\.77\.2\.1:\d+: turned away: wrong pairing code\n")
        assert frames_in(heard) == SONG_RATE
        samples, wire = heard.read_bytes()[WAV_HEADER_BYTES:], record.read_bytes()
        assert len(wire) > len(samples)
        parts = [samples[at : at + 8 * FRAME_BYTES] for at in range(0, len(samples), 6000)]
        found = sum(part in wire for part in parts)
        # In the open, a part can be cut in two by the end of a packet.
        assert found >= len(parts) / 2 if audible else not found
