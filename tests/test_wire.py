"""Every message is decoded as it was encoded, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import (
    MAX_BATCH_ENTRIES,
    MAX_HELD_LENGTHS,
    AudioBlock,
    AudioFormat,
    Entry,
    Error,
    Hashing,
    Held,
    Hello,
    Message,
    Offer,
    Outcome,
    Pair,
    Prefixes,
    ProtocolError,
    Results,
    Sound,
    Start,
    StreamEnd,
    TimeReply,
    TimeRequest,
    Welcome,
    decode_message,
    decode_sound,
    encode_message,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(), children),
    max_leaves=20,
)
TEXTS = st.text(st.characters(), max_size=30)
SIZES = st.integers(0, 2**63 - 1)
INDEXES = st.integers(0, MAX_BATCH_ENTRIES - 1)
RATES = st.integers(common.SAMPLE_RATES.start, common.SAMPLE_RATES.stop - 1)
CHANNELS = st.integers(common.CHANNEL_COUNTS.start, common.CHANNEL_COUNTS.stop - 1)
FORMATS = st.builds(AudioFormat, RATES, CHANNELS)
FILES = st.builds(
    Entry,
    TEXTS,
    st.none() | SIZES,
    st.none() | st.integers(-(2**68), 2**68),
    st.none() | st.integers(0, 0o777),
)
FOLDERS = FILES.map(lambda entry: entry._replace(size=None, is_folder=True))
OUTCOMES = st.builds(Outcome, st.sampled_from(["saved", "already", "failed"]), TEXTS)
SYNC = st.none() | st.integers(10, 10_000)
OPUS = st.integers(6, 510)
SOUNDS = st.builds(Sound, RATES, CHANNELS, TEXTS, SYNC, st.none())
SOUNDS |= st.builds(Sound, st.just(48_000), st.integers(1, 2), TEXTS, SYNC, OPUS)
MESSAGES: dict[type[Message], st.SearchStrategy[Message]] = {
    Hello: st.builds(Hello, st.integers(), TEXTS, st.none() | OPUS),
    Welcome: st.builds(Welcome, st.integers(), st.just("file"), st.none())
    | st.builds(Welcome, st.integers(), st.just("audio"), SOUNDS),
    Pair: st.builds(Pair, st.binary(min_size=common.SHARE_BYTES, max_size=common.SHARE_BYTES)),
    Error: st.builds(Error, TEXTS, st.sampled_from(["", *common.REFUSAL_KINDS])),
    Offer: st.builds(
        Offer,
        st.lists(FILES | FOLDERS, max_size=10),
        st.text(st.characters(), max_size=common.MAX_RUN_CHARS),
    ),
    Held: st.builds(
        Held,
        st.dictionaries(INDEXES, st.lists(SIZES, max_size=5), max_size=10).map(
            lambda lengths: sorted(lengths.items())
        ),
    ),
    Hashing: st.just(Hashing()),
    Prefixes: st.builds(Prefixes, st.lists(st.lists(TEXTS, max_size=5), max_size=10)),
    Start: st.builds(Start, st.lists(SIZES | OUTCOMES, max_size=10)),
    TimeRequest: st.builds(TimeRequest, SIZES),
    Results: st.builds(Results, st.lists(st.tuples(INDEXES, OUTCOMES), max_size=10)),
}
KINDS = list(MESSAGES)
MESSAGE_FIELDS = ["protocol", "mode", "error", "kind", "share", "rate", "channels", "stream"]
ITEM_FIELDS = ["path", "size", "mtime_ns", "mode", "folder", "offset", "saved", "failed"]
ITEMS = st.fixed_dictionaries({}, optional=dict.fromkeys(ITEM_FIELDS, JSON_VALUES)) | st.tuples(
    st.integers() | JSON_VALUES, JSON_VALUES | st.lists(st.integers())
)


def content_of(frame: bytes) -> bytes:
    (size,) = common.LENGTH.unpack_from(frame)
    assert size == len(frame) - common.LENGTH.size
    return frame[common.LENGTH.size :]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=50)
def test_each_message_is_decoded_as_it_was_encoded(
    kind: type[Message], data: st.DataObject
) -> None:
    message = data.draw(MESSAGES[kind])
    assert decode_message(content_of(encode_message(message)), [kind]) == message


@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(content: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_message(content, KINDS)


@given(
    kind=st.sampled_from(KINDS),
    fields=st.fixed_dictionaries(
        {"entries": JSON_VALUES | st.lists(ITEMS, max_size=5)},
        optional=dict.fromkeys(MESSAGE_FIELDS, JSON_VALUES),
    ),
)
@settings(max_examples=500)
def test_any_fields_are_a_message_or_a_protocol_error(
    kind: type[Message], fields: dict[str, Any]
) -> None:
    content = json.dumps({**fields, "type": kind.__name__.lower()}).encode()
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode_message(content, [kind]), kind)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"\x80",
        b"GET / HTTP/1.1",
        b"null",
        b"[]",
        b"1",
        b'"type"',
        b"{}",
        b'{"type":1}',
        b'{"type":null}',
        b'{"no":"type"}',
        b"[" * 100_000,
        b'{"type":' * 20_000,
        b'{"type":"hello","protocol":' + b"1" * 10_000 + b"}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_what_is_no_message_is_a_protocol_error(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_message(content, KINDS)


def test_a_message_that_is_not_expected_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="unexpected message 'hello'"):
        decode_message(content_of(encode_message(Hello(1, "file"))), [Welcome, Start])


@pytest.mark.parametrize(
    "fields",
    [
        {"entries": [[0, [1]], [0, [1]]]},
        {"entries": [[1, [1]], [0, [1]]]},
        {"entries": [[-1, [1]]]},
        {"entries": [[True, [1]]]},
        {"entries": [[0, [-1]]]},
        {"entries": [[0, [True]]]},
        {"entries": [[0, [1] * (MAX_HELD_LENGTHS + 1)]]},
        {"entries": [[0]]},
        {"entries": {}},
    ],
)
def test_lengths_that_nobody_can_hold_are_a_protocol_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Held._decode(fields)


def test_an_entry_that_cannot_be_read_is_refused_by_itself() -> None:
    good = {"path": "a", "size": 1}
    bad = [None, {}, {"path": 1}, {**good, "size": -1}, {**good, "mode": 0o1777}]
    bad += [{**good, "mtime_ns": 2**68 + 1}, {**good, "mtime_ns": "now"}]
    entries = Offer._decode({"entries": [good, *bad, good]}).entries
    assert entries[0] == entries[-1] == Entry("a", 1)
    for entry in entries[1:-1]:
        assert isinstance(entry, Outcome)
        assert entry.kind == "failed"


@pytest.mark.parametrize("part", [b"{},", b"[],", b"0,", b'{"a":0},', b'ab"', b'"\\n"'])
def test_what_would_fill_memory_is_refused_before_it_is_parsed(part: bytes) -> None:
    content = b'{"type":"offer","entries":[' + part * (1024 * 1024 // len(part) - 10) + b"0]}"
    with pytest.raises(ProtocolError, match="too many parts"):
        decode_message(content, [Offer])


def test_a_string_without_an_end_is_looked_through_once() -> None:
    """From each of its quotes anew, to the end of all, it took over an hour."""
    content = b"," * (common.MAX_JSON_VALUES + 1) + b'"' + b'\\"' * (450 * 1024)
    with pytest.raises(ProtocolError, match="too many parts"):
        decode_message(content, [Offer])


@pytest.mark.parametrize("depth", [2 * common.MAX_JSON_DEPTH, 500])
@pytest.mark.parametrize(
    ("begin", "end"),
    [(b"[", b"]"), (b'{"a":', b"}"), (b'["]",', b"]"), (b'["\\"]",', b"]"), (b"[[],{},", b"]")],
)
def test_what_is_nested_deeper_than_any_message_is_refused_before_it_is_parsed(
    begin: bytes, end: bytes, depth: int
) -> None:
    """Python 3.13 follows it past the end of a small stack, which ends the program."""
    content = b'{"type":"hashing","x":' + begin * depth + b"0" + end * depth + b"}"
    for each in (content, begin * depth):
        with pytest.raises(ProtocolError, match="not JSON"):
            decode_message(each, [Hashing])


@pytest.mark.parametrize("text", ["[", "]", '\\"[', "[" * 100, '"', "\\"])
def test_brackets_in_strings_are_no_depth(text: str) -> None:
    content = json.dumps({"type": "hashing", "x": [[text]] * 100}).encode()
    assert decode_message(content, [Hashing]) == Hashing()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_a_message_comes_in_utf_8_alone(encoding: str) -> None:
    content = '{"type":"offer","\u2200":"","entries":[' + "{}," * 100_000 + '{}],"":""}'
    with pytest.raises(ProtocolError, match=r"not JSON|too many parts"):
        decode_message(content.encode(encoding), [Offer])
    with pytest.raises(ProtocolError, match="not JSON"):
        decode_message('{"type":"offer","entries":[]}'.encode(encoding), [Offer])


def test_an_offer_of_the_longest_names_in_their_longest_form_is_parsed() -> None:
    names = ['{[,\\u\u0007"' * 40] * MAX_BATCH_ENTRIES
    offer = Offer([Entry(name, 1, 2, 0o755) for name in names])
    content = encode_message(offer)[4:]
    assert len(content) > 256 * 1024
    assert decode_message(content, [Offer]) == offer


def test_an_offer_has_a_thousand_entries_at_most() -> None:
    entries = [Entry(str(number), 1) for number in range(MAX_BATCH_ENTRIES + 1)]
    with pytest.raises(ProtocolError, match="more than 1000"):
        Offer._decode(Offer(entries)._encode())
    assert len(Offer._decode(Offer(entries[1:])._encode()).entries) == MAX_BATCH_ENTRIES


@pytest.mark.parametrize(
    ("value", "kind"), [(True, int), ("1", int), (1, str), (None, str), ({}, list), (1.0, int)]
)
def test_a_field_of_the_wrong_type_is_a_protocol_error(value: object, kind: type) -> None:
    with pytest.raises(ProtocolError, match="'field'"):
        common.require({"field": value}, "field", kind)
    with pytest.raises(ProtocolError, match="'field'"):
        common.require({}, "field", kind)


@pytest.mark.parametrize("value", [-1, 2**63, True, 1.5, None, "1"])
def test_a_size_that_no_file_has_is_a_protocol_error(value: object) -> None:
    with pytest.raises(ProtocolError, match="'size'"):
        common.require_number({"size": value}, "size", common.FILE_SIZES)
    assert common.require_number({"size": 2**63 - 1}, "size", common.FILE_SIZES) == 2**63 - 1


def test_an_error_is_of_a_known_kind_or_of_none() -> None:
    assert Error._decode({"error": "no", "kind": common.WAIT}) == Error("no", common.WAIT)
    assert Error._decode({"error": "no", "kind": "of another kind"}) == Error("no")
    assert Error._decode({"error": "no", "kind": []}) == Error("no")


@given(audio=FORMATS, first=SIZES, captured=SIZES, frames=st.integers(0, 20))
def test_a_block_of_sound_is_decoded_as_it_was_encoded(
    audio: AudioFormat, first: int, captured: int, frames: int
) -> None:
    block = AudioBlock(first, captured, bytes(range(256))[: 2 * frames] * audio.channels)
    block = block._replace(samples=block.samples[: audio.frame_bytes * frames])
    assert decode_sound(content_of(block.encode()), audio) == block


@given(reason=st.text(st.characters(categories=["L", "N", "P"]), max_size=50))
def test_the_end_of_the_sound_is_decoded_with_its_reason(reason: str) -> None:
    assert decode_sound(content_of(StreamEnd(reason).encode()), AudioFormat(48_000, 1)) == (
        StreamEnd(reason)
    )


@given(content=st.binary(max_size=100), audio=FORMATS)
def test_any_bytes_are_sound_or_a_protocol_error(content: bytes, audio: AudioFormat) -> None:
    with contextlib.suppress(ProtocolError):
        sound = decode_sound(content, audio)
        assert not isinstance(sound, AudioBlock) or len(sound.samples) % audio.frame_bytes == 0


@given(times=st.tuples(SIZES, SIZES, SIZES))
def test_the_servers_time_is_decoded_as_it_was_encoded(times: tuple[int, int, int]) -> None:
    reply = TimeReply(*times)
    assert decode_sound(content_of(reply.encode()), AudioFormat(48_000, 1)) == reply
