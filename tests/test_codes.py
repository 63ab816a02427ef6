"""A pairing code, however it is typed, lets in who has it, and is left nowhere."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import re
import ssl
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from unittest.mock import Mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

import common
import server
from common import NotPaired, Pairing, ProtocolError, normalize_code
from pairing import CODE, OTHER_CODE, pair_contexts, shake_hands_in_memory


def test_new_codes_have_forty_bits_and_nothing_that_looks_alike() -> None:
    codes = {server.make_code() for _ in range(1000)}
    assert len(codes) == 1000
    for code in codes:
        assert re.fullmatch(r"[A-HJ-NP-Z2-9]{4}-[A-HJ-NP-Z2-9]{4}", code)
        normalize_code(code)
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


@pytest.mark.parametrize("typed", ["", "KQ7M-2XF", "- - - - - - - - -", "a b c d e f g"])
def test_what_counts_of_a_code_has_eight_characters(typed: str) -> None:
    with pytest.raises(ArgumentTypeError, match="at least 8"):
        normalize_code(typed)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("aaaaaaaa", "repeats itself"),
        ("0000-0000-0000", "repeats itself"),
        ("ababababab", "repeats itself"),
        ("abcdefgh", "sequence"),
        ("9876-5432", "sequence"),
        ("qwertyuiop", "sequence"),
        ("1q2w3e4r", "sequence"),
        ("CHOOSE-ONE-OF-YOUR-OWN", "placeholder"),
        ("YOUR-CODE", "placeholder"),
        ("PAIRING-CODE", "placeholder"),
        ("your_code_here", "placeholder"),
        ("<your-own-code>", "placeholder"),
        ("change-me", "placeholder"),
        ("passw0rd", "placeholder"),
        ("password123", "placeholder"),
        ("socketpair", "placeholder"),
        ("elephant", "one word"),
        ("butterfly", "one word"),
        ("\N{LATIN CAPITAL LETTER U WITH DIAERESIS}bermorgen", "one word"),
    ],
)
def test_a_code_that_is_guessed_first_is_refused_with_the_reason(code: str, reason: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"soon guessed: .*{reason}"):
        normalize_code(code)


@pytest.mark.parametrize(
    "code", ["KQ7M-2XFD", "KQ7M-2XFD-9WPA", "correct horse", "xkqvbtrw", "elephant7", "83920174"]
)
def test_a_code_that_is_not_is_taken(code: str) -> None:
    normalize_code(code)


@given(st.text(max_size=80))
def test_any_text_is_a_code_or_refused(text: str) -> None:
    with contextlib.suppress(ArgumentTypeError):
        assert len(normalize_code(text)) >= common.CODE_LENGTH


def test_the_same_code_lets_both_sides_in_and_another_does_not() -> None:
    shake_hands_in_memory(*pair_contexts(CODE, CODE))
    with pytest.raises(NotPaired) as caught:
        shake_hands_in_memory(*pair_contexts(CODE, OTHER_CODE))
    assert caught.value.wrong_code


def test_the_same_code_makes_another_certificate_for_each_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    make = common.make_certificate

    def spy(seed: bytes) -> bytes:
        made.append(make(seed))
        return made[-1]

    monkeypatch.setattr(common, "make_certificate", spy)
    for _ in range(3):
        pair_contexts(CODE, CODE)
    assert len(made) == 6
    assert len(set(made)) == 3


@pytest.mark.parametrize("share", [b"", b"B" + bytes(32), b"A" + bytes(32), b"B" + b"\xff" * 32])
def test_what_is_no_share_is_a_protocol_error(share: bytes) -> None:
    with pytest.raises(ProtocolError, match="bad share"):
        Pairing(CODE, server_side=False).finish(share)


def test_a_share_sent_back_is_a_protocol_error() -> None:
    pairing = Pairing(CODE, server_side=False)
    with pytest.raises(ProtocolError, match="bad share"):
        pairing.finish(b"B" + pairing.share[1:])


def test_the_certificate_is_what_the_library_makes() -> None:
    for seed in (bytes(32), hashlib.sha256(b"another").digest()):
        key = Ed25519PrivateKey.from_private_bytes(seed)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Socket Pair")])
        built = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(datetime.datetime(1970, 1, 1))
            .not_valid_after(datetime.datetime(9999, 12, 31))
            .sign(key, None)
        )
        assert common.make_certificate(seed) == built.public_bytes(Encoding.DER)


def test_an_older_library_makes_the_same_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    old = Mock(spec=["public_bytes"], public_bytes=key.public_bytes)
    assert common.raw_bytes(old) == key.public_bytes_raw()


@pytest.mark.parametrize("has_memory_files", [True, False])
def test_no_key_stays_on_the_disk(
    has_memory_files: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not has_memory_files:
        monkeypatch.setattr(sys, "platform", "darwin")
    modes = []
    load = ssl.SSLContext.load_cert_chain

    def spy(context: ssl.SSLContext, path: str) -> None:
        modes.append(Path(path).parent.stat().st_mode)
        assert len(list(tmp_path.iterdir())) == (0 if path.startswith("/proc/") else 1)
        load(context, path)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    near, far = (common.make_tls_context(bytes(32), server_side=side) for side in (False, True))
    shake_hands_in_memory(near, far)
    assert len(modes) == 2
    assert all(mode & 0o077 == 0 for mode in modes) or has_memory_files
    assert list(tmp_path.iterdir()) == []
