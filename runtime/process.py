"""Launch an engine in a process of its own and talk to it: the EngineClient that the server uses. Knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from ..quant.checkpoint.hf_config import read_generation_config
from ..quant.checkpoint.resolve import ModelFiles, resolve_model
from .admission import EngineLimits, admit
from .client import EngineDead, Health, ModelInfo, RequestRefused
from .config import EngineConfig
from .detokenizer import OutputProcessor
from .logs import LogSettings
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
    encode_config,
    encode_logs,
    encoder,
    from_engine_decoder,
    pack_tokens,
)
from .outputs import TextOutput, TokenOutput
from .sampling_params import SamplingParams
from .start import start_deaf_to_signals
from .tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("octavo.engine")

DUMP_STACKS = signal.SIGUSR1  # the engine process writes what each of its threads is doing
SILENT_AFTER_S = 20.0  # without a turn of the engine's loop for so long, it counts as hung
_POLL_MS = 100
_GRACE_S = 5.0  # beyond --request-timeout, in which the engine ends a request itself
_ANSWER_TIMEOUT_S = 10.0  # a step of a large model on a slow machine takes seconds
_EMBEDDED_SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # its model card's advice, which the GGUF does not carry
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class _Arrived(NamedTuple):
    """An output, and when it came, by time.perf_counter: its reader may be slow."""

    output: TokenOutput
    at_s: float


Event = _Arrived | Exception


def launch_engine(config: EngineConfig, *, logs: LogSettings | None = None) -> EngineProcess:
    """Start an engine process and wait until its model is loaded. Raises ValueError for what the user can mend, EngineDead otherwise."""
    files = resolve_model(config.model_path, revision=config.revision, needs_weights=config.needs_weights)
    engine = EngineProcess(config, files, logs=logs)
    try:
        tokenizer = load_tokenizer(files, tokenizer_path=config.tokenizer_path, chat_template=config.chat_template)
        engine.wait_ready(tokenizer)
    except BaseException:
        engine.close()
        raise
    return engine


def default_sampling(files: ModelFiles) -> dict[str, float | int]:
    """What generation_config.json recommends, of what sampling knows."""
    config = read_generation_config(files)
    if config.get("do_sample") is False:
        return {}
    return {name: config[name] for name in _SAMPLING_DEFAULTS if isinstance(config.get(name), (int, float))}


class EngineProcess:
    """An EngineClient over a child process. Requests belong to one event loop; a thread of its own reads what the engine sends."""

    def __init__(self, config: EngineConfig, files: ModelFiles, *, logs: LogSettings | None = None) -> None:
        self._files = files
        self._is_embedded = config.model_path is None
        self._max_queued_requests = config.max_queued_requests
        self._max_running_requests = config.max_running_requests
        self._request_timeout_s = config.request_timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="octavo-"))  # only this user can enter it
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.setsockopt(zmq.LINGER, 0)
        self._outbox.bind(f"ipc://{self._folder}/to_engine")
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(f"ipc://{self._folder}/from_engine")
        command = [
            sys.executable,
            "-m",
            "octavo.runtime.worker",
            str(self._folder),
            encode_config(config),
            encode_logs(logs or LogSettings()),
        ]
        self._process = start_deaf_to_signals(command)
        self._ready: Future[Ready] = Future()
        self._dead = threading.Event()
        self._cause = ""
        self._closing = False
        self._is_silent = False
        self._last_turn = time.monotonic()
        self._requests: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Event]]] = {}  # by the id that the engine knows
        self._wire_ids: dict[str, str] = {}  # that id, by the caller's
        self._answers: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._tokenizer: Tokenizer | None = None
        self._info: ModelInfo | None = None
        self._reader = threading.Thread(target=self._read, daemon=True, name="engine-reader")
        self._reader.start()

    # -- start and end -----------------------------------------------------------------------------------------------

    def wait_ready(self, tokenizer: Tokenizer) -> None:
        """Block until the engine is ready. Raises ValueError with its text when the start failed, EngineDead when it just ended."""
        ready = self._ready.result()
        self._tokenizer = tokenizer
        self._limits = EngineLimits(ready.context_length, ready.max_total_tokens, ready.vocab_size)
        self._fixed_info = ready.info
        name = self._files.name or "octavo"
        self._info = ModelInfo(
            model_path=name,
            served_name=Path(name).name,
            context_length=ready.context_length,
            max_total_tokens=ready.max_total_tokens,
            vocab_size=ready.vocab_size,
            eos_token_ids=tokenizer.eos_token_ids,
            default_sampling=_EMBEDDED_SAMPLING if self._is_embedded else default_sampling(self._files),
            max_queued_requests=self._max_queued_requests,
            max_running_requests=self._max_running_requests,
            request_timeout_s=self._request_timeout_s,
        )

    def close(self) -> None:
        """End the engine: politely, then firmly."""
        self._closing = True
        if self._process.poll() is None:
            if self._ready.done() and not self._dead.is_set():
                self._send_if_there(Shutdown())
                self._wait_process(5.0)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        self._reader.join(timeout=2.0)
        self._outbox.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_process(self, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.debug("the engine process is still there after %.0f s", timeout_s)

    async def wait_dead(self) -> str:
        """Returns when the engine has ended by itself, with what is known of its end."""
        while not self._dead.is_set() or self._closing:
            await asyncio.sleep(0.1)
        return self._cause

    @property
    def pid(self) -> int:
        return self._process.pid

    # -- the client's door -------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "wait_ready first"
        return self._tokenizer

    @property
    def model_info(self) -> ModelInfo:
        assert self._info is not None, "wait_ready first"
        return self._info

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, request_id: str, cache_namespace: str = "", priority: int = 0
    ) -> AsyncIterator[TextOutput]:
        """See EngineClient.generate."""
        health = self.health()
        if not health.ok:  # one that is silent may never answer: what it is sent would pile up
            raise EngineDead(health.reason)
        admit(prompt, params, self._limits)
        if request_id in self._wire_ids:
            raise RequestRefused(f"request id {request_id!r} is already in flight", param="rid")
        wire_id = f"{request_id}/{next(self._numbers)}"  # no two ever alike: what is left of an ended request is nobody else's
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.tokenizer.eos_token_ids))
        processor = OutputProcessor(self.tokenizer, len(prompt), params, request_id)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._requests[wire_id] = (asyncio.get_running_loop(), events)
        self._wire_ids[request_id] = wire_id
        ended = is_stopped = False
        until = None if self._request_timeout_s is None else time.monotonic() + self._request_timeout_s + _GRACE_S
        try:
            self._send(Add(wire_id, pack_tokens(prompt), params, tuple(sorted(stops)), cache_namespace, priority))
            if self._dead.is_set():  # it may have ended between the check and the entry, and then nobody would tell us
                raise EngineDead(self._cause)
            while not ended:
                try:
                    event = await asyncio.wait_for(events.get(), None if until is None else max(0.0, until - time.monotonic()))
                except TimeoutError:  # the engine, which ends requests in time, does not turn
                    told = f"the request was not done within {self._request_timeout_s:g} s (--request-timeout), and the engine is stuck"
                    raise RequestRefused(told, status_code=504, code="request_timeout") from None
                if isinstance(event, Exception):
                    ended = True
                    raise event
                ended = event.output.finish is not None
                text = replace(processor.push(event.output), arrived_s=event.at_s)
                yield text
                if text.finish is not None:
                    is_stopped = True  # by a stop string, which the engine does not know
                    return
        finally:
            del self._requests[wire_id], self._wire_ids[request_id]
            if not ended and not self._dead.is_set():
                self._send(Abort(wire_id, "", 0) if is_stopped else Abort(wire_id, "the caller left", 499))

    async def abort(self, request_id: str) -> None:
        """See EngineClient.abort."""
        wire_id = self._wire_ids.get(request_id)
        if wire_id is not None and not self._dead.is_set():
            self._send(Abort(wire_id, "aborted on request", 499))

    def health(self) -> Health:
        """See EngineClient.health."""
        age = time.monotonic() - self._last_turn
        if self._dead.is_set():
            return Health(False, self._cause, age)
        if self._info is None:
            return Health(False, "the engine is starting", age)
        if age > SILENT_AFTER_S:
            return Health(False, f"the engine has not answered for {age:.0f} s", age)
        return Health(True, "ok", age)

    async def flush_cache(self) -> bool:
        """See EngineClient.flush_cache."""
        return bool(await self._ask("flush_cache"))

    async def server_info(self) -> dict[str, Any]:
        """See EngineClient.server_info."""
        live = await self._ask("info")
        fixed = dict(self._fixed_info)
        return {**fixed.pop("config"), **fixed, "internal_states": [live]}

    # -- messages ----------------------------------------------------------------------------------------------------

    async def _ask(self, question: str) -> Any:
        health = self.health()
        if not health.ok:
            raise EngineDead(health.reason)
        number = next(self._numbers)
        answer: Future[Any] = Future()
        self._answers[number] = answer
        try:
            self._send(Ask(number, question))
            return await asyncio.wait_for(asyncio.wrap_future(answer), _ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise EngineDead(f"the engine did not answer {question!r} within {_ANSWER_TIMEOUT_S:.0f} s") from None
        finally:
            self._answers.pop(number, None)

    def _send(self, message: ToEngine) -> None:
        self._outbox.send(encoder.encode(message))

    def _send_if_there(self, message: ToEngine) -> None:
        """Without waiting for an engine that has just left."""
        with contextlib.suppress(zmq.Again):
            self._outbox.send(encoder.encode(message), zmq.NOBLOCK)

    def _read(self) -> None:
        """The reader thread: deliver what the engine sends; notice when it ends."""
        code: int | None = None
        try:
            while True:
                if self._inbox.poll(_POLL_MS):
                    self._deliver(from_engine_decoder.decode(self._inbox.recv()))
                elif (code := self._process.poll()) is not None:
                    break
                self._watch()
        except Exception as error:  # without this thread nothing is answered: better dead than silent
            logger.exception("the engine's messages cannot be read any more")
            self._cause = self._cause or f"the engine's messages cannot be read: {error}"
        if not self._cause and code is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
            self._cause = f"the engine process {how}"
        self._dead.set()
        if not self._ready.done():
            self._ready.set_exception(EngineDead(self._cause))
        for answer in list(self._answers.values()):
            with contextlib.suppress(InvalidStateError):
                answer.set_exception(EngineDead(self._cause))
        for loop, events in list(self._requests.values()):
            self._post(loop, events, EngineDead(self._cause))
        self._inbox.close()

    def _watch(self) -> None:
        """Tell, once for each time, that a running engine has fallen silent, and have it write its stacks to stderr."""
        age = time.monotonic() - self._last_turn
        if not self._ready.done() or self._closing or age <= SILENT_AFTER_S:
            if self._is_silent and age <= SILENT_AFTER_S:
                self._is_silent = False
                logger.warning("the engine answers again")
        elif not self._is_silent:
            self._is_silent = True
            logger.critical("the engine has not answered for %.0f s: health is red, the stacks of its threads follow on stderr", age)
            self._process.send_signal(DUMP_STACKS)

    def _deliver(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                self._last_turn = time.monotonic()
                now_s = time.perf_counter()
                by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Event], Event]]] = {}
                for output in message.outputs:
                    if (entry := self._requests.get(output.request_id)) is not None:
                        by_loop.setdefault(entry[0], []).append((entry[1], _Arrived(output, now_s)))
                for loop, batch in by_loop.items():
                    self._post_all(loop, batch)
            case Heartbeat():
                self._last_turn = time.monotonic() - message.idle_s
            case Refused():
                if (entry := self._requests.get(message.request_id)) is not None:
                    refusal = RequestRefused(message.message, status_code=message.status_code, code=message.code, param=message.param)
                    self._post(*entry, refusal)
            case Answer():
                answer = self._answers.get(message.number)
                if answer is not None:
                    with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
                        answer.set_result(message.value)
            case Ready():
                self._last_turn = time.monotonic()
                self._ready.set_result(message)
            case Failed():
                self._cause = message.message
                if not self._ready.done():
                    self._ready.set_exception(ValueError(message.message) if message.is_user_error else EngineDead(message.message))

    def _post(self, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
        self._post_all(loop, [(events, event)])

    @staticmethod
    def _post_all(loop: asyncio.AbstractEventLoop, batch: list[tuple[asyncio.Queue[Event], Event]]) -> None:
        def put() -> None:
            for events, event in batch:
                events.put_nowait(event)

        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:
            logger.debug("an event loop ended before its requests did")
