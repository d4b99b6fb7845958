"""Machines of a Ray cluster as an engine's hosts: a placement group with a bundle a rank, and an actor a rank that starts its process."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
from ray._private.state import available_resources_per_node  # what vLLM places by, too: there is no public way
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from .config import EngineConfig
from .hosts import Machine, RankProcesses, Summons, check_machines, this_machine

logger = logging.getLogger("octavo.engine")

WAIT_S = 60.0  # for machines that are to join the cluster, and for what others have taken
_LOOK_S = 0.2
_ASK_S = 10.0
_AFFINITY = 0.001  # of what Ray gives each machine under its address: enough for a thousand ranks


@ray.remote(max_restarts=0, max_concurrency=2)  # type: ignore[untyped-decorator, unused-ignore]
class RankHost:
    """Holds what a rank may use, and its process."""

    def look(self, device: str, address: str) -> tuple[Machine, str]:
        """The machine as this actor sees it, and the id of the GPU that it has."""
        return this_machine(device, address), "" if device == "cpu" else _ids_of_gpus()[0]

    def run(self, summons: str) -> str:
        """Start a rank and give how it ended."""
        processes = RankProcesses()
        processes.start([msgspec.json.decode(summons, type=Summons)])
        while (ended := processes.ended()) is None:
            time.sleep(_LOOK_S)
        return ended[1]


class RayHosts:
    """Ranks on the machines of the Ray cluster that this one belongs to. This machine has the first ones."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ValueError where there is no cluster, or one that lacks what is asked for after `WAIT_S`."""
        self._is_ours = not ray.is_initialized()
        self._closing, self._is_closed = threading.Lock(), False
        if self._is_ours:
            _join()
        self._group: Any = None
        self._actors: list[Any] = []
        self._runs: dict[Any, int] = {}
        self._per_node = config.ranks_per_node
        try:
            self._place(config)
        except BaseException:
            self.close(0.0)
            raise

    def _place(self, config: EngineConfig) -> None:
        kind = "CPU" if config.device == "cpu" else "GPU"
        nodes = _choose_nodes(config, kind)
        bundles = [{kind: 1, f"node:{nodes[rank // self._per_node]}": _AFFINITY} for rank in range(config.num_ranks)]
        self._group = placement_group(bundles, strategy="PACK", name="")
        if not self._group.wait(WAIT_S):
            raise ValueError(
                f"the Ray cluster has not given {config.num_ranks} {kind}s within {WAIT_S:.0f} s: others use them. "
                f"Free are {_told(ray.available_resources(), kind)}; `ray status` shows who has the rest"
            )
        wants = {"num_cpus": 1} if kind == "CPU" else {"num_cpus": 0, "num_gpus": 1}
        for rank in range(config.num_ranks):
            where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            self._actors.append(RankHost.options(scheduling_strategy=where, **wants).remote())  # type: ignore[attr-defined, unused-ignore]
        looks = [actor.look.remote(config.device, nodes[rank // self._per_node]) for rank, actor in enumerate(self._actors)]
        try:
            found = ray.get(looks, timeout=WAIT_S)
        except (RayError, GetTimeoutError) as error:
            raise ValueError(f"a rank's Ray actor did not start; is octavo installed on all machines? {_last_line(error)}") from error
        self._device = 0 if kind == "CPU" else _number_of(found[0][1])
        self.machines: Sequence[Machine] = [self._machine(found, number) for number in range(config.nnodes)]
        self.addresses: Sequence[str | None] = nodes
        check_machines(self.machines, self._per_node, config.device)

    def _machine(self, found: Sequence[tuple[Machine, str]], number: int) -> Machine:
        """A machine's devices, each of which one actor sees."""
        seen = [machine for machine, _ in found[number * self._per_node : (number + 1) * self._per_node]]
        devices = seen[0].devices if seen[0].devices[0].name == "CPU" else tuple(machine.devices[0] for machine in seen)
        return Machine(seen[0].name, seen[0].version, devices)

    @property
    def device(self) -> int:
        return self._device

    def start(self, summons: Sequence[Summons]) -> None:
        for summon in summons:
            text = msgspec.json.encode(msgspec.structs.replace(summon, device=0)).decode()  # an actor sees its own alone
            self._runs[self._actors[summon.rank].run.remote(text)] = summon.rank

    def ended(self) -> tuple[int, str] | None:
        if not self._runs or self._is_closed:
            return None
        done, _ = ray.wait(list(self._runs), timeout=0)
        if not done:
            return None
        try:
            how = ray.get(done[0])
        except RayError as error:
            how = f"is gone with its Ray actor: {_last_line(error)}"
        return self._runs[done[0]], how

    def describe(self, rank: int) -> str:
        return f" on {self.machines[rank // self._per_node].name}"

    def close(self, timeout_s: float) -> None:
        with self._closing:  # Ray's calls start it anew where it was shut down
            if self._is_closed or not ray.is_initialized():
                return
            self._is_closed = True
            if timeout_s and self._runs:
                ray.wait(list(self._runs), num_returns=len(self._runs), timeout=timeout_s)
            ending = threading.Thread(target=self._end, daemon=True, name="ray-end")  # which may wait for machines that are gone
            ending.start()
            ending.join(timeout=max(timeout_s, 2.0))

    def _end(self) -> None:
        with contextlib.suppress(Exception):
            for actor in self._actors:
                ray.kill(actor)
            if self._group is not None:
                remove_placement_group(self._group)
        if self._is_ours:
            ray.shutdown()


def _join() -> None:
    """Raises ValueError where no cluster is running."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    check_address(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this machine" if address == "auto" else f"at {address} (RAY_ADDRESS)"
        raise ValueError(
            f"no Ray cluster is running {where} ({_last_line(error)}): `ray start --head` here and `ray start --address=...` on the "
            "others, or give --dist-init-addr and --node-rank, which need no Ray"
        ) from None


def check_address(address: str) -> None:
    """Raises ValueError where nothing listens at host:port: Ray would try for long, deaf to signals. Other forms are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ASK_S).close()
    except OSError as error:
        raise ValueError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}): start one, or unset it") from error


def _choose_nodes(config: EngineConfig, kind: str) -> list[str]:
    """Addresses of as many machines as were asked for, this one first, that have what their ranks want."""
    here, until = ray.util.get_node_ip_address(), time.monotonic() + WAIT_S
    has_told = False
    while True:
        alive = {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        fit = [address for address, has in alive.items() if has.get(kind, 0) >= config.ranks_per_node]
        if here in fit and len(fit) >= config.nnodes:
            free = _free_by_address(kind)
            others = sorted((address for address in fit if address != here), key=lambda address: (-free.get(address, 0.0), address))
            return [here, *others[: config.nnodes - 1]]
        asked = f"--nnodes {config.nnodes} wants machines of the Ray cluster, this one among them, with {config.ranks_per_node} {kind} each"
        told = "; ".join(f"{address} has {has.get(kind, 0):g} {kind}" for address, has in sorted(alive.items()))
        if time.monotonic() > until:
            raise ValueError(
                f"{asked}: {told}. Gave up after {WAIT_S:.0f} s: `ray start --address=...` on more machines, or lower --nnodes, "
                "--tp-size or --pp-size"
            )
        if not has_told:
            logger.info("%s: %s. Waiting for up to %.0f s", asked, told, WAIT_S)
            has_told = True
        time.sleep(_LOOK_S)


def _free_by_address(kind: str) -> dict[str, float]:
    """What of a resource nobody uses, by machine."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    free = available_resources_per_node()
    return {address: free.get(node, {}).get(kind, 0.0) for node, address in addresses.items()}


def _ids_of_gpus() -> list[str]:
    """Of those that this process sees, in torch's order."""
    import torch

    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def _number_of(gpu: str) -> int:
    """The number that a GPU of this machine has in this process. Raises ValueError where it is not seen."""
    seen = _ids_of_gpus()
    if gpu not in seen:
        raise ValueError(
            f"Ray gave rank 0 the GPU {gpu}, which this process does not see (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): start the server with the same CUDA_VISIBLE_DEVICES as `ray start`"
        )
    return seen.index(gpu)


def _told(resources: dict[str, float], kind: str) -> str:
    return f"{resources.get(kind, 0):g} {kind}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
