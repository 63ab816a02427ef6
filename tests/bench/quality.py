"""Measure what can be heard of clocks and networks: distortion, dropouts, delay.

    python tests/bench/quality.py tone                 a pure tone, beside other programs
    python tests/bench/quality.py hour                 an hour of it, for dropouts
    python tests/bench/quality.py wifi                 a poor Wi-Fi, beside snapcast; takes long
    python tests/bench/quality.py simulation           clocks, and the Wi-Fi, in virtual time
    python tests/bench/quality.py simulation --plot wifi.png

``tone`` plays 997 Hz to the microphone, by a player with its own, large, buffer and by one with
20 ms, and fits a sine to each quarter of a second of what the loudspeaker says from 15 s on: signal
to noise and distortion (SINAD). ``hour`` finds the silences in what the loudspeaker says of the
tone, and those that were in the microphone's already, and shows what both sides say. ``wifi`` sends
the tone, with chirps, through a relay that delays what it reads as DESIGN.md's poor Wi-Fi does, and
counts the silences. All three need an idle machine: compare the rows of one run. ``simulation``
does not, as nothing in it is a clock: it runs the client's own ``Playout``.

Needs PulseAudio (see tests/sound_card.py), numpy and samplerate; snapcast and trx for their rows;
matplotlib for ``--plot``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
import latency  # noqa: E402

from client import Playout  # noqa: E402
from common import AudioFormat  # noqa: E402
from ports import free_port  # noqa: E402
from proxy import DOWN, Proxy  # noqa: E402
from simulation import MONO, PoorWifi, Simulation, sinad_db, tone  # noqa: E402
from sound_card import (  # noqa: E402
    MICROPHONE_FEED,
    MICROPHONE_MONITOR,
    RATE,
    SPEAKER_MONITOR,
    VirtualSoundCard,
    stop_process,
    without_priority,
)

SKIPPED_S = 15.0
WIFI_S = 180.0
# What is quieter than the tone by so much, for so long, is a silence.
SILENT_SHARE = 0.1
SILENCE_WINDOW_S = 0.0025
STEREO = AudioFormat(48_000, 2)

Signal = NDArray[np.float64]


# --- a pure tone ----------------------------------------------------------------------------


def play_tone(card: VirtualSoundCard, seconds: float, *options: str) -> subprocess.Popen[bytes]:
    """Start to play the tone to the microphone with paplay; end it with stop_process."""
    path = card.folder / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        second = tone(MONO, 0, RATE)  # it has whole periods
        for _ in range(math.ceil(seconds)):
            file.writeframes(second)
    command = ["paplay", "-d", MICROPHONE_FEED, *options, str(path)]
    return subprocess.Popen(command, env=card.environment)


def measure_tone(way: latency.Way, seconds: float, *options: str) -> list[float]:
    """Return the SINAD of each quarter of a second from 15 s on; blocks for `seconds`."""
    with VirtualSoundCard() as card, latency.running(way, card, card.folder / "way.log"):
        player = play_tone(card, seconds + 30, *options)
        try:
            time.sleep(1.0)
            with card.record(SPEAKER_MONITOR) as said:
                time.sleep(seconds)
        finally:
            stop_process(player)
    with without_priority():
        return sinad_db(said.samples()[int(SKIPPED_S * RATE) * 2 :], MONO)


def describe_sinad(values_db: list[float]) -> str:
    """Return the median, the 5th percentile and the worst, as columns."""
    columns = np.percentile(values_db, [50, 5, 0])
    return "".join(f"{value:>10.1f}" for value in columns)


def run_tone(arguments: argparse.Namespace) -> None:
    """Print the table of the tone."""
    print(f"{'SINAD in dB':<28}{'player':<12}{'median':>10}{'p5':>10}{'worst':>10}")
    for way in latency.WAYS:
        if arguments.only and way.name not in arguments.only:
            continue
        if missing := [name for name in way.needs if shutil.which(name) is None]:
            print(f"{way.name:<28}left out: {', '.join(missing)} not installed")
            continue
        for player, options in (("its own", ()), ("20 ms", ("--latency-msec=20",))):
            values_db = measure_tone(way, arguments.seconds, *options)
            print(f"{way.name:<28}{player:<12}{describe_sinad(values_db)}", flush=True)


# --- an hour --------------------------------------------------------------------------------


def run_hour(arguments: argparse.Namespace) -> None:
    """Print the silences of the microphone's sound and of the loudspeaker's, and both logs."""
    seconds = arguments.minutes * 60
    way = next(way for way in latency.WAYS if way.name == "ours")
    with VirtualSoundCard() as card:
        log = card.folder / "way.log"
        with latency.running(way, card, log), ExitStack() as stack:
            player = play_tone(card, seconds + 60, "--latency-msec=200")
            stack.callback(stop_process, player)
            time.sleep(SKIPPED_S)
            heard = stack.enter_context(card.record(MICROPHONE_MONITOR))
            said = stack.enter_context(card.record(SPEAKER_MONITOR))
            time.sleep(seconds)
        with without_priority():
            print(describe_hour("microphone", heard.samples()))
            print(describe_hour("loudspeaker", said.samples()))
        print(f"what was said:\n{log.read_text(errors='replace').strip()}")


def describe_hour(what: str, samples: bytes) -> str:
    """Return how many silences there are in what was recorded, and when they begin."""
    silences_s, silent_ms = find_silences(samples)
    moments = "".join(f"{moment_s:9.2f}" for moment_s in silences_s)
    seconds = len(samples) / 2 / RATE
    return f"{what}, {seconds:.0f} s: {len(silences_s)} silences, {silent_ms:.0f} ms{moments}"


# --- a poor Wi-Fi ---------------------------------------------------------------------------


class Heard(NamedTuple):
    """What came of three minutes: silences, their sum, and the chirps' delays."""

    dropouts: int
    silent_ms: float
    delays_ms: list[float]

    def row(self) -> str:
        """Return it as columns."""
        delays = np.percentile(self.delays_ms or [np.nan], [50, 95])
        return f"{self.dropouts:>10}{self.silent_ms:>12.0f}" + "".join(
            f"{d:>10.0f}" for d in delays
        )


def make_signal(seconds: float, seed: int) -> bytes:
    """Return the tone, soft, with chirps at random gaps."""
    chirps = np.frombuffer(latency.make_chirps(int(seconds / 0.46), seed), "<i2")
    softly = np.frombuffer(tone(MONO, 0, len(chirps)), "<i2") // 4
    mixed: bytes = (chirps + softly).astype("<i2").tobytes()
    return mixed


def find_silences(samples: bytes) -> tuple[list[float], float]:
    """Return when silences begin in what has the tone all the time, in s, and their sum in ms."""
    values = np.frombuffer(samples, "<i2").astype(float)
    frames = int(SILENCE_WINDOW_S * RATE)
    loudness = np.sqrt((values[: len(values) // frames * frames].reshape(-1, frames) ** 2).mean(1))
    silent = loudness < SILENT_SHARE * np.median(loudness)
    begins = np.flatnonzero(silent[1:] & ~silent[:-1]) + 1
    return list(begins * SILENCE_WINDOW_S), float(silent.sum() * SILENCE_WINDOW_S * 1000)


@contextmanager
def relayed(port: int, seed: int) -> Iterator[int]:
    """Give the port of a relay to `port` on a poor Wi-Fi."""
    delay = PoorWifi(seed)
    start_s = time.monotonic()

    def hold(direction: int, _passed: int, data: bytes) -> bytes:
        if direction == DOWN:
            time.sleep(delay(time.monotonic() - start_s))
        return data

    with Proxy(port, hook=hold) as proxy:
        yield proxy.port


Commands = Callable[[int, int], Callable[[VirtualSoundCard], list[list[str]]]]


def ours(port: int, relay_port: int) -> Callable[[VirtualSoundCard], list[list[str]]]:
    """Return a function that gives the commands, the client connecting to `relay_port`."""
    python = sys.executable
    return lambda _card: [
        [python, str(ROOT / "server.py"), "audio", "--port", str(port)],
        [python, str(ROOT / "client.py"), "audio", "--port", str(relay_port)],
    ]


def snapcast(buffer_ms: int) -> Commands:
    """Return a function as `ours`, for snapcast with this buffer."""

    def at(port: int, relay_port: int) -> Callable[[VirtualSoundCard], list[list[str]]]:
        def commands(card: VirtualSoundCard) -> list[list[str]]:
            server, feed, client = latency.snapcast(buffer_ms)(card)
            server += [f"--stream.port={port}"]
            return [server, feed, [*client, "-p", str(relay_port)]]

        return commands

    return at


def measure_wifi(commands: Commands, seed: int) -> Heard:
    """Return what came of ``WIFI_S`` on a poor Wi-Fi, from 2 s after the first sound on."""
    with without_priority():
        signal = make_signal(WIFI_S, seed)
    with ExitStack() as stack:
        card = stack.enter_context(VirtualSoundCard())
        port = free_port()
        relay_port = stack.enter_context(relayed(port, seed))
        way = latency.Way("", [], commands(port, relay_port))
        player = card.play(signal)
        stack.callback(stop_process, player)
        stack.enter_context(latency.running(way, card, card.folder / "way.log"))
        heard = stack.enter_context(card.record(MICROPHONE_MONITOR))
        said = stack.enter_context(card.record(SPEAKER_MONITOR))
        time.sleep(WIFI_S - 10)
    with without_priority():
        dropouts_s, silent_ms = find_silences(said.samples()[2 * RATE * 2 :])
        return Heard(len(dropouts_s), silent_ms, latency.match(heard, said).delays_ms)


def run_wifi(arguments: argparse.Namespace) -> None:
    """Print the table of the poor Wi-Fi."""
    print(f"{'':<24}{'seed':>6}{'dropouts':>10}{'silent ms':>12}{'median':>10}{'p95 ms':>10}")
    rows: list[tuple[str, Commands]] = [("ours", ours)]
    if shutil.which("snapserver"):
        rows += [(f"snapcast ({ms} ms)", snapcast(ms)) for ms in arguments.snapcast]
    for seed in range(arguments.seeds):
        for name, commands in rows:
            print(f"{name:<24}{seed:>6}{measure_wifi(commands, seed).row()}", flush=True)


# --- in virtual time ------------------------------------------------------------------------


def run_simulation(arguments: argparse.Namespace) -> None:
    """Print what the playout makes of clocks that differ, and of the poor Wi-Fi."""
    print(f"{'SINAD in dB':<28}{'median':>10}{'p5':>10}{'worst':>10}{'dropouts':>10}")
    for ppm in (0, 100, -100, 500, -500):
        print_clocks(f"{ppm:+} ppm", Playout(MONO, STEREO), ppm, None)
    print_clocks("44,100 Hz, 1,024 at once", Playout(MONO, AudioFormat(44_100, 2)), 0, 1_024)
    print(f"\n{'poor Wi-Fi, 3 minutes':<20}{'dropouts':>10}{'later':>8}{'silent ms':>11}", end="")
    print(f"{'delay ms':>10}{'after':>8}   then good: after 60 s")
    simulations = [simulate_wifi(seed) for seed in range(arguments.seeds)]
    if arguments.plot:
        plot(simulations[0], arguments.plot)


def print_clocks(name: str, playout: Playout, ppm: float, burst_frames: int | None) -> None:
    """Print the SINAD of a minute, from 15 s on."""
    simulation = Simulation(playout, ppm=ppm, burst_frames=burst_frames)
    simulation.run(SKIPPED_S)
    values_db = sinad_db(simulation.run(45), playout.card)
    print(f"{name:<28}{describe_sinad(values_db)}{playout.dropouts:>10}", flush=True)


def simulate_wifi(seed: int) -> Simulation:
    """Print what comes of a poor Wi-Fi, later than a minute as well; return the simulation."""
    playout = Playout(MONO, MONO)
    simulation = Simulation(playout, PoorWifi(seed, good_after_s=WIFI_S), seed=seed)
    simulation.run(60)
    first = playout.dropouts
    simulation.run(WIFI_S - 60)
    dropouts = playout.dropouts
    _, silent_ms = find_silences(bytes(simulation.heard[2 * RATE * 2 :]))
    lead_ms = 1000 * float(
        np.mean([m.lead_s - m.edge_s for m in simulation.moments if m.now_s > 2])
    )
    simulation.run(60)
    after_ms = 1000 * (playout.lead_s - playout.arrivals.edge_s)
    print(f"{f'seed {seed}':<20}{dropouts:>10}{dropouts - first:>8}{silent_ms:>11.0f}", end="")
    print(f"{lead_ms:>10.0f}{after_ms:>8.1f}", flush=True)
    return simulation


def plot(simulation: Simulation, path: str) -> None:
    """Draw lead, target and ratio over time."""
    import matplotlib as mpl  # type: ignore[import-not-found]  # noqa: PLC0415  (only here)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    moments = simulation.moments
    seconds = [moment.now_s for moment in moments]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(11, 6), dpi=110)
    above.plot(
        seconds, [1000 * (m.lead_s - m.edge_s) for m in moments], label="lead", linewidth=0.8
    )
    above.plot(seconds, [1000 * (m.target_s - m.edge_s) for m in moments], label="target")
    drops = [b.now_s for a, b in itertools.pairwise(moments) if b.dropouts > a.dropouts]
    above.plot(drops, [0] * len(drops), "rx", label="dropout")
    above.axvline(WIFI_S, color="gray", linestyle=":")
    above.set_ylabel("ms")
    above.set_ylim(-20, 300)
    above.legend(loc="upper right")
    above.set_title("A poor Wi-Fi for three minutes, then a good network")
    below.plot(seconds, [1e6 * (m.speed - 1) for m in moments], linewidth=0.8)
    below.set_ylabel("speed, ppm")
    below.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path)
    print(f"plotted into {path}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tone", "hour", "wifi", "simulation"])
    parser.add_argument("--seconds", type=float, default=60, help="of each tone (default 60)")
    parser.add_argument("--minutes", type=float, default=60, help="of the hour (default 60)")
    parser.add_argument("--seeds", type=int, default=4, help="of the Wi-Fi (default 4)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows of the tone's table")
    parser.add_argument(
        "--snapcast", nargs="*", type=int, default=[400, 200], help="its buffers in ms, for wifi"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw the simulation's first Wi-Fi")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table asked for; return 0."""
    arguments = parse_arguments(argv)
    runs = {"tone": run_tone, "hour": run_hour, "wifi": run_wifi, "simulation": run_simulation}
    runs[arguments.what](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
