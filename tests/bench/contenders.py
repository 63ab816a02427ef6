"""The contenders of files.py: Socket Pair and what people use, each with its own server."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from ports import HOST, free_port  # noqa: E402
from sound_card import stop_process  # noqa: E402

MIB = 1024 * 1024
HASH_SAMPLE = 64 * MIB
START_SECONDS = 10.0
LOG_TAIL_LINES = 5

OURS = "ours"
PAIRED = "paired"
CODE = "KQ7M-2XFD-9WPA"
PYTHON_START = "import socket, ssl, argparse, hashlib, json"
HASH_WITH_PYTHON = """
import hashlib, sys
digest, block = hashlib.sha256(), bytearray(1 << 20)
with open(sys.argv[1], "rb", buffering=0) as file:
    while count := file.readinto(block):
        digest.update(memoryview(block)[:count])
"""


class BenchError(Exception):
    """What makes a measurement impossible, in words for the user."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the work: the command for an item, and the folder where its copy goes."""

    command: Callable[[Path], list[str]]
    folder: Path | None = None


def say(line: str) -> None:
    """Tell the waiting user how it goes; the results alone are on standard output."""
    print(line, file=sys.stderr, flush=True)


# Commands and servers


def runs_as_root() -> bool:
    """Tell whether this process may do anything (on Windows nobody is root)."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def find_program(name: str) -> str:
    """Return a program's full path; daemons are often outside a normal user's search path."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=places)
    if found is None:
        raise BenchError(f"{name} is not installed")
    return found


def failure(what: str, output: str) -> BenchError:
    """Put what went wrong together with the last words of the program that did."""
    return BenchError("\n  ".join([what, *output.splitlines()[-LOG_TAIL_LINES:]]))


def check(command: list[str]) -> None:
    """Run a command that has to succeed."""
    ended = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode:
        raise failure(f"{shlex.join(command)}: exit status {ended.returncode}", ended.stderr)


def seconds_of(command: list[str]) -> float:
    """Run a command that has to succeed and return how long it took."""
    start = time.perf_counter()
    check(command)
    return time.perf_counter() - start


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    """Return once the server accepts connections; raise if it never does."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, port), timeout=1).close()
            return
        time.sleep(0.02)
    raise BenchError(f"no server came up on port {port}")


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Have a server run in the background, out of reach of the terminal's Ctrl+C."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_port(port, server)
        yield
    finally:
        if server.poll() is not None:
            ended = f"{shlex.join(command)}: ended by itself, exit status {server.returncode}"
            say(str(failure(ended, log.read_text(errors="replace"))))
        stop_process(server)


# The contenders


def make_received(work: Path) -> Path:
    """Make the folder that a contender's copies go to."""
    folder = work / "received"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def start_ours(work: Path, *arguments: str) -> Iterator[Contender]:
    """Socket Pair, as it stands in this working copy, with the same arguments for both sides."""
    port = free_port()
    folder = make_received(work)
    both = ["file", "--port", str(port), "-q", *arguments]
    server = [sys.executable, str(ROOT / "server.py"), *both, "--folder", str(folder)]
    client = [sys.executable, str(ROOT / "client.py"), *both]
    with serving(server, port, work / "log"):
        yield Contender(lambda item: [*client, str(item)], folder)


def start_paired(work: Path) -> contextlib.AbstractContextManager[Contender]:
    """Socket Pair with a pairing code: the same encrypted, as scp is."""
    return start_ours(work, "--code", CODE)


@contextlib.contextmanager
def start_rsync(work: Path) -> Iterator[Contender]:
    """Run rsync's daemon: no ssh, no encryption, whole files."""
    rsync = find_program("rsync")
    port = free_port()
    folder = make_received(work)
    config = work / "rsyncd.conf"
    settings = ["use chroot = no", "reverse lookup = no"]
    if runs_as_root():
        settings += ["uid = 0", "gid = 0"]
    module = ["[received]", f"path = {folder}", "read only = no"]
    config.write_text("\n".join([*settings, *module, ""]))
    daemon = [rsync, "--daemon", "--no-detach", f"--config={config}", f"--address={HOST}"]
    url = f"rsync://{HOST}:{port}/received/"

    def command(item: Path) -> list[str]:
        return [rsync, "-aW" if item.is_dir() else "-W", str(item), url]

    with serving([*daemon, f"--port={port}"], port, work / "log"):
        yield Contender(command, folder)


def make_key(path: Path) -> Path:
    """Make an ssh key without a passphrase."""
    keygen = find_program("ssh-keygen")
    check([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(path)])
    return path


def prepare_sshd(work: Path, port: int, user_key: Path) -> list[str]:
    """Write the configuration of a private sshd and return the command that runs it."""
    settings = {
        "Port": port,
        "ListenAddress": HOST,
        "HostKey": make_key(work / "host_key"),
        "AuthorizedKeysFile": user_key.with_suffix(".pub"),
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "Subsystem sftp": "internal-sftp",
    }
    config = work / "sshd_config"
    config.write_text("".join(f'{name} "{value}"\n' for name, value in settings.items()))
    return [find_program("sshd"), "-D", "-e", "-f", str(config)]


def make_missing_folder(sshd: list[str]) -> None:
    """Make the empty folder that sshd insists on as root, where no sshd was ever started before."""
    told = subprocess.run([*sshd, "-t"], capture_output=True, text=True, check=False).stderr
    missing = re.search(r"Missing privilege separation directory: (\S+)", told)
    if missing and runs_as_root():
        say(f"scp: making {missing[1]}, which sshd needs")
        Path(missing[1]).mkdir(mode=0o755)


def ssh_options(port: int, user_key: Path) -> list[str]:
    """Return what makes ssh and scp use the private sshd, and nothing of the user's own setup."""
    settings = {
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": os.devnull,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "BatchMode": "yes",
        "LogLevel": "ERROR",
        "Port": port,
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    return ["-F", "none", "-i", str(user_key), *options]


@contextlib.contextmanager
def start_scp(work: Path) -> Iterator[Contender]:
    """Run scp, with an sshd that knows this run's key alone."""
    scp, ssh = find_program("scp"), find_program("ssh")
    port = free_port()
    folder = make_received(work)
    user_key = make_key(work / "user_key")
    sshd = prepare_sshd(work, port, user_key)
    make_missing_folder(sshd)
    options = ssh_options(port, user_key)

    def command(item: Path) -> list[str]:
        recursive = ["-r"] if item.is_dir() else []
        return [scp, "-q", *options, *recursive, str(item), f"{HOST}:{folder}/"]

    with serving(sshd, port, work / "log"):
        check([ssh, *options, HOST, "exit"])
        yield Contender(command, folder)


@contextlib.contextmanager
def start_cp(work: Path) -> Iterator[Contender]:
    """Copy within the machine: what the disk and the page cache allow."""
    cp = find_program("cp")
    folder = make_received(work)

    def command(item: Path) -> list[str]:
        return [cp, *(["-r"] if item.is_dir() else []), str(item), str(folder)]

    yield Contender(command, folder)


@contextlib.contextmanager
def start_sha256(work: Path) -> Iterator[Contender]:
    """Read and hash with the fastest program there is: what a checked copy cannot do without."""
    sample = work / "sample"
    sample.write_bytes(bytes(HASH_SAMPLE))
    commands = [[sys.executable, "-c", HASH_WITH_PYTHON]]
    for program, *arguments in (["sha256sum"], ["openssl", "dgst", "-sha256"]):
        with contextlib.suppress(BenchError):
            commands.append([find_program(program), *arguments])
    fastest = min(commands, key=lambda command: seconds_of([*command, str(sample)]))
    sample.unlink()
    say(f"sha256: the fastest here is {Path(fastest[0]).name}")
    yield Contender(lambda item: [*fastest, str(item)])


@contextlib.contextmanager
def start_python(_work: Path) -> Iterator[Contender]:
    """Start Python with the modules that a file client needs, and end it again."""
    yield Contender(lambda _item: [sys.executable, "-c", PYTHON_START])


STARTERS = {
    OURS: start_ours,
    PAIRED: start_paired,
    "rsync": start_rsync,
    "scp": start_scp,
    "cp": start_cp,
    "sha256": start_sha256,
    "python": start_python,
}


def start_contenders(
    names: set[str], work: Path, stack: contextlib.ExitStack
) -> dict[str, Contender]:
    """Start every contender of these names that can be had here; the stack ends them."""
    contenders = {}
    for name, starter in STARTERS.items():
        if name not in names:
            continue
        own = work / name
        own.mkdir()
        try:
            contenders[name] = stack.enter_context(starter(own))
        except BenchError as error:
            if name == OURS:
                raise
            say(f"{name} is left out: {error}")
    return contenders
