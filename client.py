"""The sending end of Socket Pair: brings files to a server.

    python client.py file report.pdf photos/

From the top down:

====================  =============================================================
command line          ``main`` asks for what the arguments leave open
file mode             ``start_file_client`` and ``Sender``: batches, resuming, retries
results               ``ResultReader`` and ``Report``: what became of each file
progress              ``Progress``: bars, on a terminal
sources               ``find_sources``: the files and folders that the user named
connection            ``connect``: a connection past its handshake
====================  =============================================================

``server.py`` describes the conversation.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import select
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

import common
from common import (
    END_OF_FILE,
    EXIT_FAILED,
    EXIT_OK,
    GIVEN_UP,
    HANDSHAKE_TIMEOUT_S,
    LENGTH,
    STILL_HERE,
    Blocks,
    Connection,
    ConnectionLost,
    Keepalive,
    PeerClosed,
    PeerStalled,
    ProtocolError,
    SocketPairError,
    blocks_for,
    calculate_checksum,
    complain,
    describe_error,
    escape,
    format_bytes,
    require,
    require_size,
)

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_BATCH_ENTRIES = 1000
# Half of what a frame may hold, as JSON may need two characters for one.
MAX_BATCH_CHARS = common.MAX_FRAME_BYTES // 2
ENTRY_CHARS = 100  # of an offered entry, beside its path
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
LARGE_FILE_BYTES = 64 * 1024 * 1024
STILL_HERE_INTERVAL_S = common.PROGRESS_TIMEOUT_S / 4
STDIN = "-"
CHANGED = "it changed while it was sent"


# --- connection -----------------------------------------------------------------------------


class NoServer(ConnectionLost):
    """Nobody answers at the server's address."""


def connect(host: str, port: int, mode: str) -> tuple[Connection, dict[str, Any]]:
    """Return a connection past its handshake, and the server's welcome.

    Blocks for 10 s each for connecting and for the handshake at most. Raises NoServer,
    ConnectionLost, ProtocolError where it is no Socket Pair server, and PeerRefused.
    """
    peer = escape(common.format_address(host, port))
    try:
        sock = socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT_S)
    except (OSError, ValueError) as error:  # ValueError: a host that no name can be
        raise NoServer(
            f"no server at {peer} ({describe_error(error)}): "
            f"start one there with: python server.py {mode}"
        ) from error
    connection = Connection(sock, peer)
    try:
        return connection, shake_hands(connection, mode)
    except BaseException:
        connection.close()
        raise


def shake_hands(connection: Connection, mode: str) -> dict[str, Any]:
    """Return the server's welcome; blocks and raises as `connect` does."""
    try:
        with connection.limit(HANDSHAKE_TIMEOUT_S):
            connection.send("hello", protocol=common.PROTOCOL, mode=mode)
            return connection.receive("welcome")
    except ProtocolError as error:
        raise ProtocolError(f"{connection.peer} is not a Socket Pair server: {error}") from None
    except PeerClosed as error:
        raise ConnectionLost(f"{connection.peer}: {error} before it answered") from None


# --- sources --------------------------------------------------------------------------------


@dataclass
class Source:
    """A file or folder to send: where it is here, and how it is offered."""

    path: str
    name: str  # with "/" between folders
    size: int | None = None  # None: unknown until it ends (standard input)
    mtime_ns: int | None = None
    executable: bool = False
    is_folder: bool = False
    digests: dict[int, hashlib._Hash] = field(default_factory=dict)  # of so many first bytes
    offset: int = 0  # of the first byte that the server needs
    checksum: str = ""  # SHA-256 of all of it, once it has been read
    begun: bool = False  # reading it, for one that cannot be read twice
    problem: str = ""  # why it cannot be sent, found here
    decided: bool = False  # by the server

    @classmethod
    def from_stat(cls, path: str, name: str, found: os.stat_result) -> Source:
        """Return the source that a file with these properties is."""
        executable = bool(found.st_mode & stat.S_IXUSR) and sys.platform != "win32"
        return cls(path, name, found.st_size, found.st_mtime_ns, executable)

    def offer(self) -> dict[str, Any]:
        """Return it as an entry of an offer."""
        if self.is_folder:
            return {"path": self.name, "mtime_ns": self.mtime_ns, "folder": True}
        return {
            "path": self.name,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "executable": self.executable,
        }

    def check_unchanged(self, file: BinaryIO) -> None:
        """Raise SocketPairError unless the open `file` has the size and time that were offered."""
        found = os.fstat(file.fileno())
        now = (found.st_size, found.st_mtime_ns)
        if self.size is not None and now != (self.size, self.mtime_ns):
            raise SocketPairError(CHANGED)


# Told the path, the name that it would be offered with, and the reason.
Problem = Callable[[str, str, str], object]


def find_sources(paths: Iterable[str], name: str | None, on_problem: Problem) -> Iterator[Source]:
    """Yield all that `paths` name: files, and what is in folders, ``-`` under `name`.

    What cannot be sent is passed over after a call of `on_problem`.
    """
    for path in paths:
        if path == STDIN:
            yield Source(STDIN, name or "")
            continue
        try:
            found = os.stat(path)
        except (OSError, ValueError) as error:
            on_problem(path, path, describe_missing(error))
            continue
        # Not just basename(): "." and "folder/" have a name too.
        offered = os.path.basename(os.path.abspath(path))
        if stat.S_ISDIR(found.st_mode):
            yield from walk_folder(path, offered, on_problem)
        elif stat.S_ISREG(found.st_mode):
            yield Source.from_stat(path, offered, found)
        else:
            on_problem(path, path, "not a file or a folder")


def describe_missing(error: OSError | ValueError) -> str:
    """Return why a file that the user named cannot be looked at."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return describe_error(error) if isinstance(error, OSError) else "not a possible name"


def walk_folder(path: str, name: str, on_problem: Problem) -> Iterator[Source]:
    """Yield what is in a folder, and each folder after all that is in it.

    In that order the server can give each folder its modification time for good. Without
    recursion, for trees of any depth.
    """
    unfinished = [(path, name, iter(list_folder(path, name, on_problem)))]
    while unfinished:
        path, name, entries = unfinished[-1]
        entry = next(entries, None)
        if entry is None:
            unfinished.pop()
            with contextlib.suppress(OSError):
                mtime_ns = os.stat(path).st_mtime_ns
                yield Source(path, name, mtime_ns=mtime_ns, is_folder=True)
        elif entry.is_dir(follow_symlinks=False):
            below = f"{name}/{entry.name}"
            unfinished.append((entry.path, below, iter(list_folder(entry.path, below, on_problem))))
        else:
            yield from look_at(entry, f"{name}/{entry.name}", on_problem)


def list_folder(path: str, name: str, on_problem: Problem) -> list[os.DirEntry[str]]:
    """Return a folder's entries by name; none, after a call of `on_problem`, if unreadable."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        on_problem(path, f"{name}/", describe_error(error))
        return []


def look_at(entry: os.DirEntry[str], name: str, on_problem: Problem) -> Iterator[Source]:
    """Yield the file that `entry` is or links to."""
    try:
        found = entry.stat()
    except OSError as error:
        on_problem(entry.path, name, describe_missing(error))
        return
    if stat.S_ISREG(found.st_mode):
        yield Source.from_stat(entry.path, name, found)
    elif stat.S_ISDIR(found.st_mode):
        complain(f"{escape(entry.path)}: a link to a folder, not followed")
    else:
        on_problem(entry.path, name, "not a file or a folder")


def in_batches(sources: Iterable[Source]) -> Iterator[list[Source]]:
    """Yield `sources` in lists that fit an offer."""
    batch: list[Source] = []
    chars = 0
    for source in sources:
        # ASCII takes one character of JSON, anything else up to twelve.
        needed = ENTRY_CHARS + len(source.name) * (1 if source.name.isascii() else 12)
        if batch and (len(batch) == MAX_BATCH_ENTRIES or chars + needed > MAX_BATCH_CHARS):
            yield batch
            batch, chars = [], 0
        batch.append(source)
        chars += needed
    if batch:
        yield batch


# --- progress -------------------------------------------------------------------------------


class Progress:
    """Bars with speed and time left: one for each large file, and one for all of many files.

    Draws nothing unless `shown`. Lines for people go through it, as a bar would be torn by them.
    """

    def __init__(self, sources: Callable[[], Iterable[Source]], shown: bool) -> None:
        self._tqdm = find_tqdm() if shown else None
        self._all: tqdm[Any] | None = None
        self._file: tqdm[Any] | None = None
        if self._tqdm:
            sizes = [source.size or 0 for source in sources() if not source.is_folder]
            if len(sizes) > 1:
                self._all = self._bar(f"{len(sizes)} files", sum(sizes))

    def _bar(self, label: str, total: int | None, **options: Any) -> tqdm[Any]:
        assert self._tqdm is not None
        return self._tqdm(
            total=total, desc=label, unit="B", unit_scale=True, dynamic_ncols=True, **options
        )

    def start(self, source: Source) -> None:
        """Begin with a file, at its offset."""
        self.skip(source.offset)
        large = source.size is None or source.size >= LARGE_FILE_BYTES
        if self._tqdm and (large or not self._all):
            label = escape(source.name, 40)
            self._file = self._bar(label, source.size, initial=source.offset, leave=not self._all)

    def skip(self, count: int) -> None:
        """Count bytes that need not be sent."""
        if self._all:
            self._all.update(count)

    def advance(self, count: int) -> None:
        """Count bytes that have been sent."""
        for bar in (self._file, self._all):
            if bar:
                bar.update(count)

    def finish(self) -> None:
        """Be done with a file."""
        if self._file:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Take the bars down, or leave their last state, as a terminal's lines."""
        self.finish()
        if self._all:
            self._all.close()
            self._all = None

    def say(self, text: str) -> None:
        """Print a line on standard output, above the bars."""
        if self._tqdm:
            self._tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            common.say(text)

    def complain(self, text: str) -> None:
        """Print a line on standard error, above the bars."""
        if self._tqdm:
            self._tqdm.write(text, file=sys.stderr)
        else:
            complain(text)


def find_tqdm() -> type[tqdm[Any]] | None:
    """Return tqdm where it is installed; files go without it too."""
    try:
        from tqdm import tqdm  # noqa: PLC0415  (only a terminal needs it, and it takes a while)
    except ImportError:
        complain("no progress bars: install tqdm for them (pip install tqdm)")
        return None
    return tqdm


# --- results --------------------------------------------------------------------------------


@dataclass
class FolderTally:
    """What has become of what is in a folder that was named."""

    files: int = 0
    bytes: int = 0
    failed: int = 0


class Report:
    """Tells the user what becomes of what was named, and keeps count.

    A file that was named has a line of its own; those in a folder share the folder's.
    """

    def __init__(self, progress: Progress, quiet: bool, verbose: bool) -> None:
        self.failed = 0
        self._progress = progress
        self._quiet = quiet
        self._verbose = verbose
        self._folders: dict[str, FolderTally] = {}

    def _tally(self, name: str) -> FolderTally:
        return self._folders.setdefault(name.partition("/")[0], FolderTally())

    def problem(self, path: str, name: str, reason: str) -> None:
        """Report what was not sent, or was not saved: its path, its offered name, and why."""
        self.failed += 1
        if "/" in name:
            self._tally(name).failed += 1
        self._progress.complain(f"{escape(path)}: {reason}")

    def resumed(self, source: Source) -> None:
        """Report that some of a file is at the server already."""
        if not self._quiet:
            there = format_bytes(source.offset)
            self._progress.say(f"{escape(source.path)}: going on after the first {there}")

    def saved(self, source: Source, name: str, how: str) -> None:
        """Report a file that stands at the server as `name` now, or a folder that is complete."""
        named = "/" not in source.name
        if source.is_folder:
            if named:
                self._folder_saved(source, name)
            return
        if not named:
            tally = self._tally(source.name)
            tally.files += 1
            tally.bytes += source.size or 0
        if not self._quiet and (named or self._verbose or name != source.name):
            self._progress.say(
                f"{how} as {escape(name)}, SHA-256 matches ({source.checksum[:8]}...)"
            )

    def _folder_saved(self, source: Source, name: str) -> None:
        tally = self._folders.pop(source.name, FolderTally())
        if self._quiet:
            return
        files = "1 file" if tally.files == 1 else f"{tally.files} files"
        text = f"Saved {escape(name)}/ with {files} ({format_bytes(tally.bytes)})"
        if tally.files:
            text += ", every SHA-256 matches"
        if tally.failed:
            text += f", without {tally.failed} that failed"
        self._progress.say(text)


class ResultReader:
    """Reads the results of a batch in a thread of its own, while the batch is being sent.

    Otherwise a server with many results to tell and a client with much to send could wait for
    each other for ever. Leaving the ``with`` block waits for the last result, and raises what
    the reading raised: ConnectionLost, ProtocolError or PeerRefused.
    """

    def __init__(self, connection: Connection, sources: dict[int, Source], report: Report) -> None:
        self._connection = connection
        self._waiting = sources
        self._report = report
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)

    def __enter__(self) -> ResultReader:
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        if isinstance(error, ConnectionLost):
            self._thread.join(1.0)  # perhaps the server has said why
        if error is not None:
            self._connection.close()
        self._thread.join()
        if self._error is not None and (error is None or isinstance(error, ConnectionLost)):
            raise self._error

    def _run(self) -> None:
        try:
            while self._waiting:
                message = self._receive()
                for result in require(message, "entries", list):
                    self._settle(result)
        except Exception as error:  # noqa: BLE001  (raised again in the other thread)
            self._error = error

    def _receive(self) -> dict[str, Any]:
        """Return the next results; waits as long as the sending goes on."""
        while True:
            sent_bytes = self._connection.sent_bytes
            try:
                return self._connection.receive("results")
            except PeerStalled:
                if self._connection.sent_bytes == sent_bytes:
                    raise

    def _settle(self, result: Any) -> None:
        match result:
            case [int(index), dict(outcome)] if index in self._waiting:
                settle(self._waiting.pop(index), outcome, self._report)
            case _:
                raise ProtocolError("received a result of a file that was not sent")


def settle(source: Source, outcome: dict[str, Any], report: Report) -> None:
    """Report what the server says has become of `source`. Raises ProtocolError."""
    source.decided = True
    if source.problem:
        report.problem(source.path, source.name, source.problem)
    elif "failed" in outcome:
        report.problem(source.path, source.name, escape(require(outcome, "failed", str)))
    elif "already" in outcome:
        report.saved(source, require(outcome, "already", str), "Already there")
    else:
        report.saved(source, require(outcome, "saved", str), "Saved")


# --- file mode ------------------------------------------------------------------------------


@dataclass
class Address:
    """Where the server is."""

    host: str
    port: int


def start_file_client(
    address: Address,
    paths: Sequence[str],
    *,
    name: str | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> int:
    """Send the files and folders at `paths` (``-``: standard input, under `name`) to a server.

    Blocks until all are sent or have failed. Returns the exit status, and has told the user
    whatever went wrong: 1 unless every one of them stands at the server, verified.
    """
    shown = sys.stderr is not None and sys.stderr.isatty() and not quiet
    progress = Progress(lambda: find_sources(paths, name, lambda path, name, reason: None), shown)
    report = Report(progress, quiet, verbose)
    sender = Sender(address, report, progress)
    try:
        sender.send(in_batches(find_sources(paths, name, report.problem)))
    except SocketPairError as error:
        progress.complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        progress.close()
        complain("\ninterrupted: the same command goes on from here")
        raise
    finally:
        progress.close()
        sender.close()
    return EXIT_FAILED if report.failed else EXIT_OK


class Sender:
    """Brings batches to a server, over as many connections as it takes."""

    def __init__(self, address: Address, report: Report, progress: Progress) -> None:
        self._address = address
        self._report = report
        self._progress = progress
        self._connection: Connection | None = None
        self._batches: Iterator[list[Source]] = iter(())
        self._next: list[Source] = []  # the batch after the one under way, looked up meanwhile
        self._offered: list[Source] | None = None  # the batch that the server knows of
        self._was_connected = False
        self._moved = False  # since the last time that the connection was lost

    def close(self) -> None:
        """Hang up. May be called twice."""
        if self._connection:
            self._connection.close()
            self._connection = self._offered = None

    def send(self, batches: Iterator[list[Source]]) -> None:
        """Send all batches; blocks until each file in them is decided.

        Comes back to a lost server after growing waits; raises ConnectionLost in the end,
        PeerRefused and ProtocolError at once.
        """
        self._batches = batches
        waits = iter(RETRY_WAITS_S)
        batch = next(batches, [])
        while batch:
            try:
                self._send_once(self._connected(), batch)
            except ConnectionLost as error:
                self.close()
                if self._moved:
                    waits, self._moved = iter(RETRY_WAITS_S), False
                wait_s = next(waits, None) if self._was_connected else None
                if wait_s is None:
                    raise
                self._progress.complain(f"{error}; trying again in {wait_s:g} s")
                time.sleep(wait_s)
            batch = [source for source in batch if not self._is_done(source)]
            if not batch:
                batch, self._next = self._next or next(batches, []), []

    def _is_done(self, source: Source) -> bool:
        if source.begun and not source.decided:
            self._report.problem(
                source.path, source.name, "standard input cannot be sent a second time"
            )
            return True
        return source.decided

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection, _ = connect(self._address.host, self._address.port, "file")
            self._was_connected = True
        return self._connection

    def _send_once(self, connection: Connection, batch: list[Source]) -> None:
        """Send what the server needs of a batch, and offer it the next one."""
        for source in batch:
            source.problem = ""
        self._offer(connection, batch)
        wanted = self._settle_or_want(batch, self._receive_start(connection, batch))
        with ResultReader(connection, dict(wanted), self._report):
            for source in wanted.values():
                if not source.is_folder:
                    self._send_file(connection, source)
            # While the server is still busy, so that it never waits for our looking up files.
            self._next = self._next or next(self._batches, [])
            self._offer(connection, self._next)

    def _offer(self, connection: Connection, batch: list[Source]) -> None:
        if batch and self._offered is not batch:
            connection.send("offer", entries=[source.offer() for source in batch])
            self._offered = batch
        connection.flush()

    def _settle_or_want(self, batch: list[Source], verdicts: list[Any]) -> dict[int, Source]:
        """Report those that the server has decided on already; return the others by index."""
        wanted: dict[int, Source] = {}
        for index, (source, verdict) in enumerate(zip(batch, verdicts, strict=True)):
            if not isinstance(verdict, dict):
                raise ProtocolError("received a start that is not one")
            if "offset" not in verdict:
                settle(source, verdict, self._report)
                self._progress.skip(source.size or 0)
                continue
            source.offset = require_size(verdict, "offset")
            if source.offset and source.offset not in source.digests:
                raise ProtocolError("received an offset that was not asked about")
            if source.offset:
                self._report.resumed(source)
            wanted[index] = source
        return wanted

    def _receive_start(self, connection: Connection, batch: list[Source]) -> list[Any]:
        """Return the server's verdicts, after answering what it asks about what it holds."""
        while True:
            message = connection.receive("start", "held", "hashing")
            if message["type"] == "held":
                self._answer_held(connection, batch, require(message, "entries", list))
            elif message["type"] == "start":
                verdicts = require(message, "entries", list)
                if len(verdicts) != len(batch):
                    raise ProtocolError("received a start for another offer")
                return verdicts

    def _answer_held(self, connection: Connection, batch: list[Source], held: list[Any]) -> None:
        keepalive = Keepalive(lambda: connection.send("hashing"))
        answers = []
        for index, lengths in parse_held(held, len(batch)):
            hash_prefixes(batch[index], lengths, keepalive)
            answers.append([digest.hexdigest() for digest in batch[index].digests.values()])
        connection.send("prefixes", entries=answers)

    def _send_file(self, connection: Connection, source: Source) -> None:
        """Send a file from its offset on, then its SHA-256; or give it up."""
        self._progress.start(source)
        try:
            digest = self._send_content(connection, source)
        except ConnectionLost:
            raise
        except (OSError, SocketPairError) as error:
            source.problem = describe_error(error)
            connection.queue(LENGTH.pack(GIVEN_UP))
        else:
            source.checksum = digest.hexdigest()
            connection.queue(LENGTH.pack(END_OF_FILE) + digest.digest())
        finally:
            self._progress.finish()

    def _send_content(self, connection: Connection, source: Source) -> hashlib._Hash:
        """Send a file's segments, hashed meanwhile; return the digest of the whole file.

        Raises OSError, and SocketPairError where it changed or is not wanted any more.
        """
        digest = source.digests.get(source.offset) or hashlib.sha256()
        with open_source(source) as file:
            source.check_unchanged(file)
            with blocks_for(source.size, digest.update) as blocks:
                for segment in read_segments(connection, source, file, blocks):
                    if source.decided:
                        raise SocketPairError("the server has failed it")
                    blocks.give(segment)  # is hashed while it is sent
                    connection.send_segment(segment)
                    self._progress.advance(len(segment))
                    self._moved = True
            source.check_unchanged(file)
        return digest


def parse_held(held: list[Any], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the index and the lengths in each entry of a `held`. Raises ProtocolError."""
    for entry in held:
        match entry:
            case [int(index), [*lengths]] if 0 <= index < batch_size:
                if all(type(length) is int and length >= 0 for length in lengths):
                    yield index, lengths
                    continue
        raise ProtocolError("received a held that is not one")


def hash_prefixes(source: Source, lengths: list[int], keepalive: Keepalive) -> None:
    """Set the digests of the first `lengths` bytes of a file, read once; blocks until done.

    Leaves out those for which it cannot be read so far.
    """
    source.digests = {}
    digest, done = hashlib.sha256(), 0
    with contextlib.suppress(OSError, SocketPairError), open_source(source) as file:
        for length in sorted(lengths):
            source.checksum = calculate_checksum(
                file.fileno(), length - done, digest=digest, on_progress=keepalive
            )
            source.digests[length], done = digest.copy(), length


def open_source(source: Source) -> BinaryIO:
    """Open a file at its offset, or standard input, without buffer. Raises OSError."""
    if source.path == STDIN:
        source.begun = True
        return open(0, "rb", buffering=0, closefd=False)
    # Not to wait for a writer, should it have become a pipe meanwhile.
    descriptor = os.open(
        source.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    )
    return open(descriptor, "rb", buffering=0)


def read_segments(
    connection: Connection, source: Source, file: BinaryIO, blocks: Blocks
) -> Iterator[memoryview]:
    """Yield what is left of a file in blocks' filled parts; blocks while it reads.

    Raises SocketPairError where a file ends earlier than its offer said.
    """
    if source.size is None:
        while count := fill(block := blocks.take(), file, lambda: wait_for_input(connection)):
            yield block[:count]
        return
    file.seek(source.offset)
    left = source.size - source.offset
    while left:
        block = blocks.take()[:left]
        if fill(block, file) < len(block):
            raise SocketPairError(CHANGED)
        left -= len(block)
        yield block


def fill(view: memoryview, file: BinaryIO, wait: Callable[[], object] = lambda: None) -> int:
    """Fill `view` from `file`, with a call of `wait` before each read; return the bytes read.

    Less than there is room for means that the file has ended.
    """
    have = 0
    while have < len(view):
        wait()
        count = file.readinto(view[have:])  # type: ignore[attr-defined]
        if not count:
            break
        have += count
    return have


def wait_for_input(connection: Connection) -> None:
    """Block until standard input has something, and tell the server meanwhile that we live."""
    if sys.platform == "win32":
        return  # select() there knows sockets only: a pipe silent for a minute is cut off
    while not select.select([0], [], [], STILL_HERE_INTERVAL_S)[0]:
        connection.write(LENGTH.pack(STILL_HERE))


# --- command line ---------------------------------------------------------------------------

EXAMPLES = """examples:
  client.py                               ask for everything
  client.py file report.pdf photos/       send a file and a folder
  tar c src | client.py file - --name src.tar
                                          send what another program makes
"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's arguments; exits with status 2 where they are wrong."""
    parser = common.make_parser("Send files to server.py.", EXAMPLES)
    common.add_address_arguments(parser, "where the server is")
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="files and folders, or - for standard input"
    )
    files = parser.add_argument_group("file mode")
    files.add_argument("--name", help="what standard input is to be called at the server")
    args = parser.parse_intermixed_args(argv)
    from_stdin = args.paths.count(STDIN)
    if args.paths and args.mode == "audio":
        parser.error("audio mode takes no PATH")
    if from_stdin and not args.name:
        parser.error("standard input needs a name: add --name NAME")
    if from_stdin > 1:
        parser.error("standard input can be sent once only")
    if args.name is not None and not from_stdin:
        parser.error("--name is for standard input: give - as the PATH")
    return args


def ask_for_path() -> str:
    """Ask for a file's name until there is an answer; Tab completes it on a terminal."""
    if sys.stdin.isatty():
        complete_paths()
    while True:
        answer = common.ask("File name: ")
        if answer.strip():
            return clean_path(answer)


def clean_path(answer: str) -> str:
    """Return the path that `answer` means: as typed, or as a shell or a file manager quotes it."""
    if os.path.lexists(answer):
        return answer
    path = answer.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        path = path[1:-1]
    path = os.path.expanduser(path)
    if "\\" in path and not os.path.lexists(path) and os.name == "posix":
        # Dragged into a terminal: "My\ File".
        with contextlib.suppress(ValueError):
            words = shlex.split(path)
            if len(words) == 1 and os.path.lexists(words[0]):
                return words[0]
    return path


def complete_paths() -> None:
    """Let Tab complete the names of files, where this Python has readline."""
    try:
        import readline  # noqa: PLC0415  (only a prompt on a terminal needs it)
    except ImportError:
        return
    readline.set_completer_delims("")
    readline.set_completer(lambda text, state: next(iter(matching_paths(text)[state:]), None))
    # macOS's Python has libedit there, which binds keys in words of its own.
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def matching_paths(text: str) -> list[str]:
    """Return the paths that begin with `text`, folders with a slash behind them."""
    folder, start = os.path.split(text)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            return sorted(
                os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
                for entry in entries
                if entry.name.startswith(start)
            )
    except OSError:
        return []


def main(argv: Sequence[str]) -> int:
    """Run the client with the command line's arguments; return its exit status."""
    args = parse_arguments(argv)
    mode = args.mode or common.ask_mode()
    if mode == "audio":
        complain("audio mode is not built yet")
        return EXIT_FAILED
    return start_file_client(
        Address(args.host, args.port),
        args.paths or [ask_for_path()],
        name=args.name,
        quiet=args.quiet,
        verbose=args.verbose,
    )


if __name__ == "__main__":
    common.run(main)
