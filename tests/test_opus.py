"""A listener that wants Opus hears what was captured, frame for frame in time, for less data."""

from __future__ import annotations

import array
import contextlib
import math
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client
import common
import server
from common import AudioBlock, AudioFormat, Connection, OpusBlock, ProtocolError
from peers import FakeServer, RawClient, socket_pair
from sound import (
    MONO,
    Script,
    ends_with_one_line,
    hears_tone,
    pack_welcome,
    port_of,
    read_wav,
    start_client,
    start_server,
    write_wav,
)
from sound_card import VirtualSoundCard
from waiting import LIMIT_S, wait_for

STEREO = AudioFormat(48_000, 2)
BLOCK_MS = 2.5
STREAM = "s"


def make_music(frames: int, audio: AudioFormat = MONO) -> bytes:
    """Return something like plucked strings, the same at every call and at every rate."""
    noise = random.Random(3)
    values = array.array("h")
    for frame in range(frames):
        time_s = frame / audio.rate
        pluck = math.exp(-4 * (time_s % 0.25))
        value = 7_000 * pluck * math.sin(380 * math.tau * time_s)
        value += 4_000 * math.sin(99 * math.tau * time_s) + noise.gauss(0, 50)
        values.extend([int(value)] * audio.channels)
    return values.tobytes()


def signal_to_noise_db(sent: bytes, heard: bytes) -> float:
    """Return by how much `sent` is louder than what `heard` has of other things."""
    pairs = list(zip(memoryview(sent).cast("h"), memoryview(heard).cast("h"), strict=False))
    noise = sum((one - other) ** 2 for one, other in pairs)
    return 10 * math.log10(sum(one * one for one, _ in pairs) / max(1, noise))


def blocks_of(samples: bytes, audio: AudioFormat, first_frame: int = 0) -> Iterator[AudioBlock]:
    """Give `samples` in blocks as they are captured."""
    size = audio.frames_in(BLOCK_MS) * audio.frame_bytes
    for start in range(0, len(samples), size):
        frame = first_frame + start // audio.frame_bytes
        yield AudioBlock(frame, frame * 1_000_000_000 // audio.rate, samples[start : start + size])


def parse(data: bytes, channels: int = 1) -> list[Any]:
    """Return what the frames in `data` hold."""
    found = []
    while data:
        (size,) = common.LENGTH.unpack_from(data)
        content = data[common.LENGTH.size :][:size]
        found.append(common.decode_opus(content, AudioFormat(common.OPUS_RATE, channels)))
        data = data[common.LENGTH.size + size :]
    return found


def encode(samples: bytes, audio: AudioFormat, kbit: int = 96) -> list[Any]:
    """Return what a listener is sent of `samples`."""
    encoding = server.OpusEncoding(audio, kbit)
    data = b"".join(encoding.encode(block) for block in blocks_of(samples, audio))
    return parse(data + encoding.finish(), audio.channels)


@pytest.fixture
def connection() -> Iterator[Connection]:
    """Give a connection whose other side says nothing."""
    near, far = socket_pair()
    with far, Connection(near, "near") as opened:
        yield opened


class Broadcast:
    """A server that sends what is written to its standard input, and listeners of it."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._environment = environment
        self._scripts = contextlib.ExitStack()
        server = start_server(environment, "--input", "-", *arguments, stdin=subprocess.PIPE)
        self.server = self._scripts.enter_context(server)

    def __enter__(self) -> Broadcast:
        return self

    def __exit__(self, *_: object) -> None:
        self._scripts.close()

    def listen(self, *arguments: str) -> Script:
        """Return a client that listens, past its handshake."""
        listener = start_client(self._environment, port_of(self.server), *arguments)
        self._scripts.enter_context(listener).wait_for("Listening to")
        return listener

    def send(self, samples: bytes) -> None:
        """Have all of `samples` captured, and the sound end."""
        pipe = self.server.popen.stdin
        assert pipe is not None
        pipe.write(samples)
        pipe.close()


# --- what is heard --------------------------------------------------------------------------


@pytest.mark.parametrize("audio", [MONO, STEREO, AudioFormat(44_100, 1), AudioFormat(16_000, 2)])
def test_every_sample_frame_is_heard_in_its_place(
    audio: AudioFormat, silent_machine: dict[str, str], tmp_path: Path
) -> None:
    frames = 2 * audio.rate + 333
    arguments = ("--rate", str(audio.rate), "--channels", str(audio.channels))
    heard = tmp_path / "heard.wav"
    with Broadcast(silent_machine, *arguments) as broadcast:
        listener = broadcast.listen("--output", str(heard), "--opus", "128")
        broadcast.server.wait_for("listening")
        broadcast.send(make_music(frames, audio))
        assert listener.end() == common.EXIT_OK
        assert "Opus at 128 kbit/s" in listener.text()
        assert "missed" not in listener.text()
    decoded_to, samples = read_wav(heard)
    assert decoded_to == AudioFormat(48_000, audio.channels)
    expected = make_music(round(frames * 48_000 / audio.rate), decoded_to)
    assert len(samples) == len(expected)
    tenth = len(samples) // 10 // 4 * 4
    for start in (0, 5 * tenth, len(samples) - tenth):
        part = slice(start, start + tenth)
        assert signal_to_noise_db(expected[part], samples[part]) > 15


def test_opus_is_heard_at_the_loudspeaker(card: VirtualSoundCard) -> None:
    with (
        start_server(card) as sender,
        start_client(card, port_of(sender), "--opus") as player,
    ):
        player.wait_for("Opus at 96 kbit/s")
        assert hears_tone(card)
        assert player.interrupt() == common.EXIT_OK


def test_who_joins_in_the_middle_hears_no_fault_of_a_decoder_that_has_just_begun() -> None:
    sent = make_music(96_000)
    decode = client.OpusDecoder(MONO).decode
    packets = encode(sent, MONO)[77:]
    received = [decode(packet.encode()[common.LENGTH.size :]) for packet in packets]
    blocks = [block for block in received if isinstance(block, AudioBlock)]
    assert len(blocks) == len(packets) - client.OPUS_PREROLL_PACKETS
    assert blocks[0].first_frame == packets[client.OPUS_PREROLL_PACKETS].first_frame
    start = blocks[0].first_frame * 2
    heard = b"".join(block.samples for block in blocks)
    assert signal_to_noise_db(sent[start : start + 9_600], heard[:9_600]) > 15
    assert start + len(heard) == len(sent)


def test_packets_that_are_lost_are_a_gap_and_do_not_move_what_follows() -> None:
    decoder = client.OpusDecoder(MONO)
    sent = make_music(96_000)
    packets = encode(sent, MONO)
    numbering = client.Numbering()
    numbering.begin(STREAM)
    heard, gaps = b"", []
    for packet in packets[:50] + packets[53:]:
        block = decoder.decode_block(packet)
        gaps.append(numbering.advance(block, MONO))
        heard += bytes(gaps[-1] * MONO.frame_bytes) + block.samples
    assert [gap for gap in gaps if gap] == [3 * common.OPUS_FRAMES]
    assert len(heard) == len(sent)
    assert signal_to_noise_db(sent[-48_000:], heard[-48_000:]) > 15


def test_sound_that_was_not_captured_is_a_gap_of_its_length() -> None:
    decoder = client.OpusDecoder(MONO)
    sent = make_music(10_001)
    encoding = server.OpusEncoding(MONO, 96)
    data = b"".join(map(encoding.encode, blocks_of(sent, MONO)))
    data += b"".join(map(encoding.encode, blocks_of(sent, MONO, 20_003)))
    blocks = [decoder.decode_block(packet) for packet in parse(data + encoding.finish())]
    ends = [block.first_frame + MONO.frames_of(block.samples) for block in blocks]
    starts = [block.first_frame for block in blocks]
    assert (starts[0], ends[-1]) == (0, 30_004)
    gaps = [(end, start) for end, start in zip(ends, starts[1:], strict=False) if end != start]
    assert gaps == [(10_001, 20_003)]


def test_a_sign_of_life_has_the_number_of_the_sound_to_come() -> None:
    encoding = server.OpusEncoding(AudioFormat(24_000, 1), 96)
    assert parse(encoding.encode(AudioBlock(600, 7, b""))) == [AudioBlock(1_200, 7, b"")]
    assert parse(encoding.encode(AudioBlock(600, 8, bytes(240)))) == []
    (packet,) = parse(encoding.encode(AudioBlock(720, 9, bytes(480))))
    assert (packet.first_frame, packet.frames) == (1_200, 360)
    assert parse(encoding.encode(AudioBlock(960, 10, b""))) == [AudioBlock(1_560, 10, b"")]


# --- what it costs --------------------------------------------------------------------------


@pytest.mark.parametrize("kbit", [6, 96, 256])
def test_mono_takes_hardly_more_than_its_bit_rate_on_the_wire(kbit: int) -> None:
    samples = random.Random(1).randbytes(96_000)  # the worst there is
    encoding = server.OpusEncoding(MONO, kbit)
    size = sum(len(encoding.encode(block)) for block in blocks_of(samples, MONO))
    assert size * 8 / 1000 < kbit + 19


def test_sound_waits_for_12_5_ms_at_most_to_be_encoded() -> None:
    encoding = server.OpusEncoding(MONO, 96)
    sent_frames = 0
    for block in blocks_of(make_music(48_000), MONO):
        for packet in parse(encoding.encode(block)):
            sent_frames = packet.first_frame + packet.frames
            lost_ns = block.captured_ns - packet.captured_ns
            frames = block.first_frame + 120 - sent_frames
            assert abs(lost_ns - frames * 1e9 / MONO.rate) < 2.6e6
        waiting_frames = block.first_frame + MONO.frames_of(block.samples) - sent_frames
        assert MONO.milliseconds(waiting_frames) <= 12.5


def test_listeners_of_one_bit_rate_share_an_encoder_as_long_as_there_are_any(
    connection: Connection,
) -> None:
    broadcaster = server.Broadcaster(server.CaptureQueue(MONO))
    one, other, another, as_pcm = (broadcaster.add(connection, rate) for rate in (96, 96, 64, None))
    assert one.encoding is other.encoding
    assert len({one.encoding, another.encoding, as_pcm.encoding}) == 3
    broadcaster.remove(one)
    assert broadcaster.add(connection, 96).encoding is other.encoding
    for listener in broadcaster.listeners:
        broadcaster.remove(listener)
    assert broadcaster.add(connection, 96).encoding is not other.encoding


def test_more_bit_rates_than_a_server_will_encode_are_refused(connection: Connection) -> None:
    broadcaster = server.Broadcaster(server.CaptureQueue(MONO))
    for kbit in range(100, 100 + server.MAX_OPUS_RATES):
        broadcaster.add(connection, kbit)
    broadcaster.check_opus(100)
    with pytest.raises(server.Refused, match="no more bit rates than 96, 100, 101"):
        broadcaster.check_opus(99)
    with pytest.raises(server.Refused):
        broadcaster.add(connection, 99)
    broadcaster.add(connection, common.DEFAULT_OPUS_KBIT)
    broadcaster.check_opus(107)


def test_bit_rates_that_are_wanted_at_once_are_no_more_than_a_server_will_encode(
    connection: Connection,
) -> None:
    broadcaster = server.Broadcaster(server.CaptureQueue(MONO))
    wanted = range(100, 100 + 3 * server.MAX_OPUS_RATES)

    def listen(kbit: int) -> None:
        with contextlib.suppress(server.Refused):
            broadcaster.add(connection, kbit)

    threads = [threading.Thread(target=listen, args=(kbit,)) for kbit in wanted]
    with broadcaster._lock:
        for thread in threads:
            thread.start()
        wait_for(lambda: all(map(waits_in_add, threads)), "clients that wait for their place")
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(broadcaster.listeners) == server.MAX_OPUS_RATES


def waits_in_add(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code is server.Broadcaster.add.__code__


# --- what goes wrong ------------------------------------------------------------------------


def test_a_server_without_av_says_so_to_that_listener_alone(
    without_av: dict[str, str], silent_machine: dict[str, str], tmp_path: Path
) -> None:
    write_wav(tmp_path / "sent.wav", make_music(48_000), MONO)
    with start_server(without_av, "--input", str(tmp_path / "sent.wav")) as sender:
        listener = (silent_machine, port_of(sender), "--output", str(tmp_path / "heard.wav"))
        for _ in range(2):
            with start_client(*listener, "--opus") as refused:
                ends_with_one_line(refused, "no Opus without the package av", "install")
            with start_client(*listener, "--seconds", "1") as heard:
                assert heard.end() == common.EXIT_OK


def test_a_client_without_av_says_so(without_av: dict[str, str]) -> None:
    with start_client(without_av, "1", "--opus") as listener:
        ends_with_one_line(listener, "--opus needs the package av", "install")


def test_sound_of_many_channels_cannot_be_had_as_opus(silent_machine: dict[str, str]) -> None:
    broadcaster = server.Broadcaster(server.CaptureQueue(AudioFormat(48_000, 6)))
    with pytest.raises(server.Refused, match="48000 Hz 6 channels cannot be had as Opus"):
        broadcaster.check_opus(96)


@pytest.mark.parametrize("kbit", ["5", "511", "x", "96.5"])
def test_a_bit_rate_that_opus_has_not_is_status_2(
    silent_machine: dict[str, str], kbit: str
) -> None:
    with Script("client.py", silent_machine, "--opus", kbit) as listener:
        assert listener.end() == common.EXIT_USAGE


@pytest.mark.parametrize("kbit", [5, 511, "96", True])
def test_a_server_turns_away_who_asks_for_such_a_bit_rate(
    silent_machine: dict[str, str], kbit: object
) -> None:
    with Broadcast(silent_machine) as broadcast, RawClient(int(port_of(broadcast.server))) as peer:
        peer.send(common.encode_message(common.Hello(common.PROTOCOL, "audio", kbit)))  # type: ignore[arg-type]
        assert b"rate" not in peer.read_all()
        broadcast.server.wait_for("opus_kbit")


OPUS = {"opus_kbit": 96}


@pytest.mark.parametrize(
    "answer",
    [
        pack_welcome(),  # as PCM
        pack_welcome(opus_kbit=64),
        pack_welcome(rate=44_100, **OPUS),
        pack_welcome(channels=6, **OPUS),
        pack_welcome(**OPUS) + OpusBlock(0, 0, b"").encode(),
        pack_welcome(**OPUS) + OpusBlock(0, 0, b"\xff" * 9, 1, 480).encode(),
        pack_welcome(**OPUS) + OpusBlock(0, 0, b"\xfc\xff\xfe", 5_000, 480).encode(),
        pack_welcome(**OPUS) + OpusBlock(0, 0, b"\xfc\xff\xfe", 60_000, 480).encode(),
    ],
)
def test_a_server_that_sends_no_opus_is_a_line(
    silent_machine: dict[str, str], tmp_path: Path, answer: bytes
) -> None:
    output = ("--output", str(tmp_path / "x.wav"), "--opus", "-q")
    with (
        FakeServer(answer) as fake,
        start_client(silent_machine, str(fake.port), *output) as one,
    ):
        ends_with_one_line(one)


@given(
    first=st.integers(0, 2**63),
    packet=st.binary(min_size=1, max_size=50),
    skipped=st.integers(0, 480),
    frames=st.integers(0, 480),
)
def test_a_block_of_opus_is_decoded_as_it_was_encoded(
    first: int, packet: bytes, skipped: int, frames: int
) -> None:
    block = OpusBlock(first, 5, packet, skipped, frames)
    assert parse(block.encode()) == [block]


@settings(max_examples=500)
@given(data=st.binary(max_size=100), skipped=st.integers(0, 1), whole=st.booleans())
def test_any_bytes_are_opus_or_a_protocol_error(data: bytes, skipped: int, whole: bool) -> None:
    decoder = client.OpusDecoder(MONO)
    try:
        if whole:
            (block,) = parse(OpusBlock(0, 0, data, skipped, 100).encode())
        else:
            block = common.decode_opus(data, MONO)
        if isinstance(block, OpusBlock):
            heard = decoder.decode_block(block)
            assert MONO.frames_of(heard.samples) in (0, block.frames)
    except ProtocolError as error:
        assert str(error).isprintable()


def test_the_sound_ends_for_listeners_of_opus_while_packets_are_encoded(
    silent_machine: dict[str, str], tmp_path: Path
) -> None:
    with Broadcast(silent_machine) as broadcast:
        listeners = [
            broadcast.listen("--output", str(tmp_path / f"{kbit}.wav"), "--opus", str(kbit))
            for kbit in (24, 64, 64)
        ]
        sending = threading.Thread(target=broadcast.send, args=(make_music(30_000),))
        sending.start()
        assert [listener.end() for listener in listeners] == [common.EXIT_OK] * 3
        sending.join()
        assert broadcast.server.end() == common.EXIT_OK
