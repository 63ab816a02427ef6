"""Servers are found by the other machines of their network, and only there; see hosts.py."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

from hosts import NEXT, SONG_RATE, Hosts, frames_in, hosts, song, third_machine_listening
from pairing import CODE
from support import MIB, Process, Program, Result, Server, make_file, sha256, wait_for

__all__ = ["hosts", "song"]

FIND_LIMIT_S = 180.0  # each look takes seconds


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

    found = wait_for(look, f"{listed} is listed", FIND_LIMIT_S)
    assert found is not None
    return found[1]


def find_until_sent(hosts: Hosts, *arguments: str, answers: bytes, host: str) -> Result:
    """Look again, where the servers' answers were late, until all went well; return how."""

    def look() -> Result | None:
        result = find(hosts, *arguments, answers=answers, host=host)
        assert result.status == 0 or "no server" in result.stderr, result
        return None if result.status else result

    found = wait_for(look, "a server is found", FIND_LIMIT_S)
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
        assert result.stdout.count("Type 1, or only Enter") == 4
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

        def hears_all() -> bool:
            heard.unlink(missing_ok=True)
            result = find_until_sent(hosts, *arguments, answers=b"1\n", host=hosts.near)
            last = result.stdout.splitlines()[-1]
            return "missed" not in last and " of " not in last

        wait_for(hears_all, "a machine that does not stand still meanwhile", FIND_LIMIT_S)
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
