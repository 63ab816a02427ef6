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
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from contenders import (
    MIB,
    OURS,
    PAIRED,
    BenchError,
    Contender,
    say,
    seconds_of,
    start_contenders,
)

KIB = 1024
SMALL_SIZE = 4 * KIB
SMALL_FOLDERS = 100
ROUNDS_OF_ONE = 4
SPARE_MEMORY = 256 * MIB


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
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python compiles common.py once
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
