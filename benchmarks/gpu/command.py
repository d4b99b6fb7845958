"""What run.py does: which parts, for how long, and where results go."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from octavo.kernels.gpu import dense_linear
from octavo.kernels.gpu.config import operations, table_architectures
from octavo.kernels.gpu.device import device_of

from . import answers, attention_timings, correctness, model_timings, report, timings
from .answer_models import ASKED, Asked
from .answers import Talk
from .attention_timings import STEPS, Step
from .checks import Place
from .contenders import FORMATS, ROWS, SHAPES, Shape
from .model_timings import VARIANTS, Load, Variant
from .peers import Peer, load_peers
from .record import ROOT, Budget, Record, folder_name, machine_facts, one_line
from .sweep import SWEPT_SHAPES, sweep, told

PARTS = ("correctness", "older", "sanitizer", "answers", "timings", "model", "report", "sweep", "quick")
_USUAL = PARTS[:7]
_WRONG, _NO_GPU, _BAD_INPUT = 1, 3, 2
_EPILOG = """parts, in this order where none is named:
  correctness  every kernel with every entry of its table of tiles, against float64
  older        the same as an sm_80 and an sm_89 would compute it: their tiles, their code, assembled for this card
  sanitizer    the small cases under compute-sanitizer: memcheck, racecheck, synccheck
  answers      whole models in every format through the engine, graphs and cache included, against the CPU; and --model
  timings      linears of Llama-3 8B and 70B by rows, and attention over pages, beside torch's and the peers'
  model        dummy Llama-3 8B and 70B through the engine, beside transformers' continuous batching
  report       README.md and pictures out of what has been found; needs no GPU
and by name alone:
  sweep        tiles for the operations of --op, and the entries that were fastest
  quick        the small cases once, kept nowhere

A run stops where its minutes end, and the same command goes on from there. It ends with 1 when a result is wrong."""


@dataclass(frozen=True)
class Sizes:
    """What is timed, and which models are asked."""

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    steps: tuple[Step, ...]
    variants: tuple[Variant, ...]
    load: Load
    asked: tuple[Asked, ...]
    talk: Talk


def main(
    argv: Sequence[str], *, place: Place | None = None, shapes: Sequence[Shape] = SHAPES, rows: Sequence[int] = ROWS,
    steps: Sequence[Step] = STEPS, variants: Sequence[Variant] = VARIANTS, load: Load | None = None,
    asked: Sequence[Asked] = ASKED, talk: Talk | None = None,
) -> int:  # fmt: skip
    """Run the parts: 0, 1 when a result is wrong, 2 for bad arguments, 3 without a GPU. `place` and the sizes are for tests."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    parts = options.parts or list(_USUAL)
    if (reason := _reason_against(parts, options)) is not None:
        print(f"run.py: {reason}", file=sys.stderr)
        return _BAD_INPUT
    if parts == ["report"] and options.out is not None:
        return _report(Record.read(options.out), options.out)
    if place is None and not torch.cuda.is_available():
        print("run.py: torch sees no CUDA device here. `run.py report --out FOLDER`, by itself, needs none.", file=sys.stderr)
        return _NO_GPU
    sizes = Sizes(tuple(shapes), tuple(rows), tuple(steps), tuple(variants), load or Load(), tuple(asked), talk or Talk())
    return _run(parts, options, place or _place_at_hand(), sizes)


def _reason_against(parts: Sequence[str], options: argparse.Namespace) -> str | None:
    """Why the arguments do not go; None when they do."""
    known = sorted({op for arch in table_architectures() for op in operations(arch)} - {dense_linear.OP})  # which has one tile, for good
    odd_parts, odd_ops = [part for part in parts if part not in PARTS], [op for op in options.op if op not in known]
    has_results = options.out is not None and (options.out / "results.json").is_file()
    reasons = {
        f"{', '.join(odd_parts)}: the parts are {', '.join(PARTS)}": bool(odd_parts),
        f"--minutes {options.minutes:g} and --jobs {options.jobs} must be above 0": options.minutes <= 0 or options.jobs < 1,
        f"--out {options.out} has no results.json: run the other parts with the same --out first": (
            list(parts) == ["report"] and options.out is not None and not has_results
        ),
        f"--model {options.model} is not there": options.model is not None and not options.model.exists(),
        f"--model {options.model} is for the part answers, which is not asked for": options.model is not None and "answers" not in parts,
        f"--peers {options.peers} is no folder": options.peers is not None and not options.peers.is_dir(),
        f"no tiles for {', '.join(odd_ops)}: the tables have {', '.join(known)}": bool(odd_ops),
        "the part sweep and --op go together, such as sweep --op w4a16": ("sweep" in parts) != bool(options.op),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _place_at_hand() -> Place:
    device = torch.device("cuda", torch.cuda.current_device())
    return Place(device, device_of(device))


@torch.inference_mode()
def _run(parts: Sequence[str], options: argparse.Namespace, place: Place, sizes: Sizes) -> int:
    budget, machine = Budget(options.minutes), machine_facts(place.device)
    folder: Path = options.out or ROOT / "benchmarks" / "results" / folder_name(machine)
    if "quick" in parts:
        return _quick(place)
    print(f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}: results in {folder}", flush=True)
    record = Record.load(folder, machine, fresh=options.fresh)
    save, jobs = partial(record.save, folder), options.jobs if place.is_gpu else 1
    older = [arch for arch in correctness.OLDER if arch < place.facts.arch]
    most_s = correctness.TOOL_S if set(parts) - {"sanitizer", "report"} else math.inf  # by itself it has all the time there is
    check = partial(correctness.run, record, place, budget, jobs=jobs, save=save, quick=not place.is_gpu)
    ways: dict[str, list[Callable[[], None]]] = {
        "correctness": [check],
        "older": [partial(check, older=arch) for arch in older],
        "sanitizer": [
            partial(correctness.sanitize, record, place, budget, command=Path(__file__).with_name("run.py"), save=save, most_s=most_s)
        ],
        "answers": [partial(answers.run, record, place, budget, save=save, asked=sizes.asked, model=options.model, talk=sizes.talk)],
        "timings": _ways_to_time(record, place, budget, options, save, sizes),
        "model": [partial(model_timings.run, record, place, budget, save=save, variants=sizes.variants, load=sizes.load)],
    }
    if not _answers_after([way for part, found in ways.items() if part in parts for way in found], place):
        parts = [part for part in parts if part == "report"]
    if "sweep" in parts:
        for op in options.op:
            found = list(sweep(op, place, budget, jobs=options.jobs, shapes=SWEPT_SHAPES if sizes.shapes == SHAPES else sizes.shapes))
            print(told(op, found))
            record.sweeps[op] = [
                {"max_m": most, "tiles": [{**vars(one.tile), "us": one.us, "fault": one.fault} for one in tried]} for most, tried in found
            ]
    save()
    if "report" in parts:
        _report(record, folder)
    return _WRONG if _is_wrong(record) else 0


def _answers_after(ways: Sequence[Callable[[], None]], place: Place) -> bool:
    """Whether the device still does: those after one with which it failed are not run. Raises what one raises for another reason."""
    for way in ways:
        fault = None
        try:
            way()
        except RuntimeError as error:
            if not place.is_gpu or correctness.device_answers():
                raise
            fault = one_line(error)
        if fault or (place.is_gpu and not correctness.device_answers()):
            print(f"  the device answers no more in this process: run the same command again, it goes on from here. {fault or ''}".rstrip())
            return False
    return True


def _is_wrong(record: Record) -> bool:
    """Whether anything of ours is: a contender of torch's or of a peer's that fails is told, and no more."""
    results = [*record.correctness.values(), *record.sanitizer.values(), *record.answers.values()]
    results += [found for name, found in record.model.items() if name != model_timings.PEER]
    contenders = [name for timing in record.timings.values() for name in timing["faults"] if name.startswith("octavo")]
    contenders += [name for step in record.attention.values() for name in step["faults"] if name != attention_timings.SDPA]
    return bool(contenders) or any(result["fault"] for result in results)


def _ways_to_time(
    record: Record, place: Place, budget: Budget, options: argparse.Namespace, save: partial[None], sizes: Sizes
) -> list[Callable[[], None]]:
    """Linears, and attention where no formats are named."""
    linears = partial(_time_linears, record, place, budget, options, save, sizes)
    attention = partial(attention_timings.run, record, place, budget, save=save, steps=sizes.steps)
    return [linears] if options.formats else [linears, attention]


def _time_linears(record: Record, place: Place, budget: Budget, options: argparse.Namespace, save: partial[None], sizes: Sizes) -> None:
    peers: tuple[Peer, ...] = ()
    if options.peers is not None:
        peers, record.peers = load_peers(options.peers)
        for name, reason in record.peers.items():
            print(f"  {name} is not compared: {reason}")
    timings.run(record, place, budget, save=save, peers=peers, formats=options.formats, shapes=sizes.shapes, rows=sizes.rows)


def _quick(place: Place) -> int:
    results = correctness.check_all(correctness.cases_of(place.facts.arch, quick=True), place)
    wrong = {name: result["fault"] for name, result in results.items() if result["fault"]}
    for name, fault in wrong.items():
        print(f"WRONG {name}: {fault}")
    print(f"quick: {len(results) - len(wrong)} of {len(results)} cases right or refused")
    return _WRONG if wrong else 0


def _report(record: Record, folder: Path) -> int:
    try:
        written = report.write(record, folder)
    except ModuleNotFoundError as error:
        print(f"no pictures: {error}. `run.py report --out {folder}` draws them where matplotlib is installed")
        written = [folder / "README.md"]
    print("\n".join(report.goal_lines(record)))
    print("wrote " + ", ".join(str(path) for path in written))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py", description="Kernels on the GPU at hand.", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("parts", nargs="*", metavar="PART", help="see below")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where results go and are found again (default benchmarks/results/<gpu>)")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument(
        "--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that check and compile (default %(default)s)"
    )
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a folder with marlin, conch and gemlite; see benchmarks/README.md")
    parser.add_argument("--model", type=Path, metavar="PATH", help="a folder or GGUF file, for answers beside the random models'")
    parser.add_argument(
        "--formats", nargs="+", choices=tuple(FORMATS), default=[], help="of linears, timed alone (default: all, and attention)"
    )
    parser.add_argument("--op", nargs="+", default=[], help="operations of the tables of tiles, for sweep: fp8, w4a16, ...")
    return parser
