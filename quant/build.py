"""From the parts of a linear to the kernels that compute it: fuse what has one form, choose, refuse the silent reference, check.

Knows no checkpoint, no rank and no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..kernels.grouped_linear import GroupedWeight, concatenate
from .linear import LinearKernel, LinearSpec, LinearWeights, NoKernel, Selection, WeightForm, select_kernel
from .platforms import kernels_for
from .self_check import SelfCheck


@dataclass(frozen=True)
class KernelOptions:
    """What a user may ask of the choice. `self_check` None: kernels are not checked against the reference.

    `deterministic`: of kernels that give a row the same bits however many rows there are.
    """

    backend: str | None = None
    allow_reference: bool = False
    self_check: SelfCheck | None = None
    deterministic: bool = False


@dataclass(frozen=True, eq=False)
class Part:
    """One unfused module's weights, what they are for a kernel, and for people."""

    weights: LinearWeights
    form: WeightForm
    scheme: str


@dataclass(frozen=True, eq=False)
class BuiltKernel:
    """A kernel for output features start..stop of a layer, and how it was chosen."""

    kernel: LinearKernel
    start: int
    stop: int
    spec: LinearSpec
    selection: Selection


def build_kernels(
    name: str,
    parts: list[Part],
    *,
    weight_dtype: torch.dtype,
    activation_dtype: torch.dtype,
    device: torch.device,
    options: KernelOptions,
) -> tuple[BuiltKernel, ...]:
    """Kernels for a layer fused from `parts`, in order: one where all parts have one form, else one for each run that has.

    Raises NoKernel when none takes a part, or only the reference on a device that has a kernel for such weights.
    """
    built: list[BuiltKernel] = []
    start = 0
    for part in _fuse(parts):
        weight = part.weights.weight
        rows, inputs = (weight.out_features, weight.in_features) if isinstance(weight, GroupedWeight) else weight.shape
        spec = LinearSpec(
            name=name,
            in_features=inputs,
            out_features=rows,
            has_bias=part.weights.bias is not None,
            weight_dtype=weight_dtype,
            device=device,
            activation_dtype=activation_dtype,
            form=part.form,
            scheme=part.scheme,
            deterministic=options.deterministic,
        )
        selection = choose_kernel(spec, options)
        kernel = selection.kernel(spec, part.weights)
        if options.self_check is not None:
            options.self_check(kernel, spec, part.weights)
        built.append(BuiltKernel(kernel, start, start + rows, spec, selection))
        start += rows
    return tuple(built)


def choose_kernel(spec: LinearSpec, options: KernelOptions) -> Selection:
    """The kernel for a layer. Raises NoKernel, see build_kernels."""
    kernels = kernels_for(spec.device)
    selection = select_kernel(spec, kernels, backend=options.backend)
    made_for_it = [kernel.name for kernel in kernels if not kernel.is_reference and kernel.takes(spec.form)]
    if selection.kernel.is_reference and made_for_it and not options.allow_reference:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in selection.refusals if name in made_for_it)
        raise NoKernel(
            f"{spec.name} ({spec.out_features} x {spec.in_features}, {spec.scheme}) would run on the slow float reference"
            f"{f' ({reasons})' if reasons else ''}: give --allow-reference to serve it so"
        )
    return selection


def _fuse(parts: list[Part]) -> list[Part]:
    fused = [parts[0]]
    for part in parts[1:]:
        joined = _join(fused[-1], part)
        if joined is None:
            fused.append(part)
        else:
            fused[-1] = joined
    return fused


def _join(first: Part, second: Part) -> Part | None:
    """Two parts as one; None when a kernel could not compute them together."""
    if replace(first.form, group_size=None) != replace(second.form, group_size=None):
        return None
    a, b = first.weights, second.weights
    if (a.input_scale is None) != (b.input_scale is None):
        return None
    if a.input_scale is not None and b.input_scale is not None and not torch.equal(a.input_scale, b.input_scale):
        return None
    if isinstance(a.weight, GroupedWeight) and isinstance(b.weight, GroupedWeight):
        weight: torch.Tensor | GroupedWeight | None = concatenate([a.weight, b.weight])
    elif isinstance(a.weight, torch.Tensor) and isinstance(b.weight, torch.Tensor):
        weight = torch.cat([a.weight, b.weight])
    else:
        weight = None
    if weight is None:
        return None
    bias = None
    if a.bias is not None or b.bias is not None:
        biases = [part.bias if part.bias is not None else torch.zeros(part.out_features) for part in (a, b)]
        bias = torch.cat([tensor.to(torch.promote_types(biases[0].dtype, biases[1].dtype)) for tensor in biases])
    scheme = first.scheme if first.scheme == second.scheme else f"{first.scheme} | {second.scheme}"
    return Part(LinearWeights(weight, bias, a.input_scale), first.form, scheme)
