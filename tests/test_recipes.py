"""The README's recipes for files and services, run as they stand there; see recipes.py."""

from __future__ import annotations

import configparser
import contextlib
import gzip
import os
import tarfile
from pathlib import Path

import pytest

import common
import server
from recipes import Workplace, network, read_block, workplace
from support import make_file, sha256, wait_for

__all__ = ["network", "workplace"]


# --- files ------------------------------------------------------------------------------------


def test_a_folder_goes_as_one_archive(workplace: Workplace) -> None:
    photos = workplace.folder / "photos"
    (photos / "summer").mkdir(parents=True)
    sources = [make_file(photos / "a.jpg", 300_000), make_file(photos / "summer" / "b c.jpg", 7)]
    with workplace.run("exec python3 server.py file") as server:
        server.wait_for("Receiving into")
        with workplace.recipe("files-tar") as client:
            assert client.wait().status == 0, client.text()
    with tarfile.open(workplace.folder / "received" / "photos.tar") as archive:
        for source in sources:
            member = archive.extractfile(str(source.relative_to(workplace.folder)))
            assert member is not None
            assert member.read() == source.read_bytes()


def test_the_files_that_find_finds_are_sent(workplace: Workplace) -> None:
    photos = workplace.folder / "photos"
    (photos / "summer").mkdir(parents=True)
    names = ["a.jpg", "with 'quotes' and spaces.jpg", "-dash.jpg", "two\nlines.jpg", "grün.jpg"]
    for name in names:
        make_file(photos / "summer" / name, 1000)
    make_file(photos / "no photo.txt", 1000)
    old = make_file(photos / "old.jpg", 1000)
    os.utime(old, (0, 0))
    with workplace.run("exec python3 server.py file") as server:
        server.wait_for("Receiving into")
        with workplace.recipe("files-find") as client:
            assert client.wait().status == 0, client.text()
    received = workplace.folder / "received"
    assert sorted(path.name for path in received.iterdir()) == sorted(names)
    for name in names:
        assert sha256(received / name) == sha256(photos / "summer" / name)


def test_each_saved_file_is_handed_on(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "sent"
    folder.mkdir()
    names = ["a.txt", "with  'quotes' and spaces ", "x, SHA-256 00, saved as a.txt", "-v"]
    names += ["two\nlines", "two\\nlines", "\\0101", "an escape \x1b[31m", "grün\u2028\n"]
    for number, name in enumerate(names):
        make_file(folder / name, 1000 + number)
    last = make_file(tmp_path / "last", 1)
    with workplace.recipe("files-hand-on") as server:
        server.wait_for("Receiving into")
        with workplace.run(
            'python3 client.py file "$SENT"/* "$SENT" "$LAST"', SENT=str(folder), LAST=str(last)
        ) as client:
            assert client.wait().status == 0, client.text()
        done = workplace.folder / "done" / "received"
        wait_for(lambda: is_complete(done / "last.gz"), "the last file is handed on")
    for name in names:
        for handed_on in (done / f"{name}.gz", done / "sent" / f"{name}.gz"):
            assert gzip.decompress(handed_on.read_bytes()) == (folder / name).read_bytes()


def is_complete(archive: Path) -> bool:
    """Tell whether a gzip file is all there."""
    with contextlib.suppress(EOFError, OSError):
        return bool(gzip.decompress(archive.read_bytes()))
    return False


# --- services ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["socket-pair.service", "socket-pair-sound.service"])
def test_the_services_commands_are_understood(unit: str) -> None:
    parser = configparser.ConfigParser(delimiters="=", interpolation=None)
    parser.read_string(read_block(f"unit: {unit}", "ini"))
    python, script, *arguments = parser["Service"]["ExecStart"].split()
    assert (python, script) == ("/usr/bin/python3", "/opt/socket-pair/server.py")
    assert server.parse_arguments(arguments).mode == ("audio" if "sound" in unit else "file")
    assert str(common.EXIT_TERMINATED) in parser["Service"]["SuccessExitStatus"].split()
