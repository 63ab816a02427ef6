"""What is said can be used: commands that run as they stand, numbers that are checked."""

from __future__ import annotations

import argparse
import ast
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import client
import common
from support import ROOT, Result, Server, linux, make_file, run_script


@pytest.mark.parametrize("text", ["", "x", "0", "11", "1.5", "1e400", "nan", "9" * 5000])
def test_a_number_out_of_its_range_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 to 10"):
        common.number(int, 1, 10)(text)


def test_a_number_in_its_range_is_taken() -> None:
    assert common.number(int, 1, 10)("10") == 10
    assert common.number(float, 0, 900)("2.5") == 2.5


def test_a_command_that_is_shown_runs() -> None:
    command = client.command_line("client.py", "--version")
    words = shlex.split(command)
    words[1] = str(ROOT / words[1].rpartition("/")[2])
    shown = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.startswith("Socket Pair ")


def test_a_command_that_is_shown_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some place/client.py"])
    words = shlex.split(client.command_line("server.py", "file", "--folder", "a b"))
    assert words[1:] == ["/some place/server.py", "file", "--folder", "a b"]


def test_an_installation_that_is_shown_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "PYTHON", "/some place/python")
    monkeypatch.setattr(sys, "prefix", "/some place")  # an environment's
    words = shlex.split(common.how_to_install("av"))
    assert words == ["/some place/python", "-m", "pip", "install", "av"]


@linux
def test_a_full_disk_under_standard_error_stops_nothing(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    with open("/dev/full", "w") as full:
        result = server.send(tmp_path / "gone", source, stderr=full.fileno())
    assert result.status == 1
    assert (server.folder / "file").exists()


@linux
def test_a_full_disk_under_standard_output_is_told(server: Server, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, ROOT / "client.py", "file", f"--port={server.port}", source],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert process.returncode == 1
    assert process.stderr == "cannot write to standard output: no space left on device\n"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("raise ImportError('none')", "which cannot be loaded (none): "),
        ("raise RuntimeError('broken')", "which cannot be loaded (broken): "),
        ("__version__ = '0.2.11'", "which fails with this Python as 0.2.11, Ubuntu 22.04's: "),
    ],
)
def test_a_missing_or_too_old_pyaudio_is_told_with_what_installs_it(
    module: str, words: str, tmp_path: Path
) -> None:
    result = run_beside("pyaudio.py", module, tmp_path, "--list-devices")
    assert result.stderr.startswith(f"sound needs PyAudio, {words}")
    assert common.how_to_install("pyaudio") in result.stderr
    assert result.stderr.count("\n") == 1


def run_beside(name: str, module: str, folder: Path, *arguments: str) -> Result:
    """Run a listening client where a package is a module of one line; check that it fails."""
    (folder / name).write_text(module)
    result = run_script("client.py", "audio", *arguments, env={"PYTHONPATH": str(folder)})
    assert result.status == 1
    return result


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_an_older_python_is_told_in_one_line(script: str) -> None:
    source = (ROOT / script).read_text()
    ast.parse(source, feature_version=(3, 8))  # else it would be told of a syntax error
    old = f"import runpy, sys; sys.version_info = (3, 9, 2); runpy.run_path({script!r})"
    command = [sys.executable, "-c", old]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Socket Pair needs Python 3.10 or newer, and this is ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_a_script_without_the_module_beside_it_is_told_in_one_line(
    script: str, tmp_path: Path
) -> None:
    alone = Path(shutil.copy(ROOT / script, tmp_path))
    command = [sys.executable, str(alone), "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == f"common.py is missing: it belongs beside {alone}\n"


def test_packages_that_are_broken_are_told_in_one_line(tmp_path: Path) -> None:
    """As by NumPy on a processor for which it was not built."""
    broken = r"raise RuntimeError('\nbaseline\nX86_V2')"
    result = run_beside("numpy.py", broken, tmp_path, "--port=1")
    assert result.stderr == (
        "playing needs NumPy and samplerate, which cannot be loaded (baseline): "
        f"{common.how_to_install('numpy', 'samplerate')}\n"
    )
