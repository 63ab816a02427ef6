"""A sound card for machines that have none: a private PulseAudio with null sinks.

``VirtualSoundCard`` is a loudspeaker and a microphone that real PortAudio opens by their ALSA
names. What is played into ``micfeed`` is what the microphone hears; what the loudspeaker says
can be recorded from its monitor. Nothing of it is seen by, or taken from, the machine's own
sound system: the instance lives in a temporary folder, and ends with the ``with`` block.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from waiting import COMMAND_LIMIT_S, LIMIT_S, wait_for

RATE = 48_000
SPEAKER_MONITOR = "speaker.monitor"
MICROPHONE_FEED = "micfeed"
MICROPHONE_MONITOR = "micfeed.monitor"


def raw_format(channels: int = 1) -> tuple[str, ...]:
    """Return the options of parec and pacat for 16-bit sound at ``RATE``."""
    return ("--raw", f"--rate={RATE}", f"--channels={channels}", "--format=s16le")


FIRST_SOUND_S = 20.0  # of a recording, before it is begun anew
STOP_LIMIT_S = 10.0

# "pulse" is what every program on the card opens, by whichever of these names.
ALSA_CONFIGURATION = """\
</usr/share/alsa/alsa.conf>
pcm.!default { type pulse }
ctl.!default { type pulse }
"""


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """End `process`, by force where asking does not help, and close its pipes."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(COMMAND_LIMIT_S)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None and not stream.closed:
            stream.close()


def outrank(pid: int) -> None:
    """Give all threads of process `pid` more real-time priority than this one's, if it has any.

    PulseAudio gives up what it inherits, so that a busy machine would spoil a measurement; and
    programs that are served by it must not hold it up, as some wait for it without sleeping.
    """
    policy = os.sched_getscheduler(0)
    if policy in (os.SCHED_FIFO, os.SCHED_RR):
        higher = os.sched_param(os.sched_getparam(0).sched_priority + 1)
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setscheduler(int(thread), policy, higher)


@contextlib.contextmanager
def without_priority() -> Iterator[None]:
    """Give up this thread's real-time priority for the ``with`` block, as what computes must."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


class Recording:
    """What a monitor hears, 16-bit at ``RATE``, with the time at which each frame came.

    Chunks come some milliseconds late, never early, so the earliest of them, counted back to
    the first frame, gives the moment of the first frame; two recordings of one run are
    aligned by it to well under a millisecond.
    """

    def __init__(
        self, source: str, environment: Mapping[str, str], latency_ms: int = 5, channels: int = 1
    ) -> None:
        self._frame_bytes = 2 * channels
        self._command = ["parec", "-d", source, f"--latency-msec={latency_ms}"]
        self._command += raw_format(channels)
        self._environment = dict(environment)

    def __enter__(self) -> Recording:
        wait_for(self._begins, "the first sound of a recording", 5 * FIRST_SOUND_S)
        return self

    def _begins(self) -> bool:
        """Start to record; return whether sound comes. It was seen not to, on a busy machine."""
        self._samples = bytearray()
        self._start_s = float("inf")
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, env=self._environment
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: self._samples or not self._thread.is_alive(), timeout=FIRST_SOUND_S)
        if self._samples:
            return True
        status = self._process.poll()
        self._process.kill()
        self.__exit__()
        assert status is None, f"parec has ended ({status})"
        print(f"parec has given nothing for {FIRST_SOUND_S:g} s, and is started anew")
        return False

    def _read(self) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while chunk := os.read(descriptor, 65536):
            self._samples += chunk
            began_s = time.monotonic() - len(self._samples) / self._frame_bytes / RATE
            self._start_s = min(self._start_s, began_s)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._thread.join(STOP_LIMIT_S)
        stop_process(self._process)

    @property
    def start_s(self) -> float:
        """The moment of the first frame, on the clock of ``time.monotonic``."""
        return self._start_s

    def samples(self) -> bytes:
        """Return everything heard so far."""
        return bytes(self._samples)

    def tail(self, seconds: float) -> bytes:
        """Return the last `seconds` heard so far."""
        return bytes(self._samples[-int(seconds * RATE) * self._frame_bytes :])


class VirtualSoundCard:
    """A private PulseAudio with one microphone and one loudspeaker, started and ended here."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sound-card-")
        self.folder = Path(self._folder.name)
        configuration = self.folder / "asound.conf"
        configuration.write_text(ALSA_CONFIGURATION)
        self.environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(self.folder),
            "HOME": str(self.folder),
            "PULSE_SERVER": f"unix:{self.folder}/native",
            "ALSA_CONFIG_PATH": str(configuration),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VirtualSoundCard:
        try:
            self.plug_in()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            self.unplug()
        finally:
            self._folder.cleanup()

    def plug_in(self) -> None:
        """Start the card; blocks until it can be used."""
        with (self.folder / "pulseaudio.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, env=self.environment
            )
        wait_for(lambda: self._pactl("info").returncode == 0, "the start of PulseAudio", LIMIT_S)
        outrank(self._process.pid)
        self.pactl("set-default-sink", "speaker")
        self.pactl("set-default-source", "mic")

    def _command(self) -> list[str]:
        modules = [
            f"module-native-protocol-unix socket={self.folder}/native auth-anonymous=1",
            f"module-null-sink sink_name=speaker rate={RATE}",
            f"module-null-sink sink_name={MICROPHONE_FEED} rate={RATE}",
            f"module-remap-source master={MICROPHONE_MONITOR} source_name=mic",
        ]
        command = ["pulseaudio", "-n", "--exit-idle-time=-1", "--use-pid-file=no"]
        return command + [part for module in modules for part in ("-L", module)]

    def unplug(self) -> None:
        """End the card, as pulling its plug would; ``plug_in`` brings it back."""
        if self._process is not None:
            stop_process(self._process)
            self._process = None

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Have the sound system answer nobody inside the ``with`` block."""
        process = self._process
        if process is None:
            raise RuntimeError("the card is unplugged")
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def pactl(self, *arguments: str) -> str:
        """Return what ``pactl`` prints; raises RuntimeError where it fails."""
        result = self._pactl(*arguments)
        if result.returncode != 0:
            raise RuntimeError(result.stderr.decode())
        return result.stdout.decode()

    def _pactl(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["pactl", *arguments],
            env=self.environment,
            capture_output=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )

    def play(self, samples: bytes) -> subprocess.Popen[bytes]:
        """Start to play mono 16-bit `samples` into the microphone; end it with stop_process."""
        source = self.folder / "played.raw"
        source.write_bytes(samples)
        return self.play_file(source)

    def play_file(self, source: Path) -> subprocess.Popen[bytes]:
        """Start to play a raw file, as ``play``."""
        with source.open("rb") as file:
            return subprocess.Popen(
                ["pacat", "-d", MICROPHONE_FEED, "--latency-msec=50", *raw_format()],
                stdin=file,
                env=self.environment,
            )

    def record(self, source: str = SPEAKER_MONITOR) -> Recording:
        """Return a recording of `source`, to be used in a ``with`` block."""
        return Recording(source, self.environment)


class StereoCard(VirtualSoundCard):
    """A virtual sound card whose loudspeaker's sides are sinks of their own."""

    def plug_in(self) -> None:
        """Start the card; blocks until it can be used."""
        super().plug_in()
        for side in ("left", "right"):
            self.pactl(
                "load-module", "module-remap-sink", f"sink_name={side}", "master=speaker",
                "channels=1", "channel_map=mono", f"master_channel_map=front-{side}", "remix=no",
            )  # fmt: skip
        self.pactl("load-module", "module-null-sink", "sink_name=others", f"rate={RATE}")
        if self._process is not None:
            outrank(self._process.pid)

    def on(self, sink: str) -> dict[str, str]:
        """Return the environment of a program that plays into `sink`."""
        return {**self.environment, "PULSE_SINK": sink}
