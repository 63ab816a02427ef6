"""Names and places: nothing that a client says leads out of the folder."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import server
from common import Entry
from server import (
    Folders,
    PartialFile,
    Refused,
    check_name,
    numbered_names,
    partial_stem,
    safe_parts,
)

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


def fits(name: str) -> bool:
    """Tell whether a file can have this name."""
    try:
        return safe_parts(name) == [name]
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
            entry = Entry(path)
            check_name(server.name_of(entry))
            target = os.path.join(
                Folders(root).locate(server.folder_of(entry)).path, server.name_of(entry)
            )
            with open(target, "xb"):
                pass
        except (Refused, OSError):
            pass
        else:
            assert os.path.realpath(target).startswith(root + os.sep)
            assert os.path.relpath(target, root).split(os.sep) == path.split("/")
        assert os.listdir(outer) == ["root"]


@given(PATHS)
@settings(max_examples=400)
@example("C:/Windows/x")
@example("C:x")
@example("\\\\host\\share")
@example("a/CON")
@example("a/con.tar.gz")
@example("NUL .txt")
@example("file.txt:stream")
@example("dot./x")
@example("space /x")
@example("a?b")
def test_windows_gets_no_path_that_it_reads_in_another_way(path: str) -> None:
    try:
        parts = safe_parts(path, windows=True)
    except Refused:
        return
    assert "/".join(parts) == path
    for part in parts:
        assert part not in ("", ".", "..")
        assert not set(part) & set('<>:"/\\|?*\0')
        assert part[-1] not in " ."
        assert all(char >= " " for char in part)
        stem = part.partition(".")[0].rstrip().upper()
        assert stem not in ("CON", "PRN", "AUX", "NUL", "COM1", "COM9", "LPT1", "LPT9")


@pytest.mark.parametrize(
    "path",
    [
        "C:/x",
        "a/COM1.log",
        "aux",
        "x:y",
        "tail.",
        "tail ",
        "a\\b",
        "ta\tb",
        "CONIN$",
        "conout$.txt",
        "COM\u00b9",
        "lpt\u00b3.txt",
    ],
)
def test_names_that_only_windows_cannot_hold_are_refused_there_alone(path: str) -> None:
    assert safe_parts(path, windows=False)
    with pytest.raises(Refused):
        safe_parts(path, windows=True)


@pytest.mark.parametrize(
    "path",
    ["", "/", ".", "..", "a/..", "../a", "a/./b", "a//b", "/etc/x", "a\0b", "x" * 256, "é" * 128],
)
def test_paths_that_no_system_may_take_are_refused(path: str) -> None:
    for windows in (False, True):
        with pytest.raises(Refused):
            safe_parts(path, windows=windows)


@pytest.mark.parametrize(
    "path", ["a", "...", "a b", "-rf", "~", "$HOME", "a/b/c.d", "é" * 127, "x" * 255, "*", "'\""]
)
def test_ordinary_and_odd_names_are_taken(path: str) -> None:
    assert safe_parts(path, windows=False) == path.split("/")


def test_names_of_partial_files_are_refused() -> None:
    with pytest.raises(Refused, match="unfinished"):
        safe_parts(f".x.0{server.PARTIAL_SUFFIX}")


@given(LONG_NAMES.filter(fits))
@settings(max_examples=200)
@example("x" * 255)
@example("é" * 127)
@example("." + "x" * 254)
@example("x." + "y" * 253)
@example(".bashrc")
@example("archive.tar.gz")
def test_numbered_names_begin_with_the_name_and_fit(name: str) -> None:
    names = list(itertools.islice(numbered_names(name), 12))
    assert names[0] == name
    assert len(set(names)) == len(names)
    for found in names:
        assert fits(found), found
    for number, found in enumerate(names[1:], 1):
        assert f" ({number})" in found


def test_numbered_names_put_the_number_before_the_extension() -> None:
    assert list(itertools.islice(numbered_names("report.v2.pdf"), 3)) == [
        "report.v2.pdf",
        "report.v2 (1).pdf",
        "report.v2 (2).pdf",
    ]


@given(LONG_NAMES.filter(fits))
@settings(max_examples=100)
@example("x" * 255)
@example("é" * 127)
def test_every_name_has_room_for_its_partial_file(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        partial = PartialFile.create(Folders(folder).locate(None), name)
        try:
            (found,) = os.listdir(folder)
            assert found.startswith(".")
            assert found.endswith(server.PARTIAL_SUFFIX)
            assert list(server.find_leftovers(folder)) == [partial_stem(name)]
            leftovers = Folders(folder).locate(None).leftovers
            assert leftovers == {partial_stem(name): [partial.path]}
        finally:
            partial.discard()
        assert os.listdir(folder) == []


def test_partial_files_of_one_name_are_not_those_of_another(tmp_path: Path) -> None:
    for name in ("a", "a.b", "a.b.c"):
        PartialFile.create(Folders(str(tmp_path)).locate(None), name).close()
    leftovers = Folders(str(tmp_path)).locate(None).leftovers
    found = [leftovers[partial_stem(name)] for name in ("a", "a.b", "a.b.c")]
    assert [len(paths) for paths in found] == [1, 1, 1]
    assert len(set(itertools.chain(*found))) == 3


# --- symbolic links -----------------------------------------------------------------------------

posix = pytest.mark.skipif(sys.platform == "win32", reason="links need a right on Windows")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder that has another beside it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@posix
@pytest.mark.parametrize("target", ["../outside", "/", "/tmp", "..", "../outside/new", "/proc/1"])
def test_a_link_that_leads_out_is_refused(root: Path, target: str) -> None:
    (root / "link").symlink_to(target)
    for path in ("link", "link/deeper"):
        with pytest.raises(Refused, match="leads out"):
            Folders(str(root)).locate(path)
    assert os.listdir(root.parent / "outside") == []


@posix
def test_a_link_to_a_link_that_leads_out_is_refused(root: Path) -> None:
    (root / "second").symlink_to("../outside")
    (root / "first").symlink_to("second")
    with pytest.raises(Refused, match="leads out"):
        Folders(str(root)).locate("first")


@posix
def test_a_folder_beside_whose_name_begins_alike_is_outside(root: Path) -> None:
    (root.parent / "root2").mkdir()
    (root / "link").symlink_to("../root2")
    with pytest.raises(Refused, match="leads out"):
        Folders(str(root)).locate("link")


@posix
def test_a_link_inside_the_folder_is_followed(root: Path) -> None:
    (root / "real").mkdir()
    (root / "link").symlink_to("real")
    found = Folders(str(root)).locate("link/new")
    assert found.path == str(root / "real" / "new") + os.sep
    assert found.shown == "real/new/"
    assert (root / "real" / "new").is_dir()


@posix
def test_a_dangling_link_inside_the_folder_gets_its_folder(root: Path) -> None:
    (root / "link").symlink_to("missing")
    assert Folders(str(root)).locate("link").path == str(root / "missing") + os.sep


@posix
def test_a_link_to_itself_is_an_error_and_not_a_hang(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises((Refused, OSError)):
        Folders(str(root)).locate("loop/x")


@posix
def test_the_folder_itself_may_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to("root")
    assert Folders(str(link)).locate("a/b").path == str(root / "a" / "b") + os.sep


def test_a_file_where_a_folder_should_go_is_refused(root: Path) -> None:
    (root / "taken").write_bytes(b"mine")
    for path in ("taken", "taken/x"):
        with pytest.raises((Refused, OSError)):
            Folders(str(root)).locate(path)
    assert (root / "taken").read_bytes() == b"mine"


@posix
def test_a_partial_file_that_is_a_link_is_never_written_through(root: Path) -> None:
    outside = root.parent / "outside" / "precious"
    outside.write_bytes(b"precious")
    link = root / f".x.0{server.PARTIAL_SUFFIX}"
    link.symlink_to(outside)
    assert PartialFile.claim(str(link)) is None
    assert outside.read_bytes() == b"precious"


@posix
def test_a_partial_file_with_a_second_name_is_never_written(root: Path) -> None:
    """A server killed between its two steps of moving a file leaves both names."""
    complete = root / "complete"
    complete.write_bytes(b"complete")
    partial = root / f".complete.0{server.PARTIAL_SUFFIX}"
    os.link(complete, partial)
    assert PartialFile.claim(str(partial)) is None
    assert complete.read_bytes() == b"complete"
    assert not partial.exists()


@posix
def test_a_partial_file_that_is_a_pipe_is_not_waited_for(root: Path) -> None:
    pipe = root / f".x.0{server.PARTIAL_SUFFIX}"
    os.mkfifo(pipe)
    assert PartialFile.claim(str(pipe)) is None


def test_a_partial_file_in_use_is_not_claimed_again(root: Path) -> None:
    partial = PartialFile.create(Folders(str(root)).locate(None), "x")
    try:
        with pytest.raises(BlockingIOError):
            PartialFile.claim(partial.path)
    finally:
        partial.close()
    claimed = PartialFile.claim(partial.path)
    assert claimed is not None
    claimed.discard()
    assert os.listdir(root) == []


@posix
def test_a_folder_that_a_link_takes_the_place_of_is_not_followed_out(root: Path) -> None:
    outside = root.parent / "elsewhere"
    outside.mkdir()
    folders = Folders(str(root))
    folder = folders.locate("sub")
    (root / "sub").rename(root / "sub.old")
    (root / "sub").symlink_to(outside)
    with pytest.raises(Refused):
        server.Incoming(0, Entry("sub/x"), folder).open()
    folders.forget_moved()
    with pytest.raises(Refused):
        folders.locate("sub")
    assert os.listdir(outside) == []


def test_a_folder_that_is_removed_meanwhile_is_made_again(root: Path) -> None:
    folders = Folders(str(root))
    folders.locate("sub")
    (root / "sub").rmdir()
    folders.forget_moved()
    assert os.path.isdir(folders.locate("sub").path)
