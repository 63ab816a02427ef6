"""A line between two machines: what a router does that loses, delays and damages packets.

    python bad_line.py LINE CABLE MAC CABLE MAC
    python bad_line.py --no-offload CABLE

As root, in the network of the machine between, which must not forward by itself. Each packet that
comes in at one cable goes out at the other, to the machine with that address there. It works with
any kernel, which netem does not. A cable that is to end in it must have no offload: else packets
come in without their checksums, which a card would have added, and larger than any. LINE is one of
``LINES``.
"""

from __future__ import annotations

import fcntl
import heapq
import random
import selectors
import socket
import struct
import sys
import time
from array import array
from typing import NamedTuple


class Line(NamedTuple):
    """How many packets it loses, of the others damages, and for how long it keeps each."""

    lost: float
    damaged: float
    delay_s: tuple[float, float]


LINES = {"bad": Line(0.02, 0.005, (0.015, 0.025)), "long": Line(0.0, 0.0, (0.15, 0.15))}
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17
ETH_P_IP = 0x0800
PACKET_BYTES = 65536


class Cable:
    """One of the two cables, and the machine at its other end."""

    def __init__(self, name: str, mac: str) -> None:
        self.address = (name, ETH_P_IP, 0, 0, bytes.fromhex(mac.replace(":", "")))
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
        self.socket.bind((name, ETH_P_IP))

    def send(self, packet: bytes) -> None:
        """Send an IP packet to the machine."""
        self.socket.sendto(packet, self.address)


def damage(packet: bytes) -> bytes:
    """Return `packet` with one bit of what it carries turned over."""
    changed = bytearray(packet)
    changed[random.randrange(len(packet) // 2, len(packet))] ^= 1 << random.randrange(8)
    return bytes(changed)


def receive(cable: Cable, line: Line) -> bytes | None:
    """Return the next packet of another machine, perhaps damaged; None where it is lost.

    What it does is printed.
    """
    packet, (_, _, kind, *_) = cable.socket.recvfrom(PACKET_BYTES)
    if kind == socket.PACKET_OUTGOING:
        return None
    if random.random() < line.lost:
        print("lost", flush=True)
        return None
    if random.random() < line.damaged:
        print("damaged", flush=True)
        return damage(packet)
    return packet


def run(line: Line, cables: tuple[Cable, Cable]) -> None:
    """Pass on for ever."""
    under_way: list[tuple[float, int, Cable, bytes]] = []
    number = 0
    selector = selectors.DefaultSelector()
    for cable, other in (cables, cables[::-1]):
        selector.register(cable.socket, selectors.EVENT_READ, (cable, other))
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for key, _ in selector.select(wait_s):
            cable, other = key.data
            if packet := receive(cable, line):
                number += 1
                due_s = time.monotonic() + random.uniform(*line.delay_s)
                heapq.heappush(under_way, (due_s, number, other, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, cable, packet = heapq.heappop(under_way)
            cable.send(packet)


def switch_off_offload(name: str) -> None:
    """Have the system finish the packets that go out at `name` (see linux/ethtool.h)."""
    value = array("I", [ETHTOOL_STXCSUM, 0])
    request = struct.pack("16sP16x", name.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, request)


if __name__ == "__main__":
    if sys.argv[1] == "--no-offload":
        switch_off_offload(sys.argv[2])
        sys.exit()
    kind, near, near_mac, far, far_mac = sys.argv[1:]
    both = (Cable(near, near_mac), Cable(far, far_mac))
    print("connected", flush=True)
    run(LINES[kind], both)
