"""Who may connect, as users of both scripts see it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import server
from pairing import CODE, CONTENT, NAME, OTHER_CODE
from processes import CTRL_C
from support import HOST, Process, Server, free_port, visible

NOT_INSTALLED = "raise ImportError('not installed')"


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
    assert result.error_lines == [
        f"127.0.0.1:{paired.port} has another pairing code: check it there"
    ]
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
    paired.wait_for_output(r"127\.0\.0\.1:\d+: was asked for the pairing code\n")


def test_a_code_is_told_to_be_unwanted_where_the_server_is_open(
    server: Server, source: Path
) -> None:
    result = server.send(source, "--code", CODE)
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith(f"127.0.0.1:{server.port} says that it has no pairing code")
    server.wait_for_output(r"turned away: this server has no pairing code\n")
    assert server.send(source).status == 0


def test_asking_for_the_code_is_no_incident(paired: Server, source: Path) -> None:
    assert paired.send(source).status == 1
    paired.wait_for_output("was asked for the pairing code")
    assert "pairing code" in paired.stdout()
    assert paired.stderr() == ""


def test_on_a_terminal_the_client_asks_for_the_code(paired: Server, source: Path) -> None:
    with paired.client(source, terminal=True) as client:
        client.expect("Pairing code: ")
        client.type("short\n")
        client.expect("a pairing code has at least 8 letters and digits")
        client.expect("Pairing code: ")
        client.type("kq7m 2xfd 9wpb\n")
        client.expect("has another pairing code: check it there\r\nPairing code: ")
        client.type("kq7m 2xfd 9wpa\n")
        client.expect(f"Saved as {NAME}")
        assert client.wait().status == 0


def test_ctrl_c_where_the_code_is_asked_for_promises_nothing(paired: Server, source: Path) -> None:
    with paired.client(source, terminal=True) as client:
        client.expect("Pairing code: ")
        client.type(CTRL_C)
        result = client.wait()
    assert result.status == 130
    assert result.stdout.endswith(("Pairing code: \r\n", "Pairing code: ^C\r\n"))


@pytest.mark.parametrize("script", ["server.py", "client.py"])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--code", "KQ7M-2XF"), "at least 8 letters and digits"),
        (("--code", "CHOOSE-ONE-OF-YOUR-OWN"), "soon guessed: it is a placeholder"),
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
@pytest.mark.parametrize("package", ["cryptography", "spake2"])
def test_without_a_package_there_is_one_line(
    script: str, package: str, paired: Server, tmp_path: Path, source: Path
) -> None:
    (tmp_path / f"{package}.py").write_text(NOT_INSTALLED)
    arguments = ["file", "--code", CODE, "--port"]
    if script == "client.py":
        arguments += [str(paired.port), str(source)]
    else:
        arguments += [str(free_port())]
    with Process(script, *arguments, env={"PYTHONPATH": str(tmp_path)}) as process:
        result = process.wait()
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith("pairing codes need the packages spake2 and cryptography (")
    assert line.endswith("pip install spake2 cryptography")


def test_a_code_is_not_asked_for_without_what_it_needs(
    paired: Server, tmp_path: Path, source: Path
) -> None:
    (tmp_path / "spake2.py").write_text(NOT_INSTALLED)
    env = {"PYTHONPATH": str(tmp_path)}
    with paired.client(source, terminal=True, env=env) as client:
        result = client.wait()
    assert result.status == 1
    assert "pairing codes need the packages" in result.stdout
    assert "Pairing code: " not in result.stdout


def test_without_a_code_the_packages_are_not_loaded(
    tmp_path: Path, inbox: Path, source: Path
) -> None:
    for package in ("cryptography", "spake2"):
        (tmp_path / f"{package}.py").write_text(NOT_INSTALLED)
    env = {"PYTHONPATH": str(tmp_path)}
    with Server(inbox, env=env) as running:
        assert running.send(source, env=env).status == 0


def test_beyond_this_machine_the_server_makes_a_code_and_says_what_to_type(
    inbox: Path, source: Path
) -> None:
    with Server(inbox, "--host", "0.0.0.0") as running:
        shown = running.wait_for_output(
            r"Pairing code: (\S+)\nOn the other machine:\n    python3 (client\.py file .*)\n"
        )
        command = shown[2].replace(server.THIS_MACHINE, HOST).split()
        assert "--code" not in command
        assert shown[1] not in shown[2]  # where ps and the shell's history would show it
        assert command[command.index("--port") + 1] == str(running.port)
        assert command[command.index("--host") + 1] != "0.0.0.0"
        with Process(*command, "--code", shown[1], source) as typed:
            assert typed.wait().status == 0
        assert (inbox / NAME).read_bytes() == CONTENT


def test_a_quiet_server_still_says_its_new_code(inbox: Path) -> None:
    port = str(free_port())
    arguments = ("file", "-q", "--host", "0.0.0.0", "--port", port, "--folder", str(inbox))
    with Process("server.py", *arguments) as quiet:
        quiet.wait_for_output(r"^Pairing code: \S+\nOn the other machine:\n    python3 client\.py ")


def test_a_known_code_is_not_shown_and_left_to_the_prompt(inbox: Path) -> None:
    with Server(inbox, "--host", "0.0.0.0", "--code", CODE) as running:
        shown = running.wait_for_output(r"On the other machine:\n    (.*)\n")
        assert "--code" not in shown[1]
        assert CODE not in running.stdout() + running.stderr()


def test_open_says_what_it_means_and_the_client_has_to_say_it_too(
    inbox: Path, source: Path
) -> None:
    with Server(inbox, "--host", "0.0.0.0", "--open") as running:
        shown = running.wait_for_output(r"    python3 client\.py file --host (\S+) .*--open\n")
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
    assert visible(inbox) == [NAME]


def test_all_addresses_of_ipv6_are_those_of_ipv4_as_well(inbox: Path, source: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with Server(inbox, "--host", "::", "--code", CODE) as running:
        for address in ("127.0.0.1", "::1"):
            assert running.send(source, "--host", address, "--code", CODE).status == 0
