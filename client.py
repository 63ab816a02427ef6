"""The client of Socket Pair: brings files to a server, or plays the server's sound.

    python3 client.py file report.pdf photos/
    python3 client.py audio

In the order of the file; to follow a run, begin at `main`, at its end:

======================  ===========================================================
sources                 ``look_up_named`` and ``find_sources``: what the user named, as ``Source``s
progress                ``Progress`` and ``Gauge``: bars, on a terminal
results                 ``Report`` and ``Batch``: what became of each file; ``reading`` it meanwhile
file conversation       ``start_file_client``; ``Sender``, which comes back to a lost server;
                        ``Upload``: one connection's conversation, in four stages;
                        ``ContentSender``: the bytes of one file after another
sound: the clocks       ``EarliestLine`` and ``SpeedLoop``: playing at the server's speed
sound: the reserve      ``Arrivals``: how late sound comes, and how much to keep for it
sound: playout          ``Playout``: plays evenly what arrives unevenly, and soon
sound: server's clock   ``ServerClock``: what it shows, from requests and replies
sound: in step          ``Leaving``, ``InStep``, ``SyncedPlayout``: each sample frame when it is due
sound: outputs          ``Speaker``: a sound card, as a destination; ``SpeakerOutput``
sound: recordings       ``RecordingFiles``, ``Pipe``: WAV, FLAC and Opus, standard output;
                        ``find_destinations``: which of all these the user wants
sound: Opus             ``OpusDecoder``: what comes as Opus, as PCM
sound: listening        ``start_audio_client``, ``Listening``: receives, comes back; ``Numbering``
finding a server        ``pick_server``: those that announce themselves on the local network
connection              ``connect``: a connection past its handshake
command line            ``main`` asks for what the arguments leave open
======================  ===========================================================

``common.py`` describes the conversation.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036  (who has an older one is told before `common` fails)
    raise SystemExit(
        f"Socket Pair needs Python 3.10 or newer, and this is {sys.version.split()[0]} "
        f"({sys.executable}): install one, see https://www.python.org"
    )

if __name__ == "__main__":
    gc.disable()  # until main(): nothing that is imported is garbage, and looking takes a while
    # Until common.INTERRUPTS.take(), a signal just ends the program, also during the imports.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: os._exit(128 + number))

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import math
import queue
import re
import select
import socket
import stat
import struct
import threading
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

try:
    import common
except ModuleNotFoundError:
    raise SystemExit(f"common.py is missing: it belongs beside {__file__}") from None
from common import (
    EXIT_FAILED,
    EXIT_OK,
    HANDSHAKE_TIMEOUT_S,
    LENGTH,
    STDIN,
    AudioBlock,
    AudioFormat,
    AudioUnavailable,
    Connection,
    ConnectionLost,
    Console,
    Deadline,
    Entry,
    Hashing,
    Held,
    Hello,
    Offer,
    Outcome,
    Pair,
    PeerRefused,
    ProtocolError,
    Results,
    SignsOfLife,
    SocketPairError,
    Start,
    Welcome,
    calculate_checksum,
    clamp,
    complain,
    counted,
    describe_error,
    escape,
    format_bytes,
)

if TYPE_CHECKING:
    from io import FileIO
    from ipaddress import IPv4Interface, IPv6Interface
    from types import ModuleType

    import numpy as np
    import samplerate
    from numpy.typing import NDArray
    from zeroconf import ServiceInfo

    Floats = NDArray[np.floating[Any]]  # 32-bit, frames by channels, 1.0 for full scale


# --- sources --------------------------------------------------------------------------------

# Half of what a frame may hold, as JSON may need two characters for one.
MAX_BATCH_CHARS = common.MAX_FRAME_BYTES // 2
ENTRY_CHARS = 100  # of an offered entry, beside its path
# After so long what has been looked up is offered: the server is not to wait for a slow disk.
LOOK_UP_S = 1.0
# Linux's virtual files (/proc, /sys) have no blocks, and say that they have 0 or 4096 bytes.
MAX_DOUBTFUL_BYTES = 4096
LEADS_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


class Source(NamedTuple):
    """A file or folder as it was looked up: where it is here, and how it is offered.

    `found` is what the system said of a folder, or of a file whose size is known.
    `offers` counts how often it has been offered before as something that it was not.
    """

    path: str
    entry: Entry
    found: os.stat_result | None = None
    offers: int = 0

    @property
    def name(self) -> str:
        """Its path in the offer, with "/" between folders."""
        return self.entry.path

    def beside(self, name: str) -> str:
        """Return the path at the server of what is called `name` in its place."""
        folder, slash, _ = self.name.rpartition("/")
        return folder + slash + name


class Problem(NamedTuple):
    """What is not sent: its path, its name in an offer, why, and whether that is a failure.

    What the user named and is not there has no name.
    """

    path: str
    name: str
    reason: str
    is_failure: bool = True


def describe_file(name: str, found: os.stat_result) -> Entry:
    """Return the entry of an offer that a file with these properties is."""
    mtime_ns = found.st_mtime_ns if found.st_mtime_ns in common.MTIMES_NS else None
    mode = None if sys.platform == "win32" else found.st_mode & 0o777
    return Entry(name, found.st_size, mtime_ns, mode)


def look_up_file(path: str, name: str, found: os.stat_result) -> Source:
    """Return the source that a file with these properties is; reads it if its size is doubtful.

    Raises OSError.
    """
    entry = describe_file(name, found)
    is_doubtful = not getattr(found, "st_blocks", 1) and found.st_size <= MAX_DOUBTFUL_BYTES
    if is_doubtful and read_small(path, found) is None:
        return Source(path, entry._replace(size=None))
    return Source(path, entry, found)


def open_file(path: str) -> FileIO:
    """Open a file, or standard input, without buffer; waits and raises as `open_to_read` does."""
    if path == STDIN:
        return open(0, "rb", buffering=0, closefd=False)
    return open(path, "rb", buffering=0, opener=common.open_to_read)


def look_up_named(paths: Iterable[str], name: str | None) -> Iterator[Source | Problem]:
    """Yield what the user's `paths` are, ``-`` under `name`."""
    for path in paths:
        try:
            yield Source(STDIN, Entry(name or "")) if path == STDIN else look_up(path)
        except (OSError, ValueError, SocketPairError) as error:
            yield Problem(path or "''", "", describe_missing(path, error))


def how_to_send_a_pipe() -> str:
    """Return what sends a program's output, for the end of a line."""
    command = command_line("client.py", "file", STDIN, "--name", "NAME")
    return f"send what a program prints by COMMAND | {command}"


def look_up(path: str) -> Source:
    """Return what `path` is. Raises OSError and ValueError; SocketPairError if neither of both."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        return folder_source(path, offered_name(path), found)
    if stat.S_ISREG(found.st_mode):
        return look_up_file(path, offered_name(path), found)
    if stat.S_ISFIFO(found.st_mode):
        raise SocketPairError(f"a pipe, not a file: {how_to_send_a_pipe()}")
    raise SocketPairError(describe_left_out(found.st_mode))


def folder_source(path: str, name: str, found: os.stat_result) -> Source:
    """Return the source that a folder with these properties is."""
    entry = describe_file(name, found)
    return Source(path, entry._replace(size=None, is_folder=True), found)


def offered_name(path: str, system: ModuleType = os.path) -> str:
    r"""Return what a named file or folder is to be called at the server.

    Not just its last part: ``.`` and ``folder/`` have a name, and so have ``/``, ``E:\`` and
    ``\\server\share``. Raises OSError where the working folder is gone.
    """
    whole = str(system.abspath(path))
    drive = str(system.splitdrive(whole)[0]).replace("\\", "/").rstrip(":/")
    return str(system.basename(whole)) or drive.rpartition("/")[2] or "root"


def describe_missing(path: str, error: Exception) -> str:
    """Return why a file that the user named cannot be looked at."""
    if not isinstance(error, FileNotFoundError):
        return describe_error(error)
    try:
        os.getcwd()
    except FileNotFoundError:
        if not os.path.isabs(path):
            return "the folder that this command runs in is gone: change to one that is there"
    return "no such file"


def find_sources(
    named: Iterable[Source], left_out: tuple[int, int] | None
) -> Iterator[Source | Problem]:
    """Yield all that is in what the user named.

    `left_out` is the device and the inode of the server's own folder, if that is on this machine.
    """
    for source in named:
        found = source.found
        if not source.entry.is_folder:
            yield source
        elif found and (found.st_dev, found.st_ino) == left_out:
            reason = "the server's own folder, into which it would go"
            yield Problem(source.path, source.name, reason)
        else:
            yield from walk_folder(source, left_out)


def walk_folder(folder: Source, left_out: tuple[int, int] | None) -> Iterator[Source | Problem]:
    """Yield what is in a folder, and each folder after all that is in it.

    In that order the server can give each folder its modification time for good. Without
    recursion, for trees of any depth.
    """
    unfinished = [(folder.path, folder.name, list_folder(folder.path, folder.name))]
    while unfinished:
        path, name, entries = unfinished[-1]
        entry = next(entries, None)
        if entry is None:
            unfinished.pop()
            with contextlib.suppress(OSError):
                yield folder_source(path, name, os.stat(path))
            continue
        if isinstance(entry, Problem):
            yield entry
            continue
        below = f"{name}/{entry.name}"
        if not is_real_folder(entry):
            yield look_at(entry, below)
        elif left_out and is_same_folder(entry, left_out):
            yield Problem(entry.path, below, "the server's own folder, left out", False)
        else:
            unfinished.append((entry.path, below, list_folder(entry.path, below)))


def is_real_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether `entry` is a folder, not a link to one, nor Windows' junction."""
    with contextlib.suppress(OSError):  # look_at will say it
        if entry.is_dir(follow_symlinks=False):
            is_junction = getattr(entry, "is_junction", lambda: False)  # from Python 3.12 on
            return not is_junction()
    return False


def is_same_folder(entry: os.DirEntry[str], identity: tuple[int, int]) -> bool:
    """Return whether a folder has this device and inode."""
    with contextlib.suppress(OSError):
        found = os.stat(entry.path)
        return (found.st_dev, found.st_ino) == identity
    return False


def list_folder(path: str, name: str) -> Iterator[os.DirEntry[str] | Problem]:
    """Return a folder's entries by name, or why it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        return iter([Problem(path, f"{name}/", describe_error(error))])


def look_at(entry: os.DirEntry[str], name: str) -> Source | Problem:
    """Return the file that `entry` is or links to."""
    try:
        found = entry.stat()
        if stat.S_ISREG(found.st_mode) and not name.endswith(common.PARTIAL_SUFFIX):
            return look_up_file(entry.path, name, found)
        return Problem(entry.path, name, describe_left_out(found.st_mode), False)
    except OSError as error:
        if error.errno in LEADS_NOWHERE and os.path.islink(entry.path):
            return Problem(entry.path, name, "a broken link, left out", False)
        return Problem(entry.path, name, describe_missing(entry.path, error))


def describe_left_out(mode: int) -> str:
    """Return why what has this mode is no file to send from a folder."""
    if stat.S_ISREG(mode):
        return "a server's unfinished file, left out"
    return "a link to a folder, not followed" if stat.S_ISDIR(mode) else "not a file or a folder"


def in_batches(sources: Iterable[Source]) -> Iterator[list[Source]]:
    """Yield `sources` in lists that fit an offer, and of which none takes long to look up."""
    batch: list[Source] = []
    chars, deadline = 0, Deadline(LOOK_UP_S)
    for source in sources:
        # What can be printed in ASCII takes one or two characters of JSON, anything else up to 12.
        plain = source.name.isascii() and source.name.isprintable()
        needed = ENTRY_CHARS + len(source.name) * (1 if plain else 12)
        is_full = len(batch) == common.MAX_BATCH_ENTRIES or chars + needed > MAX_BATCH_CHARS
        if batch and (is_full or not deadline.remaining()):
            yield batch
            batch, chars, deadline = [], 0, Deadline(LOOK_UP_S)
        batch.append(source)
        chars += needed
    if batch:
        yield batch


# --- progress -------------------------------------------------------------------------------

LARGE_FILE_BYTES = 64 * 1024 * 1024
# Beside the label: the percentage, a bar, sizes, times and the speed.
GAUGE_CELLS = 52
MIN_LABEL_CELLS = 8
MAX_LABEL_CELLS = 40
SHAPE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
SHAPE_WITHOUT_TOTAL = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}]"


class Gauge:
    """How far one thing is, of `total` bytes if that is known, and how fast it goes."""

    def __init__(self, label: str, total: int | None, first: int = 0) -> None:
        self.label = label
        self.total = total
        self._first = first
        self._start_s = time.monotonic()

    def draw(self, done: int, columns: int, draw_bar: Callable[..., str]) -> str:
        """Return a line of at most so many columns, drawn by tqdm's ``format_meter``."""
        done, took_s = min(done, self.total or done), time.monotonic() - self._start_s
        shape = SHAPE if self.total else SHAPE_WITHOUT_TOTAL
        if not common.tells_speed(done - self._first, took_s):
            shape = re.sub("<{remaining}|, {rate_fmt}", "", shape)
        return draw_bar(
            done,
            self.total or None,
            took_s,
            ncols=columns,
            bar_format=shape,
            prefix=common.fit(self.label, max(MIN_LABEL_CELLS, columns - GAUGE_CELLS)),
            unit="B",
            unit_scale=True,
            initial=self._first,
            ascii=not (sys.stderr.encoding or "").lower().startswith("utf"),
        )


class Progress:
    """Shows on a terminal how far the sending is: a large file, or all of many files.

    A thread draws it, also while nothing moves, until `console` shows no status line any more.
    Another counts the files among what `find` yields. Every method is for any thread.
    """

    def __init__(
        self, console: Console, is_single: bool, find: Callable[[], Iterable[Source | Problem]]
    ) -> None:
        self._console = console
        self._is_single = is_single
        self._draw_bar = find_bar() if console.has_status else None
        self._in_transit: Callable[[], int] = lambda: 0
        self._all = Gauge("counting the files", None)
        self._large: Gauge | None = None  # while a file is under way that has a bar of its own
        self._path = ""  # of the file under way
        self._moved: dict[str, int] = {}  # bytes of files that are not decided yet, by their paths
        self._decided_bytes = 0
        self._lock = threading.Lock()
        if self._draw_bar:
            threading.Thread(target=self._run, name="progress", daemon=True).start()
            if not is_single:
                work = functools.partial(self._count, find)
                threading.Thread(target=work, name="counting", daemon=True).start()

    def _count(self, find: Callable[[], Iterable[Source | Problem]]) -> None:
        entries = (each.entry for each in find() if isinstance(each, Source))
        sizes = [entry.size or 0 for entry in entries if not entry.is_folder]
        with self._lock:
            self._all.label, self._all.total = counted(len(sizes), "file"), sum(sizes)

    def _run(self) -> None:
        while self._console.has_status:
            time.sleep(common.STATUS_INTERVAL_S)
            with self._lock:
                self._show(self._in_transit())

    def _show(self, in_transit: int = 0) -> None:
        gauge, done = self._all, self._decided_bytes + sum(self._moved.values())
        if self._large:
            gauge, done = self._large, self._moved.get(self._path, 0)
        elif self._is_single:
            return
        if self._draw_bar:
            done = max(0, done - in_transit)
            self._console.show_status(gauge.draw(done, self._console.columns, self._draw_bar))

    def follow(self, in_transit: Callable[[], int]) -> None:
        """Begin anew with a connection, of whose bytes `in_transit` have not arrived."""
        with self._lock:
            self._in_transit = in_transit
            self._moved.clear()

    def start(self, source: Source, done: int, verb: str = "") -> None:
        """Begin with a file, of which `done` bytes need nothing any more."""
        size = source.entry.size
        with self._lock:
            self._path = source.path
            self._moved[source.path] = done
            self._large = None
            if self._is_single or size is None or size >= LARGE_FILE_BYTES:
                self._large = Gauge(verb + escape(source.name, MAX_LABEL_CELLS), size, done)
                self._show()

    def move(self, size: int) -> None:
        """Note that so many bytes more of the file are on their way."""
        with self._lock:
            self._moved[self._path] = self._moved.get(self._path, 0) + size

    def decide(self, source: Source, is_saved: bool) -> None:
        """Count a file as done; one that is alone leaves its bar behind if `is_saved`."""
        with self._lock:
            moved = self._moved.pop(source.path, 0)
            size = source.entry.size or moved
            self._decided_bytes += size
            if self._large and source.path == self._path:
                is_shown = self._is_single and self._console.has_status
                if is_saved and is_shown and self._draw_bar:
                    self._console.complain(
                        self._large.draw(size, self._console.columns, self._draw_bar)
                    )
                self._large = None
            if self._decided_bytes == self._all.total:
                self._show()


def find_bar() -> Callable[..., str] | None:
    """Return what draws a bar where tqdm is installed; files also go without it."""
    try:
        from tqdm import tqdm  # noqa: PLC0415  (only a terminal needs it, and it takes a while)
    except common.LOAD_ERRORS:
        complain(f"no progress bars without tqdm: {common.how_to_install('tqdm')}")
        return None
    return tqdm.format_meter


# --- results --------------------------------------------------------------------------------

HOW = {"saved": "Saved", "already": "Already there"}
LAST_WORDS_S = 1.0  # in which a server that hangs up may say why


class Sent(NamedTuple):
    """A file of which all was sent: its SHA-256, its bytes, and what else there is to say."""

    checksum: str
    size: int
    note: str = ""


class NotSent(NamedTuple):
    """A file that was given up here, and why."""

    reason: str


OFFERED_AGAIN = NotSent("")  # as what it is now


class Report:
    """Tells the user what becomes of what was named. For any thread.

    A file that was named has a line of its own; those in a folder share the folder's. `failed`
    counts the files and folders that have failed.
    """

    def __init__(self, console: Console, verbose: bool) -> None:
        self._console = console
        self._verbose = verbose
        self._lock = threading.Lock()
        self.failed = 0
        # What has become of what is in each folder that was named, by its path.
        self._folders: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def _tally(self, path: str, name: str) -> Counter[str]:
        return self._folders[named_folder(path, name)]

    def problem(self, problem: Problem) -> None:
        """Report what was not sent, or was not saved."""
        path, name, reason, is_failure = problem
        with self._lock:
            self.failed += is_failure
            if is_in_folder(path, name):
                self._tally(path, name)["failed"] += is_failure
        self._console.complain(f"{escape(name if path == STDIN else path)}: {reason}")

    def without_problems(self, found: Iterable[Source | Problem]) -> Iterator[Source]:
        """Yield the sources among what was `found`, and report the rest."""
        for each in found:
            if isinstance(each, Problem):
                self.problem(each)
            else:
                yield each

    def resumed(self, source: Source, offset: int) -> None:
        """Report that some of a file is at the server already."""
        there = format_bytes(offset)
        self._console.say(f"{escape(source.path)}: resuming after the first {there}")

    def decided(self, source: Source, outcome: Outcome, sent: Sent | None) -> None:
        """Report what the server says has become of what was `sent`.

        Raises ProtocolError where it has saved a file that was not.
        """
        if outcome.kind == "failed":
            reason = f"at the server: {escape(outcome.text)}"
            self.problem(Problem(source.path, source.name, reason))
        elif source.entry.is_folder:
            self._folder_saved(source, source.beside(outcome.text))
        elif sent is None:
            raise ProtocolError("received a result of a file that was not sent")
        else:
            self._saved(source, outcome, sent)

    def _saved(self, source: Source, outcome: Outcome, sent: Sent) -> None:
        name, is_named = source.beside(outcome.text), not is_in_folder(source.path, source.name)
        if not is_named:
            with self._lock:
                tally = self._tally(source.path, source.name)
                tally["files"] += 1
                tally["bytes"] += sent.size
                tally["already"] += outcome.kind == "already"
        if is_named or self._verbose or name != source.name or sent.note:
            self._console.say(
                f"{HOW[outcome.kind]} as {escape(name)}, "
                f"SHA-256 matches ({sent.checksum[:8]}...){sent.note}"
            )

    def _folder_saved(self, source: Source, name: str) -> None:
        if "/" in source.name:
            if name != source.name:
                self._console.say(f"Saved as {escape(name)}/")
            return
        with self._lock:
            tally = self._folders.pop(named_folder(source.path, source.name), Counter())
        is_new = tally["already"] < tally["files"] + tally["failed"] or not tally["files"]
        files = counted(tally["files"], "file")
        text = f"{'Saved' if is_new else 'Already there as'} {escape(name)}/ with {files}"
        text += f" ({format_bytes(tally['bytes'])})"
        if tally["files"]:
            text += ", every SHA-256 matches"
        if tally["already"] and is_new:
            text += f", {tally['already']} there already"
        if tally["failed"]:
            text += f", without {tally['failed']} that failed"
        self._console.say(text)


def is_in_folder(path: str, name: str) -> bool:
    """Return whether what is offered under `name` is in a folder that the user named."""
    return "/" in name and path != STDIN


def named_folder(path: str, name: str) -> str:
    """Return the path of the folder that the user named, of what is offered from it, or itself."""
    inside = name.partition("/")[2]
    return path[: len(path) - len(inside)].rstrip(os.sep + (os.altsep or ""))


class Batch:
    """The sources of an offer, and what has become of each, by index.

    For the two threads of a transfer: one that sends, and notes in `ends` how the sending of a file
    has ended before the server can know of it, and one that is told what has become of it.
    """

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self.ends: dict[int, Sent | NotSent] = {}
        self.undecided = dict(enumerate(sources))

    def left(self) -> list[Source]:
        """Return what is to be offered again, once the connection is lost."""
        ends = self.ends
        return [each for index, each in self.undecided.items() if ends.get(index) != OFFERED_AGAIN]

    def decide(self, index: int) -> tuple[Source, Sent | NotSent | None]:
        """Return one that is decided now, and how its sending had ended. Raises ProtocolError."""
        source = self.undecided.pop(index, None)
        if source is None:
            raise ProtocolError("received a result of a file that was not sent")
        return source, self.ends.get(index)


@contextlib.contextmanager
def reading(connection: Connection, read: Callable[[], None]) -> Iterator[None]:
    """Run `read` in a thread of its own while the ``with`` block writes, and wait for its end.

    Otherwise a server with many results to tell and a client with much to send could wait for
    each other for ever. What `read` raises is raised here, also in place of a lost connection.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            read()
        except Exception as error:  # noqa: BLE001  (raised again in the other thread)
            errors.append(error)
            connection.wake()  # who writes may wait for a server that takes nothing any more

    thread = threading.Thread(target=run, name="results", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, ConnectionLost):
            thread.join(LAST_WORDS_S)  # perhaps the server has said why
            if errors:
                raise errors[0] from None
        connection.wake()
        thread.join()
        raise
    thread.join()
    if errors:
        raise errors[0]


# --- file conversation ----------------------------------------------------------------------

FILE_HELLO = Hello(common.PROTOCOL, "file")
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
# Connections in a row that bring nothing to where it stays, before that counts as no server.
MAX_FRUITLESS = 10
RESUMED_LATER = "what has arrived is kept, and the same command resumes from there"
# What is read and sent at once: as much as takes no longer than this.
PACE_S = 0.5
MIN_PACE_BYTES = 16 * 1024
# A file that is not what was offered is looked up and offered anew, so often.
MAX_OFFERS = 3
# Files up to this are read in one go, and sent together.
SMALL_FILE_BYTES = 64 * 1024
# Who may ask for the SHA-256 of any length learns a file byte by byte.
MIN_PREFIX_BYTES = 4096
# Signs of life that a server may send in a row: one a second, while it looks up or hashes.
MAX_SIGNS = 100_000


def start_file_client(address: Address, args: argparse.Namespace) -> int:
    """Send the files and folders that `args`, the command line's, name to a server.

    Blocks until all are sent or have failed; a server that is lost on the way is waited for.
    Returns the exit status, and has told the user whatever went wrong: 1 unless every one of them
    stands at the server, verified.
    """
    console = Console(args.quiet)
    report = Report(console, args.verbose)
    sender = Sender(address, console, report, args.retry)
    try:
        with contextlib.ExitStack() as closing:
            closing.callback(console.end_status)
            named = list(report.without_problems(look_up_named(args.paths, args.name)))
            if named:
                sender.send(named)
    except SocketPairError as error:
        console.complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        if sender.begun:
            can_resume = any(source.path != STDIN for source in sender.begun)
            rest = ": the same command resumes from here" if can_resume else ""
            console.complain(f"\ninterrupted{rest}")  # not behind the terminal's ^C
        raise
    return EXIT_FAILED if report.failed else EXIT_OK


class Backlog:
    """What is still to be sent, in batches."""

    def __init__(self, sources: Iterator[Source]) -> None:
        self.run = os.urandom(8).hex()  # tells the server which connections belong together
        self.decided = 0  # how many files and folders
        self.offset = 0  # the furthest from which a file of the last batch is sent
        self._reached = (0, 0)
        self._fruitless = 0
        self._batches = in_batches(sources)
        self._returned: list[Source] = []

    def give_back(self, sources: Iterable[Source]) -> None:
        """Have `sources` be offered again."""
        self._returned += sources

    def take(self) -> list[Source]:
        """Return the next batch, none at the end; blocks while it is looked up."""
        self._returned.sort(key=rank)
        batch = next(in_batches(self._returned), [])
        del self._returned[: len(batch)]
        return batch or next(self._batches, [])

    def is_getting_on(self) -> bool:
        """Note that a connection is lost; return whether those before have brought anything."""
        reached = (self.decided, self.offset)
        self._fruitless = 0 if reached > self._reached else self._fruitless + 1
        self._reached = max(reached, self._reached)
        return self._fruitless < MAX_FRUITLESS


def rank(source: Source) -> int:
    """Return what files are sorted by, and folders after all that is in them."""
    return -source.name.count("/") if source.entry.is_folder else -sys.maxsize


class Sender:
    """Brings what the user named to a server, over as many connections as it takes."""

    def __init__(self, address: Address, console: Console, report: Report, retry_s: float) -> None:
        self._address = address
        self._console = console
        self._report = report
        self._retry_s = retry_s
        self.begun: Sequence[Source] = ()  # once there was a server

    def send(self, named: Sequence[Source]) -> None:
        """Send all that is named; blocks until each file in it is decided.

        Comes back to a lost server after growing waits; raises ConnectionLost in the end,
        PeerRefused, ProtocolError and WrongCode at once.
        """
        connection, welcome = connect(self._address, FILE_HELLO, self._console)
        self.begun = named
        is_single = len(named) == 1 and not named[0].entry.is_folder
        left_out = common.disguise(welcome.folder) if welcome.folder else None
        find = functools.partial(find_sources, named, left_out)
        progress = Progress(self._console, is_single, find)
        backlog = Backlog(self._report.without_problems(find()))
        waits = self._waits()
        while True:
            with contextlib.closing(Upload(connection, backlog, self._report, progress)) as upload:
                try:
                    upload.run()
                    return
                except ConnectionLost as error:
                    lost = error
            if backlog.is_getting_on():
                waits = self._waits()
            if upload.give_back(lost) and is_single:
                return
            connection = self._reconnect(waits, lost)

    def _waits(self) -> Iterator[float]:
        """Yield how long to wait before each next try, as long as the server is waited for."""
        deadline = Deadline(self._retry_s)
        for wait_s in itertools.chain(RETRY_WAITS_S, itertools.repeat(RETRY_WAITS_S[-1])):
            if not deadline.remaining():
                return
            yield min(wait_s, deadline.remaining())

    def _reconnect(self, waits: Iterator[float], error: ConnectionLost) -> Connection:
        """Return a new connection, after waiting for a server that was lost by `error`."""
        for wait_s in waits:
            self._console.complain(f"{error}; trying again in {wait_s:.2g} s")
            common.INTERRUPTS.wait(wait_s)
            try:
                return connect(self._address, FILE_HELLO, self._console)[0]
            except ConnectionLost as again:
                error = again
            except WrongCode as again:  # it was started anew; and each try counts as a guess
                raise WrongCode(f"{again}; {RESUMED_LATER}") from again
            except SocketPairError as again:  # it may be busy for a while
                error = ConnectionLost(str(again))
        raise ConnectionLost(
            f"{error}; gave up after {self._retry_s:g} s: {RESUMED_LATER}"
        ) from error


class FileChanged(SocketPairError):
    """A file is not what was offered; `source` is what it is now, if that is to be offered."""

    def __init__(self, source: Source | None = None) -> None:
        super().__init__("it changed while it was sent")
        self.source = source


class UnderWay(NamedTuple):
    """A file being sent: what is left begins at `offset`; `digest` is that of what is before."""

    source: Source
    number: int  # in its batch
    offset: int
    digest: hashlib._Hash | None


class Content:
    """What an open file, or standard input, holds from an offset on, read step by step.

    Raises OSError; the constructor FileChanged where it is not what was offered: one that always
    grows counts as that.
    """

    def __init__(self, transfer: UnderWay, file: FileIO) -> None:
        self._source = source = transfer.source
        self._file = file
        self._size = transfer.offset  # up to what has been read
        self.is_stdin = source.path == STDIN
        self.is_over = False  # a terminal tells of its end only once
        if source.found:
            file.seek(transfer.offset)
            now = os.fstat(file.fileno())
            is_growing = source.offers and now.st_size > source.found.st_size
            if not is_as_offered(source.found, now) and not is_growing:
                raise changed(source, now)

    def read_into(self, view: memoryview) -> int:
        """Fill `view`, as far as that takes no longer than ``PACE_S``.

        Return the bytes read: none at the end. Blocks until there are some.
        """
        have, deadline = 0, Deadline(PACE_S)
        while have < len(view) and not self.is_over:
            if self.is_stdin and have and not has_stdin(deadline.remaining()):
                break
            size = self._file.readinto(view[have:]) or 0
            have += size
            self.is_over = not size
            if not deadline.remaining():
                break
        self._size += have
        return have

    def compare(self, checksum: str, on_progress: Callable[[int], object]) -> Sent:
        """Return how the content was sent, of which all that was offered has this SHA-256.

        Blocks while it is read once more, where something has happened to the file; `on_progress`
        is told of each block. Raises FileChanged, also where it is not as large as the system says.
        """
        then = self._source.found
        if then is None:
            return Sent(checksum, self._size)
        now, position = os.fstat(self._file.fileno()), self._file.tell()
        if now.st_size == then.st_size and (position < now.st_size or self._file.read(1)):
            raise changed(self._source, None)
        if is_same(then, now):
            return Sent(checksum, then.st_size)
        has_grown = now.st_size > then.st_size
        if position < then.st_size or not (has_grown or is_as_offered(then, now)):
            raise FileChanged
        self._file.seek(0)
        with contextlib.suppress(common.FileShrunk):
            descriptor, size = self._file.fileno(), then.st_size
            if calculate_checksum(descriptor, size, on_progress=on_progress) == checksum:
                note = ", as it was: it has grown since" if has_grown else ""
                return Sent(checksum, then.st_size, note)
        raise FileChanged


def has_stdin(seconds: float) -> bool:
    """Block until standard input has something, or has ended; return False after `seconds`."""
    # On Windows select() knows sockets only.
    return sys.platform == "win32" or bool(select.select([0], [], [], seconds)[0])


def prefer_bbr(connection: Connection) -> None:
    """Have the system send by BBR where it can, which some loss on a long line does not slow.

    See Cardwell et al., "BBR: Congestion-Based Congestion Control", 2016.
    """
    if sys.platform == "linux":
        connection.set_option(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


class ContentSender:
    """Sends what files hold over a connection, one after another."""

    def __init__(self, connection: Connection, signs: SignsOfLife, progress: Progress) -> None:
        self._connection = connection
        self._signs = signs
        self._progress = progress
        self._step_bytes = SMALL_FILE_BYTES
        self.stdin_is_begun = False

    def send(self, transfer: UnderWay, is_decided: Callable[[], bool]) -> Sent:
        """Send a file's bytes from its offset on; what says that these were all is not sent.

        Raises ConnectionLost, OSError, FileChanged, and SocketPairError where the server failed it.
        """
        self._progress.start(transfer.source, transfer.offset)
        return self._send_small(transfer) or self._send_large(transfer, is_decided)

    def _send_small(self, transfer: UnderWay) -> Sent | None:
        """Send a small file in one go; return None if it is none, or not as it was offered."""
        source, size = transfer.source, transfer.source.entry.size
        if source.found is None or size is None or size > SMALL_FILE_BYTES or transfer.offset:
            return None
        with self._signs:
            content = read_small(source.path, source.found)
        if content is None:
            return None
        if content:
            self._connection.queue(LENGTH.pack(size) + content)
        self._progress.move(size)
        return Sent(hashlib.sha256(content).hexdigest(), size)

    def _send_large(self, transfer: UnderWay, is_decided: Callable[[], bool]) -> Sent:
        """Send a file step by step, hashed meanwhile."""
        size, digest = transfer.source.entry.size, transfer.digest or hashlib.sha256()
        left = sys.maxsize if size is None else size - transfer.offset
        with self._signs:
            file = open_file(transfer.source.path)
        with file:
            content = Content(transfer, file)
            self.stdin_is_begun |= content.is_stdin
            with common.blocks_for(size, digest.update) as blocks:
                while left and (sent := self._send_step(content, blocks, left, is_decided)):
                    left -= sent
            with self._signs:
                return content.compare(digest.hexdigest(), self._signs.check)

    def _send_step(
        self, content: Content, blocks: common.Blocks, most: int, is_decided: Callable[[], bool]
    ) -> int:
        """Send the next of a file, `most` bytes at most; return how many: none at its end."""
        start_s = time.monotonic()
        block = blocks.take()[: min(most, self._step_bytes)]
        if content.is_stdin and not content.is_over:
            self._connection.flush()  # what has been read so far
            while not (is_decided() or has_stdin(common.SIGN_INTERVAL_S)):
                self.send_still_here()
        if is_decided():
            raise SocketPairError("the server has failed it")
        with self._signs:
            size = content.read_into(block)
        if size:
            blocks.give(block[:size])  # is hashed while it is sent
            self._connection.queue(LENGTH.pack(size))
            self._connection.queue(block[:size])
            self._progress.move(size)
        self._adapt_step(time.monotonic() - start_s)
        return size

    def _adapt_step(self, took_s: float) -> None:
        """See to it that no step takes long on a slow disk or line, after one that took so long."""
        if took_s > PACE_S:
            self._step_bytes = max(MIN_PACE_BYTES, self._step_bytes // 2)
        elif took_s < PACE_S / 4:
            self._step_bytes = min(common.SEGMENT_BYTES, self._step_bytes * 2)

    def send_still_here(self) -> None:
        """Send a sign of life, where a segment may come."""
        self._connection.write(LENGTH.pack(common.STILL_HERE))


Digests = dict[int, "hashlib._Hash"]  # of the first bytes of a file, by how many


class Upload:
    """The conversation with the server over one connection; see "the wire" in common.py.

    Each file goes through the same four stages as at the server: offered (a Source), looked up
    (with the Digests of what is there), under way (UnderWay), decided (an Outcome).
    """

    def __init__(
        self, connection: Connection, backlog: Backlog, report: Report, progress: Progress
    ) -> None:
        self._connection = connection
        self._backlog = backlog
        self._report = report
        self._progress = progress
        self._offered: list[Batch] = []
        self._signs = SignsOfLife(self._send_hashing)
        self._signs_left = MAX_SIGNS
        self._content = ContentSender(connection, self._signs, progress)
        prefer_bbr(connection)
        progress.follow(connection.in_transit)

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._signs.stop()
        if self._offered:
            self._connection.abort()
        self._connection.close()

    def give_back(self, lost: ConnectionLost) -> bool:
        """Put what is not decided back to where it was taken from, after the connection is `lost`.

        A pipe cannot go there: it has failed then. Return whether there was one.
        """
        has_failed = False
        for source in itertools.chain.from_iterable(batch.left() for batch in self._offered):
            if source.path == STDIN and self._content.stdin_is_begun:
                has_failed = True
                reason = f"{lost}; standard input cannot be sent a second time"
                self._report.problem(Problem(source.path, source.name, reason))
            else:
                self._backlog.give_back([source])
        return has_failed

    def run(self) -> None:
        """Send all of the backlog; blocks until each file is decided.

        Raises ConnectionLost, PeerRefused and ProtocolError.
        """
        batch = self._offer()
        while batch.sources:
            transfers = self._look_up(batch)
            with reading(self._connection, functools.partial(self._read_results, batch)):
                self._signs.send = self._content.send_still_here
                for transfer in transfers:
                    self._transfer(batch, transfer)
                self._signs.send = self._send_hashing
                # While the server is still busy, so that it never waits for the looking up here.
                following = self._offer()
            self._offered.remove(batch)
            batch = following

    def _send_hashing(self) -> None:
        self._connection.send(Hashing())

    # offered

    def _offer(self) -> Batch:
        """Offer the next batch, if there is one, and send what is queued."""
        with self._signs:
            batch = Batch(self._backlog.take())
        if batch.sources:
            self._offered.append(batch)
            entries = [source.entry for source in batch.sources]
            self._connection.send(Offer(entries, self._backlog.run))
        self._connection.flush()
        return batch

    # looked up

    def _look_up(self, batch: Batch) -> list[UnderWay]:
        """Return what the server needs, after answering what it asks about what it holds."""
        answer = self._receive_answer()
        digests: dict[int, Digests] = {}
        if isinstance(answer, Held):
            digests = self._compare(batch, answer)
            answer = self._receive_answer()
        if isinstance(answer, Held):
            raise ProtocolError("received a second held")
        return self._begin(batch, answer, digests)

    def _receive_answer(self) -> Start | Held:
        while isinstance(answer := self._connection.receive(Start, Held, Hashing), Hashing):
            self._count_sign()
        self._signs_left = MAX_SIGNS
        return answer

    def _count_sign(self) -> None:
        """Count a sign of life of the server; raises ProtocolError where it gives nothing else."""
        self._signs_left -= 1
        if not self._signs_left:
            raise ProtocolError("received signs of life without end")

    def _compare(self, batch: Batch, held: Held) -> dict[int, Digests]:
        """Answer with the SHA-256 of what the server holds of its files; return them by index."""
        found: dict[int, Digests] = {}
        answers = []
        for index, lengths in held.entries:
            if index >= len(batch.sources):
                raise ProtocolError("received a held of what was not offered")
            source = batch.sources[index]
            if source.entry.size is None:
                raise ProtocolError("received a held of what has no size")
            self._progress.start(source, 0, "comparing ")
            with self._signs:
                digests = hash_prefixes(source, lengths, self._note_compared)
            found[index] = digests
            answers.append([digests[n].hexdigest() if n in digests else "" for n in lengths])
        self._connection.send(common.Prefixes(answers))
        return found

    def _note_compared(self, size: int) -> None:
        """Note that so many bytes more are compared; raises ConnectionLost if that is for none."""
        self._progress.move(size)
        self._signs.check()

    def _begin(self, batch: Batch, start: Start, digests: Mapping[int, Digests]) -> list[UnderWay]:
        """Report those that the server has decided on already; return the others."""
        if len(start.entries) != len(batch.sources):
            raise ProtocolError("received a start for another offer")
        transfers = []
        for index, verdict in enumerate(start.entries):
            known = digests.get(index, {})
            if isinstance(verdict, Outcome):
                self._decide_unsent(batch, index, verdict, known)
                continue
            if verdict and verdict not in known:
                raise ProtocolError("received an offset that was not asked about")
            if verdict:
                self._report.resumed(batch.sources[index], verdict)
            transfers.append(UnderWay(batch.sources[index], index, verdict, known.get(verdict)))
        self._backlog.offset = max((each.offset for each in transfers), default=0)
        return transfers

    def _decide_unsent(self, batch: Batch, index: int, outcome: Outcome, known: Digests) -> None:
        """Report what becomes of a file of which nothing is sent; `known` has been compared."""
        entry = batch.sources[index].entry
        if outcome.kind != "failed" and not entry.is_folder:
            if entry.size not in known:
                raise ProtocolError("received a start of a file that was not compared")
            batch.ends[index] = Sent(known[entry.size].hexdigest(), entry.size)
        self._decide(batch, index, outcome)

    # under way

    def _transfer(self, batch: Batch, transfer: UnderWay) -> None:
        """Send a file from its offset on, then its SHA-256; or give it up."""
        if transfer.source.entry.is_folder:
            return
        end: Sent | NotSent
        try:
            end = self._content.send(transfer, lambda: transfer.number not in batch.undecided)
        except ConnectionLost:
            raise
        except (OSError, SocketPairError) as error:
            end = NotSent(describe_error(error))
            if isinstance(error, FileChanged) and error.source:
                self._offer_again(batch, error.source)
                end = OFFERED_AGAIN
        batch.ends[transfer.number] = end
        if isinstance(end, Sent):
            self._connection.queue(LENGTH.pack(common.END_OF_FILE) + bytes.fromhex(end.checksum))
        else:
            self._connection.queue(LENGTH.pack(common.GIVEN_UP))

    def _offer_again(self, batch: Batch, source: Source) -> None:
        """Have a file of `batch` be offered anew, and after it the folders there that it is in.

        So these are told, and get their times, once it is there.
        """
        self._backlog.give_back([source])
        for index, folder in enumerate(batch.sources):
            is_around = folder.entry.is_folder and source.name.startswith(f"{folder.name}/")
            if is_around and index in batch.undecided and index not in batch.ends:
                batch.ends[index] = OFFERED_AGAIN
                self._backlog.give_back([folder])

    # decided

    def _read_results(self, batch: Batch) -> None:
        """Report what becomes of each file of a batch, until all are decided; see `reading`."""
        while batch.undecided:
            message = self._connection.receive(Results, Hashing)
            if isinstance(message, Hashing):
                self._count_sign()
                continue
            self._signs_left = MAX_SIGNS
            if not message.entries:
                raise ProtocolError("received results without a result")
            for index, outcome in message.entries:
                self._decide(batch, index, outcome)

    def _decide(self, batch: Batch, index: int, outcome: Outcome) -> None:
        """Report what the server says has become of a file. Also for the results' thread."""
        source, end = batch.decide(index)
        self._backlog.decided += 1
        if end == OFFERED_AGAIN:
            return
        is_sent = not isinstance(end, NotSent)
        self._progress.decide(source, is_sent and outcome.kind == "saved")
        if isinstance(end, NotSent):
            self._report.problem(Problem(source.path, source.name, end.reason))
        else:
            self._report.decided(source, outcome, end)


def hash_prefixes(
    source: Source, lengths: Sequence[int], on_progress: Callable[[int], object]
) -> Digests:
    """Return the digests of the first `lengths` bytes of a file, read once; blocks until done.

    Leaves out those for which it cannot be read so far, and those too near to the one before.
    """
    digests: Digests = {}
    digest, done = hashlib.sha256(), 0
    with contextlib.suppress(OSError, common.FileShrunk), open_file(source.path) as file:
        for length in sorted(set(lengths)):
            if length != source.entry.size and length < done + MIN_PREFIX_BYTES:
                continue
            calculate_checksum(file.fileno(), length - done, digest=digest, on_progress=on_progress)
            digests[length], done = digest.copy(), length
    return digests


def read_small(path: str, then: os.stat_result) -> bytes | None:
    """Return what a small file holds, None if anything has happened to it. Raises OSError."""
    descriptor = common.open_to_read(path)
    try:
        content = os.read(descriptor, then.st_size + 1)
        is_whole = len(content) == then.st_size
        return content if is_whole and is_same(then, os.fstat(descriptor)) else None
    finally:
        os.close(descriptor)


def is_as_offered(then: os.stat_result, now: os.stat_result) -> bool:
    """Return whether a file has the size and the modification time that it had."""
    return (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)


def is_same(then: os.stat_result, now: os.stat_result) -> bool:
    """Return whether nothing at all has happened to a file.

    The time of its status also tells of changes whose modification time was set back; but it moves
    for a new name or mode as well, and on some file systems for nothing.
    """
    return is_as_offered(then, now) and now.st_ctime_ns == then.st_ctime_ns


def changed(source: Source, found: os.stat_result | None) -> FileChanged:
    """Return what to raise for a file that is as `found`, or of unknown size if that is None."""
    if (found and not stat.S_ISREG(found.st_mode)) or source.offers >= MAX_OFFERS:
        return FileChanged()
    entry = describe_file(source.name, found) if found else source.entry._replace(size=None)
    return FileChanged(Source(source.path, entry, found, source.offers + 1))


# --- sound: the clocks ----------------------------------------------------------------------

LINE_PARTS = 6
# No two clocks differ by more, so that a line that rises faster has stepped.
MAX_CLOCK_OFFSET = 1e-3
STEP_S = 0.002
# After so many seconds of playing, the loop's bandwidth in Hz. Whoever sends a pure tone hears a
# speed that changes by more than a millionth in a quarter of a second.
BANDWIDTHS_HZ = ((0.0, 0.3), (6.0, 0.05), (13.0, 0.02), (25.0, 0.006))
SMOOTHING = 4.0  # of the error, in bandwidths of the loop
MAX_CORRECTION = 0.002
# What is beyond does not come from the clocks, and teaches nothing about them.
MAX_ERROR_S = 0.003


class EarliestLine:
    """The lower edge of moments that are late by chance, but never early.

    What arrives over a network, or is asked for by a sound card, does so regularly but for
    delays. The earliest moments of the last `window_s` show the regular part: neither a
    stall nor the beat of two block lengths moves them, as it moves a mean. `note` is given each
    moment less the time that its frame number stands for; `offset_s` is the edge of these.

    Does nothing by itself, and knows no clock: the caller hands in the time.
    """

    def __init__(self, window_s: float) -> None:
        self.offset_s = 0.0
        self._part_s = window_s / LINE_PARTS
        self.slope = 0.0  # how fast it moves, as far as that is known, in seconds a second
        self._parts = [math.inf] * (LINE_PARTS + 1)  # their earliest; the last is not over yet
        self._part_end_s = -math.inf
        self._noted_s = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything has been noted."""
        return self._part_end_s > -math.inf

    def note(self, now_s: float, offset_s: float) -> None:
        """Take in that a frame came at `now_s`, `offset_s` after the time that it stands for."""
        if not self.is_known:
            self.offset_s, self._noted_s = offset_s, now_s
        self.shift(self.slope * (now_s - self._noted_s))
        if now_s >= self._part_end_s:
            self._begin_part(now_s)
        self._parts[-1] = min(self._parts[-1], offset_s)
        edge_s = min(self._parts)
        if math.inf in self._parts:
            # Too little has come lately to tell a late burst from a new edge.
            edge_s = min(edge_s, self.offset_s + (now_s - self._noted_s) * MAX_CLOCK_OFFSET)
        self.offset_s, self._noted_s = edge_s, now_s

    def _begin_part(self, now_s: float) -> None:
        """Begin the next part, and forget those that are out of the window."""
        passed = (now_s - self._part_end_s) / self._part_s if self.is_known else 0.0
        self._parts += [math.inf] * (int(min(passed, LINE_PARTS)) + 1)
        self._parts = self._parts[-LINE_PARTS - 1 :]
        self._part_end_s = now_s + self._part_s

    def shift(self, offset_s: float) -> None:
        """Move the line, and all that it was made from, by `offset_s`."""
        self.offset_s += offset_s
        if offset_s:
            self._parts = [part_s + offset_s for part_s in self._parts]


class SpeedLoop:
    """Tells how fast to play, so that an error in time goes away and stays away.

    A second-order loop whose error is smoothed first (Fons Adriaensen, "Using a DLL to filter
    time", 2005; "Controlling adaptive resampling", LAC 2012). Its bandwidth narrows: it finds
    the clocks' difference within seconds, and then holds it so still that a pure tone stays one.
    The integral is that difference.
    """

    def __init__(self) -> None:
        self.clock_offset = 0.0
        self.knows_clocks = False  # whether there was time to find their difference
        self._age_s = 0.0
        self.smooth_error_s = 0.0

    def restart(self) -> None:
        """Be quick again, from the difference of the clocks that is known."""
        self._age_s = 0.0
        self.smooth_error_s = 0.0

    def advance(self, error_s: float, elapsed_s: float) -> float:
        """Return how fast to play from now on, in parts of the usual speed.

        `error_s` is how late sound is played, `elapsed_s` the time since the last call.
        """
        self._age_s += elapsed_s
        self.knows_clocks |= self._age_s > BANDWIDTHS_HZ[1][0]
        bandwidth_hz = next(hz for age_s, hz in reversed(BANDWIDTHS_HZ) if self._age_s >= age_s)
        omega = 2 * math.pi * bandwidth_hz
        share = 1 - math.exp(-SMOOTHING * omega * elapsed_s)
        self.smooth_error_s += share * (clamp(error_s, MAX_ERROR_S) - self.smooth_error_s)
        self.clock_offset += omega**2 * self.smooth_error_s * elapsed_s
        self.clock_offset = clamp(self.clock_offset, MAX_CLOCK_OFFSET)
        correction = self.clock_offset + math.sqrt(2) * omega * self.smooth_error_s
        return 1 + clamp(correction, MAX_CORRECTION)


# --- sound: the reserve ---------------------------------------------------------------------

# ALSA's PulseAudio plugin hands over captured sound later and later, and every other second
# catches up by a block.
ARRIVALS_WINDOW_S = 3.0
LATENESS_WINDOW_S = 0.1
RECENT_WINDOWS = 200
REMEMBERED_WINDOWS = 1800
BLOCK_WINDOWS = 30  # in which the length of a block is looked for
RECURRING = 4.0
# For so long the sound card's callback waits for sound that is not there, before that is a dropout:
# its own buffer lasts for longer. So much less has to be in reserve.
CALLBACK_WAIT_S = 0.0025
# What the ways to measure are good for, and the loop's own error.
MARGIN_S = 0.0005
# On an idle machine a block comes a whole read of the sound card later than usual every few
# minutes.
MIN_RESERVE_S = 0.005
# An outage: no reserve prevents it, and none is kept for it.
MAX_RESERVE_S = 0.25
# What is late for longer comes from a server that lost time.
MAX_OUTAGE_S = 0.5
# One late window says nothing of how late the usual ones are.
MAX_SPREAD_S = 0.01


class Arrivals:
    """How late blocks come, and so how much sound has to be in reserve.

    Lateness is measured from a line that goes with the server's clock: the earliest arrivals,
    without their steps (another route, or sound that was lost before it was numbered). The
    reserve is the worst lateness of the last ``RECENT_WINDOWS``, of ``LATENESS_WINDOW_S`` each:
    known at once when it grows, forgotten 20 s after. What was worse in the time before, up to
    ``REMEMBERED_WINDOWS``, still counts where the recent worst is of its kind: beyond what is
    usual by a quarter as much. So rare stalls are not forgotten between two of them, but with the
    last one.

    As long as there are few windows, what others would bring is estimated: the greatest of many
    comes near to a Gumbel distribution, so that the worst of N is beyond the worst of n by its
    scale times ln(N / n).

    Compare WebRTC's NetEQ (``delay_manager``), which keeps a quantile of a histogram.
    """

    def __init__(self) -> None:
        self._line = EarliestLine(ARRIVALS_WINDOW_S)
        # When sound really comes at the earliest, less when the line says: its steps.
        self.edge_s = 0.0
        self._worst_s: deque[float] = deque(maxlen=REMEMBERED_WINDOWS)
        self._remembered_s = -math.inf
        self._window_worst_s = -math.inf
        self._window_end_s = -math.inf
        self._outage_end_s = -math.inf
        self._late_since_s = math.inf
        self._window_block_s = math.inf  # the shortest
        self._blocks_s: deque[float] = deque(maxlen=BLOCK_WINDOWS)

    @property
    def line_s(self) -> float:
        """The server's clock: when a frame could arrive, less the time that its number means."""
        return self._line.offset_s - self.edge_s

    def note(self, now_s: float, first_s: float, end_s: float) -> None:
        """Take in that a block came whose first frame and end stand for these times."""
        self._follow(now_s, now_s - end_s)
        if now_s >= self._window_end_s:
            self._close_window(now_s)
        self._window_block_s = min(self._window_block_s, end_s - first_s)
        lateness_s = now_s - first_s - self.line_s
        if lateness_s - self.edge_s > MAX_RESERVE_S:
            self._outage_end_s = now_s + LATENESS_WINDOW_S
            self._late_since_s = min(self._late_since_s, now_s)
        else:
            self._late_since_s = math.inf
        if now_s >= self._outage_end_s:
            self._window_worst_s = max(self._window_worst_s, lateness_s)

    def _follow(self, now_s: float, offset_s: float) -> None:
        """Move the line, without its steps; it begins anew where all comes far too late."""
        before_s = self._line.offset_s if self._line.is_known else offset_s
        if now_s - self._late_since_s > MAX_OUTAGE_S:
            self._line = EarliestLine(ARRIVALS_WINDOW_S)
        self._line.note(now_s, offset_s)
        moved_s = self._line.offset_s - before_s
        if abs(moved_s) > STEP_S:
            self.edge_s += moved_s

    def _close_window(self, now_s: float) -> None:
        if self._window_worst_s > -math.inf:
            self._worst_s.append(self._window_worst_s)
            self._remembered_s = self._remember()
        if self._window_block_s < math.inf:
            self._blocks_s.append(self._window_block_s)
        self._window_worst_s, self._window_block_s = -math.inf, math.inf
        self._window_end_s = now_s + LATENESS_WINDOW_S

    def _remember(self) -> float:
        """Return the lateness to expect from the windows that are remembered."""
        recent_s = sorted(itertools.islice(reversed(self._worst_s), RECENT_WINDOWS))
        count, usual_s, worst_s = len(recent_s), recent_s[len(recent_s) // 2], recent_s[-1]
        if count == RECENT_WINDOWS:
            return min(max(self._worst_s), usual_s + RECURRING * (worst_s - usual_s))
        spread_s = sum(min(abs(late - usual_s), MAX_SPREAD_S) for late in recent_s) / count
        return worst_s + spread_s * math.log(RECENT_WINDOWS / count)

    @property
    def block_s(self) -> float:
        """How long a block is: mostly, as Opus has odd ones, and lately, as servers differ."""
        return common.median(self._blocks_s or [self._window_block_s])

    @property
    def latest_s(self) -> float:
        """How much the worst of the last ``LATENESS_WINDOW_S`` or less needs."""
        return self._window_worst_s + MARGIN_S - CALLBACK_WAIT_S

    @property
    def needed_s(self) -> float:
        """How far behind the line to play, so that nothing comes too late."""
        worst_s = max(self._remembered_s, self._window_worst_s)
        needed_s = max(worst_s + MARGIN_S - CALLBACK_WAIT_S, self.edge_s + MIN_RESERVE_S)
        return min(needed_s, self.edge_s + MAX_RESERVE_S)


# --- sound: playout -------------------------------------------------------------------------

READS_WINDOW_S = 1.5
# A sound card that asks for nothing for so long has lost its rhythm.
STOOD_STILL_S = 0.3
# After so long a silence the server may be another, with another clock.
FORGETTING_S = 1.0
# With so much the loop has lost the clocks' difference, and looks for it again.
LOCKED_S = 0.002
STEERING_INTERVAL_S = 0.05
# How long to watch arrivals and the sound card's rhythm before the first sound.
WATCHING_S = 0.4
# An error that is so large, or so sudden, is one jump.
JUMP_S = 0.01
# Far less to keep is taken in small jumps, until nearly all is gone.
UNUSED_S = 0.01
LOWERED_S = 0.002
LOWERING_S = 0.01
LOWERING_INTERVAL_S = 0.5
# Less than that, or more that is not urgent, takes its time: as speeds change unheard.
GLIDE_GROWTH = 4e-6  # a second
MAX_GLIDE = 1e-4
ALIGNING_S = 0.004
KEPT_S = 1.5
FADE_S = 0.005
SHORTEST_FADE_S = 0.001
CONCEALED_S = 0.03
CONCEALED_FULLY_S = 0.005
SHORTEST_PERIOD_S, LONGEST_PERIOD_S = 0.0025, 0.016
TEMPLATE_S = 0.01
# On which side, or in the middle, each of so many channels is, as FFmpeg and WAV order them.
SIDES = {3: "LRM", 4: "LRMM", 5: "LRMLR", 6: "LRMMLR", 7: "LRMMMLR", 8: "LRMMLRLR"}


def load_converters() -> None:
    """Load the packages that playing on a card takes; without this, nothing of *playout* works.

    Raises AudioUnavailable.
    """
    global np, samplerate  # noqa: PLW0603  (only playing needs them, and they take long to import)
    try:
        import numpy as np  # noqa: PLC0415
        import samplerate  # noqa: PLC0415
    except common.LOAD_ERRORS as error:
        raise AudioUnavailable(
            "playing needs NumPy and samplerate, which cannot be loaded "
            f"({common.first_line(error)}): {common.how_to_install('numpy', 'samplerate')}"
        ) from None


class Tape:
    """The latest sound by the numbers of its frames: from `first` to before `end`.

    It keeps `kept_frames` of it. Sound is a float32 array, frames by channels; 1.0 is full scale.
    """

    def __init__(self, kept_frames: int, channels: int) -> None:
        self.first = 0
        self.end = 0
        self.channels = channels
        self._kept_frames = kept_frames
        self._store: Floats = np.zeros((2 * kept_frames, channels), np.float32)
        self._used = 0

    def append(self, sound: Floats) -> None:
        """Put `sound` behind what is there, of which the oldest is forgotten."""
        self.end += len(sound)
        sound = sound[-self._kept_frames :]
        if self._used + len(sound) > len(self._store):
            kept = self._kept_frames - len(sound)
            self._store[:kept] = self._store[self._used - kept : self._used].copy()
            self._used = kept
        self._store[self._used : self._used + len(sound)] = sound
        self._used += len(sound)
        self.first = max(self.first, self.end - min(self._used, self._kept_frames))

    def skip(self, frames: int) -> None:
        """Count `frames` of silence."""
        self.end += max(0, frames - self._kept_frames)
        self.append(np.zeros((min(frames, self._kept_frames), self.channels), np.float32))

    def between(self, start: int, end: int) -> Floats:
        """Return the frames from `start` to before `end`, as far as they are there; to be read."""
        before = self._used - self.end
        return self._store[max(start, self.first) + before : max(0, min(end, self.end) + before)]


class Overlay:
    """Fades `old` sound out over the sound that comes next."""

    def __init__(self, old: Floats) -> None:
        self._old = old.copy()
        self._level = np.arange(len(old), 0, -1, dtype=np.float32)[:, None] / (len(old) + 1)

    def laid_over(self, sound: Floats) -> Floats:
        """Return `sound`, the next there is, with what is left of the old one in it."""
        faded = min(len(sound), len(self._old))
        if not faded:
            return sound
        old, level = self._old[:faded], self._level[:faded]
        self._old, self._level = self._old[faded:], self._level[faded:]
        sound = sound.copy()
        sound[:faded] += (old - sound[:faded]) * level
        return sound


class Concealment:
    """Goes on where sound breaks off: its last pitch period again and again, fading out.

    As ITU-T G.711 Appendix I does, but without the delay that it takes to smooth the seams: the
    period is where the sound before is most like its end, is made to lead into itself, and
    starts from the level at which the sound broke off. `sound` is what was before.
    """

    def __init__(self, sound: Floats, rate: int) -> None:
        self._rate = rate
        self._done = 0
        self._end = int(CONCEALED_S * rate)
        self._channels = sound.shape[1]
        self._period = self._find_period(sound)
        if len(self._period):
            self._step = sound[-1] - sound[-len(self._period) - 1]

    def _find_period(self, sound: Floats) -> Floats:
        """Return the last period of `sound`, its end leading into its beginning; none if short."""
        lag = pitch_period(sound, self._rate)
        seam = lag // 4
        if not seam or len(sound) < lag + seam:
            return sound[:0]
        period: Floats = sound[-lag:].copy()
        period[-seam:] = Overlay(period[-seam:]).laid_over(sound[-lag - seam : -lag])
        return period

    def take(self, frames: int) -> Floats:
        """Return the next `frames`: silence in the end."""
        if self._done >= self._end or not len(self._period):
            self._done += frames
            return np.zeros((frames, self._channels), np.float32)
        place = np.arange(self._done, self._done + frames)
        self._done += frames
        fading = (place / self._rate - CONCEALED_FULLY_S) / (CONCEALED_S - CONCEALED_FULLY_S)
        level = np.cos(np.clip(fading, 0, 1) * (np.pi / 2)) ** 2
        settling = np.exp(-place / (self._rate * 0.0005))
        sound = self._period[place % len(self._period)] + settling[:, None] * self._step
        faded: Floats = (sound * level[:, None]).astype(np.float32)
        return faded


def pitch_period(sound: Floats, rate: int) -> int:
    """Return after how many frames the end of `sound` is most like itself; 0 if it is too short."""
    mono = sound.mean(axis=1)
    template = mono[-int(TEMPLATE_S * rate) :]
    shortest, longest = int(SHORTEST_PERIOD_S * rate), int(LONGEST_PERIOD_S * rate)
    searched = mono[-longest - len(template) : -shortest]
    if len(searched) <= len(template):
        return 0
    return shortest + len(searched) - len(template) - most_alike(searched, template)


def most_alike(searched: Any, template: Any) -> int:
    """Return where in `searched`, one channel, `template` fits best: the highest correlation."""
    product = np.correlate(searched, template)
    energy = np.cumsum(np.concatenate(([0.0], searched.astype(np.float64) ** 2)))
    energy = energy[len(template) :] - energy[: -len(template)]
    return int(np.argmax(product / np.sqrt(energy + 1e-6)))


def to_sound(samples: bytes, audio: AudioFormat, channels: int) -> Floats:
    """Return 16-bit samples as floats, mixed down where there are more than `channels`, one or two.

    The mean of all to one, of those on its side or in the middle to each of two.
    """
    sound = np.frombuffer(samples, "<i2").reshape(-1, audio.channels).astype(np.float32)
    sound *= np.float32(1 / 32768)
    if audio.channels == channels:
        return sound
    sides = SIDES.get(audio.channels, "LR" * audio.channels)
    places = [[n for n in range(audio.channels) if sides[n] != other] for other in "RL"]
    if channels == 1:
        places = [list(range(audio.channels))]
    return np.stack([sound[:, place].mean(axis=1) for place in places], axis=1)


def to_samples(sound: Floats, channels: int) -> bytes:
    """Return `sound` as 16-bit samples: mono on both sides, channels that are left over silent."""
    if sound.shape[1] < channels:
        spread = np.zeros((len(sound), channels), np.float32)
        spread[:, : max(2, sound.shape[1])] = sound
        sound = spread
    scaled = np.rint(sound * np.float32(32768))
    samples: bytes = np.clip(scaled, -32768, 32767).astype("<i2").tobytes()
    return samples


class Target:
    """How far behind the earliest arrivals to play: it goes to what is needed, mostly unheard."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.gliding = 0.0  # how fast it moves, in seconds a second
        self._is_lowering = False
        self._lowered_s = 0.0

    def is_far_above(self, needed_s: float) -> bool:
        """Return whether so much less is needed that it goes down in jumps; not to its very end."""
        surplus_s = self.seconds - needed_s
        self._is_lowering = surplus_s > (LOWERED_S if self._is_lowering else UNUSED_S)
        return self._is_lowering

    def next_jump_s(self, needed_s: float, now_s: float) -> float:
        """Return how far to jump down at `now_s`: nothing just after another jump."""
        if now_s - self._lowered_s <= LOWERING_INTERVAL_S:
            return 0.0
        self._lowered_s = now_s
        return min(self.seconds - needed_s, LOWERING_S)

    def glide(self, needed_s: float, elapsed_s: float) -> None:
        """Move towards `needed_s` as slowly as a speed may change; the sound has to follow."""
        more_s = needed_s - self.seconds
        most = math.copysign(math.sqrt(GLIDE_GROWTH * abs(more_s)), more_s)
        self.gliding += clamp(clamp(most, MAX_GLIDE) - self.gliding, GLIDE_GROWTH * elapsed_s)
        self.seconds += self.gliding * elapsed_s


class Playout:
    """Plays evenly, soon, and at the server's speed what arrives unevenly.

    Whoever receives calls `write`, the sound card calls `read`; both hand in the time. Frames
    are numbered as they are written. Two lines are followed: when a frame can arrive at the
    earliest, and when the sound card wants it at the earliest. Their distance is the **lead**,
    which is held at a **target**: what `Arrivals` says has to be in reserve. Between blocks it
    goes on smoothly, so that no beat of written and read blocks moves it.

    `SpeedLoop` steers the resampler by the lead's error, which also converts to the sound card's
    rate. Another target, and an error that is far, is one jump with a cross-fade, to where the
    sound is most alike. A read that finds too little is a **dropout**: it is concealed, and
    playing goes on at what would have prevented it.

    Plain logic: no thread, no clock, no device, and no lock, which the caller has to hold.
    Needs the packages numpy and samplerate.
    """

    def __init__(
        self,
        audio: AudioFormat,
        card: AudioFormat,
        fixed_target_s: float | None = None,
        kept_s: float = KEPT_S,
    ) -> None:
        self.audio = audio
        self.card = card
        self.dropouts = 0
        channels = min(audio.channels, card.channels)
        self._tape = Tape(int(kept_s * audio.rate), channels)
        # What the resampler holds is never collected.
        supply = functools.partial(Playout._supply, weakref.proxy(self))
        self._resampler = samplerate.CallbackResampler(
            supply, card.rate / audio.rate, "sinc_fastest", channels
        )
        self.loop = SpeedLoop()
        self.arrivals = Arrivals()
        self._reads = EarliestLine(READS_WINDOW_S)
        self.fixed_target_s = fixed_target_s
        self.target = Target()
        self.speed = 1.0
        self._next = 0  # the frame that the resampler gets next
        self._asked_frames = 0.0  # as far as all reads reach
        self.is_playing = False
        self._unplayed = 0  # where to go on
        self._draining = False
        self._start_s = math.inf  # when it is known how much to keep
        self._read_s = 0.0
        self._steered_s = 0.0
        self._error_s = 0.0
        self._concealment = self._concealment_at(0)
        self._overlay = Overlay(self._tape.between(0, 0))
        self._resampler.read(1)
        self._inside_frames = self._next - self._stride  # as it takes some for itself
        self._next = 0

    @property
    def lead_s(self) -> float:
        """How long before it is wanted the next frame could have arrived."""
        return self._reads.offset_s - self.arrivals.line_s

    @property
    def fill_frames(self) -> int:
        """The sound that waits to be played."""
        begin = self._next if self.is_playing else self._unplayed
        return max(0, self._tape.end - max(begin, self._tape.first))

    def describe(self) -> str:
        """Return how much sound waits."""
        return f"buffer {self.audio.milliseconds(self.fill_frames):3.0f} ms"

    def drain(self) -> None:
        """Play what is left, however little: no more will come."""
        self._draining = True

    def restart(self) -> None:
        """Resume with a sound card that was away, or stood still for long."""
        self._reads = EarliestLine(READS_WINDOW_S)
        self.loop.restart()
        self._stop()
        self._start_s = math.inf

    # writing

    def write(self, samples: bytes, gap_frames: int, now_s: float, captured_s: float = 0.0) -> None:
        """Add `samples`, which came at `now_s`, of which `gap_frames` were missed in between."""
        tape = self._tape
        if not samples:
            return
        sound = to_sound(samples, self.audio, tape.channels)
        if gap_frames > 0:
            sound = self._conceal_gap(gap_frames, sound)
        first = tape.end
        tape.append(sound)
        self.arrivals.note(now_s, first / self.audio.rate, tape.end / self.audio.rate)

    def _conceal_gap(self, gap_frames: int, sound: Floats) -> Floats:
        """Fill a gap before `sound`; return `sound`, faded in."""
        concealment = self._concealment_at(self._tape.end)
        concealed_frames = min(gap_frames, int(CONCEALED_S * self.audio.rate))
        self._tape.append(concealment.take(concealed_frames))
        self._tape.skip(gap_frames - concealed_frames)
        fade_frames = min(len(sound), int(FADE_S * self.audio.rate))
        return Overlay(concealment.take(fade_frames)).laid_over(sound)

    def _concealment_at(self, place: int) -> Concealment:
        """Return what goes on where the sound breaks off, before `place`."""
        frames = int((LONGEST_PERIOD_S + TEMPLATE_S) * self.audio.rate)
        return Concealment(self._tape.between(place - frames, place), self.audio.rate)

    # reading

    def _frames_for(self, frames: int) -> int:
        """Return how many frames a read of `frames` of the sound card may take."""
        return math.ceil(frames * self._stride) + 2

    @property
    def _stride(self) -> float:
        """How many of the server's frames go into one of the sound card's."""
        return self.audio.rate / self.card.rate * self.speed

    def lacks(self, frames: int) -> bool:
        """Return whether a read of `frames` would be a dropout."""
        there = self._tape.end - self._next
        return self.is_playing and not self._draining and there < self._frames_for(frames)

    def read(
        self, frames: int, now_s: float, ahead_s: float = 0.0, has_run_dry: bool = False
    ) -> bytes:
        """Return exactly `frames` to play, which the card wants at `now_s`; silence if need be.

        The first of them is heard `ahead_s` later. With `has_run_dry` the card had nothing left to
        play before it asked. No sound system tells that of every card: a long time without a read
        counts as well.
        """
        if has_run_dry or (self.is_playing and self._has_stood_still(now_s)):
            self._note_underrun()
        if self._next < self._tape.first and self.is_playing:  # the card stood still
            self.restart()
        self._note_read(frames, now_s, ahead_s)
        if not self.is_playing:
            self._start(self._frames_for(frames), now_s)
        elif now_s - self._steered_s >= STEERING_INTERVAL_S:
            self._steer(now_s)
        self._resampler.ratio = 1 / self._stride
        sound = self._resampler.read(frames)
        return to_samples(sound, self.card.channels)

    def _has_stood_still(self, now_s: float) -> bool:
        return now_s - self._read_s > STOOD_STILL_S

    def _note_underrun(self) -> None:
        """Count a dropout of the sound card."""
        self.dropouts += self.is_playing

    def _note_read(self, frames: int, now_s: float, _ahead_s: float) -> None:
        self._asked_frames += frames * self._stride
        if self._has_stood_still(now_s):
            self._reads = EarliestLine(READS_WINDOW_S)
        self._read_s = now_s
        self._reads.note(now_s, now_s - self._asked_frames / self.audio.rate)

    def _supply(self) -> Floats:
        """Return the frames that the resampler needs next, one at least."""
        frames = max(1, math.ceil(self._asked_frames - self._next))
        if self.is_playing:
            sound = self._tape.between(self._next, self._next + frames)
            if not len(sound):
                self.dropouts += not self._draining
                self._stop()
        if not self.is_playing:
            sound = self._concealment.take(frames)
        self._next += len(sound)
        return self._overlay.laid_over(sound)

    def _stop(self) -> None:
        """Play nothing more for now; fade out."""
        if self.is_playing:
            self.is_playing = False
            self._unplayed = self._next
            self._concealment = self._concealment_at(self._next)

    def _start(self, frames: int, now_s: float) -> None:
        """Begin to play where it is time to, if the next `frames` from there have come."""
        first, last = max(self._unplayed, self._tape.first), self._tape.end - frames
        if self._draining:
            if first < self._tape.end:
                self._start_on_rest(first, now_s)
        elif first <= last and self._is_time_to_start(now_s):
            place = self._due_place()
            if first <= place <= last:
                self._play_from(place, now_s)

    def _start_on_rest(self, first: int, now_s: float) -> None:
        """Begin to play what is left, from `first` on, as no more comes."""
        self._play_from(first, now_s)

    def _due_place(self) -> int:
        """Return which frame it is time to play."""
        return self._next + round(self._find_error_s() * self.audio.rate)

    def _is_time_to_start(self, now_s: float) -> bool:
        """Return whether it is known how much to keep; that is the target then."""
        self._start_s = min(self._start_s, now_s + WATCHING_S)
        if now_s < self._start_s:
            return False
        self.target.seconds = self._needed_s()
        return True

    def _find_error_s(self) -> float:
        """Return by how much sound is played too late."""
        return self.lead_s - self.target.seconds

    def _needed_s(self) -> float:
        """Return what the target should be."""
        if self.fixed_target_s is not None:
            return self.arrivals.edge_s + self.fixed_target_s + self.arrivals.block_s
        return self.arrivals.needed_s

    def _play_from(self, place: int, now_s: float) -> None:
        if now_s - self._steered_s > FORGETTING_S:
            self.loop.restart()
        self._overlay = Overlay(self._concealment.take(int(FADE_S * self.audio.rate)))
        self._go_to(place)
        self._error_s = 0.0
        self.is_playing = True
        self._steered_s = now_s

    def _go_to(self, place: int) -> None:
        """Let `place` be the next frame; what has been asked for goes with it."""
        frames = place - self._next
        self._next = place
        self._asked_frames += frames
        self._reads.shift(-frames / self.audio.rate)

    # steering

    def _steer(self, now_s: float) -> None:
        """Hold the lead at the target, and the target at what is needed."""
        elapsed_s, self._steered_s = now_s - self._steered_s, now_s
        self._adapt(now_s, elapsed_s)
        error_s = self._find_error_s()
        if abs(self.loop.smooth_error_s) > LOCKED_S:
            self.loop.restart()
            error_s = self._jump_to_target(error_s)
        elif abs(error_s) > JUMP_S or abs(error_s - self._error_s) > STEP_S:
            error_s = self._jump_to_target(error_s)
        self._error_s = error_s
        self._play_at(self.loop.advance(error_s, elapsed_s) - self.target.gliding)

    def _play_at(self, speed: float) -> None:
        self.speed = speed
        self._reads.slope = 1 - speed

    def _jump_to_target(self, error_s: float) -> float:
        """Leave out an error that no clock has made, say by a card that lost time.

        Returns what is left of it: a little more to keep is as well a new target, which glides.
        """
        left_s = error_s
        if self.fixed_target_s is not None or not 0 < error_s < ALIGNING_S:
            left_s -= self._jump(error_s)
        if abs(left_s) > ALIGNING_S:
            return left_s
        self.target.seconds += left_s
        return 0.0

    def _adapt(self, now_s: float, elapsed_s: float) -> None:
        """Move the target to what is needed: at once where sound comes too late, else unheard."""
        target, needed_s = self.target, self._needed_s()
        if self.fixed_target_s is not None:
            target.seconds = needed_s
        elif self.arrivals.latest_s > target.seconds:
            target.seconds -= self._jump(target.seconds - needed_s)
        elif target.is_far_above(needed_s):
            if jump_s := target.next_jump_s(needed_s, now_s):
                target.seconds -= self._jump(jump_s)
        else:
            target.glide(needed_s, elapsed_s)

    def _jump(self, seconds: float) -> float:
        """Leave out about `seconds` of sound, or repeat them if negative; return how many."""
        old = self._tape.between(self._next, self._next + int(FADE_S * self.audio.rate))
        if len(old) < SHORTEST_FADE_S * self.audio.rate:
            return 0.0
        place = self._next + round(seconds * self.audio.rate)
        place = self._aligned(min(place, self._tape.end - len(old)), old)
        moved_frames = place - self._next
        self._overlay = Overlay(old)
        self._go_to(place)
        return moved_frames / self.audio.rate

    def _aligned(self, place: int, old: Floats) -> int:
        """Return where, at `place` or a little before, the sound is most like `old`."""
        searched_frames = min(int(ALIGNING_S * self.audio.rate), abs(place - self._next))
        first = max(self._tape.first, place - searched_frames)
        if self.fixed_target_s is not None or first >= place:
            return max(first, place)
        searched = self._tape.between(first, place + len(old))
        return first + most_alike(searched.mean(axis=1), old.mean(axis=1))


# --- sound: server's clock ------------------------------------------------------------------

# In a burst, as the shortest of some ways there, and back, is the one with the least waiting in it.
BURST_REQUESTS = 8
BURST_TIMEOUT_S = 1.0
# Often at first, until the difference of the two clocks' speeds is known.
BURST_INTERVALS_S = (0.15, 0.15, 0.3, 0.3, 0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0)
STEADY_INTERVAL_S = 2.5
# A burst whose best round trip leaves open so much more than all of them together has waited behind
# sound: the next one comes soon.
POOR_INTERVAL_S, POOR_S = 1.0, 100e-6
# Quartz clocks drift by a tenth of a millionth in a minute as they get warm.
CLOCK_WINDOW_S = 60.0
MOST_KEPT = 150  # however much a server answers: the line is looked for in all of them
# A clock that is being set right goes so much faster or slower (Linux, adjtime).
MAX_CLOCK_DRIFT = 500e-6
DRIFT_STEPS = 16  # of bisection: to a 60th of a millionth
# Answers so near to each other tell nothing of a drift.
DRIFT_SPAN_S = 0.25


class OffsetBounds(NamedTuple):
    """How far the server's clock was ahead of this machine's at a moment: at most, at least."""

    moment_s: float
    most_s: float
    least_s: float

    @property
    def width_s(self) -> float:
        """How much they leave open: the round trip."""
        return self.most_s - self.least_s


def bound_offset(reply: common.TimeReply, returned_ns: int) -> OffsetBounds:
    """Return what a `reply` that came at `returned_ns` tells: both ways took some time."""
    return OffsetBounds(
        (reply.asked_ns + returned_ns) / 2e9,
        (reply.received_ns - reply.asked_ns) / 1e9,
        (reply.answered_ns - returned_ns) / 1e9,
    )


class ServerClock:
    """The server's monotonic clock as this machine knows it: an offset, and how fast it changes.

    Each request that arrives bounds the offset from above, each reply from below. The offset is
    the line in the middle of the widest straight corridor between the bounds of the last
    ``CLOCK_WINDOW_S``, which one quick way there and one quick way back suffice to place, however
    long all others waited (compare L. Zhang, Z. Liu, C. H. Xia, "Clock synchronization algorithms
    for network measurements", INFOCOM 2002). Where there is none, a clock has jumped: what was
    before is forgotten.

    Plain logic: the caller asks, and hands in the time. The receiving thread feeds it; `offset_at`
    is for any thread.
    """

    def __init__(self) -> None:
        self._burst: list[OffsetBounds] = []
        self._kept: list[OffsetBounds] = []  # the narrowest of each burst
        self._intervals = iter(BURST_INTERVALS_S)
        self._requests_left = BURST_REQUESTS
        self._burst_end_s = self._next_burst_s = -math.inf
        # Moment, offset and drift in one tuple, as other threads read it.
        self._state = (0.0, 0.0, 0.0)

    @property
    def is_known(self) -> bool:
        """Whether there has been any answer."""
        return bool(self._kept)

    def wants_request(self, now_s: float) -> bool:
        """Return whether to send a request now; if so, it counts as sent."""
        if self._requests_left:
            self._requests_left -= 1
            self._burst_end_s = now_s + BURST_TIMEOUT_S
            return True
        if self._burst and now_s > self._burst_end_s:
            self._finish_burst()
        if now_s < max(self._next_burst_s, self._burst_end_s):
            return False
        self._requests_left = BURST_REQUESTS
        return self.wants_request(now_s)

    def take(self, bounds: OffsetBounds) -> None:
        """Take what the answer to a request tells."""
        if bounds.width_s < 0:
            return  # a clock has jumped meanwhile
        self._burst.append(bounds)
        if len(self._burst) == BURST_REQUESTS:
            self._finish_burst()

    def offset_at(self, now_s: float) -> float:
        """Return by how much the server's clock is ahead of this machine's at `now_s`.

        0 while that is not known.
        """
        moment_s, offset_s, drift = self._state
        return offset_s + drift * (now_s - moment_s)

    @property
    def drift(self) -> float:
        """How much faster the server's clock goes than this machine's, in parts of its speed."""
        return self._state[2]

    def _finish_burst(self) -> None:
        burst, self._burst = self._burst, []
        now_s = burst[-1].moment_s
        kept = [bounds for bounds in self._kept if bounds.moment_s > now_s - CLOCK_WINDOW_S]
        narrowest = {min(burst, key=lambda b: b.most_s), max(burst, key=lambda b: b.least_s)}
        self._kept = [*kept, *sorted(narrowest)][-MOST_KEPT:]
        while (width_s := self._fit(now_s)) < 0:
            self._intervals = iter(BURST_INTERVALS_S)
            del self._kept[0]
        interval_s = next(self._intervals, STEADY_INTERVAL_S)
        if min(bounds.width_s for bounds in burst) > width_s + POOR_S:
            interval_s = min(interval_s, POOR_INTERVAL_S)
        self._burst_end_s = now_s
        self._next_burst_s = now_s + interval_s

    def _fit(self, now_s: float) -> float:
        """Follow the middle of the widest corridor; return its width, negative if there is none."""
        slowest, fastest = -MAX_CLOCK_DRIFT, MAX_CLOCK_DRIFT
        for _ in range(DRIFT_STEPS):
            drift = (slowest + fastest) / 2
            upper = min(self._kept, key=lambda bounds: bounds.most_s - drift * bounds.moment_s)
            lower = max(self._kept, key=lambda bounds: bounds.least_s - drift * bounds.moment_s)
            # The width grows with the drift where the lower bound is later than the upper one.
            if lower.moment_s - upper.moment_s > math.copysign(DRIFT_SPAN_S, drift):
                slowest = drift
            else:
                fastest = drift
        most_s = upper.most_s + drift * (now_s - upper.moment_s)
        least_s = lower.least_s + drift * (now_s - lower.moment_s)
        self._state = (now_s, (most_s + least_s) / 2, drift)
        return most_s - least_s


# --- sound: in step -------------------------------------------------------------------------

NEED_WINDOWS = 10  # of a second each, over which the network's need is looked at
OUTAGE_S = 1.0  # what is later is no need of the network's, unless it mostly is
UNTOLD_S = 2.0  # it may be silent for a moment after it has started, or run dry
# Reads are regular that are off by no more in the mean; what a card tells is something else than
# before where that is off by more.
REGULAR_S, ELSE_S = 0.0005, 0.0015
SCATTER_READS = 50  # of which it is the mean, about
WINDOW_READS = 20  # over which a change of both is looked for
NOTICED_S = 0.00025
AHEAD_READS = 20  # over which what is told is averaged while reads are not regular
AHEAD_DRIFT = 30e-6  # how fast what is told is believed while they are
DOUBTED_S = 10.0  # after which it is believed at once
# What is off by more is put right by silence; by less, by one jump.
FAR_OFF_S = 0.1
OUT_OF_STEP_S = 0.001
PULL_PER_S = 0.6  # of an error, beside what the lines' speeds say


class Sync(NamedTuple):
    """A server's --sync: each sample frame is played `after_s` after its capture by its `clock`."""

    clock: ServerClock
    after_s: float


class Leaving:
    """When sample frames of a sound card leave the loudspeaker.

    With each read the card tells how long before that it takes them. PulseAudio smooths what it
    tells over five seconds, so that it is wrong by milliseconds for ten after each stumble. Reads
    show at once by how much later all has become: while they come regularly, what was told before
    them holds, and what is told now is believed slowly.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self.line = common.TimeLine(rate)  # to be interrupted where the card has run dry
        self._frames = 0  # taken so far
        self.block_s = 0.0
        self.ahead_s = 0.0  # as far as it is believed
        self._told_s = 0.0
        self._untold_s = 0.0  # for how long the card has not told it
        self._averaged = 0  # reads of which `ahead_s` is the mean
        self._doubted_s = 0.0  # for how long it has been something else than what is told
        self._scatter_s = ELSE_S  # of the reads
        # Of this window: by how much each read was late, and what was told then.
        self._window: list[tuple[float, float]] = []
        self._told_before_s = 0.0

    @property
    def is_untold(self) -> bool:
        """Whether the sound card does not tell when it plays."""
        return self._untold_s > UNTOLD_S

    @property
    def next_s(self) -> float:
        """When the next sample frame that the card takes leaves."""
        return self.line.at(self._frames)

    def note_read(self, frames: int, now_s: float, told_s: float) -> None:
        """Note that the card took so many sample frames at `now_s`.

        The first of them leaves `told_s` later as the card tells; 0 where it does not.
        """
        self.block_s = frames / self._rate
        if told_s:
            self._told_s, self._untold_s = told_s, 0.0
        self._untold_s += self.block_s
        is_told = self.line.is_off or self._scatter_s > REGULAR_S or self._doubted_s > DOUBTED_S
        if is_told:
            self._average()
        else:
            self._drift()
        self.line.see(self._frames, now_s + (self._told_s if is_told else self.ahead_s))
        off_s = now_s + self.ahead_s - self.line.at(self._frames)
        if not is_told:
            off_s = self._note_off(off_s)
        self._scatter_s += (min(abs(off_s), ELSE_S) - self._scatter_s) / SCATTER_READS
        self._frames += frames

    def _average(self) -> None:
        """Believe what the card tells, in the mean of the last reads that tell about the same."""
        change_s = self._told_s - self.ahead_s
        self._doubted_s = 0.0
        self._window, self._told_before_s = [], self._told_s
        self._averaged = 1 if abs(change_s) > ELSE_S else min(self._averaged + 1, AHEAD_READS)
        self.ahead_s += change_s / self._averaged

    def _drift(self) -> None:
        """Believe what the card tells slowly."""
        change_s = self._told_s - self.ahead_s
        self._averaged = 0
        self._doubted_s = self._doubted_s + self.block_s if abs(change_s) > ELSE_S else 0.0
        self.ahead_s += clamp(change_s, AHEAD_DRIFT * self.block_s)

    def _note_off(self, late_s: float) -> float:
        """Note that a read was late by so much; return by how much it is after that.

        Where reads come earlier as sound is kept for longer, or the reverse, believes that at once.
        """
        self._window.append((late_s, self._told_s))
        if len(self._window) < WINDOW_READS:
            return late_s
        off_s, told_s = map(common.median, zip(*self._window, strict=True))
        change_s = told_s - self._told_before_s
        self._window, self._told_before_s = [], told_s
        if abs(off_s) <= NOTICED_S or abs(off_s + change_s) >= abs(off_s) / 2:
            return late_s
        self.ahead_s -= off_s
        return late_s - off_s


class InStep:
    """How late this loudspeaker is against when `sync` has all listeners play.

    Three lines meet here: when the server captured a sample frame, by its clock; what that clock
    shows by this machine's; and when a sample frame of the sound card leaves the loudspeaker.
    Sample frames of the server are counted as the player counts them. `delay_s` is how much later
    than all others this one is to play. `leaving` is to be told of each read of the card.

    Plain logic: no thread, no clock, no device, and no lock, which the caller has to hold.
    """

    def __init__(
        self, sync: Sync, audio: AudioFormat, card_rate: int, delay_s: float = 0.0
    ) -> None:
        self.delay_s = delay_s
        self._rate = audio.rate
        self.leaving = Leaving(card_rate)
        self.begin(sync)

    def begin(self, sync: Sync) -> None:
        """Begin with another connection, whose server may be another one."""
        self.after_s = sync.after_s + self.delay_s
        self._clock = sync.clock
        self._captured_frame, self._captured_s = 0, 0.0
        self._capture = common.TimeLine(self._rate)  # for its speed alone: see `late_s`
        self._worst_ages_s: deque[float] = deque(maxlen=NEED_WINDOWS)
        self._window_end_s = -math.inf

    @property
    def is_ready(self) -> bool:
        """Whether `late_s` means anything: the server's clock and some of its sound are known."""
        return self._clock.is_known and self._captured_frame > 0

    @property
    def is_sure(self) -> bool:
        """Whether `late_s` is to be acted upon: nothing looks as if it were about to step."""
        return self.is_ready and not self.leaving.line.is_off

    def note_block(self, frames: int, end_frame: int, captured_s: float, now_s: float) -> None:
        """Note that `frames` of sound came at `now_s`, of which the last is before `end_frame`.

        That one was captured at `captured_s` by the server's clock.
        """
        self._captured_frame, self._captured_s = end_frame, captured_s
        self._capture.see(end_frame, captured_s)
        if not self._clock.is_known:
            return
        age_s = now_s + self._clock.offset_at(now_s) - (captured_s - frames / self._rate)
        if now_s > self._window_end_s:
            self._window_end_s = now_s + 1.0
            self._worst_ages_s.append(age_s)
        self._worst_ages_s[-1] = max(self._worst_ages_s[-1], age_s)

    def late_s(self, frame: float) -> float:
        """Return how late `frame` leaves if the sound card's next sample frame plays it.

        What the server says of the capture is taken as it is: where that is off, it is so for all.
        """
        leaving_s = self.leaving.next_s
        due_s = self._captured_s + (frame - self._captured_frame) / self._rate + self.after_s
        return leaving_s + self._clock.offset_at(leaving_s) - due_s

    @property
    def speed(self) -> float:
        """How fast to play to stay as late as it is, in parts of the usual speed."""
        return self._capture.speed * (1 + self._clock.drift) / self.leaving.line.speed

    @property
    def needed_s(self) -> float:
        """How long after its capture a sample frame can be played on this network and card."""
        ages_s = sorted([0.0, *self._worst_ages_s])
        usual_s = ages_s[(len(ages_s) - 1) // 2]
        network_s = max(age_s for age_s in ages_s if age_s <= max(usual_s, OUTAGE_S))
        return network_s + self.leaving.ahead_s + self.leaving.block_s


class SyncedPlayout(Playout):
    """Plays each sample frame when it is due by `step`, and so together with all other listeners.

    What is not due yet waits in silence, what has not come by then is a dropout: there is no
    reserve but the time that the server gives to all.
    """

    def __init__(self, audio: AudioFormat, card: AudioFormat, step: InStep) -> None:
        super().__init__(audio, card, kept_s=KEPT_S + max(0.0, step.after_s))
        self.step = step

    def write(self, samples: bytes, gap_frames: int, now_s: float, captured_s: float = 0.0) -> None:
        """Add `samples`, the last of which was captured at `captured_s` by the server's clock."""
        super().write(samples, gap_frames, now_s)
        if samples:
            frames = self.audio.frames_of(samples)
            self.step.note_block(frames, self._tape.end, captured_s, now_s)

    def restart(self) -> None:
        """Resume with a sound card that was away, or stood still for long."""
        super().restart()
        self.step.leaving = Leaving(self.card.rate)

    def describe(self) -> str:
        """Return how far off this player believes to be, and how much of the time it needs."""
        needed = f"needs {self.step.needed_s * 1000:.0f} of {self.step.after_s * 1000:.0f} ms"
        if not (self.is_playing and self.step.is_ready):
            return f"not in step yet  {needed}"
        return f"{self._find_error_s() * 1000:+.2f} ms off  {needed}"

    def _note_underrun(self) -> None:
        """Count a dropout of the sound card, after which it plays later than before."""
        super()._note_underrun()
        self.step.leaving.line.interrupt()

    def _note_read(self, frames: int, now_s: float, ahead_s: float) -> None:
        super()._note_read(frames, now_s, ahead_s)
        self.step.leaving.note_read(frames, now_s, ahead_s)

    def _start_on_rest(self, first: int, now_s: float) -> None:
        """Begin to play what is left once it is due."""
        if self._is_time_to_start(now_s) and (place := self._due_place()) >= first:
            self._play_from(min(place, self._tape.end), now_s)

    def _is_time_to_start(self, now_s: float) -> bool:
        return self.step.is_ready

    def _find_error_s(self) -> float:
        return self.step.late_s(self._asked_frames - self._inside_frames)

    def _steer(self, now_s: float) -> None:
        """Be neither late nor early; where it is by far, wait in silence for what is due."""
        self._steered_s = now_s
        if not self.step.is_sure:
            return
        error_s = self._find_error_s()
        if abs(error_s) > FAR_OFF_S:
            self._stop()
            return
        if abs(error_s) > OUT_OF_STEP_S:
            error_s -= self._jump(error_s)
        self._play_at(self.step.speed + clamp(PULL_PER_S * error_s, MAX_CORRECTION))

    def _aligned(self, place: int, old: Floats) -> int:
        """Return `place`: here it counts when, not how smoothly."""
        return max(self._tape.first, place)


# --- sound: outputs -------------------------------------------------------------------------

STDOUT = "-"
JOINING_S = 3.0  # until it plays
DRAIN_LIMIT_S = 2.0
CARD_BUFFER_S = 0.15
# PulseAudio takes 5 ms at once: with blocks of 4 ms its requests wander to and fro by milliseconds
# on a busy machine. What 10 ms make of a card's buffer, some 30, lasts while programs compete.
BLOCK_MS, LONGEST_BLOCK_MS = 5.0, 10.0
# Where it is known for how long sound waits, half of that is the card's at most: four blocks, of
# which three are in its buffer.
BLOCKS_OF_WAIT = 8


class ReaderGone(SocketPairError):
    """Whoever read standard output has closed it: nobody wants more."""


class Speaker:
    """A sound card, as a `Destination`.

    The constructor loads what converts the sound and finds the card, which takes a while; it
    raises AudioUnavailable where there is no such loudspeaker. `delay_ms` is how much later than
    all other listeners it plays, where they play in step.
    """

    def __init__(
        self, wanted: str | None, latency_ms: float | None, delay_ms: float, console: Console
    ) -> None:
        load_converters()
        self.latency_s = None if latency_ms is None else latency_ms / 1000
        self.delay_s = delay_ms / 1000
        self.console = console
        self.card = common.SoundCard(common.SPEAKER, wanted, console.complain)
        self.dropouts = 0  # of the outputs that are closed

    def open(self, audio: AudioFormat, sync: Sync | None) -> SpeakerOutput:
        """Open the card at the sound's own rate, or at its own where it does not do that.

        An output that there was is at its end.
        """
        if self.delay_s and sync is None:
            self.console.complain("--delay does nothing: the server is without --sync")
        if self.latency_s is not None and sync is not None:
            self.console.complain("--latency does nothing: the server's --sync says when to play")
        own = self.card.device.own_format
        try:
            return SpeakerOutput(self, audio, AudioFormat(audio.rate, own.channels), sync)
        except AudioUnavailable:
            if own.rate == audio.rate:
                raise
            return SpeakerOutput(self, audio, own, sync)


class SpeakerOutput:
    """Plays through a sound card; PortAudio asks for each block when it needs it."""

    def __init__(
        self, speaker: Speaker, audio: AudioFormat, card_format: AudioFormat, sync: Sync | None
    ) -> None:
        if sync is None:
            self._playout = Playout(audio, card_format, speaker.latency_s)
        else:
            step = InStep(sync, audio, card_format.rate, speaker.delay_s)
            self._playout = SyncedPlayout(audio, card_format, step)
        self._speaker = speaker
        self._dropouts_before = speaker.dropouts
        self._advice = StepAdvice(speaker.console)
        self._exchanged = threading.Condition()  # guards the playout; tells of each write and read
        wait_s = speaker.latency_s if sync is None else sync.after_s + speaker.delay_s
        block_ms, longest_ms = find_blocks_ms(wait_s)
        speaker.card.open(common.StreamSettings(card_format, block_ms, self._exchange, longest_ms))

    def _exchange(self, _samples: bytes | None, info: common.BlockInfo) -> bytes:
        """Return the next frames; PortAudio's thread calls this.

        Where they are not there, it waits a moment: what holds up all of the machine has the
        sound card ask for several blocks at once, often just before the sound comes that was
        held up as well.
        """
        now_s = common.clock_s()
        with self._exchanged:
            if info.lost_s:
                self._playout.restart()  # with a card that is back
            self._exchanged.wait_for(lambda: not self._playout.lacks(info.frames), CALLBACK_WAIT_S)
            played = self._playout.read(info.frames, now_s, info.away_s, info.is_after_gap)
            self._exchanged.notify()
        return played

    def resume(self, sync: Sync | None) -> None:
        """Continue with another connection's sound, which is to be played as that before."""
        if isinstance(self._playout, SyncedPlayout) and sync is not None:
            with self._exchanged:
                self._playout.step.begin(sync)

    def write(self, samples: bytes, gap_frames: int, captured_s: float) -> None:
        """Hand over to be played."""
        now_s = common.clock_s()
        with self._exchanged:
            self._playout.write(samples, gap_frames, now_s, captured_s)
            self._exchanged.notify()
        if isinstance(self._playout, SyncedPlayout):
            self._advice.give(self._playout, now_s)

    def drain(self) -> None:
        """Play what is left, down to the last sample in the sound card's own buffer; blocks."""
        playout = self._playout
        due_s = playout.step.after_s if isinstance(playout, SyncedPlayout) else 0.0
        with self._exchanged:
            playout.drain()
            limit_s = DRAIN_LIMIT_S + max(playout.fill_frames / playout.audio.rate, due_s)
            self._exchanged.wait_for(lambda: not playout.fill_frames, limit_s)
        common.INTERRUPTS.wait(CARD_BUFFER_S)

    def close(self) -> None:
        """Leave the card, which the `Speaker` has, and the dropouts so far to another output."""
        self._speaker.dropouts = self._dropouts()

    def _dropouts(self) -> int:
        return self._dropouts_before + self._playout.dropouts

    def status(self) -> str:
        """Return how the playing goes, and the dropouts so far. For any thread."""
        return f"{self._playout.describe()}  {counted(self._dropouts(), 'dropout')}"

    def summary(self) -> str:
        """Return the dropouts so far, and how far the server's clock is from the sound card's."""
        told, loop = counted(self._dropouts(), "dropout"), self._playout.loop
        if loop.knows_clocks:
            told += f", the server's clock {loop.clock_offset * 1e6:+.0f} ppm"
        return told


def find_blocks_ms(wait_s: float | None) -> tuple[float, float]:
    """Return how much sound a card gets at once, at first and at most.

    `wait_s` is for how long sound waits until it is played, None where that is to be short.
    """
    if wait_s is None:
        return BLOCK_MS, LONGEST_BLOCK_MS
    block_ms = min(max(wait_s * 1000 / BLOCKS_OF_WAIT, BLOCK_MS), LONGEST_BLOCK_MS)
    return block_ms, block_ms


class StepAdvice:
    """Tells the user once what keeps this player from being in step with all others."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_told_of_card = self._has_told_of_need = False
        self._dropouts = 0
        self._played_s = math.inf  # when last

    def give(self, playout: SyncedPlayout, now_s: float) -> None:
        """Tell what is new since the last call, at `now_s`."""
        if playout.step.leaving.is_untold and not self._has_told_of_card:
            self._has_told_of_card = True
            self._console.complain(
                "the sound card does not tell when it plays: its delay is taken as constant, "
                "and --delay MS can make up for it"
            )
        if self._fails(playout, now_s) and not self._has_told_of_need:
            self._tell_need(playout.step)

    def _fails(self, playout: SyncedPlayout, now_s: float) -> bool:
        """Return whether sound came too late since the last call, or does so all the time."""
        before, self._dropouts = self._dropouts, playout.dropouts
        if playout.is_playing or self._played_s == math.inf:
            self._played_s = now_s
        return self._dropouts > before or now_s - self._played_s > JOINING_S

    def _tell_need(self, step: InStep) -> None:
        needed_s = step.needed_s
        if needed_s > step.after_s:
            self._has_told_of_need = True
            # And some more: it is the worst of a few seconds, and larger blocks need a little more.
            sync_ms = math.ceil((needed_s - step.delay_s) * 100 + 1) * 10
            self._console.complain(
                f"this player cannot keep {step.after_s * 1000:.0f} ms, as its network and sound "
                f"card need {needed_s * 1000:.0f}: --sync {sync_ms} on the server would do"
            )


# --- sound: recordings ----------------------------------------------------------------------

RECORDING_QUEUE_BYTES = 32 * 1024 * 1024  # three minutes of 48 kHz mono
# What a block takes besides its samples: one may have none.
BLOCK_BYTES = 256
RECORDING_CLOSE_S = 10.0
MAX_RECORDINGS = 1_000  # of one name: the parts of a server's sound that changes its format
WAV_LIMIT_BYTES = 2**32 - 1
WAV_HEADER = struct.Struct("<4sI8sIHHIIHH4sI")
# What FFmpeg calls so many channels, as FLAC and Opus have them.
LAYOUTS = dict(enumerate(("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1"), 1))
# FFmpeg's encoder mixes up the middle and the sides of five, and of seven (5.1, 8.1 at least).
OPUS_LAYOUTS = {count: LAYOUTS[count] for count in (1, 2, 3, 4, 6, 8)}

Made = TypeVar("Made")


class RecordingOutput:
    """Writes every frame as it was captured, from a thread of its own; gaps become silence.

    A slow disk or reader is waited for, after ``RECORDING_QUEUE_BYTES`` have gathered. Ctrl+C
    may come at any moment in the thread that hands over the sound: it cannot break a
    SimpleQueue, but it can a Queue.
    """

    def __init__(self, writer: Writer, audio: AudioFormat) -> None:
        self._writer = writer
        self._audio = audio
        self._blocks: queue.SimpleQueue[tuple[bytes, int] | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[int] = queue.SimpleQueue()  # bytes of each block that was
        self._waiting_bytes = 0
        self._writes = 0  # so far, each of a second at most
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()

    def write(self, samples: bytes, gap_frames: int, _captured_s: float = 0.0, /) -> None:
        """Queue `samples`; blocks while too much waits. Raises what writing earlier ones did."""
        if self._error:
            raise self._error
        while self._waiting_bytes > RECORDING_QUEUE_BYTES or not self._written.empty():
            self._waiting_bytes -= self._written.get()
        self._blocks.put((samples, gap_frames))
        self._waiting_bytes += BLOCK_BYTES + len(samples)

    def _run(self) -> None:
        while (block := self._blocks.get()) is not None:
            try:
                if not self._error:
                    self._write(*block)
            except Exception as error:  # noqa: BLE001  (`write` raises it, or `close`)
                self._error = error
            finally:
                self._written.put(BLOCK_BYTES + len(block[0]))

    def _write(self, samples: bytes, gap_frames: int) -> None:
        while gap_frames > 0:
            frames = min(gap_frames, self._audio.rate)
            self._writer.write(bytes(frames * self._audio.frame_bytes))
            self._writes += 1
            gap_frames -= frames
        self._writer.write(samples)
        self._writes += 1

    def close(self) -> None:
        """Write what is queued, and finish the file. Raises SocketPairError.

        Blocks for as long as some of it is written every ``RECORDING_CLOSE_S``.
        """
        self._blocks.put(None)
        before = -1
        while self._thread.is_alive() and self._writes > before:
            before = self._writes
            self._thread.join(RECORDING_CLOSE_S)
        if self._thread.is_alive():  # the reader of a pipe has stopped to read, say
            raise SocketPairError("the last of the sound could not be written")
        try:
            self._writer.close()
        finally:
            if self._error:
                raise self._error


class RecordingFiles:
    """Files that sound is recorded into, as a `Destination`: the first as it was named.

    A file that is there already stays: ``talk.wav`` becomes ``talk (1).wav``. So do the next
    files, when one is full, or the server came back with another format or --sync. The constructor
    raises SocketPairError where there can be no such file, or its package is missing.
    """

    def __init__(self, path: str, console: Console) -> None:
        self._path = os.path.expanduser(path)
        self._console = console
        if os.path.isdir(self._path):
            raise SocketPairError(f"cannot record into {escape(path)}: it is a folder")
        if not os.path.isdir(os.path.dirname(self._path) or "."):
            raise SocketPairError(f"cannot record into {escape(path)}: there is no such folder")
        if (ending := ending_of(path)) != ".wav":
            check_av(ending)
        self._writer = WRITERS[ending]

    def open(self, audio: AudioFormat, _sync: Sync | None = None, /) -> RecordingOutput:
        """Return an output into the next file."""
        return RecordingOutput(self._writer(self, audio), audio)

    @contextlib.contextmanager
    def create(self) -> Iterator[BinaryIO]:
        """Give the next file, to write its beginning; it gets its name then, on Windows before.

        So no kill leaves an empty one. Where it fails, there is no file. Raises SocketPairError.
        """
        has_name = sys.platform == "win32"
        hidden = os.path.join(os.path.dirname(self._path), f".recording-{os.urandom(6).hex()}")
        with told_as_recording():
            file = self._next(open_new) if has_name else open_new(hidden)
            try:
                yield file
                file.flush()
                path = file.name if has_name else self._next(lambda path: move(file.name, path))
            except BaseException:
                with contextlib.suppress(OSError):
                    file.close()
                os.unlink(file.name)
                raise
        self._console.say(f"Recording into {escape(path)}")

    def _next(self, make: Callable[[str], Made]) -> Made:
        """Return what `make` makes of the next path for which it does not raise FileExistsError."""
        stem, ending = os.path.splitext(self._path)
        for number in range(MAX_RECORDINGS):
            with contextlib.suppress(FileExistsError):
                return make(f"{stem} ({number}){ending}" if number else self._path)
        shown = escape(self._path)
        raise SocketPairError(f"there are {MAX_RECORDINGS:,} recordings {shown}: give another name")


def open_new(path: str) -> BinaryIO:
    """Make a file; raises FileExistsError if there is one."""
    return open(path, "xb")


def move(path: str, target: str) -> str:
    """Move a file to `target`, which is returned; raises FileExistsError if that is taken."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if os.path.lexists(target):
            raise FileExistsError from None
        os.rename(path, target)
    else:
        os.unlink(path)
    return target


@contextlib.contextmanager
def told_as_recording(kind: type[Exception] = OSError) -> Iterator[None]:
    """Raise an OSError, or an error of this `kind`, as the SocketPairError that its user reads."""
    try:
        yield
    except (OSError, kind) as error:
        raise SocketPairError(f"cannot record: {describe_error(error)}") from error


class WavWriter:
    """Writes a WAV file that is valid after every write, and the next where one is full.

    Every method of a `Writer` raises SocketPairError where it cannot write.
    """

    def __init__(self, files: RecordingFiles, audio: AudioFormat) -> None:
        self._files = files
        self._audio = audio
        # The sizes in a WAV file have 32 bits.
        self._most_frames = (WAV_LIMIT_BYTES - WAV_HEADER.size) // audio.frame_bytes
        self._open_next()

    def _open_next(self) -> None:
        self._frames = 0
        with self._files.create() as self._file:
            self._file.write(self._header())

    def _header(self) -> bytes:
        rate, channels = self._audio
        frame_bytes = self._audio.frame_bytes
        size = self._frames * frame_bytes
        sound = (1, channels, rate, rate * frame_bytes, frame_bytes, 8 * common.SAMPLE_BYTES)
        riff_size = size + WAV_HEADER.size - 8
        return WAV_HEADER.pack(b"RIFF", riff_size, b"WAVEfmt ", 16, *sound, b"data", size)

    def write(self, samples: bytes) -> None:
        """Write all of `samples`, and only then count them in the header."""
        while samples:
            if self._frames == self._most_frames:
                self.close()
                self._open_next()
            part = samples[: (self._most_frames - self._frames) * self._audio.frame_bytes]
            samples = samples[len(part) :]
            with told_as_recording():
                self._file.write(part)
                self._frames += self._audio.frames_of(part)
                self._file.seek(0)
                self._file.write(self._header())
                self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file; it is complete."""
        with told_as_recording():
            self._file.close()


class EncodedWriter:
    """Writes FLAC or Opus by package ``av``, valid up to the last second at any moment."""

    container: str
    codec: str
    options: Mapping[str, str] = {"flush_packets": "1"}
    rate = 0  # the sound's own
    bits_per_s = 0  # lossless; else that of mono, and half of it for each more
    layouts: Mapping[int, str] = LAYOUTS

    def __init__(self, files: RecordingFiles, audio: AudioFormat) -> None:
        import av  # noqa: PLC0415  (only such recordings need it)

        if audio.channels not in self.layouts:
            raise SocketPairError(f"{self.container} cannot hold {audio.describe()}: record .wav")
        self._av = av
        self._audio = audio
        self._layout = self.layouts[audio.channels]
        with told_as_recording(av.error.FFmpegError), files.create() as self._file:
            options = dict(self.options)
            self._container = av.open(self._file, "w", format=self.container, options=options)
            self._stream: Any = self._container.add_stream(
                self.codec,
                self.rate or audio.rate,
                layout=self._layout,
                bit_rate=self.bits_per_s * (1 + audio.channels) // 2,
            )
            self._container.start_encoding()

    def write(self, samples: bytes) -> None:
        """Encode `samples`; what is complete of it is written."""
        if samples:
            frame = self._av.AudioFrame("s16", self._layout, self._audio.frames_of(samples))
            frame.planes[0].update(samples)
            frame.sample_rate, frame.pts = self._audio.rate, None
            self._encode(frame)

    def _encode(self, frame: Any) -> None:
        with told_as_recording(self._av.error.FFmpegError):
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
            self._file.flush()

    def close(self) -> None:
        """Write what is left, and how much there is in all."""
        with told_as_recording(self._av.error.FFmpegError), self._file:
            self._encode(None)
            self._container.close()


class FlacWriter(EncodedWriter):
    """Writes FLAC: every sample, in about half of the room."""

    container = codec = "flac"


class OpusWriter(EncodedWriter):
    """Writes Opus, in a tenth of the room; at 48,000 Hz, which all else is converted to."""

    container, codec = "opus", "libopus"
    options: Mapping[str, str] = {"flush_packets": "1", "page_duration": "500000"}
    rate = common.OPUS_RATE
    bits_per_s = 64_000
    layouts = OPUS_LAYOUTS


WRITERS: Mapping[str, Callable[[RecordingFiles, AudioFormat], Writer]] = {
    ".wav": WavWriter,
    ".flac": FlacWriter,
    ".opus": OpusWriter,
}


def ending_of(path: str) -> str:
    """Return the ending of a file's name, which tells its kind, in lower case."""
    return os.path.splitext(path)[1].lower()


def check_av(what: str) -> None:
    """Raise SocketPairError without package ``av``, which `what` needs."""
    try:
        import av  # noqa: PLC0415  (nothing else needs it)

        av.codec.Codec("flac" if what == ".flac" else "libopus", "w")
    except common.LOAD_ERRORS:  # ValueError: an FFmpeg that was built without
        advice = common.how_to_install("av")
        raise SocketPairError(f"{what} needs the package av: {advice}") from None


class Pipe:
    """Standard output, as a `Destination`, and as a `Writer` of raw samples.

    The constructor raises SocketPairError where it takes no sound.
    """

    def __init__(self) -> None:
        if sys.__stdout__ is None:
            raise SocketPairError("cannot write to standard output: it is closed")
        if sys.stdout.isatty():
            raise SocketPairError(
                "--output - is for another program or a file, not for a terminal: add | or >"
            )
        self._has_sound = False

    def open(self, audio: AudioFormat, _sync: Sync | None = None, /) -> RecordingOutput:
        """Return the output, the one and only: nothing in a pipe would tell of another format."""
        if self._has_sound:
            raise SocketPairError(
                f"the server's sound is now {audio.describe()}, which ends it here"
            )
        self._has_sound = True
        return RecordingOutput(self, audio)

    def write(self, samples: bytes) -> None:
        """Write all of `samples`; blocks until the reader has taken them.

        Raises ReaderGone, SocketPairError.
        """
        view = memoryview(samples)
        try:
            while view:
                view = view[os.write(sys.stdout.fileno(), view) :]
        except BrokenPipeError as error:
            raise ReaderGone("standard output was closed") from error
        except OSError as error:
            reason = describe_error(error)
            raise SocketPairError(f"cannot write to standard output: {reason}") from error

    def close(self) -> None:
        """Leave standard output open, as whoever opened it closes it."""


Writer = WavWriter | EncodedWriter | Pipe
Output = SpeakerOutput | RecordingOutput  # takes received sound of one format
Destination = Speaker | RecordingFiles | Pipe  # found to be there before a server is


def find_destinations(
    args: argparse.Namespace, console: Console, closing: contextlib.ExitStack
) -> Iterator[Destination]:
    """Give where ``--output`` and ``--record`` want the sound; `closing` releases what is held.

    Raises SocketPairError where one cannot be had; a recording does without a loudspeaker.
    """
    if args.output == STDOUT:
        yield Pipe()
    elif args.output is not None and ending_of(args.output) in WRITERS:
        yield RecordingFiles(args.output, console)
    else:
        try:
            speaker = Speaker(args.output, args.latency, args.delay, console)
            closing.callback(speaker.card.close)
            yield speaker
        except AudioUnavailable as error:
            told = str(error)
            if args.output and ending_of(args.output):  # a file is meant, most likely
                told += f"; of files, only {', '.join(WRITERS)} are written"
            if args.record is None:
                raise AudioUnavailable(told) from error
            console.complain(f"{told}; recording without playing")
    if args.record is not None:
        yield RecordingFiles(args.record, console)


# --- sound: Opus ----------------------------------------------------------------------------

OPUS_HEAD = struct.Struct("<8sBBHIhB")  # RFC 7845, 5.1
# Of a decoder that begins in the middle, what is still wrong (RFC 7845, 4.6: pre-roll).
OPUS_PREROLL_PACKETS = 8


class OpusDecoder:
    """Gives what comes as Opus as PCM. Needs package ``av``.

    What is lost on the way is a gap between blocks, as it is in PCM.
    """

    def __init__(self, audio: AudioFormat) -> None:
        self._audio = audio
        self._unsettled_packets = OPUS_PREROLL_PACKETS
        self._begin()

    def _begin(self) -> None:
        import av  # noqa: PLC0415  (nothing else that comes needs it)

        self._av = av
        rate, channels = self._audio
        self._decoder = av.CodecContext.create("libopus", "r")
        self._decoder.sample_rate = rate
        self._decoder.layout = common.describe_channels(channels)
        self._decoder.extradata = OPUS_HEAD.pack(b"OpusHead", 1, channels, 0, rate, 0, 0)

    def decode(self, content: bytes) -> common.Heard | None:
        """Do what `common.decode_sound` does; raises ProtocolError where it is not Opus.

        None for the first packets of a decoder that begins in the middle.
        """
        received = common.decode_opus(content, self._audio)
        if not isinstance(received, common.OpusBlock):
            return received
        block = self.decode_block(received)
        if not self._unsettled_packets:
            return block
        self._unsettled_packets -= 1
        return None

    def decode_block(self, block: common.OpusBlock) -> AudioBlock:
        """Return the same part of the sound as PCM."""
        if block.skipped:
            self._begin()
            self._unsettled_packets = 0
        frame_bytes = self._audio.frame_bytes
        samples = self._decode(block.packet)[block.skipped * frame_bytes :]
        if len(samples) < block.frames * frame_bytes:
            raise ProtocolError("received a packet of Opus with too little sound")
        samples = samples[: block.frames * frame_bytes]
        return AudioBlock(block.first_frame, block.captured_ns, samples)

    def _decode(self, packet: bytes) -> bytes:
        try:
            frames = self._decoder.decode(self._av.Packet(packet))
        except self._av.error.FFmpegError as error:
            raise ProtocolError("received a packet that is not Opus") from error
        return b"".join(
            bytes(frame.planes[0])[: frame.samples * self._audio.frame_bytes] for frame in frames
        )


# --- sound: listening -----------------------------------------------------------------------

# Something comes every SIGN_INTERVAL_S: after so long without anything the server is gone.
AUDIO_TIMEOUT_S = 4.0
FOREVER_S = 1e9
NEGLIGIBLE_S = 0.05  # of --seconds
RECONNECT_WAIT_S = 0.5
# While a cable is out an attempt goes nowhere: let there soon be another.
RECONNECT_TIMEOUT_S = 1.5
# Refusals of which those who were listening before wait for the end, and how often they try.
TEMPORARY = (common.WAIT, common.BUSY)
REFUSED_WAIT_S = 3.0
# How fast a server's sound may come, by this machine's clock, and how far ahead of it.
MAX_SPEED = 1.05
MAX_AHEAD_S = 5.0
# How much longer --seconds may take, say as a machine is busy, than the clock says.
MAX_BEHIND_S = 60.0


class Numbering:
    """Follows the numbers of the server's sample frames, also over lost connections."""

    def __init__(self) -> None:
        self._stream = ""
        self._next_frame: int | None = None

    def begin(self, stream: str) -> None:
        """Follow the server's `stream`; another than before is counted from its first block."""
        if stream != self._stream:
            self._stream, self._next_frame = stream, None

    def advance(self, block: AudioBlock, audio: AudioFormat) -> int:
        """Return how many sample frames were missed before `block`, and go behind it.

        Without samples it tells of none. Raises ProtocolError where the numbers go back.
        """
        if not block.samples:
            return 0
        expected = block.first_frame if self._next_frame is None else self._next_frame
        gap_frames = block.first_frame - expected
        if gap_frames < 0:
            raise ProtocolError("received sound that was sent before")
        self._next_frame = block.first_frame + audio.frames_of(block.samples)
        return gap_frames


class Listening:
    """One run of the client: connects, receives, and comes back, until it is to end."""

    def __init__(
        self,
        address: Address,
        destinations: Sequence[Destination],
        seconds: float | None,
        console: Console,
        opus_kbit: int | None = None,
    ) -> None:
        self._address = address
        self._hello = Hello(common.PROTOCOL, "audio", opus_kbit)
        self._destinations = destinations
        self.outputs: list[Output] = []
        self.heard_s = 0.0  # received, with its gaps
        self._missed_s = 0.0  # those
        self._seconds = FOREVER_S if seconds is None else seconds
        self._deadline = self._last_deadline = Deadline(self._seconds)
        self._console = console
        self._numbering = Numbering()
        self._began_s = time.monotonic()
        # The format of the outputs, and how late they play.
        self._wanted: tuple[AudioFormat, float | None] | None = None
        self._latest_samples = b""
        self._meter = common.LevelMeter()
        # Whether the server was busy, or gone, each told once before sound is heard again.
        self._problems_told: set[bool] = set()
        self.is_cut_short = False  # as the server was lost, and did not come back in time

    def run(self) -> None:
        """Listen until the sound or ``--seconds`` end; comes back to a server that was lost.

        Raises SocketPairError where that would not help.
        """
        while True:
            timeout_s = HANDSHAKE_TIMEOUT_S if self._wanted is None else RECONNECT_TIMEOUT_S
            try:
                connection, welcome = connect(self._address, self._hello, self._console, timeout_s)
                with connection:
                    self._listen(connection, welcome)
                return
            except ConnectionLost as error:
                self._wait_for_server(error, RECONNECT_WAIT_S)
            except PeerRefused as error:
                if self._wanted is None or error.kind not in TEMPORARY:
                    raise
                self._wait_for_server(error, REFUSED_WAIT_S)
            if not self._deadline.remaining():
                break
        if self._wanted is None:
            raise SocketPairError("no server was found in the time given")
        self.is_cut_short = self._seconds - self.heard_s > NEGLIGIBLE_S

    def _wait_for_server(self, error: ConnectionLost | PeerRefused, wait_s: float) -> None:
        """Say once that there is no server, or that it is busy, and leave it time to come back."""
        if self._wanted is None and isinstance(error.__cause__, NO_SUCH_HOST):
            raise SocketPairError(str(error)) from None
        self._latest_samples = b""
        self._meter.hear(b"")
        is_busy = isinstance(error, PeerRefused)
        if is_busy not in self._problems_told:
            self._console.complain(f"{error} - looking for it until Ctrl+C")
            self._problems_told.add(is_busy)
        common.INTERRUPTS.wait(min(wait_s, self._deadline.remaining()))

    def _listen(self, connection: Connection, welcome: Welcome) -> None:
        """Pass on the sound of one connection; returns when it has ended, or is enough."""
        if (sound := welcome.sound) is None:
            raise ProtocolError(f"{connection.peer} has no sound")
        if sound.opus_kbit != self._hello.opus_kbit:
            raise ProtocolError(f"{connection.peer} does not send the sound as it was asked to")
        sync = None
        if sound.sync_ms is not None and any(isinstance(to, Speaker) for to in self._destinations):
            sync = Sync(ServerClock(), sound.sync_ms / 1000)
        self._numbering.begin(sound.stream)
        if self._wanted is None:
            self._deadline = Deadline(self._seconds)  # however long all that took
            self._last_deadline = Deadline(self._seconds + MAX_BEHIND_S)
        self._open_outputs(sound.audio, sync)
        self._problems_told.clear()
        what = sound.audio.describe()
        what += f", Opus at {sound.opus_kbit} kbit/s" if sound.opus_kbit else ""
        what += f", in step {sound.sync_ms} ms after the microphone" if sync else ""
        self._console.say(f"Listening to {connection.peer}, {what} - Ctrl+C to stop")
        self._receive(connection, sound, sync)

    def _receive(self, connection: Connection, sound: common.Sound, sync: Sync | None) -> None:
        audio = sound.audio
        decode: Callable[[bytes], common.Heard | None]
        decode = functools.partial(common.decode_sound, audio=audio)
        if sound.opus_kbit is not None:
            decode = OpusDecoder(audio).decode
        while not self._is_enough(audio):
            if sync and sync.clock.wants_request(common.clock_s()):
                connection.send(common.TimeRequest(common.clock_ns()))
            with connection.limit(AUDIO_TIMEOUT_S):
                received = decode(connection.read_frame(audio.max_block_bytes))
            if isinstance(received, AudioBlock):
                self._pass_on(received, audio)
            elif isinstance(received, common.TimeReply) and sync:
                sync.clock.take(bound_offset(received, common.clock_ns()))
            elif isinstance(received, common.StreamEnd):
                self._console.say(f"The sound has ended: {received.reason}")
                return

    def _open_outputs(self, audio: AudioFormat, sync: Sync | None) -> None:
        """Have outputs for this format, as late as this; those for another are closed first."""
        before, self._wanted = self._wanted, (audio, sync.after_s if sync else None)
        if self._wanted == before:
            for speaker in self.speakers():
                speaker.resume(sync)
            return
        outputs, self.outputs = self.outputs, []
        close_all(outputs)
        for destination in self._destinations:
            try:
                self.outputs.append(destination.open(audio, sync))
            except AudioUnavailable as error:
                if len(self._destinations) == 1:
                    raise
                self._console.complain(f"{error}; recording without playing")

    def _is_enough(self, audio: AudioFormat) -> bool:
        """Return whether ``--seconds`` have been heard, or have gone by, in silence at first."""
        deadline = self._last_deadline if self._latest_samples else self._deadline
        return not deadline.remaining() or not self._wanted_frames(audio)

    def _wanted_frames(self, audio: AudioFormat) -> int:
        """Return how much is left of ``--seconds``."""
        return max(0, round((self._seconds - self.heard_s) * audio.rate))

    def _pass_on(self, block: AudioBlock, audio: AudioFormat) -> None:
        """Give a block to the outputs, up to the last frame that is wanted.

        Raises ProtocolError where no server can have captured so much.
        """
        wanted_frames = self._wanted_frames(audio)
        most_s = (time.monotonic() - self._began_s) * MAX_SPEED + MAX_AHEAD_S
        left_s = most_s - self.heard_s - audio.frames_of(block.samples) / audio.rate
        if left_s < 0:
            raise ProtocolError("received more sound than there can have been")
        gap_frames = min(self._numbering.advance(block, audio), wanted_frames)
        # Some is left for what comes behind a gap.
        gap_frames = min(gap_frames, max(0, round((left_s - MAX_AHEAD_S / 2) * audio.rate)))
        samples = block.samples[: (wanted_frames - gap_frames) * audio.frame_bytes]
        self._missed_s += gap_frames / audio.rate
        self.heard_s += (gap_frames + audio.frames_of(samples)) / audio.rate
        for output in self.outputs:
            output.write(samples, gap_frames, block.captured_ns / 1e9)
        self._latest_samples = samples
        self._meter.hear(samples)

    def show_status(self) -> None:
        """Keep the status line up to date: the whole life of a thread."""
        while True:
            parts = [speaker.status() for speaker in self.speakers()]
            parts += [*self._tell_missed(), common.format_duration(self.heard_s)]
            self._console.show_loudness(self._meter, "  ".join(parts))
            time.sleep(common.STATUS_INTERVAL_S)

    def summarize(self) -> str:
        """Return what has been heard, in a line."""
        heard = f"heard {common.format_tenths(self.heard_s)}"
        if self._seconds != FOREVER_S and self._seconds - self.heard_s > NEGLIGIBLE_S:
            heard += f" of {common.format_tenths(self._seconds)}"
        played = [speaker.summary() for speaker in self.speakers()]
        return ", ".join([heard, *played, *self._tell_missed()])

    def speakers(self) -> list[SpeakerOutput]:
        """Return those of the outputs that play: one, or none."""
        return [output for output in self.outputs if isinstance(output, SpeakerOutput)]

    def _tell_missed(self) -> list[str]:
        return [f"missed {self._missed_s * 1000:.0f} ms"] if self._missed_s else []


def close_all(outputs: Sequence[Output]) -> None:
    """Close all of `outputs`, also where one fails. Raises SocketPairError."""
    with contextlib.ExitStack() as closing:
        for output in outputs:
            closing.callback(close_output, output)


def close_output(output: Output) -> None:
    """Close `output`; raises SocketPairError, but not where only its reader has gone.

    That would stand in place of what has failed before, and is no failure.
    """
    with contextlib.suppress(ReaderGone):
        output.close()


def start_audio_client(address: Address, args: argparse.Namespace) -> int:
    """Play or record a server's sound until it ends, ``--seconds`` are over, or Ctrl+C.

    Blocks until then; a server that is not there is waited for. `args` are the command line's.
    Returns the exit status, and has told the user whatever went wrong.
    """
    console = Console(args.quiet, data_on_stdout=args.output == STDOUT)
    try:
        with contextlib.suppress(ReaderGone), contextlib.ExitStack() as closing:
            closing.callback(console.end_status)
            if args.opus is not None:
                check_av("--opus")
            destinations = list(find_destinations(args, console, closing))
            listening = Listening(address, destinations, args.seconds, console, args.opus)
            closing.callback(lambda: close_all(listening.outputs))
            if console.has_status:
                threading.Thread(target=listening.show_status, name="status", daemon=True).start()
            try:
                listening.run()
                for speaker in listening.speakers():
                    speaker.drain()
            except KeyboardInterrupt:  # the usual way to stop
                if not listening.heard_s:
                    raise
    except SocketPairError as error:
        console.complain(str(error))
        return EXIT_FAILED
    console.say(listening.summarize())
    return EXIT_FAILED if listening.is_cut_short else EXIT_OK


# --- finding a server -----------------------------------------------------------------------

# Servers answer within some tenths of a second, and a lost question is asked again after one.
FIND_S = 2.0
# Of all that anyone may announce; so many are asked at once, and have so long to answer.
MAX_ANNOUNCED = 5_000
ASKED_AT_ONCE = 200
ASK_S = 1.0
MAX_SHOWN = 50
MAX_SHOWN_CHARS = 40
FOUND_ACCESS = {
    common.CODE_WANTED: "pairing code",
    common.NO_CODE: "needs --open",
    common.BUSY: "is busy",
}


class FoundServer(NamedTuple):
    """A server that was announced, and the address that leads to it from here.

    `answer` is the kind of its own answer, empty if there was none: anyone can announce anything.
    """

    announced: common.Announced
    host: str
    port: int
    answer: str = ""

    def describe(self) -> str:
        """Return a line of a table; the name, which may be of any width, is last."""
        name, mode, _ = self.announced
        access = FOUND_ACCESS.get(self.answer, "does not answer")
        address = escape(common.format_address(self.host, self.port))
        return f"{mode:<5}  {address:<21}  {access:<15}  {escape(name)[:MAX_SHOWN_CHARS]}"


def find_servers(mode: str | None) -> list[FoundServer]:
    """Return the servers on the local network, those in `mode` if it is given.

    Those that answer come first, then the first of each host, then by name. Blocks for ``FIND_S``,
    and for their answers. Raises SocketPairError if there is no way to ask.
    """
    services, own = browse(), common.own_interfaces()
    announced = {look_at_announcement(service, own) for service in services}
    found = [each for each in announced if each and mode in (None, each.announced.mode)]
    answers = ask_servers(list({(each.host, each.port) for each in found}))
    asked = [each._replace(answer=answers.get((each.host, each.port), "")) for each in found]
    by_name = sorted(asked, key=lambda each: (not each.answer, each.announced.name, each))
    of_host: Counter[str] = Counter()

    def order(server: FoundServer) -> tuple[bool, int]:
        of_host[server.host] += 1  # one host alone cannot fill what is shown
        return not server.answer, of_host[server.host]

    return sorted(by_name, key=order)


def look_at_announcement(
    service: ServiceInfo, own: Sequence[IPv4Interface | IPv6Interface]
) -> FoundServer | None:
    """Return the server that is announced, if it can be one on a network of `own` addresses."""
    try:
        announced = common.Announced.from_txt(service.properties)
        host = nearest(service.parsed_scoped_addresses(), own)
    except (ValueError, AttributeError):  # it holds what no server sends
        return None
    if not (announced.name and announced.mode in common.MODES and host and service.port):
        return None
    return FoundServer(announced, host, service.port)


def browse() -> list[ServiceInfo]:
    """Return all that is announced on the local network as Socket Pair; see `find_servers`.

    A name may come with several addresses, one after the other: none of them hides another.
    """
    try:
        import zeroconf  # noqa: PLC0415  (only this needs it, and it takes long to import)
    except common.LOAD_ERRORS as error:
        raise SocketPairError(
            f"--find needs the package zeroconf, which cannot be loaded "
            f"({common.first_line(error)}): {common.how_to_install('zeroconf')}, or use --host"
        ) from None
    services: queue.SimpleQueue[ServiceInfo] = queue.SimpleQueue()

    def note(service_type: str, name: str, **_: object) -> None:
        # Servers tell all of themselves at once. What has not come with the name is not asked
        # for: anyone can announce names that nobody answers for.
        with contextlib.suppress(Exception):  # of a name that none should be
            service = zeroconf.ServiceInfo(service_type, name)
            if services.qsize() < MAX_ANNOUNCED and service.load_from_cache(network):
                services.put(service)

    try:
        with contextlib.closing(common.open_network()) as network:
            zeroconf.ServiceBrowser(network, common.SERVICE_TYPE, handlers=[note])
            common.INTERRUPTS.wait(FIND_S)
            return [services.get() for _ in range(services.qsize())]
    except Exception as error:  # zeroconf raises many that are no kin
        reason = escape(describe_error(error))
        raise SocketPairError(f"cannot ask the local network: {reason}") from error


def ask_servers(addresses: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Return the kinds of the answers of those servers that answer; blocks for a second or more."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  (see browse)

    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        answers = zip(addresses, threads.map(ask_server, addresses), strict=True)
        return {address: kind for address, kind in answers if kind}


def ask_server(address: tuple[str, int]) -> str:
    """Return the kind of what a server answers, empty for none; blocks for ``ASK_S`` at most."""
    deadline = Deadline(ASK_S)
    try:
        sock = socket.create_connection(address, timeout=ASK_S)
        with Connection(sock, "") as connection, connection.limit(deadline.remaining()):
            connection.send(Hello(common.PROTOCOL, common.FINDING))
            connection.receive(Welcome, max_bytes=common.MAX_HELLO_BYTES)
    except PeerRefused as error:
        return error.kind
    except (OSError, SocketPairError):
        pass
    return ""


def nearest(addresses: Iterable[str], own: Sequence[IPv4Interface | IPv6Interface]) -> str | None:
    """Return the one of a server's addresses that most likely leads to it from here, if any.

    It is on a network of `own`, this machine's addresses. One that is also in `own` comes last:
    there are addresses that every machine has for its own virtual networks.
    """
    import ipaddress  # noqa: PLC0415  (see browse)

    reachable = []
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        is_unclear = ip.is_link_local and ip.version == 6 and "%" not in address
        if not is_unclear and any(ip in interface.network for interface in own):
            is_own = any(ip == interface.ip for interface in own)
            reachable.append((is_own, ip.version, address))
    return min(reachable, key=lambda each: each[:2])[-1] if reachable else None


def pick_server(mode: str | None, console: Console) -> FoundServer:
    """Show the servers on the local network, and return the one that the user picks.

    Blocks until then. Raises SocketPairError where there is none, or no answer.
    """
    while True:
        console.say("Looking for servers on the local network ...")
        servers = find_servers(mode)
        if not servers:
            raise SocketPairError(
                f"no server {f'in {mode} mode ' if mode else ''}announces itself here: start one "
                f"with python3 server.py {mode or 'file'} --host 0.0.0.0, or use --host"
            )
        choices = {str(number): server for number, server in enumerate(servers[:MAX_SHOWN], 1)}
        for number, server in choices.items():
            console.say(f"{number:>3}  {server.describe()}")
        if len(servers) > MAX_SHOWN:
            console.say(f"     and {len(servers) - MAX_SHOWN} more")
        answer = "?"
        numbers = "1" if len(choices) == 1 else f"a number from 1 to {len(choices)}"
        while answer and answer not in choices:
            console.say(f"Type {numbers}, or only Enter to look again.")
            answer = console.ask("Number: ").strip()
        if answer:
            return choices[answer]


# --- connection -----------------------------------------------------------------------------

OPEN_SERVER = (
    "this server takes no pairing code: anyone on the network could be it, or read along; "
    "add --open if you trust them all"
)

NO_SUCH_HOST = (socket.gaierror, ValueError)  # the latter for what cannot be a name
UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
# What a server may say in place of pairing, to follow its address.
REFUSED_PAIRING = {
    common.CODE_WANTED: "is of an older version of Socket Pair: update it",
    common.NO_CODE: "says that it has no pairing code: check that it is the right server",
    common.WAIT: "has had too many wrong pairing codes from this address: try again in a minute",
    common.BUSY: "is busy: try again later",
}


class WrongCode(SocketPairError):
    """The server has another pairing code than this client."""


class Address:
    """Where the server is, and what lets this client in there.

    `code` is the pairing code, normalized; `open` does without, wherever the server is. `asks` says
    that standard input answers questions, also where it is no terminal.
    """

    def __init__(
        self,
        host: str,
        port: int,
        code: str | None = None,
        open: bool = False,
        asks: bool = False,
    ) -> None:
        self.host = host
        self.port = port
        self.code = code
        self.open = open
        self.asks = asks


def ask_for_code(console: Console) -> str:
    """Ask for the pairing code until it can be one."""
    while True:
        try:
            return common.normalize_code(console.ask("Pairing code: "))
        except argparse.ArgumentTypeError as error:
            console.complain(str(error))


def connect(
    address: Address, hello: Hello, console: Console, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> tuple[Connection, Welcome]:
    """Return a connection past its handshake, and the server's welcome.

    Asks for the pairing code where the server wants one that `address` lacks, and there is somebody
    to ask; again, if the answer was wrong. `console` shows no status line meanwhile.
    Otherwise blocks for `timeout_s` for each address of a name, after that was looked up, and for
    10 s for the handshake at most.

    Raises ConnectionLost, ProtocolError where it is no Socket Pair server, WrongCode, PeerRefused,
    and SocketPairError where it does not pair.
    """
    try:
        return connect_once(address, hello, timeout_s)
    except PeerRefused as error:
        is_code_wanted = error.kind == common.CODE_WANTED
        if is_code_wanted and address.open:
            raise PeerRefused(f"{error}, in place of --open") from None
        if not (is_code_wanted and (address.asks or sys.stdin.isatty())):
            raise
    common.require_pairing_packages()
    while True:
        address.code = ask_for_code(console)
        try:
            return connect_once(address, hello, timeout_s)
        except WrongCode as error:
            console.complain(str(error))


def connect_once(address: Address, hello: Hello, timeout_s: float) -> tuple[Connection, Welcome]:
    """Do what `connect` does, with the code of `address` alone."""
    peer = escape(common.format_address(address.host, address.port))
    # As bytes, where it can be: Python loads the codec for international names for any text.
    host = address.host.encode() if address.host.isascii() else address.host
    place: Any = host, address.port
    dial = functools.partial(socket.create_connection, place, timeout_s)
    try:
        sock = common.with_host(address.host, dial)
    except (OSError, *NO_SUCH_HOST) as error:
        raise ConnectionLost(describe_no_server(address, hello.mode, error)) from error
    with contextlib.ExitStack() as opened:
        opened.callback(sock.close)
        try:
            connection = opened.enter_context(Connection(sock, peer))
            is_near = common.is_loopback(sock.getpeername()[0])
            welcome = shake_hands(connection, address.code, hello)
        except OSError as error:  # it has gone again
            raise ConnectionLost(f"{peer}: {describe_error(error)}") from error
        if not (address.code or address.open or is_near):
            raise PeerRefused(OPEN_SERVER)
        opened.pop_all()
    return connection, welcome


def command_line(script: str, *args: str) -> str:
    """Return the line that runs `script`, beside the one that runs, in a shell here."""
    path = os.path.join(os.path.dirname(sys.argv[0]), script)
    return common.shell_line(common.PYTHON, path, *args)


def describe_no_server(address: Address, mode: str, error: OSError | ValueError) -> str:
    """Return what may be the reason that nobody answers, and what to do about it."""
    host = escape(address.host)
    if isinstance(error, NO_SUCH_HOST):
        return f"no machine is known as {host!r} ({describe_error(error)}): check --host"
    is_here = host == "localhost" or common.is_loopback(host)
    peer = f"{common.format_address(host, address.port)} ({describe_error(error)})"
    if isinstance(error, TimeoutError) or error.errno in UNREACHABLE:
        return (
            f"no answer from {peer}: is --host right, are both machines on one network, and does "
            f"a firewall there let port {address.port} through?"
        )
    options = [] if address.port == common.DEFAULT_PORT else ["--port", str(address.port)]
    if is_here:
        command = command_line("server.py", mode, *options)
        return f"no server at {peer}: start one with: {command}"
    command = " ".join(["python3 server.py", mode, "--host 0.0.0.0", *options])
    return f"no server at {peer}: start one there with: {command}"


def shake_hands(connection: Connection, code: str | None, hello: Hello) -> Welcome:
    """Return the server's welcome; blocks and raises as `connect` does."""
    try:
        with connection.limit(HANDSHAKE_TIMEOUT_S):
            if code:
                pair(connection, code)
            connection.send(hello)
            return connection.receive(Welcome)
    except common.NotPaired as error:
        if error.wrong_code:
            problem = f"{connection.peer} has another pairing code: check it there"
            raise WrongCode(problem) from error
        raise SocketPairError(f"{connection.peer} does not pair: {error}") from error
    except ProtocolError as error:
        raise ProtocolError(f"{connection.peer} is not a Socket Pair server: {error}") from None
    except ConnectionLost as error:
        raise ConnectionLost(f"{connection.peer}: {error} before it answered") from None


def pair(connection: Connection, code: str) -> None:
    """Prove to the server that this side has its pairing code, and have it prove the same.

    Until then it may be anyone: what it says of itself is told as that, and no advice follows.
    """
    connection.send(Hello(common.PROTOCOL, common.PAIRING))
    pairing = common.Pairing(code, server_side=False)  # while the server makes its own
    connection.send(Pair(pairing.share))
    try:
        answer = connection.receive(Pair, max_bytes=common.MAX_HELLO_BYTES)
    except PeerRefused as error:
        told = REFUSED_PAIRING.get(error.kind, f'does not pair, and says: "{error}"')
        kind = error.kind if error.kind in TEMPORARY else ""  # so that no code is asked for
        raise PeerRefused(f"{connection.peer} {told}", kind) from None
    connection.start_tls(pairing.finish(answer.share), server_side=False)


# --- command line ---------------------------------------------------------------------------

DEFAULT_RETRY_S = 60.0
MAX_LATENCY_MS = 900
MAX_DELAY_MS = 2_000

EXAMPLES = """examples:
  client.py                               ask for everything
  client.py file report.pdf photos/       send a file and a folder
  tar c src | client.py file - --name src.tar
                                          send what another program makes
  client.py --find                        pick a server on the local network
  client.py audio                         play the server's sound, until Ctrl+C
  client.py audio --record talk.wav       and keep it
  client.py audio --output - | ffmpeg -f s16le -ar 48000 -i - talk.opus
                                          give it to another program
"""


MODE_OPTIONS = {
    "file": ["name", "retry"],
    "audio": ["output", "record", "latency", "delay", "opus", "seconds", "list_devices"],
}


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of file mode."""
    files = parser.add_argument_group("file mode")
    files.add_argument("--name", help="what standard input is to be called at the server")
    files.add_argument(
        "--retry",
        type=common.number(float, 0, FOREVER_S),
        default=DEFAULT_RETRY_S,
        metavar="SECONDS",
        help="how long a server that was lost on the way is waited for (%(default)g)",
    )


def add_audio_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of audio mode."""
    sound = parser.add_argument_group("audio mode")
    sound.add_argument(
        "--output",
        type=common.name_given,
        metavar="SPEAKER",
        help="a loudspeaker's name or number, a file (.wav .flac .opus), or - for raw 16-bit PCM",
    )
    sound.add_argument(
        "--record",
        type=recording_name,
        metavar="FILE",
        help="write the sound to a file as well: .wav, .flac or .opus",
    )
    sound.add_argument(
        "--latency",
        type=common.number(float, 0, MAX_LATENCY_MS),
        metavar="MS",
        help="keep so much sound in reserve, rather than what the network turns out to need",
    )
    opus = common.OPUS_KBIT_PER_S
    sound.add_argument(
        "--opus",
        type=common.number(int, opus[0], opus[-1]),
        nargs="?",
        const=common.DEFAULT_OPUS_KBIT,
        metavar="KBIT/S",
        help=f"have the sound sent as Opus, in an eighth of the data (%(const)s; {opus[0]} to "
        f"{opus[-1]})",
    )
    sound.add_argument(
        "--delay",
        type=common.number(float, -MAX_DELAY_MS, MAX_DELAY_MS),
        default=0.0,
        metavar="MS",
        help="where the server has all play in step (--sync): play so much later, or earlier if "
        "negative (%(default)g)",
    )
    sound.add_argument(
        "--seconds",
        type=common.number(float, 0.001, FOREVER_S),
        metavar="S",
        help="stop after S seconds",
    )
    sound.add_argument("--list-devices", action="store_true", help="show the loudspeakers and exit")


def recording_name(text: str) -> str:
    """Return `text` as what a recording is called, for argparse."""
    if text == STDOUT:
        raise argparse.ArgumentTypeError("it takes a file: use --output - for standard output")
    if ending_of(text) not in WRITERS:
        endings = ", ".join(WRITERS)
        raise argparse.ArgumentTypeError(f"cannot record into {text!r}: only {endings} are written")
    return text


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's arguments; exits with status 2 where they are wrong."""
    description = "Send files to server.py, or play its sound."
    parser = common.make_parser(description, EXAMPLES, host_help="where the server is")
    parser.add_argument(
        "--find", action="store_true", help="show the servers on the local network, to pick one"
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="files and folders, or - for standard input"
    )
    add_file_arguments(parser)
    add_audio_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    take_path_for_mode(parser, args)
    args.check_mode = functools.partial(common.refuse_other_mode, parser, args, MODE_OPTIONS)
    args.check_mode()
    check_arguments(parser, args)
    common.take_code_from_environment(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 where arguments do not go together."""
    from_stdin = args.paths.count(STDIN)
    if args.paths and args.mode == "audio":
        parser.error(
            "audio mode takes no PATH: what is to be heard goes behind server.py's --input"
        )
    if from_stdin and not args.name:
        parser.error("standard input needs a name: add --name NAME")
    if from_stdin > 1:
        parser.error("standard input can be sent once only")
    if args.name is not None and not from_stdin:
        parser.error("--name is for standard input: give - as the PATH in file mode")
    if args.find and (args.host, args.port) != (common.DEFAULT_HOST, common.DEFAULT_PORT):
        parser.error("--find looks for the server: leave out --host and --port")
    if args.find and (from_stdin or args.list_devices):
        parser.error("--find asks for a number: that goes neither with - nor with --list-devices")
    if args.port == 0:
        parser.error("argument --port: 0 is not a port to connect to")


def take_path_for_mode(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Have ``client.py report.pdf`` mean ``client.py file report.pdf``; else exit with status 2."""
    if args.mode is None or args.mode in common.MODES:
        return
    if args.mode != STDIN and not os.path.lexists(args.mode):
        parser.error(f"{args.mode!r} is neither a mode (file or audio) nor a file that is there")
    args.paths.insert(0, args.mode)
    args.mode = "file"


def ask_for_paths(console: Console) -> list[str]:
    """Ask for a file's name until it is one that is there; Tab completes it on a terminal.

    Several that a file manager has quoted are several.
    """
    if sys.stdin.isatty():
        complete_paths()
    while True:
        paths = clean_paths(console.ask("File name: "))
        if paths == [""]:
            continue
        if STDIN in paths:
            console.say(f"{STDIN}: standard input has the answers here: {how_to_send_a_pipe()}")
            continue
        found = list(look_up_named(paths, None))
        for each in found:
            if isinstance(each, Problem):
                console.say(f"{escape(each.path)}: {each.reason}")
        if any(isinstance(each, Source) for each in found):
            return paths


def clean_paths(answer: str) -> list[str]:
    """Return the paths that `answer` means: as typed, or as a shell or a file manager quotes it."""
    if os.path.lexists(answer):
        return [answer]
    path = os.path.expanduser(re.sub(r"^(['\"])(.*)\1$", r"\2", answer.strip()))
    if not os.path.lexists(path):
        with contextlib.suppress(ValueError):
            words = list(map(os.path.expanduser, split_words(answer)))
            if words and all(map(os.path.lexists, words)):
                return words
    return [path]


def split_words(answer: str, posix: bool = os.name == "posix") -> list[str]:
    r"""Return the words of what was dragged into a terminal: ``My\ File``, ``'My File' 'another'``.

    On Windows only ``"`` quotes. Raises ValueError where a quote has no end.
    """
    import shlex  # noqa: PLC0415  (only a prompt needs it)

    words = shlex.split(answer, posix=posix)
    return words if posix else [word.strip('"') for word in words]


def complete_paths() -> None:
    """Let Tab complete the names of files, where this Python has readline."""
    try:
        import readline  # noqa: PLC0415  (only a prompt on a terminal needs it)
    except ImportError:
        return
    readline.set_completer_delims("")  # without a completer, it completes the names of files
    # macOS's Python has libedit there, which binds keys in words of its own.
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def main(argv: Sequence[str]) -> int:
    """Run the client with the command line's arguments; return its exit status."""
    args = parse_arguments(argv)
    gc.enable()
    common.INTERRUPTS.take()
    asking = Console(quiet=False, data_on_stdout=args.output == STDOUT)
    asks = args.find or not (args.paths or args.mode == "audio")
    if args.find:
        found = pick_server(args.mode, asking)
        args.mode, args.host, args.port = found.announced.mode, found.host, found.port
    mode = args.mode = "audio" if args.list_devices else args.mode or common.ask_mode(asking)
    args.check_mode()
    address = Address(args.host, args.port, args.code, args.open, asks)
    if mode == "audio":
        common.quiet_libraries(args.verbose)
        if args.list_devices:
            return common.list_devices(common.SPEAKER)
        return start_audio_client(address, args)
    if not args.paths:
        # It holds no place there while the user types.
        connect(address, FILE_HELLO, asking)[0].close()
        args.paths = ask_for_paths(asking)
    return start_file_client(address, args)


if __name__ == "__main__":
    common.run(main)
