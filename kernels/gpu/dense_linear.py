"""x @ W.T with weights of 16 bits, one tile and one order of sums whatever the number of rows: for runs that have to repeat to the bit.

torch's matmul chooses its algorithm by the number of rows, and is faster; so this serves where `Device.fixed_rows` is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Tile, tile_for
from .device import Device
from .launch import Launch
from .split_k import add_parts, parts_of, workspace_bytes
from .workspace import Workspace

OP = "dense"


@triton.jit
def _dense(
    x, w, bias, y, parts, arrived, m, n, k, x_stride, w_stride, y_stride, num_parts, steps_each,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    x_at = x + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * x_stride + step[None, :]
    w_at = w + tl.minimum(features, n - 1).to(tl.int64)[:, None] * w_stride + step[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * steps_each
    for index in range(first, tl.minimum(first + steps_each, tl.cdiv(k, BLOCK_K))):
        start = index * BLOCK_K
        if EVEN_K:
            x_values, w_values = tl.load(x_at + start), tl.load(w_at + start)
        else:
            inside = (step < k - start)[None, :]
            x_values, w_values = tl.load(x_at + start, mask=inside, other=0.0), tl.load(w_at + start, mask=inside, other=0.0)
        total = tl.dot(x_values, tl.trans(w_values), total)
    if SPLIT:
        total, is_last = add_parts(total, parts, arrived, tile_n * tl.num_programs(0) + tile_m, part, num_parts, BLOCK_M, BLOCK_N)
        if not is_last:
            return
    if HAS_BIAS:
        total += tl.load(bias + tl.minimum(features, n - 1)).to(tl.float32)[None, :]
    inside = (rows < m)[:, None] & (features < n)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * y_stride + features[None, :], total.to(y.dtype.element_ty), mask=inside)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, device: Device, workspace: Workspace) -> Launch:
    """The launch that fills `out` [M, N] from x [M, K] and weight [N, K], both bfloat16 or float16; rows may be strided.

    Raises ValueError for more rows than there are counters for.
    """
    return launch_tile(tile_for(device, OP, x.shape[0]), x, weight, bias, out, device=device, workspace=workspace)


def launch_tile(tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, device: Device, workspace: Workspace) -> Launch:
    """`launch` with a tile of the caller's."""
    (m, k), n = x.shape, weight.shape[0]
    steps = -(-k // tile.block_k)
    num_parts, tiles = parts_of(tile, device, m, n, k, steps=steps)
    scratch = workspace.take("parts", workspace_bytes(tiles=tiles, num_parts=num_parts, block_m=tile.block_m, block_n=tile.block_n))
    args = (
        x, weight, bias, out, scratch.view(torch.float32), workspace.arrived, m, n, k,
        x.stride(0), weight.stride(0), out.stride(0), num_parts, -(-steps // num_parts),
    )  # fmt: skip
    options = {
        "HAS_BIAS": bias is not None, "SPLIT": num_parts > 1, "EVEN_K": k % tile.block_k == 0, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    return Launch(_dense, (-(-m // tile.block_m), -(-n // tile.block_n), num_parts), args, options)
