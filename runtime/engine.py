"""Engine: the Python door. One engine in this process, its steps on a thread of its own; the same core that the server runs."""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from .config import EngineConfig
from .detokenizer import OutputProcessor
from .errors import EngineDead, RequestRefused
from .generation import Generation, SamplingDict, parse_sampling
from .outputs import FinishReason, TextOutput, TokenOutput
from .sampling_params import SamplingParams
from .start import load_core, prepare_environment
from .tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

    from .core import LogitsSink

Sampling = SamplingParams | SamplingDict | None
Result = dict[str, Any]
Event = TokenOutput | Exception
_Sink = Callable[[Event], None]


class Engine:
    """Loads a model and generates, without a server.

        with octavo.Engine(model_path="meta-llama/Llama-3.2-1B-Instruct") as engine:
            print(engine.generate("The capital of France is", {"max_new_tokens": 8, "temperature": 0})["text"])

    Options are those of EngineConfig (`max_total_tokens`, `mem_fraction_static`, ...). Prompts are texts or, as `input_ids`, token ids;
    a list of prompts gives a list of results. A result is SGLang's: `{"text", "output_ids", "meta_info"}`. Methods may be called from
    several threads. Raises ValueError for options that cannot work, RequestRefused (a ValueError) for requests that cannot be served,
    EngineDead when the engine has ended.
    """

    def __init__(self, model_path: str | None = None, *, show_progress: bool = True, **options: Any) -> None:
        prepare_environment()
        from ..quant.checkpoint.resolve import resolve_model

        config = _config_of(model_path, options)
        files = resolve_model(config.model_path, revision=config.revision, needs_weights=config.needs_weights)
        self.tokenizer: Tokenizer = load_tokenizer(files, tokenizer_path=config.tokenizer_path, chat_template=config.chat_template)
        self._core = load_core(config, show_progress=show_progress)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sinks: dict[str, _Sink] = {}
        self._cause: str | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="octavo-engine")
        self._thread.start()

    @staticmethod
    def options() -> dict[str, Any]:
        """Every option and its default."""
        return {field.name: field.default for field in fields(EngineConfig)}

    @staticmethod
    def inspect(model_path: str | None = None, **options: Any) -> dict[str, Any]:
        """`context_length` and `vocab_size` of the engine that these arguments would make, from the model's config: nothing is loaded.

        Raises what making it would, as far as options and config tell.
        """
        prepare_environment()
        from ..quant.checkpoint.hf_config import read_config
        from ..quant.checkpoint.resolve import resolve_model
        from .models.config import ModelConfig

        config = _config_of(model_path, options)
        model = ModelConfig.from_hf(
            read_config(resolve_model(config.model_path, revision=config.revision, needs_weights=config.needs_weights))
        )
        limits = {"context_length": model.context_length(config.context_length), "vocab_size": model.vocab_size}
        if config.linear_backend is not None:
            from .linear_report import check_backend_name

            check_backend_name(config.linear_backend)
        return limits

    # -- generation ------------------------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling] = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool = False,
        top_logprobs_num: int = 0,
        logprob_start_len: int = -1,
        stream: Literal[False] = False,
    ) -> Any: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling] = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool = False,
        top_logprobs_num: int = 0,
        logprob_start_len: int = -1,
        stream: Literal[True],
    ) -> Iterator[Result]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling] = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool = False,
        top_logprobs_num: int = 0,
        logprob_start_len: int = -1,
        stream: bool = False,
    ) -> Any:
        """Complete one prompt or several. One result for one prompt, a list for a list or for `n` > 1; with `stream`, an iterator.

        A stream yields results whose `text` and `output_ids` are all so far; of several sequences, each result carries its `index`.
        `return_logprob` adds log-probabilities of the answer, and of the prompt from position `logprob_start_len` on (-1: none of it).
        """
        jobs, many = self._jobs(prompt, sampling_params, input_ids, return_logprob, top_logprobs_num, logprob_start_len)
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._submit_all(jobs, lambda index: lambda event: events.put((index, event)))
        if stream:
            return self._stream(jobs, events)
        remaining = len(jobs)
        try:
            while remaining:
                index, event = events.get()
                remaining -= jobs[index].take(event)
        finally:
            self._abandon(jobs)
        results = [job.result() for job in jobs]
        return results if many else results[0]

    def _stream(self, jobs: list[Generation], events: queue.SimpleQueue[tuple[int, Event]]) -> Iterator[Result]:
        remaining = len(jobs)
        try:
            while remaining:
                index, event = events.get()
                remaining -= jobs[index].take(event)
                yield {**jobs[index].result(), "index": index} if len(jobs) > 1 else jobs[index].result()
        finally:
            self._abandon(jobs)

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling] = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool = False,
        top_logprobs_num: int = 0,
        logprob_start_len: int = -1,
        stream: bool = False,
    ) -> Any:
        """`generate` for coroutines: awaits the result or the list of results; with `stream`, gives an async iterator."""
        jobs, many = self._jobs(prompt, sampling_params, input_ids, return_logprob, top_logprobs_num, logprob_start_len)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._submit_all(jobs, lambda index: lambda event: _post(loop, events, (index, event)))
        if stream:
            return self._async_stream(jobs, events)
        remaining = len(jobs)
        try:
            while remaining:
                index, event = await events.get()
                remaining -= jobs[index].take(event)
        finally:
            self._abandon(jobs)
        results = [job.result() for job in jobs]
        return results if many else results[0]

    async def _async_stream(self, jobs: list[Generation], events: asyncio.Queue[tuple[int, Event]]) -> AsyncIterator[Result]:
        remaining = len(jobs)
        try:
            while remaining:
                index, event = await events.get()
                remaining -= jobs[index].take(event)
                yield {**jobs[index].result(), "index": index} if len(jobs) > 1 else jobs[index].result()
        finally:
            self._abandon(jobs)

    def score(self, prompt: str | Sequence[int], continuations: Sequence[str] | Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (natural log) of every token of each continuation after `prompt`. The prompt is computed once and shared.

        Texts are tokenized apart, prompt and continuation each. Raises RequestRefused for an empty prompt or continuation.
        """
        context = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        jobs = []
        for continuation in continuations:
            tail = self.tokenizer.encode(continuation, add_special_tokens=False) if isinstance(continuation, str) else list(continuation)
            if not tail or not context:
                raise RequestRefused("score needs a prompt and continuations of at least one token each", param="continuations")
            params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=len(context))
            jobs.append(self._job(context + tail, params))
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._submit_all(jobs, lambda index: lambda event: events.put((index, event)))
        remaining = len(jobs)
        try:
            while remaining:
                index, event = events.get()
                remaining -= jobs[index].take(event)
        finally:
            self._abandon(jobs)
        return [[entry.logprob for entry in job.prompt_logprobs if entry.logprob is not None] for job in jobs]

    def prompt_logits(self, token_ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits of every position of a prompt, piece by piece: its first position and float32 [n, vocab_size], on the engine's device.

        A piece is computed when it is asked for, as a chunk of prefill of at most `chunked_prefill_size` rows, so that no more than it is
        held; other requests go on meanwhile. No prefix that was cached before is used. Between pieces the prompt's pages wait in the prefix
        cache: with `disable_radix_cache` each piece computes the pages before it again. Raises RequestRefused at once for a prompt that
        cannot be served, EngineDead from the iterator. In this process alone: logits do not travel to clients of an engine process.
        """
        from .admission import admit

        tokens = list(token_ids)
        admit(tokens, SamplingParams(max_tokens=0), self._core.limits)
        return self._logits_pieces(tokens)

    def _logits_pieces(self, tokens: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        config, namespace = self._core.config, f"prompt-logits-{uuid.uuid4().hex}"  # a name that no page stands under yet
        assert config.chunked_prefill_size is not None
        size = max(config.page_size, config.chunked_prefill_size // config.page_size * config.page_size)
        for start in range(0, len(tokens), size):
            yield start, self._logits_from(start, tokens[: start + size], namespace)

    def _logits_from(self, start: int, tokens: list[int], namespace: str) -> torch.Tensor:
        import torch

        core = self._core
        logits = torch.empty(len(tokens) - start, core.limits.vocab_size, device=core.runner.device)

        def take(position: int, rows: torch.Tensor) -> None:
            logits[position - start : position - start + rows.shape[0]] = rows

        job = self._job(tokens, SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_start=start + 1))
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._submit_all([job], lambda _: events.put, namespace=namespace, on_logits=take)
        try:
            while not job.take(events.get()):
                pass
        finally:
            self._abandon([job])
        return logits

    # -- the rest of the door -----------------------------------------------------------------------------------------

    def flush_cache(self) -> bool:
        """Drop every cached prefix. False, and nothing dropped, while requests are in flight."""
        return bool(self._ask(self._core.flush_cache))

    def get_server_info(self) -> dict[str, Any]:
        """Resolved options and live figures, JSON-able."""
        core = self._core
        kv = core.runner.budget.kv_dtype
        return {
            **vars(core.config),
            "kv_cache_dtype": kv,
            "quantization": {"requested": core.config.quantization, **core.runner.linear_report.to_dict()},
            "kernels": core.runner.kernels_in_use(),
            "internal_states": [self._ask(core.info)],
        }

    def get_model_info(self) -> dict[str, Any]:
        """What model is loaded."""
        limits = self._core.limits
        return {
            "model_path": self._core.config.model_path,
            "context_length": limits.context_length,
            "max_total_num_tokens": limits.max_total_tokens,
            "vocab_size": limits.vocab_size,
            "dtype": str(self._core.runner.dtype).removeprefix("torch."),
            "weight_bytes": self._core.runner.model.weight_bytes,
        }

    def shutdown(self) -> None:
        """End the engine; requests in flight fail with EngineDead. Calling it again does nothing."""
        if self._thread.is_alive():
            self._inbox.put(self._stop)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.shutdown()

    # -- requests -----------------------------------------------------------------------------------------------------

    def _jobs(
        self,
        prompt: str | Sequence[str] | None,
        sampling: Sampling | Sequence[Sampling],
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
        return_logprob: bool,
        top_logprobs_num: int,
        logprob_start_len: int,
    ) -> tuple[list[Generation], bool]:
        """The sequences that a call asks for, and whether its answer is a list."""
        prompts, many = self._prompts(prompt, input_ids)
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise RequestRefused(
                f"{len(each)} sampling_params for {len(prompts)} prompts: give one, or one a prompt", param="sampling_params"
            )
        jobs: list[Generation] = []
        for ids, wish in zip(prompts, each, strict=True):
            params, n = parse_sampling(wish)
            if return_logprob:
                params = replace(params, logprobs=top_logprobs_num)
                if logprob_start_len >= 0:
                    params = replace(params, prompt_logprobs=top_logprobs_num, prompt_logprobs_start=logprob_start_len)
            many = many or n > 1
            for index in range(n):
                jobs.append(self._job(ids, params if params.seed is None else replace(params, seed=params.seed + index)))
        return jobs, many

    def _prompts(
        self, prompt: str | Sequence[str] | None, input_ids: Sequence[int] | Sequence[Sequence[int]] | None
    ) -> tuple[list[list[int]], bool]:
        if (prompt is None) == (input_ids is None):
            raise RequestRefused("give either a prompt or input_ids", param="prompt")
        if input_ids is not None:
            many = len(input_ids) > 0 and not isinstance(input_ids[0], int)
            lists: Any = input_ids if many else [input_ids]
            return [list(ids) for ids in lists], many
        many = not isinstance(prompt, str)
        texts: Any = prompt if many else [prompt]
        return [self.tokenizer.encode(text) for text in texts], many

    def _job(self, prompt: list[int], params: SamplingParams) -> Generation:
        request_id = uuid.uuid4().hex
        return Generation(request_id, prompt, params, OutputProcessor(self.tokenizer, len(prompt), params, request_id))

    def _submit_all(
        self, jobs: list[Generation], sink_of: Callable[[int], _Sink], *, namespace: str = "", on_logits: LogitsSink | None = None
    ) -> None:
        """Queue all jobs or, when the engine refuses one, none."""
        from .admission import admit

        for job in jobs:
            admit(job.prompt, job.params, self._core.limits)
        if self._cause is not None or not self._thread.is_alive():
            raise EngineDead(self._cause or "the engine was shut down")
        for index, job in enumerate(jobs):
            self._inbox.put(partial(self._add, job, sink_of(index), namespace, on_logits))

    def _add(self, job: Generation, sink: _Sink, namespace: str, on_logits: LogitsSink | None) -> None:
        params = job.params
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.tokenizer.eos_token_ids))
        try:
            self._core.add(job.request_id, job.prompt, params, stop_token_ids=frozenset(stops), namespace=namespace, on_logits=on_logits)
        except RequestRefused as error:
            sink(error)
            return
        self._sinks[job.request_id] = sink

    def _abandon(self, jobs: list[Generation]) -> None:
        """Abort those that the engine still runs: the caller left, or a stop string ended them."""
        for job in jobs:
            if not job.engine_is_done:
                self._inbox.put(partial(self._drop, job.request_id))

    def _drop(self, request_id: str) -> None:
        if self._sinks.pop(request_id, None) is not None:
            self._core.abort(request_id, FinishReason("abort", message="the caller left", status_code=499))

    def _ask(self, question: Callable[[], Any]) -> Any:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if not self._thread.is_alive():
            raise EngineDead(self._cause or "the engine was shut down")
        self._inbox.put(lambda: answers.put(question()))
        while True:
            try:
                return answers.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise EngineDead(self._cause or "the engine was shut down") from None

    # -- the engine's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._core.use_device()
            while not self._stopping:
                self._take_commands()
                if self._core.has_work and not self._stopping:
                    for output in self._core.step():
                        self._deliver(output)
            self._cause = "the engine was shut down"
            self._core.abort_all(FinishReason("abort", message=self._cause, status_code=503))
            self._core.finish_steps()
        except EngineDead as error:  # with another rank, which has been told
            self._cause = str(error)
        except Exception as error:  # whatever it is, callers must hear of it rather than wait for ever
            self._cause = f"the engine failed: {type(error).__name__}: {error}"
            raise
        finally:
            self._core.close()
            for sink in list(self._sinks.values()):
                sink(EngineDead(self._cause or "the engine ended"))
            self._sinks.clear()

    def _take_commands(self) -> None:
        if not self._core.has_work:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _deliver(self, output: TokenOutput) -> None:
        sink = self._sinks.get(output.request_id)
        if sink is None:
            return
        if output.finish is not None:
            del self._sinks[output.request_id]
        sink(output)

    def _stop(self) -> None:
        self._stopping = True


def _config_of(model_path: str | None, options: dict[str, Any]) -> EngineConfig:
    known = Engine.options()
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"Engine has no option {', '.join(unknown)}; its options are {', '.join(sorted(known))}")
    return EngineConfig(model_path=model_path, **options)


def _post(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], item: tuple[int, Event]) -> None:
    try:
        loop.call_soon_threadsafe(events.put_nowait, item)
    except RuntimeError:  # the caller's loop is gone, and with it whoever waited
        return


__all__ = ["Engine", "TextOutput"]
