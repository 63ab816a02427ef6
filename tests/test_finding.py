"""What is made of announcements on the network, whoever made them; also test_hosts_finding.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from ipaddress import ip_interface
from typing import NoReturn

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zeroconf import EventLoopBlocked, ServiceInfo

import client
import common
import server
from client import FoundServer
from common import Announced
from support import HOST, FakeServer, Server, as_root, free_port, run_script

posix = pytest.mark.skipif(os.name != "posix", reason="has no such shell")


# This machine is in a network, and has a virtual one as many machines do.
OWN = [
    ip_interface(address)
    for address in ("192.168.1.7/24", "172.17.0.1/16", "fd00::7/64", "fe80::7/64")
]


@pytest.mark.parametrize(
    ("addresses", "best"),
    [
        (["10.0.0.5", "192.168.1.5"], "192.168.1.5"),
        (["172.17.0.1", "10.0.0.5"], "172.17.0.1"),
        (["8.8.8.8", "10.0.0.5", "2001:db8::1"], None),  # on no network of this machine
        (["172.17.0.1", "192.168.1.7"], "172.17.0.1"),  # it is this very machine
        (["fd00::5", "192.168.1.5"], "192.168.1.5"),
        (["10.0.0.5", "fd00::5"], "fd00::5"),
        (["fe80::5%eth0", "fe80::5"], "fe80::5%eth0"),
        (["0.0.0.0", "127.0.0.1", "255.255.255.255", "224.0.0.251"], None),
        (["::", "::1", "::ffff:127.0.0.1", "ff02::fb", "fe80::5"], None),
        ([], None),
    ],
)
def test_the_address_that_leads_to_a_server(addresses: Sequence[str], best: str | None) -> None:
    assert client.nearest(addresses, OWN) == best


def test_of_three_thousand_false_servers_the_honest_one_comes_first(
    paired: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ASK_S", 60.0)  # the false ones refuse at once
    false = [
        service(f"a false one {number}", f"127.1.{number // 250}.{number % 250}", 9)
        for number in range(3000)
    ]
    services = [*false[:1500], service("zebra", HOST, paired.port), *false[1500:]]
    monkeypatch.setattr(client, "browse", lambda: services)
    monkeypatch.setattr(client, "nearest", lambda addresses, own: next(iter(addresses)))
    found = client.find_servers("file")
    assert len(found) == 3001
    assert found[0].describe() == f"file   {HOST}:{paired.port:<11}  pairing code     zebra"
    assert "does not answer" in found[1].describe()
    assert paired.stderr() == ""  # to be asked is no incident


def test_the_many_servers_of_one_host_do_not_hide_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = [service(f"a false one {port}", "127.1.1.1", port) for port in range(1, 100)]
    services.append(service("zebra", HOST, 9))
    monkeypatch.setattr(client, "browse", lambda: services)
    monkeypatch.setattr(client, "nearest", lambda addresses, own: next(iter(addresses)))
    monkeypatch.setattr(client, "ask_servers", lambda asked: dict.fromkeys(asked, "no code"))
    found = client.find_servers("file")
    assert [each.announced.name for each in found[:3]] == [
        "a false one 1",
        "zebra",
        "a false one 10",
    ]


def test_servers_of_one_name_are_all_shown_by_what_they_answer(
    server: Server, paired: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = [service("same", HOST, each.port) for each in (paired, server)]
    monkeypatch.setattr(client, "ASK_S", 60.0)
    monkeypatch.setattr(client, "browse", lambda: services)
    monkeypatch.setattr(client, "nearest", lambda addresses, own: next(iter(addresses)))
    found = client.find_servers(None)
    assert {each.port: each.answer for each in found} == {
        paired.port: common.CODE_WANTED,
        server.port: common.NO_CODE,
    }


@as_root
def test_a_machine_without_any_network_is_told_so() -> None:
    result = run_script("client.py", "--find", wrapper=("unshare", "--net"))
    assert result.status == 1
    (line,) = result.error_lines
    assert line.startswith("cannot ask the local network: ")


@pytest.mark.parametrize("error", [EventLoopBlocked(), TimeoutError()])
def test_what_has_no_words_is_told_by_its_kind(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what zeroconf raises on a machine that is too busy for it."""

    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(common, "open_network", fail)
    with pytest.raises(common.SocketPairError) as told:
        client.browse()
    reason = str(told.value).removeprefix("cannot ask the local network: ")
    assert reason.lower() == type(error).__name__.lower()


@pytest.mark.parametrize("answer", [b"", b"\xff" * 100, b"\0\0\0\2{}", b"SSH-2.0-OpenSSH\r\n"])
def test_what_is_no_server_does_not_count_as_an_answer(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ASK_S", 1.0)
    with FakeServer(answer) as fake:
        assert client.ask_servers([(HOST, fake.port), (HOST, free_port())]) == {}


def service(name: str, host: str, port: int) -> ServiceInfo:
    """Return what a server announces, or somebody in its name."""
    return ServiceInfo(
        common.SERVICE_TYPE,
        f"{name} {port}.{common.SERVICE_TYPE}",
        parsed_addresses=[host],
        port=port,
        properties=Announced(name, "file", False).to_txt(),
    )


def test_what_is_announced_comes_back() -> None:
    for announced in (Announced("grün", "file", True), Announced("", "audio", False)):
        txt = {key.encode(): value.encode() for key, value in announced.to_txt().items()}
        assert Announced.from_txt(txt) == announced


@given(st.dictionaries(st.binary(max_size=9), st.none() | st.binary(max_size=300), max_size=5))
def test_any_announcement_is_shown_in_one_harmless_line(txt: dict[bytes, bytes | None]) -> None:
    name = next(iter(txt.values()), None)
    announced = Announced.from_txt({**txt, b"name": name})
    assert announced.has_code  # nothing less is believed of somebody who does not say so
    line = FoundServer(announced._replace(mode="file"), "fe80::1%\x1b[2J", 1).describe()
    assert line.isprintable()
    assert len(line) < 120


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)


@posix
@settings(max_examples=50)
@given(st.lists(NAMES, max_size=20))
@example(["two\nlines", "two\\nlines", "\\0101", "\x1b[31m", " ", "-n", "\u00fc\u2028", "\udcff"])
def test_the_shell_brings_back_every_path_in_the_log(names: list[str]) -> None:
    paths = [f"./{name}" for name in names]
    lines = [server.spell_path(path) for path in paths]
    assert all(map(str.isprintable, lines))
    heard = subprocess.run(
        ["sh", "-c", 'while IFS= read -r path; do printf "%b\\0" "$path"; done'],
        input="".join(f"{line}\n" for line in lines).encode(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    assert heard.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == paths
