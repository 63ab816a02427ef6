"""Measure what many listeners on this machine cost Icecast.

One stream of 96 kbit/s Opus goes in, as the README's recipe sends it; all listeners are HTTP
connections of one process, which only reads. To have kept up is to be connected still, and at
most three seconds behind the foremost.

    python tests/bench/icecast.py
    python tests/bench/icecast.py --counts 100 1000 --seconds 20

Memory is the growth of Icecast's resident set, without the system's socket buffers. Where the
reader's share of a core nears 100 %, it is the reader that has reached its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from listeners import cpu_s, is_open, resident_kib  # noqa: E402

import icecast_server  # noqa: E402
from http_crowd import Crowd, allow_many_connections  # noqa: E402
from sound_card import stop_process  # noqa: E402
from waiting import wait_for  # noqa: E402

PORT = 50910
URL = f"http://127.0.0.1:{PORT}{icecast_server.MOUNT}"
# Noise, which needs all the bits that it is given; one size of packet, whatever is in it.
SOURCE = "ffmpeg -nostdin -loglevel error -re -f lavfi -i anoisesrc=r=48000:a=0.2 -c:a libopus"
SOURCE += " -b:a 96k -vbr off -content_type audio/ogg"


@contextlib.contextmanager
def quietly_running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the ``with`` block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        stop_process(process)


@contextlib.contextmanager
def station(count: int) -> Iterator[int]:
    """Run Icecast, with a source, for so many listeners; give its process id."""
    with tempfile.TemporaryDirectory() as folder:
        command = icecast_server.configure(Path(folder), count, port=PORT)
        with quietly_running(command) as icecast:
            wait_for(lambda: is_open(PORT), "the start of Icecast")
            target = f"icecast://source:hackme@127.0.0.1:{PORT}{icecast_server.MOUNT}"
            with quietly_running([*SOURCE.split(), target]):
                wait_for(is_on_air, "the source's first sound")
                yield icecast.pid


def is_on_air() -> bool:
    """Return whether a listener gets sound."""
    with Crowd(URL, 1) as crowd:
        while crowd.read(1.0) and not crowd.listeners[0].gone:
            if crowd.listeners[0].granule:
                return True
    return False


def read_for(crowd: Crowd, seconds: float) -> None:
    """Read for so long."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        crowd.read(left_s)


def measure(count: int, seconds: float) -> str:
    """Return the row of the table for `count` listeners."""
    with station(count) as pid:
        before_kib = resident_kib(pid)
        with Crowd(URL, count) as crowd:
            # What Icecast gives each at once, the burst, is not to be counted.
            read_for(crowd, 3.0)
            start_s, before_bytes = time.monotonic(), received_bytes(crowd)
            used_s, read_s = cpu_s(pid), cpu_s(os.getpid())
            read_for(crowd, seconds)
            elapsed_s = time.monotonic() - start_s
            mbits = (received_bytes(crowd) - before_bytes) * 8 / elapsed_s / 1e6
            share = (cpu_s(pid) - used_s) / elapsed_s
            reader_share = (cpu_s(os.getpid()) - read_s) / elapsed_s
            memory_kib = (resident_kib(pid) - before_kib) / count
            kept_up = crowd.kept_up()
    return (
        f"{count:>9}{mbits:>10.1f}{kept_up:>9}{share:>8.1%}{memory_kib:>12.1f}{reader_share:>9.0%}"
    )


def received_bytes(crowd: Crowd) -> int:
    """Return how much all have received."""
    return sum(listener.received_bytes for listener in crowd.listeners)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0, or 1 where a program is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 1000, 4000])
    parser.add_argument("--seconds", type=float, default=15.0, help="a row (default %(default)s)")
    arguments = parser.parse_args(argv)
    if missing := [name for name in ("icecast2", "ffmpeg") if shutil.which(name) is None]:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 1
    allow_many_connections()
    print(f"{'listeners':>9}{'Mbit/s':>10}{'kept up':>9}{'cpu':>8}{'KiB each':>12}{'reader':>9}")
    for count in arguments.counts:
        print(measure(count, arguments.seconds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
