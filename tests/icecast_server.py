"""A real Icecast with a small configuration of its own, for tests and benchmarks.

It has what the README's recipe presumes: port 8000 and the password hackme.
"""

from __future__ import annotations

from pathlib import Path

PORT = 8000
MOUNT = "/live.opus"
STARTED = "server started"  # what it prints when it can be used

# It will not run as root, and changes to another user by itself; for any other it only says so.
CONFIGURATION = """\
<icecast>
  <location>here</location><admin>nobody</admin><hostname>127.0.0.1</hostname>
  <limits>
    <clients>{clients}</clients><sources>2</sources><source-timeout>{timeout_s}</source-timeout>
    <queue-size>524288</queue-size><burst-size>{burst_bytes}</burst-size>
  </limits>
  <authentication>
    <source-password>hackme</source-password><relay-password>hackme</relay-password>
    <admin-user>admin</admin-user><admin-password>hackme</admin-password>
  </authentication>
  <listen-socket><port>{port}</port><bind-address>127.0.0.1</bind-address></listen-socket>
  <paths>
    <basedir>/usr/share/icecast2</basedir><logdir>/tmp</logdir>
    <webroot>/usr/share/icecast2/web</webroot><adminroot>/usr/share/icecast2/admin</adminroot>
  </paths>
  <logging><accesslog>-</accesslog><errorlog>-</errorlog><loglevel>3</loglevel></logging>
  <security>
    <chroot>0</chroot><changeowner><user>nobody</user><group>nogroup</group></changeowner>
  </security>
</icecast>
"""


def configure(
    folder: Path,
    clients: int,
    timeout_s: int = 10,
    burst_bytes: int = 65_535,
    port: int = PORT,
) -> list[str]:
    """Write a configuration for so many listeners; return the command that runs it."""
    path = folder / "icecast.xml"
    path.write_text(
        CONFIGURATION.format(
            clients=clients + 10, timeout_s=timeout_s, burst_bytes=burst_bytes, port=port
        )
    )
    return ["icecast2", "-c", str(path)]
