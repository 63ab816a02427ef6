"""Checksums are those of hashlib; blocks are consumed in order, by a thread or without one."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import (
    SEGMENT_BYTES,
    BlockPipeline,
    Blocks,
    SocketPairError,
    calculate_checksum,
)

# --- checksum ---------------------------------------------------------------------------------


@given(
    content=st.binary(max_size=3000) | st.just(os.urandom(2 * SEGMENT_BYTES + 7)),
    part=st.floats(0, 1),
)
@settings(max_examples=50)
def test_checksums_are_those_of_hashlib(content: bytes, part: float) -> None:
    length = int(len(content) * part)
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        assert calculate_checksum(file.name) == hashlib.sha256(content).hexdigest()
        assert calculate_checksum(Path(file.name)) == hashlib.sha256(content).hexdigest()
        prefix = hashlib.sha256(content[:length]).hexdigest()
        assert calculate_checksum(file.name, length) == prefix
        file.seek(length)
        rest = hashlib.sha256(content[length:]).hexdigest()
        assert calculate_checksum(file.fileno()) == rest
        os.fstat(file.fileno())  # still open


def test_a_checksum_of_more_than_there_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"12345")
    with pytest.raises(SocketPairError, match="shorter"):
        calculate_checksum(path, 6)


def test_a_checksum_goes_on_from_a_digest_and_tells_its_progress(tmp_path: Path) -> None:
    content = os.urandom(3 * SEGMENT_BYTES + 1)
    path = tmp_path / "file"
    path.write_bytes(content)
    digest, counts = hashlib.sha256(b"before"), list[int]()
    found = calculate_checksum(path, digest=digest, on_progress=counts.append)
    assert found == digest.hexdigest() == hashlib.sha256(b"before" + content).hexdigest()
    assert sum(counts) == len(content)
    assert len(counts) > 1


def test_a_checksum_of_what_cannot_be_read_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        calculate_checksum(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        calculate_checksum(tmp_path)


# --- blocks -----------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 5000), max_size=40))
@settings(max_examples=50)
def test_a_pipeline_consumes_blocks_in_order(sizes: list[int]) -> None:
    consumed: list[bytes] = []
    given_: list[bytes] = []
    with BlockPipeline(lambda view: consumed.append(bytes(view))) as blocks:
        for size in sizes:
            content = os.urandom(size)
            block = blocks.take()[:size]
            block[:] = content
            blocks.give(block)
            given_.append(content)
    assert consumed == given_


def test_a_pipeline_raises_what_its_consumer_raised() -> None:
    consumed = []

    def consume(view: memoryview) -> None:
        consumed.append(view[0])
        if view[0] == 3:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), BlockPipeline(consume) as blocks:
        for number in range(1000):  # never waits for ever, though nothing is consumed any more
            block = blocks.take()[:1]
            block[0] = number % 256
            blocks.give(block)
    assert consumed == [0, 1, 2, 3]


def test_a_pipeline_raises_an_error_of_the_last_block_at_its_end() -> None:
    def consume(_view: memoryview) -> None:
        raise OSError("no space left")

    pipeline = BlockPipeline(consume)
    with pytest.raises(OSError, match="no space left"), pipeline:
        pipeline._given.put(pipeline.take())  # as give(), but without its look at the error


def test_a_pipeline_does_not_hide_the_error_of_its_user() -> None:
    def consume(_view: memoryview) -> None:
        raise OSError("no space left")

    pipeline = BlockPipeline(consume)
    with pytest.raises(KeyError, match="mine"), pipeline:
        pipeline._given.put(pipeline.take())
        raise KeyError("mine")


def test_a_pipeline_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    for _ in range(10):
        with BlockPipeline(lambda view: None) as blocks:
            blocks.give(blocks.take())
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("size", "threaded"), [(0, False), (1, False), (SEGMENT_BYTES + 1, True), (None, True)]
)
def test_only_large_files_have_a_thread(size: int | None, threaded: bool) -> None:
    with common.blocks_for(size, lambda view: None) as blocks:
        assert isinstance(blocks, Blocks)
        assert isinstance(blocks, BlockPipeline) == threaded
