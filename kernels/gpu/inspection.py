"""What a compiled kernel is made of: registers, spills, shared memory and machine instructions; and what is wrong with it.

Reads binaries with the tools inside of Triton's package (ptxas, cuobjdump, nvdisasm). Runs nothing, and knows no kernel.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ahead import Compiled
from .device import nearest

MAX_TENSOR_MEMORY = 512  # columns, sm_100
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
# "        /*0720*/   @!P0 LDG.E.128 R4, ...": an address, perhaps a predicate, the instruction.
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)", re.ASCII)
_BY_WIDTH = ("LDG", "LDGSTS", "STG")  # told apart by how many bits a thread moves
_WIDTHS = ("128", "64", "U16", "S16", "U8", "S8")


@dataclass(frozen=True, eq=False)
class KernelReport:
    """One kernel for one architecture. `instructions` counts them by kind.

    A kind is the first part of the instruction's name; for those of the matrix units the whole of it ("QGMMA.64x16x32.F32.E4M3.E4M3"),
    for transfers with the bits a thread moves ("LDG.128"), for WARPGROUP with what it does ("WARPGROUP.DEPBAR").
    """

    name: str
    arch: int
    tile: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    num_warps: int
    num_instructions: int
    instructions: Counter[str]

    def count(self, kind: str) -> int:
        """Instructions of a kind, whatever follows: "QGMMA", "LDG.128", "F2FP"."""
        return sum(number for name, number in self.instructions.items() if name == kind or name.startswith(f"{kind}."))

    @property
    def matrix_instructions(self) -> tuple[str, ...]:
        """Those of the matrix units, whole names, most frequent first."""
        return tuple(name for name, _ in self.instructions.most_common() if _is_matrix(name))

    @property
    def wide_loads(self) -> int:
        """Loads from global memory of 16 bytes a thread, or of whole tiles by descriptor."""
        return self.count("LDG.128") + self.count("LDGSTS.128") + self.count("UTMALDG")


@dataclass(frozen=True)
class Expected:
    """What a kernel must be made of: `matrix` are names, one of which its matrix instructions begin with; none of `never` may be there."""

    matrix: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    wide_loads: bool = False


def inspect(compiled: Compiled) -> KernelReport:
    """Take it apart. Some tenths of a second."""
    binary = compiled.binary
    registers, stack, listing = _read(binary.asm["cubin"])
    stores, loads = _spills(compiled)
    instructions = Counter(_kind(name) for name in listing)
    return KernelReport(
        name=compiled.name,
        arch=compiled.arch,
        tile=compiled.tile,
        registers=registers,
        stack_bytes=stack,
        spill_store_bytes=stores,
        spill_load_bytes=loads,
        shared_bytes=binary.metadata.shared,
        tensor_memory_columns=getattr(binary.metadata, "tmem_size", None) or 0,
        num_warps=binary.metadata.num_warps,
        num_instructions=instructions.total(),
        instructions=instructions,
    )


def faults(report: KernelReport, expected: Expected) -> tuple[str, ...]:
    """Why a kernel must not be launched, or would be slow; nothing where it is as it should be."""
    return tuple(_faults(report, expected))


def _faults(report: KernelReport, expected: Expected) -> Iterator[str]:
    if report.spill_store_bytes or report.spill_load_bytes:
        yield f"spills registers: {report.spill_store_bytes} bytes stored, {report.spill_load_bytes} loaded"
    limit = nearest(report.arch).shared_bytes
    if report.shared_bytes > limit:
        yield f"takes {report.shared_bytes} bytes of shared memory, sm_{report.arch} has {limit}"
    if report.tensor_memory_columns > MAX_TENSOR_MEMORY:
        yield f"takes {report.tensor_memory_columns} columns of tensor memory, sm_{report.arch} has {MAX_TENSOR_MEMORY}"
    found = report.matrix_instructions
    if expected.matrix and not any(map(report.count, expected.matrix)):
        yield f"multiplies by {', '.join(found) or 'no matrix instruction'}, not by {' or '.join(expected.matrix)}"
    for kind in expected.never:
        if report.count(kind):
            yield f"has {report.count(kind)} {kind}, which it should do without"
    if expected.wide_loads and not report.wide_loads:
        yield "loads nothing 16 bytes wide"


def _read(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack and the names of all instructions of a binary."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        told = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file))
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", "--no-dataflow", str(file))
    numbers = _RESOURCES.search(told)
    names = [match[1] for line in listing.splitlines() if (match := _INSTRUCTION.match(line))]
    if numbers is None or not names:
        raise RuntimeError(f"cuobjdump or nvdisasm of this Triton tells something else than before: {told.strip()[-200:]!r}")
    return int(numbers[1]), int(numbers[2]), [name for name in names if name != "NOP"]


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _spills(compiled: Compiled) -> tuple[int, int]:
    """Bytes of spill stores and loads. Only the log of ptxas has them."""
    numbers = _SPILLS.search(compiled.log or _log_again(compiled.binary))
    if numbers is None:
        raise RuntimeError(f"ptxas of this Triton tells something else than before: {compiled.log.strip()[-200:]!r}")
    return int(numbers[1]), int(numbers[2])


def _log_again(binary: Any) -> str:
    """What ptxas tells of a kernel that lay in the cache: it runs again, as Triton ran it."""
    from triton import knobs
    from triton.compiler.compiler import make_backend

    told = io.StringIO()
    backend, metadata = make_backend(binary.metadata.target), binary.metadata._asdict()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(told):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(binary.asm["ptx"], dict(metadata), backend.parse_options(dict(metadata)), binary.metadata.target.arch)
    return told.getvalue()


def _is_matrix(name: str) -> bool:
    return name.partition(".")[0].endswith("MMA")


def _kind(name: str) -> str:
    base, *modifiers = name.split(".")
    if _is_matrix(name):
        return name
    if base in _BY_WIDTH:
        return f"{base}.{next((width for width in _WIDTHS if width in modifiers), '32')}"
    return ".".join([base, *modifiers[:1]]) if base == "WARPGROUP" else base
