"""Root-mean-square normalization of rows, alone or after adding a residual. https://arxiv.org/abs/1910.07467"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .gpu.device import is_gpu


@functools.cache
def _on_cpu() -> Callable[..., None]:
    """The CPU kernel, imported at the first call."""
    from .cpu.elementwise import rms_norm as on_cpu

    return on_cpu


@functools.cache
def _on_gpu() -> Callable[..., Callable[[], None]]:
    """The kernel for NVIDIA GPUs, imported at the first call."""
    from .gpu.elementwise import launch_rms_norm as on_gpu

    return on_gpu


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """out = x / sqrt(mean(x ** 2) + eps) * weight, by rows; returns out, which may be x.

    x and out [T, H] of one dtype, rows may be strided; weight [H], float32 where x is float32 on the CPU.
    """
    _check(x, weight, out)
    if is_gpu(x.device):
        if x.shape[0]:
            _on_gpu()(x, weight, eps, out)()
        return out
    if x.is_cpu and x.dtype == torch.float32:
        _on_cpu()(x, None, weight, eps, out)
        return out
    return out.copy_(rms_norm_reference(x, weight, eps))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """residual += x in place, then out = rms_norm(residual); returns out, which may be x. Shapes as for `rms_norm`."""
    _check(x, weight, out)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride()[1] != 1:
        raise ValueError(f"residual must be like x, {x.dtype} {tuple(x.shape)}, not {residual.dtype} {tuple(residual.shape)}")
    if is_gpu(x.device):
        if x.shape[0]:
            _on_gpu()(x, weight, eps, out, residual=residual)()
        return out
    if x.is_cpu and x.dtype == torch.float32:
        _on_cpu()(x, residual, weight, eps, out)
        return out
    residual.add_(x)
    return out.copy_(rms_norm_reference(residual, weight, eps))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in float32 torch, rounded to x's dtype at the end."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _check(x: Tensor, weight: Tensor, out: Tensor) -> None:
    shape, dtype = x.shape, x.dtype
    if len(shape) != 2 or out.shape != shape or out.dtype != dtype:
        raise ValueError(f"x and out must be [T, H] of one dtype, not {dtype} {tuple(shape)} and {out.dtype} {tuple(out.shape)}")
    if weight.shape != shape[1:] or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{shape[1]}], not {tuple(weight.shape)}")
    if x.stride()[1] != 1 or out.stride()[1] != 1:
        raise ValueError(f"rows must be contiguous, strides are {x.stride()} and {out.stride()}")
    if dtype == torch.float32 and weight.dtype != dtype and x.is_cpu:
        raise ValueError(f"float32 rows on the CPU want a float32 weight, not {weight.dtype}")
