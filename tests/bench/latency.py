"""Measure microphone-to-loudspeaker delay on a virtual sound card, beside other programs.

Chirps at random gaps are played to the microphone; microphone and loudspeaker are recorded at
once, and each chirp is looked for in both. One run, one virtual card, one program after the
other: what counts is how the rows of one table compare.

    python tests/bench/latency.py --chirps 40
    python tests/bench/latency.py --only ours "parec | pacat" --chirps 200

Needs PulseAudio (see tests/sound_card.py) and numpy; snapserver, snapclient and trx where they
are to be compared. A program that is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from ports import free_port  # noqa: E402
from sound_card import (  # noqa: E402
    MICROPHONE_MONITOR,
    RATE,
    SPEAKER_MONITOR,
    Recording,
    VirtualSoundCard,
    stop_process,
)

CHIRP_S = 0.03
CHIRP_LOW_HZ, CHIRP_HIGH_HZ = 800.0, 6000.0
CHIRP_LEVEL = 0.4
GAP_MIN_S, GAP_MAX_S = 0.25, 0.6
# A chirp is looked for this far behind its place in the microphone's recording; snapcast's
# default buffer of 1,000 ms has to fit, the next chirp may come earlier than that.
SEARCH_S = 1.6
# Correlation with the chirp, 1 being a perfect copy: below this it counts as not heard.
HEARD = 0.5
# What records has to be attached as well: PulseAudio changes its own pace when something is.
SETTLE_S = 8.0

Signal = NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """A program, or several, that carries sound from the microphone to the loudspeaker."""

    name: str
    needs: Sequence[str]
    commands: Callable[[VirtualSoundCard], list[list[str]]]


@dataclass(frozen=True)
class Result:
    """The delays of the chirps that were heard, and how many were not."""

    delays_ms: list[float]
    lost: int

    def row(self, name: str) -> str:
        """Return the result as a line of the table."""
        if not self.delays_ms:
            return f"{name:<28}{'nothing heard':>40}{self.lost:>8}"
        columns = np.percentile(self.delays_ms, [0, 50, 95, 100])
        return f"{name:<28}" + "".join(f"{value:>10.1f}" for value in columns) + f"{self.lost:>8}"


def make_chirp() -> Signal:
    """Return one chirp, rising in pitch and smooth at both ends."""
    t = np.arange(int(CHIRP_S * RATE)) / RATE
    sweep = (CHIRP_HIGH_HZ - CHIRP_LOW_HZ) / CHIRP_S / 2
    chirp: Signal = np.sin(2 * np.pi * (CHIRP_LOW_HZ + sweep * t) * t) * np.hanning(t.size)
    return chirp


def make_chirps(count: int, seed: int) -> bytes:
    """Return `count` chirps at random gaps, as 16-bit samples."""
    rng = random.Random(seed)
    chirp = make_chirp() * CHIRP_LEVEL * 32767
    parts = [np.zeros(RATE // 2)]
    for _ in range(count):
        parts += [chirp, np.zeros(int(rng.uniform(GAP_MIN_S, GAP_MAX_S) * RATE))]
    return np.concatenate([*parts, np.zeros(int(SEARCH_S * RATE))]).astype("<i2").tobytes()


def correlate(samples: Signal, chirp: Signal) -> Signal:
    """Return how alike `chirp` and each stretch of `samples` are, from 0 to 1."""
    size = 1 << (samples.size + chirp.size).bit_length()
    spectrum = np.fft.rfft(samples, size) * np.conj(np.fft.rfft(chirp, size))
    product = np.fft.irfft(spectrum, size)[: samples.size - chirp.size]
    energy = np.concatenate([[0.0], np.cumsum(samples**2)])
    local = energy[chirp.size :][: product.size] - energy[: product.size]
    likeness: Signal = np.abs(product) / np.sqrt(np.maximum(local, 1e3) * np.sum(chirp**2))
    return likeness


def find_chirps(likeness: Signal) -> list[int]:
    """Return the frames at which chirps begin, given how alike each stretch is."""
    found: list[int] = []
    distance = int(GAP_MIN_S * RATE * 0.9)
    for frame in np.flatnonzero(likeness > HEARD):
        if not found or frame - found[-1] > distance:
            found.append(int(frame))
        elif likeness[frame] > likeness[found[-1]]:
            found[-1] = int(frame)
    return found


def match(heard: Recording, said: Recording) -> Result:
    """Return the delay of each chirp in `heard` until it comes in `said`."""
    chirp = make_chirp()
    signals = [
        np.frombuffer(recording.samples(), "<i2").astype(float) for recording in (heard, said)
    ]
    times = [
        np.array(find_chirps(correlate(signal, chirp))) / RATE + recording.start_s
        for signal, recording in zip(signals, (heard, said), strict=True)
    ]
    offset = typical_delay(times[0], times[1])
    return pair(times[0], times[1], offset)


def typical_delay(heard_s: Signal, said_s: Signal) -> float:
    """Return the delay that most chirps share: gaps are random, so only the true one recurs."""
    differences = (said_s[None, :] - heard_s[:, None]).ravel()
    differences = differences[(differences > -0.01) & (differences < SEARCH_S)]
    if differences.size == 0:
        return 0.0
    counts, edges = np.histogram(differences, bins=np.arange(-0.01, SEARCH_S, 0.02))
    near = differences[np.abs(differences - edges[counts.argmax()] - 0.01) < 0.02]
    return float(np.median(near))


def pair(heard_s: Signal, said_s: Signal, delay_s: float) -> Result:
    """Return the delay of every chirp that was said within 100 ms of when it is expected."""
    delays_ms: list[float] = []
    for moment in heard_s:
        candidates = said_s[np.abs(said_s - moment - delay_s) < 0.1] - moment
        if candidates.size:
            nearest = candidates[np.abs(candidates - delay_s).argmin()]
            delays_ms.append(float(nearest) * 1000)
    return Result(delays_ms, len(heard_s) - len(delays_ms))


@contextlib.contextmanager
def running(way: Way, card: VirtualSoundCard, log: Path) -> Iterator[None]:
    """Keep the way's processes running for the ``with`` block."""
    processes: list[subprocess.Popen[bytes]] = []
    with log.open("wb") as output:
        try:
            for command in way.commands(card):
                processes.append(
                    subprocess.Popen(
                        command,
                        stdout=output,
                        stderr=output,
                        env=card.environment,
                        cwd=card.folder,
                        start_new_session=True,
                    )
                )
                time.sleep(1.0)
            yield
        finally:
            for process in reversed(processes):
                stop_process(process)
                with contextlib.suppress(ProcessLookupError):  # of a shell, what it has started
                    os.killpg(process.pid, signal.SIGKILL)


def measure(way: Way, card: VirtualSoundCard, chirps: bytes) -> Result:
    """Return the delays of `chirps` by this `way`; blocks for as long as they take."""
    with (
        running(way, card, card.folder / "way.log"),
        card.record(MICROPHONE_MONITOR) as heard,
        card.record(SPEAKER_MONITOR) as said,
    ):
        time.sleep(SETTLE_S)
        player = card.play(chirps)
        try:
            player.wait(len(chirps) / 2 / RATE + 30)
        finally:
            stop_process(player)
        time.sleep(SEARCH_S)
    return match(heard, said)


def ours(_card: VirtualSoundCard) -> list[list[str]]:
    """Return the commands of this project's two scripts."""
    port = str(free_port())
    return [
        [sys.executable, str(ROOT / "server.py"), "audio", "--port", port],
        [sys.executable, str(ROOT / "client.py"), "audio", "--port", port],
    ]


def direct_pipe(_card: VirtualSoundCard) -> list[list[str]]:
    """Return PulseAudio's own recorder and player, joined by a pipe: what the card needs."""
    raw = "--raw --rate=48000 --channels=1 --format=s16le"
    return [["sh", "-c", f"parec {raw} --latency-msec=5 | pacat {raw} --latency-msec=30"]]


def snapcast(buffer_ms: int | None) -> Callable[[VirtualSoundCard], list[list[str]]]:
    """Return the commands of snapcast with `buffer_ms`, or with its default buffer."""

    def commands(card: VirtualSoundCard) -> list[list[str]]:
        fifo = card.folder / "snapfifo"
        options = f"pipe://{fifo}?name=mic&sampleformat=48000:16:2&chunk_ms=10"
        # An empty configuration: the usual one has a stream of its own, which clients would get.
        (card.folder / "snapserver.conf").touch()
        server = ["snapserver", "-c", str(card.folder / "snapserver.conf"), "--http.enabled=false"]
        server.append(f"--stream.source={options}")
        server += ["--tcp.enabled=false", f"--server.datadir={card.folder}", "--stream.codec=pcm"]
        if buffer_ms is not None:
            server.append(f"--stream.buffer={buffer_ms}")
        feed = f"exec parec --raw --rate=48000 --channels=2 --latency-msec=5 > {fifo}"
        client = ["snapclient", "-h", "127.0.0.1", "--player", "pulse"]
        return [server, ["sh", "-c", feed], client]

    return commands


def trx(_card: VirtualSoundCard) -> list[list[str]]:
    """Return the commands of trx (Opus over RTP) with its shortest frames and buffer."""
    sender = ["trx-tx", "-h", "127.0.0.1", "-p", "51350", "-c", "1", "-f", "120", "-m", "4"]
    receiver = ["trx-rx", "-h", "127.0.0.1", "-p", "51350", "-c", "1", "-m", "8", "-j", "8"]
    return [receiver, sender]


WAYS = [
    Way("ours", ["pulseaudio"], ours),
    Way("parec | pacat", ["parec", "pacat"], direct_pipe),
    Way("snapcast (default)", ["snapserver", "snapclient"], snapcast(None)),
    Way("snapcast (400 ms)", ["snapserver", "snapclient"], snapcast(400)),
    Way("snapcast (100 ms)", ["snapserver", "snapclient"], snapcast(100)),
    Way("trx", ["trx-tx", "trx-rx"], trx),
]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chirps", type=int, default=40, help="chirps a row (default 40)")
    parser.add_argument("--seed", type=int, default=1, help="of the random gaps (default 1)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="rows: " + ", ".join(way.name for way in WAYS)
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0."""
    arguments = parse_arguments(argv)
    chirps = make_chirps(arguments.chirps, arguments.seed)
    print(f"{'delay in ms':<28}{'best':>10}{'median':>10}{'p95':>10}{'worst':>10}{'lost':>8}")
    for way in WAYS:
        if arguments.only and way.name not in arguments.only:
            continue
        if missing := [name for name in way.needs if shutil.which(name) is None]:
            print(f"{way.name:<28}left out: {', '.join(missing)} not installed")
            continue
        with VirtualSoundCard() as card:
            print(measure(way, card, chirps).row(way.name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
