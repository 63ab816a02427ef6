"""Names: each is one that the receiving system can hold, and leads nowhere else."""

from __future__ import annotations

import itertools
import os
import tempfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import PARTIAL_SUFFIX
from server import (
    SHORT_NAME_BYTES,
    USUAL_RULES,
    Folders,
    NameRules,
    Refused,
    Store,
    partial_stem,
    split_path,
)

POSIX = NameRules(is_windows=False, is_unicode=False)
WINDOWS = NameRules(is_windows=True, is_unicode=True)
SHORT = NameRules(max_length=SHORT_NAME_BYTES, is_windows=False, is_unicode=False)
ALL_RULES = [POSIX, WINDOWS, SHORT]

# What path rules have been broken with, and the surrogates that stand for bytes of no UTF-8.
NASTY = st.sampled_from(
    ["", ".", "..", "...", "~", "C:", "C:\\", "\\\\host", "\0", "CON", "nul.txt", "a:b", " ", "-rf"]
)
SURROGATES = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
PARTS = NASTY | st.text(max_size=10) | st.text(st.characters(categories=["L"]) | SURROGATES)
PATHS = (
    st.text()
    | st.lists(PARTS, max_size=6).map("/".join)
    | st.lists(PARTS, max_size=6).map("\\".join)
    | st.text(st.sampled_from("./\\aC:"), max_size=12)
)
LONG_NAMES = st.builds(
    lambda text, times, suffix: (text * times)[:250] + suffix,
    st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=5),
    st.integers(1, 60),
    st.sampled_from(["", ".txt", ".tar.gz", ".e" * 20]),
)


def is_name(text: str) -> bool:
    """Tell whether `text` may be offered as a name."""
    try:
        return split_path(text) == [text]
    except Refused:
        return False


@given(PATHS)
@settings(max_examples=400)
@example("/etc/passwd")
@example("/passwd")
@example("../outside")
@example("a/../../outside")
@example("a//b")
@example("a/")
@example("/")
@example("//host/share")
@example("..\\outside")
@example("x" * 256)
@example("x" * 100_000)
@example("/".join("x" * 9_000))
@example("\udc80")
@example("\ud800")
def test_every_path_is_refused_or_ends_inside_the_folder(path: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        outer = os.path.realpath(place)
        root = os.path.join(outer, "root")
        os.mkdir(root)
        try:
            parts = split_path(path)
            folder = Folders(Store(root)).make("/".join(parts[:-1]), 0o777)
            target = os.path.join(folder.path, USUAL_RULES.fit(parts[-1]))
            with open(target, "xb"):
                pass
        except (Refused, OSError):
            pass
        else:
            assert os.path.realpath(target).startswith(root + os.sep)
            below = os.path.relpath(target, root).split(os.sep)
            assert below == [USUAL_RULES.fit(part) for part in parts]
        assert os.listdir(outer) == ["root"]


@pytest.mark.parametrize(
    "path", ["", "/", ".", "..", "a/..", "../a", "a/./b", "a//b", "/x", "a\0b"]
)
def test_paths_that_no_system_may_take_are_refused(path: str) -> None:
    with pytest.raises(Refused):
        split_path(path)


def test_paths_deeper_than_what_removes_them_again_can_go_are_refused() -> None:
    with pytest.raises(Refused, match="too deep"):
        split_path("/".join("x" * 502))


@pytest.mark.parametrize("path", ["x" * 5000, "/".join("x" * 2500), "é" * 2100])
def test_paths_longer_than_any_system_takes_are_refused(path: str) -> None:
    with pytest.raises(Refused, match="too long"):
        split_path(path)


def test_names_of_partial_files_are_refused() -> None:
    with pytest.raises(Refused, match="unfinished"):
        split_path(f".x.0{PARTIAL_SUFFIX}")


@pytest.mark.parametrize(
    "path", ["a", "...", "a b", "-rf", "~", "$HOME", "a/b/c.d", "é" * 127, "x" * 255, "*", "'\""]
)
def test_ordinary_and_odd_names_are_kept_as_they_are(path: str) -> None:
    assert [POSIX.fit(part) for part in split_path(path)] == path.split("/")


# --- the nearest name -----------------------------------------------------------------------


@pytest.mark.parametrize("rules", ALL_RULES)
@given(st.text(min_size=1) | NASTY | LONG_NAMES)
@settings(max_examples=300)
@example("x" * 4000)
@example("." + "x" * 300)
@example("\ud800")
@example(f"{'x' * 239}{PARTIAL_SUFFIX}{'y' * 50}")  # of which that would be left
@example(f"{'x' * 254} {'y' * 50}")  # on Windows what would be left ends in a space
@example(f"{'x' * 142}.{'y' * 250}")
@example("con")
@example("CON.tar.gz")
@example(" ")
def test_each_name_becomes_one_that_can_be(rules: NameRules, name: str) -> None:
    if not is_name(name):
        return
    fitted = rules.fit(name)
    assert is_name(fitted)
    assert rules.fit(fitted) == fitted, "and stays what it is"
    assert rules.length(fitted) <= rules.max_length
    os.fsencode(fitted)
    if rules.is_windows:
        assert not set(fitted) & set('<>:"/\\|?*')
        assert fitted[-1] not in " ."
        assert all(char >= " " for char in fitted)
        stem = fitted.partition(".")[0].rstrip().upper()
        assert stem not in ("CON", "PRN", "AUX", "NUL", "COM1", "COM9", "LPT1", "LPT9")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("Meeting 10:30.txt", "Meeting 10_30.txt"),
        ("C:\\x", "C__x"),
        ("ta\tb?", "ta_b_"),
        ("tail.", "tail_"),
        ("tail ", "tail_"),
        ("aux", "aux_"),
        ("COM1.log", "COM1_.log"),
        ("NUL .txt", "NUL_.txt"),
        ("conout$.txt", "conout$_.txt"),
        ("lpt\u00b3.txt", "lpt\u00b3_.txt"),
        ("\udcff", "_"),
        ("漢" * 86 + ".txt", "漢" * 86 + ".txt"),
        ("漢" * 300 + ".txt", "漢" * 251 + ".txt"),
        ("\U0001f600" * 200, "\U0001f600" * 127),
    ],
)
def test_windows_gets_the_nearest_name_that_it_can_hold(name: str, nearest: str) -> None:
    assert WINDOWS.fit(name) == nearest


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("漢" * 86 + ".txt", "漢" * 83 + ".txt"),
        ("x" * 256, "x" * 255),
        ("x" * 300 + ".tar.gz", "x" * 252 + ".gz"),
        ("a\ud800b", "a_b"),
        ("a\udcffb", "a\udcffb"),
        ("a:b", "a:b"),
    ],
)
def test_other_systems_get_the_nearest_name_that_they_can_hold(name: str, nearest: str) -> None:
    assert POSIX.fit(name) == nearest


@pytest.mark.parametrize("rules", ALL_RULES)
@given(LONG_NAMES.filter(is_name))
@settings(max_examples=200)
@example("x" * 255)
@example("é" * 127)
@example("." + "x" * 254)
@example("x." + "y" * 253)
@example(".bashrc")
@example("archive.tar.gz")
def test_numbered_names_begin_with_the_name_and_fit(rules: NameRules, name: str) -> None:
    name = rules.fit(name)
    names = list(itertools.islice(rules.numbered(name), 12))
    assert names[0] == (0, name)
    assert len({each for _, each in names}) == len(names)
    for number, found in names[1:]:
        assert rules.fit(found) == found
        assert f" ({number})" in found
    assert next(rules.numbered(name, 7)) == names[7]


def test_numbered_names_put_the_number_before_the_extension() -> None:
    assert [name for _, name in itertools.islice(POSIX.numbered("report.v2.pdf"), 3)] == [
        "report.v2.pdf",
        "report.v2 (1).pdf",
        "report.v2 (2).pdf",
    ]


@given(LONG_NAMES.filter(is_name))
@settings(max_examples=200)
@example("x" * 255)
@example("é" * 127)
@example("a:b")
@example("\udcff")
@example("\ud800")
@example("\x80" * 41 + ".txt")
def test_every_file_system_takes_the_names_of_partial_files(name: str) -> None:
    hidden = f"{partial_stem(name)}.{'0' * 40}{PARTIAL_SUFFIX}"
    for rules in ALL_RULES:
        assert rules.fit(hidden) == hidden


def test_partial_files_of_one_name_are_not_those_of_another() -> None:
    names = ["a", "a.b", "a.b.c", "a:b", "a_b", "A", "x" * 200, "x" * 201, "é", "e\u0301"]
    assert len({partial_stem(name) for name in names}) == len(names)
