"""Text for people is harmless to print, and short."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import common
from common import escape


@given(st.text(st.characters()) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl"])))
def test_escaped_text_holds_nothing_that_moves_a_cursor(text: str) -> None:
    shown = escape(text)
    assert shown.isprintable()
    shown.encode("utf-8")  # no half surrogate either


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=400))
def test_escaping_leaves_ordinary_text_as_it_is(text: str) -> None:
    assert escape(text) == text


def test_escaped_text_has_a_limit() -> None:
    assert len(escape("x" * 10_000)) == 500
    assert len(escape("\x1b" * 10_000)) <= 500 * len(r"\U0010ffff")


def test_control_codes_are_spelled_out() -> None:
    assert escape("a\x1b[2J\nb\u202e\udc80") == r"a\x1b[2J\nb\u202e\udc80"


@given(st.integers(0, 10**18))
def test_numbers_of_bytes_are_short(count: int) -> None:
    assert len(common.format_bytes(count)) <= len("1000000.0 TB")


@pytest.mark.parametrize(
    ("count", "seconds", "tells"),
    [(10, 0.5, False), (10, 1.0, True), (2**20, 0.5, True), (2**20, 0.001, False)],
)
def test_a_few_bytes_and_a_moment_tell_no_speed(count: int, seconds: float, tells: bool) -> None:
    assert common.tells_speed(count, seconds) == tells
