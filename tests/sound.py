"""What the tests of sound are made of: both scripts in audio mode, tones, recordings, odd peers."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import time
import wave
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import client
import common
from common import AudioFormat
from peers import message
from ports import free_port
from processes import Process
from proxy import DOWN, Hook, Proxy
from sound_card import (
    MICROPHONE_MONITOR,
    RATE,
    SPEAKER_MONITOR,
    Recording,
    VirtualSoundCard,
    stop_process,
)
from waiting import wait_for

LIMIT_S = 60.0
TONE_HZ = 1_000.0
OTHER_HZ = 1_700.0
PIP_S = 0.05
PIP_LIMIT_S = 10.0
PIPS = 6
LOUD = 6_000
HEAD_BYTES = 240  # of a recording, by which its place is found: less than the first block
MONO = AudioFormat(48_000, 1)

Machine = VirtualSoundCard | Mapping[str, str]  # by its card, or by the environment there


class Script(Process):
    """One of the two scripts in audio mode; all that it prints is in `lines`."""

    def __init__(self, name: str, machine: Machine, *arguments: str, **options: Any) -> None:
        env = machine.environment if isinstance(machine, VirtualSoundCard) else machine
        super().__init__(name, "audio", *arguments, env=env, merged=True, **options)

    def end(self) -> int:
        """Return the exit status, once there is one and all is printed."""
        return self.wait().status

    def interrupt(self) -> int:
        """Press Ctrl+C; return the exit status."""
        self.signal(signal.SIGINT)
        return self.end()


def start_server(machine: Machine, *arguments: str, **options: Any) -> Script:
    """Return a server that listens, on a port of its own unless `arguments` name one."""
    if "--port" not in arguments:
        arguments = ("--port", str(free_port()), *arguments)
    script = Script("server.py", machine, *arguments, **options)
    script.wait_for("Ctrl+C to stop")
    return script


def port_of(script: Script) -> str:
    """Return the port that a server has said it listens on."""
    line = next(line for line in script.lines if "Ctrl+C to stop" in line)
    return line.split(" - ")[0].rsplit(":", 1)[1]


def start_client(machine: Machine, port: str, *arguments: str, **options: Any) -> Script:
    """Return a client that tries to listen."""
    return Script("client.py", machine, "--port", port, *arguments, **options)


@contextlib.contextmanager
def heard_from_the_start(
    machine: Machine, played: Path, *arguments: str
) -> Iterator[tuple[Script, Script]]:
    """Give a server that plays a file, and a client that was there when it had hardly begun.

    The server stands still while the client starts, which may take longer than the file.
    """
    with (
        start_server(machine, "--input", str(played)) as sender,
        Proxy(int(port_of(sender))) as proxy,
    ):
        sender.signal(signal.SIGSTOP)
        with start_client(machine, str(proxy.port), *arguments) as listener:
            wait_for(lambda: proxy.passed, "the client's hello")
            sender.signal(signal.SIGCONT)
            yield sender, listener


def are_lost_and_found(card: VirtualSoundCard, player: Script, sender: Script) -> None:
    """Unplug the card of both and plug it in again, and check that they find it."""
    card.unplug()
    player.wait_for("is gone")
    sender.wait_for("is gone")
    card.plug_in()
    player.wait_for("is back")
    sender.wait_for("is back")
    assert hears_tone(card)


def is_not_missed(
    card: VirtualSoundCard, environment: Mapping[str, str], end_other: Callable[[], object]
) -> None:
    """Check that who uses `card` does not notice the end of another sound system there."""
    with (
        start_server(environment) as sender,
        start_client(environment, port_of(sender)) as player,
    ):
        player.wait_for("Listening")
        end_other()
        are_lost_and_found(card, player, sender)  # PortAudio is started anew
        assert player.interrupt() == common.EXIT_OK
        assert sender.interrupt() == common.EXIT_INTERRUPTED


def let_pass(
    card: VirtualSoundCard, sender: Script, seconds: int, folder: Path, *arguments: str
) -> None:
    """Wait until `sender` has sent so much sound, and another listener has heard it."""
    arguments += ("--output", str(folder / "passed.wav"), "--seconds", str(seconds))
    with start_client(card, port_of(sender), *arguments) as other:
        assert other.end() == common.EXIT_OK


def until_whole(
    listen: Callable[[], Process], *written: Path, is_whole: Callable[[], bool] = lambda: True
) -> Process:
    """Run a client to its end, again where it did not hear all; return the last.

    That is one that has stood still, as on a busy machine, or whose server has. It says so, unless
    it is less than a tenth of a second: `is_whole` tells. What it has `written` is removed before
    each.
    """

    def hear() -> Process | None:
        for path in written:
            path.unlink(missing_ok=True)
        with listen() as listener:
            assert listener.wait().status == common.EXIT_OK, listener.text()
        heard = listener.lines[-1]
        assert heard.startswith("heard "), listener.text()
        return None if "missed" in heard or " of " in heard or not is_whole() else listener

    listener = wait_for(hear, "all of the sound is heard")
    assert listener is not None
    return listener


def lasts(recording: Path, seconds: float) -> bool:
    """Return whether a WAV file has exactly so much sound."""
    audio, samples = read_wav(recording)
    return audio.frames_of(samples) == audio.frames_in(seconds * 1000)


def is_part(heard: bytes, sent: bytes) -> bool:
    """Return whether `heard` is a part of `sent`, but for gaps, which are silence."""
    place = sent.find(heard[:HEAD_BYTES])
    part = sent[max(0, place) :][: len(heard)]
    if place < 0 or len(part) < len(heard):
        return False
    pairs = zip(memoryview(heard).cast("h"), memoryview(part).cast("h"), strict=True)
    return all(one in (0, other) for one, other in pairs)


def make_tone(seconds: float, hertz: float = TONE_HZ) -> bytes:
    """Return a loud tone, mono at ``RATE``."""
    step = 2 * math.pi * hertz / RATE
    return array(
        "h", (int(12_000 * math.sin(n * step)) for n in range(int(seconds * RATE)))
    ).tobytes()


def level(samples: bytes, hertz: float, rate: int = RATE) -> float:
    """Return how strong a pitch is in `samples`: the amplitude of its sine."""
    values = memoryview(samples).cast("h")
    step = 2 * math.pi * hertz / rate
    real = sum(value * math.cos(n * step) for n, value in enumerate(values))
    imaginary = sum(value * math.sin(n * step) for n, value in enumerate(values))
    return 2 * math.hypot(real, imaginary) / max(1, len(values))


def hears_tone(card: VirtualSoundCard) -> bool:
    """Return whether the loudspeaker says what is played to the microphone."""
    player = card.play(make_tone(60))
    try:
        with card.record() as said:
            wait_for(lambda: is_tone(said.tail(0.1)), "the tone at the loudspeaker")
    finally:
        stop_process(player)
    return True


def is_tone(samples: bytes) -> bool:
    return level(samples, TONE_HZ) > LOUD and level(samples, OTHER_HZ) < LOUD / 4


def is_heard(hertz: float, samples: bytes) -> bool:
    """Return whether a pitch is loud in any tenth of a second of `samples`."""
    size = RATE // 10 * 2
    parts = (samples[start : start + size] for start in range(0, len(samples) - size + 1, size))
    return any(level(part, hertz) > LOUD for part in parts)


def first_loud_s(recording: Any, after_s: float) -> float | None:
    """Return when it first got loud in `recording` after a moment, if it did."""
    start_s = recording.start_s
    values = memoryview(recording.samples()).cast("h")
    first = max(0, int((after_s - start_s) * RATE))
    for frame in range(first, len(values)):
        if abs(values[frame]) > LOUD:
            return float(start_s + frame / RATE)
    return None


def is_silent(samples: bytes) -> bool:
    return max(map(abs, memoryview(samples).cast("h")), default=0) < LOUD


def measure_delay_s(card: VirtualSoundCard) -> float:
    """Return the delay of one pip from microphone to loudspeaker.

    A busy machine may swallow one: there are several.
    """
    with card.record(MICROPHONE_MONITOR) as heard, card.record(SPEAKER_MONITOR) as said:
        for _ in range(PIPS):
            wait_for(lambda: is_silent(said.tail(0.3)), "the end of what was played", LIMIT_S)
            delay_s = try_to_measure_delay_s(card, heard, said)
            if delay_s is not None:
                return delay_s
    raise TimeoutError(f"none of {PIPS} pips was heard")


def try_to_measure_delay_s(
    card: VirtualSoundCard, heard: Recording, said: Recording
) -> float | None:
    """Return the delay of a pip, None where it is not heard while it may be."""
    after_s = time.monotonic()
    player = card.play(bytes(RATE) + make_tone(PIP_S) + bytes(RATE))
    try:
        with contextlib.suppress(AssertionError):
            wait_for(lambda: first_loud_s(said, after_s), "the pip", PIP_LIMIT_S)
    finally:
        stop_process(player)
    heard_s, said_s = first_loud_s(heard, after_s), first_loud_s(said, after_s)
    return None if heard_s is None or said_s is None else said_s - heard_s


def numbered_frames(frames: int, channels: int = 1) -> bytes:
    """Return samples none of which is like one nearby, so that each is known again."""
    count = frames * channels
    return array("h", ((n * 7919) % 65_536 - 32_768 for n in range(count))).tobytes()


def bound_offset(
    asked_s: float, received_s: float, answered_s: float, returned_s: float
) -> client.OffsetBounds:
    """Return what a request for the time and its answer tell, each by the clock that was read."""
    stamps = (round(stamp_s * 1e9) for stamp_s in (asked_s, received_s, answered_s))
    return client.bound_offset(common.TimeReply(*stamps), round(returned_s * 1e9))


def write_wav(path: Path, samples: bytes, audio: AudioFormat) -> None:
    with wave.open(str(path), "wb") as file:
        file.setframerate(audio.rate)
        file.setnchannels(audio.channels)
        file.setsampwidth(2)
        file.writeframes(samples)


def read_wav(path: Path) -> tuple[AudioFormat, bytes]:
    with wave.open(str(path), "rb") as file:
        audio = AudioFormat(file.getframerate(), file.getnchannels())
        return audio, file.readframes(file.getnframes())


def decode(path: Path, audio: AudioFormat) -> bytes:
    """Return what ffmpeg hears in a file, which must have no fault."""
    command = ["ffmpeg", "-v", "error", "-xerror", "-i", str(path), "-f", "s16le"]
    command += ["-ar", str(audio.rate), "-ac", str(audio.channels), "-"]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert not done.stderr
    return done.stdout


def pack_welcome(**changes: Any) -> bytes:
    """Return the welcome of a server of sound."""
    fields = {"protocol": 2, "mode": "audio", "rate": 48_000, "channels": 1, "stream": "s"}
    return message("welcome", **{**fields, **changes})


def renamed(word: bytes, instead: bytes) -> Hook:
    """Return a hook for a proxy that changes one word of a welcome."""

    def change(direction: int, passed: int, data: bytes) -> bytes:
        return data.replace(word, instead) if direction == DOWN and not passed else data

    return change


def ends_with_one_line(script: Script, *words: str) -> None:
    """Check that a script ends with status 1 and a line that holds `words`, and nothing else."""
    assert script.end() == common.EXIT_FAILED
    assert len(script.lines) == 1, script.text()
    for word in words:
        assert word in script.lines[0]
