"""Measure how late a listener of Icecast hears the microphone, on a virtual sound card.

    python tests/bench/icecast_delay.py

The README's recipe goes to an Icecast, ffplay plays its stream; chirps are looked for in what
the microphone hears and the loudspeaker says, as in latency.py. One row as Icecast comes, which
gives each listener its last 64 KiB at once, one without that burst.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import latency  # noqa: E402

import icecast_server  # noqa: E402
from recipes import read_recipe  # noqa: E402
from sound_card import VirtualSoundCard  # noqa: E402

URL = f"http://127.0.0.1:{icecast_server.PORT}{icecast_server.MOUNT}"
CHIRPS = 12
SEARCH_S = 15.0
SETTLE_S = 20.0  # until some seconds of the stream are there to be given at once
PLAY = f"until ffplay -loglevel quiet -nodisp -autoexit {URL}; do sleep 1; done"
BURSTS = {"Icecast, as it comes": 65_535, "Icecast, burst-size 0": 0}


def by_icecast(burst_bytes: int) -> latency.Way:
    """Return the way through an Icecast that gives so much at once."""

    def commands(card: VirtualSoundCard) -> list[list[str]]:
        os.chmod(card.folder, 0o755)  # Icecast changes its user
        recipe = read_recipe("icecast").replace(
            "python3 client.py", f"{sys.executable} {ROOT}/client.py"
        )
        return [
            icecast_server.configure(card.folder, 10, burst_bytes=burst_bytes),
            [sys.executable, str(ROOT / "server.py"), "audio"],
            ["sh", "-c", recipe],
            ["sh", "-c", f"sleep {SETTLE_S / 2}; {PLAY}"],
        ]

    return latency.Way("icecast", [], commands)


def main() -> int:
    """Print the table; return 0, or 1 where a program is missing."""
    if missing := [name for name in ("icecast2", "ffmpeg", "ffplay") if not shutil.which(name)]:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 1
    latency.SEARCH_S, latency.SETTLE_S = SEARCH_S, SETTLE_S
    chirps = latency.make_chirps(CHIRPS, seed=1)
    print(f"{'delay in ms':<28}{'best':>10}{'median':>10}{'p95':>10}{'worst':>10}{'lost':>8}")
    for name, burst_bytes in BURSTS.items():
        with VirtualSoundCard() as card:
            print(latency.measure(by_icecast(burst_bytes), card, chirps).row(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
