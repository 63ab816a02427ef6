"""A client with the code may send anything: it costs a bounded amount, others are served."""

from __future__ import annotations

import contextlib
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from common import LENGTH, MAX_FRAME_BYTES, MAX_HELD_LENGTHS, PARTIAL_SUFFIX, STILL_HERE
from server import FREE_MISMATCHES, MAX_ALIKE, MAX_OPEN_FOLDERS, MAX_OPEN_PARTIALS
from support import (
    MIB,
    RawClient,
    Server,
    background,
    contents,
    frame,
    linux,
    make_file,
    make_partial,
    make_sparse,
    message,
    partials,
    sha256,
    visible,
    wait_for,
)

pytestmark = linux

HOSTILE_CLIENTS = 62


def offer_of(paths: list[str], size: int = 1) -> bytes:
    return message("offer", entries=[{"path": path, "size": size} for path in paths])


def test_an_offer_that_is_only_looked_up_writes_nothing(server: Server) -> None:
    with RawClient(server.port).greet() as client:
        client.offer(*({"path": f"{number}/a/b/c/x", "size": 1} for number in range(1000)))
        assert contents(server.folder) == {}
    assert contents(server.folder) == {}


def test_deep_folders_that_are_only_offered_take_little_memory(server: Server) -> None:
    with RawClient(server.port).greet() as client:
        deep = 470 * "a/"
        client.offer(*({"path": f"{number}/{deep}x", "size": 1} for number in range(1000)))
    assert server.peak_mib() < 80


def test_a_batch_from_many_folders_that_are_here_keeps_few_of_them_open(server: Server) -> None:
    paths = [f"{number}/x" for number in range(1000)]
    for path in paths:
        make_file(server.folder / path, 1)
    with RawClient(server.port).greet() as client:
        before = server.descriptors()
        held = client.offer(*({"path": path, "size": 1} for path in paths))
        assert len(held["entries"]) == 1000
        assert server.descriptors() < before + 2 * MAX_OPEN_FOLDERS
        checksums = [[sha256(server.folder / path)] for path in paths]
        client.send(message("prefixes", entries=checksums))
        start = client.receive()
        assert start["entries"] == [{"already": "x"}] * 1000


def test_a_batch_has_a_few_lines_in_the_log(server: Server) -> None:
    with RawClient(server.port).greet() as client:
        client.offer(*({"path": "../x", "size": number} for number in range(1000)))
    wait_for(lambda: "and 990 more failed" in server.stderr())
    assert server.stderr().count("failed ../x") == 10


def test_many_batches_have_a_bounded_number_of_lines_in_the_log(
    server: Server, tmp_path: Path
) -> None:
    with RawClient(server.port).greet() as client:
        for _ in range(300):
            client.send(offer_of(["../x" + 100 * "y"] * 40))
            assert "failed" in client.receive()["entries"][0]
    server.check_serves(tmp_path)
    assert server.stderr().count("failed ../x") < 2_000


OFFER = message("offer", entries=[{"path": "x", "size": None}])


@pytest.mark.parametrize(
    ("begin", "sign"),
    [
        (b"", message("hashing")),
        (b"", message("offer", entries=[])),
        (OFFER, LENGTH.pack(STILL_HERE)),
        (OFFER, frame(b"x")),
    ],
)
def test_next_to_nothing_without_end_is_an_end(server: Server, begin: bytes, sign: bytes) -> None:
    with RawClient(server.port).greet() as client:
        client.send(begin + 3_000 * sign)
        assert b"received next to nothing, too often" in client.read_all()


def test_one_path_is_compared_a_few_times_a_batch(server: Server) -> None:
    make_file(server.folder / "pin", 4)
    with RawClient(server.port).greet() as client:
        held = client.offer(*[{"path": "pin", "size": 4}] * 1000)
        assert held["type"] == "held"
        assert held["entries"] == [[index, [4]] for index in range(MAX_ALIKE)]


def guess(client: RawClient, checksum: str, number: int) -> str:
    """Guess so often at once that "pin" has this SHA-256; return the type of the answer."""
    answer = client.offer(*[{"path": "pin", "size": 4}] * number)
    if answer["type"] == "held":
        client.send(message("prefixes", entries=[[checksum]] * number))
        answer = client.receive()
    return str(answer["type"])


def test_each_guess_at_what_is_here_counts_and_a_right_one_is_told_no_sooner(
    server: Server,
) -> None:
    right, wrong = sha256(make_file(server.folder / "pin", 4)), "0" * 64
    for _ in range(FREE_MISMATCHES // MAX_ALIKE):
        with RawClient(server.port).greet() as client:
            assert guess(client, wrong, MAX_ALIKE) == "start"

    def both_wait() -> bool:
        """Guess wrong and right, when none is left, or hardly any on a machine that was busy."""
        with RawClient(server.port).greet() as client, RawClient(server.port).greet() as other:
            answers = (guess(client, wrong, MAX_ALIKE), guess(other, right, 1))
        return answers == ("hashing", "hashing")

    wait_for(both_wait, "whoever waits would know that it is wrong where a right one did not")


def test_no_number_of_partial_files_has_a_client_asked_more_than_it_answers(
    server: Server,
) -> None:
    own = make_partial(server.folder, "film", b"")
    for number in range(20):
        for name in (own.name, f".film.0123456789{PARTIAL_SUFFIX}"):
            partial = server.folder / name.replace("89.", f"{number:02}.")
            make_sparse(partial, (64 + 40 * number + 20 * (name == own.name)) * MIB)
    with RawClient(server.port).greet() as client:
        held = client.offer({"path": "film", "size": 900 * MIB})
        while held["type"] == "hashing":
            held = client.receive()
        ((_, lengths),) = held["entries"]
        assert MAX_OPEN_PARTIALS < len(lengths) <= MAX_HELD_LENGTHS


def test_a_false_offer_does_not_remove_what_another_may_continue(server: Server) -> None:
    partial = make_partial(server.folder, "film", os.urandom(MIB))
    elsewhere = partial.rename(partial.with_name(f".film.{'0' * 10}.socketpair-part"))
    with RawClient(server.port).greet() as client:
        assert client.offer({"path": "film", "size": 2 * MIB})["entries"] == [[0, [MIB]]]
        client.send(message("prefixes", entries=[["0" * 64]]))
        assert client.receive()["entries"] == [{"offset": 0}]
    assert partials(server.folder) == [elsewhere]


def test_thousands_of_clashes_are_numbered_without_reading_them_all(server: Server) -> None:
    for number in range(1, 3000):
        (server.folder / f"x ({number})").write_bytes(b"?")
    (server.folder / "x").write_bytes(b"?")
    with RawClient(server.port).greet() as client:
        assert len(client.offer({"path": "x", "size": 1})["entries"]) == 1
        client.send(message("prefixes", entries=[["0" * 64]]))
        assert client.receive()["type"] == "start"
        client.send(frame(b"!") + bytes(4) + bytes(32))
        assert "failed" in client.receive_result()
    assert len(visible(server.folder)) == 3000


def say_again_and_again(port: int, said: bytes, ended: threading.Event) -> None:
    """Say the same on one connection after another, and read what is answered."""
    while not ended.is_set():
        with contextlib.suppress(OSError, AssertionError), RawClient(port) as client:
            client.greet()
            client.socket.settimeout(1)
            while not ended.is_set():
                client.send(said)
                client.socket.recv(65536)


def attacks() -> list[bytes]:
    """Return what costs a server much for little."""
    return [
        offer_of(["x"] * 1000),
        offer_of([f"{number}/{'d/' * 300}x" for number in range(1000)]),
        offer_of([f"x ({number})" for number in range(1000)]),
        frame(b'{"type":"offer","entries":[' + b"{}," * 340_000 + b"{}]}"),
        message("offer", entries=[{"path": "large", "size": 2**40}]) + frame(bytes(MIB - 1)),
    ]


def test_many_hostile_clients_take_bounded_memory_and_an_honest_one_is_served(
    inbox: Path, tmp_path: Path
) -> None:
    for number in range(1, 1000):
        make_file(inbox / f"x ({number})", 1)
    make_file(inbox / "x", 1)
    source = make_file(tmp_path / "honest", 100 * MIB)
    ended = threading.Event()
    said = attacks()
    # Also for those that have hung up and are still being answered: on a busy machine most places.
    places = 256
    with Server(inbox, "--max-clients", str(places)) as server, contextlib.ExitStack() as stack:
        for number in range(HOSTILE_CLIENTS):
            attack = said[number % len(said)]
            stack.enter_context(
                background(partial(say_again_and_again, server.port, attack, ended))
            )
        stack.callback(ended.set)
        result = server.send(source)
        # A message, and a copy of it while it is decoded.
        assert server.peak_mib() < 2 * places * MAX_FRAME_BYTES / MIB + 150
    assert result.status == 0, result
    assert (inbox / "honest").stat().st_size == 100 * MIB
