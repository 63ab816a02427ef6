"""Fixtures of all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from support import Server

settings.register_profile("socket-pair", deadline=None)
settings.load_profile("socket-pair")

# A shell that starts the tests in the background has them ignore Ctrl+C, and every process that
# they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """Return the folder that the server receives into."""
    return tmp_path / "inbox"


@pytest.fixture
def server(inbox: Path) -> Iterator[Server]:
    """Give a running server."""
    with Server(inbox) as running:
        yield running
