"""What the tests of sound are made of: both scripts in audio mode, tones, recordings, odd peers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import wave
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import common
from common import AudioFormat
from sound_card import (
    MICROPHONE_MONITOR,
    RATE,
    SPEAKER_MONITOR,
    VirtualSoundCard,
    stop_process,
    wait_for,
)

ROOT = Path(__file__).resolve().parents[1]


LIMIT_S = 30.0


TONE_HZ = 1_000.0


OTHER_HZ = 1_700.0


PIP_S = 0.05


LOUD = 6_000


MONO = AudioFormat(48_000, 1)


class Script:
    """One of the two scripts, run as a user runs it; `lines` is what it has printed so far."""

    def __init__(
        self, name: str, *arguments: str, environment: Mapping[str, str], **options: Any
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / name), "audio", *arguments],
            env=dict(environment),
            stdin=options.get("stdin", subprocess.DEVNULL),
            stdout=options.get("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
        )
        self.lines: list[str] = []
        streams = [self.process.stderr] + ([] if "stdout" in options else [self.process.stdout])
        self._threads = [
            threading.Thread(target=self._read, args=(stream,), daemon=True) for stream in streams
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.lines.append(line.decode().rstrip())

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads if self.process.poll() is not None else []:
            thread.join(LIMIT_S)
        stop_process(self.process)

    def text(self) -> str:
        """Return everything printed so far."""
        return "\n".join(self.lines)

    def wait_for(self, text: str, times: int = 1) -> None:
        """Return once `text` has been printed so often; fails with the output if it is not."""
        try:
            wait_for(lambda: self.text().count(text) >= times, repr(text), LIMIT_S)
        except TimeoutError as error:
            pytest.fail(f"{error}; printed was:\n{self.text()}")

    def end(self) -> int:
        """Return the exit status, once there is one and all is printed."""
        status = self.process.wait(LIMIT_S)
        for thread in self._threads:
            thread.join(LIMIT_S)
        return status

    def interrupt(self) -> int:
        """Press Ctrl+C; return the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.end()


class Terminal(Script):
    """A script at a terminal of its own; `text` is all that the terminal was sent."""

    def __init__(self, name: str, *arguments: str, environment: Mapping[str, str]) -> None:
        self._terminal, far = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / name), "audio", *arguments],
            env=dict(environment),
            stdin=far,
            stdout=far,
            stderr=far,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(far)
        self._shown = bytearray()
        self._threads = [threading.Thread(target=self._follow, daemon=True)]
        self._threads[0].start()

    def _follow(self) -> None:
        with contextlib.suppress(OSError):  # so ends a terminal that nobody has open any more
            while data := os.read(self._terminal, 4096):
                self._shown += data

    def text(self) -> str:
        """Return everything shown so far."""
        return self._shown.decode()

    def type(self, keys: str) -> None:
        """Press `keys`, one of which may be Ctrl+C."""
        os.write(self._terminal, keys.encode())

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._threads[0].join(LIMIT_S)
        os.close(self._terminal)


def start_server(card: VirtualSoundCard, *arguments: str, **options: Any) -> Script:
    """Return a server that listens, on a port of its own unless `arguments` name one."""
    if "--port" not in arguments:
        arguments = ("--port", "0", *arguments)
    script = Script("server.py", *arguments, environment=card.environment, **options)
    script.wait_for("Ctrl+C to stop")
    return script


def port_of(script: Script) -> str:
    """Return the port that a server has said it listens on."""
    line = next(line for line in script.lines if "Ctrl+C to stop" in line)
    return line.split(" - ")[0].rsplit(":", 1)[1]


def start_client(card: VirtualSoundCard, port: str, *arguments: str, **options: Any) -> Script:
    """Return a client that tries to listen."""
    environment = card.environment
    return Script("client.py", "--port", port, *arguments, environment=environment, **options)


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
            wait_for(lambda: is_tone(said.tail(0.1)), "the tone at the loudspeaker", LIMIT_S)
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


def measure_delay_s(card: VirtualSoundCard) -> float:
    """Return the delay of one pip from microphone to loudspeaker."""
    with card.record(MICROPHONE_MONITOR) as heard, card.record(SPEAKER_MONITOR) as said:
        after_s = time.monotonic()
        player = card.play(bytes(RATE) + make_tone(PIP_S) + bytes(RATE))
        try:
            wait_for(lambda: first_loud_s(said, after_s), "the pip at the loudspeaker", LIMIT_S)
        finally:
            stop_process(player)
        heard_s, said_s = first_loud_s(heard, after_s), first_loud_s(said, after_s)
    assert heard_s is not None
    assert said_s is not None
    return said_s - heard_s


def numbered_frames(frames: int, channels: int = 1) -> bytes:
    """Return samples none of which is like one nearby, so that each is known again."""
    count = frames * channels
    return array("h", ((n * 7919) % 65_536 - 32_768 for n in range(count))).tobytes()


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


def greet(port: str) -> socket.socket:
    """Return a socket that has asked for sound, and has read nothing yet."""
    sock = socket.create_connection(("127.0.0.1", int(port)), LIMIT_S)
    hello = json.dumps({"type": "hello", "protocol": common.PROTOCOL, "mode": "audio"}).encode()
    sock.sendall(common.LENGTH.pack(len(hello)) + hello)
    return sock


class FakeServer:
    """Answers one client after another with the bytes it was made with."""

    def __init__(self, *frames: bytes) -> None:
        self._frames = frames
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = str(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.recv(4096)
            sock.sendall(b"".join(self._frames))
            sock.recv(4096)
            sock.close()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


class Interpreter:
    """Stands between a client and the server at `port`, and changes one word of the welcome."""

    def __init__(self, port: str, word: bytes, instead: bytes) -> None:
        self._server = ("127.0.0.1", int(port))
        self._word, self._instead = word, instead
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = str(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        near, _ = self._listener.accept()
        with near, socket.create_connection(self._server) as far:
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.sendall(near.recv(4096))
            data = far.recv(4096).replace(self._word, self._instead)
            with contextlib.suppress(OSError):
                while data:
                    near.sendall(data)
                    data = far.recv(65_536)

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def pack_welcome(**changes: Any) -> bytes:
    fields = {"type": "welcome", "protocol": 1, "mode": "audio", "rate": 48_000, "channels": 1}
    message = json.dumps({**fields, "stream": "s", **changes}).encode()
    return common.LENGTH.pack(len(message)) + message


def ends_with_one_line(script: Script, *words: str) -> None:
    """Check that a script ends with status 1 and a line that holds `words`, and nothing else."""
    assert script.end() == common.EXIT_FAILED
    assert len(script.lines) == 1, script.text()
    for word in words:
        assert word in script.lines[0]
