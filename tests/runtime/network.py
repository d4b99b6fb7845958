"""Two network namespaces joined by a cable: machines that a link can fail between. Wants root, iproute2 and TUN devices.

The cable is a thread of this process, which hands packets from one machine's TUN device to the other's, or loses or delays them: the
kernel's own way, netem, is not in every kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_TUN = "/dev/net/tun"
_PACKET = 1 << 16
_DEVICE = "cable"


def reason_against() -> str | None:
    """Why there can be none here."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if shutil.which("ip") is None:
        return "ip is not here: install iproute2"
    return None if os.path.exists(_TUN) else f"{_TUN} is not here"


class Network:
    """Machine 0 and machine 1, at ADDRESSES. Call `close` at the end."""

    def __init__(self) -> None:
        self.names = tuple(f"octavo-{os.getpid()}-{number}" for number in range(2))
        self.loss, self.delay_s = 0.0, 0.0
        for name in self.names:
            _run("ip", "netns", "add", name)
        self._devices = [self.inside(machine, _open_device) for machine in range(2)]
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", _DEVICE)
            for device in ("lo", _DEVICE):
                _run("ip", "-n", name, "link", "set", device, "up")
        self._closing = False
        self._cable = threading.Thread(target=self._carry, daemon=True)
        self._cable.start()

    def close(self) -> None:
        self._closing = True
        self._cable.join()
        for device in self._devices:
            os.close(device)
        for name in self.names:
            _run("ip", "netns", "delete", name)

    def start(self, machine: int, command: Sequence[str], **named: Any) -> subprocess.Popen[Any]:
        """Run a command on a machine; `named` is as for Popen."""
        return subprocess.Popen(["ip", "netns", "exec", self.names[machine], *command], **named)

    def disturb(self, *, loss: float = 0.0, delay_s: float = 0.0) -> None:
        """Have the cable lose a share of the packets, and delay the others; nothing given: have it whole again."""
        self.loss, self.delay_s = loss, delay_s

    def _carry(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []
        number = itertools.count()
        while not self._closing:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.1
            for device in select.select(self._devices, [], [], min(wait, 0.1))[0]:
                packet, to = os.read(device, _PACKET), self._devices[1 - self._devices.index(device)]
                if random.random() >= self.loss:
                    heapq.heappush(under_way, (time.monotonic() + self.delay_s, next(number), to, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                *_, to, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # a queue that is full loses packets, as queues do
                    os.write(to, packet)

    def inside(self, machine: int, call: Callable[[], Any]) -> Any:
        """What `call` gives on a machine, where its sockets are then: in a thread of its own."""
        found: list[Any] = []

        def enter() -> None:
            try:
                with open(f"/run/netns/{self.names[machine]}") as place:
                    if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                found.append(call())
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]


def _open_device() -> int:
    device = os.open(_TUN, os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
