"""What is counted and kept between capture and loudspeaker: queues, gaps, seconds."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import client
import common
import server
from common import AudioBlock, AudioFormat
from peers import FakeServer, RawPeer, socket_pair
from ports import HOST
from sound import LIMIT_S, MONO, pack_welcome
from support import MIB, linux
from waiting import background, ends_soon, wait_for

LAST = b"last" * 10
PAUSE_S = 0.6  # of an input, which is longer than what is taken for a delay


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
        output = client.RecordingFiles(str(tmp_path / f"{moment}.wav"), console).open(MONO)
        sys.settrace(press_ctrl_c_after(moment))
        try:
            output.write(bytes(480), 0)
            output.write(bytes(480), 0)
            finished = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        ends_soon(output.close)
        moment += 1


def test_the_numbering_tells_gaps_also_over_a_lost_connection() -> None:
    numbering = client.Numbering()
    numbering.begin("one")
    assert numbering.advance(AudioBlock(5_000, 0, bytes(200)), MONO) == 0
    assert numbering.advance(AudioBlock(5_150, 0, bytes(200)), MONO) == 50
    assert numbering.advance(AudioBlock(5_300, 0, b""), MONO) == 0
    assert numbering.advance(AudioBlock(5_300, 0, bytes(200)), MONO) == 50
    numbering.begin("one")
    assert numbering.advance(AudioBlock(6_400, 0, bytes(200)), MONO) == 1_000
    numbering.begin("two")
    assert numbering.advance(AudioBlock(7, 0, bytes(200)), MONO) == 0
    with pytest.raises(common.ProtocolError):
        numbering.advance(AudioBlock(7, 0, bytes(200)), MONO)


def test_seconds_count_over_formats_and_cut_gaps() -> None:
    listening = client.Listening(client.Address("", 0), [], 2.0, common.Console(quiet=True))
    stereo = AudioFormat(8_000, 2)
    listening._pass_on(AudioBlock(0, 0, bytes(96_000)), MONO)
    assert listening.heard_s == 1.0
    listening._numbering.begin("another")
    listening._pass_on(AudioBlock(0, 0, bytes(16_000)), stereo)
    assert listening.heard_s == 1.5
    listening._pass_on(AudioBlock(600 * 8_000, 0, bytes(400)), stereo)
    assert listening.heard_s == 2.0
    assert listening.summarize() == "heard 0:02.0, missed 500 ms"


def test_no_more_sound_is_taken_than_there_can_have_been() -> None:
    listening = client.Listening(client.Address("", 0), [], None, common.Console(quiet=True))
    listening._pass_on(AudioBlock(0, 0, bytes(96_000)), MONO)
    listening._pass_on(AudioBlock(3_000 * 48_000, 0, bytes(96_000)), MONO)
    assert listening.heard_s < client.MAX_AHEAD_S / 2 + 0.1
    with pytest.raises(common.ProtocolError, match="more sound"):
        for second in range(3_001, 6_000):
            listening._pass_on(AudioBlock(second * 48_000, 0, bytes(96_000)), MONO)


def test_seconds_end_also_where_hardly_anything_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_BEHIND_S", 0.2)
    may_end = threading.Event()

    def trickle(peer: RawPeer) -> None:
        peer.receive()
        peer.send(pack_welcome())
        number = 0
        while not may_end.wait(0.05):
            peer.send(AudioBlock(number, 0, bytes(2)).encode())
            number += 1

    with FakeServer(trickle) as fake:
        assert record(fake.port, tmp_path, "--quiet", "--seconds", "0.5") == common.EXIT_OK
        may_end.set()


def record(port: int, folder: Path, *arguments: str) -> int:
    """Record from a server in this process; return the exit status."""
    args = client.parse_arguments([*arguments, "--output", str(folder / "heard.wav")])
    return client.start_audio_client(client.Address(HOST, port), args)


def test_a_server_that_is_lost_before_the_seconds_have_been_heard_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(peer: RawPeer) -> None:
        peer.receive()
        peer.send(pack_welcome())
        peer.send(AudioBlock(0, 0, bytes(2)).encode())

    with FakeServer(leave) as fake:
        assert record(fake.port, tmp_path, "--seconds", "0.2") == common.EXIT_FAILED
    assert capsys.readouterr().out.endswith("heard 0:00.0 of 0:00.2\n")


def test_a_server_that_is_lost_is_told_once_in_whatever_ways_it_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clients = iter(range(1000))

    def serve(peer: RawPeer) -> None:
        number = next(clients)
        peer.receive()
        if number in (1, 2):
            return  # closes before it has answered
        if number == 3:
            peer.send(common.encode_message(common.Error("it is full", common.BUSY)))
            peer.hang_up()
            return
        peer.send(pack_welcome())
        peer.send(AudioBlock(number, 0, bytes(2)).encode())
        if number > 3:
            peer.send(common.StreamEnd("over").encode())
            peer.hang_up()

    with FakeServer(serve) as fake:
        assert record(fake.port, tmp_path) == common.EXIT_OK
    told = [line.partition(" - ") for line in capsys.readouterr().err.splitlines()]
    assert {end for _, _, end in told} == {"looking for it until Ctrl+C"}
    lost, busy = (reason for reason, _, _ in told)
    assert "closed the connection" in lost
    assert busy == "it is full"


class Unfinishable(client.Pipe):
    """A writer whose last bytes find no room; it fails once."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        """Fail."""
        self.closed += 1
        raise common.SocketPairError("no room")


def test_an_output_that_cannot_be_finished_for_another_format_is_closed_once() -> None:
    listening = client.Listening(client.Address("", 0), [], None, common.Console(quiet=True))
    writer = Unfinishable()
    listening.outputs = [client.RecordingOutput(writer, MONO)]
    with pytest.raises(common.SocketPairError, match="no room"):
        listening._open_outputs(AudioFormat(44_100, 2), None)
    client.close_all(listening.outputs)
    assert writer.closed == 1


class Gone(client.Pipe):
    """A pipe whose reader has gone."""

    def __init__(self) -> None:
        pass

    def write(self, _samples: bytes) -> None:
        """Fail as a pipe does."""
        raise client.ReaderGone("standard output was closed")


@pytest.mark.parametrize("is_pipe_first", [True, False])
def test_a_reader_that_goes_does_not_hide_what_has_failed(is_pipe_first: bool) -> None:
    pipe = client.RecordingOutput(Gone(), MONO)
    pipe.write(bytes(2), 0)
    recording = client.RecordingOutput(Unfinishable(), MONO)
    with pytest.raises(common.SocketPairError, match="no room"):
        client.close_all([pipe, recording] if is_pipe_first else [recording, pipe])
    with pytest.raises(common.ProtocolError), contextlib.ExitStack() as closing:
        closing.callback(client.close_all, [pipe])
        raise common.ProtocolError("received nonsense")


class Stuck(client.Pipe):
    """A writer that writes nothing until it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def write(self, _samples: bytes) -> None:
        """Block until it may."""
        self.may.wait(LIMIT_S)


def test_blocks_without_samples_fill_the_queue_of_a_recording_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "RECORDING_QUEUE_BYTES", 100_000)
    writer = Stuck()
    output = client.RecordingOutput(writer, MONO)

    def write() -> None:
        for _ in range(1_000):
            output.write(b"", 0)

    with background(write):
        wait_for(lambda: output._waiting_bytes > client.RECORDING_QUEUE_BYTES)
        writer.may.set()
    output.close()


class Slow(client.Pipe):
    """A writer that takes a block when it may."""

    def __init__(self) -> None:
        self.may = threading.Semaphore(0)
        self.samples = b""

    def write(self, samples: bytes) -> None:
        """Take a block, once it may."""
        assert self.may.acquire(timeout=LIMIT_S)
        self.samples += samples


def test_a_reader_that_is_slow_gets_all_of_the_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a block comes behind a long gap."""
    writer = Slow()
    output = client.RecordingOutput(writer, MONO)
    for number in range(5):
        output.write(bytes([number, number]), 3 * MONO.rate if number == 4 else 0)

    def let_one_through(_seconds: float) -> None:
        before = output._writes
        writer.may.release()
        wait_for(lambda: output._writes > before or not output._thread.is_alive())

    monkeypatch.setattr(output._thread, "join", let_one_through)
    output.close()
    silence = bytes(3 * MONO.rate * MONO.frame_bytes)
    assert writer.samples == bytes([0, 0, 1, 1, 2, 2, 3, 3]) + silence + bytes([4, 4])


def test_a_reader_that_reads_no_more_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RECORDING_CLOSE_S", 0.1)
    writer = Stuck()
    output = client.RecordingOutput(writer, MONO)
    output.write(bytes(2), 0)
    with pytest.raises(common.SocketPairError, match="the last of the sound"):
        output.close()
    writer.may.set()


class Broken(client.Pipe):
    """A writer that fails in a way that nobody has thought of."""

    def write(self, _samples: bytes) -> None:
        """Fail."""
        raise MemoryError


def test_a_recording_that_fails_in_any_way_ends_whoever_records() -> None:
    output = client.RecordingOutput(Broken(), MONO)
    output.write(bytes(2), 0)
    with pytest.raises(MemoryError):
        output.close()


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


@pytest.mark.parametrize("block_bytes", [240, 2_048])
def test_captured_sound_that_nobody_takes_is_bounded(block_bytes: int) -> None:
    captured = server.CaptureQueue(MONO)
    for _ in range(10_000):
        captured.put(bytes(block_bytes))
    frames = 0
    while block := captured.take(0):
        if not block.samples:
            break
        frames += MONO.frames_of(block.samples)
    assert frames <= MONO.frames_in(server.CAPTURE_LIMIT_MS)


class Microphone:
    """Blocks of 3 ms in made-up time, into a CaptureQueue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.captured = server.CaptureQueue(MONO)
        monkeypatch.setattr(common, "clock_s", lambda: self.now_s)

    def run(self, seconds: float, ago_s: float) -> float:
        """Capture so long what is said to be `ago_s` old; return how old it is by the line."""
        for _ in range(round(seconds / 0.003)):
            self.now_s += 0.003
            self.captured.put(bytes(288), ago_s)
            block = self.captured.take(0)
        assert block is not None
        return self.now_s - block.captured_ns / 1e9


def test_a_microphone_that_says_something_impossible_for_a_while_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    microphone = Microphone(monkeypatch)
    for _ in range(2):  # as PulseAudio does when it opens one
        microphone.now_s += 0.03
        for _ in range(10):  # late all at once
            microphone.captured.put(bytes(288), 0.65)
        assert microphone.run(3.0, 0.65) == pytest.approx(0.0, abs=1e-4)
        assert microphone.run(1.0, 0.015) == pytest.approx(0.015, abs=1e-4)
        for _ in range(5):  # as it changes its latency
            assert microphone.run(0.1, 0.42) == pytest.approx(0.015, abs=1e-4)
        assert microphone.run(1.0, 0.015) == pytest.approx(0.015, abs=1e-4)
        microphone.captured.skip(5.0)
        microphone.now_s += 5.0


@pytest.mark.parametrize("ago_s", [0.005, 0.1])
def test_a_microphone_that_says_so_for_long_is_believed(
    monkeypatch: pytest.MonkeyPatch, ago_s: float
) -> None:
    microphone = Microphone(monkeypatch)
    microphone.run(1.0, 0.015)
    assert microphone.run(server.BELIEVED_S + 1, ago_s) == pytest.approx(ago_s, abs=1e-4)


def test_sound_is_timed_by_a_clock_that_is_fine_on_any_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Windows' own before Python 3.13, which goes in steps: of a day, here.
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)
    captured = server.CaptureQueue(MONO)
    captured.put(bytes(240))
    moments = [block.captured_ns for block in (captured.take(0), captured.take(0)) if block]
    assert 0 < moments[0] < moments[1]


def test_a_broadcaster_that_can_send_no_more_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(server.PcmEncoding, "encode", fail)
    captured = server.CaptureQueue(MONO)
    broadcaster = server.Broadcaster(captured)
    sending, reading = socket.socketpair()
    with common.Connection(sending, "near") as connection, reading:
        listener = broadcaster.add(connection)
        broadcaster.start()
        captured.put(bytes(240))
        assert listener.gone.wait(LIMIT_S)
        assert broadcaster.has_ended
    assert captured.failed
    assert captured.end_reason.startswith("out of memory")


@pytest.mark.parametrize("error", [MemoryError(), KeyError("?")])
def test_an_input_that_fails_in_any_way_ends(error: Exception) -> None:
    def fail() -> bytes:
        raise error

    source = server.PacedInput("a file", iter(fail, b""), server.CaptureQueue(MONO))
    assert source.captured.take(LIMIT_S) is None
    assert source.captured.failed
    assert source.captured.end_reason.startswith("a file cannot be read any further (")


def test_sound_that_comes_after_a_pause_is_timed_by_when_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured, pauses_s, clock_s = server.CaptureQueue(MONO), [0.0], common.clock_s
    monkeypatch.setattr(common, "clock_s", lambda: clock_s() + sum(pauses_s))

    def speak() -> Iterator[bytes]:
        yield bytes(9_600)
        wait_for(lambda: captured._next_frame > 4_700, "its whole blocks are captured")
        pauses_s.append(PAUSE_S)
        yield bytes(9_600)  # for less than it takes to see that a pause was none of the clock's

    server.PacedInput("speech", speak(), captured)
    blocks = [block for block in iter(lambda: captured.take(LIMIT_S), None) if block.samples]
    gaps_ns = [later.captured_ns - block.captured_ns for block, later in itertools.pairwise(blocks)]
    assert max(gaps_ns) > (PAUSE_S - 0.2) * 1e9
    assert sum(MONO.frames_of(block.samples) for block in blocks) == 9_600


def test_listeners_that_come_and_go_have_a_bounded_number_of_lines_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broadcaster = server.Broadcaster(server.CaptureQueue(MONO))
    with caplog.at_level(logging.INFO, "socket-pair"):
        for _ in range(server.LINES_AT_ONCE):
            near, far = socket_pair()
            far.close()
            with common.Connection(near, "192.0.2.1:5") as connection:
                server.handle_audio_client(connection, broadcaster)
    assert caplog.messages[:2] == ["192.0.2.1:5: listening", "192.0.2.1:5: left"]
    assert len(caplog.messages) < 1.5 * server.LINES_AT_ONCE


def test_a_slow_listener_gets_whole_blocks_and_misses_whole_blocks() -> None:
    near, far = socket_pair()
    with common.Connection(near, "near") as sending, common.Connection(far, "far") as reading:
        sending.set_option(socket.SOL_SOCKET, socket.SO_SNDBUF, server.send_buffer_bytes(MONO, 0.0))
        listener = server.Listener(sending, server.PcmEncoding(MONO))
        data = {number: bytes([number % 256]) * 20_000 for number in range(2_000)}
        for number, samples in data.items():
            listener.offer(AudioBlock(number, 0, samples).encode(), 0.0)
        assert 0 < listener.missed_blocks < len(data)
        for _ in range(len(data) - listener.missed_blocks - 1):  # the last one is under way
            block = common.decode_sound(reading.read_frame(MONO.max_block_bytes), MONO)
            assert isinstance(block, AudioBlock)
            assert block.samples == data[block.first_frame]


@linux
@pytest.mark.parametrize("has_pause", [False, True])
def test_a_slow_listener_that_asks_for_the_time_hears_the_last_sample_and_is_told_of_the_end(
    has_pause: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LISTENER_TIMEOUT_S", LIMIT_S)  # this one is as slow as may be
    captured = server.CaptureQueue(MONO)
    broadcaster = server.Broadcaster(captured)
    near, far = socket_pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    request = common.encode_message(common.TimeRequest(0))
    received = bytearray()

    def serve() -> None:
        with common.Connection(near, "near") as connection:
            server.handle_audio_client(connection, broadcaster)

    with far, background(serve):
        wait_for(lambda: broadcaster.listeners, "a listener")
        broadcaster.start()
        while not broadcaster.count_missed():
            captured.put(bytes(9_600))
        captured.put(LAST)
        if has_pause:
            captured.put(b"")  # as which a sign of life is sent
        captured.end("over")
        while not received.endswith(common.StreamEnd("over").encode()):
            received += far.recv(16_000) or pytest.fail("it was not told")
            with contextlib.suppress(OSError):  # all has arrived, and the server has hung up
                far.sendall(request)
    assert LAST in received


@linux
def test_a_connection_with_a_request_unread_is_not_closed_before_the_end_has_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system would reset it, and throw away what it has yet to send."""
    near, far = socket_pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    has_written, count = threading.Event(), common.count_unacknowledged

    def note_and_count(sock: socket.socket) -> int:
        has_written.set()
        return count(sock)

    def serve() -> None:
        with connection, connection.limit(LIMIT_S):
            listener.send_end("over")
        has_written.set()

    with far, common.Connection(near, "near") as connection:
        listener = server.Listener(connection, server.PcmEncoding(MONO))
        connection.write(bytes(200_000))  # far more than the other side takes for now
        far.sendall(common.encode_message(common.TimeRequest(0)))
        monkeypatch.setattr(common, "count_unacknowledged", note_and_count)
        with background(serve):
            assert has_written.wait(LIMIT_S)
            received = b"".join(iter(lambda: far.recv(MIB), b""))
    assert received.endswith(common.StreamEnd("over").encode())


def test_a_listener_is_not_idle_when_the_sound_ends_however_long_there_was_none() -> None:
    broadcaster = server.Broadcaster(server.CaptureQueue(MONO))
    near, far = socket_pair()
    with common.Connection(near, "near") as connection, far:
        listener = broadcaster.add(connection)
        connection._progress_s -= 3_600.0
        listener.end()
        assert connection.idle_s() < 3_600.0


def test_what_listeners_have_missed_is_told_while_they_are_there_and_once_they_have_left() -> None:
    broadcaster = server.Broadcaster(server.CaptureQueue(MONO))
    near, far = socket_pair()
    with common.Connection(near, "near") as sending, far:
        listener = broadcaster.add(sending)
        while listener.missed_blocks < 2:
            listener.offer(bytes(20_000), 0.0)
        assert server.summarize(broadcaster).endswith("1 listener, 2 blocks missed")
        broadcaster.remove(listener)
        assert server.summarize(broadcaster).endswith("1 listener, 2 blocks missed")


@linux
@pytest.mark.parametrize("kbit", [None, 16])
def test_less_than_a_second_waits_for_a_network_that_is_slow_or_stands(kbit: int | None) -> None:
    audio = AudioFormat(8_000, 1)
    encoding = server.PcmEncoding(audio) if kbit is None else server.OpusEncoding(audio, kbit)
    near, far = socket_pair()
    with common.Connection(near, "near") as sending, far:
        sending.set_option(
            socket.SOL_SOCKET, socket.SO_SNDBUF, server.send_buffer_bytes(audio, 0.0)
        )
        listener = server.Listener(sending, encoding)

        def offer(number: int) -> None:
            block = AudioBlock(number * 80, 0, bytes(160))
            listener.offer(encoding.encode(block), number / 100)

        for number in range(400):
            offer(number)
        assert sending.unsent() < encoding.bytes_per_s
        missed = listener.missed_blocks
        assert missed
        while sending.unsent():
            far.recv(common.RECEIVE_BYTES)
        offer(400)
        assert listener.missed_blocks == missed
