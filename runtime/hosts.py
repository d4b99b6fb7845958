"""Hosts: the machines whose processes are an engine's ranks, and how a rank is told to come. Knows no model and no plan."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
import psutil

from .. import __version__
from .start import start_deaf_to_signals

END_S = 5.0  # that ranks have to end by themselves, when they are told that there are no more steps
_PROGRAM = "octavo.runtime.rank_worker"
_GIB = 1 << 30
_CPU = "CPU"
_ALIKE = 0.95  # drivers leave a little more or less of the same card's memory


class Device(msgspec.Struct, frozen=True):
    """A GPU, or the machine itself where ranks compute on the CPU; `total` bytes of memory."""

    name: str
    total: int


class Machine(msgspec.Struct, frozen=True):
    """A machine as it describes itself: `devices` that ranks may have, one for each of them, or the one that they share on the CPU."""

    name: str
    version: str
    devices: tuple[Device, ...]

    def describe(self) -> str:
        """For people: name, GPUs and their GiB."""
        return f"{self.name} ({len(self.devices)} x {self.devices[0].name} of {self.devices[0].total / _GIB:.0f} GiB)"


class Summons(msgspec.Struct, frozen=True):
    """What a rank needs to know to come.

    `device`: its number among those of its machine. `inbox`, `outbox`: ZeroMQ addresses. `store`: the folder of a file, or HOST:PORT.
    `address`: where other machines reach this one; None where all ranks are on one. `config` and `logs` are JSON.
    """

    rank: int
    device: int
    inbox: str
    outbox: str
    store: str
    address: str | None
    config: str
    logs: str


class Hosts(Protocol):
    """Those who start ranks. Which ranks is theirs to know: rank r is on machine r // (ranks of a machine), and rank 0 with the caller."""

    machines: Sequence[Machine]
    addresses: Sequence[str | None]  # by machine: where others reach it; None: nobody needs to

    @property
    def device(self) -> int:
        """The number of rank 0's device on its machine."""
        ...

    def start(self, summons: Sequence[Summons]) -> None:
        """Have ranks 1 and up come."""
        ...

    def ended(self) -> tuple[int, str] | None:
        """A rank that has ended, and how; asked often."""
        ...

    def describe(self, rank: int) -> str:
        """Which process a rank is, or on which machine, with a space before it."""
        ...

    def close(self, timeout_s: float) -> None:
        """End them: those that are still there after `timeout_s` firmly."""
        ...


def this_machine(device: str, name: str = "this machine") -> Machine:
    """Describes it, with its GPUs or, for "cpu", as a whole."""
    import torch

    from .memory import device_memory

    if device == "cpu":
        return Machine(name, __version__, (Device(_CPU, device_memory(torch.device("cpu")).total),))
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return Machine(name, __version__, tuple(Device(properties.name, properties.total_memory) for properties in found))


class RankProcesses:
    """Ranks as processes of this machine. They end with this one."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, summons: Sequence[Summons]) -> None:
        """Start a process for each. Raises OSError where there can be none."""
        for summon in summons:
            command = [sys.executable, "-m", _PROGRAM, str(os.getpid()), msgspec.json.encode(summon).decode()]
            self._processes[summon.rank] = start_deaf_to_signals(command)

    def ended(self) -> tuple[int, str] | None:
        """The first that has ended, and how."""
        for rank, process in self._processes.items():
            if (code := process.poll()) is not None:
                how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
                return rank, how
        return None

    @property
    def left_politely(self) -> bool:
        """Whether one has ended, and all that have did so with code 0."""
        codes = [process.poll() for process in self._processes.values()]
        return any(code is not None for code in codes) and all(code in (None, 0) for code in codes)

    def describe(self, rank: int) -> str:
        """The number of a rank's process, with a space before it; nothing for a rank that is not here."""
        return f" (process {self._processes[rank].pid})" if rank in self._processes else ""

    def close(self, timeout_s: float) -> None:
        """Wait for them to end, and then end them."""
        until = time.monotonic() + timeout_s
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()  # one that was stopped ends as well
        for process in self._processes.values():
            process.wait()


class ThisMachine(RankProcesses):
    """All ranks are processes of this machine."""

    addresses: Sequence[str | None] = (None,)

    def __init__(self, device: str) -> None:
        super().__init__()
        self.machines: Sequence[Machine] = (this_machine(device),)

    @property
    def device(self) -> int:
        return 0


def check_machines(machines: Sequence[Machine], ranks_per_node: int, device: str) -> None:
    """Raises ValueError for machines that cannot compute one model together."""
    first = machines[0]
    for machine in machines[1:]:
        if machine.version != first.version:
            raise ValueError(
                f"{machine.name} runs octavo {machine.version}, {first.name} {first.version}: install one version on all machines"
            )
    if device == "cpu":
        return
    for machine in machines:
        if (count := sum(device.name != _CPU for device in machine.devices)) < ranks_per_node:
            raise ValueError(
                f"{ranks_per_node} ranks a machine are asked for, and {machine.name} has {count} GPU{'s' * (count != 1)}: lower --tp-size "
                "or --pp-size, or give more --nnodes"
            )
    devices = [device for machine in machines for device in machine.devices]
    totals = [device.total for device in devices]
    if len({device.name for device in devices}) > 1 or min(totals) < _ALIKE * max(totals):
        told = "; ".join(machine.describe() for machine in machines)
        raise ValueError(f"the machines' GPUs differ, and the slowest and smallest would decide for all: {told}. Use machines of one kind")


def own_address(towards: str) -> str:
    """The address of this machine on the network on which it reaches `towards`. Raises OSError where it does not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        return str(probe.getsockname()[0])


def meet_on(address: str | None) -> None:
    """Have NCCL meet other ranks on the network of this machine's `address`, None: here alone. What the user has set stays."""
    interface = "lo" if address is None else interface_of(address)
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return str(name)
    return None
