"""ParallelLinear: a linear of the model, perhaps fused from several checkpoint modules and split over ranks. Knows no format's bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...quant.linear import LinearKernel, LinearSpec, Selection, WeightSpec
from ...quant.schemes import unquantized
from ..weights import WeightSource
from .parallel import TensorParallelGroup

Split = Literal["out", "in", "none"]


@dataclass(frozen=True)
class LinearShape:
    """A linear as the checkpoint has it, before it is split: `sources` are module names, `parts` their output sizes."""

    name: str
    sources: tuple[str, ...]
    in_features: int
    parts: tuple[int, ...]
    has_bias: bool
    split: Split


class ParallelLinear:
    """y = x @ W.T (+ b) through the kernel that the registry chose. Split along "in", the ranks' results are summed."""

    def __init__(self, shape: LinearShape, source: WeightSource, group: TensorParallelGroup) -> None:
        self.shape = shape
        self._group = group
        out_split, in_split = (group.size if shape.split == axis else 1 for axis in ("out", "in"))
        self.spec = LinearSpec(
            name=shape.name,
            in_features=shape.in_features // in_split,
            out_features=sum(shape.parts) // out_split,
            has_bias=shape.has_bias,
            weight_dtype=source.weight_dtype,
            device=source.device,
            activation_dtype=source.activation_dtype,
            parts=tuple(part // out_split for part in shape.parts),
        )
        tensors = {weight.name: self._gather(weight, source) for weight in unquantized.create_weights(self.spec).values()}
        self.kernel: LinearKernel
        self.selection: Selection
        self.kernel, self.selection = unquantized.process_weights_after_loading(tensors, self.spec)

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        self.kernel(x, out=out)
        return self._group.all_reduce(out) if self.shape.split == "in" else out

    def _gather(self, weight: WeightSpec, source: WeightSource) -> torch.Tensor:
        """One of the scheme's tensors: this rank's slice of each fused part, joined along the output axis."""
        roles = [axis.role for axis in weight.axes]
        pieces = []
        for module, size in zip(self.shape.sources, self.shape.parts, strict=True):
            whole = tuple(size if role == "out" else self.shape.in_features for role in roles)
            piece = source.read(f"{module}.{weight.name}", whole)
            if self.shape.split in roles:
                piece = self._group.slice_of(piece, roles.index(self.shape.split))
            pieces.append(piece)
        if weight.name == "bias" and self.shape.split == "in" and self._group.rank > 0:
            pieces = [torch.zeros_like(piece) for piece in pieces]  # added once, by the first rank
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=roles.index("out"))
