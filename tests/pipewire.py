"""A private PipeWire that stands in for a JACK server, as it does on today's desktops.

It has one microphone and one loudspeaker, both made of nothing, called ``Room`` and ``Hall``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sound_card import stop_process
from waiting import COMMAND_LIMIT_S, LIMIT_S, wait_for

DEVICES = """\
context.objects = [
    { factory = adapter args = { factory.name = support.null-audio-sink
        node.name = room node.description = Room media.class = Audio/Duplex
        audio.position = [ FL FR ] object.linger = true } }
    { factory = adapter args = { factory.name = support.null-audio-sink
        node.name = hall node.description = Hall media.class = Audio/Sink
        audio.position = [ FL FR ] object.linger = true } }
]
"""


class PipeWire:
    """PipeWire and what it needs, in a temporary folder. Use it in a ``with`` block."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pipewire-")))
        places = {"XDG_RUNTIME_DIR": folder / "run", "PIPEWIRE_RUNTIME_DIR": folder / "run"}
        places |= {"XDG_CONFIG_HOME": folder / "config", "XDG_STATE_HOME": folder / "state"}
        drop_ins = folder / "config" / "pipewire" / "pipewire.conf.d"
        drop_ins.mkdir(parents=True)
        (drop_ins / "devices.conf").write_text(DEVICES)
        (folder / "run").mkdir(mode=0o700)
        self._bus = f"unix:path={folder}/bus"
        self._runtime = str(folder / "run")
        self._own = {
            **os.environ,
            **{name: str(place) for name, place in places.items()},
            "HOME": str(folder),
            "DBUS_SESSION_BUS_ADDRESS": self._bus,
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return an environment whose JACK library is PipeWire's."""
        command = ["pw-jack", "printenv", "LD_LIBRARY_PATH"]
        found = subprocess.run(command, capture_output=True, check=True, timeout=COMMAND_LIMIT_S)
        path = found.stdout.decode().strip()
        return {**base, "PIPEWIRE_RUNTIME_DIR": self._runtime, "LD_LIBRARY_PATH": path}

    def __enter__(self) -> PipeWire:
        try:
            self._run("dbus-daemon", "--session", "--nofork", f"--address={self._bus}")
            wait_for(Path(self._own["HOME"], "bus").exists, "D-Bus's socket")
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            stop_process(process)
        self._stack.close()

    def _run(self, *command: str) -> subprocess.Popen[bytes]:
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(command, env=self._own, stdout=nowhere, stderr=nowhere)
        self._processes.append(process)
        return process

    def start(self) -> None:
        """Start PipeWire; blocks until its devices can be used."""
        core = self._run("pipewire")
        wait_for(Path(self._runtime, "pipewire-0").exists, "PipeWire's socket")
        self._daemons = [core, self._run("wireplumber")]
        wait_for(self._is_ready, "the start of PipeWire", LIMIT_S)

    def _is_ready(self) -> bool:
        found = subprocess.run(
            ["pw-jack", "jack_lsp"],
            env=self._own,
            capture_output=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
        return b"Room:capture_FL" in found.stdout and b"Hall:playback_FL" in found.stdout

    def kill(self) -> None:
        """End PipeWire without a chance to tell anyone, as a crash or a restart does."""
        for process in self._daemons:
            process.kill()
            process.wait(COMMAND_LIMIT_S)
        Path(self._runtime, "pipewire-0").unlink(missing_ok=True)
