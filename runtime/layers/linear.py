"""ParallelLinear: a linear of the model, perhaps fused from several checkpoint modules and split over ranks. Knows no format's bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...kernels.quantize_rows import quantize_rms_norm, quantize_silu_mul
from ...kernels.rms_norm import add_rms_norm, rms_norm
from ...kernels.silu_mul import silu_mul
from ...quant.build import BuiltKernel, Part, build_kernels
from ...quant.checkpoint.errors import CheckpointError
from ...quant.linear import legal_cuts
from ...quant.schemes.base import Module, Slice, contradicted_symmetry
from ...quant.schemes.registry import scheme_of
from ..weights import WeightSource
from .parallel import TensorParallelGroup

Split = Literal["out", "in", "vocabulary"]


@dataclass(frozen=True)
class LinearShape:
    """A linear as the checkpoint has it, before it is split: `sources` are module names, `parts` their output sizes.

    `copies`: on how many ranks the same slice of a part lies, where there are more ranks than it has heads.
    """

    name: str
    sources: tuple[str, ...]
    in_features: int
    parts: tuple[int, ...]
    has_bias: bool
    split: Split
    copies: tuple[int, ...] = ()

    def copies_of(self, part: int) -> int:
        return self.copies[part] if self.copies else 1


class ParallelLinear:
    """y = x @ W.T (+ b) through the kernels that the registry chose. Split along "in", the ranks' results are summed.

    There is one kernel, but where the fused modules are stored in ways that cannot be multiplied together.
    """

    def __init__(self, shape: LinearShape, source: WeightSource, group: TensorParallelGroup) -> None:
        self.shape = shape
        self._group = group
        parts = [self._read(index, source) for index in range(len(shape.parts))]
        self.kernels: tuple[BuiltKernel, ...] = build_kernels(
            shape.name,
            parts,
            weight_dtype=source.weight_dtype,
            activation_dtype=source.activation_dtype,
            device=source.device,
            options=source.kernel_options,
        )
        self._only = self.kernels[0].kernel if len(self.kernels) == 1 else None

    @property
    def in_features(self) -> int:
        return self.kernels[0].spec.in_features

    @property
    def out_features(self) -> int:
        return self.kernels[-1].stop

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take as held."""
        return sum(built.kernel.weight_bytes for built in self.kernels)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """W[indices] of an unfused linear, in the activation dtype."""
        assert self._only is not None
        return self._only.rows(indices)

    def after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, normed: torch.Tensor, *, out: torch.Tensor
    ) -> torch.Tensor:
        """The linear of rms_norm(x), or with a residual of rms_norm(residual += x); in one pass with the rounding, where it takes codes.

        `normed` is room for what goes in.
        """
        codes = self._only.input_codes if self._only is not None else None
        if codes is None:
            if residual is None:
                rms_norm(x, weight, eps, out=normed)
            else:
                add_rms_norm(x, residual, weight, eps, out=normed)
            return self(normed, out=out)
        assert self._only is not None
        rows = self._only.room(x.shape[0])
        quantize_rms_norm(x, weight, eps, rows, residual=residual, static_scale=codes.static_scale)
        return self._summed(self._only.multiply_codes(rows, out=out))

    def after_gate(self, gate_up: torch.Tensor, activated: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """The linear of silu_mul(gate_up); `activated` is room for what goes in."""
        codes = self._only.input_codes if self._only is not None else None
        if codes is None:
            return self(silu_mul(gate_up, out=activated), out=out)
        assert self._only is not None
        rows = self._only.room(gate_up.shape[0])
        quantize_silu_mul(gate_up, rows, static_scale=codes.static_scale)
        return self._summed(self._only.multiply_codes(rows, out=out))

    def _summed(self, out: torch.Tensor) -> torch.Tensor:
        return self._group.all_reduce(out) if self.shape.split == "in" else out

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        if self._only is not None:
            self._only(x, out=out)
        else:
            for built in self.kernels:
                built.kernel(x, out=out[:, built.start : built.stop])
        return self._summed(out)

    def _read(self, index: int, source: WeightSource) -> Part:
        """One module's slice, in canonical form."""
        name, size, inputs = self.shape.sources[index], self.shape.parts[index], self.shape.in_features
        module = stored_module(self.shape, index, source)
        stored, scheme = module.format, scheme_of(module.format)
        specs = scheme.create_weights(module)
        part = self._slice(index)
        tensors = {}
        for spec in specs:
            tensor = source.read_for_linear(name, spec, part, (size, inputs))
            if tensor is not None:
                tensors[spec.name] = tensor
        if "bias" in tensors and self.shape.split == "in" and self._group.rank > 0:
            tensors["bias"] = torch.zeros_like(tensors["bias"])  # added once, by the first rank
        try:
            weights = scheme.to_canonical(tensors, module, part)
        except ValueError as error:
            raise CheckpointError(f"{name} in {source.file_of(name)} ({stored.describe()}): {error}") from error
        form, fault = scheme.form(module), contradicted_symmetry(weights, stored)
        if fault is not None:
            source.formats.warn_of_zero_points(f"{name} in {source.file_of(name)}: {fault}")
            form = replace(form, symmetric=False)
        return Part(weights, form, stored.describe())

    def _slice(self, index: int) -> Slice:
        """This rank's part of a module, which can be cut so (`check_cut`)."""
        size, inputs, split, group = self.shape.parts[index], self.shape.in_features, self.shape.split, self._group
        if group.size == 1:
            return Slice(0, size, 0, inputs)
        if split == "vocabulary":
            return Slice(*group.vocabulary(size), 0, inputs)
        copies = self.shape.copies_of(index)
        ranks, rank = group.size // copies, group.rank // copies
        total = size if split == "out" else inputs
        start, stop = rank * (total // ranks), (rank + 1) * (total // ranks)
        return Slice(start, stop, 0, inputs) if split == "out" else Slice(0, size, start, stop)


def stored_module(shape: LinearShape, index: int, source: WeightSource) -> Module:
    """How one of a linear's modules is stored, whole."""
    name, size, inputs = shape.sources[index], shape.parts[index], shape.in_features
    stored = source.formats.of(name, in_features=inputs, out_features=size)
    # Old GPTQ files have biases that the model's config does not speak of.
    has_bias = shape.has_bias or (stored.layout != "dense" and source.has(f"{name}.bias"))
    return Module(stored, inputs, size, has_bias, source.weight_dtype)


def can_be_cut(shape: LinearShape, ranks: int, source: WeightSource) -> bool:
    """Whether every rank of `ranks` can hold an equal part of a linear, in the way it is stored."""
    if shape.split == "vocabulary":
        return True
    for index, size in enumerate(shape.parts):
        module = stored_module(shape, index, source)
        specs = scheme_of(module.format).create_weights(module)
        legal = legal_cuts(specs, "out", size) if shape.split == "out" else legal_cuts(specs, "in", shape.in_features)
        parts = ranks // shape.copies_of(index)
        if parts > 1 and parts not in legal:
            return False
    return True
