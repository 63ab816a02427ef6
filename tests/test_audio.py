"""Audio mode end to end: both scripts as users run them, on a virtual sound card."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import wave
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import client
import common
import server
from common import AudioBlock, AudioFormat
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


# --- what the tests are made of ---------------------------------------------------------------


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


@pytest.fixture(scope="module")
def card() -> Iterator[VirtualSoundCard]:
    with VirtualSoundCard() as virtual:
        yield virtual


@pytest.fixture
def silent_machine(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which there is no sound card at all."""
    return {
        **os.environ,
        "PULSE_SERVER": f"unix:{tmp_path}/nowhere",
        "XDG_RUNTIME_DIR": str(tmp_path),
    }


# --- microphone to loudspeaker ----------------------------------------------------------------


def test_what_the_microphone_hears_the_loudspeaker_says(card: VirtualSoundCard) -> None:
    with start_server(card) as sender, start_client(card, port_of(sender)) as player:
        player.wait_for("Listening")
        assert hears_tone(card)
        assert player.interrupt() == common.EXIT_OK
        assert "heard" in player.lines[-1]
        assert sender.interrupt() == common.EXIT_INTERRUPTED
        assert any("of sound to 1 listener" in line for line in sender.lines)


@pytest.mark.parametrize("arguments", [("--rate", "44100", "--channels", "2"), ("--rate", "8000")])
def test_other_formats_keep_their_pitch(card: VirtualSoundCard, arguments: tuple[str, ...]) -> None:
    with start_server(card, *arguments) as sender, start_client(card, port_of(sender)) as player:
        player.wait_for(f"{arguments[1]} Hz")
        assert hears_tone(card)


def test_the_delay_is_bounded_and_a_stall_leaves_none(card: VirtualSoundCard) -> None:
    with start_server(card) as sender, start_client(card, port_of(sender)) as player:
        player.wait_for("Listening")
        assert hears_tone(card)
        assert measure_delay_s(card) < 0.4
        player.process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)  # the stall itself
        player.process.send_signal(signal.SIGCONT)
        assert hears_tone(card)
        assert measure_delay_s(card) < 0.4


def test_a_server_whose_clock_is_fast_is_followed(card: VirtualSoundCard) -> None:
    # The client plays 48,000 frames a second of the 48,024 that are captured: 500 ppm.
    seconds = 12
    with (
        start_server(card, "--rate", "48024") as sender,
        Interpreter(port_of(sender), b'"rate":48024', b'"rate":48000') as between,
        start_client(card, between.port, "--latency", "80", "--seconds", str(seconds)) as player,
    ):
        assert player.end() == common.EXIT_OK
        found = re.search(r"(\d+) frames? dropped", player.lines[-1])
    # All that is certain on a busy machine, where stalls have sound thrown away in one go;
    # test_jitter_buffer.py counts every frame.
    assert found is not None
    assert int(found[1]) > 0


def test_the_client_waits_for_a_server_and_comes_back_to_it(card: VirtualSoundCard) -> None:
    with start_server(card) as sender:
        port = port_of(sender)
        player = start_client(card, port)
        player.wait_for("Listening")
        sender.process.kill()
    with player:
        player.wait_for("looking for it")
        with start_server(card, "--port", port):
            player.wait_for("Listening", times=2)
            assert hears_tone(card)


def test_a_sound_card_that_is_unplugged_is_found_again(card: VirtualSoundCard) -> None:
    with start_server(card) as sender, start_client(card, port_of(sender)) as player:
        player.wait_for("Listening")
        assert hears_tone(card)
        card.unplug()
        player.wait_for("is gone")
        sender.wait_for("is gone")
        card.plug_in()
        player.wait_for("is back")
        sender.wait_for("is back")
        assert hears_tone(card)


def test_a_listener_that_is_stuck_harms_nobody_and_is_dropped(
    card: VirtualSoundCard, tmp_path: Path
) -> None:
    recording = tmp_path / "all.wav"
    with start_server(card) as sender, greet(port_of(sender)):
        with start_client(
            card, port_of(sender), "--output", str(recording), "--seconds", "3"
        ) as other:
            assert other.end() == common.EXIT_OK
            assert "missed" not in other.lines[-1]
        sender.wait_for("took nothing for 5 s")
    assert len(read_wav(recording)[1]) == 3 * 48_000 * 2


# --- files and pipes --------------------------------------------------------------------------


@pytest.mark.parametrize("audio", [MONO, AudioFormat(44_100, 2)])
def test_a_wav_file_arrives_sample_for_sample(
    card: VirtualSoundCard, tmp_path: Path, audio: AudioFormat
) -> None:
    sent = numbered_frames(audio.rate, audio.channels)
    write_wav(tmp_path / "sent.wav", sent, audio)
    recording = tmp_path / "heard.wav"
    with (
        start_server(card, "--input", str(tmp_path / "sent.wav")) as sender,
        start_client(
            card, port_of(sender), "--output", str(recording), "--seconds", "1.5"
        ) as writer,
    ):
        assert writer.end() == common.EXIT_OK
    heard_format, heard = read_wav(recording)
    assert heard_format == audio
    assert len(heard) == audio.frames_in(1_500) * audio.frame_bytes
    assert heard in sent * 3  # it is played over and over


def test_a_pipe_arrives_sample_for_sample_and_ends(card: VirtualSoundCard, tmp_path: Path) -> None:
    sent = numbered_frames(40_000, 2)
    arguments = ("--input", "-", "--rate", "32000", "--channels", "2")
    with (
        (tmp_path / "heard.raw").open("wb") as heard,
        start_server(card, *arguments, stdin=subprocess.PIPE) as sender,
        start_client(card, port_of(sender), "--output", "-", stdout=heard) as reader,
    ):
        reader.wait_for("Listening")
        sender.wait_for("listening")
        assert sender.process.stdin is not None
        sender.process.stdin.write(sent)
        sender.process.stdin.close()
        assert reader.end() == common.EXIT_OK
        assert sender.end() == common.EXIT_OK
        assert "standard input is at its end" in reader.text()
    assert (tmp_path / "heard.raw").read_bytes() == sent


def test_a_pipe_without_sound_is_a_failure(silent_machine: dict[str, str]) -> None:
    arguments = ("--input", "-", "--port", "0")
    with Script("server.py", *arguments, environment=silent_machine) as sender:
        assert sender.end() == common.EXIT_FAILED
        assert any("there was no sound on standard input" in line for line in sender.lines)


def test_a_recording_beside_playing_is_valid_after_kill_9(
    card: VirtualSoundCard, tmp_path: Path
) -> None:
    recording = tmp_path / "talk.wav"
    with (
        start_server(card) as sender,
        start_client(card, port_of(sender), "--record", str(recording)) as player,
    ):
        wait_for(lambda: recording.exists() and recording.stat().st_size > 50_000, "a recording")
        player.process.kill()
        player.process.wait(LIMIT_S)
    audio, samples = read_wav(recording)
    assert audio == MONO
    assert len(samples) == recording.stat().st_size - client.WavFile.HEADER.size


def test_a_reader_that_goes_ends_the_client_quietly_and_what_is_recorded_stays(
    card: VirtualSoundCard, tmp_path: Path
) -> None:
    write_wav(tmp_path / "sent.wav", numbered_frames(48_000), MONO)
    recording = tmp_path / "heard.wav"
    reading, writing = os.pipe()
    with start_server(card, "--input", str(tmp_path / "sent.wav")) as sender:
        arguments = ("--output", "-", "--record", str(recording))
        with start_client(card, port_of(sender), *arguments, stdout=writing) as player:
            os.close(writing)
            wait_for(lambda: recording.exists() and recording.stat().st_size > 9_000, "sound")
            os.close(reading)
            assert player.end() == common.EXIT_OK
            assert "heard" in player.lines[-1]
            assert "pipe" not in player.text()
    assert len(read_wav(recording)[1]) == recording.stat().st_size - client.WavFile.HEADER.size


def test_raw_samples_are_not_written_to_a_terminal(card: VirtualSoundCard) -> None:
    with Terminal("client.py", "--output", "-", environment=card.environment) as player:
        assert player.end() == common.EXIT_FAILED
        assert "terminal" in player.text()
    with start_client(card, "1", "--record", "-") as player:
        ends_with_one_line(player, "--output -")


def test_what_comes_last_is_played_before_the_client_ends(card: VirtualSoundCard) -> None:
    with (
        start_server(card, "--input", "-", stdin=subprocess.PIPE) as sender,
        start_client(card, port_of(sender)) as player,
        card.record() as said,
    ):
        sender.wait_for("listening")
        assert sender.process.stdin is not None
        sender.process.stdin.write(make_tone(4) + make_tone(0.3, OTHER_HZ))
        sender.process.stdin.close()
        assert player.end() == common.EXIT_OK
        assert sender.end() == common.EXIT_OK
        wait_for(lambda: is_heard(OTHER_HZ, said.tail(3)), "the end of the sound", LIMIT_S)


def test_a_wav_that_is_full_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WAV_LIMIT_BYTES", client.WavFile.HEADER.size + 2_001)
    (tmp_path / "talk.wav").write_bytes(b"somebody else's")
    writer = client.WavWriter(str(tmp_path / "talk.wav"), common.Console(quiet=True))
    writer.begin(MONO)
    sent = numbered_frames(2_500)
    writer.write(sent[:3_000])
    writer.write(sent[3_000:])
    writer.close()
    parts = [read_wav(tmp_path / f"talk ({number}).wav")[1] for number in (1, 2, 3)]
    assert b"".join(parts) == sent
    assert len(parts[0]) == 2_000
    assert (tmp_path / "talk.wav").read_bytes() == b"somebody else's"


def test_a_gap_becomes_silence_of_its_length(tmp_path: Path) -> None:
    output = client.RecordingOutput(
        client.WavWriter(str(tmp_path / "gap.wav"), common.Console(quiet=True))
    )
    output.begin(MONO)
    output.write(b"\1\1" * 10, gap_frames=0)
    output.write(b"\2\2" * 10, gap_frames=60_000)
    output.close()
    assert read_wav(tmp_path / "gap.wav")[1] == b"\1\1" * 10 + bytes(120_000) + b"\2\2" * 10
    assert output.status() == "missed 1250 ms"


# --- at a terminal ----------------------------------------------------------------------------

CODE = "KQ7M-2XFD-9WPA"


def test_the_pairing_code_is_asked_for_where_the_user_sees_it(card: VirtualSoundCard) -> None:
    with (
        start_server(card, "--code", CODE) as sender,
        Terminal("client.py", "--port", port_of(sender), environment=card.environment) as player,
    ):
        player.wait_for("Pairing code: ")
        shown = player.text()
        time.sleep(3 * common.STATUS_INTERVAL_S)  # no status line comes over the question
        assert player.text() == shown
        player.type(CODE + "\n")
        player.wait_for("Listening")
        player.wait_for("0:01")
        player.type("\x03")
        assert player.end() == common.EXIT_OK


def test_ctrl_c_before_anything_was_heard_is_status_130(card: VirtualSoundCard) -> None:
    with (
        start_server(card, "--code", CODE) as sender,
        Terminal("client.py", "--port", port_of(sender), environment=card.environment) as player,
    ):
        player.wait_for("Pairing code: ")
        player.type("\x03")
        assert player.end() == common.EXIT_INTERRUPTED
    with start_client(card, "1") as player:
        player.wait_for("looking for it")
        assert player.interrupt() == common.EXIT_INTERRUPTED


# --- numbers and buffers ----------------------------------------------------------------------


def test_ctrl_c_at_any_moment_of_recording_leaves_it_able_to_end(tmp_path: Path) -> None:
    def press_ctrl_c_after(steps: int) -> Any:
        def trace(frame: Any, event: str, _argument: Any) -> Any:
            nonlocal steps
            frame.f_trace_opcodes = True
            if event == "opcode":
                steps -= 1
                if steps < 0:
                    raise KeyboardInterrupt
            return trace

        return trace

    moment, finished = 0, False
    while not finished:
        console = common.Console(quiet=True)
        output = client.RecordingOutput(client.WavWriter(str(tmp_path / f"{moment}.wav"), console))
        output.begin(MONO)
        sys.settrace(press_ctrl_c_after(moment))
        try:
            output.write(bytes(480), 0)
            output.write(bytes(480), 0)
            finished = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        closing = threading.Thread(target=output.close, daemon=True)
        closing.start()
        closing.join(LIMIT_S)
        assert not closing.is_alive(), f"Ctrl+C after {moment} steps"
        moment += 1


def test_the_timeline_tells_gaps_also_over_a_lost_connection() -> None:
    timeline = client.Timeline()
    timeline.begin("one")
    assert timeline.advance(AudioBlock(5_000, 0, bytes(200)), MONO) == 0
    assert timeline.advance(AudioBlock(5_150, 0, bytes(200)), MONO) == 50
    timeline.begin("one")
    assert timeline.advance(AudioBlock(6_250, 0, bytes(200)), MONO) == 1_000
    timeline.begin("two")
    assert timeline.advance(AudioBlock(7, 0, bytes(200)), MONO) == 0
    with pytest.raises(common.ProtocolError):
        timeline.advance(AudioBlock(7, 0, bytes(200)), MONO)


def test_seconds_count_over_formats_and_cut_gaps() -> None:
    listening = client.Listening(client.Address("", 0), [], 2.0, common.Console(quiet=True))
    stereo = AudioFormat(8_000, 2)
    listening._pass_on(AudioBlock(0, 0, bytes(96_000)), MONO)
    assert listening.heard_s == 1.0
    listening._timeline.begin("another")
    listening._pass_on(AudioBlock(0, 0, bytes(16_000)), stereo)
    assert listening.heard_s == 1.5
    listening._pass_on(AudioBlock(600 * 8_000, 0, bytes(400)), stereo)
    assert listening.heard_s == 2.0


def test_captured_sound_is_joined_up_to_a_gap() -> None:
    captured = server.CaptureQueue(MONO)
    for _ in range(3):
        captured.put(bytes(240))
    captured.skip(1.0)
    captured.put(bytes(240))
    captured.end("over")
    first, second = captured.take(0), captured.take(0)
    assert first is not None
    assert second is not None
    assert (first.first_frame, len(first.samples)) == (0, 720)
    assert (second.first_frame, len(second.samples)) == (48_360, 240)
    assert captured.take(0) is None


def test_captured_sound_that_nobody_takes_is_bounded() -> None:
    captured = server.CaptureQueue(MONO)
    for _ in range(10_000):
        captured.put(bytes(240))
    frames = 0
    while block := captured.take(0):
        if not block.samples:
            break
        frames += MONO.frames_of(block.samples)
    assert frames <= MONO.frames_in(server.CAPTURE_LIMIT_MS)


def test_a_slow_listener_gets_whole_blocks_and_misses_whole_blocks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as acceptor:
        far = socket.create_connection(acceptor.getsockname())
        near, _ = acceptor.accept()
    with common.Connection(near, "near") as sending, common.Connection(far, "far") as reading:
        server.limit_send_buffer(near, MONO)
        listener = server.Listener(sending)
        data = {number: bytes([number % 256]) * 20_000 for number in range(2_000)}
        for number, samples in data.items():
            listener.offer(AudioBlock(number, 0, samples).pack(), 0.0)
        assert 0 < listener.missed_blocks < len(data)
        for _ in range(len(data) - listener.missed_blocks - 1):  # the last one is under way
            block = common.receive_block(reading, MONO)
            assert block.samples == data[block.first_frame]


# --- what may go wrong ------------------------------------------------------------------------


def ends_with_one_line(script: Script, *words: str) -> None:
    """Check that a script ends with status 1 and a line that holds `words`, and nothing else."""
    assert script.end() == common.EXIT_FAILED
    assert len(script.lines) == 1, script.text()
    for word in words:
        assert word in script.lines[0]


def test_no_microphone_and_no_loudspeaker_are_a_line_each(silent_machine: dict[str, str]) -> None:
    with Script("server.py", "--port", "0", environment=silent_machine) as sender:
        ends_with_one_line(sender, "no microphone", "--input")
    with Script("client.py", environment=silent_machine) as player:
        ends_with_one_line(player, "no loudspeaker", "--output")


@pytest.mark.parametrize("audio", [AudioFormat(100, 1), AudioFormat(48_000, 40)])
def test_a_wav_file_of_an_odd_format_is_a_line(
    silent_machine: dict[str, str], tmp_path: Path, audio: AudioFormat
) -> None:
    write_wav(tmp_path / "odd.wav", bytes(80), audio)
    arguments = ("--port", "0", "--input", str(tmp_path / "odd.wav"))
    with Script("server.py", *arguments, environment=silent_machine) as sender:
        ends_with_one_line(sender, "odd.wav", "out of range")


def test_no_pyaudio_is_a_line(card: VirtualSoundCard, tmp_path: Path) -> None:
    (tmp_path / "pyaudio.py").write_text("raise ImportError('not here')\n")
    environment = {**card.environment, "PYTHONPATH": str(tmp_path)}
    with Script("server.py", "--port", "0", environment=environment) as sender:
        ends_with_one_line(sender, "PyAudio", "pip install")


def test_a_name_that_no_device_has_is_a_line(card: VirtualSoundCard) -> None:
    with start_client(card, "1", "--output", "gramophone") as player:
        ends_with_one_line(player, "gramophone", "pulse")


def test_devices_are_listed(card: VirtualSoundCard) -> None:
    for name in ("server.py", "client.py"):
        with Script(name, "--list-devices", environment=card.environment) as script:
            assert script.end() == common.EXIT_OK
            assert "channels" in script.lines[0]
            assert any(line.startswith("*") and "ALSA" in line for line in script.lines)
            assert "ALSA lib" not in script.text()


@pytest.mark.parametrize(
    "frames",
    [
        (pack_welcome(rate=0),),
        (pack_welcome(channels=1_000_000),),
        (pack_welcome(), b"\xff\xff\xff\xff"),
        (pack_welcome(), common.LENGTH.pack(3) + b"abc"),
        (pack_welcome(), AudioBlock(0, 0, b"odd").pack()),
        (pack_welcome(), AudioBlock(9, 0, b"ok").pack(), AudioBlock(0, 0, b"no").pack()),
    ],
)
def test_a_bad_server_is_a_line(
    card: VirtualSoundCard, tmp_path: Path, frames: tuple[bytes, ...]
) -> None:
    output = str(tmp_path / "x.wav")
    with (
        FakeServer(*frames) as fake,
        start_client(card, fake.port, "-q", "--output", output) as reader,
    ):
        ends_with_one_line(reader)


def test_seconds_end_a_client_that_finds_no_server(card: VirtualSoundCard, tmp_path: Path) -> None:
    output = str(tmp_path / "x.wav")
    with start_client(card, "1", "--output", output, "--seconds", "1") as reader:
        assert reader.end() == common.EXIT_FAILED
        assert "no server" in reader.lines[-1]


@pytest.mark.parametrize("arguments", [("--rate", "0"), ("--rate", "x"), ("--channels", "9")])
def test_wrong_arguments_are_status_2(
    silent_machine: dict[str, str], arguments: tuple[str, str]
) -> None:
    with Script("server.py", *arguments, environment=silent_machine) as sender:
        assert sender.end() == common.EXIT_USAGE
