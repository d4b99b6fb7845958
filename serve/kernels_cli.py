"""`octavo kernels`: flags, and the tables of what was compiled for a GPU that need not be there. Compiles nothing itself."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.config import Dtype, EngineConfig
from ..runtime.start import prepare_environment
from .arguments import choices_of, default_of, whole_number
from .parser import Parser

if TYPE_CHECKING:
    from ..runtime.kernels_ahead import CompiledModel, ReportRow

_FAILED, _BAD_INPUT = 1, 2
_MOST_ROWS = 1 << 16
_WIDTH = 110
_USAGE = """usage: octavo kernels COMMAND [options]     octavo kernels COMMAND --help explains a command

Triton kernels for GPUs, on a machine without one: it takes no driver and no CUDA toolkit.

  compile  fill a cache folder with what serving a model launches, so that nothing compiles while serving
  report   registers, spills, shared memory and matrix instructions of each kernel; ends with code 1 when one is not as it should be"""
# What a model's options are called in EngineConfig, and what help says of them.
_MODEL_FLAGS = {
    "dtype": "of weights",
    "quantization": "as of octavo serve",
    "linear_backend": "as of octavo serve",
    "load_format": "dummy: of the config.json alone, for a model whose weights are not here",
}


def main(argv: list[str], *, prog: str = "octavo kernels") -> int:
    """Run `octavo kernels <argv>`: 0, 1 when a kernel does not compile or is not as it should be, 2 for what the user can mend."""
    commands: dict[str, Callable[[list[str], str], int]] = {"compile": _compile, "report": _report}
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        told = f"{prog}: {command!r} is no command" if command else f"{prog}: no command given"
        print(told + (f"; did you mean {near[0]}?" if near else "") + f"\n\n{_USAGE}", file=sys.stderr)
        return _BAD_INPUT
    try:
        return commands[command](argv[1:], f"{prog} {command}")
    except SystemExit as end:
        return int(end.code or 0)
    except BrokenPipeError:
        raise  # whoever reads has enough: the command ends without a word
    except (ValueError, OSError) as error:
        return _fail(f"{prog} {command}", str(error), _BAD_INPUT)
    except RuntimeError as error:
        return _fail(f"{prog} {command}", str(error), _FAILED)


def _fail(prog: str, text: str, code: int) -> int:
    print(f"{prog}: {text}", file=sys.stderr)
    return code


# -- compile ----------------------------------------------------------------------------------------------------------


def _compile(argv: list[str], prog: str) -> int:
    parser = _parser(
        prog,
        "Compile what serving a model launches on GPUs of some architectures, for every number of rows, without reading its matrices.",
        f"Example: {prog} --arch sm_90 --model ./my-model-fp8 --cache-dir /kernels; serve with TRITON_CACHE_DIR=/kernels. Triton finds "
        "the kernels where its version, the folder's path, Octavo's sources and TRITON_ variables are the same.",
    )
    parser.add_argument("--arch", action="append", metavar="sm_NN", help="sm_80, sm_90, ...; repeat it for several; required")
    _add_model(parser, "; none: the embedded model")
    _add_cache_dir(parser, "the folder to fill (default: TRITON_CACHE_DIR, else ~/.triton/cache)")
    given = vars(parser.parse_all(argv))
    if not given.get("arch"):
        raise ValueError("--arch is missing: give one or several, such as --arch sm_90")
    prepare_environment()
    from ..runtime.kernels_ahead import architecture, compile_model, run_apart

    architectures = [architecture(name) for name in dict.fromkeys(given["arch"])]
    if given.get("cache_dir") == "":
        raise ValueError("--cache-dir is empty: name a folder, or leave it out")
    folder = _writable(Path(given.get("cache_dir") or os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"))
    config, sizes = _config(given)
    for arch in architectures:
        print("\n".join(_told(run_apart(folder, compile_model, config, arch, **sizes), folder)))
    return 0


def _told(done: CompiledModel, folder: Path) -> Iterator[str]:
    yield from [done.linears.table(), ""]
    number = sum(done.kernels.values())
    if not number:
        yield f"sm_{done.arch} runs no Triton kernel for these linears: nothing was compiled"
        return
    launchers = f"no launchers ({done.launcher_fault}; Triton will want it where it serves)"
    if done.num_launchers is not None:
        launchers = f"{done.num_launchers} launcher{'s' if done.num_launchers != 1 else ''}"
    yield f"Compiled for sm_{done.arch}, 1 to {done.max_rows} rows: {number} kernels, {launchers}, in {done.seconds:.0f} s, in {folder}"
    for name in dict.fromkeys(name for name, _ in done.kernels):
        tiles = {tile: count for (other, tile), count in done.kernels.items() if other == name}
        shown = ", ".join(f"{count} of {tile}" for tile, count in tiles.items() if tile)
        yield f"  {sum(tiles.values()):>4}  {name}" + (f": {shown}" if shown else "")


# -- report -----------------------------------------------------------------------------------------------------------


def _report(argv: list[str], prog: str) -> int:
    parser = _parser(
        prog,
        "Take apart the kernels of all tables of tiles, or of a model: what the machine code is made of, and what is wrong with it.",
        f"Example: {prog} --arch sm_90 --op fp8",
    )
    parser.add_argument(
        "--arch",
        action="append",
        metavar="sm_NN",
        help="repeat it for several (default: those with a table, and with the operations of --op in it)",
    )
    parser.add_argument("--table", action="store_true", help="every entry of the tables of tiles; the default without --model")
    parser.add_argument("--op", action="append", metavar="NAME", help="these operations of the tables alone, such as fp8; repeat it")
    _add_model(parser, "; none: the tables")
    _add_cache_dir(parser, "where compiled kernels are looked for and kept (default: a folder that is deleted)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = vars(parser.parse_all(argv))
    if "model_path" in given and ("table" in given or "op" in given):
        raise ValueError(f"--model and --{'table' if 'table' in given else 'op'} contradict each other: leave one out")
    for name in (*_MODEL_FLAGS, "tp_size", "max_rows"):
        if name in given and "model_path" not in given:
            raise ValueError(f"--{name.replace('_', '-')} belongs to a model, and the tables have none: give --model too, or leave it out")
    prepare_environment()
    from ..runtime.kernels_ahead import architecture, architectures_with, check_operations, report_model, report_tables, run_apart

    ops = tuple(given.get("op", ()))
    architectures = [architecture(name) for name in dict.fromkeys(given.get("arch", ()))] or list(architectures_with(ops))
    for arch in architectures if "model_path" not in given else ():
        check_operations(arch, ops)
    config, sizes = _config(given)
    rows: list[ReportRow] = []
    with _folder(given.get("cache_dir")) as folder:
        for arch in architectures:
            if "model_path" in given:
                rows += run_apart(folder, report_model, config, arch, **sizes)
            else:
                rows += run_apart(folder, report_tables, arch, ops=ops)
    print(json.dumps([_plain(row) for row in rows], indent=2) if "json" in given else "\n".join(_table(rows)))
    return _FAILED if any(row.faults for row in rows) else 0


def _plain(row: ReportRow) -> dict[str, Any]:
    report = row.report
    matrix = list(report.matrix_instructions)
    told = {**vars(report), "matrix_instructions": matrix, "wide_loads": report.wide_loads}
    return {"op": row.op, "max_m": row.max_m, **told, "faults": list(row.faults)}


_COLUMNS = ("arch", "op", "rows", "kernel", "tile", "regs", "spilled", "shared", "16 B loads", "matrix instruction")


def _table(rows: list[ReportRow]) -> Iterator[str]:
    """One line a kernel, what is wrong with it below."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    to_the_right = {_COLUMNS.index(name) for name in ("rows", "regs", "spilled", "shared", "16 B loads")}
    for line, row in zip(lines, [None, *rows], strict=True):
        cells = (
            cell.rjust(width) if at in to_the_right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
        yield from (f"    {fault}" for fault in (row.faults if row is not None else ()))
    if not rows:
        yield "\n0 kernels: nothing of it runs in Triton there"
        return
    wrong = sum(bool(row.faults) for row in rows)
    yield f"\n{len(rows)} kernels, {f'{wrong} not as they should be' if wrong else 'all as they should be'}"


def _cells(row: ReportRow) -> tuple[str, ...]:
    report = row.report
    rows = "" if row.op is None else "more" if row.max_m is None else f"to {row.max_m}"
    spilled = str(report.spill_store_bytes + report.spill_load_bytes)
    numbers = (str(report.registers), spilled, str(report.shared_bytes), str(report.wide_loads))
    return (f"sm_{report.arch}", row.op or "", rows, report.name, report.tile, *numbers, ", ".join(report.matrix_instructions))


# -- flags ------------------------------------------------------------------------------------------------------------


def _parser(prog: str, description: str, epilog: str) -> Parser:
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=_WIDTH),
    )


def _add_model(parser: Parser, default: str) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-path",
        "--model",
        metavar="PATH",
        help=f"a folder, a hub id or a .gguf file{default}. Its configs and the headers of its files are read",
    )
    for name, meaning in _MODEL_FLAGS.items():
        metavar = choices_of(Dtype) if name == "dtype" else "NAME"
        group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=f"{meaning} (default: {default_of(EngineConfig, name)})")
    group.add_argument("--tp-size", type=whole_number, metavar="N", help="ranks that linears are split over (default: 1)")
    group.add_argument(
        "--max-rows", type=whole_number, metavar="N", help="tokens of the greatest step (default: what octavo serve has by default)"
    )


def _add_cache_dir(parser: Parser, text: str) -> None:
    parser.add_argument("--cache-dir", metavar="DIR", help=text)


def _config(given: dict[str, Any]) -> tuple[EngineConfig, dict[str, Any]]:
    """The model's options, and what else compile_model takes. Raises ValueError naming flag, value and remedy."""
    for name in ("tp_size", "max_rows"):
        if given.get(name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} is not valid: give a whole number of at least 1")
    if given.get("max_rows", 1) > _MOST_ROWS:
        raise ValueError(
            f"--max-rows {given['max_rows']} is not valid: each number up to it is tried, and a step has no more than {_MOST_ROWS}"
        )
    config = EngineConfig(**{name: given[name] for name in ("model_path", *_MODEL_FLAGS) if name in given})
    return config, {"max_rows": given.get("max_rows"), "tp_size": given.get("tp_size", 1)}


@contextmanager
def _folder(named: str | None) -> Iterator[Path]:
    if named is not None:
        yield _writable(Path(named))
        return
    with tempfile.TemporaryDirectory(prefix="octavo-kernels-") as folder:
        yield Path(folder)


def _writable(folder: Path) -> Path:
    """The folder, made where it is missing. Raises ValueError where nothing can be written into it."""
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"nothing can be written into {folder} ({reason}): name another folder with --cache-dir") from error
