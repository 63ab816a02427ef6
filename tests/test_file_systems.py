"""File systems that know less than others: each works by a fallback, or fails in one clear line."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import common
from pairing import send_here
from support import (
    END_OF_FILE,
    GIVEN_UP,
    MIB,
    ROOT,
    WITHOUT_PRIVILEGE,
    Proxy,
    RawClient,
    Server,
    contents,
    frame,
    linux,
    make_file,
    make_partial,
    make_sparse,
    partials,
    visible,
    with_permissions,
)

pytestmark = linux


@pytest.fixture(scope="session")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library that has calls fail."""
    library = tmp_path_factory.mktemp("library") / "faulty_disk.so"
    source = ROOT / "tests" / "faulty_disk.c"
    command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library


def serve(inbox: Path, library: Path, faults: str, *args: str) -> Server:
    """Start a server on a file system with these faults."""
    return Server(inbox, *args, env={"LD_PRELOAD": str(library), "FAULTS": faults})


def send_all_sizes(server: Server, tmp_path: Path) -> dict[str, bytes]:
    """Send files small and large, twice over and in a new form; return what should be there."""
    sources = [make_file(tmp_path / f"{size}.bin", size) for size in (0, 1000, 3 * MIB)]
    for word in ("Saved", "Already there"):
        result = server.send(*sources)
        assert result.status == 0, result
        assert result.stdout.count(word) == 3
    expected = {source.name: source.read_bytes() for source in sources}
    make_file(sources[1], 1000, seed=2)
    make_file(sources[2], 3 * MIB, seed=2)
    result = server.send(*sources)
    assert result.status == 0, result
    assert "Saved as 1000 (1).bin" in result.stdout
    for source in sources[1:]:
        expected[f"{source.stem} (1).bin"] = source.read_bytes()
    return expected


LINK_FAULTS = [errno.EPERM, errno.EACCES, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS]
LOCK_FAULTS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES]
FAULTS = [
    f"tmpfile={errno.EOPNOTSUPP}",
    *(f"link={number}" for number in LINK_FAULTS),
    *(f"link={number} tmpfile={errno.EISDIR}" for number in LINK_FAULTS[:2]),
    *(f"flock={number}" for number in LOCK_FAULTS),
    f"flock={errno.ENOLCK} link={errno.EPERM} tmpfile={errno.EINVAL} free=0",
]


@pytest.mark.parametrize("faults", FAULTS)
def test_what_a_file_system_lacks_is_done_in_another_way(
    inbox: Path, tmp_path: Path, faulty_disk: Path, faults: str
) -> None:
    with serve(inbox, faulty_disk, faults) as server:
        expected = send_all_sizes(server, tmp_path)
        assert server.stderr() == ""
    assert contents(inbox) == expected


def test_without_links_many_clients_with_one_name_lose_nothing(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    sources = [make_file(tmp_path / str(seed) / "same", 1000, seed) for seed in range(8)]
    with serve(inbox, faulty_disk, f"link={errno.EPERM} tmpfile={errno.EINVAL}") as server:
        clients = [server.client(source) for source in sources]
        for client in clients:
            with client:
                assert client.wait().status == 0
    assert sorted(contents(inbox).values()) == sorted(source.read_bytes() for source in sources)


def test_a_disk_that_tells_no_free_space_takes_files(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    with serve(inbox, faulty_disk, "free=0") as server:
        assert server.send(make_file(tmp_path / "file", 3 * MIB)).status == 0
        assert server.send("-", "--name", "piped", stdin=bytes(3 * MIB)).status == 0


@with_permissions
@pytest.mark.parametrize("terminal", [False, True])
def test_a_folder_that_may_only_be_listed_stops_no_other_where_a_listing_tells_no_kinds(
    server: Server, tmp_path: Path, faulty_disk: Path, terminal: bool
) -> None:
    for name in ("before", "listed", "then"):
        make_file(tmp_path / "tree" / name / "file", 10)
    (tmp_path / "tree" / "listed").chmod(0o444)
    env = {"LD_PRELOAD": str(faulty_disk), "FAULTS": "types=unknown"}
    result = server.send(tmp_path / "tree", env=env, wrapper=WITHOUT_PRIVILEGE, terminal=terminal)
    assert result.status == 1
    said = result.stdout + result.stderr
    assert f"{tmp_path / 'tree' / 'listed' / 'file'}: permission denied" in said
    assert "Saved tree/ with 2 files (20 bytes)" in said
    assert "without 1 that failed" in said


def test_a_file_too_large_for_the_file_system_fails_in_one_line_and_leaves_nothing(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    large = make_file(tmp_path / "large", 9 * MIB)
    small = make_file(tmp_path / "small", 3 * MIB)
    with serve(inbox, faulty_disk, f"size={4 * MIB}") as server:
        result = server.send(large, small)
    assert result.status == 1
    assert result.error_lines == [f"{large}: at the server: file too large"]
    assert contents(inbox) == {"small": small.read_bytes()}


def test_what_a_full_disk_has_to_give_back_leaves_nothing_hidden(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    large = make_file(tmp_path / "large", 3 * MIB)
    with serve(inbox, faulty_disk, f"full={MIB}") as server:
        result = server.send(large)
        assert result.error_lines == [f"{large}: at the server: no space left on device"]
        assert os.listdir(inbox) == []


def test_a_disk_that_is_full_in_the_middle_of_a_slow_segment_costs_that_file_alone(
    inbox: Path, faulty_disk: Path
) -> None:
    offer = [{"path": "large", "size": MIB}, {"path": "small", "size": 5}]
    with (
        serve(inbox, faulty_disk, f"full={MIB // 4}") as server,
        RawClient(server.port).greet() as client,
    ):
        assert client.offer(*offer)["entries"] == [{"offset": 0}] * 2
        segment = frame(bytes(MIB))
        client.send(segment[: MIB // 2])
        assert "failed" in client.receive_result()
        client.send(segment[MIB // 2 :] + GIVEN_UP)
        client.send(frame(b"small") + END_OF_FILE + hashlib.sha256(b"small").digest())
        assert "saved" in client.receive_result()
    assert contents(inbox) == {"small": b"small"}


@pytest.mark.parametrize("call", ["write", "link", "read", "unlink"])
def test_a_disk_that_stands_still_for_longer_than_a_client_waits_costs_no_connection(
    inbox: Path, tmp_path: Path, faulty_disk: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whether a file is written, gets its name or is compared, or a leftover of it is removed."""
    size = 40 * MIB if call == "write" else MIB
    source = make_sparse(tmp_path / "file", size)
    if call == "read":
        make_sparse(make_file(inbox / "file", 0), size)
    if call == "unlink":
        make_partial(inbox, "file", b"other")
    monkeypatch.setattr(common, "PROGRESS_TIMEOUT_S", 7.0)  # of the client, in this process
    with serve(inbox, faulty_disk, f"{call}=stall") as server:
        assert send_here(server.port, source) == 0
    assert os.listdir(inbox) == ["file"]


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_what_a_network_tells_only_at_the_end_of_a_file_keeps_it_from_its_name(
    inbox: Path, tmp_path: Path, faulty_disk: Path, size: int
) -> None:
    source = make_file(tmp_path / "file", size)
    with serve(inbox, faulty_disk, f"close={errno.ENOSPC}") as server:
        for _ in range(2):
            result = server.send(source)
            assert result.error_lines == [f"{source}: at the server: no space left on device"]
            assert os.listdir(inbox) == []


def test_a_copy_of_what_fails_at_its_end_is_not_left_behind(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    """Where a file cannot get a hidden name it would be copied for the next run."""
    source = make_file(tmp_path / "file", 100_000)
    with serve(inbox, faulty_disk, f"close={errno.EIO} link={errno.EPERM}") as server:
        held = server.held()
        result = server.send(source)
        assert result.error_lines == [f"{source}: at the server: input/output error"]
        server.wait_until_idle(held)
    assert os.listdir(inbox) == []


def test_what_a_network_tells_of_a_partial_file_that_is_of_no_use_costs_no_connection(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    source = make_file(tmp_path / "file", 1000)
    make_partial(inbox, "file", b"other")
    with serve(inbox, faulty_disk, f"close={errno.EIO}") as server:
        result = server.send(source)
    assert result.error_lines == [f"{source}: at the server: input/output error"]


def test_what_failed_only_at_its_very_end_is_there_for_the_next_run(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    """Also where its source is older than leftovers become, and may not be written to."""
    source = make_file(tmp_path / "file", 3 * MIB)
    source.chmod(0o444)
    os.utime(source, (0, 0))
    with serve(inbox, faulty_disk, f"link={errno.EIO}") as server:
        result = server.send(source)
        assert result.error_lines == [f"{source}: at the server: input/output error"]
    (partial,) = partials(inbox)
    assert partial.stat().st_mode & 0o777 == 0o600
    with Server(inbox) as server, Proxy(server.port) as link:
        server.held()  # it has looked for old leftovers by then
        assert server.send(source, port=link.port).status == 0
        assert link.passed < MIB
    assert contents(inbox) == {"file": source.read_bytes()}
    assert (inbox / "file").stat().st_mtime == 0


RECORD_SOUND = """
import sys, client, common
files = client.RecordingFiles(sys.argv[1], common.Console(quiet=True))
sys.exit(common.exit_status_of(lambda _: client.WavWriter(files, common.AudioFormat(48_000, 1))))
"""


def test_a_recording_on_a_full_disk_fails_in_one_line(tmp_path: Path, faulty_disk: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(faulty_disk), "FAULTS": "full=0"}
    command = [sys.executable, "-c", RECORD_SOUND, str(tmp_path / "talk.wav")]
    failed = subprocess.run(
        command, env=environment, cwd=ROOT, check=False, timeout=60, stderr=subprocess.PIPE
    )
    assert failed.returncode == 1
    assert failed.stderr == b"cannot record: no space left on device\n"
    assert os.listdir(tmp_path) == []


# --- names ----------------------------------------------------------------------------------


def test_names_that_fat_cannot_hold_become_the_nearest_and_both_sides_say_so(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    source = make_file(tmp_path / "Meeting 10:30.txt", 1000)
    large = make_file(tmp_path / "tree" / 'what "now"?' / "a*b", 3 * MIB)
    faults = f"names=fat link={errno.EPERM} tmpfile={errno.EOPNOTSUPP}"
    for _ in range(2):  # of servers, the second of which knows nothing of the first
        with serve(inbox, faulty_disk, faults) as server:
            result = server.send(source, tmp_path / "tree")
            assert result.status == 0, result
            assert "as Meeting 10_30.txt, SHA-256 matches" in result.stdout
            assert "Saved as tree/what _now__/\n" in result.stdout
            server.wait_for_output("Meeting 10_30.txt")
    assert contents(inbox) == {
        "Meeting 10_30.txt": source.read_bytes(),
        "tree/": b"",
        "tree/what _now__/": b"",
        "tree/what _now__/a_b": large.read_bytes(),
    }


def test_names_that_the_systems_locale_cannot_hold_become_the_nearest(
    inbox: Path, tmp_path: Path
) -> None:
    small = make_file(tmp_path / "\u6f22\u5b57.txt", 1000)
    large = make_file(tmp_path / "caf\u00e9" / "\u6f22", 2 * MIB)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for word in ("Saved", "Already there"):
        with Server(inbox, env=ascii_only) as server:
            result = server.send(small, large.parent)
        assert result.status == 0, result
        assert f"{word} as __.txt, SHA-256 matches" in result.stdout
    assert contents(inbox) == {
        "__.txt": small.read_bytes(),
        "caf_/": b"",
        "caf_/_": large.read_bytes(),
    }


def test_names_too_long_for_an_encrypted_folder_are_shortened(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    sources = [make_file(tmp_path / f"{'x' * 200}.{size}", size) for size in (1000, 2 * MIB)]
    with serve(inbox, faulty_disk, "names=short") as server:
        result = server.send(*sources)
        assert result.status == 0, result
    assert sorted(contents(inbox)) == sorted(
        "x" * (143 - len(source.suffix)) + source.suffix for source in sources
    )
    assert partials(inbox) == []


# --- a folder to which names can only be added ----------------------------------------------


def test_where_names_can_only_be_added_each_file_is_saved_once(
    inbox: Path, tmp_path: Path, faulty_disk: Path
) -> None:
    faults = f"unlink={errno.EPERM} rename={errno.EPERM}"
    sources = [make_file(tmp_path / f"{size}", size) for size in (1000, 3 * MIB)]
    with serve(inbox, faulty_disk, faults) as server:
        for word in ("Saved", "Already there"):
            result = server.send(*sources)
            assert result.status == 0, result
            assert result.stdout.count(word) == 2
    assert visible(inbox) == sorted(source.name for source in sources)
    for source in sources:
        assert (inbox / source.name).read_bytes() == source.read_bytes()
    assert len(os.listdir(inbox)) <= 3, "beside them the hidden name of the large one"


# --- permissions ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 3 * MIB])
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o755, 0o700, 0o444, 0o666, 0o777])
def test_nobody_may_do_here_what_the_source_forbids(
    server: Server, tmp_path: Path, size: int, mode: int
) -> None:
    source = make_file(tmp_path / "tree" / "file", size)
    source.chmod(mode)
    source.parent.chmod(0o750)
    assert server.send(tmp_path / "tree").status == 0
    umask = os.umask(0o022)
    os.umask(umask)
    assert (server.folder / "tree" / "file").stat().st_mode & 0o777 == mode & ~umask
    assert (server.folder / "tree").stat().st_mode & 0o777 == 0o750 & ~umask


# --- dates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("year", [1601, 2300, 9999])
def test_a_date_that_no_clock_holds_is_set_as_far_as_it_goes(
    server: Server, tmp_path: Path, year: int
) -> None:
    source = make_file(tmp_path / "file", 1000)
    seconds = (year - 1970) * 31_556_952
    os.utime(source, ns=(seconds * 10**9, seconds * 10**9))
    assert server.send(source).status == 0
    assert (server.folder / "file").stat().st_mtime_ns == source.stat().st_mtime_ns
