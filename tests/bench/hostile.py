"""How much hostile clients that have the code cost the server and an honest client beside them.

Run by hand, on a quiet machine:

    python tests/bench/hostile.py
    python tests/bench/hostile.py --paired --clients 60 --rounds 5

A client sends 100 MiB, alone and beside the hostile ones, in turns. Each hostile client says one of
the attacks of test_hostile_senders.py again and again, and reads the answers. They come from
another address, and are threads of one process, at the lowest priority: what is seen is the
server's work, not theirs. How much of a core both take is told.

The exit status is 1 where the honest client was not served.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from listeners import cpu_s  # noqa: E402

import client  # noqa: E402
import common  # noqa: E402
from pairing import CODE  # noqa: E402
from processes import Server  # noqa: E402
from support import MIB, make_file  # noqa: E402
from test_hostile_senders import attacks  # noqa: E402

ELSEWHERE = "127.0.0.2"
HONEST_BYTES = 100 * MIB
SETTLING_S = 3.0


def attack(address: client.Address, said: bytes) -> None:
    """Be one hostile client, for good."""
    while True:
        with contextlib.suppress(OSError, common.SocketPairError):
            connection, _ = client.connect(address, client.FILE_HELLO, common.Console(quiet=True))
            with connection, connection.limit(20):
                while True:
                    connection.write(said)
                    connection.read_some(memoryview(bytearray(65536)), 0.0)


def attack_all(address: client.Address, count: int) -> None:
    """Be `count` hostile clients, until this process is ended."""
    os.nice(19)
    from_elsewhere = functools.partial(socket.create_connection, source_address=(ELSEWHERE, 0))
    socket.create_connection = from_elsewhere
    said = attacks()
    for number in range(count):
        arguments = (address, said[number % len(said)])
        threading.Thread(target=attack, args=arguments, daemon=True).start()
    threading.Event().wait()


def send_honestly(server: Server, place: Path, arguments: list[str]) -> float:
    """Send a file of its own; return how many seconds that took."""
    source = make_file(place / f"honest-{time.monotonic_ns()}", HONEST_BYTES)
    started = time.monotonic()
    result = server.send(source, *arguments)
    seconds = time.monotonic() - started
    if result.status != 0:
        raise SystemExit(f"the honest client was not served: {result.stderr}")
    (server.folder / source.name).unlink()
    source.unlink()
    return seconds


def measure_beside(
    server: Server, place: Path, address: client.Address, count: int, arguments: list[str]
) -> tuple[float, float, float]:
    """Return the honest client's seconds, and the attackers' and the server's shares of a core."""
    attackers = multiprocessing.Process(target=attack_all, args=(address, count), daemon=True)
    attackers.start()
    try:
        time.sleep(SETTLING_S)
        pids = [int(attackers.pid or 0), server.popen.pid]
        before, began = [cpu_s(pid) for pid in pids], time.monotonic()
        seconds = send_honestly(server, place, arguments)
        span = time.monotonic() - began
        shares = [(cpu_s(pid) - was) / span for pid, was in zip(pids, before, strict=True)]
    finally:
        attackers.kill()
        attackers.join()
    return seconds, shares[0], shares[1]


def describe(measured: tuple[float, float, float]) -> str:
    seconds, attackers, server = measured
    return f"{seconds:.2f} s; attackers {attackers:.0%}, server {server:.0%} of a core"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paired", action="store_true", help="with a pairing code")
    options = parser.parse_args()
    code = ["--code", CODE] if options.paired else []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with Server(place / "inbox", *code) as server:
            for number in range(1000):
                (server.folder / (f"x ({number})" if number else "x")).write_bytes(b"?")
            address = client.Address(
                "127.0.0.1", server.port, common.normalize_code(CODE) if options.paired else None
            )
            alone, beside = [], []
            for _ in range(options.rounds):
                alone.append(send_honestly(server, place, code))
                measured = measure_beside(server, place, address, options.clients, code)
                beside.append(measured[0])
                print(f"alone {alone[-1]:.2f} s, beside {describe(measured)}", flush=True)
            ratio = statistics.median(beside) / statistics.median(alone)
            print(
                f"median {statistics.median(alone):.2f} s and {statistics.median(beside):.2f} s: "
                f"{ratio:.1f} times; the server's peak {server.peak_mib():.0f} MiB"
            )


if __name__ == "__main__":
    main()
