"""`octavo.evaluate`: from models and a text to an EvalResult. Opens engines as any user would; the arithmetic is in evaluate.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .windows import Window, check_windows, windows_of

if TYPE_CHECKING:
    from octavo import Engine

    from .evaluate import Scores

DEFAULT_SEQLEN = 1024
AddBos = Literal["auto", "yes", "no"]
_ADD_BOS = ("auto", "yes", "no")
# The reference is the model as it is: it shares where to run and how to read the text, and not what is being measured.
_SHARED_OPTIONS = (
    "device",
    "num_threads",
    "tokenizer_path",
    "chunked_prefill_size",
    "context_length",
    "max_total_tokens",
    "allow_reference",
    "skip_kernel_check",
)
_POOL_BEYOND_A_WINDOW = 256  # tokens


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that was evaluated. `weight_bytes` are those of its linear layers and embedding as they lie in memory."""

    path: str
    dtype: str
    vocab_size: int
    weight_bytes: int
    kernels: Mapping[str, int]  # how many linear layers run on which kernel
    kv_cache_dtype: str


@dataclass(frozen=True, kw_only=True)
class EvalSetup:
    """What figures must share to be compared."""

    text: str | None  # name of the file; None where a text or tokens were given
    tokens_sha256: str  # of the token ids as little-endian int64: equal digests were evaluated on the same tokens
    num_windows: int
    seqlen: int
    stride: int
    add_bos: AddBos | None  # None: tokens were given
    bos_token_id: int | None  # the token before the text; None: none


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What was measured, and on what. KL is KL(reference || model), nats a token over the full vocabulary; None without a reference."""

    model: ModelInfo
    reference: ModelInfo | None
    setup: EvalSetup
    num_tokens: int  # scored
    perplexity: float
    reference_perplexity: float | None
    perplexity_ratio: float | None  # model / reference
    kl_mean: float | None
    kl_p99: float | None
    kl_max: float | None
    top1_agreement_percent: float | None
    seconds: float  # without loading and tokenizing; of both models together
    tokens_per_s: float

    def to_json(self) -> str:
        """All of it as a JSON object, format 1. A perplexity or KL without bound is written `Infinity`, as Python's json reads it."""
        return json.dumps({"format": 1, **asdict(self)}, indent=2)


def evaluate(
    model_path: str | None = None,
    *,
    reference: str | None = None,
    text: str | Path | None = None,
    token_ids: Sequence[int] | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    stride: int | None = None,
    max_tokens: int | None = None,
    max_windows: int | None = None,
    add_bos: AddBos = "auto",
    reference_dtype: str = "auto",
    engine_options: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> EvalResult:
    """Perplexity of a model over a text and, with `reference`, how far its distributions are from that model's.

    `text` is the text itself, or the Path of a UTF-8 file; it is tokenized once, without chat template, and cut into windows of `seqlen`
    tokens that begin every `stride` (None: seqlen, so that they do not overlap). `max_tokens` takes only the first tokens of the text,
    `max_windows` only the first windows. A BOS token stands at most once, before the text: "auto" as the tokenizer itself does it.
    `engine_options` are Engine's for the model; the reference shares those on device, threads, tokenizer, context and memory, and is
    computed in `reference_dtype` ("auto": its checkpoint's own). Raises ValueError (and its kin) with the remedy, OSError for the file;
    before a model is loaded where arguments and the models' configs tell it.
    """
    stride = seqlen if stride is None else stride
    _check(text, token_ids, max_tokens, max_windows, add_bos)
    check_windows(seqlen=seqlen, stride=stride)
    content = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    options = {"max_total_tokens": seqlen + _POOL_BEYOND_A_WINDOW, "max_running_requests": 1, **(engine_options or {})}
    shared = {name: options[name] for name in _SHARED_OPTIONS if name in options}
    of_reference = {**shared, "max_running_requests": 1, "dtype": reference_dtype}
    _check_models(seqlen, (model_path, options), *([] if reference is None else [(reference, of_reference)]))
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_engine(model_path, options, show_progress))
        bos = None
        if content is None:
            tokens = [int(token) for token in token_ids or ()]
        else:
            tokens, bos = _tokenize(ours, content, add_bos, _name(model_path))
        tokens = tokens[:max_tokens]
        windows = _windows(tokens, seqlen, stride, max_windows, where=text)
        theirs = None
        if reference is not None:
            theirs = stack.enter_context(_engine(reference, of_reference, show_progress))
            _check_read_alike(ours, _name(model_path), theirs, reference, content)
        scores, seconds = _score(ours, theirs, tokens, windows, show_progress=show_progress)
        setup = EvalSetup(
            text=text.name if isinstance(text, Path) else None,
            tokens_sha256=_digest(tokens[: windows[-1].end]),
            num_windows=len(windows),
            seqlen=seqlen,
            stride=stride,
            add_bos=add_bos if content is not None else None,
            bos_token_id=bos,
        )
        about = _info(ours, _name(model_path)), _info(theirs, reference) if theirs is not None and reference is not None else None
        return _result(scores, seconds, setup, *about)


# -- what was asked for -----------------------------------------------------------------------------------------------


def _check(text: str | Path | None, token_ids: Sequence[int] | None, max_tokens: int | None, max_windows: int | None, add_bos: str) -> None:
    if (text is None) == (token_ids is None):
        raise ValueError("give either a text or token_ids")
    if max_tokens is not None and max_windows is not None:
        raise ValueError(f"max_tokens {max_tokens} and max_windows {max_windows} both say how much to evaluate: leave one out")
    for name, value, least in (("max_tokens", max_tokens, 2), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} {value} is not valid: give at least {least}")
    if add_bos not in _ADD_BOS:
        raise ValueError(f"add_bos {add_bos!r} is not valid: give auto, yes or no")
    if isinstance(text, str) and len(text) < 1024 and "\n" not in text and Path(text).is_file():
        raise ValueError(f"text={text!r} is the name of a file: give pathlib.Path({text!r}) to evaluate what is in it")


def _tokenize(engine: Engine, text: str, add_bos: AddBos, model: str) -> tuple[list[int], int | None]:
    """Tokens of a text, and the BOS token among them."""
    tokenizer = engine.tokenizer
    if add_bos == "auto":
        tokens, added = tokenizer.encode(text), tokenizer.encode("")
        return tokens, added[0] if added and tokens[:1] == added[:1] else None
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if add_bos == "no":
        return tokens, None
    if tokenizer.bos_token_id is None:
        raise ValueError(f"add_bos yes: the tokenizer of {model} names no BOS token: give auto or no")
    return [tokenizer.bos_token_id, *tokens], tokenizer.bos_token_id


def _windows(tokens: Sequence[int], seqlen: int, stride: int, max_windows: int | None, *, where: str | Path | None) -> list[Window]:
    try:
        return windows_of(len(tokens), seqlen=seqlen, stride=stride)[:max_windows]
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if isinstance(where, Path) and len(tokens) < 2 else str(error)) from None


# -- models -----------------------------------------------------------------------------------------------------------


def _name(model_path: str | None) -> str:
    return "the embedded model" if model_path is None else model_path


def _engine(model_path: str | None, options: Mapping[str, Any], show_progress: bool) -> Engine:
    from octavo import Engine

    return Engine(model_path, show_progress=show_progress, **options)


def _check_models(seqlen: int, *models: tuple[str | None, Mapping[str, Any]]) -> None:
    """What paths, options and configs tell of a model and its reference: that a window fits, and that KL compares like with like."""
    from octavo import Engine

    sizes: list[int] = []
    for path, options in models:
        try:
            limits = Engine.inspect(path, **options)
        except ValueError as error:
            raise ValueError(f"the reference: {error}" if sizes else str(error)) from error
        context = limits["context_length"]
        if seqlen > context:
            raise ValueError(f"seqlen {seqlen} is beyond the context length of {_name(path)}, {context} tokens: give at most {context}")
        sizes.append(limits["vocab_size"])
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{_name(models[0][0])} has a vocabulary of {sizes[0]} tokens and {_name(models[1][0])} one of {sizes[1]}: "
            "KL needs one vocabulary, give a reference of the same family"
        )


def _check_read_alike(ours: Engine, model: str, theirs: Engine, reference: str, text: str | None) -> None:
    """KL compares the same tokens for the same text."""
    if text is None:
        return
    tokens = [engine.tokenizer.encode(text, add_special_tokens=False) for engine in (ours, theirs)]
    if tokens[0] != tokens[1]:
        at = next((i for i, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b), min(map(len, tokens)))
        raise ValueError(
            f"{model} and {reference} have vocabularies of one size that read the text differently, first at token {at}: "
            "give a reference of the same family, or one tokenizer for both (tokenizer_path)"
        )


def _info(engine: Engine, path: str) -> ModelInfo:
    model, server = engine.get_model_info(), engine.get_server_info()
    return ModelInfo(
        path=path,
        dtype=model["dtype"],
        vocab_size=model["vocab_size"],
        weight_bytes=model["weight_bytes"],
        kernels=server["kernels"],
        kv_cache_dtype=server["kv_cache_dtype"],
    )


# -- measuring --------------------------------------------------------------------------------------------------------


def _score(
    ours: Engine, theirs: Engine | None, tokens: Sequence[int], windows: Sequence[Window], *, show_progress: bool
) -> tuple[Scores, float]:
    from tqdm import tqdm

    from .evaluate import score_windows

    total = sum(window.num_scored for window in windows)
    with tqdm(total=total, desc="evaluating", unit="tok", disable=None if show_progress else True) as bar:
        started = time.perf_counter()
        reference = None if theirs is None else theirs.prompt_logits
        scores = score_windows(tokens, windows, ours.prompt_logits, reference, on_progress=bar.update)
        return scores, time.perf_counter() - started


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(b"".join(token.to_bytes(8, "little") for token in tokens)).hexdigest()


def _result(scores: Scores, seconds: float, setup: EvalSetup, model: ModelInfo, reference: ModelInfo | None) -> EvalResult:
    import numpy as np

    kl, theirs, agreement = scores.kl, scores.reference_perplexity, scores.agreement
    return EvalResult(
        model=model,
        reference=reference,
        setup=setup,
        num_tokens=scores.num_tokens,
        perplexity=scores.perplexity,
        reference_perplexity=theirs,
        perplexity_ratio=None if theirs is None else scores.perplexity / theirs,
        kl_mean=None if kl is None else float(kl.mean()),
        kl_p99=None if kl is None else float(np.quantile(kl, 0.99)),
        kl_max=None if kl is None else float(kl.max()),
        top1_agreement_percent=None if agreement is None else 100 * agreement,
        seconds=seconds,
        tokens_per_s=scores.num_tokens / seconds,
    )
