"""Neither side takes much memory, however large a file is or however many are under way."""

from __future__ import annotations

import os
from pathlib import Path

from support import (
    MIB,
    Proxy,
    Result,
    Server,
    linux,
    make_file,
    make_partial,
    make_sparse,
    partial_size,
    visible,
    wait_for,
)


@linux
def test_a_large_file_arrives_in_little_memory(server: Server, tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "large", 1024 * MIB)
    result, peak = send_measured(server, source)
    assert result.status == 0, result
    arrived = server.folder / "large"
    try:
        assert arrived.stat().st_size == 1024 * MIB
        with open(arrived, "rb") as file:
            assert file.read(8) == b"begins\0\0"
            file.seek(-6, os.SEEK_END)
            assert file.read() == b"\0\0ends"
        assert 0 < peak < 80, "the client's memory in MiB"
        assert server.peak_mib() < 80, "the server's memory in MiB"
    finally:
        arrived.unlink()


@linux
def test_a_file_over_4_gib_is_resumed_in_little_memory(server: Server, tmp_path: Path) -> None:
    """Most of it is there already, as holes: a disk takes long to write so much."""
    size = 4 * 1024 * MIB + 5
    source = make_sparse(tmp_path / "large", size)
    partial = make_partial(server.folder, "large", b"begins")
    os.truncate(partial, size - 9 * MIB)
    with Proxy(server.port) as link:
        result, peak = send_measured(server, source, port=link.port)
        assert 9 * MIB < link.passed < 10 * MIB
    assert result.status == 0, result
    assert visible(server.folder) == ["large"]
    arrived = server.folder / "large"
    assert arrived.stat().st_size == size
    with open(arrived, "rb") as file:
        file.seek(-6, os.SEEK_END)
        assert file.read() == b"\0\0ends"
    assert 0 < peak < 80, "the client's memory in MiB"
    assert server.peak_mib() < 80, "the server's memory in MiB"


def send_measured(server: Server, source: Path, port: int | None = None) -> tuple[Result, float]:
    """Run a client to its end; return also the most memory that it was seen to have, in MiB."""
    peak = 0.0
    with server.client(source, port=port) as client:

        def ended() -> bool:
            nonlocal peak
            peak = max(peak, client.peak_mib())
            return not client.running()

        wait_for(ended, timeout=240)
        return client.wait(), peak


@linux
def test_each_further_transfer_takes_little_memory(server: Server, tmp_path: Path) -> None:
    transfers = 6
    sources = [make_file(tmp_path / f"{seed}", 40 * MIB, seed) for seed in range(transfers)]
    with Proxy(server.port, hold_at=24 * MIB) as link:
        args = ("-", "--name", "x")
        clients = []
        try:
            for source in sources:
                with open(source, "rb") as file:
                    clients.append(server.client(*args, port=link.port, stdin=file.fileno()))
            wait_for(lambda: link.passed == transfers * 24 * MIB)
            wait_for(lambda: partial_size(server.folder) > transfers * 20 * MIB)
            assert server.peak_mib() < 80 + 24 * (transfers - 1)
            assert max(client.peak_mib() for client in clients) < 80
            link.release()
            for client in clients:
                assert client.wait().status == 0
        finally:
            for client in clients:
                client.close()
    assert len(visible(server.folder)) == transfers
