"""`octavo quantize`: flags, and what is told at the end. Knows no arithmetic."""

from __future__ import annotations

import argparse
import re
import signal
import threading
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from .command import BAD_INPUT, FAILED, INTERRUPTED, CommandParser, at_least, fail
from .quantize_report import REPORTS, summary, write_reports
from .quantize_run import GateError, QuantizeResult, plan, quantize
from .recipe import Recipe

GATE_FAILED = 3
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def main(argv: Sequence[str] | None = None, *, prog: str = "octavo quantize") -> int:
    """Run `octavo quantize <argv>`: 0; 1 when it failed; 2 for what the user can mend; 3 when the quality gate does not hold."""
    parser = _parser(prog)
    args = parser.parse(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out DIR is missing: give the folder to write to; --help explains")
    with _CtrlC() as ctrl_c:
        try:
            return _run(args)
        except GateError as error:
            _tell(error.result, args.report)
            return fail(prog, f"the quality gate does not hold: {error}", GATE_FAILED)
        except (KeyboardInterrupt, ValueError, TypeError, OSError, RuntimeError) as error:
            if ctrl_c.pressed or isinstance(error, KeyboardInterrupt):
                told = f"stopped; the finished blocks are in {args.out}: give the same command with --resume to go on"
                return fail(prog, told, INTERRUPTED)
            text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
            return fail(prog, text, BAD_INPUT if isinstance(error, ValueError | TypeError) else FAILED)


class _CtrlC:
    """Remembers that Ctrl-C was pressed: code in C that is interrupted may raise something else than KeyboardInterrupt."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press) if threading.current_thread() is threading.main_thread() else None
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        raise KeyboardInterrupt

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def _run(args: argparse.Namespace) -> int:
    recipe = Recipe.from_dict({field.name: value for field in fields(Recipe) if (value := getattr(args, field.name, None)) is not None})
    if args.dry_run:
        print(plan(args.model_path, recipe).describe())
        return 0
    result = quantize(args.model_path, args.out, recipe=recipe, eval_text=args.eval, measure_speed=not args.skip_speed, resume=args.resume)
    _tell(result, args.report)
    return 0


def _tell(result: QuantizeResult, report: Path | None) -> None:
    written = write_reports(result, report)
    print(summary(result))
    print(f"reports: {', '.join(map(str, written))}")


# -- flags ------------------------------------------------------------------------------------------------------------


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or such as 8GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _share(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give such as 3% or 0.03")
    return float(found[1]) / (100 if found[2] else 1)


def _group_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no group size: give auto, -1, or a number such as 64") from None


def _parser(prog: str) -> CommandParser:
    default = Recipe()
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} [--model-path PATH] --out DIR [flags]",
        allow_abbrev=False,
        description="Quantize a model to a folder that Octavo, vLLM, SGLang and transformers load, and measure what that costs.",
        epilog=f"Example: {prog} --model-path ./my-model --method auto --out ./my-model-int4 --max-ppl-increase 3%",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    add = parser.add_argument_group("model").add_argument
    add("--model-path", "--model", metavar="PATH", help="a folder, a hub id or a .gguf file; none: the embedded model")
    add("--out", type=Path, metavar="DIR", help="where the quantized model goes: an empty folder, or one that does not exist")
    add("--resume", action="store_true", help="go on with an unfinished run in --out")
    add("--dry-run", action="store_true", help="say what would be done, and what memory and disk it would take")

    add = parser.add_argument_group("what").add_argument
    add("--method", metavar="NAME", help=f"auto, awq, gptq, best, fp8, int8 or rtn (default: {default.method})")
    add("--bits", type=at_least(2), metavar="N", help=f"of weights (default: {default.bits})")
    add("--group-size", type=_group_size, metavar="N", help="inputs that share a scale; -1: all of them (default: auto)")
    add("--format", metavar="NAME", help="of the checkpoint: awq, gptq or compressed-tensors (default: auto)")
    add(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one zero point for all (default: what the format is read with everywhere)",
    )
    add("--kv-cache", metavar="NAME", help="fp8: scales for an fp8 KV cache")
    add("--activations", metavar="HOW", help=f"fp8: dynamic or static scales of inputs (default: {default.activations})")
    add("--weight-scales", metavar="HOW", help=f"fp8: a scale a channel, tensor or block (default: {default.weight_scales})")
    add("--ignore", action="append", metavar="REGEX", help="linears to leave as they are, by module path; may be given again")
    add("--effort", metavar="HOW", help=f"fast, default or best (default: {default.effort})")

    add = parser.add_argument_group("calibration").add_argument
    add("--calibration", metavar="WHAT", help="self (the model writes it), a text, JSONL or chat file, or a hub data set (default: self)")
    add(
        "--samples",
        type=at_least(1),
        metavar="N",
        help=f"rows of text at most; --effort says how many of them are used (default: {default.samples})",
    )
    add("--seqlen", type=at_least(1), metavar="N", help=f"tokens in a row (default: {default.seqlen})")
    add("--seed", type=at_least(0), metavar="N", help=f"of everything drawn (default: {default.seed})")
    add(
        "--max-memory",
        type=_size,
        metavar="SIZE",
        help="that weights and activations may take, such as 8GiB; beyond, activations go to disk",
    )

    add = parser.add_argument_group("proof").add_argument
    add("--eval", type=Path, metavar="FILE", help="text to measure quality on (default: samples held back from the calibration)")
    add("--max-ppl-increase", type=_share, metavar="SHARE", help="fail (exit code 3) when perplexity rises by more, such as 3%%")
    add("--max-kl", type=float, metavar="NATS", help="fail (exit code 3) when the KL divergence a token is larger")
    add("--skip-speed", action="store_true", help="do not measure tokens a second before and after")
    add("--report", type=Path, metavar="FILE", help=f"the HTML report's place (default: {REPORTS} in --out)")
    return parser
