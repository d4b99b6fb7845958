"""x @ W.T in whole numbers: int8 weights with one scale a row of W, inputs quantized to int8 on the way. The contract and its reference.

    y[m, n] = (sum over k of xq[m, k] * wq[n, k]) * x_scale[m] * w_scale[n] + bias[n]

Inputs are quantized per token, `x_scale = max|x| / 127` and `xq = round(x / x_scale)` (ties to even), or with one static scale and
saturation at -128 and 127. A row of zeros has scale 0 and gives the bias; a row with a NaN or an infinity gives NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor, static_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scales float32 [M] of x [M, K]."""
    x = x.float()
    if static_scale is not None:
        scale = torch.full((x.shape[0],), static_scale)
        codes = torch.round(x / static_scale).clamp(-128, 127)
        scale = torch.where(x.isnan().any(1), torch.nan, scale)
        return codes.nan_to_num(0.0).to(torch.int8), scale
    scale = x.abs().amax(1) / 127.0
    scale = torch.where(x.isfinite().all(1), scale, torch.nan)
    safe = torch.where(scale > 0, scale, 1.0)
    codes = torch.round(x / safe[:, None])
    return torch.where((scale > 0)[:, None], codes, 0.0).to(torch.int8), scale


def reference(x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor, *, static_scale: float | None = None) -> Tensor:
    """out[M, N] of x float [M, K], codes int8 [N, K], w_scale float32 [N], bias [N]; the sum is exact."""
    x_codes, x_scale = quantize(x, static_scale)
    total = x_codes.double() @ codes.double().T
    value = total * x_scale.double()[:, None] * w_scale.double()
    return out.copy_(value if bias is None else value + bias.double())
