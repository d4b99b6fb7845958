"""A rank that is not the first: holds its part of the model and computes the steps that it is told. Started by runtime/ranks.py."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import zmq

from .. import __version__
from .config import EngineConfig
from .hosts import Summons, meet_on
from .logs import set_up_logging
from .messages import decode_config, decode_logs
from .start import prepare_environment

if TYPE_CHECKING:
    from .plan import ToRank

logger = logging.getLogger("octavo.engine")

_SILENT_S, _SILENT_LOADING_S = 20.0, 120.0  # of rank 0, longer than it waits for another: it is to be the one who tells why
_LOOK_EVERY_S = 0.5
_STOPPED_S = 5.0
_SENT_S = 0.3


class _Rank:
    def __init__(self, summons: Summons) -> None:
        self.number, self._summons = summons.rank, summons
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.connect(summons.inbox)
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.setsockopt(zmq.LINGER, 1000)
        self._outbox.connect(summons.outbox)
        self._lock = threading.Lock()
        self._heard = time.monotonic()  # from the first rank
        self._has_begun = False  # to compute
        self._steps: queue.SimpleQueue[ToRank] = queue.SimpleQueue()

    def send(self, message: Any) -> None:
        from .plan import plan_encoder

        with self._lock:
            self._outbox.send(plan_encoder.encode(message))

    def run(self, config: EngineConfig) -> int:
        from .plan import Hello, PlanMismatch, RankFailed

        self.send(Hello(self.number, __version__))
        if self._summons.address is not None:
            threading.Thread(target=self._listen, daemon=True, name="listen").start()
        threading.Thread(target=self._beat, daemon=True, name="alive").start()
        try:
            self._compute(config)
        except Exception as error:
            is_told = isinstance(error, (ValueError, OSError, PlanMismatch))  # which say what to do
            first = str(error).strip().partition("\n")[0]
            told = first if is_told and first else f"{type(error).__name__}: {first}"
            self.send(RankFailed(self.number, told, "" if is_told else traceback.format_exc()))
            self._close()
            return 1
        self._close()
        return 0

    def _close(self) -> None:
        """Have what was sent arrive. The inbox is left to the thread that may be reading it."""
        with self._lock:
            self._outbox.close(linger=1000)
        time.sleep(_SENT_S)

    def _compute(self, config: EngineConfig) -> None:
        from ..quant.checkpoint.resolve import resolve_model
        from .collectives import COLLECTIVE_S, find_store, meet
        from .model_runner import ModelRunner, choose_device
        from .pipeline import Place
        from .plan import Begun, Loaded, Plan, read_plan

        device = choose_device(config, self._summons.device)
        place = Place(self.number, config.tp_size, config.num_stages)
        config = config.resolve(device="cuda" if device.type == "cuda" else "cpu")  # threads, where they are left to this machine
        store = find_store(self._summons.store, config.num_ranks)
        together = meet(store, place, device=device, timeout_s=COLLECTIVE_S, address=self._summons.address)
        files = resolve_model(config.model_path, revision=config.revision, needs_weights=config.needs_weights)
        runner = ModelRunner(config, files, group=together.group, pipeline=together.pipeline, device=device, show_progress=False)
        self.send(Loaded(self.number, runner.model.weight_bytes))
        number = 0
        while isinstance(plan := self._next(), Plan):
            arrays = read_plan(plan, number, config.page_size)
            self.send(Begun(self.number, number, plan.digest))
            runner.follow(arrays, plan.num_awaited)
            number += 1

    def _next(self) -> ToRank:
        from .plan import to_rank_decoder

        return to_rank_decoder.decode(self._inbox.recv()) if self._summons.address is None else self._steps.get()

    def _listen(self) -> None:
        """A thread: hear the first rank, on another machine, which may fall silent while this one computes."""
        from .plan import Alive, Stop, to_rank_decoder

        message: ToRank = Alive(0)
        while not isinstance(message, Stop):
            message = to_rank_decoder.decode(self._inbox.recv())
            self._heard = time.monotonic()
            if not isinstance(message, Alive):
                self._has_begun = True
                self._steps.put(message)

    def _beat(self) -> None:
        """A thread: give signs of life, and end when the first rank, on another machine, gives none."""
        from .plan import ALIVE_S, Alive

        turned = time.monotonic()
        while True:
            with contextlib.suppress(zmq.ZMQError):  # it has ended meanwhile
                self.send(Alive(self.number))
            time.sleep(ALIVE_S)
            now = time.monotonic()
            if now - turned > _STOPPED_S:  # this process was stopped itself
                self._heard = now
            turned = now
            limit = _SILENT_S if self._has_begun else _SILENT_LOADING_S
            if self._summons.address is not None and now - self._heard > limit:
                logger.error("rank 0 has given no sign of life for %.0f s: rank %d ends", limit, self.number)
                os._exit(1)


def _end_with(parent: int, store: str) -> None:
    """A thread: end when whoever started this process does."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    if store.startswith("/"):
        shutil.rmtree(Path(store).parent, ignore_errors=True)
    os._exit(1)


def main(parent: str, summons_text: str) -> int:
    """Entry: the process id of whoever starts it, and the Summons as JSON."""
    summons = msgspec.json.decode(summons_text, type=Summons)
    threading.Thread(target=_end_with, args=(int(parent), summons.store), daemon=True, name="parent").start()
    meet_on(summons.address)
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    set_up_logging(decode_logs(summons.logs), rotates=False)
    if logger.getEffectiveLevel() > logging.DEBUG:
        logging.getLogger("octavo").setLevel(logging.ERROR)  # what there is to say, the first rank says
    prepare_environment()
    return _Rank(summons).run(decode_config(summons.config))


def end_with(code: int) -> NoReturn:
    """End the process at once: other threads may be in the middle of anything."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end_with(main(*sys.argv[1:]))
