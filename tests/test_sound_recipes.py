"""The README's recipes for sound, run as they stand there with real programs; see recipes.py."""

from __future__ import annotations

import shutil
import socket
import sys
import wave
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import icecast_server
from melody import has_melody, is_melody, make_melody, write_melody
from recipes import Workplace, network, read_recipe, workplace
from sound_card import VirtualSoundCard, stop_process
from support import ROOT, Program, wait_for

__all__ = ["network", "workplace"]

URL = f"http://127.0.0.1:{icecast_server.PORT}{icecast_server.MOUNT}"
PCM = "-f s16le -ar 48000 -ac 1"
CROWD = ROOT / "tests" / "http_crowd.py"
HEARD_LIMIT_S = 180.0  # for all of it at once, where programs that keep their time leave some out
WAV_HEADER_BYTES = 44  # which may be left out of any sound
THE_END = "The sound has ended: standard input is at its end"
# snapserver's three, and Icecast's: taken where there is no network of the tests' own.
SNAP_PORTS = (1704, 1705, 1780)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="recipes for Linux")


def need(*programs: str) -> None:
    """Skip the test where a program is missing."""
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


def need_ports(network: tuple[str, ...], *ports: int) -> None:
    """Skip the test where its ports are another's, and there is no network of its own."""
    for port in ports if not network else ():
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} is taken, and there can be no network of our own")


def read_wav(path: Path) -> bytes:
    with wave.open(str(path), "rb") as file:
        return file.readframes(file.getnframes())


def run_all(workplace: Workplace, script: str) -> Program:
    """Run a script to its end, which is to be a good one; return it, with its output."""
    with workplace.run(script) as shell:
        assert shell.wait().status == 0, shell.text()
    return shell


def start(stack: ExitStack, shell: Program, text: str) -> Program:
    """Have `shell` run until `stack` ends, and wait for `text`."""
    stack.enter_context(shell)
    shell.wait_for(text)
    return shell


# --- sound in ---------------------------------------------------------------------------------


def test_a_song_is_heard_to_its_last_sample_by_everyone(workplace: Workplace) -> None:
    need("ffmpeg")
    # No whole blocks, and longer than it takes two clients to start, also on a busy machine.
    write_melody(workplace.folder / "song.wav", 16.003)
    run_all(workplace, "ffmpeg -loglevel error -i song.wav -c:a libmp3lame song.mp3")
    run_all(workplace, f"ffmpeg -loglevel error -i song.mp3 {PCM} song.raw")
    song = (workplace.folder / "song.raw").read_bytes()
    with workplace.recipe("sound-in") as server:
        server.wait_for("Ctrl+C to stop")
        with workplace.run("exec python3 client.py audio --output early.wav") as early:
            early.wait_for("Listening to")
            wait_for(lambda: has_sound(workplace.folder / "early.wav"), "its sound")
            with workplace.run("exec python3 client.py audio --output late.wav") as late:
                for client in (early, late):
                    assert client.wait().status == 0, client.text()
                    assert THE_END in client.text()
        assert server.wait().status == 0, server.text()
    heard = [read_wav(workplace.folder / name) for name in ("early.wav", "late.wav")]
    assert len(song) >= len(heard[0]) > len(heard[1]) > 0
    for samples, client in zip(heard, (early, late), strict=True):
        end = np.frombuffer(song[-len(samples) :], "<i2")
        differs = np.frombuffer(samples, "<i2") != end
        # What a client was too slow for is silence, and told.
        assert not np.frombuffer(samples, "<i2")[differs].any()
        assert not differs.any() or "missed" in client.text()


def has_sound(path: Path) -> bool:
    """Tell whether a recording has begun."""
    return path.exists() and path.stat().st_size > 10_000


# --- Icecast ----------------------------------------------------------------------------------


@pytest.fixture
def station(workplace: Workplace, network: tuple[str, ...]) -> Iterator[Workplace]:
    """Give a workplace where Icecast runs, and waits for a source."""
    need("icecast2", "ffmpeg", "curl")
    need_ports(network, icecast_server.PORT)
    command = icecast_server.configure(workplace.folder, clients=200, timeout_s=3600)
    with workplace.run(f"exec {' '.join(command)} 2>&1") as running:
        running.wait_for(icecast_server.STARTED)
        yield workplace


def test_icecast_hands_it_on_to_a_player_and_to_a_second_server(station: Workplace) -> None:
    write_melody(station.folder / "melody.wav", 2.4)
    with ExitStack() as stack:
        server = station.run("exec python3 server.py audio --input melody.wav")
        start(stack, server, "Ctrl+C to stop")
        start(stack, station.recipe("icecast"), "Listening to")
        wait_until_on_air(station)
        hear = f"ffmpeg -loglevel error -y -i {URL} -t 5 {PCM} heard.raw"
        wait_for(lambda: hears_melody(station, hear, "heard.raw"), "the melody", HEARD_LIMIT_S)
        radio = read_recipe("sound-in").replace("song.mp3", URL).strip() + " --port 50008"
        start(stack, station.run(radio), "Ctrl+C to stop")
        again = (
            "rm -f again.wav; python3 client.py audio --port 50008 --output again.wav --seconds 5"
        )
        wait_for(lambda: hears_melody(station, again, "again.wav"), "the melody", HEARD_LIMIT_S)


def hears_melody(station: Workplace, command: str, name: str) -> bool:
    """Run a command; return whether what it wrote is the melody, as where nothing stands still."""
    run_all(station, command)
    return is_melody((station.folder / name).read_bytes()[WAV_HEADER_BYTES:])


def wait_until_on_air(station: Workplace) -> None:
    """Wait until Icecast has a source."""
    status = f"http://127.0.0.1:{icecast_server.PORT}/status-json.xsl"
    run_all(station, f"until curl -s {status} | grep -q {icecast_server.MOUNT}; do sleep 0.1; done")


def test_one_microphone_has_200_listeners_through_icecast(station: Workplace) -> None:
    need("pulseaudio", "pacat", "pactl")
    with VirtualSoundCard() as card, ExitStack() as stack:
        player = card.play(make_melody(600))
        stack.callback(stop_process, player)
        names = ("XDG_RUNTIME_DIR", "HOME", "PULSE_SERVER", "ALSA_CONFIG_PATH")
        ears = {name: card.environment[name] for name in names}
        start(stack, station.run("exec python3 server.py audio", **ears), "Ctrl+C to stop")
        start(stack, station.recipe("icecast"), "Listening to")
        wait_until_on_air(station)
        wait_for(lambda: crowd_hears_melody(station), "the melody", HEARD_LIMIT_S)


def crowd_hears_melody(station: Workplace) -> bool:
    """Have 200 listen; return whether one heard all tones, as where no card stands still."""
    crowd = run_all(station, f"python3 {CROWD} {URL} --count 200 --seconds 6 --keep one.opus")
    assert "200 of 200 kept up" in crowd.text()
    run_all(station, f"ffmpeg -loglevel error -y -i one.opus {PCM} one.raw")
    return has_melody((station.folder / "one.raw").read_bytes())


# --- Snapcast ---------------------------------------------------------------------------------


def test_snapcast_plays_it(workplace: Workplace, network: tuple[str, ...]) -> None:
    need("snapserver", "snapclient")
    need_ports(network, *SNAP_PORTS)
    write_melody(workplace.folder / "melody.wav", 2.4)
    heard = workplace.folder / "heard.raw"
    home = {"HOME": str(workplace.folder)}
    with ExitStack() as stack:
        server = workplace.run("exec python3 server.py audio --input melody.wav")
        start(stack, server, "Ctrl+C to stop")
        start(stack, workplace.recipe("snapcast", **home), "Listening to")
        # Where snapserver took the sound for another format, the pitch would be another.
        play = "exec snapclient -h 127.0.0.1 --sampleformat '48000:16:*'"
        play += " --player file:filename=heard.raw"
        start(stack, workplace.run(play, **home), "Connected to")
        wait_for(lambda: has_melody(content(heard)), "the melody is played", HEARD_LIMIT_S)


def content(path: Path) -> bytes:
    """Return what is in a file, if there is one."""
    return path.read_bytes() if path.exists() else b""
