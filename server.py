"""The server of Socket Pair: takes files into a folder, or broadcasts sound.

    python server.py file
    python server.py audio

In the order of the file; to follow a run, begin at `main`, at its end:

====================  =============================================================
names                 ``safe_parts``, ``Folders``: nothing outside the folder
on disk               ``PartialFile``: hidden until complete, then moved into place
one file              ``Incoming``: what is known of it, from the offer to its result
file conversation     ``handle_file_client`` and ``Reception``: offers, resuming, results
sound: inputs         ``Microphone``, ``PacedInput``: sound card, file, pipe; ``CaptureQueue``
sound: files          ``PlainWav``, and ``DecodedFile`` by FFmpeg; ``SoundLoop``: over and over
sound: broadcaster    ``handle_audio_client``, ``Broadcaster``, ``Listener``: sound to everyone
who may connect       ``Door``: the pairing code; ``Lobby`` and ``Patience`` bound what
                      those can do who have not got it
listener              ``Server`` accepts, gives each connection a thread, shakes hands;
                      ``Announcement`` tells the local network of it
command line          ``main`` asks for what the arguments leave open
====================  =============================================================

``common.py`` describes both conversations. Inside the server, sound takes this way::

    PortAudio's thread -> CaptureQueue -> the broadcaster's thread -> every listener's socket
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until common.take_signals(), Ctrl+C just ends the program, also during the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import hashlib
import ipaddress
import itertools
import logging
import os
import queue
import secrets
import selectors
import shutil
import socket
import stat
import struct
import sys
import threading
import time
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, Protocol, TextIO

import common
from common import (
    CAPTURE_BLOCK_MS,
    END_OF_FILE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    GIVEN_UP,
    HANDSHAKE_TIMEOUT_S,
    KEEPALIVE_INTERVAL_S,
    LENGTH,
    RECEIVE_BYTES,
    SEGMENT_BYTES,
    STILL_HERE,
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
    Held,
    Hello,
    Keepalive,
    LevelMeter,
    NotPaired,
    Offer,
    Outcome,
    Pair,
    PeerClosed,
    PeerStalled,
    Prefixes,
    ProtocolError,
    Results,
    SocketPairError,
    Sound,
    SoundCard,
    Start,
    StreamEnd,
    TimeReply,
    TimeRequest,
    Welcome,
    blocks_for,
    calculate_checksum,
    count,
    describe_error,
    escape,
    format_bytes,
    format_tenths,
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


class GivenUp(SocketPairError):
    """The client stopped in the middle of a file; it has told its user why."""


# --- names ----------------------------------------------------------------------------------

# Far beyond what any system takes, to bound what a client can make us work through.
MAX_PATH_CHARS = 16 * 1024
MAX_NAME_BYTES = 255
MAX_SUFFIX_BYTES = 50
MAX_KNOWN_FOLDERS = 10_000
PARTIAL_SUFFIX = common.PARTIAL_SUFFIX
WINDOWS_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "123456789\u00b9\u00b2\u00b3"
}


def safe_parts(path: str, windows: bool = sys.platform == "win32") -> list[str]:
    """Return the folders and the name in an offered `path`, which parts them with ``/``.

    Raises Refused where it could mean a place outside the folder, or a name that this system
    (Windows, if `windows`) cannot hold.
    """
    if len(path) > MAX_PATH_CHARS:
        raise Refused("the path is too long")
    parts = path.split("/")
    for part in parts:
        check_name(part, windows)
    return parts


def check_name(name: str, windows: bool = sys.platform == "win32") -> None:
    """Raise Refused unless `name` can stand for a file inside a folder, and for nothing else."""
    if name in ("", ".", ".."):
        raise Refused("the path is not one inside the folder")
    if "\0" in name:
        raise Refused("the name holds a NUL")
    if name.endswith(PARTIAL_SUFFIX):
        raise Refused(f"names that end in {PARTIAL_SUFFIX} are kept for unfinished files")
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        raise Refused("the name is not valid Unicode, which this system requires") from None
    if size > MAX_NAME_BYTES:
        raise Refused(f"the name is too long ({size} bytes; {MAX_NAME_BYTES} at most)")
    if windows:
        check_windows_name(name)


def check_windows_name(name: str) -> None:
    """Raise Refused where Windows would read `name` as a path, a drive or a device.

    After Microsoft's "Naming Files, Paths, and Namespaces".
    """
    if any(char in '<>:"\\|?*' or char < " " for char in name):
        raise Refused("the name holds a character that Windows does not allow")
    if name[-1] in " .":
        raise Refused("the name ends in a dot or a space, which Windows does not allow")
    if name.split(".", maxsplit=1)[0].rstrip().upper() in WINDOWS_RESERVED:
        raise Refused("the name is a device on Windows")


def numbered_names(name: str) -> Iterator[str]:
    """Yield `name`, then ``name (1).ext``, ``name (2).ext`` and so on, without end."""
    yield name
    stem, suffix = os.path.splitext(name)
    if len(os.fsencode(suffix)) > MAX_SUFFIX_BYTES:  # no suffix, but a name with a dot in it
        stem, suffix = name, ""
    for number in itertools.count(1):
        tail = f" ({number}){suffix}"
        while len(os.fsencode(stem + tail)) > MAX_NAME_BYTES and stem:
            stem = stem[:-1]
        yield stem + tail


@dataclass
class Folder:
    """A real folder that files go to."""

    path: str  # with a separator at its end
    shown: str  # the same below the root, with "/"
    identity: tuple[int, int]
    leftovers: dict[str, list[str]]  # paths of unfinished files from earlier runs, by their stems

    @property
    def device(self) -> int:
        """The file system that it is on."""
        return self.identity[0]

    def is_in_place(self) -> bool:
        """Tell whether what stands at its path is still this folder, and no link elsewhere."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self.identity


class Folders:
    """Finds the real folders below `root` for offered ones, and makes those that are missing.

    Remembers what it has found: one client's ten thousand files share few folders.
    """

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)
        self._known: dict[str | None, Folder] = {}

    def locate(self, path: str | None) -> Folder:
        """Return the folder at an offered `path`; None is the root.

        Raises Refused where a name or a symbolic link leads out of the root or a file is in the
        way, and OSError where the system does not allow it.
        """
        if path not in self._known:
            if len(self._known) >= MAX_KNOWN_FOLDERS:
                self._known.clear()
            self._known[path] = self._look_at(self._make([] if path is None else safe_parts(path)))
        return self._known[path]

    def forget_moved(self) -> None:
        """Look anew, when they are next needed, for folders that are not where they were."""
        self._known = {path: each for path, each in self._known.items() if each.is_in_place()}

    def _make(self, parts: Sequence[str]) -> str:
        """Make what is missing of a folder; return its real path."""
        real = os.path.realpath(os.path.join(self._root, *parts))
        if not os.path.join(real, "").startswith(os.path.join(self._root, "")):
            raise Refused("a symbolic link there leads out of the folder")
        # Not os.makedirs: it goes a level deeper into itself for every level of the path.
        path = self._root
        for part in os.path.relpath(real, self._root).split(os.sep):
            path = os.path.join(path, part)
            if not os.path.isdir(path):
                make_folder(path)
        return real

    def _look_at(self, real: str) -> Folder:
        below = os.path.relpath(real, self._root).replace(os.sep, "/")
        found = os.stat(real)
        return Folder(
            path=os.path.join(real, ""),
            shown="" if below == "." else f"{below}/",
            identity=(found.st_dev, found.st_ino),
            leftovers=find_leftovers(real),
        )


def make_folder(path: str) -> None:
    """Make one folder, unless another thread just has. Raises Refused or OSError."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise Refused("a file stands where a folder should go") from None


# --- on disk --------------------------------------------------------------------------------

NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def partial_stem(name: str) -> str:
    """Return what the partial files of `name` begin with, short enough to leave room for more."""
    if len(os.fsencode(name)) <= MAX_NAME_BYTES - 50:
        return f".{name}"
    return "." + hashlib.sha256(os.fsencode(name)).hexdigest()


def find_leftovers(folder: str) -> dict[str, list[str]]:
    """Return the partial files in `folder`: their paths, by their stems. Raises OSError."""
    found: dict[str, list[str]] = {}
    try:
        names = os.listdir(folder)
    except PermissionError:  # it may still be written to
        return found
    for name in names:
        if name.endswith(PARTIAL_SUFFIX):
            stem = name.removesuffix(PARTIAL_SUFFIX).rpartition(".")[0]
            found.setdefault(stem, []).append(os.path.join(folder, name))
    return found


def lock_file(descriptor: int) -> bool:
    """Lock an open file against other connections and other servers; False if one has it.

    The system lets go of the lock when the file is closed or the process dies.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 2**62, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


OPEN_FLAGS = (
    os.O_RDWR
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
)


class PartialFile:
    """A file under way: hidden beside its place, locked, and open until it is moved there.

    Ends with exactly one of `publish`, `discard` and `close` (which keeps it for another run).
    """

    _run = secrets.token_hex(4)
    _numbers = itertools.count()

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size = size
        self.digest = hashlib.sha256()  # of those bytes, once they have been read again

    @classmethod
    def create(cls, folder: Folder, name: str) -> PartialFile:
        """Make an empty one that is to become `name` in `folder`. Raises OSError."""
        stem = folder.path + partial_stem(name)
        while True:
            path = f"{stem}.{cls._run}{next(cls._numbers):x}{PARTIAL_SUFFIX}"
            descriptor = os.open(path, OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if lock_file(descriptor):
                    return cls(path, descriptor, 0)
            except OSError:  # a file system without locks
                os.close(descriptor)
                os.unlink(path)
                raise
            os.close(descriptor)

    @classmethod
    def claim(cls, path: str) -> PartialFile | None:
        """Open the one at `path`, left by an earlier run; None if it is not to be used (again).

        Raises BlockingIOError while another connection is still writing it.
        """
        try:
            descriptor = os.open(path, OPEN_FLAGS)
        except OSError:
            return None
        locked = False
        try:
            locked = lock_file(descriptor)
            if not locked:
                raise BlockingIOError
            found = os.fstat(descriptor)
            # Between opening and locking it may have been moved into place; and a server killed
            # while it did that leaves both names: writing here would change the finished file.
            if stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.lstat(path)):
                if found.st_nlink == 1:
                    return cls(path, descriptor, found.st_size)
                os.unlink(path)
        except FileNotFoundError:
            locked = False
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def write(self, view: memoryview) -> None:
        """Append `view`; blocks until the system has taken it. Raises OSError."""
        while view:
            view = view[os.write(self.descriptor, view) :]

    def publish(self, folder: Folder, entry: Entry, overwrite: bool) -> str:
        """Move the complete file to its name in `folder`; return the name that it has now.

        Raises OSError, and Refused where a folder is in the way; the file is still here then.
        """
        self._set_metadata(entry)
        if sys.platform == "win32":  # where an open file cannot be moved
            self.close()
        name = name_of(entry)
        if overwrite:
            replace_file(self.path, folder.path + name)
        else:
            names = numbered_names(name)
            while not move_new(self.path, folder.path + (name := next(names))):
                pass
        self.close()
        return name

    def _set_metadata(self, entry: Entry) -> None:
        if entry.executable or self.size:  # one just made is not executable
            mode = stat.S_IMODE(os.stat(self.path).st_mode)
            # Who may read it may run it, as a compiler would leave it.
            wanted = mode | (mode & 0o444) >> 2 if entry.executable else mode & ~0o111
            with contextlib.suppress(OSError):  # as in set_times
                os.chmod(self.path, wanted)
        set_times(self.path, entry.mtime_ns)

    def discard(self) -> None:
        """Remove it."""
        if sys.platform == "win32":  # where an open file cannot be removed
            self.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """Close and unlock it, and keep it as it is. May be called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def set_times(path: str, mtime_ns: int | None) -> None:
    """Give the file or folder at `path` its modification time, if the client told one.

    A file system that cannot hold it is no reason to refuse the content.
    """
    if mtime_ns is not None:
        with contextlib.suppress(OSError, OverflowError):
            os.utime(path, ns=(mtime_ns, mtime_ns))


def replace_file(source: str, target: str) -> None:
    """Move `source` over `target` in one step. Raises OSError, or Refused for a folder."""
    try:
        os.replace(source, target)
    except (IsADirectoryError, PermissionError):
        if os.path.isdir(target):
            raise Refused("a folder of that name is there already") from None
        raise


_moving = threading.Lock()


def move_new(source: str, target: str) -> bool:
    """Move `source` to `target` in one step unless something is there; False if so.

    Raises OSError.
    """
    try:
        if sys.platform == "win32":
            os.rename(source, target)  # which never replaces there
        else:
            os.link(source, target)
            os.unlink(source)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        return _move_new_without_links(source, target)
    return True


def _move_new_without_links(source: str, target: str) -> bool:
    """Do what `move_new` does on FAT and the like, safe among this server's own threads."""
    with _moving:
        if os.path.lexists(target):
            return False
        os.rename(source, target)
        return True


# --- one file -------------------------------------------------------------------------------


def folder_of(entry: Entry) -> str | None:
    """Return the path of an entry's folder; None is the root, "" is no folder's path."""
    folder, slash, _ = entry.path.rpartition("/")
    return folder if slash else None


def name_of(entry: Entry) -> str:
    """Return an entry's own name."""
    return entry.path.rpartition("/")[2]


@dataclass(slots=True)
class Incoming:
    """One entry of an offer, and what is known and decided of it so far."""

    index: int
    entry: Entry
    folder: Folder | None = None
    claims: list[PartialFile] = field(default_factory=list)  # may be its beginning
    twins: dict[str, str] = field(default_factory=dict)  # names of what may be it, their SHA-256
    partial: PartialFile | None = None
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    received: int = 0  # bytes of it that are here, those of earlier runs too
    arrived: bool = False  # nothing of it is left to read from the connection
    outcome: Outcome | None = None

    def held(self) -> list[int]:
        """Return the lengths, in bytes, of all that may be its beginning or the whole of it."""
        lengths = {claim.size for claim in self.claims}
        if self.twins and self.entry.size is not None:
            lengths.add(self.entry.size)
        return sorted(lengths)

    def hash_held(self, known: dict[str, str], keepalive: Keepalive) -> None:
        """Hash what is held of it, finished files only if not `known` yet; blocks until done."""
        for claim in self.claims:
            with contextlib.suppress(OSError, FileShrunk):  # then it has another SHA-256, too
                calculate_checksum(
                    claim.descriptor, claim.size, digest=claim.digest, on_progress=keepalive
                )
        for name in self.twins:
            assert self.folder is not None
            path = self.folder.path + name
            if path not in known:
                with contextlib.suppress(OSError):  # unreadable: not known to be the same
                    known[path] = calculate_checksum(path, on_progress=keepalive)
            self.twins[name] = known.get(path, "")

    def find_twin(self, checksum: str | None) -> str | None:
        """Return the name of the finished file whose SHA-256 is `checksum`, if there is one."""
        return next((name for name, its in self.twins.items() if its and its == checksum), None)

    def choose_partial(self, prefixes: dict[int, str]) -> None:
        """Go on with the longest partial file whose SHA-256 is the client's; remove the others."""
        for claim in sorted(self.claims, key=lambda claim: claim.size, reverse=True):
            if self.partial is None and prefixes.get(claim.size) == claim.digest.hexdigest():
                self.partial, self.digest, self.received = claim, claim.digest, claim.size
            else:
                claim.discard()
        self.claims = []

    def open(self) -> None:
        """Make a partial file for it unless one is gone on with. Raises OSError."""
        assert self.folder is not None
        if not self.folder.is_in_place():
            raise Refused("its folder was moved or removed meanwhile")
        if self.partial is None:
            self.partial = PartialFile.create(self.folder, name_of(self.entry))

    def consume(self, view: memoryview) -> None:
        """Write and hash its next bytes; blocks until done. Raises OSError."""
        assert self.partial is not None
        self.partial.write(view)
        self.digest.update(view)

    def size_on_disk(self) -> int:
        """How large its partial file really is. Raises OSError."""
        assert self.partial is not None
        return os.fstat(self.partial.descriptor).st_size

    def publish(self, overwrite: bool) -> str:
        """Move the complete file into place; return the name that it has there.

        Raises OSError and Refused.
        """
        assert self.folder is not None
        assert self.partial is not None
        name = self.partial.publish(self.folder, self.entry, overwrite)
        self.partial = None
        return name

    def discard(self) -> None:
        """Remove what is here of it."""
        if self.partial is not None:
            self.partial.discard()
            self.partial = None

    def close(self) -> None:
        """Let go of what is open; keep on disk what another run can go on from."""
        for claim in self.claims:
            claim.close()
        if self.entry.size is None or not self.received:
            self.discard()
        elif self.partial is not None:
            self.partial.close()


def find_twins(folder: Folder, entry: Entry, overwrite: bool) -> dict[str, str]:
    """Return the names of finished files that `entry` may be: theirs is its name and its size.

    Raises Refused where a folder has the name.
    """
    twins: dict[str, str] = {}
    for name in numbered_names(name_of(entry)):
        try:
            found = os.lstat(folder.path + name)
        except FileNotFoundError:
            return twins
        if name == name_of(entry) and stat.S_ISDIR(found.st_mode):
            raise Refused("a folder of that name is there already")
        if stat.S_ISREG(found.st_mode) and found.st_size == entry.size:
            twins[name] = ""
        if overwrite:
            break
    return twins


# --- file conversation ----------------------------------------------------------------------

# More partial files than this of one batch are not looked at again: each is an open file.
MAX_CLAIMS = 32
# How long the connection that a client has just lost may take to notice, and let go its file.
CLAIM_TIMEOUT_S = 2.0
CLAIM_INTERVAL_S = 0.02


@dataclass
class Store:
    """Where files go, and whether they replace others of their name."""

    folder: str
    overwrite: bool = False


def handle_file_client(connection: Connection, store: Store) -> None:
    """Take all the files that one client sends; blocks until it is done or gone.

    Whatever goes wrong ends in a line of the log, never in an exception: other clients go on.
    """
    reception = Reception(connection, store)
    try:
        while (batch := reception.receive_offer()) is not None:
            reception.receive_batch(batch)
    except ProtocolError as error:
        log.warning("%s: %s", connection.peer, error)
        with contextlib.suppress(SocketPairError):
            connection.send(common.Error(str(error)))
            connection.finish()
    except SocketPairError as error:
        log.warning("%s: %s%s", connection.peer, error, reception.describe_current())
    except OSError as error:
        log.error("%s: %s", connection.peer, escape(str(error)))


class Reception:
    """The conversation with one client that sends files."""

    def __init__(self, connection: Connection, store: Store) -> None:
        self._connection = connection
        self._store = store
        self._folders = Folders(store.folder)
        self._current: Incoming | None = None
        self._claims_left = MAX_CLAIMS
        self._results: list[tuple[int, Outcome]] = []  # by index, not told yet
        self._told = Deadline(KEEPALIVE_INTERVAL_S)

    def describe_current(self) -> str:
        """Return what becomes of the file that was under way, for the end of a log line."""
        if self._current is None or not self._current.received or not self._current.entry.size:
            return ""
        path, received = self._current.entry.path, self._current.received
        return f"; {format_bytes(received)} of {escape(path)} are kept for the next run"

    def receive_offer(self) -> list[Incoming] | None:
        """Return the next batch; None when the client has hung up instead: it is done."""
        try:
            offer = self._connection.receive(Offer)
        except PeerClosed:
            return None
        return [
            Incoming(index, entry if isinstance(entry, Entry) else Entry(""))
            for index, entry in enumerate(offer.entries)
        ]

    def receive_batch(self, batch: list[Incoming]) -> None:
        """Answer an offer, take what is then sent, and say what became of each entry."""
        try:
            self._look_up(batch)
            self._compare([incoming for incoming in batch if incoming.held()])
            self._check_space(batch)
            self._connection.send(Start([each.outcome or each.received for each in batch]))
            for incoming in batch:
                if incoming.outcome is None:
                    self._receive_entry(incoming)
            self._tell_results()
        finally:
            for incoming in batch:
                incoming.close()

    # before the transfer

    def _look_up(self, batch: list[Incoming]) -> None:
        """Find where each entry goes and what is there of it already."""
        patience = Deadline(CLAIM_TIMEOUT_S)
        self._claims_left = MAX_CLAIMS
        self._folders.forget_moved()
        for incoming in batch:
            try:
                check_name(name_of(incoming.entry))
                if not incoming.entry.is_folder:
                    incoming.folder = self._folders.locate(folder_of(incoming.entry))
                    # Partial files first: one that is moved into place meanwhile is a twin then.
                    self._claim(incoming, patience)
                    incoming.twins = find_twins(
                        incoming.folder, incoming.entry, self._store.overwrite
                    )
            except (Refused, OSError) as error:
                self._fail(incoming, error)

    def _claim(self, incoming: Incoming, patience: Deadline) -> None:
        """Claim what earlier runs have left of an entry."""
        assert incoming.folder is not None
        paths = incoming.folder.leftovers.pop(partial_stem(name_of(incoming.entry)), [])
        for path in paths[: self._claims_left]:
            if incoming.entry.size is not None and (claim := claim_patiently(path, patience)):
                incoming.claims.append(claim)
                self._claims_left -= 1

    def _compare(self, held: list[Incoming]) -> None:
        """Find out, together with the client, what of the files here is the same as there."""
        if not held:
            return
        connection = self._connection
        connection.send(Held([(each.index, each.held()) for each in held]))
        keepalive = Keepalive(lambda: connection.send(Hashing()))
        known: dict[str, str] = {}
        for incoming in held:
            incoming.hash_held(known, keepalive)
        answers = self._receive_prefixes(len(held))
        for incoming, checksums in zip(held, answers, strict=True):
            # Short where the client could not read so much of its file.
            prefixes = dict(zip(incoming.held(), checksums, strict=False))
            incoming.choose_partial(prefixes)
            twin = incoming.find_twin(prefixes.get(incoming.entry.size or 0))
            if twin is not None:
                incoming.discard()
                incoming.outcome = Outcome("already", twin)

    def _receive_prefixes(self, count: int) -> Sequence[Sequence[str]]:
        while isinstance(message := self._connection.receive(Prefixes, Hashing), Hashing):
            pass
        if len(message.entries) != count:
            raise ProtocolError("received a message with bad 'entries'")
        return message.entries

    def _check_space(self, batch: list[Incoming]) -> None:
        """Refuse what cannot fit, file by file, before any of it is sent."""
        free: dict[int, int] = {}
        for incoming in batch:
            entry, folder = incoming.entry, incoming.folder
            if incoming.outcome is not None or folder is None or not entry.size:
                continue
            try:
                if folder.device not in free:
                    free[folder.device] = shutil.disk_usage(folder.path).free
            except OSError as error:
                self._fail(incoming, error)
                continue
            needed = entry.size - incoming.received
            if needed <= free[folder.device]:
                free[folder.device] -= needed
            else:
                there = format_bytes(free[folder.device])
                shortage = f"{format_bytes(needed)} needed, {there} free"
                self._fail(incoming, Refused(f"the disk is too full ({shortage})"))

    # the transfer

    def _receive_entry(self, incoming: Incoming) -> None:
        """Take one entry, and note its result."""
        self._current = incoming
        large = incoming.entry.size is None or incoming.entry.size > SEGMENT_BYTES
        if large or not self._connection.buffered() or self._told.remaining() == 0:
            self._tell_results()  # before what may take a while
        try:
            if incoming.entry.is_folder:
                self._make_folder(incoming)
            else:
                self._receive_file(incoming)
        except (Refused, GivenUp, OSError) as error:
            incoming.discard()
            self._fail(incoming, error)
        if incoming.outcome is not None:
            self._results.append((incoming.index, incoming.outcome))
        if not incoming.arrived:
            # Let the client know, so that it stops sending what nobody can keep.
            self._tell_results()
            self._pass_over(incoming)
        self._current = None

    def _make_folder(self, incoming: Incoming) -> None:
        """Make an offered folder, or find it there; it comes after all that is in it."""
        incoming.arrived = True
        folder = self._folders.locate(incoming.entry.path)
        set_times(folder.path, incoming.entry.mtime_ns)
        incoming.outcome = Outcome("saved", name_of(incoming.entry))

    def _receive_file(self, incoming: Incoming) -> None:
        """Take a file's bytes and move it into place.

        Raises OSError for what fails on this side, Refused where it is not to be kept, GivenUp.
        """
        started, offset = time.monotonic(), incoming.received
        incoming.open()
        with blocks_for(incoming.entry.size, incoming.consume) as blocks:
            checksum = self._receive_segments(incoming, blocks)
        whole = incoming.entry.size in (None, incoming.received)
        if not whole or checksum != incoming.digest.digest():
            raise Refused("its SHA-256 does not match: it changed while it was sent")
        if incoming.size_on_disk() != incoming.received:
            raise Refused("another program writes to its hidden file here")
        incoming.outcome = Outcome("saved", incoming.publish(self._store.overwrite))
        self._log_saved(incoming, incoming.received - offset, time.monotonic() - started)

    def _receive_segments(self, incoming: Incoming, blocks: Blocks) -> bytes:
        """Hand all segments of a file to `blocks`; return the client's SHA-256 of the whole.

        Raises GivenUp, and whatever `blocks` raises.
        """
        connection, size = self._connection, incoming.entry.size
        # A large file's bytes go straight into the blocks; many small files come with one call.
        ahead = RECEIVE_BYTES if size is not None and size < RECEIVE_BYTES else 0
        while (length := connection.read_length(ahead)) != END_OF_FILE:
            if length == GIVEN_UP:
                incoming.arrived = True
                raise GivenUp("the client gave up in the middle of it")
            if length == STILL_HERE:
                continue
            if length > SEGMENT_BYTES:
                raise ProtocolError(f"received a segment of {length} bytes")
            if size is not None and incoming.received + length > size:
                raise ProtocolError("received more of a file than was offered")
            segment = blocks.take()[:length]
            connection.read_into(segment)
            incoming.received += length
            blocks.give(segment)
        checksum = connection.read(hashlib.sha256().digest_size)
        incoming.arrived = True
        return checksum

    def _pass_over(self, incoming: Incoming) -> None:
        """Read and drop the rest of a file that has failed here."""
        with contextlib.suppress(GivenUp), Blocks(lambda view: None) as blocks:
            self._receive_segments(incoming, blocks)

    # results

    def _fail(self, incoming: Incoming, error: Exception) -> None:
        reason = describe_error(error)
        incoming.outcome = Outcome("failed", reason)
        log.warning("%s failed %s: %s", self._connection.peer, escape(incoming.entry.path), reason)

    def _tell_results(self) -> None:
        if self._results:
            self._connection.send(Results(self._results))
            self._results = []
        self._told = Deadline(KEEPALIVE_INTERVAL_S)

    def _log_saved(self, incoming: Incoming, count: int, seconds: float) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        assert incoming.folder is not None
        assert incoming.outcome is not None
        below = incoming.folder.shown + incoming.outcome.text
        path = os.path.join(self._store.folder, below)
        rest = (
            ""
            if count == incoming.received
            else f" (the rest of {format_bytes(incoming.received)})"
        )
        # The path is the only word of the client's, and the last: nothing in a name can be taken
        # for another part of the line by whoever reads it.
        log.info(
            f"{self._connection.peer} sent {format_bytes(count)}{rest} in {seconds:.2f} s "
            f"({format_bytes(count / max(seconds, 1e-6))}/s), "
            f"SHA-256 {incoming.digest.hexdigest()[:8]}, saved as {spell_path(path)}"
        )


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


def claim_patiently(path: str, patience: Deadline) -> PartialFile | None:
    """Claim the partial file at `path`; None if it is gone or stays in use.

    A client that was cut off comes back at once, perhaps before its old connection has been
    found broken: so it is worth waiting a moment for the file. (Nothing tells when a lock is
    let go, but taking it: hence the short sleeps.)
    """
    while True:
        try:
            return PartialFile.claim(path)
        except BlockingIOError:
            if not patience.remaining():
                return None
            time.sleep(CLAIM_INTERVAL_S)


# --- sound: inputs --------------------------------------------------------------------------

STDIN = "-"
DEFAULT_RATE = 48_000
DEFAULT_SYNC_MS = 80
# What may wait between capture and broadcaster; more has gathered only on a machine that stood.
CAPTURE_LIMIT_MS = 2_000
SILENCE_LIMIT_MS = 10_000
PACING_SLACK_S = 0.2


class CaptureQueue:
    """Hands captured sound from whichever input there is to the broadcaster, and numbers it.

    One thread puts, another takes. Sound that is not taken for ``CAPTURE_LIMIT_MS`` is thrown
    away as it comes; the numbers of the frames show it.
    """

    def __init__(self, audio: AudioFormat) -> None:
        self.audio = audio
        self.end_reason: str | None = None
        self.failed = False
        self._blocks: queue.SimpleQueue[AudioBlock | None] = queue.SimpleQueue()
        self._limit_blocks = CAPTURE_LIMIT_MS / CAPTURE_BLOCK_MS
        self._next_frame = 0
        self._taken_frames = 0
        self._held: AudioBlock | None = None
        self._line = common.TimeLine(audio.rate)

    def put(self, samples: bytes, ago_s: float = 0.0) -> None:
        """Hand over a block of about ``CAPTURE_BLOCK_MS``, numbered. Never blocks.

        Its last frame was captured `ago_s` before the call.
        """
        next_frame = self._next_frame + self.audio.frames_of(samples)
        captured_s = self._line.see(next_frame, time.monotonic() - ago_s)
        if self._blocks.qsize() < self._limit_blocks:
            self._blocks.put(AudioBlock(self._next_frame, round(captured_s * 1e9), samples))
        self._next_frame = next_frame

    def skip(self, seconds: float) -> None:
        """Count frames that nobody captured for so long, so that the numbers keep time."""
        self._next_frame += self.audio.frames_in(seconds * 1000)

    def end(self, reason: str, failed: bool = False) -> None:
        """Let the taker know, once all is taken, that nothing more comes, and why."""
        self.end_reason, self.failed = reason, failed
        self._blocks.put(None)

    def take(self, timeout_s: float) -> AudioBlock | None:
        """Return all consecutive sound that has gathered, as one block; None at the end.

        Blocks for the first of it, up to `timeout_s`; an empty block if none came by then.
        """
        try:
            first = self._held or self._blocks.get(timeout=timeout_s)
        except queue.Empty:
            return AudioBlock(self._taken_frames, time.monotonic_ns(), b"")
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


class Silence:
    """Notices a microphone that gives nothing but zeros: no real one is that quiet."""

    def __init__(self, audio: AudioFormat) -> None:
        self._limit_frames = audio.frames_in(SILENCE_LIMIT_MS)
        self._audio = audio
        self._frames = 0
        self._is_told = False

    def is_to_be_told(self, samples: bytes) -> bool:
        """Count `samples`; return whether it is time to tell of the silence, once for all."""
        is_silent = samples.count(0) == len(samples)
        self._frames = self._frames + self._audio.frames_of(samples) if is_silent else 0
        if self._is_told or self._frames < self._limit_frames:
            return False
        self._is_told = True
        return True


class Microphone:
    """Captures from a sound card from the first moment on. Raises AudioUnavailable."""

    def __init__(self, card: SoundCard, audio: AudioFormat) -> None:
        self.name = card.name
        self.captured = CaptureQueue(audio)
        self._card = card
        self._silence = Silence(audio)
        card.open(audio, self._hand_over, self.captured.skip)

    def start(self) -> None:
        """Nothing to do: it captures already."""

    def _hand_over(self, samples: bytes | None, frames: int, ago_s: float) -> None:
        """Take a block, whose first frame was captured `ago_s` before; PortAudio's thread calls."""
        captured = samples or b""
        self.captured.put(captured, ago_s - frames / self.captured.audio.rate)
        if self._silence.is_to_be_told(captured):
            # The log may block, as PortAudio's thread must not.
            threading.Thread(target=self._tell_of_silence, name="silence", daemon=True).start()

    def _tell_of_silence(self) -> None:
        log.warning(
            "the microphone %s has given nothing but zeros for %d s: is it muted, or another one "
            "meant (see --list-devices)?",
            self.name,
            SILENCE_LIMIT_MS // 1000,
        )

    def close(self) -> None:
        """Stop to capture."""
        self._card.close()


def open_microphone(wanted: str | None, rate: int | None, channels: int | None) -> Microphone:
    """Return a microphone at `rate` and `channels`; raises AudioUnavailable.

    What is left out is 48,000 Hz and mono where the device does that, else what it has itself.
    """
    with contextlib.ExitStack() as closing:
        card = closing.enter_context(
            contextlib.closing(SoundCard(common.MICROPHONE, wanted, log.warning))
        )
        usual = AudioFormat(rate or DEFAULT_RATE, channels or 1)
        own = AudioFormat(rate or card.own_format.rate, channels or card.own_format.channels)
        try:
            microphone = Microphone(card, usual)
        except AudioUnavailable:
            if own == usual:
                raise
            microphone = Microphone(card, own)
        closing.pop_all()
    return microphone


class PacedInput:
    """Reads sound that is not live, in real time: a thread of its own, a block at a time.

    `read` returns the next samples, up to as many bytes as it is asked for, and none at the end;
    it may block. A source that falls behind is not rushed after: time starts anew.
    """

    def __init__(self, name: str, read: Callable[[int], bytes], captured: CaptureQueue) -> None:
        self.name = name
        self._read = read
        self.captured = captured
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Nothing to do: the thread ends with the process, or its input."""

    def _run(self) -> None:
        audio = self.captured.audio
        block_bytes = audio.frames_in(CAPTURE_BLOCK_MS) * audio.frame_bytes
        start_s = due_s = time.monotonic()
        try:
            while samples := self._read(block_bytes):
                due_s += audio.frames_of(samples) / audio.rate
                late_s = time.monotonic() - due_s
                if late_s > PACING_SLACK_S:
                    due_s += late_s
                elif late_s < 0:
                    time.sleep(-late_s)
                self.captured.put(samples)
            if due_s == start_s:  # whoever was to write there has failed, most likely
                self.captured.end(f"there was no sound on {self.name}", failed=True)
            else:
                self.captured.end(f"{self.name} is at its end")
        except (OSError, SocketPairError) as error:
            reason = describe_error(error)
            self.captured.end(f"{self.name} cannot be read any further ({reason})", failed=True)


def whole_frames_reader(file: BinaryIO, audio: AudioFormat) -> Callable[[int], bytes]:
    """Return a function that reads `file` and passes over a last frame that is incomplete."""

    def read(size: int) -> bytes:
        samples = file.read(size)
        return samples[: audio.frames_of(samples) * audio.frame_bytes]

    return read


def open_input(args: argparse.Namespace) -> Microphone | PacedInput:
    """Return what ``--input`` names, ready to start. Raises SocketPairError where there is none."""
    if args.input is not None and names_sound_file(args.input):
        return open_sound_file(args.input, args.rate, args.channels)
    if args.input == STDIN:
        return open_standard_input(AudioFormat(args.rate or DEFAULT_RATE, args.channels or 1))
    return open_microphone(args.input, args.rate, args.channels)


def open_standard_input(audio: AudioFormat) -> PacedInput:
    """Return raw PCM on standard input as an input; raises SocketPairError at a terminal."""
    if sys.stdin.isatty():
        raise SocketPairError(
            "--input - is for another program or a file, not for a terminal: add | or <"
        )
    read = whole_frames_reader(sys.stdin.buffer, audio)
    return PacedInput("standard input", read, CaptureQueue(audio))


# --- sound: files ---------------------------------------------------------------------------

# Names that end so are files, also where there is none of that name to be found.
SOUND_ENDINGS = (
    *(".wav", ".wave", ".w64", ".rf64", ".mp3", ".mp2", ".flac", ".ogg", ".oga", ".opus", ".spx"),
    *(".m4a", ".m4b", ".mp4", ".mka", ".mkv", ".webm", ".aac", ".ac3", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".caf", ".wma", ".wv", ".ape", ".tta", ".amr"),
)
PATH_BEGINNINGS = ("/", "./", "../", "~", ".\\", "..\\")
# How files of other kinds begin, and the first bytes of each at which that stands.
MAGIC_NUMBERS = (
    (0, b"ID3", "MP3"),
    (0, b"\xff\xfb", "MP3"),
    (0, b"\xff\xf3", "MP3"),
    (0, b"fLaC", "FLAC"),
    (0, b"OggS", "Ogg"),
    (4, b"ftyp", "MP4"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM"),
    (0, b"FORM", "AIFF"),
    (0, b"RF64", "RF64"),
    (0, b".snd", "AU"),
    (0, b"caff", "CAF"),
)
# The beginning takes a while to be found again and decoded: longer than a block.
READ_AHEAD_PARTS = 16
READ_BYTES = 16 * 1024
SHORT_BYTES = 1024 * 1024  # sound of less stays in memory
WAV_CHUNK = struct.Struct("<4sI")
WAV_FORMAT = struct.Struct("<HHIIHH")
WAV_FORMAT_BYTES = 40  # with what WAVE_FORMAT_EXTENSIBLE has more
WAV_PCM, WAV_EXTENSIBLE = 1, 0xFFFE
WAV_ENCODINGS = {2: "ADPCM", 3: "floating-point", 6: "A-law", 7: "mu-law", 17: "ADPCM", 85: "MP3"}
# What recorders write for a size that they do not know yet: this or more, or 0.
WAV_UNKNOWN_BYTES = 0x7FFF_0000
MAX_WAV_CHUNKS = 1_000
# Their headers tell the exact length: with less than that decoded, such a file is broken.
EXACT_CODECS = ("flac", "alac", "wavpack", "tta", "ape")
PLAIN_LAYOUTS = {"1 channels": "mono", "2 channels": "stereo"}


class Unplayable(SocketPairError):
    """A sound file that cannot be read, or no further, and why."""


class NotPlainWav(Unplayable):
    """A file that is not WAV with 16-bit PCM, but may be sound all the same; and what it is."""


class SoundFile(Protocol):
    """A file of sound that can be read from its beginning again and again."""

    audio: AudioFormat

    def read_once(self) -> Iterator[bytes]:
        """Give all the file's sound in `audio`, in parts of any length; blocks for the disk.

        A part may end inside a frame, the whole does not. Raises Unplayable where the file is
        broken, after all that could be read, and OSError.
        """


class WavSamples(NamedTuple):
    """Where in a WAV file its samples are; `size` is None where its recorder did not tell."""

    audio: AudioFormat
    start: int
    size: int | None


class PlainWav:
    """A WAV file with 16-bit PCM, read as it is."""

    def __init__(self, path: str) -> None:
        """Raise NotPlainWav where it is something else, and OSError."""
        self._path = path
        with open(path, "rb") as file:
            self._samples = find_wav_samples(file)
        self.audio = self._samples.audio

    def read_once(self) -> Iterator[bytes]:
        """Give all the samples; see `SoundFile`."""
        _, start, size = self._samples
        with open(self._path, "rb", buffering=0) as file:
            file.seek(start)
            left = os.fstat(file.fileno()).st_size - start if size is None else size
            left -= left % self.audio.frame_bytes
            while left:
                samples = file.read(min(READ_BYTES, left))
                if not samples:
                    seconds = left / self.audio.frame_bytes / self.audio.rate
                    raise Unplayable(f"the last {seconds:.3g} s of it are missing")
                left -= len(samples)
                yield samples


def find_wav_samples(file: BinaryIO) -> WavSamples:
    """Return where the samples of a WAV file are; `file` is at its beginning.

    Raises NotPlainWav where they are not 16-bit PCM.
    """
    beginning = file.read(12)
    if beginning[:4] != b"RIFF" or beginning[8:] != b"WAVE":
        raise NotPlainWav(describe_content(beginning))
    audio = None
    for _ in range(MAX_WAV_CHUNKS):
        header = file.read(WAV_CHUNK.size)
        if len(header) < WAV_CHUNK.size:
            break
        kind, size = WAV_CHUNK.unpack(header)
        start = file.tell()
        if kind == b"fmt ":
            audio = parse_wav_format(file.read(min(size, WAV_FORMAT_BYTES)))
        elif kind == b"data" and audio and file.read(1):
            file.seek(start)
            return WavSamples(audio, start, known_wav_size(file, size))
        file.seek(start + size + size % 2)
    raise NotPlainWav("WAV without samples")


def parse_wav_format(fields: bytes) -> AudioFormat:
    """Return what a ``fmt`` chunk says; raises NotPlainWav where that is not 16-bit PCM."""
    if len(fields) < WAV_FORMAT.size:
        raise NotPlainWav("WAV with a broken header")
    encoding, channels, rate, _, frame_bytes, bits = WAV_FORMAT.unpack_from(fields)
    if encoding == WAV_EXTENSIBLE and len(fields) == WAV_FORMAT_BYTES:
        encoding = int.from_bytes(fields[24:26], "little")
    audio = AudioFormat(rate, channels)
    if encoding != WAV_PCM:
        raise NotPlainWav(f"WAV with {WAV_ENCODINGS.get(encoding, 'compressed')} samples")
    if bits != 8 * common.SAMPLE_BYTES or frame_bytes != audio.frame_bytes:
        raise NotPlainWav(f"WAV with {bits}-bit samples")
    if not is_broadcast_format(audio):
        raise NotPlainWav(f"WAV with {audio.describe()}, which is out of range")
    return audio


def known_wav_size(file: BinaryIO, size: int) -> int | None:
    """Return the size that a WAV file tells of its samples, None where that is a placeholder.

    Recorders write the true one at their end: one that was killed has left 0 or a very large
    number there. `file` is where the samples begin.
    """
    there = os.fstat(file.fileno()).st_size - file.tell()
    if (size == 0 or size >= WAV_UNKNOWN_BYTES) and size != there:
        return None
    return size


def is_broadcast_format(audio: AudioFormat) -> bool:
    """Return whether sound of that format can go to listeners."""
    return audio.rate in common.SAMPLE_RATES and audio.channels in common.CHANNEL_COUNTS


def describe_content(beginning: bytes) -> str:
    """Return what kind of file begins so, in words."""
    if not beginning:
        return "empty"
    for position, magic, name in MAGIC_NUMBERS:
        if beginning[position:].startswith(magic):
            return name
    return "not a WAV file"


class DecodedFile:
    """A file that FFmpeg reads, by package ``av``, decoded and converted to the wanted format.

    The rate and the channels that are not wanted otherwise are the file's own.
    """

    def __init__(self, path: str, rate: int | None, channels: int | None) -> None:
        """Raise Unplayable where it cannot be read, ImportError without ``av``."""
        import av  # noqa: PLC0415  (only these files need it)

        self._av = av
        # Named as a file: FFmpeg would read from the network as well.
        self._url = b"file:" + os.fsencode(path)
        with self._translated(), self._open() as container:
            first = next(decode_frames(container), None)
            if first is None:
                raise Unplayable("there is no sound in it")
            own = AudioFormat(first.sample_rate, len(first.layout.channels))
            self.audio = AudioFormat(
                rate or (own.rate if own.rate in common.SAMPLE_RATES else DEFAULT_RATE),
                channels or (own.channels if own.channels in common.CHANNEL_COUNTS else 2),
            )
            Converter(av, self.audio).check(first)

    def _open(self) -> Any:
        return self._av.open(
            os.fsdecode(self._url),
            metadata_errors="replace",
            options={"protocol_whitelist": "file"},
        )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise what FFmpeg says as Unplayable."""
        try:
            yield
        except self._av.error.FFmpegError as error:
            reason = (error.strerror or str(error)).lower()
            raise Unplayable(f"FFmpeg cannot read it ({reason})") from error

    def read_once(self) -> Iterator[bytes]:
        """Give all the sound, converted; see `SoundFile`."""
        converter = Converter(self._av, self.audio)
        decoded = 0
        with self._translated(), self._open() as container:
            for frame in decode_frames(container):
                decoded += frame.samples
                yield from converter.convert(frame)
            yield from converter.finish()
            check_length(container.streams.audio[0], decoded)


def decode_frames(container: Any) -> Iterator[Any]:
    """Give the frames of a container's first sound, without packets that are damaged.

    Raises Unplayable at the end where the last of them was.
    """
    if not container.streams.audio:
        raise Unplayable("there is no sound in it")
    damage = None
    stream = container.streams.audio[0]
    context = stream.codec_context
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


class Converter:
    """Converts decoded frames to one format, also where theirs changes on the way."""

    def __init__(self, av: Any, audio: AudioFormat) -> None:
        self._av = av
        self._audio = audio
        self._source: tuple[Any, ...] = ()
        self._resampler: Any = None
        self._is_doubled = False

    def convert(self, frame: Any) -> Iterator[bytes]:
        """Give what has come out for this frame and those before it."""
        source = (frame.format.name, frame.layout.name, frame.sample_rate)
        if source != self._source:
            yield from self.finish()
            self._source, self._resampler = source, self._make_resampler(frame)
        frame.pts = None  # each follows the one before, whatever the file says
        yield from map(self._samples_of, self._resampler.resample(frame))

    def check(self, frame: Any) -> None:
        """Raise Unplayable where such a frame cannot be converted."""
        self._make_resampler(frame)

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


class SoundLoop:
    """A sound file over and over, without a gap, read some way ahead by a thread of its own."""

    def __init__(self, sound: SoundFile) -> None:
        self._sound = sound
        self._parts: queue.Queue[bytes | Exception] = queue.Queue(READ_AHEAD_PARTS)
        self._unread = b""
        self._error: Exception | None = None
        threading.Thread(target=self._read_ahead, name="sound file", daemon=True).start()

    def _read_ahead(self) -> None:
        try:
            for part in over_and_over(self._sound):
                self._parts.put(part)
        except (OSError, Unplayable) as error:
            self._parts.put(error)

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer just before the end of a file that is broken.

        Blocks for the disk. Raises there what is wrong: Unplayable or OSError.
        """
        while len(self._unread) < size and not self._error:
            part = self._parts.get()
            if isinstance(part, Exception):
                self._error = part
            else:
                self._unread += part
        samples, self._unread = self._unread[:size], self._unread[size:]
        whole_bytes = self._sound.audio.frames_of(samples) * self._sound.audio.frame_bytes
        if self._error and not whole_bytes:
            raise self._error
        return samples[:whole_bytes]


def over_and_over(sound: SoundFile) -> Iterator[bytes]:
    """Give a file's sound without an end; raises as `SoundFile.read_once` does."""
    while True:
        kept = bytearray()
        for part in sound.read_once():
            if len(kept) <= SHORT_BYTES:
                kept += part
            yield part
        if not kept:
            raise Unplayable("there is no sound in it")
        if len(kept) <= SHORT_BYTES:  # a disk need not be asked for it a thousand times a second
            yield from itertools.repeat(bytes(kept) * (1 + READ_BYTES // len(kept)))


def names_sound_file(text: str) -> bool:
    """Return whether ``--input`` means a file rather than a microphone."""
    if text.isdigit():
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
    return PacedInput(escape(name), SoundLoop(sound).read, CaptureQueue(sound.audio))


def find_sound(path: str, rate: int | None, channels: int | None) -> SoundFile:
    """Return the sound file at `path`, read as it is or converted; raises Unplayable, OSError."""
    check_sound_file(path)
    try:
        plain = PlainWav(path)
        if plain.audio == AudioFormat(rate or plain.audio.rate, channels or plain.audio.channels):
            return plain
        problem = f"it is {plain.audio.describe()}, and converted only with package av"
    except NotPlainWav as error:
        problem = f"it is {error}, and without package av only 16-bit WAV plays"
    try:
        return DecodedFile(path, rate, channels)
    except ImportError:
        raise Unplayable(f"{problem}: {common.how_to_install('av')}") from None


def check_sound_file(path: str) -> None:
    """Raise Unplayable where nothing at `path` can be read over and over, and OSError."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise Unplayable("it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise Unplayable("it is not a file: give --input - what is read from it")
    if not status.st_size:
        raise Unplayable("it is empty")


# --- sound: broadcaster ---------------------------------------------------------------------

LISTENER_TIMEOUT_S = 5.0
SILENCE_S = 3600.0  # of a client, which need not say anything
REQUESTS_AT_ONCE = 200
REQUESTS_PER_S = 20
# Small writes take a multiple of their size in the system's buffers.
SEND_BUFFER_MS = 200
MIN_SEND_BUFFER_BYTES = 16 * 1024
LONGEST_REST_S = 0.02


class Listener:
    """One client's end of the broadcast: takes blocks as fast as its network does, or misses them.

    A block that was begun is always finished, so that the client can tell where the next one
    starts. The broadcaster's thread calls `offer`, `end` and `lose`; the client's own thread
    `take_requests`, and `finish` after that.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.missed_blocks = 0
        self.gone = threading.Event()
        self.loss: str | None = None
        self._progress_s = self._asked_s = time.monotonic()
        self._requests: deque[tuple[int, int]] = deque(maxlen=REQUESTS_AT_ONCE)
        self._requests_left: float = REQUESTS_AT_ONCE

    def offer(self, frame: bytes, now_s: float) -> None:
        """Give a block to the system, behind what was asked for, or miss it. Never blocks."""
        sent_bytes = self.connection.sent_bytes
        try:
            if not self.connection.offer(self._replies() + frame):
                self.missed_blocks += 1
        except common.ConnectionLost:  # as every client ends that is stopped
            self.lose("")
            return
        if self.connection.sent_bytes != sent_bytes:
            self._progress_s = now_s
        elif now_s - self._progress_s > LISTENER_TIMEOUT_S:
            self.lose(f"took nothing for {LISTENER_TIMEOUT_S:.0f} s")

    def _replies(self) -> bytes:
        """Return the answers to all requests for the time, as frames."""
        replies = b""
        while self._requests:
            replies += TimeReply(*self._requests.popleft(), time.monotonic_ns()).encode()
        return replies

    def lose(self, reason: str) -> None:
        """Send no more to this listener, and wake its thread. `reason` may be empty."""
        # So that nothing, not even a goodbye, goes out behind a block that was cut off.
        self.connection.wake()
        self.loss = reason
        self.gone.set()

    def end(self) -> None:
        """Have the client's thread finish, as no more sound comes. Idempotent."""
        self.gone.set()
        self.connection.stop_reading()

    def take_requests(self) -> None:
        """Take the client's requests for the time; blocks until it has left, or is to leave.

        Raises ProtocolError where it sends anything else, or too much.
        """
        while not self.gone.is_set():
            try:
                with self.connection.limit(SILENCE_S):
                    request = self.connection.receive(TimeRequest, max_bytes=common.MAX_HELLO_BYTES)
            except PeerStalled:  # it need not ask
                continue
            except common.ConnectionLost:
                if not self.gone.is_set():
                    self.lose("")
                return
            self._spend_request()
            self._requests.append((request.asked_ns, time.monotonic_ns()))

    def _spend_request(self) -> None:
        now_s = time.monotonic()
        gained = (now_s - self._asked_s) * REQUESTS_PER_S
        self._requests_left = min(REQUESTS_AT_ONCE, self._requests_left + gained) - 1
        self._asked_s = now_s
        if self._requests_left < 0:
            raise ProtocolError("it asks for the time too often")

    def finish(self, reason: str) -> None:
        """Send what is unsent, the end of the sound, and `reason`; blocks a while at most.

        Raises ConnectionLost.
        """
        with self.connection.limit(LISTENER_TIMEOUT_S):
            self.connection.write(StreamEnd(reason).encode())


class Broadcaster:
    """Sends what is captured to every listener, from one thread that waits for none of them.

    One round goes once through all listeners. While it takes less than a block's time each block
    is sent as it comes. When there are so many listeners that it takes longer, the next round
    sends all that has gathered since in one write: the load sets the size of a write.
    """

    def __init__(self, captured: CaptureQueue) -> None:
        self.captured = captured
        self.meter = LevelMeter()
        self.missed_blocks = 0
        self.listener_count = 0
        self.served_count = 0
        self._listeners: tuple[Listener, ...] = ()
        self._lock = threading.Lock()
        self.sent_s = 0.0
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="broadcaster", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for the sound to end; return whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def add(self, connection: Connection) -> Listener:
        """Return a new listener, which gets every block from now on."""
        listener = Listener(connection)
        with self._lock:
            # A new tuple, not a changed list: the broadcaster goes through the old one unlocked.
            self._listeners = (*self._listeners, listener)
            self.listener_count = len(self._listeners)
            self.served_count += 1
            if self._ended:
                listener.end()
        return listener

    def remove(self, listener: Listener) -> None:
        """Send no more to `listener`. May be called twice."""
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other is not listener)
            self.listener_count = len(self._listeners)
            self.missed_blocks += listener.missed_blocks
            listener.missed_blocks = 0

    def _run(self) -> None:
        while (block := self.captured.take(timeout_s=KEEPALIVE_INTERVAL_S)) is not None:
            started_s = time.monotonic()
            self._send_round(block, started_s)
            self._rest(time.monotonic() - started_s)
        with self._lock:
            self._ended = True
        for listener in self._listeners:
            listener.end()

    def _send_round(self, block: AudioBlock, now_s: float) -> None:
        self.meter.hear(block.samples)
        self.sent_s += self.captured.audio.frames_of(block.samples) / self.captured.audio.rate
        frame = block.encode()
        for listener in self._listeners:
            if not listener.gone.is_set():
                listener.offer(frame, now_s)

    @staticmethod
    def _rest(round_s: float) -> None:
        """Leave the processor to others after a long round, at the price of larger writes."""
        if round_s > CAPTURE_BLOCK_MS / 1000:
            time.sleep(min(round_s, LONGEST_REST_S))


def handle_audio_client(connection: Connection, broadcaster: Broadcaster) -> None:
    """Let a client listen until it leaves or the sound ends; its thread waits here.

    The welcome is out. Whatever goes wrong with this client is logged, and ends it alone.
    """
    listener = None
    try:
        connection.limit_send_buffer(send_buffer_bytes(broadcaster.captured.audio))
        listener = broadcaster.add(connection)
        log.info("%s: listening", connection.peer)
        listener.take_requests()
        broadcaster.remove(listener)
        reason = listener.loss
        if reason is None:
            listener.finish(broadcaster.captured.end_reason or "the server has stopped")
            reason = "the sound has ended"
        log.info("%s: left%s", connection.peer, f" ({reason})" if reason else "")
    except (OSError, SocketPairError) as error:
        log.info("%s: left (%s)", connection.peer, error)
    finally:
        if listener:
            broadcaster.remove(listener)


def send_buffer_bytes(audio: AudioFormat) -> int:
    """Return how much the system may keep for a slow listener: what waits there is late."""
    return max(MIN_SEND_BUFFER_BYTES, audio.frames_in(SEND_BUFFER_MS) * audio.frame_bytes)


# --- who may connect ------------------------------------------------------------------------

# Wrong codes that an address may try before each further one has to wait, up to a limit: a client
# with the right code has to get in within its own time limit.
FREE_GUESSES = 5
MAX_GUESS_DELAY_S = 5.0
MAX_KNOWN_CROWDS = 4096
TLS_HANDSHAKE = 0x16  # the first byte that a TLS client sends
# What a client of protocol 1, which begins with TLS, tells its user as "alert protocol version".
PROTOCOL_VERSION_ALERT = bytes([0x15, 3, 3, 0, 2, 2, 70])
HTTP_METHODS = {b"GET ", b"HEAD", b"POST", b"PUT ", b"OPTI", b"CONN", b"PRI "}
NOT_A_WEB_SERVER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"This is a Socket Pair server, not a web server: python client.py\n"
)
CODE_WANTED = common.Error(
    f"this server wants its pairing code: give it with --code CODE or {common.CODE_VARIABLE}",
    common.CODE_WANTED,
)
NO_CODE = common.Error("this server has no pairing code", common.NO_CODE)
TOO_MANY_GUESSES = common.Error(
    "too many wrong pairing codes came from this address: try again in a minute", common.WAIT
)


class TurnedAway(SocketPairError):
    """A connection that is not served, and has been told so where that makes sense."""

    def __init__(self, text: str, log_level: int = logging.WARNING) -> None:
        super().__init__(text)
        self.log_level = log_level


class Lobby:
    """The connections that have not finished their handshake yet: so many of them at most.

    Where there are too many, one has to go: the oldest of the address that has most of them.
    So a flood from one address keeps nobody out but itself, and even there the newest stay.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[Connection, str] = {}  # and their crowds, the oldest first
        self._lock = threading.Lock()

    def enter(self, connection: Connection, crowd: str) -> None:
        """Let one in, and break another one if it is too many."""
        with self._lock:
            self._waiting[connection] = crowd
            if len(self._waiting) <= self._size:
                return
            largest, _ = Counter(self._waiting.values()).most_common(1)[0]
            oldest = next(each for each, its in self._waiting.items() if its == largest)
            del self._waiting[oldest]
        oldest.wake()

    def leave(self, connection: Connection) -> bool:
        """Let one out; False if it had to go before, or has left already."""
        with self._lock:
            return self._waiting.pop(connection, None) is not None


def crowd_of(host: str, own_host: str) -> str:
    """Return what stands for all the addresses that whoever has `host` may have.

    Of IPv6 that is a /64, unless `own_host`, the address that was connected to, is in it: on a
    network of this machine each address may be somebody else's.
    """
    address, own = (ipaddress.ip_address(each.partition("%")[0]) for each in (host, own_host))
    if address.version == 4:
        return host
    network = ipaddress.ip_network((address, 64), strict=False)
    return host if own in network else str(network)


@dataclass
class Guesses:
    """The tries at the pairing code from one crowd that were not right, or not yet."""

    count: int = 0
    latest_s: float = 0.0  # when the latest of them begins


class RateLimiter:
    """Slows down guesses at the pairing code from each crowd. For any thread.

    A guess counts from its beginning, and as wrong until it turns out right: any number of them
    at once are as slow as one after the other. A right one has to wait, too, but not for long.
    Remembers a bounded number of crowds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guesses: OrderedDict[str, Guesses] = OrderedDict()  # the latest last
        self._lock = threading.Lock()

    def reserve(self, crowd: str) -> float | None:
        """Return in how many seconds a guess may begin; None if it may not, as others wait."""
        now_s = self._clock()
        with self._lock:
            guesses = self._guesses.setdefault(crowd, Guesses())
            self._guesses.move_to_end(crowd)
            if len(self._guesses) > MAX_KNOWN_CROWDS:
                self._guesses.popitem(last=False)
            begin_s = now_s
            if guesses.count >= FREE_GUESSES:
                delay_s = min(2.0 ** (guesses.count - FREE_GUESSES), MAX_GUESS_DELAY_S)
                begin_s = max(now_s, guesses.latest_s + delay_s)
            if begin_s - now_s > MAX_GUESS_DELAY_S:
                return None
            guesses.count += 1
            guesses.latest_s = begin_s
        return begin_s - now_s

    def forgive(self, crowd: str) -> None:
        """Forget the wrong guesses: the right one came."""
        with self._lock:
            self._guesses.pop(crowd, None)


class Gate:
    """Lets clients in: those that prove to have the pairing code, or anyone without one."""

    def __init__(self, code: str | None) -> None:
        self._code = code
        self._limiter = RateLimiter()

    def let_in(self, connection: Connection, crowd: str) -> Hello:
        """Return the hello of a client that may come in; blocks within the `limit` it stands in.

        The first bytes tell who speaks, to answer each in its own language. Raises TurnedAway where
        it may not, which it has been told then, and whatever reading raises.
        """
        opening = connection.peek(LENGTH.size)
        if opening[0] == TLS_HANDSHAKE:
            self._turn_away_tls(connection)
        if opening in HTTP_METHODS:
            connection.write(NOT_A_WEB_SERVER)
            connection.finish()
            raise TurnedAway("not a Socket Pair client: it speaks HTTP, as a browser does")
        hello = self._receive_hello(connection)
        if hello.mode == common.PAIRING:
            if self._code is None:
                turn_away(connection, NO_CODE)
            self._pair(connection, self._code, crowd)
            return self._receive_hello(connection)
        if self._code is not None:
            turn_away(connection, CODE_WANTED)
        return hello

    @staticmethod
    def _turn_away_tls(connection: Connection) -> NoReturn:
        """Refuse a client that begins with TLS."""
        is_old = common.TLS_APPLICATION.encode() in connection.peek(connection.buffered())
        connection.write(PROTOCOL_VERSION_ALERT)
        connection.finish()
        if is_old:
            raise TurnedAway("turned away: it is of an older version of Socket Pair: update it")
        raise TurnedAway("not a Socket Pair client: it speaks TLS, as a browser does")

    @staticmethod
    def _receive_hello(connection: Connection) -> Hello:
        hello = connection.receive(Hello, max_bytes=common.MAX_HELLO_BYTES)
        if hello.protocol != common.PROTOCOL:
            ours, its = common.PROTOCOL, escape(str(hello.protocol), 20)
            older = "the client" if hello.protocol < ours else "the server"
            text = f"this server speaks protocol {ours}, not {its}: update {older}"
            turn_away(connection, common.Error(text))
        return hello

    def _pair(self, connection: Connection, code: str, crowd: str) -> None:
        """Let the client prove that it has the code, and prove that to it. Raises TurnedAway."""
        delay_s = self._limiter.reserve(crowd)
        if delay_s is None:
            turn_away(connection, TOO_MANY_GUESSES)
        pairing = common.Pairing(code, server_side=True)  # while the client makes its own
        request = connection.receive(Pair, max_bytes=common.MAX_HELLO_BYTES)
        if delay_s and connection.wait_for_peer(delay_s):
            raise TurnedAway("hung up while it waited to try a pairing code")
        connection.send(Pair(pairing.share))
        try:
            connection.start_tls(pairing.finish(request.share), server_side=True)
        except NotPaired as error:
            connection.finish()
            reason = "wrong pairing code" if error.wrong_code else f"it did not pair ({error})"
            raise TurnedAway(f"turned away: {reason}") from error
        except common.ConnectionLost as error:  # as who only guesses may do
            raise TurnedAway(f"did not prove that it has the pairing code ({error})") from error
        self._limiter.forgive(crowd)


def turn_away(connection: Connection, answer: common.Error) -> NoReturn:
    """Give a client its answer, and a moment to read it; raises TurnedAway."""
    connection.send(answer)
    connection.finish()
    if answer is CODE_WANTED:
        raise TurnedAway("was asked for the pairing code", logging.INFO)
    raise TurnedAway(f"turned away: {answer.error}")


# --- listener -------------------------------------------------------------------------------

# Base32 without 0, 1, I and O: nothing in a code looks like anything else in it.
CODE_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
MAX_CLIENTS = 64
MAX_LISTENERS = 2_000
# Connections that have not finished their handshake: a quarter of a second of a flood.
MAX_UNFINISHED = 256
OPEN_WARNING = {
    "file": "--open: anyone who can reach this port may send files here, and others on the "
    "network may read what is sent",
    "audio": "--open: anyone who can reach this port may listen, and others on the network too",
}
# Addresses of no machine (RFC 5737, RFC 3849).
ELSEWHERE = {socket.AF_INET: ("192.0.2.1", 9), socket.AF_INET6: ("2001:db8::1", 9)}
THIS_MACHINE = "ADDRESS-OF-THIS-MACHINE"
ALL_ADDRESSES = {"0.0.0.0": (socket.AF_INET,), "::": (socket.AF_INET, socket.AF_INET6)}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}  # by the version of IP
MAX_MACHINE_BYTES = 45  # the mode and a token are to fit behind it, in 63 bytes
ANNOUNCEMENT_TIMEOUT_S = 2.0
ADDRESS_CHECK_S = 5.0
NO_SUCH_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on all addresses of `host`; raises SocketPairError.

    Port 0 means any, the same for all of them.
    """
    listeners: list[socket.socket] = []
    passed_over = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            try:
                listeners.append(open_listener(family, address, port))
            except OSError as error:
                # A name can have an IPv6 address where the system does without IPv6.
                if error.errno not in NO_SUCH_ADDRESS:
                    raise
                passed_over = error
                continue
            port = listeners[0].getsockname()[1]
        if passed_over and not listeners:
            raise passed_over
    except (OSError, ValueError) as error:  # ValueError: a host that no name can be
        for listener in listeners:
            listener.close()
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        hint = "; a server runs there already, or another program: see --port" if taken else ""
        raise SocketPairError(
            f"cannot listen on {escape(common.format_address(host, port))}: "
            f"{describe_error(error)}{hint}"
        ) from error
    return listeners


def open_listener(family: int, address: tuple[Any, ...], port: int) -> socket.socket:
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
    with contextlib.suppress(OSError, UnicodeError):  # UnicodeError: a name that none should be
        for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), None):
            if family in families and not common.is_loopback(str(address[0])):
                return str(address[0])
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
        if not common.find_weakness(code):
            return f"{code[:4]}-{code[4:]}"


@dataclass
class Entrance:
    """Where a server listens, and what its clients have to know."""

    mode: str
    listeners: list[socket.socket]
    code: str | None  # the pairing code, normalized, if there is one
    new_code: str | None  # as it is shown, if it has just been made

    @classmethod
    def open(cls, args: argparse.Namespace, mode: str) -> Entrance:
        """Return the one that the arguments mean, listening. Raises SocketPairError."""
        listeners = open_listeners(args.host, args.port)
        entrance = cls(mode, listeners, args.code, None)
        if not (args.code or args.open or entrance.is_local()):
            entrance.new_code = make_code()
            entrance.code = common.normalize_code(entrance.new_code)
        if entrance.code:
            common.require_pairing_packages()
        return entrance

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.listeners[0].getsockname()[1])

    def bound_addresses(self) -> list[str]:
        """Return the addresses that it listens on; ``0.0.0.0`` and ``::`` are all."""
        return [str(listener.getsockname()[0]) for listener in self.listeners]

    def is_local(self) -> bool:
        """Tell whether only this machine can connect."""
        return all(map(common.is_loopback, self.bound_addresses()))

    def addresses(self) -> list[str]:
        """Return each address that other machines may reach it at."""
        bound, own = self.bound_addresses(), common.own_interfaces()
        families = [family for each in bound for family in ALL_ADDRESSES.get(each, ())]
        found = [str(each.ip) for each in own if FAMILIES[each.version] in families]
        found += [each for each in bound if each not in ALL_ADDRESSES]
        return [address for address in found if not common.is_loopback(address)]

    def networks(self) -> list[str]:
        """Return the addresses whose networks it can be reached from; none if from all."""
        is_everywhere = ALL_ADDRESSES.keys() & set(self.bound_addresses())
        return [] if is_everywhere else self.addresses()

    def describe(self, doing: str, quiet: bool) -> None:
        """Say where the server is and how a client gets in; a quiet one, what nobody could know."""
        if not quiet:
            names = [listener.getsockname()[:2] for listener in self.listeners]
            where = " and ".join(common.format_address(*name) for name in names)
            common.say(f"{doing} on {where} - Ctrl+C to stop")
        if self.is_local():
            return
        if self.code is None:
            common.complain(OPEN_WARNING[self.mode])
        if self.new_code:
            common.say(f"Pairing code: {self.new_code}")
        if self.new_code or not quiet:
            common.say(f"On the other machine:\n    {self.client_command()}")

    def client_command(self) -> str:
        """Return what to type on another machine; it asks for the code."""
        command = ["python client.py", self.mode, "--host", self._address()]
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
        return address


class Announcement:
    """Tells the local network of a server by DNS-SD (RFC 6763), until it is closed.

    A thread of its own does all of it, as it takes most of a second; and again when this machine
    gets other addresses. What fails is logged: the server can be reached all the same.
    """

    def __init__(self, entrance: Entrance) -> None:
        self._entrance = entrance
        # A name that nobody else has, so that there is nothing to be found out or argued about.
        self._token = secrets.token_hex(4)
        self._closed = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="announcement", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            # Here, as most servers do without, and it takes long to import.
            import zeroconf  # noqa: PLC0415
        except ImportError:
            self._complain(
                f"that needs zeroconf: {common.how_to_install('zeroconf')} (or --no-announce)"
            )
            return
        while not self._closed.is_set():
            try:
                self._announce()
            except (OSError, ValueError, SocketPairError, zeroconf.Error) as error:
                self._complain(describe_error(error))
                self._closed.wait(ADDRESS_CHECK_S)

    def _announce(self) -> None:
        """Be announced until it is closed, or this machine's addresses are others."""
        addresses = self._entrance.addresses()
        if not addresses:
            raise SocketPairError("this machine is in none")
        with contextlib.closing(common.open_network(self._entrance.networks())) as network:
            network.register_service(self._service(addresses), cooperating_responders=True)
            self._problem = ""
            while not self._closed.wait(ADDRESS_CHECK_S):
                if self._entrance.addresses() != addresses:
                    break

    def _complain(self, problem: str) -> None:
        """Log why there is no announcement, once in a row."""
        if problem != self._problem:
            log.warning("not announced on the local network: %s", problem)
        self._problem = problem

    def _service(self, addresses: list[str]) -> ServiceInfo:
        """Return what is announced; the name that users see is in the TXT record."""
        import zeroconf  # noqa: PLC0415  (see _run)

        machine = socket.gethostname().encode(errors="replace")[:MAX_MACHINE_BYTES]
        name, mode = machine.decode(errors="ignore"), self._entrance.mode
        return zeroconf.ServiceInfo(
            common.SERVICE_TYPE,
            f"{name.replace('.', ' ')} {mode} {self._token}.{common.SERVICE_TYPE}",
            # Not the machine's own name, which may be another program's to announce.
            server=f"socket-pair-{self._token}.local.",
            parsed_addresses=addresses,
            port=self._entrance.port,
            properties=common.Announced(name, mode, self._entrance.code is not None).to_txt(),
        )

    def close(self) -> None:
        """Take it back; blocks for a second or two. May be called twice."""
        self._closed.set()
        self._thread.join(ANNOUNCEMENT_TIMEOUT_S)


class Server:
    """Accepts connections and has each handled in a thread of its own."""

    def __init__(
        self,
        entrance: Entrance,
        handle: Callable[[Connection], None],
        *,
        max_clients: int,
        sound: Sound | None = None,
        folder: str | None = None,
    ) -> None:
        self._entrance = entrance
        self._selector = selectors.DefaultSelector()
        for listener in entrance.listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, listener)
        self._handle = handle
        self._max_clients = max_clients
        self._welcome = Welcome(common.PROTOCOL, entrance.mode, sound)
        self._folder = folder
        self._gate = Gate(entrance.code)
        self._lobby = Lobby(MAX_UNFINISHED)
        self._threads: set[threading.Thread] = set()
        self._served: set[threading.Thread] = set()  # those past the handshake
        self._lock = threading.Lock()
        self._announcement: Announcement | None = None

    def announce(self) -> None:
        """Tell the local network of this server, where that can reach it."""
        if not self._entrance.is_local():
            self._announcement = Announcement(self._entrance)

    def serve_forever(self) -> None:
        """Accept until the thread is interrupted; blocks."""
        # On Windows, Ctrl+C does not wake who waits for a connection.
        timeout = 0.5 if sys.platform == "win32" else None
        while True:
            for key, _ in self._selector.select(timeout):
                self._accept(key.data)

    def _accept(self, listener: socket.socket) -> None:
        """Take one connection, and give it its thread."""
        try:
            sock, address = listener.accept()
        except BlockingIOError:  # it has gone again
            return
        except OSError as error:
            log.error("cannot accept a connection: %s", describe_error(error))
            time.sleep(0.1)  # out of descriptors, most likely: let some be closed
            return
        # As an IPv6 socket shows an IPv4 address.
        host = str(address[0]).removeprefix("::ffff:")
        try:
            crowd = crowd_of(host, str(sock.getsockname()[0]))
            self._start(Connection(sock, common.format_address(host, address[1])), crowd)
        except (OSError, RuntimeError) as error:  # it has gone again, or there is no thread
            log.error("%s: cannot be served: %s", host, describe_error(error))
            sock.close()

    def _start(self, connection: Connection, crowd: str) -> None:
        """Give a new connection its thread. Raises RuntimeError if the system has none."""
        while len(self._threads) >= self._max_clients + 2 * MAX_UNFINISHED:
            time.sleep(0.001)  # let those end that had to leave the lobby
        thread = threading.Thread(
            target=self._converse,
            args=(connection, crowd),
            name=f"client {connection.peer}",
            daemon=True,
        )
        self._lobby.enter(connection, crowd)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._forget(connection, thread)
            raise

    def _converse(self, connection: Connection, crowd: str) -> None:
        """Shake hands with one client and have it handled; the whole life of a thread."""
        try:
            with connection:
                if self._shake_hands(connection, crowd):
                    self._handle(connection)
        except Exception as error:
            log.error(
                "%s: internal error: %r", connection.peer, error, exc_info=log.isEnabledFor(10)
            )
        finally:
            self._forget(connection, threading.current_thread())

    def _forget(self, connection: Connection, thread: threading.Thread) -> None:
        self._lobby.leave(connection)
        with self._lock:
            self._threads.discard(thread)
            self._served.discard(thread)

    def _shake_hands(self, connection: Connection, crowd: str) -> bool:
        """Greet a client; False if it is not to be served, which it has been told then."""
        try:
            with connection.limit(HANDSHAKE_TIMEOUT_S):
                hello = self._gate.let_in(connection, crowd)
                objection = self._object(hello)
                if objection:
                    turn_away(connection, common.Error(objection))
                connection.send(self._welcome_for(crowd))
                return self._lobby.leave(connection)
        except SocketPairError as error:
            waiting = self._lobby.leave(connection)
            reason = error if waiting else "dropped: too many have not finished their handshake"
            level = error.log_level if isinstance(error, TurnedAway) else logging.WARNING
            log.log(level, "%s: %s", connection.peer, reason)
            return False

    def _welcome_for(self, host: str) -> Welcome:
        """Return the welcome for a client at `host`; one on this machine is told the folder."""
        if self._folder is not None and common.is_loopback(host):
            with contextlib.suppress(OSError):
                found = os.stat(self._folder)
                return self._welcome._replace(folder=(found.st_dev, found.st_ino))
        return self._welcome

    def _object(self, hello: Hello) -> str:
        """Return why a client that says `hello` is not served; empty if it is."""
        ours = self._entrance.mode
        if hello.mode != ours:
            return f"this server is in {ours} mode: python client.py {ours}"
        with self._lock:
            if len(self._served) >= self._max_clients:
                clients = common.count(self._max_clients, "client")
                return f"this server is busy with {clients}: try again later"
            self._served.add(threading.current_thread())
        return ""

    def stop(self) -> None:
        """Accept no more connections. May be called twice; blocks while that is announced."""
        for listener in self._entrance.listeners:
            listener.close()
        if self._announcement:
            self._announcement.close()

    def clients(self) -> list[threading.Thread]:
        """Return the threads of the clients under way, those past their handshake."""
        with self._lock:
            return list(self._served)


# --- command line ---------------------------------------------------------------------------

# A listener's thread only waits; its stack holds the handshake.
LISTENER_STACK_BYTES = 512 * 1024


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
        type=common.device_name,
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
    parser = common.make_parser("Receive files from client.py, or send it sound.", EXAMPLES)
    common.add_address_arguments(parser, "address to listen on")
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
    common.refuse_other_mode(parser, args, MODE_OPTIONS)
    if args.open:
        args.code = None  # the environment's
    return args


def set_up_log(args: argparse.Namespace) -> None:
    """Send what was done to standard output, and what went wrong to standard error."""
    level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
    done = logging.StreamHandler(sys.stdout)
    done.addFilter(lambda record: record.levelno <= logging.INFO)
    wrong = logging.StreamHandler(sys.stderr)
    wrong.setLevel(logging.WARNING)
    for handler in (done, wrong):
        stamp = "" if goes_to_journal(handler.stream) else "%(asctime)s "
        handler.setFormatter(logging.Formatter(f"{stamp}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[done, wrong])
    # A log line a file is most of the work on a small file: leave out what no line shows, and
    # do not answer a log that cannot be written with a traceback.
    logging.raiseExceptions = logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False


def goes_to_journal(stream: TextIO) -> bool:
    """Tell whether systemd reads `stream` for its journal, which stamps each line itself.

    ``JOURNAL_STREAM`` holds the device and the inode that it gave us (systemd.exec(5)).
    """
    with contextlib.suppress(OSError, ValueError):  # no file, or closed
        found = os.fstat(stream.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return False


def prepare_folder(folder: str) -> str:
    """Make the folder for files where it is missing; return its path. Raises SocketPairError."""
    folder = os.path.expanduser(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise SocketPairError(f"--folder {escape(folder)}: there is a file of that name") from None
    except OSError as error:
        raise SocketPairError(f"--folder {escape(folder)}: {describe_error(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SocketPairError(f"--folder {escape(folder)}: no permission to write there")
    return folder


def serve_files(args: argparse.Namespace) -> int:
    """Receive files until Ctrl+C, then let those under way finish; return the exit status."""
    store = Store(prepare_folder(args.folder), args.overwrite)
    entrance = Entrance.open(args, "file")
    server = Server(
        entrance,
        lambda connection: handle_file_client(connection, store),
        max_clients=args.max_clients or MAX_CLIENTS,
        folder=store.folder,
    )
    shown = escape(os.path.join(store.folder, ""))
    entrance.describe(f"Receiving into {shown}", args.quiet)
    try:
        if not args.no_announce:
            server.announce()
        return serve_until_stopped(server)
    finally:
        server.stop()


def serve_audio(args: argparse.Namespace) -> int:
    """Broadcast the input until Ctrl+C or its end; return the exit status."""
    # A thread a listener: the usual 8 MiB each would be backed by huge pages on some systems.
    threading.stack_size(LISTENER_STACK_BYTES)
    with contextlib.closing(open_input(args)) as source:
        return broadcast(args, source)


def broadcast(args: argparse.Namespace, source: Microphone | PacedInput) -> int:
    """Send what `source` captures to whoever connects; return the exit status."""
    broadcaster = Broadcaster(source.captured)
    entrance = Entrance.open(args, "audio")
    server = make_audio_server(args, entrance, broadcaster)
    console = Console(args.quiet)
    for handler in logging.getLogger().handlers:
        handler.addFilter(console.clear_for)
    source.start()
    broadcaster.start()
    what = f"{source.name}, {source.captured.audio.describe()}"
    entrance.describe(f"Broadcasting {what},", args.quiet)
    threading.Thread(target=server.serve_forever, name="accept", daemon=True).start()
    try:
        if not args.no_announce:
            server.announce()
        show_until_ended(broadcaster, console)
        return finish_audio(server, broadcaster, console)
    except KeyboardInterrupt:
        console.say(summarize(broadcaster))
        raise
    finally:
        server.stop()


def make_audio_server(
    args: argparse.Namespace, entrance: Entrance, broadcaster: Broadcaster
) -> Server:
    """Return a server that listens, and whose welcome tells what a listener has to know."""
    audio = broadcaster.captured.audio
    return Server(
        entrance,
        lambda connection: handle_audio_client(connection, broadcaster),
        max_clients=args.max_clients or MAX_LISTENERS,
        sound=Sound(audio, secrets.token_hex(8), args.sync),
    )


def show_until_ended(broadcaster: Broadcaster, console: Console) -> None:
    """Keep the status line up to date until the sound ends; blocks."""
    while not broadcaster.join(common.STATUS_INTERVAL_S):
        listeners = count(broadcaster.listener_count, "listener")
        console.show_status(f"{broadcaster.meter.show()}  {listeners}")


def finish_audio(server: Server, broadcaster: Broadcaster, console: Console) -> int:
    """Wait until every listener has been told of the end; return the exit status."""
    deadline = Deadline(LISTENER_TIMEOUT_S)
    for thread in server.clients():
        thread.join(deadline.remaining())
    captured = broadcaster.captured
    tell = console.complain if captured.failed else console.say
    tell(f"{captured.end_reason} - {summarize(broadcaster)}")
    return EXIT_FAILED if captured.failed else EXIT_OK


def summarize(broadcaster: Broadcaster) -> str:
    """Return what has been broadcast, in a line."""
    listeners = count(broadcaster.served_count, "listener")
    missed = count(broadcaster.missed_blocks, "block")
    return f"{format_tenths(broadcaster.sent_s)} of sound to {listeners}, {missed} missed"


def serve_until_stopped(server: Server) -> int:
    """Serve until Ctrl+C, then until the last client is done, or a second Ctrl+C."""
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    under_way = server.clients()
    if under_way:
        common.complain(f"\nfinishing {len(under_way)} under way - Ctrl+C again to stop at once")
    try:
        server.stop()
        for thread in under_way:
            while thread.is_alive():
                thread.join(0.5)  # Windows lets Ctrl+C through only in between
    except KeyboardInterrupt:
        common.complain("\nstopped at once: what is here of unfinished files is kept")
        return EXIT_INTERRUPTED
    if not under_way:
        common.complain("\nstopped")
    return EXIT_INTERRUPTED


def main(argv: Sequence[str]) -> int:
    """Run the server with the command line's arguments; return its exit status."""
    args = parse_arguments(argv)
    common.take_signals()
    if sys.platform != "win32":
        raise_open_file_limit()
    mode = "audio" if args.list_devices else args.mode or common.ask_mode()
    if mode == "file":
        set_up_log(args)
        return serve_files(args)
    with common.quiet_libraries(args.verbose):
        set_up_log(args)
        return common.list_devices(common.MICROPHONE) if args.list_devices else serve_audio(args)


if sys.platform != "win32":

    def raise_open_file_limit() -> None:
        """Let this process open as many files as the system allows: each connection is one."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    common.run(main)
