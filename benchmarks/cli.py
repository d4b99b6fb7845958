"""`octavo bench`: options, prompts, runs, reports, in that order. Knows no wire format and does no arithmetic."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import re
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ..quant.checkpoint.errors import CheckpointError
from ..quant.checkpoint.resolve import ModelFiles, resolve_model, resolve_tokenizer
from ..runtime.tokenizer import load_tokenizer
from .datasets import Dataset, IdVocabulary, Prompt, Vocabulary, WordVocabulary, random_prompts, shared_prefix_prompts
from .metrics import RunResult
from .report import as_json, load_label, run_table, sweep_table, write_png
from .serving import ListedModel, Target, Unreachable, first_model, run_load, with_v1

DEFAULT_CONCURRENCY = 16
DEFAULT_NUM_PREFIXES = 4
DEFAULT_PREFIX_LEN = 1024
_WARMUP_STREAM = 2**31  # a stream of random numbers that no run uses
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
_Number = TypeVar("_Number", int, float)


class BadOptions(ValueError):
    """Options that cannot work together. The text names them and the remedy."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo bench <argv>` and return its exit code: 0, 1 when nothing could be measured, 2 for bad options."""
    args = _parser().parse_args(argv)
    try:
        return _serving(args)
    except BadOptions as error:
        print(f"octavo bench serving: {error}", file=sys.stderr)
        return 2
    except Unreachable as error:
        print(f"octavo bench serving: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("octavo bench serving: stopped, nothing was written", file=sys.stderr)
        return 130


def _at_least(kind: Callable[[str], _Number], low: _Number, *, open_end: bool = False) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if value < low or (open_end and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not valid: it must be {'above' if open_end else 'at least'} {low}")
        return value

    return parse


_count = _at_least(int, 1)
_whole = _at_least(int, 0)
_above_zero = _at_least(float, 0.0, open_end=True)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="octavo bench", description="Measure a server.")
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser(
        "serving",
        allow_abbrev=False,
        help="measure any OpenAI-compatible URL",
        description="Measure TTFT, TPOT, ITL, latency and throughput of any OpenAI-compatible URL with greedy, streamed requests.",
    )
    add = serving.add_argument_group("server").add_argument
    add("--base-url", default="http://127.0.0.1:30000", help="with or without /v1 (default: %(default)s)")
    add("--model", help="default: the first of /v1/models")
    add(
        "--endpoint",
        choices=("completions", "chat"),
        default="completions",
        help="completions sends token ids, chat sends text (default: %(default)s)",
    )
    add("--api-key", help="sent as a bearer token")
    add("--timeout", type=_above_zero, default=600.0, metavar="S", help="seconds until a request counts as failed (default: %(default)g)")

    add = serving.add_argument_group("prompts").add_argument
    add("--dataset", choices=("random", "shared-prefix"), default="random", help="(default: %(default)s)")
    add("--input-len", type=_count, default=256, metavar="N", help="tokens a prompt has for itself (default: %(default)s)")
    add("--output-len", type=_count, default=128, metavar="N", help="tokens asked for (default: %(default)s)")
    add("--num-prefixes", type=_count, metavar="N", help=f"shared-prefix: different prefixes (default: {DEFAULT_NUM_PREFIXES})")
    add("--prefix-len", type=_count, metavar="N", help=f"shared-prefix: tokens of each (default: {DEFAULT_PREFIX_LEN})")
    add("--warm-prefixes", action="store_true", help="shared-prefix: send each prefix once, alone, before measuring")
    add(
        "--session-header",
        metavar="NAME",
        help="shared-prefix: a header that names the prefix, for gateways that keep sessions together, such as X-Session-Id",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="folder, tokenizer.json, .gguf or hub id (default: the model that /v1/models names as root)",
    )
    add("--vocab-size", type=_count, metavar="N", help="token ids are drawn below N; instead of --tokenizer")
    add("--ignore-eos", action="store_true", help="ask the server not to stop early (not an OpenAI field; vLLM, SGLang and Octavo know it)")
    add(
        "--seed",
        type=_whole,
        default=0,
        metavar="N",
        help="same seed, same prompts: a second run may find them in the server's cache (default: %(default)s)",
    )

    add = serving.add_argument_group("load").add_argument
    add(
        "--concurrency",
        type=_counts,
        metavar="N[,N...]",
        help=f"requests in flight; several make a sweep (default: {DEFAULT_CONCURRENCY}, or no limit with --request-rate)",
    )
    add(
        "--request-rate",
        type=_above_zero,
        metavar="R",
        help="requests a second, as a Poisson process (default: as fast as --concurrency allows)",
    )
    add("--num-requests", type=_count, metavar="N", help="requests a run (default: 4 for each in flight, at least 32)")
    add("--warmup", type=_whole, default=1, metavar="N", help="unmeasured requests sent first (default: %(default)s)")

    add = serving.add_argument_group("report").add_argument
    add("--price-per-hour", type=_above_zero, metavar="USD", help="of the machine; prints what a million output tokens cost")
    add("--output-json", type=Path, metavar="FILE", help="write everything measured")
    add("--output-png", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    return parser


def _serving(args: argparse.Namespace) -> int:
    _check(args)
    base_url = with_v1(args.base_url)
    listed = first_model(base_url, api_key=args.api_key)
    model = args.model or (listed.id if listed else None)
    if model is None:
        raise BadOptions(f"{base_url}/models lists no model: name one with --model")
    target = Target(
        base_url=base_url,
        model=model,
        endpoint=args.endpoint,
        api_key=args.api_key,
        timeout_s=args.timeout,
        ignore_eos=args.ignore_eos,
        session_header=args.session_header,
    )
    vocabulary = _vocabulary(args, listed)
    print(f"measuring {model} at {base_url}")
    _warm(args, target, _random(args, vocabulary, args.warmup).prompts, args.output_len, "warm-up")
    runs: list[RunResult] = []
    for number, concurrency in enumerate(args.concurrency or (None if args.request_rate else DEFAULT_CONCURRENCY,)):
        runs.append(_one_run(args, target, vocabulary, number, concurrency))
        print(run_table(runs[-1]), flush=True)
    if len(runs) > 1 or args.price_per_hour is not None:
        print(sweep_table(runs, price_per_hour=args.price_per_hour))
    _write(args, runs, target)
    return 0 if any(run.succeeded for run in runs) else 1


def _check(args: argparse.Namespace) -> None:
    if args.dataset == "random":
        given = [flag for flag in ("num_prefixes", "prefix_len", "warm_prefixes", "session_header") if getattr(args, flag)]
        if given:
            raise BadOptions(
                f"--{given[0].replace('_', '-')} means nothing for random prompts: add --dataset shared-prefix or leave it out"
            )
    if args.endpoint == "chat" and args.vocab_size is not None:
        raise BadOptions("--endpoint chat sends text, which --vocab-size says nothing about: give --tokenizer PATH instead")
    if args.tokenizer is not None and args.vocab_size is not None:
        raise BadOptions("--tokenizer and --vocab-size both say which tokens there are: give one of them")
    if args.session_header is not None and not _HEADER_NAME.fullmatch(args.session_header):
        raise BadOptions(f"--session-header {args.session_header!r} is no name of a header: letters, digits and hyphens make one")
    for path in filter(None, (args.output_json, args.output_png)):
        if not path.absolute().parent.is_dir():
            raise BadOptions(f"cannot write {path}: the folder {path.absolute().parent} does not exist")
    if args.output_png is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadOptions("--output-png draws with matplotlib, which is not installed: pip install 'octavo[bench]'")


def _vocabulary(args: argparse.Namespace, listed: ListedModel | None) -> Vocabulary:
    """Where tokens come from: the options, else the tokenizer of the model that the server says it loaded."""
    if args.vocab_size is not None:
        return IdVocabulary(args.vocab_size)
    loaded = listed.root if listed is not None and args.model in (None, listed.id) else None
    path = args.tokenizer or _embedded_file(loaded) or loaded
    remedy = "--tokenizer PATH" if args.endpoint == "chat" else "--vocab-size N or --tokenizer PATH"
    if path is None:
        raise BadOptions(
            f"prompts of a known length need the model's vocabulary, and the server does not say where its model lies: add {remedy}"
        )
    try:
        root = resolve_tokenizer(path)
        tokenizer = load_tokenizer(ModelFiles("hf", root, None, (), None, path, None), tokenizer_path=str(root))
    except CheckpointError as error:
        raise BadOptions(f"{error}. Give {remedy}.") from error
    return (
        WordVocabulary(tokenizer) if args.endpoint == "chat" else IdVocabulary(tokenizer.vocab_size, excluded=tokenizer.special_token_ids)
    )


def _embedded_file(name: str | None) -> str | None:
    """The file of the embedded default model, when `name` is what a server calls it."""
    try:
        files = resolve_model(None)
    except CheckpointError:  # not installed, so the server has another one
        return None
    return str(files.gguf_file) if name == files.name else None


def _random(args: argparse.Namespace, vocabulary: Vocabulary, num_prompts: int) -> Dataset:
    return random_prompts(vocabulary, np.random.default_rng([args.seed, _WARMUP_STREAM]), num_prompts=num_prompts, input_len=args.input_len)


def _one_run(args: argparse.Namespace, target: Target, vocabulary: Vocabulary, number: int, concurrency: int | None) -> RunResult:
    """Each run of a sweep has prompts of its own: what one leaves in the server's prefix cache must not help the next."""
    rng = np.random.default_rng([args.seed, number])
    num_prompts = args.num_requests or max(32, 4 * (concurrency or 0))
    if args.dataset == "random":
        dataset = random_prompts(vocabulary, rng, num_prompts=num_prompts, input_len=args.input_len)
    else:
        dataset = shared_prefix_prompts(
            vocabulary,
            rng,
            num_prompts=num_prompts,
            num_prefixes=args.num_prefixes or DEFAULT_NUM_PREFIXES,
            prefix_len=args.prefix_len or DEFAULT_PREFIX_LEN,
            input_len=args.input_len,
        )
    if args.warm_prefixes:
        _warm(args, target, dataset.prefixes, 1, "prefixes")
    label = load_label(RunResult(concurrency=concurrency, request_rate=args.request_rate, requests=()))
    with tqdm(total=num_prompts, desc=label, unit="req", disable=None) as bar:
        load = run_load(
            target,
            dataset.prompts,
            output_len=args.output_len,
            concurrency=concurrency,
            request_rate=args.request_rate,
            seed=args.seed + number,
            on_done=bar.update,
        )
        return _run(load)


def _warm(args: argparse.Namespace, target: Target, prompts: Sequence[Prompt], output_len: int, what: str) -> None:
    """Unmeasured requests, one at a time. A server that fails them all is not worth measuring."""
    if not prompts:
        return
    result = _run(run_load(target, prompts, output_len=output_len, concurrency=1))
    if not result.succeeded:
        raise Unreachable(f"every {what} request failed: {'; '.join(result.failures)}")


def _run(load: Coroutine[Any, Any, RunResult]) -> RunResult:
    """Run on uvloop where it is installed: half the client's cost a token, and the server needs those cores."""
    factory = importlib.import_module("uvloop").new_event_loop if importlib.util.find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(load)


def _write(args: argparse.Namespace, runs: Sequence[RunResult], target: Target) -> None:
    options = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name not in ("api_key", "command")
    }
    if args.output_json is not None:
        args.output_json.write_text(as_json(runs, options | {"model": target.model}, price_per_hour=args.price_per_hour))
        print(f"wrote {args.output_json}")
    if args.output_png is not None:
        write_png(runs, args.output_png, title=f"{target.model}, {args.dataset} prompts, {args.input_len} tokens in, {args.output_len} out")
        print(f"wrote {args.output_png}")
