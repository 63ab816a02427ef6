"""A TCP proxy in whose middle one can do harm: hold, change, slow down, cut, record."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from ports import HOST
from processes import Process
from waiting import LIMIT_S, wait_for

RECORD_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 64 * 1024

UP, DOWN = 0, 1  # towards the server, and back

# Takes a direction, how many bytes of this connection have passed that way, and what comes next;
# returns what goes on in its place. It may block, and raise Cut.
Hook = Callable[[int, int, bytes], bytes]


class Cut(Exception):
    """Raised by a hook to break the connection, once `last` has been passed on."""

    def __init__(self, last: bytes = b"") -> None:
        super().__init__(last)
        self.last = last


class Proxy:
    """A proxy to a server on this machine, on a `port` of its own. Use it in a ``with`` block.

    With `hold_at`, it passes on that many bytes of each connection on their way to the server,
    and then waits for `release`. `hook` is called with all that passes. `cut` breaks all
    connections.
    """

    def __init__(self, port: int, hold_at: int | None = None, hook: Hook | None = None) -> None:
        self.connections = 0
        self.passed = 0  # bytes towards the server, of all connections
        self.recorded = (bytearray(), bytearray())  # what came from each side, the first of it
        self._target = port
        self._hold_at = hold_at
        self._hook = hook
        self._changed = threading.Condition()
        self._open: set[Relay] = set()
        self._closed = False
        self._listening = socket.socket()
        # Small, so that a client soon feels that it is held.
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BLOCK_BYTES)
        self._listening.bind((HOST, 0))
        self._listening.listen(64)
        self.port: int = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(LIMIT_S)
        self._listening.close()
        self._closed = True
        self.cut()
        for thread in self._threads:
            thread.join(LIMIT_S)

    # for the tests

    def hold(self, at: int) -> None:
        """Pass on only `at` bytes of each connection that is made from now on."""
        with self._changed:
            self._hold_at = at

    def release(self) -> None:
        """Hold nothing any more."""
        with self._changed:
            self._hold_at = None
            self._changed.notify_all()

    def cut(self) -> None:
        """Break all connections, as a cable that is pulled out does to one that notices."""
        with self._changed:
            relays = list(self._open)
        for relay in relays:
            self.break_off(relay)

    def wait_until_held(self) -> None:
        """Wait until as many bytes have passed as may."""
        wait_for(
            lambda: self._hold_at is not None and self.passed >= self._hold_at,
            what=f"{self._hold_at} bytes have passed, {self.passed} have",
        )

    def wait_until_passed(self, count: int, client: Process) -> None:
        """Wait until `count` bytes have passed, or `client` has ended."""
        try:
            wait_for(lambda: self.passed >= count or not client.running(), timeout=LIMIT_S)
        except AssertionError:
            said = client.text()
            raise AssertionError(f"{self.passed} of {count} bytes have passed: {said}") from None

    # for its connections

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                thread = threading.Thread(target=self._serve, args=(near,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, near: socket.socket) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            stack.enter_context(near)
            far = stack.enter_context(socket.create_connection((HOST, self._target), timeout=60))
            relay = Relay(self, near, far)
            with self._changed:
                self.connections += 1
                self._open.add(relay)
                stack.callback(self._open.discard, relay)
                if self._closed:
                    return
            relay.run()

    def room(self, relay: Relay, direction: int, passed: int) -> int:
        """Return how many bytes may pass that way now; blocks while there are none."""
        if direction == DOWN:
            return BLOCK_BYTES
        with self._changed:
            self._changed.wait_for(
                lambda: relay.broken or self._hold_at is None or passed < self._hold_at
            )
            return (
                BLOCK_BYTES if self._hold_at is None else min(BLOCK_BYTES, self._hold_at - passed)
            )

    def change(self, direction: int, passed: int, data: bytes) -> bytes:
        """Record `data`, and return what goes on in its place. Raises Cut."""
        with self._changed:
            record = self.recorded[direction]
            record += data[: RECORD_BYTES - len(record)]
        return self._hook(direction, passed, data) if self._hook else data

    def note_passed(self, count: int) -> None:
        """Count what has gone to the server."""
        with self._changed:
            self.passed += count

    def break_off(self, relay: Relay) -> None:
        """Break one connection, also while it is held."""
        relay.shut_down()
        with self._changed:
            relay.broken = True
            self._changed.notify_all()


class Relay:
    """One connection through a proxy; its two sockets are closed when both ways have ended."""

    def __init__(self, proxy: Proxy, near: socket.socket, far: socket.socket) -> None:
        self.broken = False
        self._proxy = proxy
        self._sides = (near, far)
        for sock in self._sides:
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        """Pass on both ways until both have ended."""
        back = threading.Thread(target=self._pass_down, daemon=True)
        back.start()
        with contextlib.suppress(OSError):
            self._pass(UP)
        with contextlib.suppress(OSError):
            self._sides[1].shutdown(socket.SHUT_WR)
        back.join()

    def _pass_down(self) -> None:
        with contextlib.suppress(OSError):
            self._pass(DOWN)
        # The server is gone: so is the link, with what is held in it.
        self._proxy.break_off(self)

    def _pass(self, direction: int) -> None:
        """Pass on what comes from one side until there is no more; raises OSError."""
        source, target = self._sides[direction], self._sides[1 - direction]
        passed = 0
        while data := source.recv(self._proxy.room(self, direction, passed)):
            try:
                target.sendall(self._proxy.change(direction, passed, data))
            except Cut as cut:
                target.sendall(cut.last)
                self._proxy.break_off(self)
                return
            passed += len(data)
            if direction == UP:
                self._proxy.note_passed(len(data))

    def shut_down(self) -> None:
        """End both ways at once; whoever waits in them is woken."""
        for sock in self._sides:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
