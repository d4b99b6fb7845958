"""The CUDA extension of `autoawq-kernels`, if it is installed: whether it loads here, and unpacks weights as we do. No kernel uses it.

Its wheels are compiled for one release of torch, so with another the import usually fails.
"""

from __future__ import annotations

import importlib

import torch

from ..kernels.grouped_linear import dequantize, from_group_of_column
from .schemes.awq import unpack_awq

MODULE = "awq_ext"
PACKAGE = "autoawq-kernels"

_GROUP, _INPUTS, _OUTPUTS = 64, 128, 128


def extension_fault() -> str | None:
    """Why the extension cannot be used, in one line; None when it loads and dequantizes a small weight as our own code does."""
    try:
        extension = importlib.import_module(MODULE)
    except Exception as error:  # a library compiled for another torch raises ImportError, OSError or worse
        return f"import {MODULE} fails: {_one_line(error)}"
    if not torch.cuda.is_available():
        return f"{MODULE} computes on CUDA devices alone, and torch sees none"
    try:
        return _differs(extension.dequantize_weights_cuda, torch.device("cuda"))
    except Exception as error:
        return f"dequantize_weights_cuda fails: {_one_line(error)}"


def _differs(dequantize_weights, device: torch.device) -> str | None:  # type: ignore[no-untyped-def]
    """What is wrong with AutoAWQ's `dequantize_weights_cuda`, run on random words on `device`; None when it agrees with ours."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(_INPUTS) // _GROUP

    def words(rows: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (rows, _OUTPUTS // 8), generator=generator, dtype=torch.int64).to(torch.int32)

    qweight, qzeros = words(_INPUTS), words(_INPUTS // _GROUP)
    scales = (torch.rand(_INPUTS // _GROUP, _OUTPUTS, generator=generator) * 0.01 + 0.001).to(torch.float16)
    got = dequantize_weights(qweight.to(device), scales.to(device), qzeros.to(device), 0, 0, 0, False).float().cpu()  # [K, N]
    codes, zeros = unpack_awq(qweight).t().contiguous(), unpack_awq(qzeros).t().contiguous()
    wanted = dequantize(from_group_of_column(codes, groups, bits=4, scale=scales.t().contiguous(), zeros=zeros)).t()
    if got.shape != wanted.shape:
        return f"dequantize_weights_cuda gives {tuple(got.shape)} for {tuple(wanted.shape)}"
    error = float((got - wanted).abs().max())
    bound = float(wanted.abs().max()) * 2 * torch.finfo(torch.float16).eps
    return None if error <= bound else f"dequantize_weights_cuda is off by {error:.2g}, more than {bound:.2g}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
