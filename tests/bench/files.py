"""How fast Socket Pair carries files, next to what people use today and what the machine can do.

Run by hand, from anywhere, on a quiet machine with 3 GiB of free disk:

    python tests/bench/files.py
    python tests/bench/files.py --only large --rounds 9 --dir /a/folder/on/the/disk/in/question

Three kinds of work, each of random bytes that are made once:

- large  one file of 1 GiB: Socket Pair, the same with a pairing code, rsync's daemon (-W), scp, cp,
         and a SHA-256 pass
- small  10,000 files of 4 KiB in 100 folders: Socket Pair, rsync's daemon (-a -W), scp -r, cp -r
- one    one file of 4 KiB: Socket Pair, and the bare start of Python with the modules it needs

Everything goes over loopback to servers of this run's own (ports, keys and configuration included).
The contenders take turns, in an order that moves on by one each round, so that a busy spell of the
machine falls on all of them. Timed is the whole command, as a user waits for it. Outside the timing
the destination is emptied, the disk's backlog written out, and memory for the copy brought in: a
virtual machine gives what is free back to its host within a second or two, and who then writes
1 GiB waits up to 3 s longer than who comes right after a deletion. What each contender's last run
left is compared with the source byte by byte, so that no broken transfer gets a figure. `scp -r`
runs once, as it takes longer than all the others together; `one` is over in a moment and has four
times the rounds.

A tool that is not installed is left out, and said to be. Where a file system lets two files share
their blocks (Btrfs, XFS), cp may copy nothing at all: choose another one with --dir.

On ext4 without a journal wait some minutes between runs with `small`: what the first has deleted
makes the second's files slow to create (see `empty`).

The exit status is 0 when everything was measured (whether the targets were met is for the reader to
see), 1 when something failed, 130 after Ctrl+C.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from proxy import HOST, free_port  # noqa: E402

KIB = 1024
MIB = 1024 * KIB
SMALL_SIZE = 4 * KIB
SMALL_FOLDERS = 100
ROUNDS_OF_ONE = 4
HASH_SAMPLE = 64 * MIB
SPARE_MEMORY = 256 * MIB
START_SECONDS = 10.0
STOP_SECONDS = 5.0
LOG_TAIL_LINES = 5

OURS = "ours"
PAIRED = "paired"
CODE = "KQ7M-2XFD-9WPA"
PYTHON_START = "import socket, ssl, argparse, hashlib, json"
HASH_WITH_PYTHON = """
import hashlib, sys
digest, block = hashlib.sha256(), bytearray(1 << 20)
with open(sys.argv[1], "rb", buffering=0) as file:
    while count := file.readinto(block):
        digest.update(memoryview(block)[:count])
"""


class BenchError(Exception):
    """What makes a measurement impossible, in words for the user."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the work: the command for an item, and the folder where its copy goes."""

    command: Callable[[Path], list[str]]
    folder: Path | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of work: the one item in the folder `source` is what every contender is given.

    It has `size` bytes, and is `amount` of work as `unit` counts it; `rounds` says who takes part,
    and how often.
    """

    heading: str
    source: Path
    size: int
    amount: float
    unit: str
    rounds: dict[str, int]

    @property
    def item(self) -> Path:
        """The one file or folder to be carried."""
        return next(self.source.iterdir())


@dataclass(frozen=True)
class Target:
    """The project's aim: at most `limit` times the slowest of the contenders in `against`."""

    kind: str
    against: tuple[str, ...]
    limit: float
    who: str = OURS


@dataclass
class Results:
    """The seconds of every run of one kind of work, by contender."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """Note one run."""
        self.seconds.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        """Return the middle one of a contender's runs."""
        return statistics.median(self.seconds[name])


TARGETS = (
    Target("large", ("rsync",), 1.0),
    Target("large", ("scp",), 1 / 3),
    Target("large", ("cp", "sha256"), 1.4),
    Target("large", ("scp",), 0.6, PAIRED),
    Target("large", (OURS,), 2.5, PAIRED),
    Target("small", ("rsync",), 1.2),
    Target("one", ("python",), 2.5),
)


def say(line: str) -> None:
    """Tell the waiting user how it goes; the results alone are on standard output."""
    print(line, file=sys.stderr, flush=True)


# Commands and servers


def runs_as_root() -> bool:
    """Tell whether this process may do anything (on Windows nobody is root)."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def find_program(name: str) -> str:
    """Return a program's full path; daemons are often outside a normal user's search path."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=places)
    if found is None:
        raise BenchError(f"{name} is not installed")
    return found


def failure(what: str, output: str) -> BenchError:
    """Put what went wrong together with the last words of the program that did."""
    return BenchError("\n  ".join([what, *output.splitlines()[-LOG_TAIL_LINES:]]))


def check(command: list[str]) -> None:
    """Run a command that has to succeed."""
    ended = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode:
        raise failure(f"{shlex.join(command)}: exit status {ended.returncode}", ended.stderr)


def seconds_of(command: list[str]) -> float:
    """Run a command that has to succeed and return how long it took."""
    start = time.perf_counter()
    check(command)
    return time.perf_counter() - start


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    """Return once the server accepts connections; raise if it never does."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, port), timeout=1).close()
            return
        time.sleep(0.02)
    raise BenchError(f"no server came up on port {port}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server, by force if it does not end by itself."""
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Have a server run in the background, out of reach of the terminal's Ctrl+C."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_port(port, server)
        yield
    finally:
        if server.poll() is not None:
            ended = f"{shlex.join(command)}: ended by itself, exit status {server.returncode}"
            say(str(failure(ended, log.read_text(errors="replace"))))
        stop(server)


# The kinds of work


def large(source: Path, options: argparse.Namespace) -> Kind:
    """Make one large file of random bytes."""
    size = options.large_mib * MIB
    with (source / "large.bin").open("wb") as file:
        for _ in range(options.large_mib):
            file.write(os.urandom(MIB))
    return Kind(
        heading=f"one file of {options.large_mib:,} MiB",
        source=source,
        size=size,
        amount=size / 1e6,
        unit="MB/s",
        rounds=dict.fromkeys((OURS, PAIRED, "rsync", "scp", "cp", "sha256"), options.rounds),
    )


def small(source: Path, options: argparse.Namespace) -> Kind:
    """Make a tree of many small files."""
    for number in range(options.small_count):
        folder = source / "tree" / f"folder{number % SMALL_FOLDERS:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{number:05}.bin").write_bytes(os.urandom(SMALL_SIZE))
    return Kind(
        heading=f"{options.small_count:,} files of {SMALL_SIZE // KIB} KiB",
        source=source,
        size=options.small_count * SMALL_SIZE,
        amount=options.small_count,
        unit="files/s",
        rounds=dict.fromkeys((OURS, "rsync", "scp", "cp"), options.rounds) | {"scp": 1},
    )


def one(source: Path, options: argparse.Namespace) -> Kind:
    """Make one small file."""
    (source / "one.bin").write_bytes(os.urandom(SMALL_SIZE))
    return Kind(
        heading=f"one file of {SMALL_SIZE // KIB} KiB",
        source=source,
        size=SMALL_SIZE,
        amount=1,
        unit="runs/s",
        rounds=dict.fromkeys((OURS, "python"), options.rounds * ROUNDS_OF_ONE),
    )


KINDS = {"large": large, "small": small, "one": one}


def make_kind(name: str, work: Path, options: argparse.Namespace) -> Kind:
    """Make the source data of one kind of work, in a folder of its own."""
    say(f"{name}: making the source data")
    source = work / "source" / name
    source.mkdir(parents=True)
    return KINDS[name](source, options)


# The contenders


def make_received(work: Path) -> Path:
    """Make the folder that a contender's copies go to."""
    folder = work / "received"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def start_ours(work: Path, *arguments: str) -> Iterator[Contender]:
    """Socket Pair, as it stands in this working copy, with the same arguments for both sides."""
    port = free_port()
    folder = make_received(work)
    both = ["file", "--port", str(port), "-q", *arguments]
    server = [sys.executable, str(ROOT / "server.py"), *both, "--folder", str(folder)]
    client = [sys.executable, str(ROOT / "client.py"), *both]
    with serving(server, port, work / "log"):
        yield Contender(lambda item: [*client, str(item)], folder)


def start_paired(work: Path) -> contextlib.AbstractContextManager[Contender]:
    """Socket Pair with a pairing code: the same encrypted, as scp is."""
    return start_ours(work, "--code", CODE)


@contextlib.contextmanager
def start_rsync(work: Path) -> Iterator[Contender]:
    """Run rsync's daemon: no ssh, no encryption, whole files."""
    rsync = find_program("rsync")
    port = free_port()
    folder = make_received(work)
    config = work / "rsyncd.conf"
    settings = ["use chroot = no", "reverse lookup = no"]
    if runs_as_root():
        settings += ["uid = 0", "gid = 0"]
    module = ["[received]", f"path = {folder}", "read only = no"]
    config.write_text("\n".join([*settings, *module, ""]))
    daemon = [rsync, "--daemon", "--no-detach", f"--config={config}", f"--address={HOST}"]
    url = f"rsync://{HOST}:{port}/received/"

    def command(item: Path) -> list[str]:
        return [rsync, "-aW" if item.is_dir() else "-W", str(item), url]

    with serving([*daemon, f"--port={port}"], port, work / "log"):
        yield Contender(command, folder)


def make_key(path: Path) -> Path:
    """Make an ssh key without a passphrase."""
    keygen = find_program("ssh-keygen")
    check([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(path)])
    return path


def prepare_sshd(work: Path, port: int, user_key: Path) -> list[str]:
    """Write the configuration of a private sshd and return the command that runs it."""
    settings = {
        "Port": port,
        "ListenAddress": HOST,
        "HostKey": make_key(work / "host_key"),
        "AuthorizedKeysFile": user_key.with_suffix(".pub"),
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "Subsystem sftp": "internal-sftp",
    }
    config = work / "sshd_config"
    config.write_text("".join(f'{name} "{value}"\n' for name, value in settings.items()))
    return [find_program("sshd"), "-D", "-e", "-f", str(config)]


def make_missing_folder(sshd: list[str]) -> None:
    """Make the empty folder that sshd insists on as root, where no sshd was ever started before."""
    told = subprocess.run([*sshd, "-t"], capture_output=True, text=True, check=False).stderr
    missing = re.search(r"Missing privilege separation directory: (\S+)", told)
    if missing and runs_as_root():
        say(f"scp: making {missing[1]}, which sshd needs")
        Path(missing[1]).mkdir(mode=0o755)


def ssh_options(port: int, user_key: Path) -> list[str]:
    """Return what makes ssh and scp use the private sshd, and nothing of the user's own setup."""
    settings = {
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": os.devnull,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "BatchMode": "yes",
        "LogLevel": "ERROR",
        "Port": port,
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    return ["-F", "none", "-i", str(user_key), *options]


@contextlib.contextmanager
def start_scp(work: Path) -> Iterator[Contender]:
    """Run scp, with an sshd that knows this run's key alone."""
    scp, ssh = find_program("scp"), find_program("ssh")
    port = free_port()
    folder = make_received(work)
    user_key = make_key(work / "user_key")
    sshd = prepare_sshd(work, port, user_key)
    make_missing_folder(sshd)
    options = ssh_options(port, user_key)

    def command(item: Path) -> list[str]:
        recursive = ["-r"] if item.is_dir() else []
        return [scp, "-q", *options, *recursive, str(item), f"{HOST}:{folder}/"]

    with serving(sshd, port, work / "log"):
        check([ssh, *options, HOST, "exit"])
        yield Contender(command, folder)


@contextlib.contextmanager
def start_cp(work: Path) -> Iterator[Contender]:
    """Copy within the machine: what the disk and the page cache allow."""
    cp = find_program("cp")
    folder = make_received(work)

    def command(item: Path) -> list[str]:
        return [cp, *(["-r"] if item.is_dir() else []), str(item), str(folder)]

    yield Contender(command, folder)


@contextlib.contextmanager
def start_sha256(work: Path) -> Iterator[Contender]:
    """Read and hash with the fastest program there is: what a checked copy cannot do without."""
    sample = work / "sample"
    sample.write_bytes(bytes(HASH_SAMPLE))
    commands = [[sys.executable, "-c", HASH_WITH_PYTHON]]
    for program, *arguments in (["sha256sum"], ["openssl", "dgst", "-sha256"]):
        with contextlib.suppress(BenchError):
            commands.append([find_program(program), *arguments])
    fastest = min(commands, key=lambda command: seconds_of([*command, str(sample)]))
    sample.unlink()
    say(f"sha256: the fastest here is {Path(fastest[0]).name}")
    yield Contender(lambda item: [*fastest, str(item)])


@contextlib.contextmanager
def start_python(_work: Path) -> Iterator[Contender]:
    """Start Python with the modules that a file client needs, and end it again."""
    yield Contender(lambda _item: [sys.executable, "-c", PYTHON_START])


STARTERS = {
    OURS: start_ours,
    PAIRED: start_paired,
    "rsync": start_rsync,
    "scp": start_scp,
    "cp": start_cp,
    "sha256": start_sha256,
    "python": start_python,
}


def start_contenders(
    names: set[str], work: Path, stack: contextlib.ExitStack
) -> dict[str, Contender]:
    """Start every contender of these names that can be had here; the stack ends them."""
    contenders = {}
    for name, starter in STARTERS.items():
        if name not in names:
            continue
        own = work / name
        own.mkdir()
        try:
            contenders[name] = stack.enter_context(starter(own))
        except BenchError as error:
            if name == OURS:
                raise
            say(f"{name} is left out: {error}")
    return contenders


# The measurements


def settle() -> None:
    """Have everything written out, so that no run pays for the one before it."""
    if hasattr(os, "sync"):
        os.sync()


def bring_in_memory(size: int, folder: Path) -> None:
    """Fill and free as much of the page cache as a copy of `size` bytes and its programs need.

    What was just freed is still there for whoever comes next, the same for every contender.
    """
    block = bytes(MIB)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(0, size + SPARE_MEMORY, MIB):
            file.write(block)


def empty(folder: Path) -> None:
    """Empty a folder, and leave it to the server that writes into it.

    Trees are put aside and go with the temporary folder: where ext4 has no journal, making files
    takes many times longer for minutes after thousands were deleted.
    """
    for entry in folder.iterdir():
        if entry.is_dir():
            entry.rename(Path(tempfile.mkdtemp(prefix="aside-", dir=folder.parent)) / entry.name)
        else:
            entry.unlink()


def files_below(folder: Path) -> set[Path]:
    """Return the relative paths of all files in a folder tree, hidden ones too."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def compare(source: Path, copy: Path) -> None:
    """Raise unless both folders hold the same files with the same bytes."""
    names = files_below(source)
    if different := names ^ files_below(copy):
        raise BenchError(f"{len(different)} missing or extra files in {copy}, as {min(different)}")
    for name in sorted(names):
        if not filecmp.cmp(source / name, copy / name, shallow=False):
            raise BenchError(f"{copy / name} differs from its source")


def run_once(contender: Contender, kind: Kind, compared: bool) -> float:
    """Have one contender do the work once, on a quiet disk; leave nothing of it behind."""
    settle()
    bring_in_memory(kind.size, kind.source.parent)
    seconds = seconds_of(contender.command(kind.item))
    if contender.folder:
        if compared:
            compare(kind.source, contender.folder)
        empty(contender.folder)
    return seconds


def measure(name: str, kind: Kind, contenders: dict[str, Contender]) -> Results:
    """Have all contenders of a kind of work take turns."""
    present = [contender for contender in kind.rounds if contender in contenders]
    results = Results()
    for turn in range(max(kind.rounds.values())):
        shift = turn % len(present)
        for who in present[shift:] + present[:shift]:
            last = kind.rounds[who] - 1
            if turn > last:
                continue
            seconds = run_once(contenders[who], kind, compared=turn == last)
            results.add(who, seconds)
            say(f"{name}, round {turn + 1}: {who} {seconds:.3f} s")
    return results


# The report


def table(kind: Kind, results: Results) -> Iterator[str]:
    """Lay out the runs of one kind of work, a line for each contender."""
    yield kind.heading
    heads = ("median s", "min s", "max s", kind.unit, "x ours", "runs")
    yield f"  {'':8}" + "".join(f"{head:>10}" for head in heads)
    for name, seconds in results.seconds.items():
        median = results.median(name)
        ratio = median / results.median(OURS)
        times = "".join(f"{value:>10.3f}" for value in (median, min(seconds), max(seconds)))
        yield f"  {name:8}{times}{kind.amount / median:>10,.0f}{ratio:>10.2f}{len(seconds):>10}"


def verdict(target: Target, kind: Kind, results: Results) -> str:
    """Say how one target was met, in one line."""
    against = " and ".join(target.against)
    larger = "the larger of " if len(target.against) > 1 else ""
    who = "" if target.who == OURS else f" {target.who}"
    aim = f"{kind.heading}{who}: at most {target.limit:.2f} x {larger}{against}"
    if not all(name in results.seconds for name in (target.who, *target.against)):
        return f"  {aim}: not measured"
    ratio = results.median(target.who) / max(results.median(name) for name in target.against)
    return f"  {aim}: {ratio:.2f}, {'met' if ratio <= target.limit else 'MISSED'}"


def report(kinds: dict[str, Kind], results: dict[str, Results]) -> None:
    """Print the tables, then the targets."""
    for name, kind in kinds.items():
        print(*table(kind, results[name]), "", sep="\n")
    print("targets, as ratios of medians")
    for target in TARGETS:
        if target.kind in kinds:
            print(verdict(target, kinds[target.kind], results[target.kind]))


# The command line


def positive(text: str) -> int:
    """Read a number from 1 up."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--large-mib", type=positive, default=1024, help="size (%(default)s MiB)")
    parser.add_argument("--small-count", type=positive, default=10_000, help="files (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the temporary folder goes (the system's)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="these kinds alone")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Make the data, start the servers, measure, report, and leave nothing behind."""
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="socket-pair-bench-", dir=options.dir)
        work = Path(stack.enter_context(temporary)).resolve()
        kinds = {name: make_kind(name, work, options) for name in options.only}
        names = {name for kind in kinds.values() for name in kind.rounds}
        contenders = start_contenders(names, work, stack)
        results = {name: measure(name, kind, contenders) for name, kind in kinds.items()}
    report(kinds, results)


def main() -> int:
    """Run the benchmark and return the exit status."""
    options = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.pop("SOCKET_PAIR_CODE", None)
    try:
        run(options)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except (BenchError, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
