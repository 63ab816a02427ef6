"""Files between two machines, past a third one that does not know the code; see hosts.py."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hosts import FAR, Hosts, at_rest, far, hosts, third_machine_listening
from pairing import CODE
from support import MIB, Process, Result, Server, make_file, partial_size, sha256, wait_for

__all__ = ["far", "hosts"]


def send(hosts: Hosts, server: Server, path: Path, *arguments: str, host: str = "") -> Result:
    """Send a file to the far machine, from the near one or from `host`; return how it went."""
    with server.client(
        path, "--host", FAR, *arguments, wrapper=hosts.at(host or hosts.near)
    ) as client:
        return client.wait()


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


def test_a_machine_that_is_gone_is_told(hosts: Hosts, tmp_path: Path) -> None:
    source = make_file(tmp_path / "small.bin", 100)
    arguments = ("client.py", "file", "--host", "10.77.2.99", "--code", CODE, str(source))
    with Process(*arguments, wrapper=hosts.at(hosts.near)) as client:
        result = client.wait()
    assert result.status == 1
    assert "no answer from 10.77.2.99:50007 (no route to host)" in result.stderr


def test_a_file_arrives_whole_over_a_line_that_loses_and_damages_packets(
    hosts: Hosts, far: Server, inbox: Path, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "over a bad line.bin", 4 * MIB)
    with hosts.bad_line():
        result = send(hosts, far, source, "--code", CODE)
    assert result.status == 0, result
    assert sha256(inbox / source.name) == sha256(source)
