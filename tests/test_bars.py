"""Bars on a terminal: whole to the last, in any width, and gone when something goes wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tqdm import tqdm

import client
import common
from processes import CTRL_C
from support import MIB, Proxy, Server, make_file, make_partial, posix


@pytest.mark.parametrize("columns", [30, 57, 80, 200])  # 57: a terminal's 60, and "^C"
@pytest.mark.parametrize("label", ["report.pdf", "世界" * 20, "e\u0301" * 60])
def test_a_bar_keeps_percentage_and_where_there_is_room_speed(columns: int, label: str) -> None:
    gauge = client.Gauge(label, 1000 * MIB)
    gauge._start_s -= 2
    shown = gauge.draw(500 * MIB, columns, tqdm.format_meter)
    assert common.cells(shown) <= columns
    assert " 50%" in shown
    assert columns < 57 or "MB/s" in shown


@pytest.mark.parametrize("size", [0, 10, MIB - 1])
def test_the_speed_of_what_is_over_in_a_moment_is_left_out(size: int) -> None:
    shown = client.Gauge("file", size).draw(size, 80, tqdm.format_meter)
    assert "/s" not in shown
    assert "?" not in shown


@posix
def test_ctrl_c_leaves_no_torn_bar(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 40 * MIB)
    with (
        Proxy(server.port, hold_at=16 * MIB) as proxy,
        server.client(source, port=proxy.port, terminal=True) as running,
    ):
        running.expect(r"\d\d%")
        running.type(CTRL_C)
        result = running.wait()
    assert result.status == 130
    last = re.split(r"[\r\n]+", result.stdout.rstrip())
    assert last[-1] == "interrupted: the same command resumes from here"
    assert last[-2].strip() == "", "the bar was cleared"


def test_an_error_leaves_no_dead_bar(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 40 * MIB)
    with (
        Proxy(server.port, hold_at=16 * MIB) as proxy,
        server.client("--retry=0", source, port=proxy.port, terminal=True) as running,
    ):
        running.expect(r"\d\d%")
        proxy.cut()
        result = running.wait()
    assert result.status == 1
    last = re.split(r"[\r\n]+", result.stdout.rstrip())
    assert "gave up" in last[-1]
    assert last[-2].strip() == "", "the bar was cleared"


def test_what_is_there_is_compared_under_a_bar(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 8 * MIB)
    make_partial(server.folder, "file", source.read_bytes()[: 6 * MIB])
    result = server.send(source, terminal=True)
    assert result.status == 0
    assert re.search(r"comparing file: +\d+%", result.stdout)
    assert "file: 100%" in result.stdout
