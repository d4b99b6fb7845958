"""x @ W.T in whole numbers: int8 weights with one scale a row of W, inputs quantized on the way. The contract and its reference.

    y[m, n] = (sum over k of xq[m, k] * wq[n, k]) * x_scale[m] * w_scale[n] + bias[n]

Inputs are quantized per token, `x_scale = max|x| / limit` and `xq = round(x / x_scale)` (ties to even), with limit 127; or with one
static scale and saturation at -128 and 127. With limit `wide_limit(K)` inputs are 16-bit integers: that costs nothing on CPUs that
multiply int8 by way of 16 bits, and loses next to nothing where a few large inputs would coarsen all others. A row of zeros has scale
0 and gives the bias; a row with a NaN or an infinity gives NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide_limit(in_features: int) -> int:
    """The greatest code of inputs as 16-bit integers: as wide as 32-bit sums of `in_features` products with int8 weights allow."""
    return min(32767, (2**31 - 1) // (128 * in_features))


def quantize(x: Tensor, static_scale: float | None = None, *, limit: int = 127) -> tuple[Tensor, Tensor]:
    """Codes int16 [M, K] of at most `limit` and scales float32 [M] of x [M, K]."""
    x = x.float()
    if static_scale is not None:
        scale = torch.full((x.shape[0],), static_scale)
        codes = torch.round(x / static_scale).clamp(-limit - 1, limit)
        scale = torch.where(x.isfinite().all(1), scale, torch.nan)
        return codes.nan_to_num(0.0).to(torch.int16), scale
    scale = x.abs().amax(1) / limit
    scale = torch.where(x.isfinite().all(1), scale, torch.nan)
    safe = torch.where(scale > 0, scale, 1.0)
    codes = torch.round(x / safe[:, None])
    return torch.where((scale > 0)[:, None], codes, 0.0).to(torch.int16), scale


def reference(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    static_scale: float | None = None,
    limit: int = 127,
) -> Tensor:
    """out[M, N] of x float [M, K], codes int8 [N, K], w_scale float32 [N], bias [N]; the sum is exact."""
    x_codes, x_scale = quantize(x, static_scale, limit=limit)
    total = x_codes.double() @ codes.double().T
    value = total * x_scale.double()[:, None] * w_scale.double()
    return out.copy_(value if bias is None else value + bias.double())
