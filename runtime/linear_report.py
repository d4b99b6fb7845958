"""LinearReport: which kernel computes which linears, and why none faster. Knows names and reasons, and no tensor."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..quant.build import BuiltKernel
from ..quant.linear import LinearKernel, LinearSpec
from ..quant.platforms import kernel_names, kernels_for, platform_of
from .layers.linear import ParallelLinear

logger = logging.getLogger("octavo.runtime")

WIDTH = 110  # of the table, in columns


@dataclass(frozen=True)
class Refusal:
    """A kernel that stands before the chosen one, and why it was passed over. `made_for_it`: it is made for such weights at all."""

    kernel: str
    reason: str
    made_for_it: bool


@dataclass(frozen=True)
class LinearGroup:
    """Linears that are alike: `layers` with its number as "*", how many, how stored, on which kernel, which refused before it."""

    layers: str
    count: int
    in_features: int
    out_features: int
    scheme: str
    kernel: str
    weight_bytes: int
    refused: tuple[Refusal, ...]


@dataclass(frozen=True)
class LinearReport:
    """The table behind --explain-quant. `method` is the checkpoint's, or the one applied while loading; None for a dense model."""

    method: str | None
    groups: tuple[LinearGroup, ...]

    @classmethod
    def of(cls, linears: Iterable[ParallelLinear], method: str | None) -> LinearReport:
        """The report of a model's linears. Its table is logged at DEBUG."""
        found: dict[tuple[Any, ...], LinearGroup] = {}
        for linear in linears:
            for built in linear.kernels:
                spec, refused = built.spec, _refusals(built)
                name = re.sub(r"\.\d+\.", ".*.", spec.name)
                rows = built.stop - built.start
                if len(linear.kernels) > 1:
                    name += f"[{built.start}:{built.stop}]"
                key = (name, spec.in_features, rows, spec.scheme, built.kernel.name, refused)
                old = found.get(key)
                count, size = (old.count, old.weight_bytes) if old else (0, 0)
                found[key] = LinearGroup(
                    name, count + 1, spec.in_features, rows, spec.scheme, built.kernel.name, size + built.kernel.weight_bytes, refused
                )
        report = cls(method, tuple(found.values()))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", report.table(every_refusal=True))
        return report

    def summary(self) -> str:
        """One line: "Linears (awq): 120 on cpu_grouped, 1 on cpu_packed_panels; 68.4 MiB"."""
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.kernel] = counts.get(group.kernel, 0) + group.count
        size = sum(group.weight_bytes for group in self.groups) / (1 << 20)
        where = ", ".join(f"{count} on {name}" for name, count in counts.items())
        return f"Linears ({self.method or 'dense'}): {where}; {size:.1f} MiB"

    def advice(self, device: str) -> str | None:
        """For a dense model on the CPU, one line on what quantizing while loading would gain there; None elsewhere."""
        if self.method is not None or device != "cpu":
            return None
        mib = 1 << 20
        dense = sum(group.weight_bytes for group in self.groups) / mib
        layers = [group for group in self.groups if "*" in group.layers]
        weights = sum(group.count * group.in_features * group.out_features for group in layers) / mib
        rest = dense - sum(group.weight_bytes for group in layers) / mib
        return (
            f"Served dense, as the checkpoint is: {dense:.0f} MiB of weights. --quantization int8 would hold {rest + weights:.0f} MiB and "
            f"compute faster, fp8 the same and slower, int4 about {rest + weights * 0.53:.0f} MiB at a loss that `octavo eval` measures"
        )

    def table(self, *, every_refusal: bool = False) -> str:
        """For people, in WIDTH columns: a line for each group, and below it which faster kernels refused it and why.

        `every_refusal` also tells of kernels that are not made for such weights at all.
        """
        names, counts, shapes, sizes, kernels = (
            _column(title, cells, left=left)
            for title, left, cells in (
                ("linears", True, [*(group.layers for group in self.groups), "total"]),
                ("count", False, [*(str(group.count) for group in self.groups), str(sum(group.count for group in self.groups))]),
                ("out x in", False, [*(f"{group.out_features} x {group.in_features}" for group in self.groups), ""]),
                ("MiB", False, [*(_mib(group.weight_bytes) for group in self.groups), _mib(sum(g.weight_bytes for g in self.groups))]),
                ("kernel", True, [*(group.kernel for group in self.groups), ""]),
            )
        )
        starts = ["  ".join(cells) for cells in zip(names, counts, shapes, sizes, kernels, strict=True)]
        notes: dict[str, int] = {}
        lines = [f"Quantization: {self.method or 'none (dense)'}", "", f"{starts[0]}  stored as"]
        for start, group in zip(starts[1:-1], self.groups, strict=True):
            scheme = group.scheme
            if len(start) + 2 + len(scheme) > WIDTH:
                scheme = f"({notes.setdefault(scheme, len(notes) + 1)})"
            lines.append(f"{start}  {scheme}")
            for refusal in group.refused:
                if refusal.made_for_it or every_refusal:
                    lines += _wrapped(f"    not {refusal.kernel}: {refusal.reason}")
        lines.append(starts[-1].rstrip())
        for scheme, number in notes.items():
            lines += _wrapped(f"({number}) {scheme}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For /server_info: {"method": ..., "layers": [...]}, with every refusal."""
        return {"method": self.method, "layers": [{**asdict(group), "refused": list(map(asdict, group.refused))} for group in self.groups]}


def check_backend_name(backend: str) -> None:
    """Raises ValueError when no kernel of any platform has this name."""
    known = kernel_names()
    if backend not in known:
        raise ValueError(f"--linear-backend {backend!r} is not valid: give one of {', '.join(known)}")


def check_backend(backend: str | None, linears: Iterable[ParallelLinear]) -> None:
    """Raises ValueError, with the reasons, when a forced backend computes none of a model's linears.

    Where some are quantized it must compute one of those: one that got the dense embedding alone would have been as good as ignored.
    """
    built = [kernel for linear in linears for kernel in linear.kernels]
    quantized = [one for one in built if one.spec.form.kind != "dense"]
    meant = quantized or built
    if backend is None or any(one.kernel.name == backend for one in meant):
        return
    check_backend_name(backend)
    specs = [one.spec for one in meant]
    schemes = ", ".join(sorted({spec.scheme for spec in specs}))
    kernels = kernels_for(specs[0].device)
    forced = next((kernel for kernel in kernels if kernel.name == backend), None)
    refusals = (forced.refuses(spec) for spec in specs) if forced is not None else (f"it is no kernel of {platform_of(specs[0].device)}",)
    reasons = "; ".join(dict.fromkeys(reason for reason in refusals if reason is not None))
    taking = " or ".join(kernel.name for kernel in kernels if not kernel.is_reference and _takes_one(kernel, specs))
    raise ValueError(
        f"--linear-backend {backend} is made for none of this model's {'quantized ' if quantized else ''}linears ({schemes}): {reasons}. "
        f"Leave the option out{f', or give {taking}' if taking else ''}"
    )


def _takes_one(kernel: type[LinearKernel], specs: list[LinearSpec]) -> bool:
    return any(kernel.refuses(spec) is None for spec in specs)


def _refusals(built: BuiltKernel) -> tuple[Refusal, ...]:
    made_for_it = {kernel.name for kernel in kernels_for(built.spec.device) if kernel.takes(built.spec.form)}
    return tuple(Refusal(name, reason, name in made_for_it) for name, reason in built.selection.refusals)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}"


def _column(title: str, cells: list[str], *, left: bool) -> list[str]:
    """Title and cells, padded to one width."""
    width = max(map(len, (title, *cells)))
    return [cell.ljust(width) if left else cell.rjust(width) for cell in (title, *cells)]


def _wrapped(text: str) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
