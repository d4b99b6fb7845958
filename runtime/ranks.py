"""Ranks: the other ranks of an engine, as the first one sees them: started, told each step, watched, ended. Knows no model.

They are processes of this machine. A rank that ends, falls silent or disagrees on a step ends all of them: what this one waits for together
with them then fails, with the reason at hand.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import zmq

from .. import __version__
from .collectives import ProcessGroup, open_store
from .config import EngineConfig
from .errors import EngineDead
from .forward_batch import StepArrays
from .logs import LogSettings
from .messages import encode_config, encode_logs
from .plan import Alive, Begun, FromRank, Hello, Loaded, RankFailed, Stop, from_rank_decoder, make_plan, plan_encoder
from .start import start_deaf_to_signals

logger = logging.getLogger("octavo.engine")

START_S = 120.0  # until a rank's process is there: it loads torch, perhaps from a slow disk
COLLECTIVE_S = 1800.0  # the longest wait for another rank, which may read its weights from a slow disk; one that is gone is noticed sooner
SILENT_S = 10.0  # without a sign of life, once it has loaded: what reads a file may hold up the thread that gives them
_POLL_MS = 200
_MEET_S = 0.01
_LOOK_EVERY_S = 0.2
_STOPPED_S = 2.0
_END_S = 5.0
_EXPLAIN_S = 3.0  # a rank's end shows in the sockets first
_MOST_OPEN = 4096  # steps that may not have been confirmed


class Ranks:
    """Ranks 1 to `config.tp_size` - 1, in processes of their own. Call `close` at the end, whatever happened."""

    def __init__(self, config: EngineConfig, logs: LogSettings, *, on_end: Callable[[str], None] | None = None) -> None:
        """`config` is resolved; `on_end` is told, on a thread of its own, why all ranks end."""
        self.size = config.tp_size
        self._folder = Path(tempfile.mkdtemp(prefix="octavo-ranks-"))  # only this user can enter it
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(f"ipc://{self._folder}/from_ranks")
        self._outboxes = []
        for rank in range(1, self.size):
            outbox = context.socket(zmq.PUSH)
            outbox.set_hwm(0)
            outbox.setsockopt(zmq.LINGER, 1000)
            outbox.bind(f"ipc://{self._folder}/to_rank_{rank}")
            self._outboxes.append(outbox)
        self._number = 0
        self._sent: dict[int, deque[tuple[int, int]]] = {rank: deque(maxlen=_MOST_OPEN) for rank in range(1, self.size)}
        self._seen = dict.fromkeys(self._sent, time.monotonic())
        self._loaded: dict[int, int] = {}
        self._hello: set[int] = set()
        self._cause: str | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._on_end = on_end
        self._group: ProcessGroup | None = None
        arguments = [str(os.getpid()), str(self._folder), encode_config(config), encode_logs(logs)]
        self._processes = {
            rank: start_deaf_to_signals([sys.executable, "-m", "octavo.runtime.rank_worker", str(rank), *arguments])
            for rank in range(1, self.size)
        }
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="rank-watcher")
        self._watcher.start()

    # -- start and end -----------------------------------------------------------------------------------------------

    def join(self, device: torch.device) -> ProcessGroup:
        """Wait for the others and give what all do together. Raises EngineDead where one does not come."""
        self._wait_for(self._hello, START_S, "come up")
        group: Future[ProcessGroup] = Future()

        def meet() -> None:
            try:
                group.set_result(
                    ProcessGroup(open_store(self._folder, self.size), rank=0, size=self.size, device=device, timeout_s=COLLECTIVE_S)
                )
            except Exception as error:
                group.set_exception(error)

        threading.Thread(target=meet, daemon=True, name="rank-meeting").start()  # which waits for one that ends meanwhile, too
        while not group.done():
            self.check()
            time.sleep(_MEET_S)
        self._group = group.result()
        return self._group

    def wait_loaded(self) -> dict[int, int]:
        """Bytes of weights by rank, once all have theirs."""
        self._wait_for(self._loaded, COLLECTIVE_S, "load the model")
        return dict(self._loaded)

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
        if self._cause is None and len(self._loaded) == self.size - 1:  # one that loads does not listen yet
            for outbox in self._outboxes:
                with contextlib.suppress(zmq.Again):  # it has just ended
                    outbox.send(plan_encoder.encode(Stop()), zmq.NOBLOCK)
            until = time.monotonic() + _END_S
            for process in self._processes.values():
                try:
                    process.wait(max(0.0, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    logger.debug("a rank is still there after %.0f s", _END_S)
        self._kill()
        for process in self._processes.values():
            process.wait()
        self._watcher.join(timeout=2.0)
        for outbox in self._outboxes:
            outbox.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)  # one that was stopped ends as well

    # -- steps -------------------------------------------------------------------------------------------------------

    def tell(self, arrays: StepArrays, num_awaited: int, page_size: int) -> None:
        """Have the others compute a step, as this rank does next. Raises EngineDead where one of them is gone."""
        self.check()
        plan = make_plan(self._number, arrays, num_awaited, page_size)
        self._number += 1
        packed = plan_encoder.encode(plan)
        for rank, outbox in enumerate(self._outboxes, 1):
            self._sent[rank].append((plan.number, plan.digest))
            try:
                outbox.send(packed, zmq.NOBLOCK)
            except zmq.Again:
                raise self.explained(EngineDead(f"rank {rank} of {self.size} takes no steps any more")) from None

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
        """A thread: read what ranks say, notice what they do not."""
        try:
            self._read()
        except Exception as error:  # without this thread no rank's end is noticed: better none than unwatched
            logger.exception("the ranks cannot be watched any more")
            self._end(f"the ranks cannot be watched: {error}")
        self._inbox.close(linger=0)

    def _read(self) -> None:
        looked = time.monotonic()
        while not self._closing and self._cause is None:
            if self._inbox.poll(_POLL_MS):
                while self._inbox.poll(0):
                    self._hear(from_rank_decoder.decode(self._inbox.recv()))
            if (now := time.monotonic()) - looked >= _LOOK_EVERY_S:
                if now - looked > _STOPPED_S:  # this process was stopped itself, perhaps with all others
                    self._seen = dict.fromkeys(self._seen, now)
                looked = now
                self._look()

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
                if message.trace and self._cause is None:
                    logger.error("rank %d failed:\n%s", rank, message.trace.rstrip())
                self._end(f"rank {rank} of {self.size}: {message.message}")

    def _look(self) -> None:
        for rank, process in self._processes.items():
            if (code := process.poll()) is not None:
                how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
                self._end(f"rank {rank} of {self.size} (process {process.pid}) {how}")
            elif rank in self._loaded and time.monotonic() - self._seen[rank] > SILENT_S:
                self._end(f"rank {rank} of {self.size} (process {process.pid}) has given no sign of life for {SILENT_S:.0f} s")

    def _end(self, cause: str) -> None:
        if self._closing or self._cause is not None:
            return
        logger.critical("%s: all ranks end", cause)
        with self._changed:
            self._cause = cause
            self._changed.notify_all()
        self._kill()
        if self._group is not None:
            self._group.abort()
        if self._on_end is not None:
            self._on_end(cause)
