"""Measure how far apart two players of one server are, sample for sample, beside snapcast.

Each of two players has one side of the same null sink, so that one recording holds both. Noise
is played into the microphone; the two sides are correlated every quarter of a second, and with
what the microphone heard for the delay.

    python tests/bench/in_step.py --seconds 60
    python tests/bench/in_step.py --only "ours, 80 ms" --seconds 600
    python tests/bench/in_step.py --only "ours, 200 ms, poor Wi-Fi" --players 20 --wav clap.wav

Rows: ours in step, as PCM and as Opus, ours without --sync, ours with one player behind a poor
Wi-Fi (each read held up by 3 ms in the mean, and every 3 to 12 s all for 40 to 150 ms), snapcast
with several buffers. `joined` tells how long after its first sound the last player was within
0.5 ms of the first for good. With --players, more of them play beside into a third sink. --stumble
stops the last player for 0.1 s again and again, which is a dropout of its card. --wav writes both
players, with a clap each second in place of the noise.

Needs PulseAudio (see tests/sound_card.py) and numpy; snapserver and snapclient for their rows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from latency import snapcast  # noqa: E402
from quality import relayed  # noqa: E402

from common import AudioFormat  # noqa: E402
from likeness import Signal, lag, to_signal  # noqa: E402
from ports import free_port  # noqa: E402
from sound import write_wav  # noqa: E402
from sound_card import (  # noqa: E402
    MICROPHONE_MONITOR,
    RATE,
    SPEAKER_MONITOR,
    Recording,
    StereoCard,
    VirtualSoundCard,
    stop_process,
    without_priority,
)

WINDOW_S = 0.25
SEARCH_S = 0.03  # how far apart the two sides may be
DELAY_SEARCH_S = 1.5
# Clocks of null sinks drift apart by some 0.015 %, as PulseAudio rounds: later, this is no delay.
DELAY_MEASURED_S = 20.0
IN_STEP_S = 0.0005
SECOND_PLAYER_S = 8.0  # after the first
SETTLE_S = 12.0  # after the second: left out of the figures
STUMBLE_S = 0.1


@dataclass(frozen=True)
class Way:
    """A server and its players."""

    name: str
    needs: list[str]
    snapcast_ms: int | None = None
    sync_ms: int | None = None
    poor: bool = False
    options: Sequence[str] = ()  # of the client

    def server(self, card: VirtualSoundCard, port: int) -> list[list[str]]:
        """Return the commands that feed the players."""
        if self.snapcast_ms is None:
            command = [sys.executable, str(ROOT / "server.py"), "audio", "--port", str(port)]
            return [command + (["--sync", str(self.sync_ms)] if self.sync_ms else [])]
        server, feed, _ = snapcast(self.snapcast_ms)(card)
        return [[*server, f"--stream.port={port}"], feed]

    def player(self, port: int, number: int) -> list[str]:
        """Return the command of a player."""
        if self.snapcast_ms is None:
            client = [sys.executable, str(ROOT / "client.py"), "audio", "--port", str(port)]
            return [*client, *self.options]
        client = ["snapclient", "-h", "127.0.0.1", "-p", str(port), "--player", "pulse"]
        return [*client, "-i", str(number), "--hostID", f"player{number}"]


WAYS = [
    Way("ours, 80 ms", ["pulseaudio"], sync_ms=80),
    Way("ours, 80 ms, Opus", ["pulseaudio"], sync_ms=80, options=["--opus"]),
    Way("ours, without --sync", ["pulseaudio"]),
    Way("snapcast, 1000 ms", ["snapserver", "snapclient"], snapcast_ms=1000),
    Way("snapcast, 400 ms", ["snapserver", "snapclient"], snapcast_ms=400),
    Way("snapcast, 100 ms", ["snapserver", "snapclient"], snapcast_ms=100),
    Way("ours, 200 ms, poor Wi-Fi", ["pulseaudio"], sync_ms=200, poor=True),
    Way("snapcast, 400 ms, poor Wi-Fi", ["snapserver", "snapclient"], snapcast_ms=400, poor=True),
]


def make_noise(seconds: float, claps: bool) -> bytes:
    """Return noise between 200 and 6,000 Hz, or a clap each second, mono 16-bit."""
    frames = int(seconds * RATE)
    spectrum = np.fft.rfft(np.random.default_rng(1).standard_normal(frames))
    hertz = np.fft.rfftfreq(frames, 1 / RATE)
    spectrum[(hertz < 200) | (hertz > 6000)] = 0
    noise = np.fft.irfft(spectrum, frames)
    noise *= 0.2 / noise.std()
    if claps:
        noise *= 4 * np.exp(-(np.arange(frames) % RATE) / (0.005 * RATE))
    samples: bytes = (np.clip(noise, -1, 1) * 32767).astype("<i2").tobytes()
    return samples


@dataclass(frozen=True)
class Result:
    """How far apart two players were, in ms, window by window, with the time of each."""

    apart_ms: list[tuple[float, float]]
    silent_s: float
    delay_ms: float
    joined_s: float

    def row(self, name: str) -> str:
        """Return a row of the table."""
        apart = sorted(abs(ms) for _, ms in self.apart_ms)
        if not apart:
            return f"{name:<30} nothing heard on both sides"
        figures = apart[len(apart) // 2], apart[int(len(apart) * 0.95)], apart[-1]
        text = "".join(f"{figure:>9.3f}" for figure in figures)
        return f"{name:<30}{text}{self.delay_ms:>9.1f}{self.joined_s:>9.2f}{self.silent_s:>9.2f}"


def compare(sides: Signal, from_s: float) -> tuple[list[tuple[float, float]], float]:
    """Return moment and distance in ms of each window, and how many seconds one side was silent."""
    apart, silent_s = [], 0.0
    step = int(WINDOW_S * RATE)
    for start in range(int(from_s * RATE), len(sides) - step, step):
        window = sides[start : start + step]
        behind = lag(window[:, 0], window[:, 1])
        if behind is None or abs(behind) > SEARCH_S * RATE:
            silent_s += WINDOW_S
        else:
            apart.append((start / RATE, behind / RATE * 1000))
    return apart, silent_s


def delay_ms(heard: Recording, said: Recording, moments_s: Sequence[float]) -> float:
    """Return how late the left side is after the microphone: the median of these moments."""
    left = to_signal(said.samples(), 2)[:, 0]
    mic = to_signal(heard.samples(), 1)[:, 0]
    earlier = round((said.start_s - heard.start_s) * RATE)
    search = int(DELAY_SEARCH_S * RATE)
    found = []
    for start in (int(moment_s * RATE) for moment_s in moments_s):
        window = left[start : start + int(WINDOW_S * RATE)]
        searched = mic[start + earlier - search : start + earlier + len(window)]
        ahead = lag(np.pad(window, (0, len(searched) - len(window))), searched)
        if ahead is not None:
            found.append((search - ahead) / RATE * 1000)
    return float(np.median(found)) if found else float("nan")


def joined_after_s(sides: Signal) -> float:
    """Return how long after its first sound the right side was in step for good."""
    loud = np.abs(sides[:, 1]).reshape(-1)
    first_s = float(np.argmax(loud > 0.01)) / RATE
    apart, _ = compare(sides, first_s)
    late = [moment_s for moment_s, ms in apart if abs(ms) > IN_STEP_S * 1000]
    late = [moment_s for moment_s in late if moment_s < first_s + SETTLE_S]
    return max(late, default=first_s - WINDOW_S) + WINDOW_S - first_s


@contextlib.contextmanager
def running(
    commands: Sequence[tuple[list[str], dict[str, str]]], log: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep processes running for the ``with`` block."""
    processes: list[subprocess.Popen[bytes]] = []
    with log.open("ab") as output:
        try:
            for command, environment in commands:
                processes.append(
                    subprocess.Popen(command, stdout=output, stderr=output, env=environment)
                )
            yield processes
        finally:
            for process in reversed(processes):
                stop_process(process)


def stumble(player: subprocess.Popen[bytes], interval_s: float | None, seconds: float) -> None:
    """Let so many seconds go by; stop `player` for ``STUMBLE_S`` in each interval, if any."""
    end_s = time.monotonic() + seconds
    while interval_s and time.monotonic() + interval_s < end_s:
        time.sleep(interval_s)
        player.send_signal(signal.SIGSTOP)
        time.sleep(STUMBLE_S)
        player.send_signal(signal.SIGCONT)
    time.sleep(max(0.0, end_s - time.monotonic()))


def measure(way: Way, arguments: argparse.Namespace) -> Result:
    """Return how far apart two players are this `way`; blocks for as long as that takes."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        card = StereoCard()
        stack.enter_context(card)
        log = card.folder / "way.log"
        total_s = arguments.seconds + SECOND_PLAYER_S + SETTLE_S + 10
        player = card.play(make_noise(total_s, bool(arguments.wav)))
        stack.callback(stop_process, player)
        servers = [(command, card.environment) for command in way.server(card, port)]
        stack.enter_context(running(servers, log))
        time.sleep(3)
        others = [(way.player(port, n), card.on("others")) for n in range(2, arguments.players)]
        stack.enter_context(running(others, log))
        stack.enter_context(running([(way.player(port, 0), card.on("left"))], log))
        heard = stack.enter_context(card.record(MICROPHONE_MONITOR))
        said = stack.enter_context(Recording(SPEAKER_MONITOR, card.environment, channels=2))
        time.sleep(SECOND_PLAYER_S)
        right_port = port
        if way.poor:
            right_port = stack.enter_context(relayed(port, seed=1))
        last = (way.player(right_port, 1), card.on("right"))
        (right,) = stack.enter_context(running([last], log))
        time.sleep(SETTLE_S)
        stumble(right, arguments.stumble, arguments.seconds)
        if arguments.wav:
            write_wav(Path(arguments.wav), said.samples(), AudioFormat(RATE, 2))
        if arguments.verbose:
            print(log.read_text(errors="replace"), file=sys.stderr)
    with without_priority():
        return find_result(heard, said, arguments.seconds)


def find_result(heard: Recording, said: Recording, seconds: float) -> Result:
    """Return how far apart the players were in the last `seconds`."""
    sides = to_signal(said.samples(), 2)
    apart, silent_s = compare(sides, len(sides) / RATE - seconds)
    first_s = len(sides) / RATE - seconds
    moments_s = np.linspace(first_s, first_s + min(seconds, DELAY_MEASURED_S) - 1, 9)
    delay = delay_ms(heard, said, moments_s.tolist())
    return Result(apart, silent_s, delay, joined_after_s(sides))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="measured a row (default 60)")
    parser.add_argument("--players", type=int, default=2, help="in all (default 2)")
    parser.add_argument("--stumble", type=float, metavar="S", help="stop one for 0.1 s every S s")
    parser.add_argument("--wav", help="write both players to a file, with a clap each second")
    parser.add_argument("--verbose", action="store_true", help="show what the programs print")
    parser.add_argument("--plot", help="write each window's distance to a file, a line each")
    names = ", ".join(f"{way.name!r}" for way in WAYS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"rows: {names}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0."""
    arguments = parse_arguments(argv)
    columns = ["median", "p95", "max", "delay", "joined", "silent"]
    print(f"{'apart, in ms':<30}" + "".join(f"{column:>9}" for column in columns))
    for way in WAYS:
        if arguments.only and way.name not in arguments.only:
            continue
        if missing := [name for name in way.needs if shutil.which(name) is None]:
            print(f"{way.name:<30}left out: {', '.join(missing)} not installed")
            continue
        result = measure(way, arguments)
        print(result.row(way.name), flush=True)
        if arguments.plot:
            with open(arguments.plot, "a", encoding="ascii") as file:
                file.writelines(f"{s:.2f} {ms:.4f}\n" for s, ms in result.apart_ms)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
