"""The engine process: one core behind two sockets. Started by runtime/process.py; knows no HTTP and no text."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback

import psutil
import zmq

from .errors import EngineDead, RequestRefused
from .logs import LogSettings, set_up_logging
from .messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Failed,
    FromEngine,
    Heartbeat,
    Outputs,
    Ready,
    Refused,
    Shutdown,
    ToEngine,
    decode_config,
    decode_logs,
    encoder,
    to_engine_decoder,
    unpack_tokens,
)
from .outputs import FinishReason
from .start import die_with_parent, load_core, prepare_environment

logger = logging.getLogger("octavo.engine")

HEARTBEAT_S = 0.5
IDLE_POLL_MS = 250
_TELL_EVERY_S = 10.0
_WAKE_S = 10.0
_SENT_S = 0.5


class _Worker:
    """Takes commands, steps, sends what was made, until told to stop."""

    def __init__(self, folder: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.connect(f"ipc://{folder}/to_engine")
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.setsockopt(zmq.LINGER, 2000)
        self._outbox.connect(f"ipc://{folder}/from_engine")
        self._send_lock = threading.Lock()
        self._last_turn = time.monotonic()
        self._stopping = False
        self._told_retractions, self._told_s = 0, -_TELL_EVERY_S
        self._stopped = threading.Event()

    def send(self, message: FromEngine) -> None:
        with self._send_lock:
            self._outbox.send(encoder.encode(message))

    def run(self, config_text: str, logs: LogSettings | None = None) -> int:
        from ..quant.self_check import KernelFault  # loads torch: the environment is prepared by now

        imported_s = time.time() - psutil.Process().create_time()
        try:
            core = load_core(decode_config(config_text), logs=logs, on_rank_end=self._end_soon)
        except (ValueError, OSError, MemoryError, KernelFault, EngineDead) as error:
            logger.debug("start failed", exc_info=True)
            self.send(Failed(str(error) or type(error).__name__, not isinstance(error, (KernelFault, EngineDead))))
            return 1
        info = {
            "device": str(core.runner.device),
            "dtype": str(core.runner.dtype).removeprefix("torch."),
            "kv_cache_dtype": core.runner.budget.kv_dtype,
            "startup_seconds": {"import": imported_s, **core.runner.phases.seconds},
            "quantization": {"requested": core.config.quantization, **core.runner.linear_report.to_dict()},
            "kernels": core.runner.kernels_in_use(),
            "memory_usage": {
                "weight": core.runner.budget.weights,
                "kv": core.runner.pool.nbytes,
                "workspace": core.runner.budget.workspace,
                "token_capacity": core.runner.pool.num_tokens,
            },
            "config": {name: value for name, value in vars(core.config).items() if name != "chat_template"},
        }
        self.send(Ready(core.limits.context_length, core.limits.max_total_tokens, core.limits.vocab_size, info))
        heart = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        heart.start()
        try:
            self._serve(core)
        except EngineDead as error:  # with another rank, which has been told
            self.send(Outputs(core.abort_all(FinishReason("abort", message=str(error), status_code=500))))
            self.send(Failed(str(error), False))
            return 1
        except Exception:
            logger.exception("the engine failed; requests in flight end with an error")
            last = traceback.format_exc().strip().splitlines()[-1]
            self.send(Outputs(core.abort_all(FinishReason("abort", message=f"the engine failed: {last}", status_code=500))))
            self.send(Failed(f"the engine failed: {last}", False))
            return 1
        finally:
            self._stopped.set()
            heart.join()
            core.close()
        return 0

    def _end_soon(self, cause: str) -> None:
        """What a rank's end comes to where this one cannot wake from waiting for it."""
        if not self._stopped.wait(_WAKE_S):
            self.send(Failed(cause, False))
            time.sleep(_SENT_S)
            os._exit(1)

    def _serve(self, core) -> None:  # type: ignore[no-untyped-def]
        while not self._stopping:
            self._last_turn = time.monotonic()
            self._take_commands(core, wait=not core.has_work)
            core.check()
            if core.has_work:
                outputs = core.step()
                self._tell_retractions(core)
                if outputs:
                    self.send(Outputs(outputs))
        self.send(Outputs(core.abort_all(FinishReason("abort", message="the server is shutting down", status_code=503))))
        core.finish_steps()

    def _tell_retractions(self, core) -> None:  # type: ignore[no-untyped-def]
        """A pool that is too small is told, at most every ten seconds."""
        count, now = core.scheduler.counters.retractions, time.monotonic()
        if count > self._told_retractions and now - self._told_s >= _TELL_EVERY_S:
            logger.warning(
                "the KV cache is full: %d running requests gave their pages back and are computed again later (%d since the start); "
                "lower --max-running-requests, or raise --mem-fraction-static or --max-total-tokens",
                count - self._told_retractions,
                count,
            )
            self._told_retractions, self._told_s = count, now

    def _take_commands(self, core, *, wait: bool) -> None:  # type: ignore[no-untyped-def]
        if wait and not self._inbox.poll(IDLE_POLL_MS):
            return
        while not self._stopping:
            try:
                packed = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._obey(core, to_engine_decoder.decode(packed))

    def _obey(self, core, message: ToEngine) -> None:  # type: ignore[no-untyped-def]
        match message:
            case Add():
                try:
                    core.add(
                        message.request_id,
                        unpack_tokens(message.prompt),
                        message.params,
                        stop_token_ids=frozenset(message.stop_token_ids),
                        namespace=message.namespace,
                        priority=message.priority,
                    )
                except RequestRefused as error:
                    self.send(Refused(message.request_id, str(error), error.status_code, error.code, error.param))
            case Abort():
                finish = FinishReason("abort", message=message.message, status_code=message.status_code)
                output = core.abort(message.request_id, finish if message.status_code else FinishReason("stop"))
                if output is not None:
                    self.send(Outputs([output]))
            case Ask(number=number, question="flush_cache"):
                self.send(Answer(number, core.flush_cache()))
            case Ask(number=number):
                self.send(Answer(number, core.info()))
            case Shutdown():
                self._stopping = True

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            self.send(Heartbeat(time.monotonic() - self._last_turn))


def main(folder: str, config_text: str, logs_text: str) -> int:
    """Entry of the engine process: the sockets' folder, the EngineConfig and the LogSettings as JSON."""
    die_with_parent()
    if sys.platform == "linux":  # it computes without end: the server, which answers in between, is to have its share of a core at once
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)  # runtime/process.py asks so, when nothing else is answered
    logs = decode_logs(logs_text)
    set_up_logging(logs, rotates=False)
    prepare_environment()
    code = _Worker(folder).run(config_text, logs)
    zmq.Context.instance().destroy(linger=2000)
    return code


if __name__ == "__main__":
    sys.stdout.flush()
    exit_code = main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(exit_code)  # daemon threads and native libraries have nothing to say any more
