"""A script in a pseudo-terminal, as a user starts it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pexpect

from support import ROOT, environment


def in_terminal(
    script: str, *args: str, cwd: Path | None = None, width: int = 100
) -> pexpect.spawn[str]:
    """Start a script in a pseudo-terminal, as a user does."""
    env = {**environment(), "TERM": "xterm", "HOME": str(cwd or ROOT), "INPUTRC": os.devnull}
    return pexpect.spawn(
        sys.executable,
        [str(ROOT / script), *args],
        cwd=cwd,
        env=env,
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 100),
    )


def matched(terminal: pexpect.spawn[str]) -> str:
    """Return the group of the pattern that was expected last."""
    assert isinstance(terminal.match, re.Match)
    return str(terminal.match[1])


def expect_end(terminal: pexpect.spawn[str]) -> tuple[int | None, str]:
    """Wait until a script in a terminal ends; return its status and what it printed last."""
    terminal.expect(pexpect.EOF)
    terminal.close()
    return terminal.exitstatus, terminal.before or ""
