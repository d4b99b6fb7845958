"""The body of POST /generate (SGLang's GenerateReqInput), checked and turned into jobs. Knows no response format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from ..runtime.sampling_params import SamplingParams
from .context import ServeContext
from .errors import ApiError
from .jobs import Job, check_count, new_id
from .protocol import UNSUPPORTED
from .request_body import Body, List, as_list, check_body
from .sampling import answer_length, check_n, check_token_ids, logit_bias_by_id

T = TypeVar("T")
DEFAULT_MAX_NEW_TOKENS = 128  # SGLang's
_PER_PROMPT = "one value, or a list with one value for each prompt"


class GenerateSampling(Body):
    """`sampling_params` of /generate. Its defaults are SGLang's, not the model's."""

    unsupported: ClassVar[Mapping[str, str]] = UNSUPPORTED
    ignored: ClassVar[frozenset[str]] = frozenset({"spaces_between_special_tokens"})  # fast tokenizers have no such choice
    expected: ClassVar[Mapping[str, str]] = {
        "stop": "a string or a list of strings",
        "logit_bias": "an object from token ids (as strings) to numbers",
    }

    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS  # None: all the room that is left
    min_new_tokens: int = 0
    stop: str | List[str] | None = None
    stop_token_ids: List[int] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None


class GenerateRequest(Body):
    """POST /generate."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "input_embeds": "give text or input_ids",
        "image_data": "this model reads text only",
        "video_data": "this model reads text only",
        "audio_data": "this model reads text only",
        "token_ids_logprob": "use top_logprobs_num",
        "session_params": "prefixes are reused by themselves, no session is needed",
        "lora_path": "this server has no LoRA adapters",
        "return_hidden_states": "leave it out",
        "custom_logit_processor": "use logit_bias",
    }
    ignored: ClassVar[frozenset[str]] = frozenset({"log_metrics", "bootstrap_host", "bootstrap_port", "bootstrap_room"})
    expected: ClassVar[Mapping[str, str]] = {
        "text": "a string or a list of strings",
        "input_ids": "a list of token ids or a list of lists of token ids",
        "sampling_params": "an object, or a list with one object for each prompt",
        "return_logprob": _PER_PROMPT,
        "logprob_start_len": _PER_PROMPT,
        "top_logprobs_num": _PER_PROMPT,
        "rid": _PER_PROMPT,
    }

    text: str | List[str] | None = None
    input_ids: List[int] | List[List[int]] | None = None
    sampling_params: dict[str, Any] | List[dict[str, Any]] | None = None
    return_logprob: bool | List[bool] | None = None
    logprob_start_len: int | List[int] | None = None
    top_logprobs_num: int | List[int] | None = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    rid: str | List[str] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    extra_key: str | None = None


@dataclass(frozen=True)
class GenerateJob:
    """One prompt of a request: what to run, and what its answer shall carry."""

    job: Job
    with_logprobs: bool
    logprob_start: int  # first prompt position whose log-probability is told; len(prompt) for none
    num_top: int
    with_text: bool


async def generate_jobs(context: ServeContext, body: GenerateRequest) -> tuple[list[GenerateJob], bool]:
    """One job a prompt, and whether the request was a batch, which is answered with a list. Raises ApiError 400."""
    if (body.text is None) == (body.input_ids is None):
        raise ApiError("give one of text and input_ids, not both or neither", param="text")
    is_batch, prompts = await _prompts(context, body)
    count = len(prompts)
    samplings = _spread(body.sampling_params, count, "sampling_params", {})
    wants = _spread(body.return_logprob, count, "return_logprob", False)
    starts = _spread(body.logprob_start_len, count, "logprob_start_len", -1)
    tops = _spread(body.top_logprobs_num, count, "top_logprobs_num", 0)
    ids = _ids(body.rid, count, is_batch)
    namespace = (body.cache_salt or "") + (body.extra_key or "")
    jobs: list[GenerateJob] = []
    for i, prompt in enumerate(prompts):
        sampling = check_body(GenerateSampling, samplings[i], where="sampling_params")
        start = _start(starts[i], len(prompt)) if wants[i] else len(prompt)
        params = _params(context, sampling, len(prompt), tops[i] if wants[i] else None, with_prompt=start < len(prompt))
        job = Job(ids[i], [prompt], [params], check_n(sampling.n), namespace, body.priority or 0)
        jobs.append(GenerateJob(job, wants[i], start, tops[i], body.return_text_in_logprobs))
    check_count(sum(len(job.job) for job in jobs))
    return jobs, is_batch


async def _prompts(context: ServeContext, body: GenerateRequest) -> tuple[bool, list[list[int]]]:
    if body.text is not None:
        texts = as_list(body.text)
        is_batch, param = isinstance(body.text, list), "text"
        context.check_characters(texts, param=param)

        def encode() -> list[list[int]]:
            return [context.tokenizer.encode(text) for text in texts]

        prompts = await context.tokenize(body.num_bytes, encode)
    else:
        given, param = cast("list[Any]", body.input_ids), "input_ids"
        is_batch = bool(given) and isinstance(given[0], list)
        prompts = given if is_batch else [given]
    if not prompts:
        raise ApiError(f"{param} is empty: give at least one prompt", param=param)
    return is_batch, [check_token_ids(prompt, context.info, param=param) for prompt in prompts]


def _spread(value: T | list[T] | None, count: int, param: str, default: T) -> list[T]:
    """One value for each prompt, from one for all or a list of them. Raises ApiError 400 when the list's length is wrong."""
    if not isinstance(value, list):
        return [default if value is None else value] * count
    if len(value) != count:
        raise ApiError(f"{param} has {len(value)} entries for {count} prompts: give one for each, or a single one", param=param)
    return value


def _ids(rid: str | list[str] | None, count: int, is_batch: bool) -> list[str]:
    if rid is None:
        return [new_id("") for _ in range(count)]
    ids = [f"{rid}_{i}" for i in range(count)] if isinstance(rid, str) and is_batch else _spread(rid, count, "rid", "")
    if len(set(ids)) != count or not all(ids):
        raise ApiError("rid must be non-empty and different for each prompt", param="rid")
    return ids


def _start(start: int, prompt_tokens: int) -> int:
    if not -1 <= start <= prompt_tokens:
        message = f"logprob_start_len={start} is not valid: give -1 for none of the prompt, or 0 to {prompt_tokens}, its length"
        raise ApiError(message, param="logprob_start_len")
    return prompt_tokens if start == -1 else start


def _params(
    context: ServeContext, sampling: GenerateSampling, prompt_tokens: int, num_top: int | None, *, with_prompt: bool
) -> SamplingParams:
    params = SamplingParams(
        max_tokens=answer_length(
            context.info, prompt_tokens=prompt_tokens, asked=sampling.max_new_tokens, default=None, prompt_param="text"
        ),
        min_tokens=sampling.min_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=logit_bias_by_id(sampling.logit_bias, context.info),
        seed=sampling.sampling_seed,
        stop=tuple(as_list(sampling.stop)),
        stop_token_ids=tuple(sampling.stop_token_ids or ()),
        ignore_eos=sampling.ignore_eos,
        skip_special_tokens=sampling.skip_special_tokens,
        no_stop_trim=sampling.no_stop_trim,
        logprobs=num_top,
        prompt_logprobs=num_top if with_prompt else None,
    )
    params.check_vocabulary(context.info.vocab_size)
    return params
