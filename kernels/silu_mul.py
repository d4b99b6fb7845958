"""The gated activation of Llama's MLP: silu(gate) * up. https://arxiv.org/abs/2002.05202"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .gpu.device import is_gpu


@functools.cache
def _on_cpu() -> Callable[..., None]:
    """The CPU kernel, imported at the first call."""
    from .cpu.elementwise import silu_mul as on_cpu

    return on_cpu


@functools.cache
def _on_gpu() -> Callable[..., Callable[[], None]]:
    """The kernel for NVIDIA GPUs, imported at the first call."""
    from .gpu.elementwise import launch_silu_mul as on_gpu

    return on_gpu


def silu_mul(gate_up: Tensor, *, out: Tensor) -> Tensor:
    """out [T, I] = silu(gate_up[:, :I]) * gate_up[:, I:], gate_up [T, 2 * I] of out's dtype; rows may be strided. Returns out."""
    rows, width = gate_up.shape
    if width % 2 or out.shape != (rows, width // 2) or out.dtype != gate_up.dtype:
        got = f"{gate_up.dtype} {tuple(gate_up.shape)} and {out.dtype} {tuple(out.shape)}"
        raise ValueError(f"gate_up [T, 2 * I] and out [T, I] must be of one dtype, not {got}")
    if gate_up.stride()[1] != 1 or out.stride()[1] != 1:
        raise ValueError(f"rows must be contiguous, strides are {gate_up.stride()} and {out.stride()}")
    if is_gpu(gate_up.device):
        if rows:
            _on_gpu()(gate_up, out)()
        return out
    if gate_up.is_cpu and gate_up.dtype == torch.float32:
        _on_cpu()(gate_up, out)
        return out
    return out.copy_(reference(gate_up))


def reference(gate_up: Tensor) -> Tensor:
    """The same in float32 torch, rounded to gate_up's dtype at the end."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
