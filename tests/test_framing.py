"""Framing, messages, limits and the queue, over real socket pairs."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import (
    MAX_FRAME_BYTES,
    SEGMENT_BYTES,
    Connection,
    ConnectionBroken,
    ConnectionLost,
    Hashing,
    Held,
    Hello,
    PeerClosed,
    PeerRefused,
    PeerStalled,
    ProtocolError,
    SocketPairError,
)
from peers import socket_pair
from waiting import background, wait_for


@contextlib.contextmanager
def connected() -> Iterator[tuple[Connection, socket.socket]]:
    """Give a Connection and the socket at its other end."""
    near, far = socket_pair()
    with far, Connection(near, "peer") as connection:
        yield connection, far


def send_in_pieces(sock: socket.socket, data: bytes, cuts: list[int]) -> None:
    """Send `data`, a system call for each piece."""
    edges = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in itertools.pairwise(edges):
        sock.sendall(data[start:end])


# --- frames -----------------------------------------------------------------------------------


@given(
    frames=st.lists(st.binary(max_size=2000), min_size=1, max_size=10),
    cuts=st.lists(st.integers(0, 5000), max_size=20),
)
@settings(max_examples=100)
def test_frames_arrive_whole_however_they_are_cut(frames: list[bytes], cuts: list[int]) -> None:
    data = b"".join(struct.pack("!I", len(content)) + content for content in frames)
    with connected() as (connection, far), background(lambda: send_in_pieces(far, data, cuts)):
        assert [connection.read_frame() for _ in frames] == frames


@given(sizes=st.lists(st.integers(1, 600_000), min_size=1, max_size=6), into=st.booleans())
@settings(max_examples=30)
def test_exact_bytes_arrive_in_order_whatever_sizes_are_read(sizes: list[int], into: bool) -> None:
    data = os.urandom(sum(sizes))
    with connected() as (connection, far), background(lambda: far.sendall(data)):
        parts = []
        for number, size in enumerate(sizes):
            if into and number % 2:
                view, have = memoryview(bytearray(size)), 0
                while have < size:
                    have += connection.read_some(view[have:], 60)
                parts.append(bytes(view))
            else:
                parts.append(connection.read(size))
    assert b"".join(parts) == data


def test_a_close_between_frames_is_a_clean_end() -> None:
    with connected() as (connection, far):
        far.sendall(struct.pack("!I", 2) + b"ok")
        far.close()
        assert connection.read_frame() == b"ok"
        with pytest.raises(PeerClosed):
            connection.read_frame()


@pytest.mark.parametrize("sent", [b"\0", b"\0\0\0", b"\0\0\0\x05", b"\0\0\0\x05four"])
def test_a_close_inside_a_frame_is_a_broken_connection(sent: bytes) -> None:
    with connected() as (connection, far):
        far.sendall(sent)
        far.close()
        with pytest.raises(ConnectionBroken, match="middle of a frame"):
            connection.read_frame()


def test_a_close_inside_a_block_is_a_broken_connection() -> None:
    with connected() as (connection, far):
        far.sendall(b"half")
        far.close()
        with pytest.raises(ConnectionBroken, match="middle of a frame"):
            connection.read(8)


def test_a_reset_is_a_broken_connection() -> None:
    with connected() as (connection, far):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        with pytest.raises(ConnectionBroken, match="reset"):
            connection.read_frame()


@given(size=st.integers(MAX_FRAME_BYTES + 1, 2**32 - 1))
@settings(max_examples=20)
def test_a_frame_too_long_is_refused_on_its_length_alone(size: int) -> None:
    with connected() as (connection, far):
        far.sendall(struct.pack("!I", size))  # nothing follows: waiting for it would hang
        with connection.limit(30), pytest.raises(ProtocolError, match="not Socket Pair's protocol"):
            connection.read_frame()


def test_the_caller_may_allow_less_than_the_longest_frame() -> None:
    with connected() as (connection, far):
        far.sendall(struct.pack("!I", 11))
        with pytest.raises(ProtocolError):
            connection.read_frame(max_bytes=10)


def test_the_longest_frame_is_taken() -> None:
    content = os.urandom(MAX_FRAME_BYTES)
    data = struct.pack("!I", len(content)) + content
    with connected() as (connection, far), background(lambda: far.sendall(data)):
        assert connection.read_frame() == content


def test_a_frame_that_came_in_part_is_there_after_another_try() -> None:
    with connected() as (connection, far):
        far.sendall(struct.pack("!I", 10) + b"first")
        with connection.limit(0.2), pytest.raises(PeerStalled):
            connection.read_frame()
        far.sendall(b"later")
        assert connection.read_frame() == b"firstlater"


# --- messages ---------------------------------------------------------------------------------


def test_messages_arrive_as_they_were_sent() -> None:
    with connected() as (connection, far), Connection(far, "far") as other:
        other.send(Hello(7, "file"))
        other.send(Hashing())
        assert connection.receive(Hello) == Hello(7, "file")
        assert connection.receive(Held, Hashing) == Hashing()


def test_an_unexpected_message_is_named_with_its_control_codes_spelled_out() -> None:
    with connected() as (connection, far):
        far.sendall(common.encode_frame(b'{"type":"\\u001b[2J"}'))
        with pytest.raises(ProtocolError) as caught:
            connection.receive(Hello)
    assert "\x1b" not in str(caught.value)
    assert "[2J" in str(caught.value)


def test_an_error_of_the_other_side_is_raised_with_its_control_codes_spelled_out() -> None:
    with connected() as (connection, far), Connection(far, "far") as other:
        other.send(common.Error("the disk \x1b]0;is\x07 full", common.WAIT))
        with pytest.raises(PeerRefused) as caught:
            connection.receive(Hello)
    assert str(caught.value) == r"the disk \x1b]0;is\x07 full"
    assert caught.value.kind == common.WAIT


# --- time limits and queue --------------------------------------------------------------------


def test_a_limit_ends_a_wait_for_a_silent_peer() -> None:
    with connected() as (connection, _far), connection.limit(0.2), pytest.raises(PeerStalled):
        connection.read(1)


def test_a_limit_counts_for_all_reads_together() -> None:
    """A peer that sends a byte now and then does not hold the connection beyond the limit."""
    stop = threading.Event()

    def drip(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                sock.sendall(b"x")

    with connected() as (connection, far), background(lambda: drip(far)):
        try:
            with connection.limit(0.5), pytest.raises(PeerStalled):
                while True:
                    connection.read(1)
        finally:
            stop.set()


def test_after_a_limit_reads_have_their_time_again() -> None:
    with connected() as (connection, far):
        with connection.limit(0.1), pytest.raises(PeerStalled):
            connection.read(1)
        deadline = common.Deadline(0.3)  # longer than the limit was

        def answer_late() -> None:
            wait_for(lambda: not deadline.remaining())
            far.sendall(b"late")

        with background(answer_late):
            assert connection.read(4) == b"late"


def test_an_inner_limit_does_not_end_the_outer_one() -> None:
    with connected() as (connection, _far), connection.limit(0.3):
        with connection.limit(60), pytest.raises(PeerStalled):
            connection.read(1)
        with pytest.raises(PeerStalled):
            connection.read(1)


def test_a_limit_of_one_thread_does_not_end_what_another_waits_for() -> None:
    data = bytes(32 * 1024 * 1024)
    with connected() as (connection, far), contextlib.ExitStack() as writing:
        with connection.limit(0.5):
            writing.enter_context(background(lambda: connection.write(data)))
            with pytest.raises(PeerStalled):
                connection.read(1)
        far.settimeout(60)
        left = len(data)
        while left:
            left -= len(far.recv(left))


def test_a_peer_that_takes_nothing_ends_a_write() -> None:
    with connected() as (connection, _far), connection.limit(0.5), pytest.raises(PeerStalled):
        connection.write(bytes(64 * 1024 * 1024))


def test_a_write_to_a_peer_that_is_gone_is_a_broken_connection() -> None:
    with connected() as (connection, far):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        with pytest.raises(ConnectionBroken):
            connection.write(bytes(64 * 1024 * 1024))


def test_closing_wakes_whoever_waits() -> None:
    ended = threading.Event()

    def wait_for_bytes(connection: Connection) -> None:
        with contextlib.suppress(SocketPairError):
            connection.read(1)
        ended.set()

    with connected() as (connection, _far), background(lambda: wait_for_bytes(connection)):
        connection.close()
        connection.close()
        assert ended.wait(60)


def test_aborting_wakes_whoever_waits_and_resets_the_other_side() -> None:
    def read_in_vain(connection: Connection) -> None:
        with pytest.raises(ConnectionLost):
            connection.read(1)

    with connected() as (connection, far), background(lambda: read_in_vain(connection)):
        wait_for(lambda: connection.silent_s() > 0.2)
        connection.abort()
        far.settimeout(30)  # far less than the reader would wait
        with pytest.raises(ConnectionResetError):
            far.recv(1)


def test_a_peer_that_never_stops_sending_does_not_hold_who_has_finished() -> None:
    def flood(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(bytes(1024 * 1024))

    with connected() as (connection, far), background(lambda: flood(far)):
        with connection.limit(0.3):
            connection.finish()
        connection.close()


def test_what_has_come_is_given_before_the_rest_is_waited_for() -> None:
    with connected() as (connection, far), connection.limit(60):
        far.sendall(b"first")
        view = memoryview(bytearray(100))
        assert connection.read_some(view, 0.2) == len(b"first")
        assert bytes(view[:5]) == b"first"
        far.sendall(b"last")
        far.close()
        assert connection.read_some(view, 30) == len(b"last")
        with pytest.raises(ConnectionBroken, match="middle of a frame"):
            connection.read_some(view, 30)


def test_queued_bytes_leave_with_the_flush_and_before_later_ones() -> None:
    with connected() as (connection, far), Connection(far, "far") as other:
        connection.queue(b"first")
        far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            far.recv(1)
        far.settimeout(60)
        connection.send(Hashing())
        connection.write(b"third")
        assert other.read(5) == b"first"
        assert other.receive(Hashing) == Hashing()
        assert other.read(5) == b"third"


def test_a_long_queue_leaves_by_itself() -> None:
    with connected() as (connection, far):
        received = bytearray()

        def take() -> None:
            while len(received) < common.SEND_BYTES:
                received.extend(far.recv(65536))

        with background(take):
            for _ in range(common.SEND_BYTES // 1024):
                connection.queue(bytes(1024))
    assert len(received) == common.SEND_BYTES


@given(sizes=st.lists(st.integers(1, SEGMENT_BYTES), min_size=1, max_size=5))
@settings(max_examples=20)
def test_segments_of_any_size_arrive_in_order(sizes: list[int]) -> None:
    segments = [os.urandom(size) for size in sizes]

    def send_all(connection: Connection) -> None:
        for segment in segments:
            connection.queue(common.LENGTH.pack(len(segment)))
            connection.queue(memoryview(segment))
        connection.flush()

    with (
        connected() as (connection, far),
        Connection(far, "far") as other,
        background(lambda: send_all(other)),
    ):
        received = [connection.read(*common.LENGTH.unpack(connection.read(4))) for _ in segments]
    assert received == segments
