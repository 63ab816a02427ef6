"""Places: nothing that a client says leads out of the folder, nor into another's file."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
import threading
import time
import types
import weakref
from pathlib import Path

import pytest

import server
from common import PARTIAL_SUFFIX
from server import (
    KEPT_BYTES,
    RELEASE_TIMEOUT_S,
    UNFINISHED_MODE,
    Folder,
    Folders,
    PartialFile,
    Place,
    Reception,
    Refused,
    Store,
)
from support import as_root, linux, posix


class Client(Reception):
    """Whoever uses a partial file; `silent` for so long."""

    tag = "01234567"

    def __init__(self, silent: float = 0.0) -> None:
        self.silent = silent
        self.has_ended = False

    def silent_s(self) -> float:
        """Do as a reception does."""
        return self.silent

    def end(self) -> None:
        """Do as a reception does."""
        self.has_ended = True

    def released_turn(self) -> contextlib.AbstractContextManager[None]:
        """Do as a reception does."""
        return contextlib.nullcontext()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder that has another beside it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def folders_in(root: Path) -> Folders:
    return Folders(Store(str(root)))


def open_root(root: Path) -> Folder:
    return Folder.open(str(root))


def place_of(root: Path, name: str, client: Client | None = None) -> Place:
    return Place(name, client or Client(), Store(str(root)))


# --- symbolic links -------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("target", ["../outside", "..", "/proc/1", "real", "missing", "link"])
def test_a_link_is_no_folder_wherever_it_leads(root: Path, target: str) -> None:
    (root / "real").mkdir()
    (root / "link").symlink_to(target)
    for path in ("link", "link/deeper"):
        with pytest.raises(Refused, match="symbolic link"):
            folders_in(root).find(path)
        with pytest.raises(Refused, match="symbolic link"):
            folders_in(root).make(path, 0o777)
    assert os.listdir(root.parent / "outside") == os.listdir(root / "real") == []


@posix
def test_the_folder_itself_may_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to("root")
    assert folders_in(link).make("a/b", 0o777).path == str(root / "a" / "b") + os.sep


def test_a_file_where_a_folder_should_go_is_refused(root: Path) -> None:
    (root / "taken").write_bytes(b"mine")
    for path in ("taken", "taken/x"):
        with pytest.raises(Refused, match="a file or"):
            folders_in(root).make(path, 0o777)
    assert (root / "taken").read_bytes() == b"mine"


# --- folders that change meanwhile ----------------------------------------------------------


def test_looking_a_folder_up_makes_none(root: Path) -> None:
    folders = folders_in(root)
    assert folders.find("a/b/c") is None
    assert os.listdir(root) == []
    assert folders.make("a/b/c", 0o777).path == str(root / "a" / "b" / "c") + os.sep
    assert folders.find("a/b/c") is not None


def test_one_batch_makes_a_bounded_number_of_folders(root: Path) -> None:
    folders = folders_in(root)
    with pytest.raises(Refused, match="too many new folders"):
        for number in range(20):
            folders.make(f"{number}/" + "/".join("d" * 400), 0o700)


@posix
def test_a_folder_is_made_where_modes_cannot_be_set(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's disk on macOS."""

    def refuse(*_: object, **_options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "chmod", refuse)
    folders_in(root).make("new", UNFINISHED_MODE)
    assert (root / "new").is_dir()


@posix
def test_what_takes_a_folders_place_gets_nothing(root: Path) -> None:
    outside = root.parent / "outside"
    folder = folders_in(root).make("sub", 0o777)
    (root / "sub").rename(root / "sub.old")
    (root / "sub").symlink_to(outside)
    place = place_of(root, "x")
    partial = PartialFile.create(folder, place)
    partial.write(memoryview(b"content"))
    partial.set_metadata(10**18, 0o644)
    assert partial.move_to("x")
    assert os.listdir(outside) == []
    assert (root / "sub.old" / "x").read_bytes() == b"content"
    with pytest.raises(Refused, match="symbolic link"):
        folders_in(root).find("sub")


@posix
def test_what_takes_a_partial_files_place_stays_untouched(root: Path) -> None:
    precious = root.parent / "outside" / "precious"
    precious.write_bytes(b"precious")
    before = precious.stat()
    partial = PartialFile.create(open_root(root), place_of(root, "x"))
    partial.write(memoryview(b"content"))
    (root / partial.name).unlink()
    (root / partial.name).symlink_to(precious)
    partial.set_metadata(10**18, 0o777)
    with pytest.raises(FileNotFoundError):
        partial.move_to("x")
    assert precious.read_bytes() == b"precious"
    assert precious.stat().st_mtime_ns == before.st_mtime_ns
    assert precious.stat().st_mode == before.st_mode
    assert not (root / "x").exists()


# --- partial files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "x" * 255, "é" * 127, "a:b"])
def test_a_partial_file_is_hidden_and_found_again(root: Path, name: str) -> None:
    place = place_of(root, name)
    folder = open_root(root)
    partial = PartialFile.create(folder, place)
    partial.write(memoryview(b"content"))
    assert partial.keep() == 7
    (found,) = os.listdir(root)
    assert found.startswith(".")
    assert found.endswith(PARTIAL_SUFFIX)
    assert place.store.find_leftovers(folder, place, 0.0) == [found]
    assert (root / found).stat().st_mode & 0o077 == 0, "nobody else may read it"
    reopened = PartialFile.reopen(folder, found, place, 0.0)
    assert reopened is not None
    assert reopened.size == 7
    reopened.discard()
    assert os.listdir(root) == []


def reopen(root: Path, name: str) -> PartialFile | None:
    return PartialFile.reopen(open_root(root), name, place_of(root, "x"), 0.0)


@posix
def test_a_partial_file_that_is_a_link_is_never_written_through(root: Path) -> None:
    outside = root.parent / "outside" / "precious"
    outside.write_bytes(b"precious")
    link = root / f".x.0{PARTIAL_SUFFIX}"
    link.symlink_to(outside)
    assert reopen(root, link.name) is None
    assert outside.read_bytes() == b"precious"


@posix
def test_a_partial_file_with_a_second_name_is_never_written(root: Path) -> None:
    """A server killed between its two steps of moving a file leaves both names."""
    complete = root / "complete"
    complete.write_bytes(b"complete")
    partial = root / f".complete.0{PARTIAL_SUFFIX}"
    os.link(complete, partial)
    assert reopen(root, partial.name) is None
    assert complete.read_bytes() == b"complete"
    assert not partial.exists()


@posix
def test_a_partial_file_that_is_a_pipe_is_not_waited_for(root: Path) -> None:
    pipe = root / f".x.0{PARTIAL_SUFFIX}"
    os.mkfifo(pipe)
    assert reopen(root, pipe.name) is None


@as_root
def test_a_partial_file_of_another_user_is_not_continued(root: Path) -> None:
    planted = root / f".x.0{PARTIAL_SUFFIX}"
    planted.write_bytes(b"planted")
    os.chown(planted, 1, 1)
    assert reopen(root, planted.name) is None
    assert planted.read_bytes() == b"planted"


def test_a_partial_file_in_use_is_not_opened_again(root: Path) -> None:
    place = place_of(root, "x")
    folder = open_root(root)
    partial = PartialFile.create(folder, place)
    again = Place(place.name, Client(), place.store)
    assert PartialFile.reopen(folder, partial.name, again, 0.0) is None
    elsewhere = place_of(root, "x")  # another server
    assert PartialFile.reopen(folder, partial.name, elsewhere, 0.0) is None
    partial.write(memoryview(b"x"))
    partial.keep()
    reopened = PartialFile.reopen(folder, partial.name, again, 0.0)
    assert reopened is not None
    reopened.discard()
    assert os.listdir(root) == []


def test_a_silent_client_is_ended_for_the_next_one(root: Path) -> None:
    place = place_of(root, "x", Client(silent=10.0))
    partial = PartialFile.create(open_root(root), place)
    again = Place(place.name, Client(), place.store)
    assert PartialFile.reopen(open_root(root), partial.name, again, 0.0) is None
    assert isinstance(place.holder, Client)
    assert place.holder.has_ended
    partial.close()


@linux
def test_a_file_on_a_disk_without_locks_is_written_from_its_beginning_also_on_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where what is locked is a byte that no file has."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(sys, "platform", "win32")
    locks = types.SimpleNamespace(LK_NBLCK=2, locking=refuse)
    monkeypatch.setattr(server, "msvcrt", locks, raising=False)
    descriptor = os.memfd_create("file")
    assert server.lock_file(descriptor)
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
    os.close(descriptor)


def test_what_came_within_the_tick_of_a_coarse_clock_is_found(root: Path) -> None:
    """As of FAT, on which a folder keeps its time for up to two seconds, whatever comes into it."""
    place, ago_ns = place_of(root, "x"), time.time_ns() - 10**9
    os.utime(root, ns=(ago_ns, ago_ns))
    assert place.store.find_leftovers(open_root(root), place, time.monotonic()) == []
    partial = PartialFile.create(open_root(root), place)
    partial.close()
    os.utime(root, ns=(ago_ns, ago_ns))
    found = place.store.find_leftovers(open_root(root), place, time.monotonic())
    assert found == [partial.name]


@posix
def test_an_old_partial_file_is_in_use_while_it_is_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that continued it just then would lose all that comes."""
    place = place_of(root, "x")
    old = PartialFile.create(open_root(root), place)
    old.close()
    os.utime(root / old.name, (0, 0))
    found, unlink = [], os.unlink

    def remove(name: str, dir_fd: int) -> None:
        found.append(PartialFile.reopen(open_root(root), old.name, place, 0.0))
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", remove)
    server.remove_old_leftovers(str(root))
    assert found == [None]
    assert os.listdir(root) == []


def test_a_client_that_is_ended_has_time_to_release_what_it_holds(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is the last that it hears, and what has come is written before it releases it."""
    monkeypatch.setattr(server, "TAKEOVER_TIMEOUT_S", 60.0)

    class Ending(Client):
        def end(self) -> None:
            self.silent = 0.0
            threading.Timer(0.1, partial.keep).start()

    place = place_of(root, "x", Ending(silent=10.0))
    partial = PartialFile.create(open_root(root), place)
    partial.write(memoryview(b"what has come"))
    again = Place(place.name, Client(), place.store)
    since = time.monotonic() - RELEASE_TIMEOUT_S
    reopened = PartialFile.reopen(open_root(root), partial.name, again, since)
    assert reopened is not None
    reopened.discard()


@linux
def test_what_is_about_to_replace_a_file_is_in_use(root: Path) -> None:
    """A small file gets a hidden name just before, which another connection can find."""
    (root / "x").write_bytes(b"old")
    place = place_of(root, "x")
    folder = open_root(root)
    small = PartialFile.create_nameless(folder, place, 0o644)
    small.write(memoryview(b"new"))
    found = []

    class Watched(Folder):
        def replace(self, name: str, target: str) -> None:
            again = Place(place.name, Client(), place.store)
            found.append(PartialFile.reopen(folder, name, again, 0.0))
            super().replace(name, target)

    small.folder = Watched.open(str(root))
    assert small.replace("x")
    assert found == [None]
    assert os.listdir(root) == ["x"]
    assert (root / "x").read_bytes() == b"new"
    assert (root / "x").stat().st_mode & 0o777 == 0o644 & ~place.store.umask


@linux
def test_what_could_not_get_a_hidden_name_is_in_use_no_more(root: Path) -> None:
    """Nor is the client remembered that it was for."""
    client = Client()
    place, unused = place_of(root, "x", client), weakref.ref(client)
    (root / "sub").mkdir()
    small = PartialFile.create_nameless(Folders(place.store).make("sub", 0o777), place, 0o644)
    small.write(memoryview(bytes(KEPT_BYTES)))
    (root / "sub").rmdir()
    with pytest.raises(FileNotFoundError):
        small.replace("x")
    assert small.keep() == 0
    store = place.store
    del client, place, small
    gc.collect()
    assert unused() is None, store.leases


def test_what_a_deep_folder_is_in_is_opened_once_for_all_that_is_in_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a batch's entries may be in another folder of it, and is looked up three times."""
    deep = "/".join("abcdefghij")
    for number in range(40):
        (root / deep / str(number)).mkdir(parents=True)
    entered, enter = [], Folder.enter

    def note_and_enter(folder: Folder, name: str) -> Folder:
        entered.append(name)
        return enter(folder, name)

    monkeypatch.setattr(Folder, "enter", note_and_enter)
    folders = folders_in(root)
    for number in range(40):
        assert folders.find(f"{deep}/{number}")
    assert len(entered) == 10 + 40


@linux
def test_a_copy_for_which_there_is_no_memory_is_not_left_behind(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it stay open, and in use, while the server runs."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def fail(*_: object) -> None:
        raise MemoryError

    place = place_of(root, "x")
    small = PartialFile.create_nameless(open_root(root), place, 0o644)
    small.write(memoryview(bytes(KEPT_BYTES)))
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(MemoryError):
        small.keep()
    assert os.listdir(root) == []
    assert not place.store.leases._holders


def test_a_partial_file_is_in_use_from_the_moment_that_it_is_there(root: Path) -> None:
    """Another connection that finds it then would continue, name or remove it."""
    place = place_of(root, "x")
    found = []

    class Watched(Folder):
        def open_file(self, name: str, flags: int) -> int:
            descriptor = super().open_file(name, flags)
            if flags & os.O_CREAT:
                again = Place(place.name, Client(), place.store)
                found.append(PartialFile.reopen(open_root(root), name, again, 0.0))
            return descriptor

    partial = PartialFile.create(Watched.open(str(root)), place)
    assert found == [None]
    partial.write(memoryview(b"new"))
    assert partial.move_to("x")
    assert os.listdir(root) == ["x"]
