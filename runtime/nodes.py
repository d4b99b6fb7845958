"""Machines that meet without Ray: each is started by hand with its --node-rank, and they find each other at --dist-init-addr.

The first one serves, and describes to each of the others, over torch's TCPStore, the ranks that it is to start. The network between them is
trusted, as NCCL and Gloo trust it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta

import msgspec
import zmq
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .collectives import listening_store
from .config import EngineConfig
from .errors import EngineDead
from .hosts import END_S, Machine, RankProcesses, Summons, check_machines, interface_of, own_address, this_machine
from .messages import decode_config, encode_config
from .plan import RankFailed, plan_encoder
from .rank_plan import check_model

logger = logging.getLogger("octavo.engine")

MEET_S = 300.0  # within which all machines are to be there
# Options that need not be the same on all: those of one machine, and what the first alone heeds.
_MAY_DIFFER = (
    "node_rank",
    "num_threads",
    "dist_init_addr",  # by whatever name, they have met
    "max_queued_requests",
    "queue_timeout_s",
    "request_timeout_s",
    "tokenizer_path",
    "chat_template",
)
_END = "end"  # what the store has when all is over
_LOOK_S = 0.2
_TELL_S = 2.0


class _Here(msgspec.Struct, frozen=True):
    """A machine has come."""

    machine: Machine
    config: str
    nonce: str  # of the process that came: one that comes again is another


class _Answer(msgspec.Struct, frozen=True):
    """The ranks that a machine is to start, or why none."""

    summons: tuple[Summons, ...] = ()
    refused: str = ""


class FirstNode(RankProcesses):
    """The first machine, with some ranks of its own, and others that have come to it."""

    def __init__(self, config: EngineConfig) -> None:
        """Waits for all machines. Raises ValueError for one that does not fit or an address that is not this machine's, EngineDead for one
        that does not come."""
        super().__init__()
        host, port = _split(config)
        address = _resolve(host)
        if interface_of(address) is None:
            raise ValueError(f"--dist-init-addr {config.dist_init_addr}: {address} is no address of this machine, which is --node-rank 0")
        try:
            self._store = listening_store(address, port, timeout_s=MEET_S)
        except (OSError, RuntimeError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
            raise ValueError(
                f"--dist-init-addr {config.dist_init_addr}: cannot listen there ({why}). Is another --node-rank 0 running, or is this a "
                "machine of another number?"
            ) from None
        self._per_node = config.ranks_per_node
        self._nodes = range(1, config.nnodes)
        logger.info(
            "Waiting for %d more machine%s at %s:%d, up to %.0f s; each starts the same command with its own --node-rank, up to %d",
            len(self._nodes), "s" * (len(self._nodes) > 1), address, port, MEET_S, config.nnodes - 1,
        )  # fmt: skip
        came = self._wait(config)
        self.machines: Sequence[Machine] = (this_machine(config.device, address), *(here.machine for here in came))
        self.addresses: Sequence[str | None] = tuple(machine.name for machine in self.machines)
        try:
            if address.startswith("127.") and any(machine.name != address for machine in self.machines):
                raise ValueError(
                    f"--dist-init-addr {config.dist_init_addr} is {address} here, which other machines do not reach: give the address by "
                    "which they know this one"
                )
            check_machines(self.machines, self._per_node, config.device)
            for number, here in zip(self._nodes, came, strict=True):
                _check_options(config, decode_config(here.config), number)
        except ValueError as error:
            self._answer_all(str(error))
            raise

    @property
    def device(self) -> int:
        return 0

    def _wait(self, config: EngineConfig) -> list[_Here]:
        until = time.monotonic() + MEET_S
        found: dict[int, _Here] = {}
        while missing := [number for number in self._nodes if number not in found]:
            if time.monotonic() > until:
                told = f"the machine of --node-rank {missing[0]} has not come to {config.dist_init_addr} within {MEET_S:.0f} s"
                self._answer_all(told)
                raise EngineDead(told)
            for number in missing:
                if self._store.check([f"node {number}"]):
                    found[number] = here = msgspec.json.decode(self._store.get(f"node {number}"), type=_Here)
                    logger.info("Machine %d is here: %s", number, here.machine.describe())
            time.sleep(_LOOK_S)
        return [found[number] for number in self._nodes]

    def _answer_all(self, refused: str) -> None:
        for number in self._nodes:
            self._answer(number, _Answer(refused=refused))
        time.sleep(_TELL_S)  # the store ends with this process

    def _answer(self, number: int, answer: _Answer) -> None:
        self._store.set(f"answer {number}", msgspec.json.encode(answer).decode())

    def start(self, summons: Sequence[Summons]) -> None:
        super().start([summon for summon in summons if summon.rank < self._per_node])
        for number in self._nodes:
            own = tuple(summon for summon in summons if summon.rank // self._per_node == number)
            self._answer(number, _Answer(own))

    def close(self, timeout_s: float) -> None:
        """End those here, and have the other machines end theirs."""
        super().close(timeout_s)
        if not timeout_s:
            threading.Thread(target=self._end, daemon=True).start()  # which needs no network but its own

    def _end(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(_END, "")

    def describe(self, rank: int) -> str:
        return super().describe(rank) or f" on {self.machines[rank // self._per_node].name}"


def serve_node(config: EngineConfig) -> int:
    """Another machine than the first: come, start the ranks that one is told, and stay until they end. Gives an exit code.

    `config` is resolved. Raises ValueError where the first machine refuses, EngineDead where it does not come or goes.
    """
    check_model(config)  # what the first machine refuses, this one does too
    host, port = _split(config)
    address = _resolve(host)
    _await_listener(address, port)
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=MEET_S))
        here = _Here(this_machine(config.device, own_address(address)), encode_config(config), uuid.uuid4().hex)
        mine = msgspec.json.encode(here).decode()
        if store.compare_set(f"node {config.node_rank}", "", mine).decode() != mine:
            raise ValueError(
                f"--node-rank {config.node_rank} has come to {config.dist_init_addr} already: give each machine its own, and where one was "
                "started again, start the first again too"
            )
        logger.info("This is machine %d of %d, at %s:%d", config.node_rank, config.nnodes, address, port)
        until = time.monotonic() + MEET_S
        while not store.check([f"answer {config.node_rank}"]):
            if time.monotonic() > until:
                raise EngineDead(f"the first machine has not answered within {MEET_S:.0f} s")
            time.sleep(_LOOK_S)
        answer = msgspec.json.decode(store.get(f"answer {config.node_rank}"), type=_Answer)
    except RuntimeError as error:  # of the store
        if isinstance(error, EngineDead):
            raise
        raise EngineDead(f"the first machine, {config.dist_init_addr}, is gone: {_first_line(error)}") from None
    if answer.refused:
        raise ValueError(answer.refused)
    threads = config.num_threads  # which this machine's cores decide, or its flag
    own = [
        msgspec.structs.replace(summon, config=encode_config(dataclasses.replace(decode_config(summon.config), num_threads=threads)))
        for summon in answer.summons
    ]
    return _run(own, store)


def _run(summons: Sequence[Summons], store: TCPStore) -> int:
    ranks, is_over = RankProcesses(), threading.Event()
    watcher = threading.Thread(target=_await_end, args=(store, is_over), daemon=True, name="first-machine")
    rank, told = summons[0].rank, "ends, as its machine was told to stop"
    is_theirs = False  # the end: the first machine knows of it
    watcher.start()
    try:
        ranks.start(summons)
        numbers = ", ".join(str(summon.rank) for summon in summons)
        logger.info("This machine has rank%s %s, and serves no HTTP: the first one does", "s" * (len(summons) > 1), numbers)
        while (ended := ranks.ended()) is None and not is_over.is_set():
            time.sleep(_LOOK_S)
        is_theirs = is_over.is_set() or ranks.left_politely
        if is_theirs:
            ranks.close(END_S)
            is_polite = ranks.left_politely
            logger.log(logging.INFO if is_polite else logging.ERROR, "The first machine has ended%s", "" if is_polite else ", or is gone")
            return 0 if is_polite else 1
        assert ended is not None
        rank, told = ended
        logger.error("rank %d%s %s: all ranks of this machine end", rank, ranks.describe(rank), told)
        return 1
    finally:
        if not is_theirs:
            _tell(summons[0].outbox, rank, told)
        ranks.close(0.0)
        is_over.set()
        watcher.join(_TELL_S)  # an interpreter that ends while a thread is inside of the store aborts


def _await_end(store: TCPStore, is_over: threading.Event) -> None:
    """A thread: until the first machine says that all ends, or is gone. Where it is only out of reach, ranks notice by themselves."""
    with contextlib.suppress(RuntimeError):
        while not is_over.is_set() and not store.check([_END]):
            is_over.wait(_LOOK_S)
    is_over.set()


def _tell(address: str, rank: int, told: str) -> None:
    """Have rank 0 know: it does not see processes of this machine."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    outbox = context.socket(zmq.PUSH)
    outbox.setsockopt(zmq.LINGER, int(_TELL_S * 1000))
    outbox.connect(address)
    outbox.send(plan_encoder.encode(RankFailed(rank, told, "")))
    outbox.close()


def _await_listener(address: str, port: int) -> None:
    """Until the first machine is there."""
    until = time.monotonic() + MEET_S
    logger.info("Looking for the first machine at %s:%d, up to %.0f s", address, port, MEET_S)
    while True:
        try:
            socket.create_connection((address, port), timeout=1.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise EngineDead(f"nobody listens at {address}:{port} within {MEET_S:.0f} s ({error}): start --node-rank 0 there") from None
            time.sleep(_LOOK_S)


def _check_options(first: EngineConfig, other: EngineConfig, number: int) -> None:
    """Raises ValueError where a machine was started with other options, which would not be heard."""
    names = [field.name for field in dataclasses.fields(EngineConfig) if field.name not in _MAY_DIFFER]
    differing = [name for name in names if getattr(first, name) != getattr(other, name)]
    if differing:
        told = ", ".join(
            f"--{name.replace('_', '-')} is {getattr(first, name)} on the first and {getattr(other, name)} on machine {number}"
            for name in differing
        )
        raise ValueError(f"machine {number} was started with other options than the first: {told}")


def _split(config: EngineConfig) -> tuple[str, int]:
    assert config.dist_init_addr is not None
    host, _, port = config.dist_init_addr.rpartition(":")
    return host, int(port)


def _resolve(host: str) -> str:
    """The address of a host's name. Raises ValueError."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(f"--dist-init-addr: {host!r} is no host that is known here ({error})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
