"""x @ W.T of 8-bit codes with scales on both sides: fp8 (e4m3) or int8, as tensor cores multiply them. The contract and its reference.

    y[m, n] = sum over k of (x_codes[m, k] * x_scale[m, k // x_group]) * (w_codes[n, k] * w_scale[n // w_rows, k // w_group]) + bias[n]

One scale a token and one an output feature is the case of groups as long as K; blocks of 128 x 128 (DeepSeek-V3,
https://arxiv.org/abs/2412.19437) are w_rows = w_group = 128 with x_group = 128. Products within a group are summed before they are
scaled. fp8 sums are float32, int8 sums 32-bit integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CODE_DTYPES = (torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True, eq=False)
class ScaledWeight:
    """codes [N, K] fp8 e4m3 or int8; scale float32 [ceil(N / rows), ceil(K / group)]."""

    codes: Tensor
    scale: Tensor
    rows: int
    group: int

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if self.codes.dtype not in CODE_DTYPES:
            raise ValueError(f"codes must be float8_e4m3fn or int8, not {self.codes.dtype}")
        wanted = (-(-n // self.rows), -(-k // self.group))
        if tuple(self.scale.shape) != wanted or self.scale.dtype != torch.float32:
            raise ValueError(f"scale must be float32 {wanted}, not {self.scale.dtype} {tuple(self.scale.shape)}")

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def dequantize(weight: ScaledWeight, dtype: torch.dtype = torch.float64) -> Tensor:
    """W [N, K]."""
    n, k = weight.codes.shape
    scale = weight.scale.to(dtype).repeat_interleave(weight.rows, 0)[:n].repeat_interleave(weight.group, 1)[:, :k]
    return weight.codes.to(dtype) * scale


def reference(x_codes: Tensor, x_scale: Tensor, x_group: int, weight: ScaledWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """out[M, N] in float64 arithmetic; x_codes [M, K], x_scale [M, ceil(K / x_group)] or [1, 1]."""
    m, k = x_codes.shape
    scale = x_scale.double().expand(m, -1).repeat_interleave(x_group, 1)[:, :k]
    value = (x_codes.double() * scale) @ dequantize(weight).T
    return out.copy_(value if bias is None else value + bias.double())
