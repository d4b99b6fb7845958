"""`octavo quantize`: what is told, and the exit code. Knows no arithmetic."""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from .command import BAD_INPUT, FAILED, INTERRUPTED, CommandParser, fail
from .out_folder import WORK, check_out
from .quantize_flags import add_flags, recipe_of
from .quantize_report import summary
from .quantize_result import GateError
from .quantize_run import plan, quantize

GATE_FAILED = 3
_NO_ROOM = {
    errno.ENOSPC: ("the disk of {} is full", "make room there"),
    errno.EDQUOT: ("your quota on the disk of {} is used up", "make room there"),
    errno.EFBIG: ("a file in {} is larger than this process may write", "raise that limit (ulimit -f)"),
}


def main(argv: Sequence[str] | None = None, *, prog: str = "octavo quantize") -> int:
    """Run `octavo quantize <argv>`: 0; 1 when it failed; 2 for what the user can mend; 3 when the quality gate does not hold; 130
    after Ctrl-C, 143 after SIGTERM."""
    parser = _parser(prog)
    args = parser.parse(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out DIR is missing: give the folder to write to; --help explains")
    return run(args, prog=prog)


def run(args: argparse.Namespace, *, prog: str) -> int:
    """What `main` does once the flags are parsed."""
    with _Stopped() as stopped:
        try:
            return _run(args)
        except GateError as error:
            print(summary(error.result), flush=True)
            return fail(prog, f"the quality gate does not hold: {error}", GATE_FAILED)
        except (KeyboardInterrupt, ValueError, TypeError, OSError, RuntimeError) as error:
            if stopped.by is not None or isinstance(error, KeyboardInterrupt):
                unfinished = args.out is not None and (args.out / WORK).exists()
                told = f"; what is finished lies in {args.out}: give the same command with --resume to go on" if unfinished else ""
                return fail(prog, f"stopped{told}", INTERRUPTED if stopped.by is None else 128 + stopped.by)
            text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
            if isinstance(error, OSError) and error.errno in _NO_ROOM and args.out is not None:
                text = _no_room(args, error.errno)
            return fail(prog, text, BAD_INPUT if isinstance(error, ValueError | TypeError) else FAILED)
        except Exception as error:
            full = [number for number in _NO_ROOM if f"os error {number})" in str(error)]  # as safetensors words it
            if full and args.out is not None:
                return fail(prog, _no_room(args, full[0]), FAILED)
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} ({error}) at {place.filename}:{place.lineno}"
            return fail(prog, f"unexpected: {what}. Please report it with the model's config.json; what is finished stays in --out", FAILED)


def _no_room(args: argparse.Namespace, number: int) -> str:
    what, remedy = _NO_ROOM[number]
    return f"{what.format(args.out)}: {remedy}, and give the same command with --resume to go on"


class _Stopped:
    """Remembers the signal of Ctrl-C, or the one that told the process to end: code in C that is interrupted may raise something else
    than KeyboardInterrupt."""

    def __init__(self) -> None:
        self.by: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._press) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.by = number
        raise KeyboardInterrupt

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        for number, before in self._before.items():
            if before is not None:  # else it was not set from Python
                signal.signal(number, before)


def _run(args: argparse.Namespace) -> int:
    recipe = recipe_of(args)
    if args.dry_run:
        if args.out is not None:
            check_out(args.out, resume=args.resume)
        print(plan(args.model_path, recipe, eval_text=args.eval, device=args.device).describe())
        return 0
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)  # what is planned, before it starts
    result = quantize(
        args.model_path,
        args.out,
        recipe=recipe,
        eval_text=args.eval,
        report=args.report,
        measure_speed=not args.skip_speed,
        resume=args.resume,
        device=args.device,
    )
    print(summary(result), flush=True)
    return 0


def _parser(prog: str) -> CommandParser:
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} [--model-path PATH] --out DIR [flags]",
        allow_abbrev=False,
        description="Quantize a model to a folder that Octavo, vLLM and SGLang load, and transformers too, and measure what that costs.",
        epilog=f"Example: {prog} --model-path ./my-model --method auto --out ./my-model-int4 --max-ppl-increase 3%",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    add_flags(parser)
    return parser
