"""LinearReport: which kernel computes which linears, and why none faster. Knows names and reasons, and no tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..quant.platforms import kernel_names
from .layers.linear import ParallelLinear


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
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LinearReport:
    """The table behind `--explain-quant`. `method` is the checkpoint's, or the one applied while loading; None for a dense model."""

    method: str | None
    groups: tuple[LinearGroup, ...]

    @classmethod
    def of(cls, linears: Iterable[ParallelLinear], method: str | None) -> LinearReport:
        """The report of a model's linears."""
        found: dict[tuple[Any, ...], LinearGroup] = {}
        for linear in linears:
            for built in linear.kernels:
                spec, refused = built.spec, built.selection.refusals
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
        return cls(method, tuple(found.values()))

    def check_backend(self, backend: str | None) -> None:
        """Raises ValueError when a forced backend does not exist here or computes none of the linears."""
        if backend is None or any(group.kernel == backend for group in self.groups):
            return
        known = kernel_names()
        if backend not in known:
            raise ValueError(f"--linear-backend {backend} is not valid: give one of {', '.join(known)}")
        forms = ", ".join(sorted({group.scheme for group in self.groups}))
        raise ValueError(f"--linear-backend {backend} is made for none of this model's linears ({forms}): leave the option out")

    def summary(self) -> str:
        """One line: "Linears (awq): 120 on cpu_grouped, 1 on cpu_packed_panels; 68.4 MiB"."""
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.kernel] = counts.get(group.kernel, 0) + group.count
        size = sum(group.weight_bytes for group in self.groups) / (1 << 20)
        where = ", ".join(f"{count} on {name}" for name, count in counts.items())
        return f"Linears ({self.method or 'dense'}): {where}; {size:.1f} MiB"

    def advice(self, device: str) -> str | None:
        """For a dense model, one line on what quantizing would gain."""
        if self.method is not None:
            return None
        dense = sum(group.weight_bytes for group in self.groups) / (1 << 20)
        layers = sum(group.weight_bytes for group in self.groups if "*" in group.layers) / (1 << 20)
        width = {"cpu": "with whole-number products at any number of rows"}.get(device, "less memory to read a token")
        smaller = dense - layers / 2
        return (
            f"Served dense, as the checkpoint is. --quantization int8 or fp8 would hold about {smaller:.0f} MiB of weights for these "
            f"{dense:.0f} (int8 {width}); `octavo quantize` makes 4-bit checkpoints with the loss measured"
        )

    def table(self) -> str:
        """For people: every group with its kernel, and below it who refused and why."""
        lines = [f"Quantization: {self.method or 'none (dense)'}"]
        for group in self.groups:
            lines.append(
                f"  {group.count} x {group.layers}  [{group.out_features} x {group.in_features}]  {group.scheme}  ->  {group.kernel}"
                f"  ({group.weight_bytes / (1 << 20):.1f} MiB)"
            )
            lines += [f"      not {name}: {reason}" for name, reason in group.refused]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For /server_info: {"method": ..., "layers": [...]}."""
        return {
            "method": self.method,
            "layers": [
                {**asdict(group), "refused": [{"kernel": name, "reason": reason} for name, reason in group.refused]}
                for group in self.groups
            ],
        }
