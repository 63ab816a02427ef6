"""Measure what many listeners on this machine cost the server, beside snapserver.

All listeners are sockets of one process, which only reads. For every write that arrives the
delay is counted from when its first sample was captured, so that joining blocks is not hidden.
For 200 listeners, that is; all are read from. What is received is without TCP's own headers.

    python tests/bench/listeners.py
    python tests/bench/listeners.py --counts 100 1000 --seconds 20

The server's sound is a pipe, as snapserver's is: 48 kHz mono (snapserver: stereo), in real time.
Memory is the growth of the server's resident set, without the system's socket buffers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if sys.platform != "win32":
    import resource

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402
from sound_card import stop_process  # noqa: E402
from waiting import wait_for  # noqa: E402

CODE = "KQ7M-2XFD-9WPA"
RATE = 48_000
OPUS_KBIT = 96
# Of the others only the bytes are counted: parsing all would take more than the server does.
MEASURED_LISTENERS = 200
SETTLE_S = 2.0
CONNECT_LIMIT_S = 60.0
RECEIVE_BYTES = 1 << 16

MAX_CLIENTS = 20_000  # no limit of ours before the machine's
# snapcast's binary protocol: type, id, refers to, received s, us, sent s, us, size.
SNAP_HEADER = struct.Struct("<HHHiiiiI")
SNAP_CHUNK = struct.Struct("<iiI")
SNAP_HELLO, SNAP_WIRE_CHUNK = 5, 2
SNAP_FRAME_BYTES = 4
SNAP_PORT = 51704


@dataclass
class Tally:
    """What the listeners have received, while it counts."""

    counting: bool = False
    delays_ms: list[float] = field(default_factory=list)
    frames: int = 0
    missed_frames: int = 0
    received_bytes: int = 0

    def note_bytes(self, count: int) -> None:
        """Count what has come through the network, whatever it is."""
        if self.counting:
            self.received_bytes += count

    def note(self, frames: int, delay_ms: float, missed_frames: int = 0) -> None:
        """Count a write of `frames`, whose first frame was captured `delay_ms` ago."""
        if self.counting:
            self.delays_ms.append(delay_ms)
            self.frames += frames
            self.missed_frames += missed_frames


class OurListener:
    """Reads Socket Pair's blocks."""

    hello = common.Hello(common.PROTOCOL, "audio")

    def __init__(self, sock: socket.socket, tally: Tally) -> None:
        self._tally = tally
        self._next_frame: int | None = None
        self._pending = b""
        self._send_hello(sock, common.encode_message(self.hello))

    def _send_hello(self, sock: socket.socket, hello: bytes) -> None:
        sock.sendall(hello)

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        data = self._pending + data
        start = 0
        while len(data) - start >= common.LENGTH.size:
            (size,) = common.LENGTH.unpack_from(data, start)
            end = start + common.LENGTH.size + size
            if end > len(data):
                break
            if data[start + common.LENGTH.size] != ord("{"):  # the welcome is the only message
                self._take_block(data, start + common.LENGTH.size, size)
            start = end
        self._pending = data[start:]

    def _take_block(self, data: bytes, start: int, size: int) -> None:
        first_frame, captured_ns = common.BLOCK_HEADER.unpack_from(data, start)
        frames = self._count_frames(data[start + common.BLOCK_HEADER.size : start + size])
        missed_frames = first_frame - (self._next_frame or first_frame)
        self._next_frame = first_frame + frames
        delay_ms = (time.monotonic_ns() - captured_ns) / 1e6 + frames / RATE * 1000
        self._tally.note(frames, delay_ms, missed_frames)

    def _count_frames(self, content: bytes) -> int:
        return len(content) // common.SAMPLE_BYTES


class OpusListener(OurListener):
    """Reads the same as Opus, without decoding it."""

    hello = common.Hello(common.PROTOCOL, "audio", OPUS_KBIT)

    def _count_frames(self, content: bytes) -> int:
        return common.OpusBlock.decode(0, 0, content).frames if content else 0


class PairedListener(OurListener):
    """Reads the same, encrypted."""

    def _send_hello(self, sock: socket.socket, hello: bytes) -> None:
        self._plain = memoryview(bytearray(RECEIVE_BYTES))
        pairing = common.Pairing(common.normalize_code(CODE), server_side=False)
        for message in (
            common.Hello(common.PROTOCOL, common.PAIRING),
            common.Pair(pairing.share),
        ):
            sock.sendall(common.encode_message(message))
        (size,) = common.LENGTH.unpack(sock.recv(common.LENGTH.size, socket.MSG_WAITALL))
        answer = common.decode_message(sock.recv(size, socket.MSG_WAITALL), [common.Pair])
        assert isinstance(answer, common.Pair)
        self._tls = common.TLS(pairing.finish(answer.share), False)
        while not self._tls.shake_hands():
            sock.sendall(self._tls.output())
            self._tls.feed(sock.recv(RECEIVE_BYTES))
        sock.sendall(self._tls.output() + self._tls.encrypt(hello))

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self._tls.feed(data)
        while count := self._tls.decrypt_into(self._plain):
            super().feed(bytes(self._plain[:count]))


class SnapListener:
    """Reads snapcast's chunks."""

    def __init__(self, sock: socket.socket, tally: Tally) -> None:
        self._tally = tally
        self._pending = b""
        mac = f"02:00:00:00:{sock.fileno() >> 8:02x}:{sock.fileno() & 255:02x}"
        names = {
            "MAC": mac,
            "ID": mac,
            "HostName": "bench",
            "ClientName": "bench",
            "OS": "",
            "Arch": "",
        }
        hello = json.dumps({**names, "Version": "0", "Instance": 1, "SnapStreamProtocolVersion": 2})
        payload = struct.pack("<I", len(hello)) + hello.encode()
        sock.sendall(SNAP_HEADER.pack(SNAP_HELLO, 1, 0, 0, 0, 0, 0, len(payload)) + payload)

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        data = self._pending + data
        start = 0
        while len(data) - start >= SNAP_HEADER.size:
            kind, *_, size = SNAP_HEADER.unpack_from(data, start)
            end = start + SNAP_HEADER.size + size
            if end > len(data):
                break
            if kind == SNAP_WIRE_CHUNK:
                seconds, microseconds, count = SNAP_CHUNK.unpack_from(
                    data, start + SNAP_HEADER.size
                )
                delay_ms = (time.monotonic() - seconds - microseconds / 1e6) * 1000
                self._tally.note(count // SNAP_FRAME_BYTES, delay_ms)
            start = end
        self._pending = data[start:]


Listener = OurListener | SnapListener
Running = contextlib.AbstractContextManager[tuple[subprocess.Popen[bytes], int]]


def ignore(_data: bytes) -> None:
    """Take what has arrived at a listener that is not measured."""


class Crowd:
    """Many listeners in one thread."""

    def __init__(self, make: Callable[[socket.socket, Tally], Listener]) -> None:
        self.tally = Tally()
        self.connected = 0
        self._make = make
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def connect(self, port: int, count: int) -> None:
        """Connect `count` listeners; ends early where the server takes no more."""
        self._thread.start()
        with contextlib.suppress(OSError):
            for _ in range(count):
                sock = socket.create_connection(("127.0.0.1", port), CONNECT_LIMIT_S)
                listener = self._make(sock, self.tally)
                sock.setblocking(False)
                self._sockets.append(sock)
                feed = listener.feed if self.connected < MEASURED_LISTENERS else ignore
                self._selector.register(sock, selectors.EVENT_READ, feed)
                self.connected += 1

    def _run(self) -> None:
        while not self._stopped:
            for key, _ in self._selector.select(0.1):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                data = b""
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    data = sock.recv(RECEIVE_BYTES)
                self.tally.note_bytes(len(data))
                if data:
                    key.data(data)
                else:
                    self.connected -= 1
                    self._selector.unregister(sock)

    def close(self) -> None:
        """Hang up."""
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join()
        for sock in self._sockets:
            sock.close()


def feed_in_real_time(descriptor: int, frame_bytes: int, stopped: threading.Event) -> None:
    """Write noise to `descriptor` at ``RATE``, until told to stop."""
    start_s, written = time.monotonic(), 0
    with contextlib.suppress(OSError):
        while not stopped.wait(0.005):
            due = int((time.monotonic() - start_s) * RATE) - written
            os.write(descriptor, os.urandom(due * frame_bytes))
            written += due


@contextlib.contextmanager
def our_server(_folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run this project's server; give it and its port."""
    command = [sys.executable, str(ROOT / "server.py"), "audio", "--input", "-", "--port", "0"]
    command += ["--max-clients", str(MAX_CLIENTS), *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    stopped = threading.Event()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        feed = (process.stdin.fileno(), common.SAMPLE_BYTES, stopped)
        threading.Thread(target=feed_in_real_time, args=feed, daemon=True).start()
        yield process, int(line.split(" - ")[0].rsplit(":", 1)[1])
    finally:
        stopped.set()
        stop_process(process)


def paired_server(folder: Path) -> Running:
    """Run this project's server with a pairing code."""
    return our_server(folder, "--code", CODE)


@contextlib.contextmanager
def snapserver(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run snapserver with raw samples and its shortest chunks; give it and its port."""
    fifo = folder / "fifo"
    source = f"--stream.source=pipe://{fifo}?name=bench&sampleformat={RATE}:16:2&chunk_ms=10"
    # An empty configuration: the usual one has a stream of its own, which clients would get.
    (folder / "snapserver.conf").touch()
    command = [
        "snapserver",
        "-c",
        str(folder / "snapserver.conf"),
        source,
        "--stream.codec=pcm",
        "--http.enabled=false",
    ]
    command += ["--tcp.enabled=false", f"--server.datadir={folder}", f"--stream.port={SNAP_PORT}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stopped = threading.Event()
    try:
        wait_for(lambda: is_open(SNAP_PORT), "the start of snapserver")
        with fifo.open("wb", buffering=0) as file:
            feed = (file.fileno(), SNAP_FRAME_BYTES, stopped)
            threading.Thread(target=feed_in_real_time, args=feed, daemon=True).start()
            yield process, SNAP_PORT
            stopped.set()
    finally:
        stopped.set()
        stop_process(process)


def is_open(port: int) -> bool:
    """Return whether somebody listens on `port`."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_kib(pid: int) -> int:
    """Return how much memory of a process is in use."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a `share` of `values` lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def measure(name: str, count: int, seconds: float) -> str:
    """Return the row of the table for a server with `count` listeners."""
    run, make = SERVERS[name]
    with tempfile.TemporaryDirectory() as folder, run(Path(folder)) as (process, port):
        crowd = Crowd(make)
        try:
            before_kib = resident_kib(process.pid)
            crowd.connect(port, count)
            time.sleep(SETTLE_S)
            crowd.tally.counting, start_s, start_cpu_s = True, time.monotonic(), cpu_s(process.pid)
            time.sleep(seconds)
            crowd.tally.counting, elapsed_s = False, time.monotonic() - start_s
            share = (cpu_s(process.pid) - start_cpu_s) / elapsed_s
            memory_kib = (resident_kib(process.pid) - before_kib) / count
        finally:
            crowd.close()
    tally = crowd.tally
    received = tally.frames / max(1, elapsed_s * RATE * min(count, MEASURED_LISTENERS))
    kbit_per_s = tally.received_bytes * 8 / 1000 / elapsed_s / count
    return (
        f"{name:<12}{crowd.connected:>10}{percentile(tally.delays_ms, 0.5):>10.1f}"
        f"{percentile(tally.delays_ms, 0.99):>10.1f}{tally.missed_frames:>15}{received:>10.1%}"
        f"{kbit_per_s:>10.0f}{share:>8.0%}{memory_kib:>12.0f}"
    )


SERVERS: dict[str, tuple[Callable[[Path], Running], Callable[[socket.socket, Tally], Listener]]] = {
    "ours": (our_server, OurListener),
    "opus": (our_server, OpusListener),
    "paired": (paired_server, PairedListener),
    "snapserver": (snapserver, SnapListener),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 300, 1000])
    parser.add_argument("--seconds", type=float, default=8.0, help="a row (default %(default)s)")
    parser.add_argument("--only", choices=SERVERS, nargs="+", default=list(SERVERS))
    arguments = parser.parse_args(argv)
    if sys.platform != "win32":
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(
        f"{'':<12}{'listeners':>10}{'median ms':>10}{'p99 ms':>10}{'missed frames':>15}"
        f"{'received':>10}{'kbit/s':>10}{'cpu':>8}{'KiB each':>12}"
    )
    for name in arguments.only:
        if name == "snapserver" and shutil.which(name) is None:
            print(f"{name:<12}left out: not installed")
            continue
        for count in arguments.counts:
            print(measure(name, count, arguments.seconds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
