"""A pairing code, however it is typed, makes the same key on both sides, and leaves it nowhere."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import common
import server
from common import NotPaired, make_tls_context, normalize_code
from pairing import CODE, OTHER_CODE

CERTIFICATE_SHA256 = "b3370082128140fa8a75b4cbc5cbe5d5b9b724d3f95cf1f2e2704a6864e67daa"


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
