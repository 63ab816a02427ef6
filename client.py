"""The client of Socket Pair: brings files to a server, or plays the server's sound.

    python client.py file report.pdf photos/
    python client.py audio

In the order of the file; to follow a run, begin at `main`, at its end:

======================  ===========================================================
finding a server        ``pick_server``: those that announce themselves on the local network
connection              ``connect``: a connection past its handshake
sources                 ``find_sources``: the files and folders that the user named
progress                ``Progress``: bars, on a terminal
results                 ``ResultReader`` and ``Report``: what became of each file
file mode               ``start_file_client`` and ``Sender``: batches, resuming, retries
sound: jitter buffer    ``JitterBuffer``: plays evenly what arrives unevenly, and soon
sound: outputs          ``Destination``, ``Output``, and the sound card: ``Speaker``
sound: recordings       ``RecordingFiles``, ``Pipe``: WAV, FLAC and Opus, standard output
sound: listening        ``start_audio_client``, ``Listening``: receives, comes back; ``Timeline``
command line            ``main`` asks for what the arguments leave open
======================  ===========================================================

``common.py`` describes the conversation.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until common.take_signals(), Ctrl+C just ends the program, also during the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import functools
import hashlib
import math
import os
import queue
import select
import shlex
import socket
import ssl
import stat
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, TypeVar

import common
from common import (
    END_OF_FILE,
    EXIT_FAILED,
    EXIT_OK,
    GIVEN_UP,
    HANDSHAKE_TIMEOUT_S,
    LENGTH,
    STILL_HERE,
    AudioBlock,
    AudioFormat,
    Blocks,
    CodeWanted,
    Connection,
    ConnectionLost,
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
    PeerRefused,
    PeerStalled,
    Prefixes,
    ProtocolError,
    Results,
    SocketPairError,
    SoundCard,
    Start,
    StreamEnd,
    TimeReply,
    TimeRequest,
    Welcome,
    blocks_for,
    calculate_checksum,
    complain,
    count,
    describe_error,
    escape,
    format_bytes,
    format_duration,
)

if TYPE_CHECKING:
    import wave
    from ipaddress import IPv4Interface, IPv6Interface

    from tqdm import tqdm
    from zeroconf import ServiceInfo


# --- finding a server -----------------------------------------------------------------------

# Servers answer within some tenths of a second, and a lost question is asked again after one.
FIND_S = 2.0
MAX_SHOWN = 50
MAX_SHOWN_CHARS = 40


class FoundServer(NamedTuple):
    """A server that has announced itself, and the address that leads to it from here."""

    announced: common.Announced
    host: str
    port: int

    def describe(self) -> str:
        """Return a line of a table; the name, which may be of any width, is last."""
        name, mode, has_code = self.announced
        access = "pairing code" if has_code else "needs --open"
        address = escape(common.format_address(self.host, self.port))
        return f"{mode:<5}  {address:<21}  {access}  {escape(name)[:MAX_SHOWN_CHARS]}"


def find_servers(mode: str | None) -> list[FoundServer]:
    """Return the servers on the local network, those in `mode` if it is given, by name.

    Blocks for ``FIND_S``, for their answers. Raises SocketPairError if there is no way to ask.
    """
    modes = [mode] if mode else common.MODES
    found = {}  # by address: a server may be told of twice
    services, own = browse(), common.own_interfaces()
    for service in services:
        announced = common.Announced.from_txt(service.properties)
        host = nearest(service.parsed_scoped_addresses(), own)
        if announced.name and announced.mode in modes and host and service.port:
            found[host, service.port] = FoundServer(announced, host, service.port)
    return sorted(found.values(), key=lambda server: (server.announced.name, *server[1:]))


def browse() -> list[ServiceInfo]:
    """Return what is announced on the local network as Socket Pair; see `find_servers`."""
    try:
        # Here, as only this needs it, and it takes long to import.
        import zeroconf  # noqa: PLC0415
    except ImportError as error:
        raise SocketPairError(
            f"--find needs the package zeroconf, which cannot be loaded ({error}): "
            f"{common.how_to_install('zeroconf')}, or use --host"
        ) from None
    names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def note(name: str, **_: object) -> None:
        names.put(name)

    try:
        with contextlib.closing(common.open_network()) as network:
            zeroconf.ServiceBrowser(network, common.SERVICE_TYPE, handlers=[note])
            time.sleep(FIND_S)
            told = {names.get() for _ in range(names.qsize())}
            services = [zeroconf.ServiceInfo(common.SERVICE_TYPE, name) for name in told]
            # Servers tell all of themselves at once. What has not come with the name is not
            # asked for: anyone can announce names that nobody answers for.
            return [service for service in services if service.load_from_cache(network)]
    except (OSError, zeroconf.Error) as error:
        raise SocketPairError(f"cannot ask the local network: {describe_error(error)}") from error


def nearest(addresses: Iterable[str], own: Sequence[IPv4Interface | IPv6Interface]) -> str | None:
    """Return the one of a server's addresses that most likely leads to it from here, if any.

    One on a network of our `own` does, unless it is also our own, which comes last: there are
    addresses that every machine has for its own virtual networks.
    """
    import ipaddress  # noqa: PLC0415  (see browse)

    def can_be_reached(address: str) -> bool:
        ip = ipaddress.ip_address(address)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        is_special = ip.is_multicast or ip.is_unspecified or ip.is_loopback or ip.is_reserved
        is_unclear = ip.is_link_local and ip.version == 6 and "%" not in address
        return not (is_special or is_unclear)

    def distance(address: str) -> tuple[int, int]:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if any(ip == interface.ip for interface in own):
            return 2, ip.version
        return (0 if any(ip in interface.network for interface in own) else 1), ip.version

    return min(filter(can_be_reached, addresses), key=distance, default=None)


def pick_server(mode: str | None, data_on_stdout: bool = False) -> FoundServer:
    """Show the servers on the local network, and return the one that the user picks.

    Blocks until then. Raises SocketPairError where there is none, or no answer.
    """
    console = Console(quiet=False, data_on_stdout=data_on_stdout)
    while True:
        console.say("Looking for servers on the local network ...")
        servers = find_servers(mode)
        if not servers:
            raise SocketPairError(
                f"no server {f'in {mode} mode ' if mode else ''}announces itself here: start one "
                f"with python server.py {mode or 'file'} --host 0.0.0.0, or use --host"
            )
        choices = {str(number): server for number, server in enumerate(servers[:MAX_SHOWN], 1)}
        for number, server in choices.items():
            console.say(f"{number:>3}  {server.describe()}")
        if len(servers) > MAX_SHOWN:
            console.say(f"     and {len(servers) - MAX_SHOWN} more")
        answer = "?"
        while answer and answer not in choices:
            console.say(f"Type a number from 1 to {len(choices)}, or only Enter to look again.")
            answer = common.ask("Number: ", data_on_stdout).strip()
        if answer:
            return choices[answer]


# --- connection -----------------------------------------------------------------------------

OPEN_SERVER = (
    "this server takes no pairing code: anyone on the network could be it, or read along; "
    "add --open if you trust them all"
)


class FileChanged(SocketPairError):
    """A file is not what it was when it was offered."""

    def __init__(self) -> None:
        super().__init__("it changed while it was sent")


class NoServer(ConnectionLost):
    """Nobody answers at the server's address."""


class WrongCode(SocketPairError):
    """The server has another pairing code than we."""


class Address:
    """Where the server is, and what lets us in there.

    `code` is the pairing code, normalized; `open` does without, wherever the server is.
    """

    def __init__(self, host: str, port: int, code: str | None = None, open: bool = False) -> None:
        self.host = host
        self.port = port
        self.code = code
        self.open = open

    @functools.cached_property
    def tls(self) -> ssl.SSLContext | None:
        """What encrypts, if there is a code; the first use takes some tenths of a second."""
        return common.make_tls_context(self.code, server_side=False) if self.code else None

    def set_code(self, code: str) -> None:
        """Use another code from now on."""
        self.code = code
        self.__dict__.pop("tls", None)


def connect(
    address: Address,
    mode: str,
    *,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ask: Callable[[str], str] | None = None,
) -> tuple[Connection, Welcome]:
    """Return a connection past its handshake, and the server's welcome.

    Asks for the pairing code, with `ask` or `ask_for_code`, where the server wants one that we do
    not have, and there is a terminal to ask at; again, if the answer was wrong. Otherwise blocks
    for `timeout_s` for connecting and for 10 s for the handshake at most.

    Raises NoServer, ConnectionLost, ProtocolError where it is no Socket Pair server, WrongCode,
    PeerRefused, and SocketPairError where no code is wanted.
    """
    try:
        return connect_once(address, mode, timeout_s)
    except CodeWanted:
        if address.open or not sys.stdin.isatty():
            raise
    problem = ""
    while True:
        address.set_code((ask or ask_for_code)(problem))
        try:
            return connect_once(address, mode, timeout_s)
        except WrongCode as error:
            problem = str(error)


def ask_for_code(problem: str = "") -> str:
    """Ask for the pairing code until it can be one, after telling the `problem` with the last."""
    while True:
        if problem:
            complain(problem)
        try:
            return common.normalize_code(common.ask("Pairing code: "))
        except ValueError as error:
            problem = str(error)


def connect_once(address: Address, mode: str, timeout_s: float) -> tuple[Connection, Welcome]:
    """Do what `connect` does, with the code that we have."""
    tls = address.tls  # before the server's patience begins
    peer = escape(common.format_address(address.host, address.port))
    try:
        sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
    except (OSError, ValueError) as error:  # ValueError: a host that no name can be
        raise NoServer(describe_no_server(address, mode, error)) from error
    try:
        connection = Connection(sock, peer)
    except OSError as error:
        sock.close()
        raise ConnectionLost(f"{peer}: {describe_error(error)}") from error
    try:
        is_near = common.is_loopback(sock.getpeername()[0])
        welcome = shake_hands(connection, tls, mode)
        if not (tls or address.open or is_near):
            raise PeerRefused(OPEN_SERVER)
    except OSError as error:  # it has gone again
        connection.close()
        raise ConnectionLost(f"{peer}: {describe_error(error)}") from error
    except BaseException:
        connection.close()
        raise
    return connection, welcome


def describe_no_server(address: Address, mode: str, error: OSError | ValueError) -> str:
    """Return what may be the reason that nobody answers, and what to do about it."""
    host = escape(address.host)
    if isinstance(error, ValueError):
        return f"{host!r} cannot be a machine's name: check --host"
    if isinstance(error, socket.gaierror):
        return f"no machine is known as {host!r} ({describe_error(error)}): check --host"
    command = f"python server.py {mode}"
    if address.host not in ("localhost", "::1") and not address.host.startswith("127."):
        command += " --host 0.0.0.0"
    if address.port != common.DEFAULT_PORT:
        command += f" --port {address.port}"
    peer = common.format_address(host, address.port)
    return f"no server at {peer} ({describe_error(error)}): start one there with: {command}"


def shake_hands(connection: Connection, tls: ssl.SSLContext | None, mode: str) -> Welcome:
    """Return the server's welcome; blocks and raises as `connect` does."""
    try:
        with connection.limit(HANDSHAKE_TIMEOUT_S):
            if tls:
                connection.start_tls(tls, server_side=False)
            connection.send(Hello(common.PROTOCOL, mode))
            return connection.receive(Welcome)
    except NotPaired as error:
        failure = WrongCode if error.wrong_code else SocketPairError
        raise failure(f"{connection.peer} {describe_mismatch(error)}") from error
    except ProtocolError as error:
        raise ProtocolError(f"{connection.peer} is not a Socket Pair server: {error}") from None
    except ConnectionLost as error:
        raise ConnectionLost(f"{connection.peer}: {error} before it answered") from None


def describe_mismatch(error: NotPaired) -> str:
    """Return what is wrong between the server and our pairing code, to follow its address."""
    if error.wrong_code:
        return "has another pairing code"
    if error.alert == common.ALERT_OPEN:
        return f"takes no pairing code: leave out --code and {common.CODE_VARIABLE}, or add --open"
    if error.alert == common.ALERT_WAIT:
        return "has had too many wrong pairing codes from this address: try again in a minute"
    return f"is not a Socket Pair server with a pairing code: {error}"


# --- sources --------------------------------------------------------------------------------

# Half of what a frame may hold, as JSON may need two characters for one.
MAX_BATCH_CHARS = common.MAX_FRAME_BYTES // 2
ENTRY_CHARS = 100  # of an offered entry, beside its path
STDIN = "-"


class Source:
    """A file or folder to send: where it is here, how it is offered, and what is known of it.

    `name` has "/" between folders. A `size` of None is unknown until it ends (standard input).
    """

    def __init__(  # noqa: PLR0913  (what an offer says of a file)
        self,
        path: str,
        name: str,
        size: int | None = None,
        mtime_ns: int | None = None,
        *,
        executable: bool = False,
        is_folder: bool = False,
    ) -> None:
        self.path = path
        self.name = name
        self.size = size
        self.mtime_ns = mtime_ns
        self.executable = executable
        self.is_folder = is_folder
        self.found: os.stat_result | None = None
        self.digests: dict[int, hashlib._Hash] = {}  # of so many first bytes
        self.offset = 0  # of the first byte that the server needs
        self.checksum = ""  # SHA-256 of all of it, once it has been read
        self.begun = False  # reading it, for one that cannot be read twice
        self.problem = ""  # why it cannot be sent, found here
        self.decided = False  # by the server
        self.shown = 0  # how many of its bytes the bar of all files has counted

    @classmethod
    def from_stat(cls, path: str, name: str, found: os.stat_result) -> Source:
        """Return the source that a file with these properties is."""
        executable = bool(found.st_mode & stat.S_IXUSR) and sys.platform != "win32"
        source = cls(path, name, found.st_size, found.st_mtime_ns, executable=executable)
        source.found = found
        return source

    def beside(self, name: str) -> str:
        """Return the path at the server of what is called `name` in its place."""
        folder, slash, _ = self.name.rpartition("/")
        return folder + slash + name

    def to_entry(self) -> Entry:
        """Return it as an entry of an offer."""
        return Entry(self.name, self.size, self.mtime_ns, self.executable, self.is_folder)

    def check_unchanged(self, file: BinaryIO) -> None:
        """Raise FileChanged unless the open `file` is still as it was when it was looked up."""
        if self.found is None:
            return
        then, now = self.found, os.fstat(file.fileno())
        same = (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)
        # The time of its status tells of changes whose modification time was set back. It also
        # moves when another file takes the name, which does nothing to this one.
        if not same or (now.st_ctime_ns != then.st_ctime_ns and now.st_nlink == then.st_nlink):
            raise FileChanged


class Problem(Protocol):
    """Is told of what is not sent: its path, its name in an offer, why, and whether it failed."""

    def __call__(self, path: str, name: str, reason: str, is_failure: bool = True) -> object:
        """Take note of it."""


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
        elif is_real_folder(entry):
            below = f"{name}/{entry.name}"
            unfinished.append((entry.path, below, iter(list_folder(entry.path, below, on_problem))))
        else:
            yield from look_at(entry, f"{name}/{entry.name}", on_problem)


def is_real_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether `entry` is a folder, not a link to one, nor Windows' junction."""
    with contextlib.suppress(OSError):  # look_at will say it
        is_junction = getattr(entry, "is_junction", bool)  # from Python 3.12 on
        return entry.is_dir(follow_symlinks=False) and not is_junction()
    return False


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
        on_problem(entry.path, name, "a link to a folder, not followed", False)
    else:
        on_problem(entry.path, name, "not a file or a folder")


def in_batches(sources: Iterable[Source]) -> Iterator[list[Source]]:
    """Yield `sources` in lists that fit an offer."""
    batch: list[Source] = []
    chars = 0
    for source in sources:
        # What can be printed in ASCII takes one or two characters of JSON, anything else up to 12.
        plain = source.name.isascii() and source.name.isprintable()
        needed = ENTRY_CHARS + len(source.name) * (1 if plain else 12)
        if batch and (len(batch) == common.MAX_BATCH_ENTRIES or chars + needed > MAX_BATCH_CHARS):
            yield batch
            batch, chars = [], 0
        batch.append(source)
        chars += needed
    if batch:
        yield batch


# --- progress -------------------------------------------------------------------------------

LARGE_FILE_BYTES = 64 * 1024 * 1024


class Progress:
    """Bars with speed and time left: one for each large file, and one for all of many files.

    Draws nothing unless `shown`. Lines for people go through it, as a bar would be torn by them.
    """

    def __init__(self, sources: Callable[[], Iterable[Source]], shown: bool) -> None:
        self._tqdm = find_tqdm() if shown else None
        self._sources = sources
        self._all: tqdm[Any] | None = None
        self._file: tqdm[Any] | None = None

    def begin(self) -> None:
        """Show the bar of all files, now that a server takes them and nothing is to be asked."""
        if self._tqdm:
            sizes = [source.size or 0 for source in self._sources() if not source.is_folder]
            if len(sizes) > 1:
                self._all = self._bar(f"{len(sizes)} files", sum(sizes), leave=False)

    def _bar(self, label: str, total: int | None, **options: Any) -> tqdm[Any]:
        assert self._tqdm is not None
        return self._tqdm(
            total=total, desc=label, unit="B", unit_scale=True, dynamic_ncols=True, **options
        )

    def start(self, source: Source) -> None:
        """Begin with a file, at its offset."""
        large = source.size is None or source.size >= LARGE_FILE_BYTES
        if self._tqdm and (large or self._all is None):
            label = escape(source.name, 40)
            alone = self._all is None
            self._file = self._bar(label, source.size, initial=source.offset, leave=alone)
        self.reach(source, source.offset)

    def reach(self, source: Source, done: int) -> None:
        """Show that the first `done` bytes of a file are at the server, or on their way."""
        if self._file is not None:
            self._file.update(done - self._file.n)
        if self._all is not None:
            self._all.update(done - source.shown)
            source.shown = done

    def finish(self) -> None:
        """Be done with a file."""
        if self._file is not None:  # a bar without a total has no truth value
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Take the bars down, or leave their last state, as a terminal's lines."""
        self.finish()
        if self._all is not None:
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
        complain(f"no progress bars without tqdm: {common.how_to_install('tqdm')}")
        return None
    return tqdm


# --- results --------------------------------------------------------------------------------

ALREADY = "Already there"


class FolderTally:
    """What has become of what is in a folder that was named."""

    files = 0
    bytes = 0
    already = 0
    failed = 0


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

    def problem(self, path: str, name: str, reason: str, is_failure: bool = True) -> None:
        """Report what was not sent, or was not saved: its path, its offered name, and why."""
        self.failed += is_failure
        if "/" in name:
            self._tally(name).failed += is_failure
        self._progress.complain(f"{escape(name if path == STDIN else path)}: {reason}")

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
            tally.already += how == ALREADY
        if not self._quiet and (named or self._verbose or name != source.name):
            self._progress.say(
                f"{how} as {escape(name)}, SHA-256 matches ({source.checksum[:8]}...)"
            )

    def _folder_saved(self, source: Source, name: str) -> None:
        tally = self._folders.pop(source.name, FolderTally())
        if self._quiet:
            return
        files = common.count(tally.files, "file")
        text = f"Saved {escape(name)}/ with {files} ({format_bytes(tally.bytes)})"
        if tally.files:
            text += ", every SHA-256 matches"
        if tally.already:
            text += f", {tally.already} there already"
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
            self._connection.wake()
        self._thread.join()
        if self._error is not None and (error is None or isinstance(error, ConnectionLost)):
            raise self._error

    def _run(self) -> None:
        try:
            while self._waiting:
                for index, outcome in self._receive().entries:
                    if index not in self._waiting:
                        raise ProtocolError("received a result of a file that was not sent")
                    settle(self._waiting.pop(index), outcome, self._report)
        except Exception as error:  # noqa: BLE001  (raised again in the other thread)
            self._error = error
            # The sending may wait for a server that takes nothing any more, and is told nothing.
            self._connection.wake()

    def _receive(self) -> Results:
        """Return the next results; waits as long as the sending goes on."""
        while True:
            sent_bytes = self._connection.sent_bytes
            try:
                return self._connection.receive(Results)
            except PeerStalled:
                if self._connection.sent_bytes == sent_bytes:
                    raise


def settle(source: Source, outcome: Outcome, report: Report) -> None:
    """Report what the server says has become of `source`. Raises ProtocolError."""
    source.decided = True
    if source.problem:
        report.problem(source.path, source.name, source.problem)
    elif outcome.kind == "failed":
        report.problem(source.path, source.name, escape(outcome.text))
    elif not (source.checksum or source.is_folder):
        raise ProtocolError("received a result of a file that was not read")
    else:
        how = ALREADY if outcome.kind == "already" else "Saved"
        report.saved(source, source.beside(outcome.text), how)


# --- file mode ------------------------------------------------------------------------------

RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
STILL_HERE_INTERVAL_S = common.PROGRESS_TIMEOUT_S / 4


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
    progress = Progress(
        lambda: find_sources(paths, name, lambda path, name, reason, is_failure=True: None), shown
    )
    report = Report(progress, quiet, verbose)
    sender = Sender(address, report, progress)
    try:
        sender.send(in_batches(find_sources(paths, name, report.problem)))
    except SocketPairError as error:
        progress.complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        progress.close()
        complain("\ninterrupted: the same command goes on from here" if sender.has_moved else "")
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
        self.has_moved = False  # anything, ever

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

    def _connect(self) -> Connection:
        """Return a new connection; one that was lost before may be refused for a while."""
        try:
            return connect(self._address, "file")[0]
        except SocketPairError as error:
            if self._was_connected and not isinstance(error, ConnectionLost):
                raise ConnectionLost(str(error)) from error
            raise

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._connect()
            if not self._was_connected:
                self._progress.begin()
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
            connection.send(Offer([source.to_entry() for source in batch]))
            self._offered = batch
        connection.flush()

    def _settle_or_want(
        self, batch: list[Source], verdicts: Sequence[int | Outcome]
    ) -> dict[int, Source]:
        """Report those that the server has decided on already; return the others by index."""
        wanted: dict[int, Source] = {}
        for index, (source, verdict) in enumerate(zip(batch, verdicts, strict=True)):
            if isinstance(verdict, Outcome):
                if verdict.kind == "already" and source.size not in source.digests:
                    raise ProtocolError("received a start of a file that was not compared")
                settle(source, verdict, self._report)
                self._progress.reach(source, source.size or 0)
                continue
            source.offset = verdict
            if source.offset and source.offset not in source.digests:
                raise ProtocolError("received an offset that was not asked about")
            if source.offset:
                self._report.resumed(source)
            wanted[index] = source
        return wanted

    def _receive_start(
        self, connection: Connection, batch: list[Source]
    ) -> Sequence[int | Outcome]:
        """Return the server's verdicts, after answering what it asks about what it holds."""
        while True:
            message = connection.receive(Start, Held, Hashing)
            if isinstance(message, Held):
                self._answer_held(connection, batch, message)
            elif isinstance(message, Start):
                if len(message.entries) != len(batch):
                    raise ProtocolError("received a start for another offer")
                return message.entries

    def _answer_held(self, connection: Connection, batch: list[Source], held: Held) -> None:
        keepalive = Keepalive(lambda: connection.send(Hashing()))
        answers = []
        for index, lengths in held.entries:
            if index >= len(batch) or batch[index].size is None:
                raise ProtocolError("received a held of what was not offered")
            hash_prefixes(batch[index], lengths, keepalive)
            answers.append([digest.hexdigest() for digest in batch[index].digests.values()])
        connection.send(Prefixes(answers))

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
        sent = source.offset
        with open_source(source) as file:
            source.check_unchanged(file)
            with blocks_for(source.size, digest.update) as blocks:
                for segment in read_segments(connection, source, file, blocks):
                    if source.decided:
                        raise SocketPairError("the server has failed it")
                    blocks.give(segment)  # is hashed while it is sent
                    connection.send_segment(segment)
                    sent += len(segment)
                    self._progress.reach(source, sent)
                    self._moved = self.has_moved = True
            source.check_unchanged(file)
        return digest


def hash_prefixes(source: Source, lengths: Sequence[int], keepalive: Keepalive) -> None:
    """Set the digests of the first `lengths` bytes of a file, read once; blocks until done.

    Leaves out those for which it cannot be read so far, and all where it changes meanwhile.
    """
    digests: dict[int, hashlib._Hash] = {}
    source.digests = digests
    digest, done = hashlib.sha256(), 0
    try:
        with open_source(source) as file:
            source.check_unchanged(file)
            with contextlib.suppress(FileShrunk):  # one held is longer
                for length in sorted(lengths):
                    source.checksum = calculate_checksum(
                        file.fileno(), length - done, digest=digest, on_progress=keepalive
                    )
                    digests[length], done = digest.copy(), length
            source.check_unchanged(file)
    except (OSError, FileChanged):  # sending it will say so
        digests.clear()


def open_source(source: Source) -> BinaryIO:
    """Open a file at its offset, or standard input, without buffer. Raises OSError."""
    if source.path == STDIN:
        source.begun = True
        return open(0, "rb", buffering=0, closefd=False)
    # Not to wait for a writer, should it have become a pipe meanwhile.
    descriptor = os.open(
        source.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    )
    try:
        return open(descriptor, "rb", buffering=0)
    except OSError:  # it is a folder by now
        os.close(descriptor)
        raise


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
            raise FileChanged
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


# --- sound: jitter buffer -------------------------------------------------------------------

# Beside the sound card's own buffers: measured with tests/bench/latency.py.
DEAD_ZONE_MS = 1.0
# Wherever in the dead zone the spare is, a block may come a whole read later than usual, as it
# does every few minutes on an idle machine.
MIN_TARGET_MS = common.PLAYBACK_BLOCK_MS + DEAD_ZONE_MS
MAX_TARGET_MS = 250.0
MAX_RAISE_MS = 10.0
RAISE_SPACING_MS = 500
START_PHASE_MS = 3_000
# Of the spare that nothing has used.
LOWERING_SHARE = 0.5
# The spare that has to remain unused all the time before the target is lowered.
RESERVE_MS = 2.5
ADAPTING_WINDOW_MS = 60_000
STEERING_WINDOW_MS = 500
# A frame in 1,000 more or less changes the pitch by a fifth of what can be heard (about 10
# cents, of 1,200 in an octave), and makes up for two clocks that differ by 1,000 ppm.
STEERING_SPACING_FRAMES = 1_000
STEP_SEARCH_FRAMES = 256
# A mean spare so far above the target, or a burst of so much, is not left to single frames.
JUMP_MS = 10.0
BURST_LIMIT_MS = 60.0
BUFFER_LIMIT_MS = 1_000
FADE_MS = 2.5
MAX_LATENCY_MS = 900


class PlayStatistics:
    """What has happened to the sound on its way through a jitter buffer."""

    played_frames = 0
    missed_frames = 0
    late_frames = 0
    dropped_frames = 0
    doubled_frames = 0
    dropouts = 0


class SpareWindow:
    """The spares seen during a span of played time: their mean and their lowest."""

    def __init__(self, length_frames: int) -> None:
        self._length_frames = length_frames
        self.clear()

    def clear(self) -> None:
        """Begin a new span."""
        self._seen_frames = 0
        self._weighted = 0
        self.lowest_frames = sys.maxsize

    def add(self, spare_frames: int, played_frames: int) -> bool:
        """Note the spare after `played_frames` more; return whether the span is complete."""
        self._seen_frames += played_frames
        self._weighted += spare_frames * played_frames
        self.lowest_frames = min(self.lowest_frames, spare_frames)
        return self._seen_frames >= self._length_frames

    @property
    def mean_frames(self) -> float:
        """The mean spare of the span."""
        return self._weighted / max(1, self._seen_frames)


class JitterBuffer:
    """Evens out the arrival of sound, so that it is played without a pause and soon.

    Whoever receives calls `write`, the sound card calls `read`. The buffer aims at a **spare**:
    the sound still there after a read. While the spare is near the target nothing is done to
    the sound. Two clocks that differ move it slowly: single frames dropped or doubled bring it
    back. A stall moves it far: what is late is thrown away in one go. A read that finds too
    little is a **dropout**, after which playing waits until the target is there again.

    Unless it is fixed, the target adapts: up by a step after a dropout, slowly down while the
    spare never gets low.

    Plain logic: no thread, no clock, no device, and no lock, which the caller has to hold. Time
    is counted in the frames that are read.
    """

    def __init__(self, audio: AudioFormat, fixed_target_ms: float | None = None) -> None:
        self.audio = audio
        self.statistics = PlayStatistics()
        start_ms = MIN_TARGET_MS if fixed_target_ms is None else fixed_target_ms
        self.target_frames = audio.frames_in(start_ms)
        self._target_is_fixed = fixed_target_ms is not None
        self._samples = bytearray()
        self._last_frame = audio.silence(1)
        self._block_frames = 0
        self._playing = False
        self._draining = False
        self._silent_frames = 0
        self._read_frames = 0
        self._raised_at_frames = audio.frames_in(START_PHASE_MS - RAISE_SPACING_MS)
        self._settling = True
        self._correction = 0
        self._uncorrected_frames = 0
        self._fade_frames = audio.frames_in(FADE_MS)
        self._jump_frames = audio.frames_in(JUMP_MS)
        self._dead_zone_frames = audio.frames_in(DEAD_ZONE_MS)
        self._burst_limit_frames = audio.frames_in(BURST_LIMIT_MS)
        self._limit_frames = audio.frames_in(BUFFER_LIMIT_MS)
        self._least_frames = audio.frames_in(MIN_TARGET_MS)
        self._reserve_frames = audio.frames_in(RESERVE_MS)
        self._steering = SpareWindow(audio.frames_in(STEERING_WINDOW_MS))
        self._adapting = SpareWindow(audio.frames_in(ADAPTING_WINDOW_MS))

    @property
    def fill_frames(self) -> int:
        """The sound that waits to be played."""
        return self.audio.frames_of(self._samples)

    def drain(self) -> None:
        """Play what is left, however little: no more will come."""
        self._draining = True

    # writing

    def write(self, samples: bytes, gap_frames: int = 0) -> None:
        """Add `samples` behind those before, of which `gap_frames` were missed in between.

        Keeps at most ``BUFFER_LIMIT_MS``, also while nobody reads.
        """
        if gap_frames > 0:
            self.statistics.missed_frames += gap_frames
            self._fade_out(gap_frames)
            samples = self._fade_in(samples)
        if samples:
            self._block_frames = self.audio.frames_of(samples)
            self._samples += self._steer(samples)
        self._throw_away(self.fill_frames - self._limit_frames)

    def _fade_out(self, gap_frames: int) -> None:
        """Lead what is buffered into silence, as much as the target and a fade need.

        Silence as long as the gap would keep the delay as it was. But where the gap was heard
        as a dropout already, or late sound waits, that would come on top.
        """
        if self._playing:
            short_frames = self.target_frames - self.fill_frames
            before = bytes(self._samples[-self.audio.frame_bytes :]) or self._last_frame
            self._samples += self._ramp_down(
                before, min(gap_frames, max(self._fade_frames, short_frames))
            )

    def _fade_in(self, samples: bytes) -> bytes:
        return cross_fade(self.audio, bytes(len(samples)), samples)

    def _ramp_down(self, frame: bytes, frames: int) -> bytes:
        """Return `frames` that lead from the level of `frame` to silence."""
        return cross_fade(self.audio, frame * frames, self.audio.silence(frames))

    def _steer(self, samples: bytes) -> bytes:
        """Return `samples` with one frame dropped or doubled where that is due."""
        frames = self.audio.frames_of(samples)
        self._uncorrected_frames += frames
        if not self._correction or self._uncorrected_frames < STEERING_SPACING_FRAMES:
            return samples
        self._uncorrected_frames = 0
        frame_bytes = self.audio.frame_bytes
        place = quietest_step(self.audio, samples) * frame_bytes
        if self._correction < 0:
            self.statistics.dropped_frames += 1
            return samples[:place] + samples[place + frame_bytes :]
        self.statistics.doubled_frames += 1
        return samples[: place + frame_bytes] + samples[place:]

    # reading

    def lacks(self, frames: int) -> bool:
        """Tell whether a read of `frames` would be a dropout."""
        return self._playing and not self._draining and self.fill_frames < frames

    def read(self, frames: int) -> bytes:
        """Return exactly `frames` to play now, silence where there is nothing."""
        self._read_frames += frames
        if not self._playing and not self._start(frames):
            self._silent_frames += frames
            return self.audio.silence(frames)
        self._catch_up(frames)
        played = self._take(frames)
        missing_frames = frames - self.audio.frames_of(played)
        if missing_frames:
            return played + self._drop_out(missing_frames)
        self._observe(self.fill_frames, frames)
        return played

    def _start(self, frames: int) -> bool:
        """Begin to play if the target is there besides `frames`; return whether it is."""
        spare_frames = self.fill_frames - frames - self.target_frames
        if spare_frames < 0 and not (self._draining and self._samples):
            return False
        if self.statistics.dropouts:
            self._raise_target()
        self._throw_away(spare_frames)
        self._samples[:] = self._fade_in(bytes(self._samples))
        self._playing = True
        self._settling = True
        self._correction = 0
        self._steering.clear()
        self._adapting.clear()
        return True

    def _catch_up(self, frames: int) -> None:
        """Go back to the target at once where a burst has brought far more than that."""
        excess_frames = self.fill_frames - frames - self.target_frames
        if excess_frames > self._burst_limit_frames:
            self._throw_away(excess_frames)
            self._steering.clear()

    def _take(self, frames: int) -> bytes:
        """Return up to `frames` from the buffer's beginning, as played."""
        size = frames * self.audio.frame_bytes
        taken = bytes(self._samples[:size])
        del self._samples[:size]
        if taken:
            self._last_frame = taken[-self.audio.frame_bytes :]
            self.statistics.played_frames += self.audio.frames_of(taken)
        return taken

    def _drop_out(self, missing_frames: int) -> bytes:
        """Return the rest of a read that found too little: what was heard last, fading out."""
        self._playing = False
        self._silent_frames = missing_frames
        if not self._draining:
            self.statistics.dropouts += 1
        return self._ramp_down(self._last_frame, missing_frames)

    def _throw_away(self, frames: int) -> None:
        """Leave out the oldest `frames`, if any, going over smoothly to what follows them."""
        if frames <= 0:
            return
        self.statistics.late_frames += frames
        frame_bytes = self.audio.frame_bytes
        old = bytes(self._samples[: self._fade_frames * frame_bytes])
        del self._samples[: frames * frame_bytes]
        new = bytes(self._samples[: len(old)])
        self._samples[: len(new)] = cross_fade(self.audio, old[: len(new)], new)

    # steering and adapting

    def _observe(self, spare_frames: int, frames: int) -> None:
        """Learn from the spare after a read what to correct, and where the target should be."""
        if self._steering.add(spare_frames, frames):
            self._correct(self._steering.mean_frames - self.target_frames)
            self._steering.clear()
        if self._adapting.add(spare_frames, frames):
            self._lower_target(self._adapting.lowest_frames)
            self._adapting.clear()

    def _correct(self, error_frames: float) -> None:
        """Bring the spare back by its mean error: at once if large, frame by frame if small.

        A sound card may take several blocks at once when it starts: only after that is it known
        how far from the target playing began, so that the first error is always put right.
        """
        if error_frames > self._jump_frames or self._settling:
            self._throw_away(min(round(error_frames), self.fill_frames))
            self._hold_back(round(-error_frames))
            error_frames = 0
        self._settling = False
        in_place = abs(error_frames) <= self._dead_zone_frames
        self._correction = 0 if in_place else -1 if error_frames > 0 else 1

    def _hold_back(self, frames: int) -> None:
        """Put `frames` of silence, if any, before what is buffered, with a fade on either side."""
        if frames > 0:
            following = self._fade_in(bytes(self._samples))
            self._samples[:] = self._ramp_down(self._last_frame, frames) + following

    def _raise_target(self) -> None:
        """Keep more from now on, if that would have prevented the silence that just ended.

        Dropouts in quick succession have one cause, and those at the very start another one: the
        sound system has yet to find its own pace.
        """
        most_frames = self.audio.frames_in(MAX_TARGET_MS)
        is_new = self._read_frames - self._raised_at_frames >= self.audio.frames_in(
            RAISE_SPACING_MS
        )
        if is_new and not self._target_is_fixed and self._silent_frames <= most_frames:
            self._raised_at_frames = self._read_frames
            step_frames = min(self._silent_frames, self.audio.frames_in(MAX_RAISE_MS))
            self.target_frames = min(self.target_frames + step_frames, most_frames)

    def _lower_target(self, lowest_frames: int) -> None:
        """Keep a little less from now on, if some of the spare was never used.

        A block always remains: where two clocks differ, one comes a read later at some time.
        """
        unused_frames = lowest_frames - self._reserve_frames
        if not self._target_is_fixed and unused_frames > 0:
            least_frames = max(self._least_frames, self._block_frames + self._dead_zone_frames)
            lowered_frames = self.target_frames - math.ceil(unused_frames * LOWERING_SHARE)
            self.target_frames = min(self.target_frames, max(lowered_frames, least_frames))


def cross_fade(audio: AudioFormat, old: bytes, new: bytes) -> bytes:
    """Return `old` going over into `new`, of the same length, within ``FADE_MS`` at most."""
    fade_frames = min(audio.frames_in(FADE_MS), audio.frames_of(new))
    before, mixed = memoryview(old).cast("h"), array("h", new)
    for index in range(fade_frames * audio.channels):
        share = (index // audio.channels + 1) / (fade_frames + 1)
        mixed[index] = round(before[index] * (1 - share) + mixed[index] * share)
    return mixed.tobytes()


def quietest_step(audio: AudioFormat, samples: bytes) -> int:
    """Return the frame after which the sound changes least: one more or less is not heard there.

    Looks at the first ``STEP_SEARCH_FRAMES`` of `samples`, in which there is a frame at least.
    """
    channels = audio.channels
    values = memoryview(samples).cast("h")[: STEP_SEARCH_FRAMES * channels].tolist()
    steps = [abs(b - a) for a, b in zip(values, values[channels:], strict=False)]
    if channels > 1:
        steps = [sum(steps[i : i + channels]) for i in range(0, len(steps), channels)]
    return steps.index(min(steps)) if steps else 0


# --- sound: the server's clock ---------------------------------------------------------------

# In a burst, as the shortest of some round trips is the one with the least waiting in it.
BURST_REQUESTS = 16
BURST_TIMEOUT_S = 1.0
# Often at first, until the difference of the two clocks' speeds is known.
BURST_INTERVALS_S = (0.15, 0.15, 0.3, 0.3, 0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 5.0, 5.0)
STEADY_INTERVAL_S = 10.0
# Quartz clocks differ by some 50 ppm, and drift by a tenth of one in a minute as they get warm.
CLOCK_DRIFT = 100e-6
CLOCK_WANDER_PER_S = 2e-9
# Of the best round trip on an idle network: the scheduler, and what the two ways differ by.
STAMP_NOISE_S = 30e-6
# An exchange that is off by more than this, and than its round trip allows, is off for a reason:
# two such in a row tell that a clock has jumped, as that of a suspended machine does.
CLOCK_JUMP_S = 0.002


class TimeExchange(NamedTuple):
    """A request for the server's time and its answer, in seconds by the clock that was read."""

    asked_s: float
    received_s: float
    answered_s: float
    returned_s: float

    @property
    def round_trip_s(self) -> float:
        """How long request and reply were on their way together."""
        return (self.returned_s - self.asked_s) - (self.answered_s - self.received_s)

    @property
    def offset_s(self) -> float:
        """How far the server's clock is ahead, if both ways took the same time (RFC 5905)."""
        return (self.received_s - self.asked_s + self.answered_s - self.returned_s) / 2


def to_exchange(reply: TimeReply, returned_ns: int) -> TimeExchange:
    """Return the exchange that a `reply` completes which was received at `returned_ns`."""
    return TimeExchange(*(stamp_ns / 1e9 for stamp_ns in (*reply, returned_ns)))


class ServerClock:
    """The server's monotonic clock as this machine knows it: an offset, and how fast it changes.

    A Kalman filter of these two over bursts of requests, of each the exchange with the shortest
    round trip. Plain logic: the caller asks, and hands in the time. The receiving thread feeds it;
    `offset_at` is for any thread.
    """

    def __init__(self) -> None:
        self._burst: list[TimeExchange] = []
        self._intervals = iter(BURST_INTERVALS_S)
        self._requests_left = BURST_REQUESTS
        self._burst_end_s = self._next_burst_s = -math.inf
        self._shortest_s = math.inf  # round trip
        self._suspect_s = 0.0  # by how much the last burst was off, if by too much
        self.is_known = False  # whether there has been any exchange
        # Moment, offset and drift in one tuple, as other threads read it.
        self._state = (0.0, 0.0, 0.0)
        self._variances = (0.0, 0.0, 0.0)  # of the offset, both, the drift

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

    def take(self, exchange: TimeExchange) -> None:
        """Take the answer to a request."""
        self._burst.append(exchange)
        self._burst_end_s = max(self._burst_end_s, exchange.returned_s)
        if len(self._burst) == BURST_REQUESTS:
            self._finish_burst()

    def offset_at(self, now_s: float) -> float:
        """Return by how much the server's clock is ahead of this machine's at `now_s`.

        0 while that is not known.
        """
        moment_s, offset_s, drift = self._state
        return offset_s + drift * (now_s - moment_s)

    def _finish_burst(self) -> None:
        best = min(self._burst, key=lambda exchange: exchange.round_trip_s)
        self._burst = []
        self._shortest_s = min(self._shortest_s * 1.01, best.round_trip_s)
        excess_s = best.round_trip_s - self._shortest_s
        self._learn(best, noise_s=STAMP_NOISE_S + excess_s / 2)
        # At once after one that is off: the next one tells whether the clock has jumped.
        wait_s = 0.0 if self._suspect_s else next(self._intervals, STEADY_INTERVAL_S)
        self._burst_end_s = best.returned_s
        self._next_burst_s = best.returned_s + wait_s

    def _learn(self, exchange: TimeExchange, noise_s: float) -> None:
        moment_s = (exchange.asked_s + exchange.returned_s) / 2
        off_s = exchange.offset_s - self.offset_at(moment_s)
        if not self.is_known:
            self.is_known = True
            self._begin(moment_s, exchange.offset_s, 0.0, noise_s)
        elif self._has_jumped(off_s, exchange.round_trip_s):
            # The clocks' speeds are what they were.
            self._begin(moment_s, exchange.offset_s, self._state[2], noise_s)
        elif not self._suspect_s:
            self._update(moment_s, off_s, noise_s)

    def _begin(self, moment_s: float, offset_s: float, drift: float, noise_s: float) -> None:
        self._state = (moment_s, offset_s, drift)
        self._variances = (noise_s**2, 0.0, CLOCK_DRIFT**2)
        self._intervals = iter(BURST_INTERVALS_S)

    def _has_jumped(self, off_s: float, round_trip_s: float) -> bool:
        """Return whether two bursts in a row agree that the clock is elsewhere."""
        before_s, self._suspect_s = self._suspect_s, 0.0
        allowed_s = CLOCK_JUMP_S + round_trip_s / 2
        if abs(off_s) <= allowed_s:
            return False
        if before_s and abs(off_s - before_s) < allowed_s:
            return True
        self._suspect_s = off_s
        return False

    def _update(self, moment_s: float, off_s: float, noise_s: float) -> None:
        """Correct offset and drift by what an exchange shows, as far as it can be trusted."""
        then_s, offset_s, drift = self._state
        span_s = moment_s - then_s
        offset_var, both_var, drift_var = self._variances
        # Predict, then correct: the textbook's two-state filter, written out.
        offset_var += span_s * (2 * both_var + span_s * drift_var)
        both_var += span_s * drift_var
        drift_var += span_s * CLOCK_WANDER_PER_S**2
        total_var = offset_var + noise_s**2
        offset_gain, drift_gain = offset_var / total_var, both_var / total_var
        self._state = (
            moment_s,
            offset_s + drift * span_s + offset_gain * off_s,
            drift + drift_gain * off_s,
        )
        self._variances = (
            (1 - offset_gain) * offset_var,
            (1 - offset_gain) * both_var,
            drift_var - drift_gain * both_var,
        )


# --- sound: outputs -------------------------------------------------------------------------

STDOUT = "-"
DRAIN_LIMIT_S = 2.0
CARD_BUFFER_S = 0.15
# Of the sound card's own buffer, how much may go by before a dropout is accepted as one.
LATE_PATIENCE_S = 0.0025


class ReaderGone(SocketPairError):
    """Who read our standard output has closed it: nobody wants more."""


class Destination(Protocol):
    """Where the user wants the sound; found to be there before a server is."""

    def open(self, audio: AudioFormat) -> Output:
        """Return what takes sound of this format; raises SocketPairError where it cannot be had.

        Blocks while it is opened. The output before it has been closed.
        """

    def close(self) -> None:
        """Release what is held without an output. May be called twice."""


class Output(Protocol):
    """Takes received sound of one format."""

    def write(self, samples: bytes, gap_frames: int) -> None:
        """Take `samples`, before which `gap_frames` were missed."""

    def drain(self) -> None:
        """Let everything taken come out, at its own speed; blocks until it has."""

    def close(self) -> None:
        """Take no more. Raises SocketPairError where something taken did not come out."""

    def status(self) -> str:
        """Return a few words about now, for the status line."""

    def summary(self) -> str:
        """Return a few words about the whole, for the end."""


class Speaker:
    """A sound card, as a destination.

    The constructor starts PortAudio, which takes a while, and raises AudioUnavailable where
    there is no such loudspeaker.
    """

    def __init__(self, wanted: str | None, latency_ms: float | None, console: Console) -> None:
        self._latency_ms = latency_ms
        self._card = SoundCard(common.SPEAKER, wanted, console.complain)

    def open(self, audio: AudioFormat) -> SpeakerOutput:
        """Open the card; blocks for that."""
        return SpeakerOutput(self._card, JitterBuffer(audio, self._latency_ms))

    def close(self) -> None:
        """Close the card."""
        self._card.close()


class SpeakerOutput:
    """Plays through a sound card; PortAudio asks for each block when it needs it."""

    def __init__(self, card: SoundCard, buffer: JitterBuffer) -> None:
        self._card = card
        self._buffer = buffer
        self._exchanged = threading.Condition()  # guards it, and tells of what was written
        card.open(buffer.audio, self._exchange)

    def _exchange(self, _samples: bytes | None, frames: int, _ahead_s: float) -> bytes:
        """Return the next `frames`; PortAudio's thread calls this.

        Where they are not there, it waits a moment: what holds up all of the machine has the
        sound card ask for several blocks at once, often just before the sound comes that was
        held up as well.
        """
        with self._exchanged:
            self._exchanged.wait_for(lambda: not self._buffer.lacks(frames), LATE_PATIENCE_S)
            return self._buffer.read(frames)

    def write(self, samples: bytes, gap_frames: int) -> None:
        """Hand over to the jitter buffer."""
        with self._exchanged:
            self._buffer.write(samples, gap_frames)
            self._exchanged.notify()

    def drain(self) -> None:
        """Play what is left, down to the last sample in the sound card's own buffer."""
        self._buffer.drain()
        deadline = Deadline(DRAIN_LIMIT_S)
        while self._buffer.fill_frames and deadline.remaining():
            time.sleep(common.PLAYBACK_BLOCK_MS / 1000)
        time.sleep(CARD_BUFFER_S)

    def close(self) -> None:
        """Close the card."""
        self._card.close()

    def status(self) -> str:
        """Return the buffer's fill and the dropouts so far."""
        fill_ms = self._buffer.audio.milliseconds(self._buffer.fill_frames)
        dropouts = count(self._buffer.statistics.dropouts, "dropout")
        return f"buffer {fill_ms:3.0f} ms  {dropouts}"

    def summary(self) -> str:
        """Return the dropouts so far, and what following the server's clock has taken."""
        seen = self._buffer.statistics
        return (
            f"{count(seen.dropouts, 'dropout')}, {count(seen.dropped_frames, 'frame')} dropped "
            f"and {seen.doubled_frames} doubled"
        )


# --- sound: recordings ----------------------------------------------------------------------

RECORDING_QUEUE_BYTES = 32 * 1024 * 1024  # five minutes of 48 kHz mono
RECORDING_CLOSE_S = 10.0
MAX_RECORDINGS = 1_000  # of one name: the parts of a server's sound that changes its format
WAV_LIMIT_BYTES = 2**32 - 1
WAV_HEADER_BYTES = 44
OPUS_RATE = 48_000
OPUS_BITS_PER_S = 64_000  # and half of it more for each channel
# What FFmpeg calls so many channels, in the order of a WAV file's.
LAYOUTS = ("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1")
# Names that end so are meant as files, of a kind that is not written.
OTHER_ENDINGS = (
    *(".mp3", ".ogg", ".oga", ".m4a", ".aac", ".mp4", ".aif", ".aiff", ".wave", ".w64", ".wma"),
    *(".raw", ".pcm", ".au", ".caf", ".webm", ".mka"),
)


Written = TypeVar("Written")


class Create(Protocol):
    """Makes a new file for a `Writer`: `RecordingFiles.create`."""

    def __call__(self, begin: Callable[[BinaryIO], Written]) -> Written:
        """Return what `begin` returns, which writes the beginning of the file."""


class Writer(Protocol):
    """Writes sound of one format somewhere; every method raises SocketPairError if it cannot."""

    def write(self, samples: bytes) -> None:
        """Write all of `samples`; blocks until they are taken."""

    def close(self) -> None:
        """Finish what was written."""


class Missed:
    """How much sound a destination has not got, over all its outputs."""

    def __init__(self) -> None:
        self.milliseconds = 0.0

    def describe(self) -> str:
        """Return it in words, nothing where there was none."""
        return f"missed {self.milliseconds:.0f} ms" if self.milliseconds else ""


class RecordingOutput:
    """Writes every frame as it was captured, from a thread of its own; gaps become silence.

    A slow disk or reader is waited for, after ``RECORDING_QUEUE_BYTES`` have gathered. Ctrl+C
    may come at any moment in the thread that hands over the sound: it cannot break a
    SimpleQueue, but it can a Queue.
    """

    def __init__(self, writer: Writer, audio: AudioFormat, missed: Missed) -> None:
        self._writer = writer
        self._audio = audio
        self._missed = missed
        self._blocks: queue.SimpleQueue[tuple[bytes, int] | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[int] = queue.SimpleQueue()  # bytes of each block that was
        self._waiting_bytes = 0
        self._error: SocketPairError | None = None
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()

    def write(self, samples: bytes, gap_frames: int) -> None:
        """Queue `samples`; blocks while too much waits. Raises what writing earlier ones did."""
        if self._error:
            raise self._error
        while self._waiting_bytes > RECORDING_QUEUE_BYTES or not self._written.empty():
            self._waiting_bytes -= self._written.get()
        self._blocks.put((samples, gap_frames))
        self._waiting_bytes += len(samples)

    def _run(self) -> None:
        while (block := self._blocks.get()) is not None:
            try:
                if not self._error:
                    self._write(*block)
            except SocketPairError as error:
                self._error = error
            finally:
                self._written.put(len(block[0]))

    def _write(self, samples: bytes, gap_frames: int) -> None:
        self._missed.milliseconds += self._audio.milliseconds(gap_frames)
        while gap_frames > 0:
            frames = min(gap_frames, self._audio.rate)
            self._writer.write(self._audio.silence(frames))
            gap_frames -= frames
        self._writer.write(samples)

    def drain(self) -> None:
        """Nothing to do: `close` writes what is queued."""

    def close(self) -> None:
        """Write what is queued, and finish the file. Raises SocketPairError."""
        self._blocks.put(None)
        self._thread.join(RECORDING_CLOSE_S)
        if self._thread.is_alive():  # the reader of a pipe has stopped to read, say
            raise SocketPairError("the last of the sound could not be written")
        try:
            self._writer.close()
        finally:
            if self._error:
                raise self._error

    def status(self) -> str:
        """Return how much was missed so far."""
        return self._missed.describe()

    def summary(self) -> str:
        """Return the same once more."""
        return self.status()


class RecordingFiles:
    """Files that sound is recorded into, as a destination: the first as it was named.

    A file that is there already stays: ``talk.wav`` becomes ``talk (1).wav``. So do the next
    files, which follow when one is full, or the server came back in another format. Raises
    SocketPairError where there can be no such file.
    """

    def __init__(self, path: str, console: Console) -> None:
        self._path = os.path.expanduser(path)
        self._console = console
        self._missed = Missed()
        self._writer = find_writer(path)
        if not os.path.isdir(os.path.dirname(self._path) or "."):
            raise SocketPairError(f"cannot record into {escape(path)}: there is no such folder")

    def open(self, audio: AudioFormat) -> RecordingOutput:
        """Return an output into the next file."""
        return RecordingOutput(self._writer(self.create, audio), audio, self._missed)

    def create(self, begin: Callable[[BinaryIO], Written]) -> Written:
        """Make the next file, of which `begin` writes the beginning; return what `begin` does.

        Raises SocketPairError.
        """
        stem, ending = os.path.splitext(self._path)
        for number in range(MAX_RECORDINGS):
            path = f"{stem} ({number}){ending}" if number else self._path
            with contextlib.suppress(FileExistsError), told_as_recording():
                written = create_file(path, begin)
                self._console.say(f"Recording into {escape(path)}")
                return written
        shown = escape(self._path)
        raise SocketPairError(f"there are {MAX_RECORDINGS:,} recordings {shown}: give another name")

    def close(self) -> None:
        """Nothing to do: each output closes its file."""


def create_file(path: str, begin: Callable[[BinaryIO], Written]) -> Written:
    """Make a file that has its beginning, written by `begin`, before it has its name.

    Whatever happens to this process, no file of that name is empty, but on Windows. Raises
    FileExistsError where there is one, and OSError.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    if sys.platform == "win32":
        return begin(open(path, "xb"))
    hidden = os.path.join(os.path.dirname(path), f".recording-{os.urandom(6).hex()}")
    try:
        written = begin(open(hidden, "xb"))  # noqa: SIM115 - the writer's from now on
        give_name(hidden, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden)
    return written


def give_name(hidden: str, path: str) -> None:
    """Give a file its name, unless that is another's: raises FileExistsError."""
    try:
        os.link(hidden, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        open(path, "xb").close()
        os.replace(hidden, path)


@contextlib.contextmanager
def told_as_recording() -> Iterator[None]:
    """Raise an OSError as the SocketPairError that its user reads, but for FileExistsError."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise SocketPairError(f"cannot record: {describe_error(error)}") from error


class WavWriter:
    """Writes a WAV file that is valid after every write, and the next where one is full."""

    def __init__(self, create: Create, audio: AudioFormat) -> None:
        self._create = create
        self._audio = audio
        self._open_next()

    def _open_next(self) -> None:
        self._file, self._wav = self._create(self._begin)
        # The sizes in a WAV file have 32 bits.
        self._room_frames = (WAV_LIMIT_BYTES - WAV_HEADER_BYTES) // self._audio.frame_bytes

    def _begin(self, file: BinaryIO) -> tuple[BinaryIO, wave.Wave_write]:
        import wave  # noqa: PLC0415  (only recordings need it)

        wav = wave.open(file, "wb")  # noqa: SIM115 - open as long as we are
        wav.setparams((self._audio.channels, common.SAMPLE_BYTES, self._audio.rate, 0, "NONE", ""))
        wav.writeframes(b"")
        file.flush()
        return file, wav

    def write(self, samples: bytes) -> None:
        """Write all of `samples`, and only then count them in the header."""
        while samples:
            if not self._room_frames:
                self.close()
                self._open_next()
            part = samples[: self._room_frames * self._audio.frame_bytes]
            with told_as_recording():
                self._wav.writeframes(part)
            self._room_frames -= self._audio.frames_of(part)
            samples = samples[len(part) :]

    def close(self) -> None:
        """Close the file; it is complete."""
        with told_as_recording(), self._file:
            self._wav.close()


class EncodedWriter:
    """Writes FLAC or Opus by package ``av``, valid up to the last second at any moment."""

    container: str
    codec: str
    options: Mapping[str, str] = {"flush_packets": "1"}

    def __init__(self, create: Create, audio: AudioFormat) -> None:
        if audio.channels > len(LAYOUTS):
            raise SocketPairError(f"{self.container} cannot hold {audio.describe()}: record .wav")
        self._audio = audio
        self._layout = LAYOUTS[audio.channels - 1]
        self._file, self._container, self._stream = create(self._begin)

    def _begin(self, file: BinaryIO) -> tuple[BinaryIO, Any, Any]:
        import av  # noqa: PLC0415  (only such recordings need it)

        self._av = av
        container = av.open(file, "w", format=self.container, options=dict(self.options))
        stream = self.add_stream(container)
        container.start_encoding()
        file.flush()
        return file, container, stream

    def add_stream(self, container: Any) -> Any:
        """Return the stream of `container` that takes the sound."""
        return container.add_stream(self.codec, rate=self._audio.rate, layout=self._layout)

    def write(self, samples: bytes) -> None:
        """Encode `samples`; what is complete of it is written."""
        if samples:
            frame = self._av.AudioFrame("s16", self._layout, self._audio.frames_of(samples))
            frame.planes[0].update(samples)
            frame.sample_rate, frame.pts = self._audio.rate, None
            self._encode(frame)

    def _encode(self, frame: Any) -> None:
        with self._told():
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
            self._file.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        with told_as_recording():
            try:
                yield
            except self._av.error.FFmpegError as error:
                raise SocketPairError(f"cannot record: {error.strerror or error}") from error

    def close(self) -> None:
        """Write what is left, and how much there is in all."""
        with self._told(), self._file:
            self._encode(None)
            self._container.close()


class FlacWriter(EncodedWriter):
    """Writes FLAC: every sample, in about half of the room."""

    container = codec = "flac"


class OpusWriter(EncodedWriter):
    """Writes Opus, in a tenth of the room; at 48,000 Hz, which all else is converted to."""

    container, codec = "opus", "libopus"
    options: Mapping[str, str] = {"flush_packets": "1", "page_duration": "500000"}

    def add_stream(self, container: Any) -> Any:
        """Return the stream that takes the sound."""
        stream = container.add_stream(self.codec, rate=OPUS_RATE, layout=self._layout)
        stream.bit_rate = OPUS_BITS_PER_S * (1 + self._audio.channels) // 2
        return stream


WRITERS: Mapping[str, Callable[[Create, AudioFormat], Writer]] = {
    ".wav": WavWriter,
    ".flac": FlacWriter,
    ".opus": OpusWriter,
}


def find_writer(path: str) -> Callable[[Create, AudioFormat], Writer]:
    """Return what writes files with the ending of `path`; raises SocketPairError."""
    ending = os.path.splitext(path)[1].lower()
    if os.path.isdir(os.path.expanduser(path)):
        raise SocketPairError(f"cannot record into {escape(path)}: it is a folder")
    if ending not in WRITERS:
        raise SocketPairError(
            f"cannot record into {escape(path)}: only {', '.join(WRITERS)} are written"
        )
    if ending != ".wav":
        check_av(ending)
    return WRITERS[ending]


def check_av(ending: str) -> None:
    """Raise SocketPairError without package ``av``, which writes files of that ending."""
    try:
        import av  # noqa: F401, PLC0415  (only such recordings need it)
    except ImportError:
        advice = common.how_to_install("av")
        raise SocketPairError(f"{ending} needs package av: {advice} (.wav does not)") from None


class Pipe:
    """Standard output, as a destination. Raises SocketPairError where it takes no sound."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise SocketPairError("cannot write to standard output: it is closed")
        if sys.stdout.isatty():
            raise SocketPairError(
                "--output - is for another program or a file, not for a terminal: add | or >"
            )
        self._missed = Missed()
        self._has_sound = False

    def open(self, audio: AudioFormat) -> RecordingOutput:
        """Return the output, the one and only: nothing in a pipe would tell of another format."""
        if self._has_sound:
            raise SocketPairError(
                f"the server's sound is now {audio.describe()}, which ends it here"
            )
        self._has_sound = True
        return RecordingOutput(PipeWriter(), audio, self._missed)

    def close(self) -> None:
        """Nothing to do: standard output is not ours to close."""


class PipeWriter:
    """Writes raw samples to standard output."""

    def __init__(self) -> None:
        self._file = open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)  # noqa: SIM115

    def write(self, samples: bytes) -> None:
        """Write all of `samples`; blocks until the reader has taken them.

        Raises ReaderGone, SocketPairError.
        """
        try:
            write_all(self._file, samples)
        except BrokenPipeError as error:
            raise ReaderGone("standard output was closed") from error
        except OSError as error:
            reason = describe_error(error)
            raise SocketPairError(f"cannot write to standard output: {reason}") from error

    def close(self) -> None:
        """Nothing to do: standard output is not ours to close."""


def write_all(file: Any, data: bytes) -> None:
    """Write all of `data` to an unbuffered file; blocks. Raises OSError."""
    view = memoryview(data)
    while view:
        written = file.write(view)
        if written is None:  # whoever started us has made it non-blocking
            select.select([], [file], [])
        else:
            view = view[written:]


def find_destinations(
    output: str | None, record: str | None, latency_ms: float | None, console: Console
) -> Iterator[Destination]:
    """Give where ``--output`` and ``--record`` want the sound.

    Raises SocketPairError where one cannot be had.
    """
    if record == STDOUT:
        raise SocketPairError("--record takes a file: use --output - for standard output")
    if output == STDOUT:
        yield Pipe()
    elif output is not None and output.lower().endswith((*WRITERS, *OTHER_ENDINGS)):
        yield RecordingFiles(output, console)
    else:
        yield Speaker(output, latency_ms, console)
    if record is not None:
        yield RecordingFiles(record, console)


# --- sound: listening -----------------------------------------------------------------------

FOREVER_S = 1e9
RECONNECT_WAIT_S = 0.5
# While a cable is out an attempt goes nowhere: let there soon be another.
RECONNECT_TIMEOUT_S = 1.5
MAX_GAP_MS = 3_600_000


class Timeline:
    """Follows the numbers of the server's frames, over lost connections too."""

    def __init__(self) -> None:
        self._stream = ""
        self._next_frame: int | None = None

    def begin(self, stream: str) -> None:
        """Go on in the server's `stream`; another than before is counted from its first block."""
        if stream != self._stream:
            self._stream, self._next_frame = stream, None

    def advance(self, block: AudioBlock, audio: AudioFormat) -> int:
        """Return how many frames were missed before `block`, and go behind it.

        Raises ProtocolError where the numbers go back. After more than ``MAX_GAP_MS`` the sound
        begins anew.
        """
        expected = block.first_frame if self._next_frame is None else self._next_frame
        gap_frames = block.first_frame - expected
        if gap_frames < 0:
            raise ProtocolError("received sound that was sent before")
        if gap_frames > audio.frames_in(MAX_GAP_MS):
            gap_frames = 0
        self._next_frame = block.first_frame + audio.frames_of(block.samples)
        return gap_frames


class Listening:
    """One run of the client: connects, receives, and comes back, until it is to end."""

    def __init__(
        self,
        address: Address,
        destinations: list[Destination],
        seconds: float | None,
        console: Console,
    ) -> None:
        self._address = address
        self._destinations = destinations
        self.outputs: list[Output] = []
        self.heard_s = 0.0  # received, with its gaps
        self._seconds = FOREVER_S if seconds is None else seconds
        self._deadline = Deadline(self._seconds)
        self._console = console
        self._timeline = Timeline()
        self._audio: AudioFormat | None = None
        self._latest_samples = b""
        self._problem_told = False

    def run(self) -> None:
        """Listen until the sound or ``--seconds`` end; comes back to a server that was lost.

        Raises SocketPairError where that would not help.
        """
        while self._deadline.remaining():
            try:
                connection, welcome = self._connect()
                with connection:
                    self._listen(connection, welcome)
                return
            except ConnectionLost as error:
                self._wait_for_server(error)
        if self._audio is None:
            raise SocketPairError("no server was found in the time given")

    def _connect(self) -> tuple[Connection, Welcome]:
        timeout_s = HANDSHAKE_TIMEOUT_S if self._audio is None else RECONNECT_TIMEOUT_S
        return connect(self._address, "audio", timeout_s=timeout_s, ask=self._ask_for_code)

    def _ask_for_code(self, problem: str) -> str:
        with self._console.without_status():
            return ask_for_code(problem)

    def _wait_for_server(self, error: ConnectionLost) -> None:
        """Say once that there is no server, and leave it a little time to come back."""
        if self._audio is None and isinstance(error.__cause__, socket.gaierror):
            raise SocketPairError(str(error)) from None
        self._latest_samples = b""
        if not self._problem_told:
            self._console.complain(f"{error} - looking for it until Ctrl+C")
            self._problem_told = True
        time.sleep(min(RECONNECT_WAIT_S, self._deadline.remaining()))

    def _listen(self, connection: Connection, welcome: Welcome) -> None:
        """Pass on the sound of one connection; returns when it has ended, or is enough."""
        if welcome.sound is None:
            raise ProtocolError(f"{connection.peer} has no sound")
        audio, stream, sync_ms = welcome.sound
        clock = ServerClock()
        self._timeline.begin(stream)
        self._open_outputs(audio)
        self._problem_told = False
        self._console.say(f"Listening to {connection.peer}, {audio.describe()} - Ctrl+C to stop")
        while not self._is_enough(audio):
            if sync_ms is not None and clock.wants_request(time.monotonic()):
                connection.send(TimeRequest(time.monotonic_ns()))
            received = connection.receive_sound(audio)
            if isinstance(received, TimeReply):
                clock.take(to_exchange(received, time.monotonic_ns()))
                continue
            if isinstance(received, StreamEnd):
                self._console.say(f"The sound has ended: {received.reason}")
                return
            self._pass_on(received, audio)

    def _open_outputs(self, audio: AudioFormat) -> None:
        """Have outputs for this format; those for another are closed first."""
        if audio != self._audio:
            for output in self.outputs:
                output.close()
            self.outputs = []
            self._audio = audio
            for destination in self._destinations:
                self.outputs.append(destination.open(audio))

    def _is_enough(self, audio: AudioFormat) -> bool:
        """Return whether ``--seconds`` have been heard, or have gone by in silence."""
        is_silent = not self._latest_samples and not self._deadline.remaining()
        return is_silent or not self._wanted_frames(audio)

    def _wanted_frames(self, audio: AudioFormat) -> int:
        """Return how much is left of ``--seconds``."""
        return max(0, round((self._seconds - self.heard_s) * audio.rate))

    def _pass_on(self, block: AudioBlock, audio: AudioFormat) -> None:
        """Give a block to the outputs, up to the last frame that is wanted."""
        wanted_frames = self._wanted_frames(audio)
        gap_frames = min(self._timeline.advance(block, audio), wanted_frames)
        samples = block.samples[: (wanted_frames - gap_frames) * audio.frame_bytes]
        self.heard_s += (gap_frames + audio.frames_of(samples)) / audio.rate
        for output in self.outputs:
            output.write(samples, gap_frames)
        self._latest_samples = samples

    def show_status(self) -> None:
        """Keep the status line up to date; never returns."""
        meter = LevelMeter()
        while True:
            parts = [meter.show(self._latest_samples)]
            parts += [output.status() for output in self.outputs]
            self._console.show_status("  ".join([*parts, format_duration(self.heard_s)]))
            time.sleep(common.STATUS_INTERVAL_S)

    def summarize(self) -> str:
        """Return what has been heard, in a line."""
        parts = [output.summary() for output in self.outputs]
        return ", ".join([f"heard {format_duration(self.heard_s)}", *filter(None, parts)])


def start_audio_client(  # noqa: PLR0913 - the command line's options
    address: Address,
    *,
    output: str | None = None,
    record: str | None = None,
    latency_ms: float | None = None,
    seconds: float | None = None,
    quiet: bool = False,
) -> int:
    """Play or record a server's sound until it ends, `seconds` are over, or Ctrl+C.

    Blocks until then; a server that is not there is waited for. Returns the exit status, and
    has told the user whatever went wrong. See ``--help`` for `output` and `record`.
    """
    console = Console(quiet, data_on_stdout=output == STDOUT)
    destinations: list[Destination] = []
    listening = Listening(address, destinations, seconds, console)
    try:
        with contextlib.suppress(ReaderGone), closing_all(listening, destinations):
            destinations += find_destinations(output, record, latency_ms, console)
            threading.Thread(target=listening.show_status, name="status", daemon=True).start()
            listen_until_stopped(listening)
    except SocketPairError as error:
        console.end_status()
        console.complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        console.end_status()
        raise
    console.end_status()
    console.say(listening.summarize())
    return EXIT_OK


def listen_until_stopped(listening: Listening) -> None:
    """Listen, and let all come out; Ctrl+C is the usual way to stop once something was heard."""
    try:
        listening.run()
        for output in listening.outputs:
            output.drain()
    except KeyboardInterrupt:
        if not listening.heard_s:
            raise


@contextlib.contextmanager
def closing_all(listening: Listening, destinations: list[Destination]) -> Iterator[None]:
    """Close all outputs after the ``with`` block, and destinations, also where one fails."""
    with contextlib.ExitStack() as closing:
        try:
            yield
        finally:
            for destination in destinations:
                closing.callback(destination.close)
            for output in listening.outputs:
                closing.callback(output.close)


# --- command line ---------------------------------------------------------------------------

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
    "file": ["name"],
    "audio": ["output", "record", "latency", "seconds", "list_devices"],
}


def add_audio_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of audio mode."""
    sound = parser.add_argument_group("audio mode")
    sound.add_argument(
        "--output",
        type=common.device_name,
        metavar="SPEAKER",
        help="a loudspeaker's name or number, a file (.wav .flac .opus), or - for raw 16-bit PCM",
    )
    sound.add_argument(
        "--record", metavar="FILE", help="write it to a file as well: .wav, .flac or .opus"
    )
    sound.add_argument(
        "--latency",
        type=common.number(float, 0, MAX_LATENCY_MS),
        metavar="MS",
        help="keep so much sound in reserve, rather than what the network turns out to need",
    )
    sound.add_argument(
        "--seconds",
        type=common.number(float, 0.001, FOREVER_S),
        metavar="S",
        help="stop after S seconds",
    )
    sound.add_argument("--list-devices", action="store_true", help="show the loudspeakers and exit")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's arguments; exits with status 2 where they are wrong."""
    parser = common.make_parser("Send files to server.py, or play its sound.", EXAMPLES)
    common.add_address_arguments(parser, "where the server is")
    parser.add_argument(
        "--find", action="store_true", help="show the servers on the local network, to pick one"
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="files and folders, or - for standard input"
    )
    files = parser.add_argument_group("file mode")
    files.add_argument("--name", help="what standard input is to be called at the server")
    add_audio_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    common.refuse_other_mode(parser, args, MODE_OPTIONS)
    from_stdin = args.paths.count(STDIN)
    if args.paths and args.mode == "audio":
        parser.error("audio mode takes no PATH")
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
    if args.open:
        args.code = None  # the environment's
    return args


def ask_for_path() -> str:
    """Ask for a file's name until there is an answer; Tab completes it on a terminal."""
    if sys.stdin.isatty():
        complete_paths()
    while True:
        answer = common.ask("File name: ")
        if answer.strip() == STDIN:
            common.say("standard input needs a name: client.py file - --name NAME")
        elif answer.strip():
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
    common.take_signals()
    if args.find:
        found = pick_server(args.mode, data_on_stdout=args.output == STDOUT)
        args.mode, args.host, args.port = found.announced.mode, found.host, found.port
    mode = "audio" if args.list_devices else args.mode or common.ask_mode()
    if mode == "audio":
        with common.quiet_libraries(args.verbose):
            return listen(args)
    return start_file_client(
        Address(args.host, args.port, args.code, args.open),
        args.paths or [ask_for_path()],
        name=args.name,
        quiet=args.quiet,
        verbose=args.verbose,
    )


def listen(args: argparse.Namespace) -> int:
    """Run audio mode with the command line's arguments; return the exit status."""
    if args.list_devices:
        return common.list_devices(common.SPEAKER)
    return start_audio_client(
        Address(args.host, args.port, args.code, args.open),
        output=args.output,
        record=args.record,
        latency_ms=args.latency,
        seconds=args.seconds,
        quiet=args.quiet,
    )


if __name__ == "__main__":
    common.run(main)
