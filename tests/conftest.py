"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from common import normalize_code
from pairing import CODE, CONTENT, NAME, make_hasty
from sound_card import VirtualSoundCard
from support import (
    Server,
    small_disk,
)

# In CI every run has the same examples, so that none fails by luck; elsewhere each has others.
settings.register_profile("socket-pair", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("socket-pair")

# A shell that starts the tests in the background has them ignore Ctrl+C, and every process that
# they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Fail where a test leaves other variables behind, which all processes after it would have."""
    before = dict(os.environ)
    yield
    before["PYTEST_CURRENT_TEST"] = os.environ["PYTEST_CURRENT_TEST"]
    assert dict(os.environ) == before


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """Return the folder that the server receives into."""
    return tmp_path / "inbox"


@pytest.fixture
def server(inbox: Path) -> Iterator[Server]:
    """Give a running server."""
    with Server(inbox) as running:
        yield running


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give a disk of 16 MiB."""
    with small_disk(tmp_path / "disk", 16) as path:
        yield path


@pytest.fixture(scope="module")
def code() -> str:
    return normalize_code(CODE)


@pytest.fixture
def paired(inbox: Path) -> Iterator[Server]:
    with Server(inbox, "--code", CODE) as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a client in this process soon tired of waiting."""
    make_hasty(monkeypatch)


@pytest.fixture(scope="module")
def card() -> Iterator[VirtualSoundCard]:
    with VirtualSoundCard() as virtual:
        yield virtual


@pytest.fixture
def silent_machine(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which there is no sound card at all."""
    return {
        **os.environ,
        "PULSE_SERVER": f"unix:{tmp_path}/nowhere",
        "XDG_RUNTIME_DIR": str(tmp_path),
    }


@pytest.fixture
def without_av(silent_machine: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Return such an environment in which package av is not installed either."""
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "av.py").write_text("raise ImportError('not here')\n")
    return {**silent_machine, "PYTHONPATH": str(tmp_path / "no")}
