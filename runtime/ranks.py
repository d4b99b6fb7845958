"""Ranks: the other ranks of an engine, as the first one sees them: called, told each step, watched, ended. Knows no model.

A rank that ends, falls silent or disagrees on a step ends all of them: what this one waits for together with them then fails, with the
reason at hand. Where they run is the Hosts' to know.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
import zmq

from .. import __version__
from .collectives import COLLECTIVE_S, Together, meet, open_store
from .config import EngineConfig
from .errors import EngineDead
from .forward_batch import StepArrays
from .hosts import END_S, Hosts, Summons, meet_on
from .logs import LogSettings
from .messages import encode_config, encode_logs
from .pipeline import Place
from .plan import ALIVE_S, Alive, Begun, FromRank, Hello, Loaded, RankFailed, Stop, ToRank, from_rank_decoder, make_plan, plan_encoder
from .rank_plan import places

logger = logging.getLogger("octavo.engine")

START_S = 120.0  # until a rank's process is there: it loads torch, perhaps from a slow disk
SILENT_S = 10.0  # without a sign of life
SILENT_LOADING_S = 60.0  # while it loads: what reads a file may hold up the thread that gives them
_BETTER_CAUSE_S = 1.0
_POLL_MS = 200
_MEET_S = 0.01
_LOOK_EVERY_S = 0.2
_STOPPED_S = 2.0
_EXPLAIN_S = 3.0  # a rank's end shows in the sockets first
_MOST_OPEN = 4096  # steps that may not have been confirmed


class Ranks:
    """Ranks 1 to `config.num_ranks` - 1, in processes of their own. Call `close` at the end, whatever happened."""

    def __init__(
        self,
        config: EngineConfig,
        logs: LogSettings,
        hosts: Hosts,
        *,
        on_end: Callable[[str], None] | None = None,
        num_threads: int | None = None,
    ) -> None:
        """`config` is resolved; `on_end` is told, on a thread of its own, why all ranks end.

        `num_threads` of ranks on other machines; None: what their cores allow.
        """
        self.size = config.num_ranks
        self._hosts = hosts
        self._place = Place(0, config.tp_size, config.num_stages)
        self._address = hosts.addresses[0]
        self._folder = Path(tempfile.mkdtemp(prefix="octavo-ranks-"))  # only this user can enter it
        meet_on(self._address)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        outbox_of_ranks = self._bind(self._inbox, "from_ranks")
        self._outboxes: list[zmq.Socket[bytes]] = []
        inboxes = []
        for rank in range(1, self.size):
            outbox = context.socket(zmq.PUSH)
            outbox.set_hwm(0)
            outbox.setsockopt(zmq.LINGER, 1000)
            inboxes.append(self._bind(outbox, f"to_rank_{rank}"))
            self._outboxes.append(outbox)
        self._sending = threading.Lock()  # steps, and signs of life
        self._store, store = open_store(self._folder, self.size, address=self._address)
        self._number = 0
        self._sent: dict[int, deque[tuple[int, int]]] = {rank: deque(maxlen=_MOST_OPEN) for rank in range(1, self.size)}
        self._seen = dict.fromkeys(self._sent, time.monotonic())
        self._loaded: dict[int, int] = {}
        self._hello: set[int] = set()
        self._cause: str | None = None
        self._failed: tuple[float, RankFailed] | None = None  # when, and which: perhaps for another one
        self._changed = threading.Condition()
        self._closing = False
        self._on_end = on_end
        self._together: Together | None = None
        self._where = places(config, hosts.machines)
        a_node = config.ranks_per_node
        texts = (encode_config(config), encode_logs(logs)), (
            encode_config(replace(config, num_threads=num_threads)), encode_logs(replace(logs, file=None)),
        )  # fmt: skip
        hosts.start(
            [
                Summons(rank, rank % a_node, inbox, outbox_of_ranks, store, hosts.addresses[rank // a_node], *texts[rank >= a_node])
                for rank, inbox in enumerate(inboxes, 1)
            ]
        )
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="rank-watcher")
        self._watcher.start()

    def _bind(self, socket: zmq.Socket[bytes], name: str) -> str:
        """Listen, to processes of this machine or where other machines come from; gives the address."""
        if self._address is None:
            socket.bind(f"ipc://{self._folder}/{name}")
            return f"ipc://{self._folder}/{name}"
        return f"tcp://{self._address}:{socket.bind_to_random_port(f'tcp://{self._address}')}"

    # -- start and end -----------------------------------------------------------------------------------------------

    def join(self, device: torch.device) -> Together:
        """Wait for the others and give what all do together. Raises EngineDead where one does not come."""
        self._wait_for(self._hello, START_S, "come up")
        found: Future[Together] = Future()

        def find() -> None:
            try:
                found.set_result(meet(self._store, self._place, device=device, timeout_s=COLLECTIVE_S, address=self._address))
            except Exception as error:
                found.set_exception(error)

        threading.Thread(target=find, daemon=True, name="rank-meeting").start()  # which waits for one that ends meanwhile, too
        while not found.done():
            self.check()
            time.sleep(_MEET_S)
        self._together = found.result()
        return self._together

    def tell_loaded(self, weight_bytes: int) -> None:
        """Wait until all have their weights, of which rank 0 has so many bytes, and tell the operator what lies where."""
        self._wait_for(self._loaded, COLLECTIVE_S, "load the model")
        for rank, size in sorted({0: weight_bytes, **self._loaded}.items()):
            logger.info("Rank %d of %d on %s: %.2f GiB of weights", rank, self.size, self._where[rank], size / 2**30)

    @property
    def device(self) -> int:
        """The number of this rank's device on its machine."""
        return self._hosts.device

    def _wait_for(self, ranks: set[int] | dict[int, int], timeout_s: float, what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None or len(ranks) == self.size - 1, timeout_s)
            missing = [rank for rank in self._sent if rank not in ranks]
        if self._cause is not None:
            raise EngineDead(self._cause)
        if missing:
            raise EngineDead(f"rank {missing[0]} of {self.size} did not {what} within {timeout_s:.0f} s")

    def close(self) -> None:
        """End them: politely, then firmly."""
        if self._closing:
            return
        self._closing = True
        is_polite = self._cause is None and len(self._loaded) == self.size - 1  # one that loads does not listen yet
        if is_polite:
            with contextlib.suppress(zmq.Again):  # one has just ended
                self._send(Stop())
        self._hosts.close(END_S if is_polite else 0.0)
        self._watcher.join(timeout=2.0)
        for outbox in self._outboxes:
            outbox.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- steps -------------------------------------------------------------------------------------------------------

    def tell(self, arrays: StepArrays, num_awaited: int, page_size: int) -> None:
        """Have the others compute a step, as this rank does next. Raises EngineDead where one of them is gone."""
        self.check()
        plan = make_plan(self._number, arrays, num_awaited, page_size)
        self._number += 1
        for sent in self._sent.values():
            sent.append((plan.number, plan.digest))
        try:
            self._send(plan)
        except zmq.Again:
            raise self.explained(EngineDead("a rank takes no steps any more")) from None

    def _send(self, message: ToRank) -> None:
        """To all. Raises zmq.Again where one is gone."""
        packed = plan_encoder.encode(message)
        with self._sending:
            for outbox in self._outboxes:
                outbox.send(packed, zmq.NOBLOCK)

    def check(self) -> None:
        """Raises EngineDead where a rank has ended."""
        if self._cause is not None:
            raise EngineDead(self._cause)

    def explained(self, error: Exception) -> Exception:
        """Why something that all ranks do together failed: `error`, or the end of a rank that it came from."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None, _EXPLAIN_S)
        return error if self._cause is None else EngineDead(self._cause)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """A thread: read what ranks say, notice what they do not, and give signs of life to those that cannot see this process."""
        try:
            self._read()
        except Exception as error:  # without this thread no rank's end is noticed: better none than unwatched
            logger.exception("the ranks cannot be watched any more")
            self._end(f"the ranks cannot be watched: {error}")
        self._inbox.close(linger=0)

    def _read(self) -> None:
        looked = told = time.monotonic()
        while not self._closing and self._cause is None:
            if self._inbox.poll(_POLL_MS):
                while self._inbox.poll(0):
                    self._hear(from_rank_decoder.decode(self._inbox.recv()))
            if (now := time.monotonic()) - looked >= _LOOK_EVERY_S:
                if now - looked > _STOPPED_S:  # this process was stopped itself, perhaps with all others
                    self._seen = dict.fromkeys(self._seen, now)
                looked = now
                self._look()
                if self._failed is not None and now - self._failed[0] > _BETTER_CAUSE_S:
                    self._end_for(self._failed[1])
            if self._address is not None and now - told >= ALIVE_S:
                told = now
                self._give_sign()

    def _give_sign(self) -> None:
        packed = plan_encoder.encode(Alive(0))
        for outbox in self._outboxes:
            with self._sending, contextlib.suppress(zmq.ZMQError):  # a rank that is not there yet, or has ended
                outbox.send(packed, zmq.NOBLOCK)

    def _hear(self, message: FromRank) -> None:
        self._seen[message.rank] = time.monotonic()
        match message:
            case Hello(rank=rank):
                if message.version != __version__:
                    self._end(f"rank {rank} runs octavo {message.version}, rank 0 {__version__}: install one version everywhere")
                with self._changed:
                    self._hello.add(rank)
                    self._changed.notify_all()
            case Loaded(rank=rank):
                with self._changed:
                    self._loaded[rank] = message.weight_bytes
                    self._changed.notify_all()
            case Begun(rank=rank):
                expected = self._sent[rank].popleft() if self._sent[rank] else None
                if (message.number, message.digest) != expected:
                    self._end(f"rank {rank} computes step {message.number} ({message.digest:08x}), and was told {expected}")
            case Alive():
                pass
            case RankFailed(rank=rank):
                self._look()  # it may have failed for another one that is gone
                if message.trace and self._address is not None:  # or for one of another machine, which tells of it soon
                    self._failed = self._failed or (time.monotonic(), message)
                else:
                    self._end_for(message)

    def _end_for(self, failed: RankFailed) -> None:
        if failed.trace and self._cause is None:
            logger.error("rank %d failed:\n%s", failed.rank, failed.trace.rstrip())
        self._end(f"rank {failed.rank} of {self.size}{self._hosts.describe(failed.rank)}: {failed.message}")

    def _look(self) -> None:
        if (ended := self._hosts.ended()) is not None:
            rank, how = ended
            self._end(f"rank {rank} of {self.size}{self._hosts.describe(rank)} {how}")
            return
        for rank in self._hello:
            limit = SILENT_S if rank in self._loaded else SILENT_LOADING_S
            if time.monotonic() - self._seen[rank] > limit:
                told = f"has given no sign of life for {limit:.0f} s"
                self._end(f"rank {rank} of {self.size}{self._hosts.describe(rank)} {told}")

    def _end(self, cause: str) -> None:
        if self._closing or self._cause is not None:
            return
        logger.critical("%s: all ranks end", cause)
        with self._changed:
            self._cause = cause
            self._changed.notify_all()
        self._hosts.close(0.0)
        if self._together is not None:
            self._together.abort()
        if self._on_end is not None:
            self._on_end(cause)
