"""The server of Socket Pair: takes files into a folder, or broadcasts sound.

    python3 server.py file
    python3 server.py audio

In the order of the file; to follow a run, begin at `main`, at its end:

====================  =============================================================
names                 ``split_path``; ``NameRules``: the nearest name that a system can hold
folders               ``Folder``, kept open; ``Folders``: nothing outside the root
partial files         ``PartialFile``: until complete and given a name; ``Leases``: who has which
what clients share    ``Store``: where files go; ``DigestCache``, ``Turns`` and ``RateLimiter``
                      bound what each of them may cost
looking up            ``LookUp``: what is here already; ``LookedUp``: which of it is the client's
one file              ``UnderWay``, until it has its name; ``Content``: its bytes
file conversation     ``handle_file_client`` and ``Reception``: from offer to results; ``Batch``:
                      what the entries of an offer share
sound: inputs         ``Microphone``, ``PacedInput``: sound card, file, pipe; ``CaptureQueue``
sound: files          ``PlainWav``, and ``DecodedFile`` by FFmpeg: over and over
sound: encodings      ``PcmEncoding``, ``OpusEncoding``: what goes out, encoded once for many
sound: broadcaster    ``handle_audio_client``, ``Broadcaster``, ``Listener``: sound to everyone
who may connect       ``Gate``: the pairing code, and how fast it may be guessed
endpoint              ``Endpoint``: where a server listens, and what its clients have to know;
                      ``Advertiser`` tells the local network of it
serving               ``Server`` accepts, gives each connection a thread, shakes hands;
                      ``Clients``: all of them, and who gives way where there are too many
log                   ``BackgroundLog``: lines that nobody waits for
command line          ``main`` asks for what the arguments leave open
====================  =============================================================

``common.py`` describes both conversations. Inside the server, sound takes this way::

    PortAudio's thread -> CaptureQueue -> the broadcaster's thread -> every listener's socket
"""

from __future__ import annotations

import os
import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036  (who has an older one is told before `common` fails)
    raise SystemExit(
        f"Socket Pair needs Python 3.10 or newer, and this is {sys.version.split()[0]} "
        f"({sys.executable}): install one, see https://www.python.org"
    )

if __name__ == "__main__":
    # Until common.INTERRUPTS.take(), a signal just ends the program, also during the imports.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: os._exit(128 + number))

import argparse
import contextlib
import errno
import functools
import hashlib
import heapq
import ipaddress
import itertools
import logging
import math
import queue
import secrets
import selectors
import shutil
import socket
import stat
import struct
import threading
import time
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Generic,
    NamedTuple,
    NoReturn,
    TypeVar,
)

try:
    import common
except ModuleNotFoundError:
    raise SystemExit(f"common.py is missing: it belongs beside {__file__}") from None
from common import (
    PARTIAL_SUFFIX,
    SEGMENT_BYTES,
    SIGN_INTERVAL_S,
    STDIN,
    AudioBlock,
    AudioFormat,
    AudioUnavailable,
    Blocks,
    Connection,
    Console,
    Deadline,
    Entry,
    FileShrunk,
    Hashing,
    Hello,
    Offer,
    Outcome,
    Pair,
    PeerClosed,
    ProtocolError,
    SignsOfLife,
    SocketPairError,
    Welcome,
    counted,
    describe_error,
    escape,
    format_bytes,
)

if TYPE_CHECKING:
    from zeroconf import ServiceInfo

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource

log = logging.getLogger("socket-pair")


class Refused(SocketPairError):
    """A file that is not taken, and why; the others of its client are."""


# --- names ----------------------------------------------------------------------------------

# Linux's own limit, to bound what a client can make the server work through.
MAX_PATH_BYTES = 4096
# What removes a tree recursively goes no deeper than 1,000, often.
MAX_FOLDER_DEPTH = 500
MAX_NAME_BYTES = 255
# The least that is met with: encrypted folders (eCryptfs).
SHORT_NAME_BYTES = 143
MAX_SUFFIX_BYTES = 50
# Of a partial file, between its stem and its suffix.
MAX_TOKEN_BYTES = 40
WINDOWS_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "123456789\u00b9\u00b2\u00b3"
}


def split_path(path: str) -> list[str]:
    """Return the folders and the name in an offered `path`; raises Refused if it leads outside."""
    if len(path) > MAX_PATH_BYTES or len(path.encode(errors="surrogatepass")) > MAX_PATH_BYTES:
        raise Refused(f"the path is too long ({MAX_PATH_BYTES} bytes at most)")
    parts = path.split("/")
    if len(parts) > MAX_FOLDER_DEPTH + 1:
        raise Refused(f"the path is too deep ({MAX_FOLDER_DEPTH} folders at most)")
    if not {"", ".", ".."}.isdisjoint(parts):
        raise Refused("the path is not one inside the folder")
    if "\0" in path:
        raise Refused("the name holds a NUL")
    if f"{PARTIAL_SUFFIX}/" in f"{path}/":
        raise Refused(f"names that end in {PARTIAL_SUFFIX} are kept for unfinished files")
    return parts


class NameRules(NamedTuple):
    """What a file system takes as a name."""

    max_length: int = MAX_NAME_BYTES  # in bytes, on Windows and FAT in units of UTF-16
    is_windows: bool = sys.platform == "win32"  # also FAT, NTFS, and Windows' network folders
    is_unicode: bool = sys.platform in ("win32", "darwin")

    def length(self, name: str) -> int:
        """Return how much of `max_length` a name takes."""
        if self.is_windows:
            return len(name.encode("utf-16-le", "surrogatepass")) // 2
        return len(name.encode(errors="surrogatepass"))

    def fit(self, name: str) -> str:
        """Return `name`, or the nearest that can be one."""
        if name.isascii() and len(name) <= self.max_length and not self.is_windows:
            return name
        has_all = can_spell(name)  # most names: to ask of each character takes far longer
        name = "".join(
            char if (has_all or can_spell(char)) and self._takes(char) else "_" for char in name
        )
        if self.is_windows:
            name = fit_windows_name(name)
        name = self.shorten(*split_suffix(name))
        return fit_windows_name(name) if self.is_windows else name  # it has another end by now

    def _takes(self, char: str) -> bool:
        if self.is_unicode and "\ud800" <= char <= "\udfff":  # no character, but perhaps a byte
            return False
        return not self.is_windows or (char >= " " and char not in '<>:"/\\|?*')

    def shorten(self, stem: str, tail: str) -> str:
        """Return both together, with as much of `stem` as there is room for.

        What is left never ends as the names of partial files do, which are removed one day.
        """
        left = stem
        while self.length(left + tail) > self.max_length and left:
            left = left[:-1]
        if left != stem and (left + tail).endswith(PARTIAL_SUFFIX):
            left = left[:-1]
        return left + tail

    def numbered(self, name: str, first: int = 0) -> Iterator[tuple[int, str]]:
        """Yield 0 and `name`, which fits, 1 and ``name (1).ext`` and so on, from `first` on."""
        stem, suffix = split_suffix(name)
        for number in itertools.count(first):
            yield number, self.shorten(stem, f" ({number}){suffix}") if number else name

    def learn(self, error: OSError) -> NameRules:
        """Return the rules that a refusal of a name tells of: stricter ones, or the same."""
        return {
            errno.EINVAL: self._replace(is_windows=True),
            errno.ENAMETOOLONG: self._replace(max_length=SHORT_NAME_BYTES),
            errno.EILSEQ: self._replace(is_unicode=True),
        }.get(error.errno or 0, self)


USUAL_RULES = NameRules()


def can_spell(text: str) -> bool:
    """Return whether this system's locale has all characters of a name."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # which a surrogate is as well, unless it stands for a byte
        return False
    return True


def fit_windows_name(name: str) -> str:
    """Return what Windows reads as a name and not as a path, a drive or a device.

    After Microsoft's "Naming Files, Paths, and Namespaces"; `name` holds no reserved character.
    """
    stem, dot, rest = name.partition(".")
    if stem.rstrip().upper() in WINDOWS_RESERVED:
        name = f"{stem.rstrip()}_{dot}{rest}"
    return name[:-1] + "_" if name[-1] in " ." else name


def split_suffix(name: str) -> tuple[str, str]:
    """Return a name's stem and suffix; a very long suffix is none, but a name with a dot in it."""
    stem, suffix = os.path.splitext(name)
    long = len(suffix.encode(errors="surrogatepass")) > MAX_SUFFIX_BYTES
    return (name, "") if long else (stem, suffix)


# What is left for the stem of a partial file.
STEM_BYTES = SHORT_NAME_BYTES - len(f"..{PARTIAL_SUFFIX}") - MAX_TOKEN_BYTES
STRICT_RULES = NameRules(STEM_BYTES, is_windows=True, is_unicode=True)


def partial_stem(name: str) -> str:
    """Return what the partial files of `name` begin with: what any file system takes."""
    # The rules count in other units than bytes.
    if STRICT_RULES.fit(name) == name and len(name.encode()) <= STEM_BYTES:
        return f".{name}"
    return "." + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()


def split_partial(hidden: str) -> tuple[str, str]:
    """Return the stem of a partial file's name, and its token, which begins with a client's tag."""
    stem, _, token = hidden.removesuffix(PARTIAL_SUFFIX).rpartition(".")
    return stem, token


# --- folders --------------------------------------------------------------------------------

FOLDER_GONE = "its folder, or its hidden file there, was moved or removed meanwhile"
# Of one batch: each is a descriptor. One that is needed again after others is opened again.
MAX_OPEN_FOLDERS = 32
# By one batch: one for each entry, and those above the first.
MAX_NEW_FOLDERS = common.MAX_BATCH_ENTRIES + MAX_FOLDER_DEPTH
# The permissions of a folder made here, until all that is in it has arrived and its own are told.
# The sticky bit tells it from a folder that is to stay so, also after a restart.
UNFINISHED_MODE = 0o1700
# With O_PATH, where the system has it, permission to search a folder is enough.
FOLDER_FLAGS = (
    getattr(os, "O_PATH", os.O_RDONLY)
    | getattr(os, "O_DIRECTORY", 0)
    | getattr(os, "O_NOFOLLOW", 0)
)
FILE_FLAGS = (
    os.O_RDWR
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
)
# Windows has no folders to work inside of: there a folder is its path.
HAS_OPEN_FOLDERS = {os.open, os.mkdir, os.stat, os.link, os.unlink, os.rename} <= os.supports_dir_fd


class Folder:
    """A real folder, kept open: what takes its place meanwhile gets nothing that is meant for it.

    It is closed when nothing refers to it any more. All methods raise OSError.
    """

    def __init__(self, path: str, descriptor: int | None) -> None:
        self.descriptor = descriptor
        self.path = os.path.join(path, "")
        found = os.stat(path) if descriptor is None else os.fstat(descriptor)
        self.device = found.st_dev
        self.identity = (found.st_dev, found.st_ino)
        self.is_unfinished = found.st_mode & 0o1777 == UNFINISHED_MODE
        self.set_group_id = found.st_mode & stat.S_ISGID  # has what is in it belong to its group

    @classmethod
    def open(cls, path: str) -> Folder:
        """Open the root."""
        return cls(path, os.open(path, FOLDER_FLAGS) if HAS_OPEN_FOLDERS else None)

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def at(self, name: str) -> str:
        """Return what names a file in it, together with its `descriptor` as ``dir_fd``."""
        return name if HAS_OPEN_FOLDERS else self.path + name

    def enter(self, name: str) -> Folder:
        """Open a folder in it. Says ENOTDIR, or ELOOP, for a file or a link."""
        path = self.path + name
        if HAS_OPEN_FOLDERS:
            return Folder(path, os.open(name, FOLDER_FLAGS, dir_fd=self.descriptor))
        real = os.path.normcase(os.path.realpath(path, strict=True))
        if real != os.path.normcase(path) or not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return Folder(path, None)

    def make(self, name: str, mode: int) -> None:
        """Make a folder in it, unless something has that name."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.at(name), mode, dir_fd=self.descriptor)
            if sys.platform == "darwin" and mode & stat.S_ISVTX:  # which mkdir() leaves out there
                with contextlib.suppress(OSError):  # as on a network's disk
                    os.chmod(self.at(name), mode, dir_fd=self.descriptor)

    def stat(self, name: str) -> os.stat_result:
        """Return what is known of a name in it; a link is not followed."""
        return os.stat(self.at(name), dir_fd=self.descriptor, follow_symlinks=False)

    def disk_usage(self) -> tuple[int, int, int]:
        """Return the size of its file system, what is used and what is free of it, in bytes."""
        return shutil.disk_usage(self.path if self.descriptor is None else self.descriptor)

    def has(self, name: str) -> bool:
        """Return whether anything has that name in it."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def open_file(self, name: str, flags: int) -> int:
        """Open a file in it, never through a link nor waiting for it; return the descriptor."""
        return os.open(self.at(name), flags, 0o600, dir_fd=self.descriptor)

    def open_to_read(self, name: str) -> int:
        """Open a file in it as `common.open_to_read` does, never through a link."""
        flags = getattr(os, "O_NOFOLLOW", 0)
        return common.open_to_read(self.at(name), flags, self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file from it."""
        os.unlink(self.at(name), dir_fd=self.descriptor)

    def replace(self, name: str, target: str) -> None:
        """Move a file within it over what has the name `target`, in one step."""
        here = self.descriptor
        os.replace(self.at(name), self.at(target), src_dir_fd=here, dst_dir_fd=here)

    def names(self, suffix: str) -> Iterator[str]:
        """Yield the names in it that end in `suffix`."""
        if not HAS_OPEN_FOLDERS:
            yield from (name for name in os.listdir(self.path) if name.endswith(suffix))
            return
        descriptor = os.open(".", os.O_RDONLY, dir_fd=self.descriptor)
        try:
            with os.scandir(descriptor) as entries:
                yield from (each.name for each in entries if each.name.endswith(suffix))
        finally:
            os.close(descriptor)

    def finish(self, mtime_ns: int | None, mode: int | None) -> None:
        """Give it its modification time, and a `mode` if there is one."""
        place = "." if HAS_OPEN_FOLDERS else self.path
        if mode is not None and HAS_OPEN_FOLDERS:
            os.chmod(place, mode, dir_fd=self.descriptor)
        set_times(place, mtime_ns, self.descriptor)


def set_times(path: str | int, mtime_ns: int | None, dir_fd: int | None = None) -> None:
    """Give a file (also an open one) or folder its modification time, where that can be."""
    if mtime_ns is not None:
        with contextlib.suppress(OSError, OverflowError):
            os.utime(path, ns=(mtime_ns, mtime_ns), dir_fd=dir_fd)


class Folders:
    """The folders below the root that the entries of one batch go to, by their offered paths.

    Each part of a path is opened inside the one before, and no link is followed: so nothing leads
    outside, whatever else happens in there meanwhile.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, Folder | None] = OrderedDict()  # None: it is missing
        self._new_left = MAX_NEW_FOLDERS

    def find(self, path: str) -> Folder | None:
        """Return the folder at `path` ("" is the root) if there is one; raises Refused, OSError."""
        if path in self._known:
            self._known.move_to_end(path)
            return self._known[path]
        return self._walk(path, None)

    def find_again(self, path: str) -> Folder | None:
        """Return the folder at `path` if it is still to be had."""
        with contextlib.suppress(Refused, OSError):
            return self.find(path)
        return None

    def make(self, path: str, mode: int) -> Folder:
        """Return the folder at `path`, made with `mode` if it is missing; raises as `find` does."""
        folder = self.find(path) or self._walk(path, mode)
        if folder is None:
            raise Refused(FOLDER_GONE)
        return folder

    def forget(self) -> None:
        """Have all folders looked up anew: one is not where it was."""
        self._known.clear()

    def _walk(self, path: str, mode: int | None) -> Folder | None:
        """Open the folder at `path`, part by part; make what is missing if there is a `mode`."""
        parent, _, name = path.rpartition("/")
        folder = self._known.get(parent)
        if folder is None:
            folder = self._root(mode)
            for part in filter(None, parent.split("/")):
                folder = self._enter(folder, part, mode) if folder else None
        self._keep(parent, folder)  # others in it may follow, and it may be deep
        if folder and name:
            folder = self._enter(folder, name, mode)
        self._keep(path, folder)
        return folder

    def _keep(self, path: str, folder: Folder | None) -> None:
        self._known[path] = folder
        self._known.move_to_end(path)
        while len(self._known) > MAX_OPEN_FOLDERS:
            self._known.popitem(last=False)

    def _root(self, mode: int | None) -> Folder | None:
        root = self._known.get("")
        if root is None and mode is not None:
            os.makedirs(self._store.root, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            root = self._known[""] = root or Folder.open(self._store.root)
        return root

    def _enter(self, folder: Folder, offered: str, mode: int | None) -> Folder | None:
        """Open a folder in another, or make it, under the nearest name that it can have."""
        try:
            return self._store.with_fitting(
                folder, offered, lambda name: self._enter_or_make(folder, name, mode)
            )
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise Refused("a file or a symbolic link stands where a folder should go") from None

    def _enter_or_make(self, folder: Folder, name: str, mode: int | None) -> Folder | None:
        try:
            return folder.enter(name)
        except FileNotFoundError:
            if mode is None:
                return None
        self._new_left -= 1
        if self._new_left < 0:
            raise Refused("too many new folders at once")
        folder.make(name, mode)
        return folder.enter(name)


# --- partial files --------------------------------------------------------------------------

# What link() says on file systems and systems without hard links, or with too few.
NO_HARD_LINKS = {errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK}
NO_HARD_LINKS |= {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
# What open() says where a file cannot be without a name.
NO_NAMELESS = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS}
NAMELESS = getattr(os, "O_TMPFILE", 0) if os.path.isdir("/proc/self/fd") else 0
# Less than this of a file without a name is not worth a hidden file for the next run.
KEPT_BYTES = 64 * 1024
# How long the connection that a client has just lost may take to notice, and release its file.
RELEASE_TIMEOUT_S = 2.0
# One that has heard nothing for so long is ended for a new one that offers the same path.
SILENT_S = 3.0
TAKEOVER_TIMEOUT_S = 6.0


def lock_file(descriptor: int) -> bool:
    """Lock an open file against other servers; return False if one has it.

    The system releases the lock when the file is closed or the process dies. Where there are no
    locks, or this process may not use them (AppArmor), it counts as locked.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 2**62, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        taken = PermissionError if sys.platform == "win32" else BlockingIOError
        return not isinstance(error, taken)
    return True


FileName = tuple[tuple[int, int], str]  # the identity of its folder, and its name there


class Leases:
    """Which partial files are in use, and by whom. All methods are for any thread.

    A file is taken by its name, before it is there: another connection may find it at once.
    """

    def __init__(self) -> None:
        self._holders: dict[FileName, Reception] = {}
        self._changed = threading.Condition()

    def take(self, file: FileName, holder: Reception, since: float) -> FileName | None:
        """Have `holder` use a file, and return it; None if another does, and goes on doing so.

        Blocks until some seconds after `since`, a time.monotonic(): a client that was cut off
        comes back at once, perhaps before its old connection has been found broken. One that has
        been silent for ``SILENT_S`` is ended.
        """
        with self._changed:
            if file not in self._holders:
                self._holders[file] = holder
                return file
        with holder.released_turn():
            return self._wait_and_take(file, holder, since)

    def _wait_and_take(self, file: FileName, holder: Reception, since: float) -> FileName | None:
        with self._changed:
            while (other := self._holders.get(file)) is not None:
                silent_s, waited_s = other.silent_s(), time.monotonic() - since
                if silent_s >= SILENT_S:
                    other.end()
                limit_s = RELEASE_TIMEOUT_S if silent_s < waited_s else TAKEOVER_TIMEOUT_S
                if other is holder or waited_s >= limit_s:
                    return None
                until_silent_s = SILENT_S - silent_s if silent_s < SILENT_S else math.inf
                self._changed.wait(min(until_silent_s, limit_s - waited_s))
            self._holders[file] = holder
        return file

    def release(self, file: FileName) -> None:
        """Note that a file is not used any more."""
        with self._changed:
            self._holders.pop(file, None)
            self._changed.notify_all()


class Place(NamedTuple):
    """What a partial file is to become, for whom, and where."""

    name: str
    holder: Reception
    store: Store

    def new_hidden_name(self) -> str:
        """Return a name for a partial file that none has had."""
        token = self.holder.tag + secrets.token_hex(8)
        return f"{partial_stem(self.name)}.{token}{PARTIAL_SUFFIX}"


class PartialFile:
    """A file under way, open until it is complete and gets its name. Not for two threads at once.

    By its hidden `name` the next run finds it, and others are kept out of it while it is open. A
    small one has none as long as that can be: a kill leaves nothing of it. It ends with `move_to`
    or `replace`, which may be tried several times, with `keep` or `discard`.

    All methods but those raise OSError.
    """

    _moving = threading.Lock()

    def __init__(self, folder: Folder, descriptor: int, name: str, place: Place) -> None:
        self.folder = folder
        self.descriptor = descriptor
        self.name = name
        self.size = 0
        self.digest = hashlib.sha256()  # of all that it holds
        self._place = place
        self._lease: FileName | None = None

    # opening

    @classmethod
    def create(cls, folder: Folder, place: Place) -> PartialFile:
        """Make an empty one with a hidden name."""
        while True:
            partial = cls(folder, -1, place.new_hidden_name(), place)
            if partial._open(FILE_FLAGS | os.O_CREAT | os.O_EXCL, time.monotonic()):
                return partial

    @classmethod
    def create_nameless(cls, folder: Folder, place: Place, mode: int) -> PartialFile:
        """Make an empty one with these permissions, without a name if that can be."""
        if NAMELESS and folder.device not in place.store.without_nameless:
            flags = NAMELESS | os.O_RDWR
            try:
                return cls(folder, os.open(".", flags, mode, dir_fd=folder.descriptor), "", place)
            except OSError as error:
                if error.errno in NO_NAMELESS:
                    place.store.without_nameless.add(folder.device)
        return cls.create(folder, place)

    @classmethod
    def reopen(cls, folder: Folder, name: str, place: Place, since: float) -> PartialFile | None:
        """Open one that is there; None if it is of no use. Blocks as `Leases.take` does."""
        partial = cls(folder, -1, name, place)
        with contextlib.suppress(OSError):  # it has just got its name
            is_open = partial._open(FILE_FLAGS, since)
            if is_open and is_own_file(os.fstat(partial.descriptor)) and partial._is_in_place():
                partial.size = os.fstat(partial.descriptor).st_size
                return partial
        partial.close()
        return None

    def _open(self, flags: int, since: float) -> bool:
        """Open it and keep others out; return False, and leave it closed, if one has it."""
        with contextlib.ExitStack() as closing:
            closing.callback(self.close)
            file, place = (self.folder.identity, self.name), self._place
            self._lease = place.store.leases.take(file, place.holder, since)
            if self._lease:
                self.descriptor = self.folder.open_file(self.name, flags)
                if lock_file(self.descriptor):
                    closing.pop_all()
        return self.descriptor >= 0

    def _is_in_place(self) -> bool:
        """Return whether it still has its hidden name, and no other.

        It may have got its name before it was locked; and a server killed while it did that
        leaves both: writing here would change the finished file.
        """
        found = os.fstat(self.descriptor)
        if not os.path.samestat(found, self.folder.stat(self.name)):
            return False
        if found.st_nlink > 1:
            self._remove()
        return found.st_nlink == 1

    # what it holds

    def write(self, view: memoryview) -> None:
        """Append `view`; blocks until the system has taken it."""
        left = view
        while left:
            left = left[os.write(self.descriptor, left) :]
        self.digest.update(view)
        self.size += len(view)

    def resume(self) -> None:
        """Write on behind what it holds."""
        os.lseek(self.descriptor, self.size, os.SEEK_SET)

    def make_room(self) -> None:
        """Give back, from its end, as much as is kept free on its disk; no `write` after that."""
        with contextlib.suppress(OSError):
            left = max(0, self.size - headroom_of(self.folder.disk_usage()[0]))
            os.ftruncate(self.descriptor, left)
            self.size = left

    def is_touched(self) -> bool:
        """Return whether another program has made it longer or shorter: by its name one could."""
        return bool(self.name) and os.fstat(self.descriptor).st_size != self.size

    def flush(self) -> None:
        """Have it written to where it stays, if that is a network's: errors may be told only then.

        NFS and FUSE do that, and tell of it, whenever a descriptor of the file is closed.
        """
        os.close(os.dup(self.descriptor))

    def set_metadata(self, mtime_ns: int | None, mode: int) -> None:
        """Give it its modification time and permissions, as far as the file system holds them."""
        if sys.platform == "win32":  # where closing what was written to sets its time anew
            self.close()
            set_times(self.folder.at(self.name), mtime_ns)
            return
        if self.name:  # without, it was made with them
            with contextlib.suppress(OSError):
                os.fchmod(self.descriptor, mode & ~self._place.store.umask)
        set_times(self.descriptor, mtime_ns)

    # ending

    def move_to(self, name: str) -> bool:
        """Give it `name` in its folder in one step; return False if something has that."""
        try:
            if sys.platform == "win32":  # where an open file has to stay, and nothing is replaced
                self.close()
                os.rename(self.folder.at(self.name), self.folder.at(name))
            else:
                self._link(name)
                self._remove()
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            return self._move_without_links(name)
        self.close()
        return True

    def _link(self, name: str) -> None:
        """Give the open file, whatever stands under its hidden name by now, another name."""
        here = self.folder.descriptor
        if NAMELESS:
            os.link(f"/proc/self/fd/{self.descriptor}", name, dst_dir_fd=here)
        else:
            os.link(self.name, name, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False)

    def _move_without_links(self, name: str) -> bool:
        """Do what `move_to` does on FAT and the like, safe among this server's own threads."""
        self._hide()
        with self._moving:
            if self.folder.has(name):
                return False
            self.folder.replace(self.name, name)
        self.close()
        return True

    def replace(self, name: str) -> bool:
        """Give it `name` in its folder in one step, in the place of a file; False for a folder."""
        self._hide()
        if sys.platform == "win32":
            self.close()
        try:
            self.folder.replace(self.name, name)
        except OSError:
            if self.folder.has(name) and stat.S_ISDIR(self.folder.stat(name).st_mode):
                return False
            raise
        self.close()
        return True

    def _hide(self) -> None:
        """Give it a hidden name, if it has none, and keep others out of it."""
        if self.name:
            return
        place, name = self._place, self._place.new_hidden_name()
        leases, file = place.store.leases, (self.folder.identity, name)
        leases.take(file, place.holder, time.monotonic())
        lock_file(self.descriptor)
        try:
            self._link(name)
        except OSError as error:
            leases.release(file)
            if error.errno not in NO_HARD_LINKS:
                raise
            place.store.without_nameless.add(self.folder.device)
            self._copy()
        else:
            self.name, self._lease = name, file

    def _copy(self) -> None:
        """Become a copy that has a hidden name: this system gives the open file none."""
        made = os.fstat(self.descriptor)
        copy = PartialFile.create(self.folder, self._place)
        try:
            os.lseek(self.descriptor, 0, os.SEEK_SET)
            while data := os.read(self.descriptor, SEGMENT_BYTES):
                copy.write(memoryview(data))
            copy.set_metadata(made.st_mtime_ns, stat.S_IMODE(made.st_mode))
            self.close()
        except BaseException:
            copy.discard()
            raise
        self.descriptor, self.name, self._lease = copy.descriptor, copy.name, copy._lease

    def keep(self) -> int:
        """Leave what came of it for the next run, if it is worth it; return how many bytes."""
        if self.descriptor < 0:
            return 0
        with contextlib.suppress(OSError), contextlib.closing(self):
            if self.size < (1 if self.name else KEPT_BYTES):
                self.discard()
                return 0
            self._hide()
            # Its source's would keep its owner out, or have it count as an old leftover.
            self.set_metadata(time.time_ns(), 0o600)
            return self.size
        return 0

    def discard(self) -> None:
        """Remove it."""
        if sys.platform == "win32":  # where an open file cannot be removed
            self.close()
        self._remove()
        self.close()

    def _remove(self) -> None:
        if self.name:
            with contextlib.suppress(OSError):  # where names can only be added, it stays
                self.folder.remove(self.name)

    def close(self) -> None:
        """Close and release it, and leave it as it is. Idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        lease, self._lease = self._lease, None
        try:
            if descriptor >= 0:
                os.close(descriptor)
        finally:
            if lease:
                self._place.store.leases.release(lease)


# --- what clients share ---------------------------------------------------------------------

MAX_REMEMBERED = 10_000  # of each kind; a few hundred bytes each
MAX_SETTLED = 100_000
MAX_KNOWN_FOLDERS = 500  # with the leftovers in them
MAX_LEFTOVERS = 1_000  # that count in one folder, those of the client's own address first
LEFTOVER_LIFE_S = 7 * 24 * 3600.0
# What was written so lately may be written again without a later time: FAT's are of two seconds.
CLOCK_TICK_NS = 2_100_000_000
# Kept free for what else is on the disk, and of it the share that small disks keep.
HEADROOM_BYTES = 256 * 1024 * 1024
HEADROOM_SHARE = 50
# Comparisons in which something differed, for an address: so many at once, then one a second.
FREE_MISMATCHES = 50
MISMATCH_SPACING_S = 1.0

K = TypeVar("K")
T = TypeVar("T")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The newest `limit` of what has been noted. For any thread."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, key: K, value: V) -> None:
        """Remember `value`, and forget the oldest one if there are too many."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._limit:
                self._values.popitem(last=False)

    def find(self, key: K, default: V) -> V:
        """Return what was noted, or `default`."""
        with self._lock:
            return self._values.get(key, default)

    def forget(self, key: K) -> None:
        """Forget one, if it is there."""
        with self._lock:
            self._values.pop(key, None)


class RateLimiter:
    """A token bucket for each key: so much at once, then one by one. For any thread."""

    def __init__(
        self, at_once: int, spacing_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._at_once = at_once
        self._spacing_s = spacing_s
        self._clock = clock
        self._buckets: Recent[str, tuple[float, float]] = Recent()  # what was left, and when
        self._lock = threading.Lock()

    def reserve(self, key: str = "", most_s: float = 0.0, number: int = 1) -> float | None:
        """Take turns; return in how many seconds the last may begin; None if over `most_s`."""
        with self._lock:
            left = self._left(key) - number
            wait_s = max(0.0, -left * self._spacing_s)
            if wait_s > most_s:
                return None
            self._buckets.note(key, (left, self._clock()))
        return wait_s

    def give_back(self, key: str, number: int) -> None:
        """Return turns that were reserved, and are not to count."""
        with self._lock:
            self._buckets.note(key, (self._left(key) + number, self._clock()))

    def forget(self, key: str) -> None:
        """Have all that was reserved not count."""
        self._buckets.forget(key)

    def _left(self, key: str) -> float:
        now_s = self._clock()
        left, then_s = self._buckets.find(key, (float(self._at_once), now_s))
        return min(self._at_once, left + (now_s - then_s) / self._spacing_s)


Who = tuple[Hashable, ...]  # a host and its client, or whoever else has turns


class Turns:
    """Lets one thread at a time do what takes the processor. For any thread.

    Whoever has had a turn is due again after as long as that took of the processor, and a newcomer
    at once. The next turn is of the host that has been due for longest, and of that client of it
    that has: nobody waits for ever, however many come.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In the order in which they asked, and since when.
        self._waiting: list[tuple[Who, float, threading.Lock]] = []
        self._due_s: Recent[Hashable, float] = Recent()
        self._is_taken = False
        self._began_s = 0.0  # in processor's time of the thread whose turn it is

    @contextlib.contextmanager
    def turn(self, who: Who) -> Iterator[None]:
        """Have a turn inside the ``with`` block; blocks until then."""
        self._begin(who)
        try:
            yield
        finally:
            self._end(who)

    def _begin(self, who: Who) -> None:
        mine = threading.Lock()
        with self._lock:
            if self._is_taken:
                mine.acquire()  # which whoever ends a turn releases
                self._waiting.append((who, time.monotonic(), mine))
            self._is_taken = True
        mine.acquire()
        self._began_s = time.thread_time()

    def _end(self, who: Who) -> None:
        due_s = time.monotonic() + time.thread_time() - self._began_s
        for each in who:
            self._due_s.note(each, due_s)
        with self._lock:
            if not self._waiting:
                self._is_taken = False
                return
            find = self._due_s.find
            chosen = min(self._waiting, key=lambda each: [find(of, each[1]) for of in each[0]])
            self._waiting.remove(chosen)
            chosen[2].release()

    @contextlib.contextmanager
    def released(self, who: Who) -> Iterator[None]:
        """Release a turn inside the ``with`` block, for others, and take another at its end."""
        self._end(who)
        try:
            yield
        finally:
            self._begin(who)

    def rest(self, times: float) -> None:
        """Do nothing for so many `times` as long as this turn has taken of the processor."""
        time.sleep(times * (time.thread_time() - self._began_s))


class DigestCache:
    """The SHA-256 of files that were read before and have not changed since. For any thread."""

    def __init__(self) -> None:
        self._known: Recent[tuple[int, ...], hashlib._Hash | None] = Recent()
        self._turns = Turns()

    def read(
        self, descriptor: int, size: int, on_progress: Callable[[int], object]
    ) -> hashlib._Hash:
        """Return the SHA-256 of the first `size` bytes of an open file.

        Blocks while it reads, block by block in turn with others. Raises OSError, and FileShrunk
        where there are fewer bytes.
        """
        key = self._key(descriptor, size)
        digest = self._known.find(key, None)
        if digest is None:
            digest = self._read(descriptor, size, on_progress)
            is_old = key[-1] < time.time_ns() - CLOCK_TICK_NS
            if is_old and self._key(descriptor, size) == key:
                self._known.note(key, digest)
        return digest.copy()

    @staticmethod
    def _key(descriptor: int, size: int) -> tuple[int, ...]:
        found = os.fstat(descriptor)
        return (found.st_dev, found.st_ino, size, found.st_mtime_ns, found.st_ctime_ns)

    def _read(
        self, descriptor: int, size: int, on_progress: Callable[[int], object]
    ) -> hashlib._Hash:
        who, digest = (object(),), hashlib.sha256()

        def take_turns(count: int) -> None:
            with self._turns.released(who):  # what a client does not read holds up nobody else
                on_progress(count)

        os.lseek(descriptor, 0, os.SEEK_SET)
        with self._turns.turn(who):
            common.calculate_checksum(descriptor, size, digest=digest, on_progress=take_turns)
        return digest


Leftovers = dict[str, list[str]]  # the names of a folder's partial files by their stems


def list_leftovers(folder: Folder, tag: str) -> Leftovers:
    """Return those that are in `folder` now, first what has this `tag`. Raises OSError."""
    names: Leftovers = {}
    with contextlib.suppress(PermissionError):  # it may still be written to
        every = folder.names(PARTIAL_SUFFIX)
        for name in heapq.nsmallest(MAX_LEFTOVERS, every, lambda name: not has_tag(name, tag)):
            names.setdefault(split_partial(name)[0], []).append(name)
    return names


def has_tag(name: str, tag: str) -> bool:
    """Return whether a partial file was made for a client whose address has this `tag`."""
    return split_partial(name)[1].startswith(tag)


def remove_old_leftovers(root: str) -> None:
    """Remove the partial files below `root` that nobody has continued for ``LEFTOVER_LIFE_S``.

    As far as can be: `root` may be gone, or no descriptor left to look. What is deeper than this
    server makes folders is left alone.
    """
    with contextlib.suppress(OSError):
        for place, folders, names, descriptor in walk(root):
            if place[len(root) :].count(os.sep) >= MAX_FOLDER_DEPTH:
                folders.clear()
            for name in names:
                remove_old_leftover(name, descriptor)


def walk(root: str) -> Iterator[tuple[str, list[str], list[str], int | None]]:
    """Yield what `os.fwalk` does; on Windows, which has no such thing, with whole paths."""
    if sys.platform == "win32":
        for place, folders, names in os.walk(root):
            yield place, folders, [os.path.join(place, name) for name in names], None
    else:
        yield from os.fwalk(root)


def remove_old_leftover(name: str, dir_fd: int | None) -> None:
    """Remove a file if it is a partial file, nobody uses it, and it is too old."""
    if not name.endswith(PARTIAL_SUFFIX):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(name, FILE_FLAGS, dir_fd=dir_fd)
        try:
            found = os.fstat(descriptor)
            is_old = found.st_mtime < time.time() - LEFTOVER_LIFE_S
            is_free = is_old and is_own_file(found) and lock_file(descriptor)
            if is_free and sys.platform != "win32":  # where no file is removed that is open
                os.unlink(name, dir_fd=dir_fd)
        finally:
            os.close(descriptor)
        if is_free and sys.platform == "win32":
            os.unlink(name)


def is_own_file(found: os.stat_result) -> bool:
    """Return whether it is a regular file of this user's: another's could change meanwhile."""
    is_own = sys.platform == "win32" or found.st_uid == os.geteuid()
    return is_own and stat.S_ISREG(found.st_mode)


def headroom_of(total: int) -> int:
    """Return how many bytes are kept free on a file system of `total` bytes."""
    return min(HEADROOM_BYTES, total // HEADROOM_SHARE)


class Store:
    """Where files go, what is known of the disk there, and who sends just now. For any thread."""

    def __init__(self, folder: str, overwrite: bool = False) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self.root = os.path.realpath(folder)
        self.umask = os.umask(0o077)  # asking for it sets it, for all threads
        os.umask(self.umask)
        self.rules: dict[int, NameRules] = {}  # by file system, where stricter than usual
        self.without_nameless: set[int] = set()  # file systems on which each file has a name
        self.numbers: Recent[tuple[tuple[int, int], str], int] = Recent()  # next for a taken name
        self.leases = Leases()
        self.digests = DigestCache()
        # By folder and tag, with the time.monotonic() at which they were looked for.
        self.leftovers: Recent[tuple[tuple[int, int], str], tuple[float, Leftovers]] = Recent(
            MAX_KNOWN_FOLDERS
        )
        self.mismatches = RateLimiter(FREE_MISMATCHES, MISMATCH_SPACING_S)
        self.looking_up = Turns()
        # By run, device and inode: the files that a client has been told it has here.
        self.settled: Recent[tuple[str, int, int], bool] = Recent(MAX_SETTLED)
        self.log = LimitedLog()
        self._receptions: set[Reception] = set()
        self._lock = threading.Lock()

    def rules_in(self, folder: Folder) -> NameRules:
        """Return what is known of the names that `folder` takes."""
        return self.rules.get(folder.device, USUAL_RULES)

    def with_fitting(self, folder: Folder, offered: str, use: Callable[[str], T]) -> T:
        """Return what `use` does with the nearest name to `offered` that `folder` takes."""
        while True:
            rules = self.rules_in(folder)
            try:
                return use(rules.fit(offered))
            except OSError as error:
                learnt = rules.learn(error)
                if learnt == rules:
                    raise
            self.rules[folder.device] = learnt

    def numbered(self, folder: Folder, name: str, back: int = 0) -> Iterator[tuple[int, str]]:
        """Yield 0 and `name`, then numbered names from `back` before the first free one, about."""
        yield 0, name
        rules = self.rules_in(folder)
        first = max(1, self.numbers.find((folder.identity, name), 1) - back)
        if first > 1 and not folder.has(next(rules.numbered(name, first - 1))[1]):
            first = 1  # some have gone since
        yield from rules.numbered(name, first)

    def find_leftovers(self, folder: Folder, place: Place, since: float) -> list[str]:
        """Return the hidden names of the partial files in `folder` that may become the file.

        A folder is looked through again only for one that has connected `since`, a
        time.monotonic().
        """
        key = (folder.identity, place.holder.tag)
        seen_s, names = self.leftovers.find(key, (-1.0, {}))
        if seen_s < since:
            seen_s, names = time.monotonic(), list_leftovers(folder, place.holder.tag)
            self.leftovers.note(key, (seen_s, names))
        return names.get(partial_stem(place.name), []) if names else []

    def read_finished(
        self, folder: Folder, name: str, size: int, on_progress: Callable[[int], object]
    ) -> str:
        """Return the SHA-256 of a finished file; "" if it is not of `size` bytes or unreadable."""
        with contextlib.suppress(OSError, FileShrunk):
            descriptor = folder.open_to_read(name)
            try:
                found = os.fstat(descriptor)
                if stat.S_ISREG(found.st_mode) and found.st_size == size:
                    return self.digests.read(descriptor, size, on_progress).hexdigest()
            finally:
                os.close(descriptor)
        return ""

    @contextlib.contextmanager
    def attend(self, reception: Reception) -> Iterator[None]:
        """Count a client in inside the ``with`` block."""
        with self._lock:
            self._receptions.add(reception)
        try:
            yield
        finally:
            with self._lock:
                self._receptions.discard(reception)

    def room_for(self, reception: Reception, folder: Folder) -> float:
        """Return how many bytes a client may write beside what is kept free in a folder.

        Without end where the file system does not tell its size. Raises OSError.
        """
        total, _, free = folder.disk_usage()
        if not total:
            return math.inf
        with self._lock:
            others = self._receptions - {reception}
            return free - headroom_of(total) - sum(each.needs(folder.device) for each in others)

    def has_large_arrival(self) -> bool:
        """Return whether a large file is arriving just now."""
        with self._lock:
            return any(each.large for each in self._receptions)

    def describe_arrivals(self) -> str:
        """Return what is arriving just now, in a line."""
        with self._lock:
            return "; ".join(filter(None, [each.describe() for each in self._receptions]))

    def spell(self, folder: Folder, name: str) -> str:
        """Return a path in a line of the log."""
        below = folder.path[len(os.path.join(self.root, "")) :]
        return spell_path(os.path.join(self.folder, below + name))


# --- looking up -----------------------------------------------------------------------------

# More partial files than this of one batch are not looked at, of the client's own address and of
# others: each is an open file, and no client takes over ``MAX_HELD_LENGTHS`` of one name.
MAX_OPEN_PARTIALS = 16
# Entries of one batch that are compared with one file here, as all of one path and size are with
# finished ones, and all of one path with partial ones: each is a guess at what is here.
MAX_ALIKE = 8
# Finished files of one name that are read as they may be the same: those with the offered time, and
# the newest of the others.
MAX_CANDIDATES = 8
MAX_NUMBERED = 100  # that are looked at for that, of one name


def folder_of(entry: Entry) -> str:
    """Return the path of an entry's folder; "" is the root."""
    return entry.path.rpartition("/")[0]


def name_of(entry: Entry) -> str:
    """Return an entry's own name."""
    return entry.path.rpartition("/")[2]


class Wanted(NamedTuple):
    """An entry of which the client is to send all that is not here."""

    entry: Entry
    beginning: PartialFile | None = None  # what is here of it
    different: Sequence[str] = ()  # names of finished files that have been compared

    @property
    def offset(self) -> int:
        """How many bytes are here."""
        return self.beginning.size if self.beginning else 0


Checksums = dict["PartialFile | str", str]  # of partial files, and of finished ones by their names


class LookedUp(NamedTuple):
    """An offered file, and what is here that may be its beginning, or the whole of it.

    It keeps no folder open, as there may be one for each entry.
    """

    entry: Entry
    size: int
    partials: Sequence[PartialFile]
    candidates: Sequence[str]  # names of finished files of its size

    def held(self) -> list[int]:
        """Return the lengths, in bytes, of which the client is to tell the SHA-256."""
        lengths = {each.size for each in self.partials}
        return sorted(lengths | {self.size} if self.candidates else lengths)

    def read(self, batch: Batch, on_progress: Callable[[int], object]) -> Checksums:
        """Return the SHA-256 of all that is here and can be read; blocks until it is read."""
        store = batch.store
        here: Checksums = {}
        for each in self.partials:
            with contextlib.suppress(OSError, FileShrunk):  # as good as different
                each.digest = store.digests.read(each.descriptor, each.size, on_progress)
                here[each] = each.digest.hexdigest()
        if self.candidates and (folder := batch.folders.find_again(folder_of(self.entry))):
            for name in self.candidates:
                if checksum := store.read_finished(folder, name, self.size, on_progress):
                    here[name] = checksum
        return here

    def decide(
        self, batch: Batch, here: Checksums, there: dict[int, str], taken: set[PartialFile]
    ) -> Wanted | Outcome:
        """Return what is done with it, by the SHA-256 of what is here, and of the client's file.

        A partial file is for one entry only: it is `taken` then.
        """
        for name in self.candidates:
            is_same = name in here and here[name] == there.get(self.size)
            if is_same and (folder := batch.folders.find_again(folder_of(self.entry))):
                return batch.settle("already", folder, name)
        same = [
            each for each in self.partials if each in here and here[each] == there.get(each.size)
        ]
        beginning = max(set(same) - taken, key=lambda each: each.size, default=None)
        if beginning is None:
            batch.differed = True
        else:
            taken.add(beginning)
            beginning.resume()
        return Wanted(self.entry, beginning, different=self.candidates)

    def compared(self, here: Checksums, there: dict[int, str]) -> set[PartialFile]:
        """Return the partial files that are known to be its beginning, or of no use for it.

        Where the client tells no SHA-256, it cannot read its file just now: what is worth keeping
        is there for the next run.
        """
        return {
            each
            for each in self.partials
            if each in here
            and (each.size < KEPT_BYTES or each.size > self.size or there.get(each.size))
        }


class LookUp:
    """Finds what is here already of the entries of one batch, each path once; writes nothing."""

    def __init__(self, batch: Batch, since: float) -> None:
        self._batch = batch
        self._store = batch.store
        self._since = since  # the client has connected, a time.monotonic()
        self._began_s = time.monotonic()
        # By path: partial files, and finished ones by their names.
        self._found: dict[str, tuple[list[PartialFile], dict[str, os.stat_result]]] = {}
        # Entries, by path and size; and by path, where there are partial files.
        self._alike: defaultdict[tuple[str, int | None], int] = defaultdict(int)
        self._resumable: defaultdict[str, int] = defaultdict(int)
        self._open_left = {True: MAX_OPEN_PARTIALS, False: MAX_OPEN_PARTIALS}  # by whether own

    def find(self, entry: Entry) -> LookedUp | Wanted:
        """Return an entry with what is here of it. Raises Refused and OSError."""
        split_path(entry.path)
        if entry.is_folder:
            return Wanted(entry)
        folder = self._batch.folders.find(folder_of(entry))
        alike = (entry.path, entry.size)
        self._alike[alike] += 1
        if folder is None or entry.size is None or self._alike[alike] > MAX_ALIKE:
            return Wanted(entry)
        name = name_of(entry)
        if entry.path not in self._found:
            # Partial files first: one that gets its name meanwhile is a finished one then.
            left = list(self._reopen_partials(folder, name))
            there = self._store.with_fitting(
                folder, name, lambda name: self._finished(folder, name)
            )
            self._found[entry.path] = left, there
        partials, finished = self._found[entry.path]
        if partials:
            self._resumable[entry.path] += 1
            if self._resumable[entry.path] > MAX_ALIKE:
                partials = []
        same = [each for each, found in finished.items() if found.st_size == entry.size]
        same.sort(key=lambda each: finished[each].st_mtime_ns == entry.mtime_ns)
        if partials or same:
            return LookedUp(entry, entry.size, partials, same[-MAX_CANDIDATES:])
        return Wanted(entry)

    def _reopen_partials(self, folder: Folder, name: str) -> Iterator[PartialFile]:
        """Open what earlier runs have left of a file."""
        place = Place(name, self._batch.client, self._store)
        for hidden in self._store.find_leftovers(folder, place, self._since):
            is_own = has_tag(hidden, place.holder.tag)
            if not self._open_left[is_own]:
                continue
            if partial := PartialFile.reopen(folder, hidden, place, self._began_s):
                self._open_left[is_own] -= 1
                self._batch.partials.append(partial)
                yield partial

    def _finished(self, folder: Folder, name: str) -> dict[str, os.stat_result]:
        """Return the finished files of a name, and of that with a number."""
        finished = {}
        for number, each in self._store.numbered(folder, name, MAX_NUMBERED):
            try:
                found = folder.stat(each)
            except FileNotFoundError:
                if number:
                    self._store.numbers.note((folder.identity, name), number)
                break
            if stat.S_ISREG(found.st_mode):
                finished[each] = found
            if self._batch.store.overwrite:
                break
        return finished


# --- one file -------------------------------------------------------------------------------

# What has come of a segment on a slow line is written after so long.
PIECE_S = 1.0
DISK_FULL = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
STATUS_NAME_CHARS = 30
CHECKSUM_BYTES = hashlib.sha256().digest_size
# A client waits half a second to gather more than this in a segment or an offer, but at the end.
SMALL_BYTES = 4096


def is_large(entry: Entry) -> bool:
    """Return whether a file takes a while to arrive."""
    return entry.size is None or entry.size > SEGMENT_BYTES


def mode_of(entry: Entry) -> int:
    """Return which permissions an entry may have here: none that it does not have there."""
    if entry.mode is not None:
        return entry.mode
    return 0o777 if entry.is_folder else 0o666


def making_mode(entry: Entry) -> int:
    """Return with which permissions a folder is made for an entry."""
    return 0o777 if entry.mode is None else UNFINISHED_MODE


class UnderWay:
    """A file whose bytes are arriving, until it has its name."""

    def __init__(self, batch: Batch, wanted: Wanted, partial: PartialFile) -> None:
        self.entry = wanted.entry
        self.partial = partial
        self._batch = batch
        self._store = batch.store
        self._different = wanted.different
        self._offset = partial.size
        self._started_s = time.monotonic()

    @property
    def bytes_left(self) -> int:
        """How many bytes are still to come; 0 where nobody knows."""
        return max(0, (self.entry.size or 0) - self.partial.size)

    def write(self, view: memoryview) -> None:
        """Write and hash its next bytes; blocks until done. Raises OSError."""
        if self.entry.size is None:
            room = self._store.room_for(self._batch.client, self.partial.folder)
            if len(view) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.partial.write(view)

    def needs(self, device: int) -> int:
        """Return how much of a file system is kept free for it. For any thread.

        That is as much as has come: who offers much and sends nothing keeps nothing from others.
        """
        come = max(0, self.partial.size - self._offset)  # `make_room` makes it shorter
        return min(self.bytes_left, come) if self.partial.folder.device == device else 0

    # the end

    def settle(self, checksum: bytes) -> Outcome:
        """Give it its name if it is what was offered; raises Refused, OSError."""
        if self.entry.size not in (None, self.partial.size) or (
            checksum != self.partial.digest.digest()
        ):
            raise Refused("its SHA-256 does not match: it changed while it was sent")
        if self.partial.is_touched():
            raise Refused("another program writes to its hidden file here")
        self.partial.flush()
        self.partial.set_metadata(self.entry.mtime_ns, mode_of(self.entry))
        try:
            return self._store.with_fitting(
                self.partial.folder, name_of(self.entry), self._take_name
            )
        except FileNotFoundError:
            self._batch.folders.forget()  # those after it may go on
            raise Refused(FOLDER_GONE) from None

    def _take_name(self, name: str) -> Outcome:
        """Give it `name`, or that with a number, unless the same is there already."""
        folder = self.partial.folder
        if self.partial.move_to(name) or self._replace(name):
            return self._batch.settle("saved", folder, name)
        for number, each in self._store.numbered(folder, name, MAX_CANDIDATES):
            if number and self.partial.move_to(each):
                self._store.numbers.note((folder.identity, name), number + 1)
                break
            if self._is_same(each):
                self.partial.discard()
                return self._batch.settle("already", folder, each)
        return self._batch.settle("saved", folder, each)

    def _replace(self, name: str) -> bool:
        """Replace a file, but not one that this run has sent, or found here, under a like name."""
        batch = self._batch
        if not batch.store.overwrite or batch.is_settled(self.partial.folder, name):
            return False
        return self.partial.replace(name)

    def _is_same(self, name: str) -> bool:
        """Return whether a finished file has the same content: if not, that was a guess at it.

        What is empty guesses nothing.
        """
        guesses, host = self._store.mismatches, self._batch.client.host
        folder, size = self.partial.folder, self.partial.size
        if name in self._different or (size and guesses.reserve(host) is None):
            return False
        found = self._store.read_finished(folder, name, size, lambda _: None)
        is_same = found == self.partial.digest.hexdigest()
        if size and (is_same or not found):
            guesses.give_back(host, 1)
        return is_same

    def leave(self, error: BaseException) -> str:
        """Keep what has come, after `error`, if another run can use it; return words about that."""
        number = error.errno if isinstance(error, OSError) else 0
        if self.entry.size is None or number == errno.EFBIG:
            self.partial.discard()
        elif number in DISK_FULL:
            self.partial.make_room()
        kept = self.partial.keep()
        shown = f"{format_bytes(kept)} of {escape(self.entry.path)}"
        return f"; {shown} are kept for the next run" if kept else ""

    # in words

    def describe_progress(self) -> str:
        """Return its name and how far it is, for a status line. For any thread."""
        size, name = self.partial.size, escape(name_of(self.entry), STATUS_NAME_CHARS)
        speed = format_bytes((size - self._offset) / self._seconds())
        if not self.entry.size:
            return f"{name} {format_bytes(size)}, {speed}/s"
        done = 100 * size // self.entry.size
        return f"{name} {done} % of {format_bytes(self.entry.size)}, {speed}/s"

    def _seconds(self) -> float:
        return max(1e-6, time.monotonic() - self._started_s)

    def describe_rest(self) -> str:
        """Return how much of it is to come."""
        return f"{format_bytes(self.bytes_left)}{self._of_whole(self.entry.size or 0)}"

    def describe_sent(self) -> str:
        """Return how much of it has come, how fast unless that means nothing, and what it is."""
        size, seconds = self.partial.size, self._seconds()
        count, speed = size - self._offset, ""
        if common.tells_speed(count, seconds):
            speed = f" in {seconds:.2f} s ({format_bytes(count / seconds)}/s)"
        digest = self.partial.digest.hexdigest()[:8]
        return f"{format_bytes(count)}{self._of_whole(size)}{speed}, SHA-256 {digest}"

    def _of_whole(self, size: int) -> str:
        return f" (the rest of {format_bytes(size)})" if self._offset else ""


class Content:
    """The bytes of one file on a connection: segments, then the SHA-256 of the whole.

    `note_sign` is told of each sign of life, and of each segment that is hardly more.
    """

    def __init__(
        self,
        connection: Connection,
        note_sign: Callable[[], object],
        size: int | None,
        offset: int,
    ) -> None:
        self._connection = connection
        self._note_sign = note_sign
        self._size = size
        # A large file's bytes go straight into the blocks; many small files come with one call.
        self._ahead = (
            common.RECEIVE_BYTES if size is not None and size < common.RECEIVE_BYTES else 0
        )
        self.received = offset  # with those that were here before
        self.is_over = False
        self._segment_left = 0
        self._is_small = False  # the segment
        self._has_ended = False  # but for its SHA-256

    def read(self, blocks: Blocks) -> bytes:
        """Hand all of it to `blocks`; return the client's SHA-256 of the whole.

        Blocks until all is there. Raises Refused where the client gives up, ProtocolError, whatever
        `blocks` raises, and ConnectionLost once it has handed over all that had come.
        """
        while self.has_more():
            block = blocks.take()[: self._segment_left]
            count = self._connection.read_some(block, PIECE_S)
            self.received += count
            self._segment_left -= count
            blocks.give(block[:count])
        checksum = self._connection.read(CHECKSUM_BYTES)
        self.is_over = True
        return checksum

    def has_more(self) -> bool:
        """Return whether bytes of it come next; blocks until that is known.

        Raises Refused, ProtocolError and ConnectionLost.
        """
        while not (self._segment_left or self._has_ended):
            header = self._connection.read(common.LENGTH.size, self._ahead)
            (length,) = common.LENGTH.unpack(header)
            if length == common.GIVEN_UP:
                self.is_over = True
                raise Refused("the client cannot read it, or it has changed there")
            if length == common.END_OF_FILE:
                self._has_ended = True
            elif length == common.STILL_HERE:
                self._note_sign()
            else:
                self._begin_segment(length)
        return not self._has_ended

    def _begin_segment(self, length: int) -> None:
        if length > SEGMENT_BYTES:
            raise ProtocolError(f"received a segment of {length} bytes")
        if self._size is not None and self.received + length > self._size:
            raise ProtocolError("received more of a file than was offered")
        if self._is_small:  # and was not the last
            self._note_sign()
        self._is_small = length < SMALL_BYTES
        self._segment_left = length

    def pass_over(self) -> None:
        """Read and drop the rest."""
        with contextlib.suppress(Refused):
            self.read(Blocks(lambda view: None))


# --- file conversation ----------------------------------------------------------------------

# In the log, for one batch: what is more is counted.
LINES_A_BATCH = 10
# A file of which so much is to come has a line in the log when it begins.
LARGE_BYTES = 64 * 1024 * 1024
ENTRIES_BETWEEN_CHECKS = 64
# Signs of life that may come at once, as a connection or this machine may have stood; and for good.
SIGNS_AT_ONCE = 1_000
SIGN_SPACING_S = 0.25
MAX_COMPARISON_WAIT_S = 300.0
# Looking up takes one part in so many more, while a large file arrives.
LOOKING_UP_SHARE = 4


def spell_path(path: str) -> str:
    """Return `path` in a line of the log, in a way that the shell's ``printf %b`` undoes.

    Control codes become the octal numbers of their bytes, as do backslashes, but where they
    separate folders.
    """
    return "".join(
        char
        if char.isprintable() and (char != "\\" or os.sep == "\\")
        else "".join(f"\\0{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in path
    )


def handle_file_client(connection: Connection, store: Store) -> None:
    """Take all the files that one client sends; blocks until it is done. Errors are logged."""
    reception = Reception(connection, store)
    try:
        with contextlib.closing(reception), store.attend(reception):
            while (offer := reception.receive_offer()) is not None:
                reception.receive_batch(offer)
    except ProtocolError as error:
        store.log.write(f"{connection.peer}: {error}", host=reception.host)
        with contextlib.suppress(SocketPairError):
            connection.send(common.Error(str(error)))
            connection.finish()
    except (SocketPairError, OSError) as error:
        reason = escape(str(error))
        store.log.write(f"{connection.peer}: {reason}{reception.kept}", host=reception.host)


class Batch:
    """What the entries of one offer share: folders, partial files, space, lines of the log."""

    def __init__(self, store: Store, reception: Reception, run: str) -> None:
        self.store = store
        self.client = reception
        self.folders = Folders(store)
        self.partials: list[PartialFile] = []  # left by earlier runs
        self.differed = False
        self._run = run
        self._guesses = 0
        self._room: dict[int, float] = {}  # bytes that nothing of it needs yet, by file system
        self._lines: Counter[tuple[int, str]] = Counter()  # by level and what they say

    def fail(self, path: str, error: Exception) -> Outcome:
        """Return that an entry is not taken, and log it."""
        reason = describe_error(error)
        self._log(logging.WARNING, "failed", f"failed {escape(path)}: {reason}")
        return Outcome("failed", reason)

    def _log(self, level: int, kind: str, text: str) -> None:
        self._lines[level, kind] += 1
        if self._lines[level, kind] <= LINES_A_BATCH:
            self.store.log.write(f"{self.client.peer} {text}", level, self.client.host)

    def settle(self, kind: str, folder: Folder, name: str) -> Outcome:
        """Return that the client has a file here, "saved" or "already", which is noted."""
        if self.store.overwrite:
            with contextlib.suppress(OSError):  # one that is gone needs no note
                self.store.settled.note(self._settled_key(folder, name), True)
        if kind == "already":
            path = self.store.spell(folder, name)
            self._log(logging.INFO, "are there already", f"offers what is there already: {path}")
        return Outcome(kind, name)

    def is_settled(self, folder: Folder, name: str) -> bool:
        """Return whether the client has been told so in this run. Raises OSError."""
        return self.store.settled.find(self._settled_key(folder, name), False)

    def _settled_key(self, folder: Folder, name: str) -> tuple[str, int, int]:
        found = folder.stat(name)
        return self._run, found.st_dev, found.st_ino

    def reserve_guesses(self, number: int) -> float:
        """Return in how many seconds that `number` of entries with one path may be compared.

        They count as guesses at what is here until they are the same. Raises ProtocolError.
        """
        guesses = self.store.mismatches
        wait_s = guesses.reserve(self.client.host, MAX_COMPARISON_WAIT_S, number)
        if wait_s is None:
            raise ProtocolError("too much that differs came from this address: try again later")
        self._guesses = number
        return wait_s

    def check_room(self, wanted: Wanted) -> Wanted | Outcome:
        """Refuse what cannot fit before any of it is sent."""
        needed = (wanted.entry.size or 0) - wanted.offset
        try:
            if needed > 0:
                self._take_room(folder_of(wanted.entry), needed)
        except (Refused, OSError) as error:
            return self.fail(wanted.entry.path, error)
        return wanted

    def _take_room(self, path: str, needed: int) -> None:
        # On whose disk a folder will be that is not there yet, if none is mounted in between.
        folder = self.folders.find(path) or self.folders.find("")
        if folder is None:
            return
        device = folder.device
        if device not in self._room:
            self._room[device] = self.store.room_for(self.client, folder)
        if needed > self._room[device]:
            there = format_bytes(max(0, self._room[device]))
            raise Refused(f"the disk is too full ({format_bytes(needed)} needed, {there} free)")
        self._room[device] -= needed

    def close(self) -> None:
        """Release all that is still held, and log how much was left out."""
        for partial in self.partials:
            partial.keep()
        if self._guesses and not self.differed:
            self.store.mismatches.give_back(self.client.host, self._guesses)
        for (level, kind), lines in self._lines.items():
            if lines > LINES_A_BATCH:
                more = f"{self.client.peer} and {lines - LINES_A_BATCH} more {kind}"
                self.store.log.write(more, level, self.client.host)


class Reception:
    """The conversation with one client that sends files.

    Each entry of a batch goes through the same stages as at the client: offered (an
    Entry), looked up (LookedUp, then Wanted), under way (UnderWay), decided (an Outcome).
    """

    def __init__(self, connection: Connection, store: Store) -> None:
        self.kept = ""  # of the file that was under way, for the end of a log line
        self.large: UnderWay | None = None  # arriving; a small one is gone before it is shown
        self._connection = connection
        self._store = store
        self.peer = connection.peer
        self.host = host_of(connection.peer)
        self.tag = hashlib.sha256(self.host.encode()).hexdigest()[:8]
        self._who = (self.host, self.peer)
        self._signs = SignsOfLife(lambda: connection.send(Hashing()))  # while a disk is slow
        self._heard = RateLimiter(SIGNS_AT_ONCE, SIGN_SPACING_S)  # signs of life of the client
        self._began_s = time.monotonic()
        self._count = 0  # of files that were saved
        self._results: list[tuple[int, Outcome]] = []  # by index, not told yet
        self._told = Deadline(SIGN_INTERVAL_S)

    def close(self) -> None:
        """Send no signs of life any more. Idempotent."""
        self._signs.stop()

    # for other threads

    def silent_s(self) -> float:
        """Return for how long nothing has come from it; 0 while this side works for it."""
        return 0.0 if self._signs.is_on() else self._connection.silent_s()

    def end(self) -> None:
        """Break the connection, which then releases what it holds."""
        self._connection.wake()

    def released_turn(self) -> contextlib.AbstractContextManager[None]:
        """Release its turn inside the ``with`` block, for others; for its own thread, in a turn."""
        return self._store.looking_up.released(self._who)

    def needs(self, device: int) -> int:
        """Return how much of a file system is kept free for what is arriving. For any thread."""
        large = self.large
        return large.needs(device) if large else 0

    def describe(self) -> str:
        """Return what is arriving, a large file or many, and from where. For any thread."""
        if large := self.large:
            return f"{large.describe_progress()} from {self.host}"
        return f"{counted(self._count, 'file')} from {self.host}" if self._count else ""

    # offered

    def receive_offer(self) -> Offer | None:
        """Return the next batch; None when the client has hung up instead: it is done."""
        while True:
            try:
                size = self._connection.wait_for_frame()
            except PeerClosed:
                return None
            if size < SMALL_BYTES:
                self._note_sign()
            with self._signs, self._in_turn():
                message = self._connection.receive(Offer, Hashing)
            if isinstance(message, Offer):
                return message

    def _note_sign(self) -> None:
        """Count a sign of life, or what is hardly more; raises ProtocolError for too many."""
        if self._heard.reserve() is None:
            raise ProtocolError("received next to nothing, too often")

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Let others wait inside the ``with`` block, which takes the processor.

        It takes no more than a share of the time while a large file arrives from somebody.
        """
        turns = self._store.looking_up
        with turns.turn(self._who):
            try:
                yield
            finally:
                if self._store.has_large_arrival():
                    turns.rest(LOOKING_UP_SHARE)

    def receive_batch(self, offer: Offer) -> None:
        """Answer an offer, take what is then sent, and say what became of each entry."""
        batch = Batch(self._store, self, offer.run or self.peer)
        try:
            self._receive(batch, offer)
        finally:
            with self._signs:
                batch.close()

    def _receive(self, batch: Batch, offer: Offer) -> None:
        with self._signs, self._in_turn():
            looked_up = self._look_up(batch, offer)
        compared = self._compare(batch, looked_up)
        with self._signs:
            decided = [
                batch.check_room(each) if isinstance(each, Wanted) else each for each in compared
            ]
        start = [each.offset if isinstance(each, Wanted) else each for each in decided]
        self._connection.send(common.Start(start))
        for index, each in enumerate(decided):
            if isinstance(each, Wanted):
                self._transfer(batch, index, each)
        self._tell_results()

    # looked up

    def _look_up(self, batch: Batch, offer: Offer) -> list[LookedUp | Wanted | Outcome]:
        """Find what is here of each entry already; nothing is written yet."""
        look_up = LookUp(batch, self._began_s)
        looked_up: list[LookedUp | Wanted | Outcome] = []
        for index, entry in enumerate(offer.entries):
            if index % ENTRIES_BETWEEN_CHECKS == 0 and self._connection.is_gone():
                raise PeerClosed
            if isinstance(entry, Outcome):
                looked_up.append(batch.fail("an entry", Refused(entry.text)))
                continue
            try:
                looked_up.append(look_up.find(entry))
            except (Refused, OSError) as error:
                looked_up.append(batch.fail(entry.path, error))
        return looked_up

    def _compare(
        self, batch: Batch, looked_up: Sequence[LookedUp | Wanted | Outcome]
    ) -> list[Wanted | Outcome]:
        """Return what is done with each entry; blocks until both sides have read their files."""
        held = {index: each for index, each in enumerate(looked_up) if isinstance(each, LookedUp)}
        checksums = self._ask(batch, held) if held else {}
        taken: set[PartialFile] = set()
        with self._signs:
            decided = [
                each.decide(batch, *checksums[index], taken) if isinstance(each, LookedUp) else each
                for index, each in enumerate(looked_up)
            ]
            compared = [each.compared(*checksums[index]) for index, each in held.items()]
            self._put_away(set(batch.partials) - taken, set().union(*compared))
        return decided

    def _put_away(self, partials: set[PartialFile], compared: set[PartialFile]) -> None:
        """Remove those of `partials` that are of no use to anyone, and release the others."""
        for partial in partials:
            with contextlib.suppress(OSError):  # of a network, at the end of any file
                # A client of another address may continue what was made for it.
                if partial in compared and has_tag(partial.name, self.tag):
                    partial.discard()
                else:
                    partial.close()

    def _ask(
        self, batch: Batch, held: dict[int, LookedUp]
    ) -> dict[int, tuple[Checksums, dict[int, str]]]:
        """Return, for each entry, the SHA-256 of what is here, and of the client's by length."""
        guesses: Counter[Hashable] = Counter((each.entry.path, each.size) for each in held.values())
        guesses.update(each.entry.path for each in held.values() if each.partials)
        deadline = Deadline(batch.reserve_guesses(max(guesses.values())))
        with self._signs:
            while left_s := deadline.remaining():
                time.sleep(min(left_s, SIGN_INTERVAL_S))
                self._signs.check()
        lengths = [(index, each.held()) for index, each in held.items()]
        began_s = time.monotonic()
        self._connection.send(common.Held(lengths))
        with self._signs:
            here = [each.read(batch, self._signs.check) for each in held.values()]
        answers = self._receive_prefixes(len(held), time.monotonic() - began_s)
        return {
            index: (its, dict(zip(each.held(), checksums, strict=False)))
            for (index, each), its, checksums in zip(held.items(), here, answers, strict=True)
        }

    def _receive_prefixes(self, count: int, unread_s: float) -> Sequence[Sequence[str]]:
        """Return the client's answer to Held; its signs of life of `unread_s` are there already."""
        gathered = unread_s / SIGN_SPACING_S
        while isinstance(message := self._connection.receive(common.Prefixes, Hashing), Hashing):
            gathered -= 1
            if gathered < 0:
                self._note_sign()
        if len(message.entries) != count:
            raise common.BadField("entries")
        return message.entries

    # under way

    def _transfer(self, batch: Batch, index: int, wanted: Wanted) -> None:
        """Take one entry, and note what has become of it."""
        entry = wanted.entry
        if entry.is_folder:
            with self._signs:
                outcome = self._finish_folder(batch, entry)
            self._results.append((index, outcome))
            return
        if is_large(entry) or not self._connection.buffered() or self._told.remaining() == 0:
            self._tell_results()  # before what may take a while
        content = Content(self._connection, self._note_sign, entry.size, wanted.offset)
        try:
            content.has_more()  # nothing is made here for a file of which nothing comes
            outcome = self._receive_file(batch, wanted, content)
        except (Refused, OSError) as error:
            outcome = batch.fail(entry.path, error)
            self.kept = ""  # the conversation goes on
        self._results.append((index, outcome))
        if not content.is_over:
            # Let the client know, so that it stops sending what nobody can keep.
            self._tell_results()
            content.pass_over()

    def _finish_folder(self, batch: Batch, entry: Entry) -> Outcome:
        """Make an offered folder, or find it there; it comes after all that is in it."""
        store = self._store
        try:
            folder = batch.folders.make(entry.path, making_mode(entry))
            mode = None
            if folder.is_unfinished:
                mode = (mode_of(entry) | stat.S_IRWXU) & ~store.umask | folder.set_group_id
            folder.finish(entry.mtime_ns, mode)
            return Outcome("saved", store.rules_in(folder).fit(name_of(entry)))
        except (Refused, OSError) as error:
            return batch.fail(entry.path, error)

    def _receive_file(self, batch: Batch, wanted: Wanted, content: Content) -> Outcome:
        """Take a file's bytes and give it its name; raises OSError and Refused."""
        with self._signs:
            under_way = self._begin(batch, wanted)
        self.large = under_way if is_large(wanted.entry) else None

        def write(view: memoryview) -> None:
            with self._signs:
                under_way.write(view)

        try:
            with common.blocks_for(wanted.entry.size, write) as blocks:
                checksum = content.read(blocks)
            with self._signs:
                outcome = under_way.settle(checksum)
        except BaseException as error:
            with self._signs:
                self.kept = under_way.leave(error)
            raise
        finally:
            self.large = None
        self._count += 1
        if outcome.kind == "saved" and log.isEnabledFor(logging.INFO):
            # The path is the only word of the client's, and the last: nothing in a name can be
            # taken for another part of the line by whoever reads it.
            path = self._store.spell(under_way.partial.folder, outcome.text)
            log.info(SAVED_LINE, self.peer, under_way.describe_sent(), path)
        return outcome

    def _begin(self, batch: Batch, wanted: Wanted) -> UnderWay:
        """Open the partial file of an entry, in its folder, which is made if it is missing."""
        entry = wanted.entry
        path, mode = folder_of(entry), making_mode(entry)
        folder = batch.folders.make(path, mode)
        try:
            partial = wanted.beginning or self._create(folder, entry)
        except FileNotFoundError:  # removed since it was looked up
            batch.folders.forget()
            partial = self._create(batch.folders.make(path, mode), entry)
        under_way = UnderWay(batch, wanted, partial)
        if under_way.bytes_left >= LARGE_BYTES:
            name = self._store.rules_in(partial.folder).fit(name_of(entry))
            shown = self._store.spell(partial.folder, name)
            log.info(f"{self.peer} begins to send {under_way.describe_rest()}: {shown}")
        return under_way

    def _create(self, folder: Folder, entry: Entry) -> PartialFile:
        place = Place(name_of(entry), self, self._store)
        if is_large(entry):
            return PartialFile.create(folder, place)
        return PartialFile.create_nameless(folder, place, mode_of(entry))

    # decided

    def _tell_results(self) -> None:
        if self._results:
            self._connection.send(common.Results(self._results))
            self._results = []
        self._told = Deadline(SIGN_INTERVAL_S)


# --- sound: inputs --------------------------------------------------------------------------

DEFAULT_RATE = 48_000
# Of blocks of 2.5 ms, PortAudio captures two at once; of 3 ms each by itself, which comes 3 ms
# earlier in the mean.
CAPTURE_BLOCK_MS = 3.0
# What may wait between capture and broadcaster; more has gathered only on a machine that stood.
CAPTURE_LIMIT_MS = 2_000
SILENCE_LIMIT_MS = 10_000
PACING_SLACK_S = 0.2
# The beginning of a file takes a while to be found again and decoded: longer than a block.
READ_AHEAD_PARTS = 16
PIPE_BYTES = 512  # of a pipe, in a part: what has been read ahead of it is late
# A microphone is not believed that says of a block that it was captured by so much before what came
# before it, unless it says so for so long.
IMPLAUSIBLE_S, BELIEVED_S = 0.03, 5.0


class CaptureQueue:
    """Hands captured sound from whichever input there is to the broadcaster, and numbers it.

    One thread puts, another takes. Sound that is not taken for ``CAPTURE_LIMIT_MS`` is thrown
    away as it comes; the numbers of the frames show it.
    """

    def __init__(self, audio: AudioFormat) -> None:
        self.audio = audio
        self.end_reason = "the server has stopped"
        self.failed = False
        self._blocks: queue.SimpleQueue[AudioBlock | None] = queue.SimpleQueue()
        self._limit_frames = audio.frames_in(CAPTURE_LIMIT_MS)
        self._next_frame = 0
        self._believed_frame = 0  # the last one of which it was told plausibly when it passed
        self._taken_frames = 0
        self._held: AudioBlock | None = None
        self._line = common.TimeLine(audio.rate)

    def put(self, samples: bytes, ago_s: float = 0.0) -> None:
        """Hand over a block, whose last frame was captured `ago_s` before. Never blocks."""
        frames = self.audio.frames_of(samples)
        next_frame = self._next_frame + frames
        captured_s = self._find_captured_s(next_frame, common.clock_s(), ago_s)
        if (self._blocks.qsize() + 1) * frames <= self._limit_frames:
            self._blocks.put(AudioBlock(self._next_frame, round(captured_s * 1e9), samples))
        self._next_frame = next_frame

    def _find_captured_s(self, frame: int, now_s: float, ago_s: float) -> float:
        """Return when `frame` was captured, by the line, which sees it `ago_s` before `now_s`.

        PulseAudio says for seconds after it has opened a microphone, and for a moment as its
        latency changes, that sound is older than what came before it. So the line begins with what
        comes first, as if that were new, and goes back only where it is told so for long.
        """
        expected_s = self._line.at(frame)
        if expected_s == -math.inf:
            ago_s = 0.0
        if not ago_s or expected_s - (now_s - ago_s) < IMPLAUSIBLE_S:
            self._believed_frame = frame
        elif frame - self._believed_frame < BELIEVED_S * self.audio.rate:
            if expected_s <= now_s:
                return expected_s
            ago_s = 0.0  # what came first was late
        return self._line.see(frame, now_s - ago_s)

    def skip(self, seconds: float) -> None:
        """Count frames that nobody captured for so long, so that the numbers keep time.

        What comes then is timed by itself.
        """
        self._next_frame += self.audio.frames_in(seconds * 1000)
        self._line = common.TimeLine(self.audio.rate)

    def end(self, reason: str, failed: bool = False) -> None:
        """Let the taker know, once all is taken, that nothing more comes, and why."""
        self.end_reason, self.failed = reason, failed
        self._blocks.put(None)

    def take(self, timeout_s: float) -> AudioBlock | None:
        """Return all sound without a gap that has gathered, as one block; None at the end.

        Blocks up to `timeout_s`; an empty block if none came by then.
        """
        try:
            first = self._held or self._blocks.get(timeout=timeout_s)
        except queue.Empty:
            return AudioBlock(self._taken_frames, common.clock_ns(), b"")
        self._held = None
        return self._join_gathered(first) if first else None

    def _join_gathered(self, first: AudioBlock) -> AudioBlock:
        """Return `first` with the blocks joined that directly follow it."""
        parts, last = [first.samples], first
        frames = self.audio.frames_of(first.samples)
        most_frames = self.audio.frames_in(common.MAX_BLOCK_MS / 2)
        with contextlib.suppress(queue.Empty):
            while frames < most_frames:
                following = self._blocks.get_nowait()
                if following is None:
                    self._blocks.put(None)
                    break
                if following.first_frame != first.first_frame + frames:
                    self._held = following
                    break
                parts.append(following.samples)
                frames += self.audio.frames_of(following.samples)
                last = following
        self._taken_frames = first.first_frame + frames
        return AudioBlock(first.first_frame, last.captured_ns, b"".join(parts))


class Microphone:
    """Captures from a sound card from the first moment on. Raises AudioUnavailable."""

    def __init__(self, card: common.SoundCard, audio: AudioFormat) -> None:
        self.name = card.device.shown
        self.captured = CaptureQueue(audio)
        self._card = card
        self._silent_frames = 0  # of zeros alone; no real microphone is that quiet
        self._is_silence_told = False
        card.open(common.StreamSettings(audio, CAPTURE_BLOCK_MS, self._hand_over))

    def _hand_over(self, samples: bytes | None, info: common.BlockInfo) -> None:
        """Take a block; PortAudio's thread calls this."""
        captured, audio = samples or b"", self.captured.audio
        if info.lost_s:
            self.captured.skip(info.lost_s)  # what a card that was away has not captured
        self.captured.put(captured, max(0.0, info.away_s - info.frames / audio.rate))
        is_silent = captured.count(0) == len(captured)
        self._silent_frames = self._silent_frames + audio.frames_of(captured) if is_silent else 0
        is_long = self._silent_frames >= audio.frames_in(SILENCE_LIMIT_MS)
        if is_long and not self._is_silence_told:
            self._is_silence_told = True
            log.warning(
                "the microphone %s has given nothing but zeros for %d s: is it muted, or another "
                "one meant (see --list-devices)?",
                self.name,
                SILENCE_LIMIT_MS // 1000,
            )

    def close(self) -> None:
        """Stop to capture."""
        self._card.close()


def open_microphone(wanted: str | None, rate: int | None, channels: int | None) -> Microphone:
    """Return a microphone; in 48,000 Hz mono if it can, unless told. Raises AudioUnavailable."""
    with contextlib.ExitStack() as closing:
        card = closing.enter_context(
            contextlib.closing(common.SoundCard(common.MICROPHONE, wanted, log.warning))
        )
        usual = AudioFormat(rate or DEFAULT_RATE, channels or 1)
        own = card.device.own_format
        own = AudioFormat(rate or own.rate, channels or own.channels)
        try:
            microphone = Microphone(card, usual)
        except AudioUnavailable:
            if own == usual:
                raise
            microphone = Microphone(card, own)
        closing.pop_all()
    return microphone


class PacedInput:
    """Takes sound that is not live in real time, from now on.

    `parts` gives its bytes in portions of any length, and may block. One thread reads some way
    ahead, another keeps time. A source that falls behind is not rushed after: time starts anew.
    """

    def __init__(self, name: str, parts: Iterator[bytes], captured: CaptureQueue) -> None:
        self.name = name
        self.captured = captured
        self._parts: queue.Queue[bytes] = queue.Queue(READ_AHEAD_PARTS)  # an empty one at the end
        self._error: Exception | None = None
        threading.Thread(target=self._read_ahead, args=(parts,), daemon=True).start()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def close(self) -> None:
        """Nothing to do: the threads end with the process, or their input."""

    def _read_ahead(self, parts: Iterator[bytes]) -> None:
        try:
            for part in filter(None, parts):
                self._parts.put(part)
        except Exception as error:  # noqa: BLE001  (is told)
            self._error = error
        self._parts.put(b"")

    def _run(self) -> None:
        audio = self.captured.audio
        block_bytes = audio.frames_in(CAPTURE_BLOCK_MS) * audio.frame_bytes
        start_s = due_s = common.clock_s()
        for samples in in_blocks(iter(self._parts.get, b""), block_bytes):
            frames = audio.frames_of(samples)  # without a last one that is incomplete
            due_s += frames / audio.rate
            late_s = common.clock_s() - due_s
            if late_s > PACING_SLACK_S:
                due_s += late_s
                self.captured.skip(0.0)  # what comes is not as old as if there had been no pause
            elif late_s < 0:
                time.sleep(-late_s)
            self.captured.put(samples[: frames * audio.frame_bytes])
        if self._error:
            reason = describe_error(self._error)
            self.captured.end(f"{self.name} cannot be read any further ({reason})", failed=True)
        elif due_s == start_s:  # whoever was to write there has failed, most likely
            self.captured.end(f"there was no sound on {self.name}", failed=True)
        else:
            self.captured.end(f"{self.name} is at its end")


def in_blocks(parts: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Give the bytes of `parts` in blocks of `size`, and then what is left."""
    unread = b""
    for part in parts:
        unread += part
        while len(unread) >= size:
            yield unread[:size]
            unread = unread[size:]
    if unread:
        yield unread


def open_input(args: argparse.Namespace) -> Microphone | PacedInput:
    """Return what ``--input`` names, at work. Raises SocketPairError where there is none."""
    if args.input is not None and names_sound_file(args.input):
        return open_sound_file(args.input, args.rate, args.channels)
    if args.input != STDIN:
        return open_microphone(args.input, args.rate, args.channels)
    if sys.stdin.isatty():
        raise SocketPairError(
            "--input - is for another program or a file, not for a terminal: add | or <"
        )
    audio = AudioFormat(args.rate or DEFAULT_RATE, args.channels or 1)
    parts = iter(lambda: os.read(sys.stdin.fileno(), PIPE_BYTES), b"")
    return PacedInput("standard input", parts, CaptureQueue(audio))


# --- sound: files ---------------------------------------------------------------------------

# Names that end so are files, also where there is none of that name to be found.
SOUND_ENDINGS = (
    *(".wav", ".wave", ".w64", ".rf64", ".mp3", ".mp2", ".flac", ".ogg", ".oga", ".opus", ".spx"),
    *(".m4a", ".m4b", ".mp4", ".mka", ".mkv", ".webm", ".aac", ".ac3", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".caf", ".wma", ".wv", ".ape", ".tta", ".amr"),
)
PATH_BEGINNINGS = ("/", "./", "../", "~", ".\\", "..\\")
READ_BYTES = 16 * 1024
WAV_CHUNK = struct.Struct("<4sI")
WAV_FORMAT = struct.Struct("<HHIIHH")
WAV_FORMAT_BYTES = 40  # with what WAVE_FORMAT_EXTENSIBLE has more
WAV_PCM, WAV_EXTENSIBLE = 1, 0xFFFE
WAV_ENCODINGS = {2: "ADPCM", 3: "floating-point", 6: "A-law", 7: "mu-law", 17: "ADPCM", 85: "MP3"}
# What recorders write for a size that they do not know yet, and were killed before: this or more,
# or 0.
WAV_UNKNOWN_BYTES = 0x7FFF_0000
# Their headers tell the exact length: with less than that decoded, such a file is broken.
EXACT_CODECS = ("flac", "alac", "wavpack", "tta", "ape")
PLAIN_LAYOUTS = {"1 channels": "mono", "2 channels": "stereo"}


class Unplayable(SocketPairError):
    """A sound file that cannot be read, or no further, and why."""


class NotPlainWav(Unplayable):
    """A file that is not WAV with 16-bit PCM, but may be sound all the same; and what it is."""


class PlainWav:
    """A WAV file with 16-bit PCM, read as it is."""

    def __init__(self, path: str) -> None:
        """Raise NotPlainWav where it is something else, and OSError."""
        self._path = path
        with open(path, "rb") as file:
            self.audio, self._start, self._size = find_wav_samples(file)

    def read_once(self) -> Iterator[bytes]:
        """Give all the file's sound in `audio`, in parts of any length; blocks for the disk.

        A part may end inside a frame, the whole does not. Raises Unplayable where the file is
        broken, after all that could be read, and OSError.
        """
        with open(self._path, "rb", buffering=0) as file:
            file.seek(self._start)
            left = self._size - self._size % self.audio.frame_bytes
            while left:
                samples = file.read(min(READ_BYTES, left))
                if not samples:
                    seconds = left / self.audio.frame_bytes / self.audio.rate
                    raise Unplayable(f"the last {seconds:.3g} s of it are missing")
                left -= len(samples)
                yield samples


def find_wav_samples(file: BinaryIO) -> tuple[AudioFormat, int, int]:
    """Return the format of a WAV file's 16-bit PCM, where it starts, and how many bytes it has.

    Raises NotPlainWav where there is none.
    """
    beginning = file.read(12)
    if beginning[:4] != b"RIFF" or beginning[8:] != b"WAVE":
        raise NotPlainWav(describe_ending(str(file.name)))
    audio = None
    while len(header := file.read(WAV_CHUNK.size)) == WAV_CHUNK.size:
        kind, size = WAV_CHUNK.unpack(header)
        start = file.tell()
        if kind == b"fmt ":
            audio = parse_wav_format(file.read(min(size, WAV_FORMAT_BYTES)))
        elif kind == b"data" and audio and file.read(1):
            if size == 0 or size >= WAV_UNKNOWN_BYTES:
                size = os.fstat(file.fileno()).st_size - start
            return audio, start, size
        file.seek(start + size + size % 2)
    raise NotPlainWav("WAV without samples")


def parse_wav_format(fields: bytes) -> AudioFormat:
    """Return what a ``fmt`` chunk says; raises NotPlainWav, or Unplayable for what is no sound."""
    if len(fields) < WAV_FORMAT.size:
        raise NotPlainWav("WAV with a broken header")
    encoding, channels, rate, _, frame_bytes, bits = WAV_FORMAT.unpack_from(fields)
    if encoding == WAV_EXTENSIBLE and len(fields) == WAV_FORMAT_BYTES:
        encoding = int.from_bytes(fields[24:26], "little")
    if not channels or not rate:
        raise Unplayable(f"its header says that it has {channels} channels at {rate} Hz")
    audio = AudioFormat(rate, channels)
    if encoding != WAV_PCM:
        raise NotPlainWav(f"WAV with {WAV_ENCODINGS.get(encoding, 'compressed')} samples")
    if bits != 8 * common.SAMPLE_BYTES or frame_bytes != audio.frame_bytes:
        raise NotPlainWav(f"WAV with {bits}-bit samples")
    if rate not in common.SAMPLE_RATES or channels not in common.CHANNEL_COUNTS:
        raise NotPlainWav(f"WAV with {audio.describe()}, which is out of range")
    return audio


def describe_ending(path: str) -> str:
    """Return what a file is by the ending of its name, which is no WAV file; fit for a terminal."""
    kind = escape(os.path.splitext(path)[1][1:].upper())
    return "not a WAV file" if kind in ("", "WAV", "WAVE") else kind


class DecodedFile:
    """A file that FFmpeg reads (package ``av``), converted if not wanted in its own format."""

    def __init__(self, path: str, rate: int | None, channels: int | None) -> None:
        """Raise Unplayable where it cannot be read, ImportError without ``av``."""
        try:
            import av  # noqa: PLC0415  (only these files need it)
        except common.LOAD_ERRORS as error:
            raise ImportError(str(error)) from None
        self._av = av
        self._path = path
        self._url = f"file:{path}"  # FFmpeg would read from the network as well
        with self._opened() as container:
            first = next(decode_frames(container), None)
            if first is None:
                raise Unplayable("there is no sound in it")
            own = AudioFormat(first.sample_rate, len(first.layout.channels))
            self.audio = AudioFormat(
                rate or (own.rate if own.rate in common.SAMPLE_RATES else DEFAULT_RATE),
                channels or (own.channels if own.channels in common.CHANNEL_COUNTS else 2),
            )
            list(Converter(av, self.audio).convert(first))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open it for the ``with`` block; what FFmpeg raises there is raised as Unplayable."""
        options = {"protocol_whitelist": "file"}
        try:
            with self._av.open(self._url, metadata_errors="replace", options=options) as container:
                yield container
        except self._av.error.FFmpegError as error:
            reason = (error.strerror or str(error)).lower()
            raise Unplayable(f"FFmpeg cannot read it ({reason})") from error

    def read_once(self) -> Iterator[bytes]:
        """Give all the sound, converted, as `PlainWav.read_once` does."""
        converter = Converter(self._av, self.audio)
        decoded = 0
        with self._opened() as container:
            for frame in decode_frames(container):
                decoded += frame.samples
                yield from converter.convert(frame)
            yield from converter.finish()
            check_length(container.streams.audio[0], decoded)
        check_riff_length(self._path)


SoundFile = PlainWav | DecodedFile


def decode_frames(container: Any) -> Iterator[Any]:
    """Give the frames of a container's first sound, but damaged ones; raises Unplayable."""
    if not container.streams.audio:
        raise Unplayable("there is no sound in it")
    damage = None
    stream = container.streams.audio[0]
    context = stream.codec_context
    if context is None:
        raise Unplayable("FFmpeg has no decoder for the sound in it")
    # A plain WAV file does not say which of its channels is left: the first, as everywhere.
    context.layout = PLAIN_LAYOUTS.get(context.layout.name, context.layout)
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except ValueError as error:  # av.error.InvalidDataError
            damage = error
            continue
        if frames:
            damage = None
        yield from frames
    if damage:
        raise Unplayable("its end is damaged")


def check_length(stream: Any, decoded: int) -> None:
    """Raise Unplayable where a file has fewer frames than its header tells."""
    name = stream.codec_context.name
    if stream.duration is None or not (name in EXACT_CODECS or name.startswith("pcm_")):
        return
    missing_s = float(stream.duration * stream.time_base) - decoded / stream.codec_context.rate
    if missing_s * stream.codec_context.rate >= 1:
        raise Unplayable(f"the last {missing_s:.3g} s of it are missing")


def check_riff_length(path: str) -> None:
    """Raise Unplayable where a WAV file is shorter than it says: FFmpeg tells of some kinds alone.

    Not for a few bytes: some programs count this header in the size, or leave off a last byte that
    fills up an odd length.
    """
    with open(path, "rb") as file:
        kind, size = WAV_CHUNK.unpack(file.read(WAV_CHUNK.size).ljust(WAV_CHUNK.size))
        there = os.fstat(file.fileno()).st_size
    if kind == b"RIFF" and there < size < WAV_UNKNOWN_BYTES:
        raise Unplayable("its end is missing")


class Converter:
    """Converts decoded frames to one format, also where theirs changes on the way."""

    def __init__(self, av: Any, audio: AudioFormat) -> None:
        self._av = av
        self._audio = audio
        self._source: tuple[Any, ...] = ()
        self._resampler: Any = None
        self._is_doubled = False

    def convert(self, frame: Any) -> Iterator[bytes]:
        """Give what has come out for this frame and those before it; raises Unplayable."""
        source = (frame.format.name, frame.layout.name, frame.sample_rate)
        if source != self._source:
            yield from self.finish()
            self._source, self._resampler = source, self._make_resampler(frame)
        frame.pts = None  # each follows the one before, whatever the file says
        yield from map(self._samples_of, self._resampler.resample(frame))

    def finish(self) -> Iterator[bytes]:
        """Give what is still inside."""
        if self._resampler:
            yield from map(self._samples_of, self._resampler.resample(None))

    def _make_resampler(self, frame: Any) -> Any:
        channels = len(frame.layout.channels)
        self._is_doubled = channels == 1 and self._audio.channels == 2
        layout = frame.layout
        if channels != self._audio.channels and not self._is_doubled:
            wanted = common.describe_channels(self._audio.channels)
            if "channels" in layout.name:  # it is not known which of them are left and right
                raise Unplayable(f"its {channels} channels cannot be mixed into {wanted}")
            layout = wanted
        return self._av.AudioResampler(format="s16", layout=layout, rate=self._audio.rate)

    def _samples_of(self, frame: Any) -> bytes:
        frame_bytes = common.SAMPLE_BYTES if self._is_doubled else self._audio.frame_bytes
        samples = bytes(frame.planes[0])[: frame.samples * frame_bytes]
        return double_channel(samples) if self._is_doubled else samples


def double_channel(samples: bytes) -> bytes:
    """Return mono as stereo, as loud on either side; FFmpeg would make it 3 dB less."""
    mono = array("h", samples)
    stereo = array("h", bytes(2 * len(samples)))
    stereo[0::2] = stereo[1::2] = mono
    return stereo.tobytes()


def over_and_over(sound: SoundFile) -> Iterator[bytes]:
    """Give a file's sound without an end; raises as its `read_once` does."""
    while True:
        has_sound = False
        for part in sound.read_once():
            has_sound = has_sound or bool(part)
            yield part
        if not has_sound:
            raise Unplayable("there is no sound in it")


def names_sound_file(text: str) -> bool:
    """Return whether ``--input`` means a file rather than a microphone."""
    if text.isdigit() or text == STDIN:
        return False
    is_path = text.lower().endswith(SOUND_ENDINGS) or text.startswith(PATH_BEGINNINGS)
    path = os.path.expanduser(text)
    return is_path or (os.path.exists(path) and not os.path.isdir(path))


def open_sound_file(name: str, rate: int | None, channels: int | None) -> PacedInput:
    """Return a sound file as an input; raises SocketPairError where it cannot be played."""
    try:
        sound = find_sound(os.path.expanduser(name), rate, channels)
    except (OSError, Unplayable) as error:
        raise SocketPairError(f"cannot play {escape(name)}: {describe_error(error)}") from error
    return PacedInput(escape(name), over_and_over(sound), CaptureQueue(sound.audio))


def find_sound(path: str, rate: int | None, channels: int | None) -> SoundFile:
    """Return the sound file at `path`, read as it is or converted; raises Unplayable, OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # what can be read over and over
        raise Unplayable("it is not a file; --input - plays what a pipe brings")
    try:
        plain = PlainWav(path)
        if plain.audio == AudioFormat(rate or plain.audio.rate, channels or plain.audio.channels):
            return plain
        problem = f"it is {plain.audio.describe()}, and converted only with the package av"
    except NotPlainWav as error:
        problem = f"it is {error}, and without the package av only 16-bit WAV plays"
    try:
        return DecodedFile(path, rate, channels)
    except ImportError:
        raise Unplayable(f"{problem}: {common.how_to_install('av')}") from None


# --- sound: encodings -----------------------------------------------------------------------

OPUS_KBIT_PER_CHANNEL = 256  # Opus has no more
# With "lowdelay" Opus looks so far ahead: RFC 6716 has 2.5 ms for CELT alone.
OPUS_LOOKAHEAD_FRAMES = 120
OPUS_BLOCK_BYTES = 21  # what a block has beside its packet
OPUS_OPTIONS = {"application": "lowdelay", "frame_duration": "10", "vbr": "off"}


class PcmEncoding:
    """Sends every block as it was captured. For the broadcaster's thread alone.

    `bytes_per_s` is about how much that takes.
    """

    def __init__(self, audio: AudioFormat) -> None:
        self.bytes_per_s = audio.rate * audio.frame_bytes

    def encode(self, block: AudioBlock) -> bytes:
        """Return what there is to send with `block`, as frames; nothing perhaps."""
        return block.encode()

    def finish(self) -> bytes:
        """Return what is left to send at the end of the sound, as frames."""
        return b""


class OpusEncoding:
    """Sends packets of 10 ms by ``av``, whatever comes; a gap has the encoder begin anew.

    What a packet is decoded to begins ``OPUS_LOOKAHEAD_FRAMES`` earlier than what it was made of.
    """

    def __init__(self, audio: AudioFormat, kbit: int) -> None:
        import av  # noqa: PLC0415  (only a listener with --opus needs it)

        self._av = av
        self._audio = audio
        self.kbit = kbit
        self._bits_per_s = 1000 * min(kbit, OPUS_KBIT_PER_CHANNEL * audio.channels)
        packets_per_s = common.OPUS_RATE // common.OPUS_FRAMES
        self.bytes_per_s = self._bits_per_s // 8 + packets_per_s * OPUS_BLOCK_BYTES
        self._layout = common.describe_channels(audio.channels)
        self._begin(0)

    def _begin(self, first_frame: int) -> None:
        """Encode what begins with that sample frame of the sound."""
        self._encoder = self._av.CodecContext.create("libopus", "w")
        self._encoder.sample_rate = common.OPUS_RATE
        self._encoder.layout, self._encoder.format = self._layout, "s16"
        self._encoder.bit_rate = self._bits_per_s
        self._encoder.options = OPUS_OPTIONS
        self._first_frame = first_frame
        self._taken = 0  # sample frames of the sound since
        self._captured_ns = 0  # the last of those taken
        self._packets = 0
        self._sent = 0  # sample frames of Opus in them

    def _at_opus_rate(self, frames: int) -> int:
        return round(frames * common.OPUS_RATE / self._audio.rate)

    def encode(self, block: AudioBlock) -> bytes:
        """Do as `PcmEncoding` does."""
        rest = b""
        if block.first_frame != self._first_frame + self._taken:
            rest = self.finish()
            self._begin(block.first_frame)
        return rest + self._encode(block)

    def _encode(self, block: AudioBlock) -> bytes:
        if not block.samples:
            next_frame = self._at_opus_rate(self._first_frame) + self._sent
            return AudioBlock(next_frame, block.captured_ns, b"").encode()
        frames = self._audio.frames_of(block.samples)
        frame = self._av.AudioFrame("s16", self._layout, frames)
        frame.planes[0].update(block.samples)
        frame.sample_rate = self._audio.rate
        self._taken += frames
        self._captured_ns = block.captured_ns
        return b"".join(map(self._pack, self._encoder.encode(frame)))

    def finish(self) -> bytes:
        """Do as `PcmEncoding` does."""
        if not self._taken:  # an encoder that has had nothing takes no end either
            return b""
        return b"".join(map(self._pack, self._encoder.encode(None)))

    def _pack(self, packet: Any) -> bytes:
        """Return a packet as a frame, without what was not captured, before or after the sound."""
        begin = self._packets * common.OPUS_FRAMES - OPUS_LOOKAHEAD_FRAMES
        self._packets += 1
        taken = self._at_opus_rate(self._taken)
        self._sent = min(begin + common.OPUS_FRAMES, taken)
        skipped = max(0, -begin)
        frames = self._sent - begin - skipped
        if frames <= 0:
            return b""
        captured_ns = self._captured_ns - (taken - self._sent) * 10**9 // common.OPUS_RATE
        first_frame = self._at_opus_rate(self._first_frame) + self._sent - frames
        packed = bytes(packet), skipped, frames
        return common.OpusBlock(first_frame, max(0, captured_ns), *packed).encode()


Encoding = PcmEncoding | OpusEncoding


# --- sound: broadcaster ---------------------------------------------------------------------

# An encoder takes 1 to 3 % of a core: whoever is let in shall not make the server run hundreds.
# Nor keep others from the usual one, which comes besides.
MAX_OPUS_RATES = 8
LISTENER_TIMEOUT_S = 5.0
SILENCE_S = 3600.0  # of a client, which need not say anything
REQUESTS_AT_ONCE = 200
REQUEST_SPACING_S = 0.05
SEND_BUFFER_MS = 200
MIN_SEND_BUFFER_BYTES = 16 * 1024
# What a small write takes there besides, as Linux counts it, until it is known to have arrived.
WRITE_BYTES = 1024
LONGEST_REST_S = 0.02
SIGN_BYTES = common.LENGTH.size + common.BLOCK_HEADER.size  # of a block without samples
# What has waited for longer until it went out is late; it is looked at so often.
LONGEST_WAIT_S, LOOK_INTERVAL_S = 0.5, 0.25


class Listener:
    """One client's end of the broadcast: takes blocks as fast as its network does, or misses them.

    A block that was begun is always finished, so that the client can tell where the next one
    starts. The broadcaster's thread calls `offer`, `end` and `lose`; the client's own thread
    `take_requests`, then `stop`, and `send_end` if it has not been lost.
    """

    def __init__(self, connection: Connection, encoding: Encoding) -> None:
        self.connection = connection
        self.encoding = encoding
        self.missed_blocks = 0
        self._missed_last = b""  # unless a later one was accepted
        self.gone = threading.Event()
        self.loss: str | None = None
        self._sending = threading.Lock()
        self._progress_s = common.clock_s()
        self._looked_s = -math.inf
        self._requests: deque[tuple[int, int]] = deque(maxlen=REQUESTS_AT_ONCE)
        self._allowed = RateLimiter(REQUESTS_AT_ONCE, REQUEST_SPACING_S)

    def offer(self, frame: bytes, now_s: float) -> None:
        """Give a block to the system, or miss it. Does nothing once it is gone. Never blocks."""
        with self._sending:
            if not self.gone.is_set():
                self._offer(frame, now_s)

    def stop(self) -> None:
        """Send no more to this listener: returns once its socket is in no use."""
        with self._sending:
            self.gone.set()

    def _offer(self, frame: bytes, now_s: float) -> None:
        """Give a block to the system, behind the answers to what was asked for."""
        sent_bytes = self.connection.sent_bytes
        missed = b""
        try:
            if self._is_behind(now_s) or not self.connection.offer(self._replies() + frame):
                self.missed_blocks += 1
                missed = frame
        except common.ConnectionLost:  # as every client ends that is stopped
            self.lose("")
            return
        if len(frame) > SIGN_BYTES:
            self._missed_last = missed
        if self.connection.sent_bytes != sent_bytes:
            self._progress_s = now_s
        elif now_s - self._progress_s > LISTENER_TIMEOUT_S:
            self.lose(f"took nothing for {LISTENER_TIMEOUT_S:.0f} s")

    def _is_behind(self, now_s: float) -> bool:
        """Return whether what is sent now would be late, behind what waits in the system."""
        if now_s - self._looked_s < LOOK_INTERVAL_S:
            return False
        if self.connection.unsent() > LONGEST_WAIT_S * self.encoding.bytes_per_s:
            return True
        self._looked_s = now_s
        return False

    def _replies(self) -> bytes:
        """Return the answers to all requests for the time, as frames."""
        replies = b""
        while self._requests:
            replies += common.TimeReply(*self._requests.popleft(), common.clock_ns()).encode()
        return replies

    def lose(self, reason: str) -> None:
        """Send no more to this listener, and wake its thread. `reason` may be empty."""
        # Before it wakes: the client's thread takes a connection that ends for one that left. With
        # a loss nothing, not even a goodbye, goes out behind a block that was cut off.
        self.loss = reason
        self.gone.set()
        self.connection.wake()

    def end(self) -> None:
        """Have the client's thread finish, as no more sound comes. Idempotent."""
        self.connection.note_progress()  # it is to be told of the end, not evicted as idle
        self.gone.set()
        self.connection.stop_reading()

    def send_end(self, reason: str) -> None:
        """Send what tells of the end, behind the last sound that there was.

        Blocks until it has arrived, within the `limit` it stands in. Raises ConnectionLost.
        """
        self.connection.write(self._missed_last + common.StreamEnd(reason).encode())
        self.connection.wait_until_arrived()  # a request behind it would have it thrown away

    def take_requests(self) -> None:
        """Take requests for the time until the client has left; raises ProtocolError."""
        while not self.gone.is_set():
            try:
                with self.connection.limit(SILENCE_S):
                    request = self.connection.receive(
                        common.TimeRequest, max_bytes=common.MAX_HELLO_BYTES
                    )
            except common.PeerStalled:  # it need not ask
                continue
            except common.ConnectionLost:
                if not self.gone.is_set():
                    self.lose("")
                return
            if self._allowed.reserve() is None:
                raise ProtocolError("it asks for the time too often")
            self._requests.append((request.asked_ns, common.clock_ns()))


class Broadcaster:
    """Sends what is captured to every listener, from one thread that waits for none of them.

    One round goes once through all listeners. While it takes less than a block's time each block
    is sent as it comes. When there are so many listeners that it takes longer, the next round
    sends all that has gathered since in one write: the load sets the size of a write. `add`,
    `remove`, `count_missed` and `check_opus` are for any thread.
    """

    def __init__(self, captured: CaptureQueue) -> None:
        self.captured = captured
        self.meter = common.LevelMeter()
        self.log = LimitedLog()
        self.served_count = 0
        self.listeners: tuple[Listener, ...] = ()  # now; for any thread to look at
        self._pcm = PcmEncoding(captured.audio)
        self._lock = threading.Lock()
        self._missed_before = 0  # blocks, by listeners that have left
        self.sent_s = 0.0
        self.has_ended = False  # which the main thread is woken for

    def start(self) -> None:
        """Begin to send."""
        threading.Thread(target=self._run, name="broadcaster", daemon=True).start()

    def check_opus(self, kbit: int) -> None:
        """Raise Refused where Opus at `kbit` a second cannot be had."""
        audio = self.captured.audio
        if audio.channels not in common.OPUS_CHANNELS:
            raise Refused(f"this server's {audio.describe()} cannot be had as Opus: without --opus")
        used = {*self._opus(), common.DEFAULT_OPUS_KBIT}
        if len(used) > MAX_OPUS_RATES and kbit not in used:
            rates = ", ".join(map(str, sorted(used)))
            raise Refused(f"this server can encode Opus at no more bit rates than {rates}")
        try:
            import av  # noqa: PLC0415  (only a listener with --opus needs it)

            av.codec.Codec("libopus", "w")
        except common.LOAD_ERRORS:  # ValueError: an FFmpeg that was built without
            advice = common.how_to_install("av")
            problem = f"this server has no Opus without the package av; on its machine: {advice}"
            raise Refused(problem) from None

    def add(self, connection: Connection, opus_kbit: int | None = None) -> Listener:
        """Return a new listener, which gets every block from now on. Raises Refused."""
        with self._lock:
            listener = Listener(connection, self._encoding(opus_kbit))
            # A new tuple, not a changed list: the broadcaster goes through the old one unlocked.
            self.listeners = (*self.listeners, listener)
            self.served_count += 1
            if self.has_ended:
                listener.end()
        return listener

    def _encoding(self, opus_kbit: int | None) -> Encoding:
        if opus_kbit is None:
            return self._pcm
        self.check_opus(opus_kbit)  # again: of those that come at once each would be the last one
        return self._opus().get(opus_kbit) or OpusEncoding(self.captured.audio, opus_kbit)

    def _opus(self) -> dict[int, OpusEncoding]:
        """Return the encoders in use, by kbit/s."""
        used = {listener.encoding for listener in self.listeners}
        return {each.kbit: each for each in used if isinstance(each, OpusEncoding)}

    def remove(self, listener: Listener) -> None:
        """Send no more to `listener`, whose socket may be closed then."""
        listener.stop()
        with self._lock:
            self.listeners = tuple(other for other in self.listeners if other is not listener)
            self._missed_before += listener.missed_blocks

    def count_missed(self) -> int:
        """Return how many blocks all listeners together have missed."""
        with self._lock:
            return self._missed_before + sum(each.missed_blocks for each in self.listeners)

    def _run(self) -> None:
        try:
            self._send_all()
        except Exception as error:  # noqa: BLE001  (is told)
            self.captured.end(common.describe_unexpected(error), failed=True)
        with self._lock:
            self.has_ended = True
        for listener in self.listeners:
            listener.end()
        common.INTERRUPTS.wake()

    def _send_all(self) -> None:
        while (block := self.captured.take(timeout_s=SIGN_INTERVAL_S)) is not None:
            started_s = common.clock_s()
            self.meter.hear(block.samples)
            self.sent_s += self.captured.audio.frames_of(block.samples) / self.captured.audio.rate
            self._send_round(block, started_s)
            # Leave the processor to others after a long round, at the price of larger writes.
            if (round_s := common.clock_s() - started_s) > CAPTURE_BLOCK_MS / 1000:
                time.sleep(min(round_s, LONGEST_REST_S))
        self._send_round(None, common.clock_s())

    def _send_round(self, block: AudioBlock | None, now_s: float) -> None:
        """Send `block` to every listener, encoded once for all that want it so; None at the end."""
        listeners = self.listeners
        encodings = {listener.encoding for listener in listeners}
        frames = {each: each.encode(block) if block else each.finish() for each in encodings}
        for listener in listeners:
            if data := frames[listener.encoding]:
                listener.offer(data, now_s)


def handle_audio_client(
    connection: Connection, broadcaster: Broadcaster, opus_kbit: int | None = None
) -> None:
    """Let a client, which has its welcome, listen until it leaves or the sound ends.

    Its thread waits here. Errors are logged.
    """

    def write(text: str) -> None:
        line = f"{connection.peer}: {text}"
        broadcaster.log.write(line, logging.INFO, host_of(connection.peer))

    try:
        size = send_buffer_bytes(broadcaster.captured.audio, connection.round_trip_s())
        connection.set_option(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        listener = broadcaster.add(connection, opus_kbit)
        try:
            write("listening")
            listener.take_requests()
        finally:
            broadcaster.remove(listener)
        reason = listener.loss
        if reason is None:
            with connection.limit(LISTENER_TIMEOUT_S):  # for what is unsent before it
                listener.send_end(broadcaster.captured.end_reason)
            reason = "the sound has ended"
        write(f"left ({reason})" if reason else "left")
    except (OSError, SocketPairError) as error:
        write(f"left ({error})")


def send_buffer_bytes(audio: AudioFormat, round_trip_s: float) -> int:
    """Return how much the system may keep for a slow listener: what waits there is late.

    Besides, it keeps for `round_trip_s` what is on its way, which is not.
    """
    late_bytes = max(MIN_SEND_BUFFER_BYTES, audio.frames_in(SEND_BUFFER_MS) * audio.frame_bytes)
    block_bytes = audio.frames_in(CAPTURE_BLOCK_MS) * audio.frame_bytes + WRITE_BYTES
    return late_bytes + round(round_trip_s * 1000 / CAPTURE_BLOCK_MS * block_bytes)


# --- who may connect ------------------------------------------------------------------------

# Wrong codes that an origin may try at once, and then one after the other: a client with the right
# code has to get in within its own time limit. A guess counts as wrong until it turns out right:
# any number of them at once are as slow as one after the other. Many right ones at once wait for
# each other.
FREE_GUESSES = 5
GUESS_SPACING_S = 5.0
TLS_HANDSHAKE = 0x16  # the first byte that a TLS client sends
# What a client of protocol 1, which begins with TLS, tells its user as "alert protocol version".
PROTOCOL_VERSION_ALERT = bytes([0x15, 3, 3, 0, 2, 2, 70])
HTTP_METHODS = {b"GET ", b"HEAD", b"POST", b"PUT ", b"OPTI", b"CONN", b"PRI "}
NOT_A_WEB_SERVER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"This is a Socket Pair server, not a web server: python3 client.py\n"
)
WANTS_CODE = common.Error(
    f"this server wants its pairing code: give it with --code CODE or {common.CODE_VARIABLE}",
    common.CODE_WANTED,
)
HAS_NO_CODE = common.Error("this server has no pairing code", common.NO_CODE)
TOO_MANY_GUESSES = common.Error(
    "too many wrong pairing codes came from this address: try again in a minute", common.WAIT
)


class TurnedAway(SocketPairError):
    """A connection that is not served, and has been told so where that makes sense."""

    def __init__(self, text: str, log_level: int = logging.WARNING) -> None:
        super().__init__(text)
        self.log_level = log_level


def origin_of(host: str, own_host: str) -> str:
    """Return what stands for all the addresses that whoever has `host` may have.

    Of IPv6 that is a /64, unless `own_host`, the address that was connected to, is in it: on a
    network of this machine each address may be somebody else's.
    """
    address, own = (ipaddress.ip_address(each.partition("%")[0]) for each in (host, own_host))
    if address.version == 4:
        return host
    network = ipaddress.ip_network((address, 64), strict=False)
    return host if own in network else str(network)


class Guesses:
    """Limits how fast each origin tries pairing codes. For any thread."""

    def __init__(self) -> None:
        self._limiter = RateLimiter(FREE_GUESSES, GUESS_SPACING_S)
        self._begun: Counter[str] = Counter()  # that may be right yet, by origin
        self._decided = threading.Condition()

    @contextlib.contextmanager
    def attempt(self, origin: str) -> Iterator[float | None]:
        """Give in how many seconds the guess of the ``with`` block may begin; None if too late.

        Blocks while others of that origin may turn out right, for ``GUESS_SPACING_S`` at most.
        """
        delay_s = self._wait_in_line(origin)
        try:
            yield delay_s
        finally:
            if delay_s == 0:
                self._decide(origin)

    def forgive(self, origin: str) -> None:
        """Have the wrong guesses of an origin not count: one of it has been right."""
        self._limiter.forget(origin)

    def _wait_in_line(self, origin: str) -> float | None:
        deadline = Deadline(GUESS_SPACING_S)
        with self._decided:
            delay_s = self._limiter.reserve(origin)
            while delay_s is None and self._begun[origin] and (left_s := deadline.remaining()):
                self._decided.wait(left_s)
                delay_s = self._limiter.reserve(origin)
            if delay_s is None:
                delay_s = self._limiter.reserve(origin, deadline.remaining())
            if delay_s == 0:
                self._begun[origin] += 1
            return delay_s

    def _decide(self, origin: str) -> None:
        with self._decided:
            self._begun[origin] -= 1
            if not self._begun[origin]:
                del self._begun[origin]
            self._decided.notify_all()


class Gate:
    """Lets clients in: those that prove to have the pairing code, or anyone without one.

    For any thread.
    """

    def __init__(self, code: str | None) -> None:
        self._code = code
        self._guesses = Guesses()

    def let_in(self, connection: Connection, origin: str) -> Hello:
        """Return the hello of a client that may come in; blocks within the `limit` it stands in.

        The first bytes tell who speaks, to answer each in its own language. Raises TurnedAway where
        it may not, which it has been told then, and whatever reading raises.
        """
        opening = connection.peek(common.LENGTH.size)
        if opening in HTTP_METHODS:
            connection.write(NOT_A_WEB_SERVER)
            connection.finish()
            raise TurnedAway("not a Socket Pair client: it speaks HTTP, as a browser does")
        if opening[0] == TLS_HANDSHAKE:
            connection.write(PROTOCOL_VERSION_ALERT)
            connection.finish()
            raise TurnedAway("it speaks TLS: a browser, or an older version of Socket Pair")
        hello = self._receive_hello(connection)
        if hello.mode == common.FINDING:
            turn_away(connection, HAS_NO_CODE if self._code is None else WANTS_CODE, logging.DEBUG)
        if hello.mode == common.PAIRING:
            if self._code is None:
                turn_away(connection, HAS_NO_CODE)
            self._pair(connection, self._code, origin)
            return self._receive_hello(connection)
        if self._code is not None:
            turn_away(connection, WANTS_CODE, logging.INFO)
        return hello

    @staticmethod
    def _receive_hello(connection: Connection) -> Hello:
        hello = connection.receive(Hello, max_bytes=common.MAX_HELLO_BYTES)
        if hello.protocol != common.PROTOCOL:
            spoken, asked = common.PROTOCOL, escape(str(hello.protocol), 20)
            older = "the client" if hello.protocol < spoken else "the server"
            text = f"this server speaks protocol {spoken}, not {asked}: update {older}"
            turn_away(connection, common.Error(text))
        return hello

    def _pair(self, connection: Connection, code: str, origin: str) -> None:
        """Let the client prove that it has the code, and prove that to it. Raises TurnedAway."""
        with self._guesses.attempt(origin) as delay_s:
            if delay_s is None:
                turn_away(connection, TOO_MANY_GUESSES)
            pairing = common.Pairing(code, server_side=True)  # while the client makes its own
            request = connection.receive(Pair, max_bytes=common.MAX_HELLO_BYTES)
            if delay_s and connection.wait_for_peer(delay_s):
                raise TurnedAway("hung up while it waited to try a pairing code")
            connection.send(Pair(pairing.share))
            try:
                connection.start_tls(pairing.finish(request.share), server_side=True)
            except common.NotPaired as error:
                connection.finish()
                reason = "wrong pairing code" if error.wrong_code else f"it did not pair ({error})"
                raise TurnedAway(f"turned away: {reason}") from error
            except common.ConnectionLost as error:  # as who only guesses may do
                lost = f"did not prove that it has the pairing code ({error})"
                raise TurnedAway(lost) from error
            self._guesses.forgive(origin)


def turn_away(
    connection: Connection, answer: common.Error, log_level: int = logging.WARNING
) -> NoReturn:
    """Give a client its answer, and a moment to read it; raises TurnedAway."""
    connection.send(answer)
    connection.finish()
    if answer is WANTS_CODE:
        raise TurnedAway("was asked for the pairing code", log_level)
    raise TurnedAway(f"turned away: {answer.error}", log_level)


# --- endpoint -------------------------------------------------------------------------------

# Base32 without 0, 1, I and O: nothing in a code looks like anything else in it.
CODE_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
OPEN_WARNING = {
    "file": "--open: anyone who can reach this port may send files here, and others on the "
    "network may read what is sent",
    "audio": "--open: anyone who can reach this port may listen, and others on the network too",
}
LOCAL_HINT = (
    "Only this machine reaches it. For others add --host 0.0.0.0, which makes a pairing code"
)
# Addresses of no machine (RFC 5737, RFC 3849).
ELSEWHERE = {socket.AF_INET: ("192.0.2.1", 9), socket.AF_INET6: ("2001:db8::1", 9)}
THIS_MACHINE = "ADDRESS-OF-THIS-MACHINE"
ALL_ADDRESSES = {"0.0.0.0": (socket.AF_INET,), "::": (socket.AF_INET, socket.AF_INET6)}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}  # by the version of IP
MAX_MACHINE_BYTES = 45  # the mode and a token are to fit behind it, in 63 bytes
NOT_ANNOUNCED = "not announced on the local network: %s"
ANNOUNCEMENT_TIMEOUT_S = 2.0
ADDRESS_CHECK_S = 5.0
LISTEN_HINTS = {
    errno.EACCES: "; --port takes another: those below 1024 are mostly root's",
    errno.EADDRINUSE: "; a server runs there already, or another program: see --port",
    errno.EADDRNOTAVAIL: "; that is no address of this machine: --host 0.0.0.0 is all of them",
    **dict.fromkeys(
        (socket.EAI_NONAME, socket.EAI_AGAIN),
        "; no machine is known by that name: --host 0.0.0.0 is all addresses of this one",
    ),
}
NO_SUCH_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on all addresses of `host`, one port; raises SocketPairError."""
    sockets: list[socket.socket] = []
    passed_over = None
    try:
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = common.with_host(host, functools.partial(look_up, flags=socket.AI_PASSIVE))
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            try:
                sockets.append(open_socket(family, address, port))
            except OSError as error:
                # A name can have an IPv6 address where the system does without IPv6.
                if error.errno not in NO_SUCH_ADDRESS:
                    raise
                passed_over = error
                continue
            port = sockets[0].getsockname()[1]
        if passed_over and not sockets:
            raise passed_over
    except (OSError, ValueError) as error:  # ValueError: a host that no name can be
        for each in sockets:
            each.close()
        where = escape(common.format_address(host, port))
        reason = "that cannot be a machine's name: --host 0.0.0.0 is all addresses of this one"
        if isinstance(error, OSError):
            reason = describe_error(error) + LISTEN_HINTS.get(error.errno or 0, "")
        raise SocketPairError(f"cannot listen on {where}: {reason}") from error
    return sockets


def open_socket(family: int, address: tuple[Any, ...], port: int) -> socket.socket:
    """Return a socket that listens on one address; on `::` also for IPv4. Raises OSError."""
    return socket.create_server(
        (address[0], port, *address[2:]),
        family=family,
        backlog=1024,
        dualstack_ipv6=address[0] == "::" and socket.has_dualstack_ipv6(),
    )


def find_own_address(families: Sequence[socket.AddressFamily]) -> str | None:
    """Return the address that other machines most likely reach this one at, if it has one."""
    for family in families:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            # Sends nothing, but has the system choose the address that it would send from.
            sock.connect(ELSEWHERE[family])
            return str(sock.getsockname()[0])
    with contextlib.suppress(ImportError, OSError):  # two machines on one cable, without a router
        for interface in common.own_interfaces():
            needs_zone = interface.version == 6 and interface.is_link_local
            if FAMILIES[interface.version] in families and not needs_zone:
                return str(interface.ip)
    return None


def make_code() -> str:
    """Return a new pairing code of 40 random bits, as ``KQ7M-2XFD``."""
    while True:
        code = "".join(secrets.choice(CODE_ALPHABET) for _ in range(common.CODE_LENGTH))
        if not common.find_weakness(code):  # one in ten has no digit, and looks like a word
            return f"{code[:4]}-{code[4:]}"


class Endpoint(NamedTuple):
    """Where a server listens, and what its clients have to know."""

    mode: str
    sockets: list[socket.socket]
    code: str | None  # the pairing code, normalized, if there is one
    new_code: str | None  # as it is shown, if it has just been made

    @classmethod
    def open(cls, args: argparse.Namespace, mode: str) -> Endpoint:
        """Return the one that the arguments mean, listening. Raises SocketPairError."""
        endpoint = cls(mode, open_sockets(args.host, args.port), args.code, None)
        if not (args.code or args.open or endpoint.is_local()):
            code = make_code()
            endpoint = endpoint._replace(code=common.normalize_code(code), new_code=code)
        if endpoint.code:
            common.require_pairing_packages()
        return endpoint

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.sockets[0].getsockname()[1])

    def bound_addresses(self) -> list[str]:
        """Return the addresses that it listens on; ``0.0.0.0`` and ``::`` are all."""
        return [str(each.getsockname()[0]) for each in self.sockets]

    def is_local(self) -> bool:
        """Return whether only this machine can connect."""
        return all(map(common.is_loopback, self.bound_addresses()))

    def addresses(self) -> list[str]:
        """Return each address that other machines may reach it at."""
        bound, own = self.bound_addresses(), common.own_interfaces()
        families = [family for each in bound for family in ALL_ADDRESSES.get(each, ())]
        found = [str(each.ip) for each in own if FAMILIES[each.version] in families]
        found += [each for each in bound if each not in ALL_ADDRESSES]
        return [address for address in found if not common.is_loopback(address)]

    def describe(self, doing: str, console: Console) -> None:
        """Say where the server is and how a client gets in; with --quiet only a new code."""
        names = [each.getsockname()[:2] for each in self.sockets]
        where = " and ".join(common.format_address(*name) for name in names)
        console.say(f"{doing} on {where} - Ctrl+C to stop")
        if self.is_local():
            if sys.stdout.isatty():  # advice is for people
                console.say(LOCAL_HINT)
            return
        if self.code is None:
            console.complain(OPEN_WARNING[self.mode])
        tell = common.say if self.new_code else console.say  # what nobody could know
        if self.new_code:
            tell(f"Pairing code: {self.new_code}")
        tell(f"On the other machine:\n    {self.client_command()}")

    def client_command(self) -> str:
        """Return what to type on another machine; it asks for the code."""
        command = ["python3 client.py", self.mode, "--host", self._address()]
        if self.port != common.DEFAULT_PORT:
            command += ["--port", str(self.port)]
        if self.code is None:
            command.append("--open")
        return " ".join(command)

    def _address(self) -> str:
        """Return the address that another machine reaches the server at."""
        names = self.bound_addresses()
        address = next((name for name in names if not common.is_loopback(name)), names[0])
        if families := ALL_ADDRESSES.get(address):
            address = find_own_address(families) or THIS_MACHINE
        # Which interface leads to a link is for the other machine to say.
        return f"{address}%INTERFACE" if address.startswith("fe80:") else address


class Advertiser:
    """Tells the local network of a server by DNS-SD (RFC 6763), until it is closed.

    A thread of its own does all of it, as it takes most of a second; and again when this machine
    gets other addresses. What fails is logged: the server can be reached all the same.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # A name that nobody else has, so that there is nothing to be found out or argued about.
        self._token = secrets.token_hex(4)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="advertiser", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            # Here, as most servers do without, and it takes long to import.
            import zeroconf  # noqa: F401, PLC0415
        except common.LOAD_ERRORS:
            advice = f"{common.how_to_install('zeroconf')} (or --no-announce)"
            log.warning(NOT_ANNOUNCED, f"that needs zeroconf: {advice}")
            return
        problem = ""
        while not self._closed.is_set():
            try:
                self._announce()
                problem = ""
            except Exception as error:  # noqa: BLE001  (is told; zeroconf raises many that are no kin)
                if (reason := describe_error(error)) != problem:
                    log.warning(NOT_ANNOUNCED, reason)
                problem = reason
                self._closed.wait(ADDRESS_CHECK_S)

    def _announce(self) -> None:
        """Be announced until it is closed, or this machine's addresses are others."""
        addresses = self._endpoint.addresses()
        if not addresses:
            raise SocketPairError("this machine is in none")
        is_everywhere = not ALL_ADDRESSES.keys().isdisjoint(self._endpoint.bound_addresses())
        networks = [] if is_everywhere else addresses  # none in particular, or those of these
        with contextlib.closing(common.open_network(networks)) as network:
            network.register_service(self._service(addresses), cooperating_responders=True)
            while not self._closed.wait(ADDRESS_CHECK_S):
                if self._endpoint.addresses() != addresses:
                    break

    def _service(self, addresses: list[str]) -> ServiceInfo:
        """Return what is announced; the name that users see is in the TXT record."""
        import zeroconf  # noqa: PLC0415  (see _run)

        machine = socket.gethostname().encode(errors="replace")[:MAX_MACHINE_BYTES]
        name, mode = machine.decode(errors="ignore"), self._endpoint.mode
        return zeroconf.ServiceInfo(
            common.SERVICE_TYPE,
            f"{name.replace('.', ' ')} {mode} {self._token}.{common.SERVICE_TYPE}",
            # Not the machine's own name, which may be another program's to announce.
            server=f"socket-pair-{self._token}.local.",
            parsed_addresses=addresses,
            port=self._endpoint.port,
            properties=common.Announced(name, mode, self._endpoint.code is not None).to_txt(),
        )

    def close(self) -> None:
        """Take it back; blocks for a second or two. Idempotent."""
        self._closed.set()
        self._thread.join(ANNOUNCEMENT_TIMEOUT_S)


# --- serving --------------------------------------------------------------------------------
#
# One thread accepts; each connection has its own. `Clients` knows them all, from the moment that
# they were accepted until their threads end, and is the only place where one can make way for
# another. To stop: no more are accepted, those at the handshake are dropped, those being served may
# finish while they make progress.

# Connections that have not finished their handshake: a quarter of a second of a flood.
MAX_PENDING = 256
# So long without progress, a client is idle: it gives way to others, and is not waited for.
IDLE_S = 10.0
IDLE_CHECK_S = 0.5
ACCEPT_RETRY_S = 0.1
# Lines of the log about clients that are turned away, at once and for good.
TURNED_AWAY_LINES = 50
TURNED_AWAY_SPACING_S = 0.5
IS_BUSY = common.Error("this server is busy: try again later", common.BUSY)


def host_of(peer: str) -> str:
    """Return the address of a peer without its port."""
    return peer.rpartition(":")[0]


class Client:
    """One connection, from when it was accepted until its thread ends; `Clients` changes it."""

    def __init__(self, connection: Connection, origin: str) -> None:
        self.connection = connection
        self.origin = origin
        self.is_served = False
        self.eviction = ""  # why it was evicted, if it was

    def evict(self, reason: str) -> None:
        """Break the connection, so that its thread ends."""
        self.eviction = reason
        self.connection.wake()


class Clients:
    """All clients: pending ones, at the handshake, and those being served. For any thread.

    Where there are too many pending ones, the oldest of their most common origin is evicted: a
    flood from one address keeps nobody out but itself, and even there the newest stay. Where all
    places are taken, it is the idlest of the most common origin there.
    """

    def __init__(self, max_served: int, max_pending: int = MAX_PENDING) -> None:
        self._max_served = max_served
        self._max_pending = max_pending
        self._clients: dict[Client, None] = {}  # in the order in which they came
        self._changed = threading.Condition()

    def add(self, client: Client) -> None:
        """Register a pending client; blocks while threads of evicted ones have yet to end."""
        with self._changed:
            most = self._max_served + 2 * self._max_pending
            self._changed.wait_for(lambda: len(self._clients) < most)
            self._clients[client] = None
            pending = self._pending()
            if len(pending) > self._max_pending:
                origin, _ = most_common_origin(pending)
                oldest = next(each for each in pending if each.origin == origin)
                oldest.evict("too many have not finished their handshake")

    def admit(self, client: Client) -> bool:
        """Give a pending client a place; return False if there is none."""
        with self._changed:
            if client.eviction:
                return False
            served = self._served()
            if len(served) >= self._max_served and not self._make_way(served, client):
                return False
            client.is_served = True
        return True

    @staticmethod
    def _make_way(served: list[Client], newcomer: Client) -> bool:
        """Evict one of those served, if one has to go; return whether one had."""
        origin, size = most_common_origin(served)
        idlest = max(
            (each for each in served if each.origin == origin),
            key=lambda each: each.connection.idle_s(),
        )
        share = sum(each.origin == newcomer.origin for each in served) + 1
        if size <= share and idlest.connection.idle_s() < IDLE_S:
            return False
        idlest.evict("all places are taken, and it was the idlest")
        return True

    def remove(self, client: Client) -> None:
        """Forget a client whose thread ends. Idempotent."""
        with self._changed:
            self._clients.pop(client, None)
            self._changed.notify_all()

    def drop_pending(self) -> None:
        """Evict all that are at the handshake."""
        with self._changed:
            for client in self._pending():
                client.evict("the server stops")

    def count_served(self) -> int:
        """Return how many are being served."""
        with self._changed:
            return len(self._served())

    def finish(self, seconds: float = math.inf) -> None:
        """Wait until all clients have ended, or for `seconds`; evict those that are idle."""
        deadline = Deadline(seconds)
        with self._changed:
            while self._clients and deadline.remaining():
                for client in self._served():
                    if client.connection.idle_s() >= IDLE_S:
                        client.evict("the server stops, and it was idle")
                # Windows lets Ctrl+C through only in between.
                self._changed.wait(min(IDLE_CHECK_S, deadline.remaining()))

    def _pending(self) -> list[Client]:
        return [each for each in self._clients if not each.is_served and not each.eviction]

    def _served(self) -> list[Client]:
        return [each for each in self._clients if each.is_served and not each.eviction]


def most_common_origin(clients: Sequence[Client]) -> tuple[str, int]:
    """Return where most of `clients` come from, and how many do."""
    return Counter(client.origin for client in clients).most_common(1)[0]


class Server:
    """Accepts connections and has each handled in a thread of its own, until it is stopped."""

    def __init__(
        self,
        endpoint: Endpoint,
        handle: Callable[[Connection, Hello], None],
        *,
        max_clients: int,
        welcome: Callable[[Hello, str], Welcome],
    ) -> None:
        """`welcome` returns the answer to a client's hello and host, or raises Refused."""
        self._endpoint = endpoint
        self._handle = handle
        self._max_clients = max_clients
        self._welcome = welcome
        self._gate = Gate(endpoint.code)
        # For all hosts together: they may be many.
        self._turned_away = LimitedLog(TURNED_AWAY_LINES, TURNED_AWAY_SPACING_S)
        self.clients = Clients(max_clients)
        self._advertising = contextlib.ExitStack()
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for sock in (self._woken, *endpoint.sockets):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._accept_all, name="accept", daemon=True)

    def start(self, announce: bool) -> None:
        """Begin to accept; tell the local network, if that can reach this server and is to."""
        self._thread.start()
        if announce and not self._endpoint.is_local():
            self._advertising.enter_context(contextlib.closing(Advertiser(self._endpoint)))

    def stop(self) -> None:
        """Accept no more, and drop who is at the handshake. Idempotent; blocks for a second or two.

        Those being served go on: see `Clients.finish`.
        """
        self._waker.close()  # which ends the accepting thread
        self.clients.drop_pending()
        if self._thread.is_alive():  # it may yet begin, where a signal came before
            self._thread.join()
            self._selector.close()
        for sock in (self._woken, *self._endpoint.sockets):
            sock.close()
        self.clients.drop_pending()
        self._advertising.close()

    def _accept_all(self) -> None:
        """Accept until `stop`: the whole life of the accepting thread."""
        while True:
            try:
                ready = [key.fileobj for key, _ in self._selector.select()]
                if self._woken in ready:
                    return
                for sock in self._endpoint.sockets:
                    if sock in ready:
                        self._accept(sock)
            except (OSError, MemoryError) as error:  # the machine is at an end, as of files
                self._turned_away.write(f"a connection cannot be accepted: {describe_error(error)}")
                time.sleep(ACCEPT_RETRY_S)

    def _accept(self, listening: socket.socket) -> None:
        """Take one connection, and give it its thread. Raises OSError and MemoryError."""
        try:
            sock, address = listening.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return
        if not address:  # which is all that macOS tells of one that has gone again
            sock.close()
            return
        # As an IPv6 socket shows an IPv4 address.
        host = str(address[0]).removeprefix("::ffff:")
        peer = common.format_address(host, address[1])
        try:
            origin = origin_of(host, str(sock.getsockname()[0]))
            self._start(Client(Connection(sock, peer), origin))
        except (OSError, MemoryError) as error:  # it has gone again, or there is no memory
            self._turned_away.write(f"{peer}: cannot be served: {describe_error(error)}")
            sock.close()

    def _start(self, client: Client) -> None:
        """Give a new client its thread, or the answer that there is none."""
        connection = client.connection
        self.clients.add(client)
        thread = threading.Thread(
            target=self._converse, args=(client,), name=f"client {connection.peer}", daemon=True
        )
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            self.clients.remove(client)
            self._explain(connection, error)

    def _converse(self, client: Client) -> None:
        """Shake hands with one client and have it handled; the whole life of a thread."""
        connection = client.connection
        try:
            if hello := self._shake_hands(client):
                self._handle(connection, hello)
                if client.eviction:
                    log.warning("%s: dropped: %s", connection.peer, client.eviction)
        except Exception as error:  # noqa: BLE001  (is logged)
            self._explain(connection, error)
        finally:
            with contextlib.suppress(MemoryError):
                connection.close()
            self.clients.remove(client)

    def _explain(self, connection: Connection, error: Exception) -> None:
        """Log what nobody has dealt with: the machine is at an end, or there is a mistake."""
        if common.is_exhausted(error):
            reason = "dropped: out of memory, threads or open files"
            self._turned_away.write(f"{connection.peer}: {reason}", logging.ERROR)
            with contextlib.suppress(SocketPairError, MemoryError):
                connection.offer(common.encode_message(IS_BUSY))
        else:
            is_debugging = log.isEnabledFor(logging.DEBUG)
            log.error("%s: internal error: %r", connection.peer, error, exc_info=is_debugging)
        connection.close()

    def _shake_hands(self, client: Client) -> Hello | None:
        """Greet a client; return None if it is not to be served, which it has been told then."""
        connection = client.connection
        try:
            with connection.limit(common.HANDSHAKE_TIMEOUT_S):
                hello = self._gate.let_in(connection, client.origin)
                connection.send(self._find_place(hello, client))
        except SocketPairError as error:
            reason = f"dropped: {client.eviction}" if client.eviction else str(error)
            level = error.log_level if isinstance(error, TurnedAway) else logging.WARNING
            self._turned_away.write(f"{connection.peer}: {reason}", level)
            return None
        return hello

    def _find_place(self, hello: Hello, client: Client) -> Welcome:
        """Return the welcome for a client, which has a place then; raises TurnedAway if not."""
        connection, mode = client.connection, self._endpoint.mode
        if hello.mode != mode:
            problem = f"this server is in {mode} mode: start the client in {mode} mode"
            turn_away(connection, common.Error(problem))
        try:
            welcome = self._welcome(hello, client.origin)
        except Refused as refusal:
            turn_away(connection, common.Error(str(refusal)))
        if not self.clients.admit(client):
            clients = counted(self._max_clients, "client")
            problem = f"this server is busy with {clients}: try again later"
            turn_away(connection, common.Error(problem, common.BUSY))
        return welcome


# --- log ------------------------------------------------------------------------------------

MAX_WAITING_LINES = 10_000
# Of one host's clients, but those about files that were saved: at once, and for good.
LINES_AT_ONCE = 1_000
LINE_SPACING_S = 1.0
# Whoever reads the log goes by the words before the path: in other lines no name may hold them.
SAVED_LINE = "%s sent %s, saved as %s"
LEFT_OUT = "and %d more lines were left out"
SAVED_WORDS, SAVED_WORDS_IN_NAMES = ", saved as ", r",\0040saved as "
LOG_CLOSE_S = 2.0


class BackgroundLog(logging.Handler):
    """Prints lines in a thread of its own, what went wrong on standard error.

    `console` makes room for each. Of too many lines, the rest are counted.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        stamp = "" if goes_to_journal() else "%(asctime)s "
        self.setFormatter(logging.Formatter(f"{stamp}%(message)s", "%H:%M:%S"))
        self._lines: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._left_out = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line. Never blocks; for any thread, as logging holds this handler's lock."""
        if self._lines.qsize() >= MAX_WAITING_LINES:
            self._left_out += 1
            return
        if self._left_out:
            left_out, self._left_out = (self._left_out,), 0
            told = log.makeRecord(log.name, logging.WARNING, "", 0, LEFT_OUT, left_out, None)
            self._lines.put(told)
        if record.msg != SAVED_LINE:
            text = record.getMessage().replace(SAVED_WORDS, SAVED_WORDS_IN_NAMES)
            record.msg, record.args = text, ()
        self._lines.put(record)

    def _run(self) -> None:
        while (record := self._lines.get()) is not None:
            self._console.show_status("")
            with contextlib.suppress(OSError, ValueError, SocketPairError):  # it cannot be written
                tell = common.complain if record.levelno > logging.INFO else common.say
                tell(self.format(record))

    def close(self) -> None:
        """Write what is queued, for a short while at most. Idempotent."""
        self._lines.put(None)
        self._thread.join(LOG_CLOSE_S)
        super().close()


class LimitedLog:
    """Logs for each host `at_once` lines, then one by one, and counts the rest. For any thread."""

    def __init__(
        self,
        at_once: int = LINES_AT_ONCE,
        spacing_s: float = LINE_SPACING_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed = RateLimiter(at_once, spacing_s, clock)
        self._left_out = 0
        self._lock = threading.Lock()

    def write(self, text: str, level: int = logging.WARNING, host: str = "") -> None:
        """Log a line, or count it as left out."""
        if not log.isEnabledFor(level):
            return
        with self._lock:
            if self._allowed.reserve(host) is None:
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out, 0
        if left_out:
            log.warning(LEFT_OUT, left_out)
        log.log(level, "%s", text)


@contextlib.contextmanager
def logging_to_streams(args: argparse.Namespace) -> Iterator[Console]:
    """Log to standard output and error inside the ``with`` block. Gives the console."""
    level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
    # A log line a file is most of the work on a small file: leave out what no line shows.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    console = Console(args.quiet)
    with contextlib.closing(BackgroundLog(console)) as background:
        logging.basicConfig(level=level, handlers=[background])
        yield console


def goes_to_journal() -> bool:
    """Return whether all output goes to systemd's journal, which stamps each line itself.

    ``JOURNAL_STREAM`` holds the device and the inode that systemd passed on (systemd.exec(5)).
    """
    with contextlib.suppress(OSError, ValueError):  # no file, or closed
        found = [os.fstat(stream.fileno()) for stream in (sys.stdout, sys.stderr)]
        streams = {f"{each.st_dev}:{each.st_ino}" for each in found}
        return streams == {os.environ.get("JOURNAL_STREAM")}
    return False


# --- command line ---------------------------------------------------------------------------

MAX_CLIENTS = 64
MAX_LISTENERS = 2_000
DEFAULT_SYNC_MS = 80
SWEEP_INTERVAL_S = 3600.0
# A listener's thread only waits; its stack holds the handshake.
LISTENER_STACK_BYTES = 512 * 1024
# macOS lets a process ask for no more, where there is no limit (setrlimit(2), OPEN_MAX).
MACOS_OPEN_FILES = 10_240

EXAMPLES = """examples:
  server.py                          ask for everything
  server.py file --folder ~/inbox    receive files into a folder
  server.py file --overwrite         let new files replace old ones of their name
  server.py audio                    broadcast the microphone
  server.py audio --input usb --rate 44100 --channels 2
                                     the one with "usb" in its name, in stereo
  sox in.mp3 -t s16 -r 48k -c 1 - | server.py audio --input -
                                     what another program makes
"""


MODE_OPTIONS = {
    "file": ["folder", "overwrite"],
    "audio": ["input", "rate", "channels", "sync", "list_devices"],
}


def add_audio_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of audio mode."""
    sound = parser.add_argument_group("audio mode")
    sound.add_argument(
        "--input",
        type=common.name_given,
        metavar="MIC",
        help="a microphone's name or number, a sound file, or - for raw 16-bit PCM",
    )
    sound.add_argument(
        "--rate",
        type=common.number(int, common.SAMPLE_RATES[0], common.SAMPLE_RATES[-1]),
        metavar="HZ",
        help=f"samples a second ({DEFAULT_RATE}, or what the source has)",
    )
    sound.add_argument(
        "--channels",
        type=common.number(int, 1, 2),
        metavar="N",
        help="1 for mono, 2 for stereo (1, or what the source has)",
    )
    sound.add_argument(
        "--sync",
        type=common.number(int, common.SYNC_MS[0], common.SYNC_MS[-1]),
        nargs="?",
        const=DEFAULT_SYNC_MS,
        metavar="MS",
        help="have all listeners play in step, MS after the capture "
        f"({DEFAULT_SYNC_MS} if MS is left out)",
    )
    sound.add_argument("--list-devices", action="store_true", help="show the microphones and exit")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's arguments; exits with status 2 where they are wrong."""
    description = "Receive files from client.py, or send it sound."
    parser = common.make_parser(description, EXAMPLES, host_help="address to listen on")
    parser.add_argument(
        "--no-announce",
        action="store_true",
        help="do not tell the local network of this server (see client.py --find)",
    )
    parser.add_argument(
        "--max-clients",
        type=common.number(int, 1, 1_000_000),
        metavar="N",
        help=f"clients served at once ({MAX_CLIENTS}; in audio mode {MAX_LISTENERS})",
    )
    files = parser.add_argument_group("file mode")
    files.add_argument("--folder", default="received", help="where files go (%(default)s)")
    files.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of the same name, rather than keep both",
    )
    add_audio_arguments(parser)
    args = parser.parse_args(argv)
    if args.mode not in (None, *common.MODES):
        parser.error(f"{args.mode!r} is not a mode: give file or audio")
    args.check_mode = functools.partial(common.refuse_other_mode, parser, args, MODE_OPTIONS)
    args.check_mode()
    common.take_code_from_environment(parser, args)
    return args


def prepare_folder(folder: str) -> str:
    """Make the folder for files where it is missing; return its path. Raises SocketPairError."""
    folder = os.path.expanduser(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise SocketPairError(f"--folder {escape(folder)}: {describe_error(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        reason = "no permission to write there, or a read-only file system"
        raise SocketPairError(f"--folder {escape(folder)}: {reason}")
    return folder


def serve_files(args: argparse.Namespace, console: Console) -> int:
    """Receive files until Ctrl+C, then let those under way finish; return the exit status."""
    store = Store(prepare_folder(args.folder), args.overwrite)
    endpoint = Endpoint.open(args, "file")
    server = Server(
        endpoint,
        lambda connection, _hello: handle_file_client(connection, store),
        max_clients=args.max_clients or MAX_CLIENTS,
        welcome=lambda _hello, host: welcome_to_folder(store.folder, host),
    )
    shown = escape(os.path.join(store.folder, ""))
    try:
        server.start(announce=not args.no_announce)
        endpoint.describe(f"Receiving into {shown}", console)
        attend_folder(store, console)
        console.end_status()
        return finish_files(server, args.quiet)
    finally:
        server.stop()


def welcome_to_folder(folder: str, host: str) -> Welcome:
    """Return the welcome for a client at `host`; one on this machine is told the folder."""
    welcome = Welcome(common.PROTOCOL, "file")
    if common.is_loopback(host):
        with contextlib.suppress(OSError):
            found = os.stat(folder)
            return welcome._replace(folder=common.disguise((found.st_dev, found.st_ino)))
    return welcome


def attend_folder(store: Store, console: Console) -> None:
    """Show what arrives, and remove old leftovers now and then, until Ctrl+C; blocks."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            remove_old_leftovers(store.root)
            sweep = Deadline(SWEEP_INTERVAL_S)
            while sweep.remaining():
                console.show_status(store.describe_arrivals())
                common.INTERRUPTS.wait(min(console.status_interval_s, sweep.remaining()))


def finish_files(server: Server, quiet: bool) -> int:
    """Take no more clients, and wait until those served are done, or for a second Ctrl+C.

    Return the exit status. If `quiet`, say nothing where there is nobody to wait for.
    """
    common.INTERRUPTS.arm()
    try:
        if under_way := server.clients.count_served():
            common.complain(f"\nfinishing {under_way} under way - Ctrl+C again to stop at once")
        elif not quiet:
            common.complain("\nstopped")
        server.stop()
        server.clients.finish()
    except KeyboardInterrupt:
        common.complain("\nstopped at once: what is here of unfinished files is kept")
    return common.EXIT_INTERRUPTED


def serve_audio(args: argparse.Namespace, console: Console) -> int:
    """Broadcast the input until Ctrl+C or its end; return the exit status."""
    # A thread a listener: the usual 8 MiB each would be backed by huge pages on some systems.
    threading.stack_size(LISTENER_STACK_BYTES)
    with contextlib.closing(open_input(args)) as source:
        return broadcast(args, source, console)


def broadcast(args: argparse.Namespace, source: Microphone | PacedInput, console: Console) -> int:
    """Send what `source` captures to whoever connects; return the exit status."""
    broadcaster = Broadcaster(source.captured)
    endpoint = Endpoint.open(args, "audio")
    server = make_audio_server(args, endpoint, broadcaster)
    broadcaster.start()
    what = f"{source.name}, {source.captured.audio.describe()}"
    try:
        server.start(announce=not args.no_announce)
        endpoint.describe(f"Broadcasting {what},", console)
        show_until_ended(broadcaster, console)
        return finish_audio(server, broadcaster, console)
    except KeyboardInterrupt:
        console.say(summarize(broadcaster))
        raise
    finally:
        server.stop()


def make_audio_server(
    args: argparse.Namespace, endpoint: Endpoint, broadcaster: Broadcaster
) -> Server:
    """Return a server that listens, and whose welcome tells what a listener has to know."""
    as_pcm = common.Sound(*broadcaster.captured.audio, secrets.token_hex(8), args.sync)

    def welcome(hello: Hello, _host: str) -> Welcome:
        sound = as_pcm
        if hello.opus_kbit is not None:
            broadcaster.check_opus(hello.opus_kbit)
            sound = as_pcm._replace(rate=common.OPUS_RATE, opus_kbit=hello.opus_kbit)
        return Welcome(common.PROTOCOL, "audio", sound)

    return Server(
        endpoint,
        lambda connection, hello: handle_audio_client(connection, broadcaster, hello.opus_kbit),
        max_clients=args.max_clients or MAX_LISTENERS,
        welcome=welcome,
    )


def show_until_ended(broadcaster: Broadcaster, console: Console) -> None:
    """Keep the status line up to date until the sound ends; blocks."""
    while not broadcaster.has_ended:
        listeners = counted(len(broadcaster.listeners), "listener")
        console.show_loudness(broadcaster.meter, listeners)
        common.INTERRUPTS.wait(console.status_interval_s)


def finish_audio(server: Server, broadcaster: Broadcaster, console: Console) -> int:
    """Wait until every listener has been told of the end; return the exit status."""
    server.clients.finish(LISTENER_TIMEOUT_S)
    captured = broadcaster.captured
    tell = console.complain if captured.failed else console.say
    tell(f"{captured.end_reason} - {summarize(broadcaster)}")
    return common.EXIT_FAILED if captured.failed else common.EXIT_OK


def summarize(broadcaster: Broadcaster) -> str:
    """Return what has been broadcast, in a line."""
    listeners = counted(broadcaster.served_count, "listener")
    missed = counted(broadcaster.count_missed(), "block")
    return f"{common.format_tenths(broadcaster.sent_s)} of sound to {listeners}, {missed} missed"


def main(argv: Sequence[str]) -> int:
    """Run the server with the command line's arguments; return its exit status."""
    args = parse_arguments(argv)
    common.INTERRUPTS.take()
    raise_open_file_limit()
    is_audio = args.list_devices or args.input == STDIN  # where no answer comes from
    mode = args.mode = "audio" if is_audio else args.mode or common.ask_mode(Console(quiet=False))
    args.check_mode()
    if mode == "audio":
        common.quiet_libraries(args.verbose)
    with logging_to_streams(args) as console:
        if args.list_devices:
            return common.list_devices(common.MICROPHONE)
        return (serve_files if mode == "file" else serve_audio)(args, console)


def raise_open_file_limit() -> None:
    """Let this process open as many files as the system allows: each connection is one."""
    if sys.platform != "win32":
        current, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        for wanted in (most, max(current, MACOS_OPEN_FILES)):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
                return


if __name__ == "__main__":
    common.run(main)
