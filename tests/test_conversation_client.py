"""A server in this process that lies at each step: the client believes nothing unchecked, and ends.

Where an honest one serves it, both sides of the conversation are in this process.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import client
import common
from common import (
    END_OF_FILE,
    GIVEN_UP,
    LENGTH,
    STILL_HERE,
    Entry,
    Error,
    Hashing,
    Held,
    Hello,
    Message,
    Offer,
    Outcome,
    Prefixes,
    Results,
    Start,
    Welcome,
)
from conversation import honest_server, read_message, say, welcome
from support import (
    HOST,
    LIMIT_S,
    MIB,
    FakeServer,
    RawPeer,
    contents,
    linux,
    make_file,
    make_partial,
    make_sparse,
    start_client,
    wait_for,
)

SIZE = 5000
SAVED = Outcome("saved", "file")


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fail where a test has left behind a thread of the client's."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "results"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_file(tmp_path / "file", SIZE)


def send(serve: Callable[[RawPeer], object], *paths: Path) -> int:
    """Run a client, which does not come back, in this process at `serve`; return its status."""
    with FakeServer(serve) as fake:
        return send_to(fake, *paths)


def send_to(fake: FakeServer, *paths: Path, retry_s: float = 0) -> int:
    """Run a client in this process at a server that is there; return its status."""
    args = client.parse_arguments(["file", f"--retry={retry_s}", *map(str, paths)])
    return client.start_file_client(client.Address(HOST, fake.port), args)


def steps(*answers: bytes) -> Callable[[RawPeer], None]:
    """Return what shakes hands, takes the offer, says `answers` one after another, and hangs up."""

    def serve(peer: RawPeer) -> None:
        welcome(peer)
        assert isinstance(read_message(peer, Offer), Offer)
        for answer in answers:
            peer.send(answer)
        peer.hang_up()
        peer.read_all()

    return serve


def begin(peer: RawPeer, answer: Message = Start([0])) -> None:  # noqa: B008 - a value
    """Shake hands, and answer the offer that follows."""
    welcome(peer)
    assert isinstance(read_message(peer, Offer), Offer)
    peer.send(say(answer))


def read_file(peer: RawPeer, between: bytes = b"") -> tuple[bytes, bytes | None]:
    """Return a file that the client sends, and its digest; None where it gave up.

    Say `between` before each segment.
    """
    content = b""
    while (length := LENGTH.unpack(peer.read(LENGTH.size))[0]) != END_OF_FILE:
        if length == GIVEN_UP:
            return content, None
        peer.send(between)
        content += peer.read(length)
    return content, peer.read(hashlib.sha256().digest_size)


def check_one_line(capsys: pytest.CaptureFixture[str], told: str) -> None:
    """Fail unless the client told its user just that, in a harmless line, and claimed nothing."""
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert told in line
    assert line.isprintable()
    assert "matches" not in said.out


# --- an honest server ---------------------------------------------------------------------------


def test_both_sides_in_one_process_bring_a_tree_over(
    inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    for number in range(1500):  # two offers
        make_file(tree / f"{number % 7}" / f"{number}", number * 13 % 800, seed=number)
    large = make_file(tmp_path / "large", 3 * MIB + 1)
    (tree / "empty").mkdir()
    inbox.mkdir()
    make_partial(inbox, "large", large.read_bytes()[: 2 * MIB])
    assert send(honest_server(inbox), large, tree) == 0
    assert contents(inbox) == {
        "large": large.read_bytes(),
        "tree/": b"",
        **{f"tree/{name}": content for name, content in contents(tree).items()},
    }
    said = capsys.readouterr()
    assert "large: resuming after the first 2.1 MB" in said.out
    assert "Saved tree/ with 1500 files" in said.out
    assert said.err == ""
    assert send(honest_server(inbox), large, tree) == 0
    assert "Already there as large" in capsys.readouterr().out


# --- lies before the transfer -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (say(Start([])), "start for another offer"),
        (say(Start([0, 0])), "start for another offer"),
        (say(Start([SIZE])), "offset that was not asked about"),
        (say(Start([SIZE + 1])), "offset that was not asked about"),
        (say(Start([SAVED])), "a file that was not"),
        (say(Start([Outcome("already", "file")])), "a file that was not compared"),
        (say(Start([Outcome("failed", "\x1b[2J")])), r"\x1b[2J"),
        (say(Held([(1, [10])])), "not offered"),
        (say(Held([(0, [10])]), Start([10])), "offset that was not asked about"),
        (say(Held([(0, [SIZE + 1])]), Start([SIZE + 1])), "offset that was not asked about"),
        (say(Held([(0, [10])]), Start([Outcome("already", "file")])), "not compared"),
        (say(Results([(0, SAVED)])), "unexpected message"),
        (say(Prefixes([])), "unexpected message"),
        (say(Hello(1, "file")), "unexpected message"),
        (say(Error("no \x1b[2J thanks")), r"no \x1b[2J thanks"),
        (say(Hashing(), Hashing(), Error("enough")), "enough"),
        (b"\xff" * 8, "not Socket Pair's protocol"),
        (b"", "closed the connection"),
        (say(Start([0]))[:-1], "connection lost"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[6:60],
)
def test_a_lie_before_the_transfer_is_one_line(
    file: Path, answer: bytes, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert send(steps(answer), file) == 1
    check_one_line(capsys, told)


@pytest.mark.parametrize(
    "answer", [Welcome(1, "file"), Welcome(7, "file"), Hello(1, "file"), Start([0])], ids=str
)
def test_a_wrong_handshake_is_one_line(
    file: Path, answer: Message, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(peer: RawPeer) -> None:
        read_message(peer, Hello)
        peer.send(say(answer))
        peer.hang_up()
        peer.read_all()

    assert send(serve, file) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- lies about results -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "told"),
    [
        (Results([(0, SAVED)]), "a file that was not"),
        (Results([(1, SAVED)]), "a file that was not sent"),
        (Results([(-1, SAVED)]), "received a"),
        (Results([(0, Outcome("failed", "\x1b[2J"))]), r"\x1b[2J"),
        (Error("out of \x1b[2J order"), r"out of \x1b[2J order"),
        (Start([0]), "unexpected message"),
    ],
    ids=str,
)
def test_a_result_before_the_file_was_sent_is_not_believed(
    tmp_path: Path, results: Message, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_file(tmp_path / "file", 40 * MIB)

    def serve(peer: RawPeer) -> None:
        begin(peer)
        peer.read(1000)
        peer.send(say(results))
        peer.read_all()

    assert send(serve, file) == 1
    check_one_line(capsys, told)


@pytest.mark.parametrize(
    ("results", "told"),
    [
        ([(1, SAVED)], "a file that was not sent"),
        ([(0, SAVED), (0, SAVED)], "a file that was not sent"),
        ([(0, SAVED), (7, SAVED)], "a file that was not sent"),
    ],
)
def test_a_result_of_another_file_ends_it(
    file: Path,
    results: list[tuple[int, Outcome]],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def serve(peer: RawPeer) -> None:
        begin(peer)
        assert read_file(peer)[0] == file.read_bytes()
        peer.send(say(Results(results)))
        peer.read_all()

    assert send(serve, file) == 1
    assert told in capsys.readouterr().err


def test_a_name_at_the_server_is_shown_harmless(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(peer: RawPeer) -> None:
        begin(peer)
        read_file(peer)
        peer.send(say(Results([(0, Outcome("saved", "\x1b[2J\nfile"))])))
        peer.read_all()

    assert send(serve, file) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()


def test_a_file_that_fails_at_the_server_is_given_up_and_the_next_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_told, decide = threading.Event(), client.Upload._decide

    def note(*args: Any) -> None:
        decide(*args)
        is_told.set()

    monkeypatch.setattr(client.Upload, "_decide", note)
    first = make_file(tmp_path / "first", 40 * MIB)
    second = make_file(tmp_path / "second", SIZE)
    sent: list[tuple[bytes, bytes | None]] = []

    def serve(peer: RawPeer) -> None:
        begin(peer, Start([0, 0]))
        peer.send(say(Results([(0, Outcome("failed", "no room"))])))
        is_told.wait(LIMIT_S)
        sent.extend(read_file(peer) for _ in range(2))
        peer.send(say(Results([(1, Outcome("saved", "second"))])))
        peer.read_all()

    assert send(serve, first, second) == 1
    assert len(sent[0][0]) < 40 * MIB
    assert sent[0][1] is None
    assert sent[1] == (second.read_bytes(), hashlib.sha256(second.read_bytes()).digest())
    said = capsys.readouterr()
    assert said.err == f"{first}: at the server: no room\n"
    assert "Saved as second" in said.out


@linux
def test_a_pipe_that_has_nothing_holds_up_no_other_once_the_server_has_failed_it(
    file: Path,
) -> None:
    sent: list[tuple[bytes, bytes | None]] = []

    def serve(peer: RawPeer) -> None:
        begin(peer, Start([0, 0]))
        assert LENGTH.unpack(peer.read(LENGTH.size)) == (STILL_HERE,)
        peer.send(say(Results([(0, Outcome("failed", "no room"))])))
        while LENGTH.unpack(peer.read(LENGTH.size)) == (STILL_HERE,):
            pass
        sent.append(read_file(peer))
        peer.send(say(Results([(1, SAVED)])))
        peer.read_all()

    with (
        FakeServer(serve) as fake,
        start_client(fake.port, "-", file, "--name=x", stdin=subprocess.PIPE) as sender,
    ):
        result = sender.wait()
    assert result.error_lines == ["x: at the server: no room"]
    assert [content for content, _ in sent] == [file.read_bytes()]


@pytest.mark.parametrize("read", [0, 1000, 3 * MIB])
def test_hanging_up_in_the_middle_is_one_line(
    tmp_path: Path, read: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the server takes nothing more of what is being sent, and never resets."""
    file = make_file(tmp_path / "file", 40 * MIB)
    over = threading.Event()

    def serve(peer: RawPeer) -> None:
        begin(peer)
        peer.read(read)
        peer.hang_up()
        over.wait(60)

    with FakeServer(serve) as fake:
        assert send_to(fake, file) == 1
        over.set()
    check_one_line(capsys, "closed the connection")


def test_signs_of_life_end_no_conversation_that_gets_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_SIGNS", 4)
    monkeypatch.setattr(client, "LOOK_UP_S", 60.0)  # both in one offer
    signs = 3 * say(Hashing())

    def serve(peer: RawPeer) -> None:
        welcome(peer)
        read_message(peer, Offer)
        peer.send(signs + say(Held([(0, [SIZE])])))
        read_message(peer, Prefixes)
        peer.send(signs + say(Start([0, 0])))
        for index in range(2):
            read_file(peer)
            peer.send(signs + say(Results([(index, SAVED)])))
        peer.read_all()

    assert send(serve, file, make_file(tmp_path / "other", SIZE)) == 0


def test_prefixes_are_those_of_the_file_and_none_is_near_another(file: Path) -> None:
    answers: list[Message] = []
    lengths = [1, 4096, 4097, SIZE, SIZE + 1]

    def serve(peer: RawPeer) -> None:
        begin(peer, Held([(0, lengths)]))
        answers.append(read_message(peer, Prefixes))
        peer.send(say(Start([4096])))
        content, digest = read_file(peer)
        assert content == file.read_bytes()[4096:]
        assert digest == hashlib.sha256(file.read_bytes()).digest()
        peer.send(say(Results([(0, SAVED)])))
        peer.read_all()

    assert send(serve, file) == 0
    whole = file.read_bytes()
    known = {size: hashlib.sha256(whole[:size]).hexdigest() for size in (4096, SIZE)}
    assert answers == [Prefixes([[known.get(length, "") for length in lengths]])]


def test_a_file_is_compared_no_further_once_the_server_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_file(tmp_path / "file", 8 * MIB)
    monkeypatch.setattr(common, "SIGN_INTERVAL_S", 0.02)
    read: list[int] = []

    def serve(peer: RawPeer) -> None:
        begin(peer, Held([(0, [8 * MIB])]))
        peer.reset()

    def note(_progress: client.Progress, size: int) -> None:
        read.append(size)
        wait_for(lambda: "signs of life" not in [each.name for each in threading.enumerate()])

    monkeypatch.setattr(client.Progress, "move", note)
    assert send(serve, file) == 1
    assert read == [MIB]


def test_a_server_that_is_lost_after_it_has_compared_for_long_is_waited_for_anew(
    file: Path,
) -> None:
    offers: list[Message] = []

    def serve(peer: RawPeer) -> None:
        welcome(peer)
        offers.append(read_message(peer, Offer))
        if len(offers) == 3:
            peer.send(say(Start([0])))
            assert read_file(peer)[0] == file.read_bytes()
            peer.send(say(Results([(0, SAVED)])))
            peer.read_all()
        elif len(offers) == 2:
            time.sleep(1.2)  # it compares

    with FakeServer(serve) as fake:
        assert send_to(fake, file, retry_s=1.0) == 0
    assert len(offers) == 3


def test_a_file_that_is_offered_anew_is_so_once_when_the_connection_is_lost(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offers: list[Message] = []

    def serve(peer: RawPeer) -> None:
        welcome(peer)
        offers.append(read_message(peer, Offer))
        if len(offers) == 1:
            file.write_bytes(b"changed")
            peer.send(say(Start([0])))
            assert read_file(peer) == (b"", None)
            return
        peer.send(say(Start([0])))
        assert read_file(peer)[0] == b"changed"
        peer.send(say(Results([(0, SAVED)])))
        peer.read_all()

    with FakeServer(serve) as fake:
        assert send_to(fake, file, retry_s=60) == 0
    first, second = offers
    assert isinstance(first, Offer)
    assert isinstance(second, Offer)
    assert [len(offer.entries) for offer in (first, second)] == [1, 1]
    assert capsys.readouterr().out.count("Saved as") == 1


def test_a_folder_is_told_once_all_that_is_in_it_is_decided_also_what_is_offered_anew(
    inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    for name in ("a/changes", "a/b/changes", "c/stays"):
        make_file(tree / name, 100_000)
    for folder in (tree / "a" / "b", tree / "a", tree / "c", tree):
        os.utime(folder, (1e9, 1e9))
    look_up = client.Upload._look_up

    def change_and_look_up(upload: client.Upload, batch: client.Batch) -> list[client.UnderWay]:
        for path in tree.rglob("changes"):
            if path.stat().st_size == 100_000:
                path.write_bytes(b"changed")
        return look_up(upload, batch)

    monkeypatch.setattr(client.Upload, "_look_up", change_and_look_up)
    assert send(honest_server(inbox), tree) == 0
    assert contents(inbox / "tree") == contents(tree)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "Saved tree/ with 3 files (100.0 kB), every SHA-256 matches"
    assert {path.stat().st_mtime for path in inbox.rglob("*") if path.is_dir()} == {1e9}


def test_a_folder_is_offered_after_all_that_is_in_it_also_what_a_lost_connection_brings_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LOOK_UP_S", 60.0)  # all of it in one offer
    tree = tmp_path / "tree"
    file = make_file(tree / "a" / "changes", 100_000)
    make_sparse(make_file(tree / "b" / "is under way", 0), 100 * MIB)
    offers: list[list[str]] = []

    def serve(peer: RawPeer) -> None:
        welcome(peer)
        offer = read_message(peer, Offer)
        assert isinstance(offer, Offer)
        offers.append([entry.path for entry in offer.entries if isinstance(entry, Entry)])
        if len(offers) == 1:
            file.write_bytes(b"changed")
            peer.send(say(Start([0] * 5)))
            assert read_file(peer) == (b"", None)
            peer.reset()
        else:
            peer.send(say(Start([Outcome("failed", "enough")] * 5)))
            peer.read_all()

    with FakeServer(serve) as fake:
        assert send_to(fake, tree, retry_s=60) == 1
    assert offers[0] == ["tree/a/changes", "tree/a", "tree/b/is under way", "tree/b", "tree"]
    assert sorted(offers[1]) == sorted(offers[0])
    assert offers[1][-1] == "tree"


def test_a_file_that_is_offered_anew_counts_once_for_the_bar(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[client.Progress] = []

    class Kept(client.Progress):
        """One that the test can look at."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def serve(peer: RawPeer) -> None:
        welcome(peer)
        read_message(peer, Offer)
        file.write_bytes(b"changed")
        peer.send(say(Start([0])))
        assert read_file(peer) == (b"", None)
        peer.send(say(Results([(0, Outcome("failed", "given up"))])))
        read_message(peer, Offer)
        peer.send(say(Start([0])))
        read_file(peer)
        peer.send(say(Results([(0, SAVED)])))
        peer.read_all()

    monkeypatch.setattr(client, "Progress", Kept)
    assert send(serve, file) == 0
    assert [progress._decided_bytes for progress in made] == [len(b"changed")]
