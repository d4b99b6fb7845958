"""SelfCheck: each kind of kernel is run once on random input, at load, against the float reference. Knows no checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch

from .linear import LinearKernel, LinearSpec, LinearWeights
from .reference_kernel import FloatReference

_FEATURES = 512  # output features compared at most
_ROWS = (1, 7)  # few and many: kernels take different ways
# Error relative to the reference's norm. Whole-number inputs may round to another code where a sum of float operations differs.
_FLOAT_BOUND = 1e-4
_ROUNDED_BOUND = 2e-2


class KernelFault(RuntimeError):
    """A kernel computes something else than the float reference; the text names the layer and what to do."""


class WeightFault(ValueError):
    """A layer's weights are no numbers, whatever computes it; the text names the layer and what to do."""


class SelfCheck:
    """Remembers which kinds were checked: a kernel with one scheme and one shape is run once."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str, int, int, bool]] = set()

    def __call__(self, kernel: LinearKernel, spec: LinearSpec, weights: LinearWeights) -> None:
        """Raises KernelFault for NaN or a mismatch, WeightFault where the reference gives NaN too."""
        kind = (kernel.name, spec.scheme, spec.in_features, spec.out_features, spec.has_bias)
        if kind in self._seen or kernel.is_reference:
            return
        self._seen.add(kind)
        generator = torch.Generator().manual_seed(0)
        # Some output features, the first and the last among them: a vocabulary's head in float32 would not fit everywhere.
        spread = torch.linspace(0, spec.out_features - 1, min(spec.out_features, _FEATURES), dtype=torch.float64).round().long()
        for rows in _ROWS:
            x = torch.randn(rows, spec.in_features, generator=generator).to(device=spec.device, dtype=spec.activation_dtype)
            got = kernel(x, out=x.new_empty(rows, spec.out_features)).float()
            broken = torch.isfinite(got).all(0).logical_not().nonzero().flatten().cpu()[:_FEATURES]
            taken = broken if broken.numel() else spread
            reference = FloatReference(replace(spec, out_features=taken.numel()), weights.take(taken))
            _compare(kernel, spec, got[:, taken.to(spec.device)], reference(x, out=x.new_empty(rows, taken.numel())).float())


def _compare(kernel: LinearKernel, spec: LinearSpec, got: torch.Tensor, wanted: torch.Tensor) -> None:
    where = f"{spec.name} ({spec.out_features} x {spec.in_features}, {spec.scheme}) on kernel {kernel.name}"
    advice = "choose another kernel with --linear-backend, or start with --skip-kernel-check if you know better"
    if not bool(torch.isfinite(wanted).all()):
        raise WeightFault(
            f"{where} gives NaN or infinity in the float reference too: its weights are damaged, download the checkpoint again"
        )
    if not bool(torch.isfinite(got).all()):
        raise KernelFault(f"{where} gives NaN or infinity: {advice}")
    error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    low_precision = max(torch.finfo(spec.activation_dtype).eps, torch.finfo(spec.weight_dtype).eps if spec.form.kind == "dense" else 0.0)
    bound = max(_ROUNDED_BOUND if spec.form.activation is not None else _FLOAT_BOUND, 4 * low_precision)
    if error > bound:
        raise KernelFault(f"{where} is off by {error:.2g} of the result's norm, more than {bound:.2g}: {advice}")
