"""What is made of announcements on the local network, whoever made them; see also test_hosts.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from ipaddress import ip_interface

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import client
import server
from client import FoundServer
from common import Announced

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
        (["172.17.0.1", "10.0.0.5"], "10.0.0.5"),
        (["172.17.0.1", "192.168.1.7"], "172.17.0.1"),  # it is this very machine
        (["fd00::5", "192.168.1.5"], "192.168.1.5"),
        (["fd00::5", "10.0.0.5"], "fd00::5"),
        (["fe80::5%eth0", "fe80::5"], "fe80::5%eth0"),
        (["0.0.0.0", "127.0.0.1", "255.255.255.255", "224.0.0.251"], None),
        (["::", "::1", "::ffff:127.0.0.1", "ff02::fb", "fe80::5"], None),
        ([], None),
    ],
)
def test_the_address_that_leads_to_a_server(addresses: Sequence[str], best: str | None) -> None:
    assert client.nearest(addresses, OWN) == best


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
