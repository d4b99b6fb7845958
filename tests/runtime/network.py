"""Two network namespaces joined by a cable: machines that a link can fail between. Wants root and iproute2."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any

_CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def reason_against() -> str | None:
    """Why there can be none here."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{missing[0]} is not here: install iproute2" if missing else None


class Network:
    """Machine 0 and machine 1, at ADDRESSES. Call `close` at the end."""

    def __init__(self) -> None:
        self.names = tuple(f"octavo-{os.getpid()}-{number}" for number in range(2))
        cables = [f"oct{os.getpid() % 100000}{end}" for end in "ab"]
        self.close()
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(self.names, cables, ADDRESSES, strict=True):
            _run("ip", "link", "set", cable, "netns", name)
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", cable)
            for device in ("lo", cable):
                _run("ip", "-n", name, "link", "set", device, "up")
        self._cables = cables

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def start(self, machine: int, command: Sequence[str], **named: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.names[machine], *command], **named)

    def disturb(self, *how: str) -> None:
        """Have the link lose or delay packets, as `tc netem` is told; nothing: have it whole again."""
        for name, cable in zip(self.names, self._cables, strict=True):
            subprocess.run(["tc", "-n", name, "qdisc", "delete", "dev", cable, "root"], capture_output=True, check=False)
            if how:
                _run("tc", "-n", name, "qdisc", "add", "dev", cable, "root", "netem", *how)

    def inside(self, machine: int, call: Callable[[], Any]) -> Any:
        """What `call` gives on a machine, where its sockets are then: in a thread of its own."""
        found: list[Any] = []

        def enter() -> None:
            with open(f"/run/netns/{self.names[machine]}") as place:
                if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            try:
                found.append(call())
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
