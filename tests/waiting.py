"""Waiting for what can be told to be so: nothing in the tests sleeps for luck."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

# For whatever ends by itself, on a loaded machine of two cores.
LIMIT_S = 120.0
COMMAND_LIMIT_S = 60.0  # for a command that asks a sound system, or the end of one
INTERVAL_S = 0.01

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str = "", timeout: float = 60.0) -> T:
    """Return what `condition` returns as soon as it is true; fail after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:g} s: {what or condition}")
        time.sleep(INTERVAL_S)
    return value


@contextlib.contextmanager
def background(work: Callable[[], object]) -> Iterator[None]:
    """Run `work` in a thread, which must have ended soon after the ``with`` block."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def ends_soon(work: Callable[[], object]) -> None:
    """Run `work`; fail where it blocks for ever."""
    with background(work):
        pass
