"""A rank that is not the first: holds its part of the model and computes the steps that it is told. Started by runtime/ranks.py."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import zmq

from .. import __version__
from .config import EngineConfig
from .logs import set_up_logging
from .messages import decode_config, decode_logs
from .start import prepare_environment

logger = logging.getLogger("octavo.engine")

_ALIVE_S = 0.5


class _Rank:
    def __init__(self, rank: int, folder: str) -> None:
        self.number, self._folder = rank, Path(folder)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.connect(f"ipc://{folder}/to_rank_{rank}")
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.setsockopt(zmq.LINGER, 1000)
        self._outbox.connect(f"ipc://{folder}/from_ranks")
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        from .plan import plan_encoder

        with self._lock:
            self._outbox.send(plan_encoder.encode(message))

    def run(self, config: EngineConfig) -> int:
        from .plan import Hello, PlanMismatch, RankFailed

        self.send(Hello(self.number, __version__))
        threading.Thread(target=self._beat, daemon=True, name="alive").start()
        try:
            self._compute(config)
        except Exception as error:
            is_told = isinstance(error, (ValueError, OSError, PlanMismatch))  # which say what to do
            first = str(error).strip().partition("\n")[0]
            told = first if is_told and first else f"{type(error).__name__}: {first}"
            self.send(RankFailed(self.number, told, "" if is_told else traceback.format_exc()))
            return 1
        return 0

    def _compute(self, config: EngineConfig) -> None:
        from ..quant.checkpoint.resolve import resolve_model
        from .collectives import ProcessGroup, open_store
        from .layers.parallel import TensorParallelGroup
        from .model_runner import ModelRunner, choose_device
        from .plan import Begun, Loaded, Stop, read_plan, to_rank_decoder
        from .ranks import COLLECTIVE_S

        device, size = choose_device(config, self.number), config.tp_size
        group = ProcessGroup(open_store(self._folder, size), rank=self.number, size=size, device=device, timeout_s=COLLECTIVE_S)
        files = resolve_model(config.model_path, revision=config.revision, needs_weights=config.needs_weights)
        runner = ModelRunner(config, files, group=TensorParallelGroup(size, self.number, group), show_progress=False)
        self.send(Loaded(self.number, runner.model.weight_bytes))
        number = 0
        while not isinstance(plan := to_rank_decoder.decode(self._inbox.recv()), Stop):
            arrays = read_plan(plan, number, config.page_size)
            self.send(Begun(self.number, number, plan.digest))
            runner.follow(arrays, plan.num_awaited)
            number += 1

    def _beat(self) -> None:
        """A thread: give signs of life."""
        from .plan import Alive

        while not self._inbox.closed:
            with contextlib.suppress(zmq.ZMQError):  # it has ended meanwhile
                self.send(Alive(self.number))
            time.sleep(_ALIVE_S)


def _end_with(first: int, folder: str) -> None:
    """A thread: end when the first rank does."""
    while os.getppid() == first:
        time.sleep(_ALIVE_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(rank: str, first: str, folder: str, config_text: str, logs_text: str) -> int:
    """Entry: the number, the first one's process id, the folder of sockets and store, EngineConfig and LogSettings as JSON."""
    threading.Thread(target=_end_with, args=(int(first), folder), daemon=True, name="first-rank").start()
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    set_up_logging(decode_logs(logs_text), rotates=False)
    if logger.getEffectiveLevel() > logging.DEBUG:
        logging.getLogger("octavo").setLevel(logging.ERROR)  # what there is to say, the first rank says
    prepare_environment()
    return _Rank(int(rank), folder).run(decode_config(config_text))


if __name__ == "__main__":
    exit_code = main(*sys.argv[1:])
    zmq.Context.instance().destroy(linger=1000)
    sys.stderr.flush()
    os._exit(exit_code)
