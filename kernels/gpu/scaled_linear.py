"""x @ W.T of fp8 or int8 codes on tensor cores. The contract stands in kernels/scaled_linear.py.

Two kernels. `split`: weights on the side of the matrix units that wants 64 rows or more, tokens on the other, K cut into parts so that
few tokens keep every multiprocessor reading weights; any architecture. `stream`: one block a multiprocessor walks over large tiles
that descriptors bring in; sm_90 and newer, many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..scaled_linear import ScaledWeight
from .config import Tile, tile_for
from .device import Device
from .launch import Launch
from .split_k import add_parts, parts_of, workspace_bytes
from .workspace import Workspace

ALIGNMENT = 16  # bytes that a row of codes is padded to, so that loads are 16 bytes wide and descriptors may describe it


@triton.jit
def _split(
    x, x_scale, w, w_scale, bias, y, parts, arrived,
    m, n, k, x_stride, x_scale_stride, w_stride, w_scale_stride, y_stride, num_parts, steps_each,
    X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_INT: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = rows < m, features < n
    # Beyond the edge the last row is read again: no mask in the loop, and nothing of it is stored.
    rows_read, features_read = tl.minimum(rows, m - 1).to(tl.int64), tl.minimum(features, n - 1).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    x_at = x + rows_read[:, None] * x_stride + depth[None, :]
    w_at = w + features_read[:, None] * w_stride + depth[None, :]
    x_scale_at = x_scale + rows_read * x_scale_stride
    w_scale_at = w_scale + features_read // W_ROWS
    begin = part * steps_each
    end = tl.minimum(begin + steps_each, tl.cdiv(k, BLOCK_K))
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if IS_INT and not GROUPED else tl.float32)
    for step in range(begin, end):
        start = step * BLOCK_K
        if EVEN_K:
            x_codes = tl.load(x_at + start)
            w_codes = tl.load(w_at + start)
        else:
            inside = (start + depth < k)[None, :]
            x_codes = tl.load(x_at + start, mask=inside, other=0.0)
            w_codes = tl.load(w_at + start, mask=inside, other=0.0)
        if GROUPED:
            product = tl.dot(w_codes, tl.trans(x_codes), out_dtype=tl.int32 if IS_INT else tl.float32)
            scale = tl.load(w_scale_at + start // W_GROUP * w_scale_stride)[:, None] * tl.load(x_scale_at + start // X_GROUP)[None, :]
            total += product.to(tl.float32) * scale
        else:
            total = tl.dot(w_codes, tl.trans(x_codes), total, out_dtype=tl.int32 if IS_INT else tl.float32)
    total = total.to(tl.float32)
    if SPLIT:
        tile = tile_n * tl.num_programs(0) + tile_m
        total, is_last = add_parts(total, parts, arrived, tile, part, num_parts, BLOCK_N, BLOCK_M)
        if not is_last:
            return
    if not GROUPED:
        total = total * tl.load(w_scale_at)[:, None] * tl.load(x_scale_at)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + features_read).to(tl.float32)[:, None]
    out = tl.trans(total).to(y.dtype.element_ty)
    tl.store(y + rows.to(tl.int64)[:, None] * y_stride + features[None, :], out, mask=inside_m[:, None] & inside_n[None, :])


@triton.jit
def _stream(
    x, x_scale, w, w_scale, bias, y,
    m, n, k, x_scale_stride, w_scale_stride, y_stride, num_blocks,
    X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_INT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES_ASIDE: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, num_blocks, flatten=not GROUPED):
        # TILES_ASIDE rows of tiles are taken together, so that blocks that run at the same time share weights in the cache.
        band = tile // (TILES_ASIDE * tiles_n)
        aside = tl.minimum(tiles_m - band * TILES_ASIDE, TILES_ASIDE)
        within = tile - band * TILES_ASIDE * tiles_n
        first_row = (band * TILES_ASIDE + within % aside) * BLOCK_M
        first_feature = (within // aside) * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_M)
        features = first_feature + tl.arange(0, BLOCK_N)
        rows_read, features_read = tl.minimum(rows, m - 1).to(tl.int64), tl.minimum(features, n - 1).to(tl.int64)
        x_scale_at = x_scale + rows_read * x_scale_stride
        w_scale_at = w_scale + features_read // W_ROWS
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if IS_INT and not GROUPED else tl.float32)
        for step in range(steps):
            start = step * BLOCK_K
            x_codes = x.load([first_row, start])
            w_codes = w.load([first_feature, start])
            if GROUPED:
                product = tl.dot(x_codes, w_codes.T, out_dtype=tl.int32 if IS_INT else tl.float32)
                scale = tl.load(x_scale_at + start // X_GROUP)[:, None] * tl.load(w_scale_at + start // W_GROUP * w_scale_stride)[None, :]
                total += product.to(tl.float32) * scale
            else:
                total = tl.dot(x_codes, w_codes.T, total, out_dtype=tl.int32 if IS_INT else tl.float32)
        total = total.to(tl.float32)
        if not GROUPED:
            total = total * tl.load(x_scale_at)[:, None] * tl.load(w_scale_at)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + features_read).to(tl.float32)[None, :]
        # Two halves: the exchange between threads before a store then takes half the shared memory.
        low, high = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        half = tl.arange(0, BLOCK_N // 2)
        y_at = y + rows.to(tl.int64)[:, None] * y_stride + (first_feature + half)[None, :]
        inside_m = (rows < m)[:, None]
        tl.store(y_at, low.to(y.dtype.element_ty), mask=inside_m & (first_feature + half < n)[None, :])
        tl.store(y_at + BLOCK_N // 2, high.to(y.dtype.element_ty), mask=inside_m & (first_feature + BLOCK_N // 2 + half < n)[None, :])


@dataclass(frozen=True, eq=False)
class Packed:
    """Codes [N, K'] with K padded by zeros to whole 16 bytes; scale float32 [ceil(K / group), ceil(N / rows)], neighbours in N together."""

    codes: Tensor
    scale: Tensor
    rows: int
    group: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def op(self) -> str:
        """The operation's name in the tables of tiles."""
        kind = "int8" if self.codes.dtype == torch.int8 else "fp8"
        return kind if self.group >= self.in_features else f"{kind}_grouped"


def pack(weight: ScaledWeight) -> Packed:
    """Pack once, at load."""
    codes, k = weight.codes.contiguous(), weight.codes.shape[1]
    if k % ALIGNMENT:
        padded = torch.zeros(codes.shape[0], padded_inputs(k), dtype=torch.uint8, device=codes.device)
        padded[:, :k] = codes.view(torch.uint8)
        codes = padded.view(codes.dtype)
    return Packed(codes, weight.scale.t().contiguous(), weight.rows, weight.group, k)


def padded_inputs(k: int) -> int:
    """Columns of quantized inputs and weights in memory."""
    return -(-k // ALIGNMENT) * ALIGNMENT


def refuses(*, in_features: int, x_group: int, w_group: int) -> str | None:
    """Why such a linear cannot be computed here; None when it can."""
    sizes = {size for size in (x_group, w_group) if size < in_features}
    small = [size for size in sizes if size % 32]
    return f"groups of inputs must be multiples of 32, not {', '.join(map(str, small))}" if small else None


def launch(
    x: Tensor, x_scale: Tensor, x_group: int, weight: Packed, bias: Tensor | None, out: Tensor, *, device: Device, workspace: Workspace
) -> Launch:
    """The launch that fills `out` [M, N].

    x [M, K'] codes of the weight's dtype, their padding zero; x_scale float32 [M, ceil(K / x_group)], or [1, 1] for all; out bfloat16,
    float16 or float32, rows may be strided. M is at least 1.
    """
    tile = tile_for(device, weight.op, x.shape[0])
    return _launch(tile, x, x_scale, x_group, weight, bias, out, device=device, workspace=workspace)


def _launch(
    tile: Tile, x: Tensor, x_scale: Tensor, x_group: int, weight: Packed, bias: Tensor | None, out: Tensor, *, device: Device,
    workspace: Workspace,
) -> Launch:  # fmt: skip
    m, (n, k) = x.shape[0], weight.codes.shape
    grouped = min(x_group, weight.group) < weight.in_features
    block_k = tile.block_k
    if grouped:
        block_k = _step_within(block_k, x_group, weight)
    options: dict[str, Any] = {
        "X_GROUP": x_group if grouped else 0, "W_GROUP": weight.group if grouped else 0, "W_ROWS": weight.rows, "GROUPED": grouped,
        "HAS_BIAS": bias is not None,
        "IS_INT": weight.codes.dtype == torch.int8, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": block_k,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    x_scale_stride = x_scale.stride(0) if x_scale.shape[0] > 1 or m == 1 else 0
    if tile.route == "stream":
        x_tiles = TensorDescriptor(x, [m, k], [x.stride(0), 1], [tile.block_m, block_k])
        w_tiles = TensorDescriptor(weight.codes, [n, k], [k, 1], [tile.block_n, block_k])
        num_blocks = min(device.num_sms, -(-m // tile.block_m) * -(-n // tile.block_n))
        args = (
            x_tiles, x_scale, w_tiles, weight.scale, bias, out,
            m, n, k, x_scale_stride, weight.scale.stride(0), out.stride(0), num_blocks,
        )  # fmt: skip
        return Launch(_stream, (num_blocks,), args, {**options, "TILES_ASIDE": 8})
    steps = -(-k // block_k)
    num_parts, tiles = parts_of(tile, device, m, n, k, steps=steps)
    steps_each = -(-steps // num_parts)
    scratch = workspace.take("parts", workspace_bytes(tiles=tiles, num_parts=num_parts, block_m=tile.block_m, block_n=tile.block_n))
    parts: tuple[Any, ...] = (
        x, x_scale, weight.codes, weight.scale, bias, out, scratch.view(torch.float32), workspace.arrived,
        m, n, k, x.stride(0), x_scale_stride, weight.codes.stride(0), weight.scale.stride(0), out.stride(0), num_parts, steps_each,
    )  # fmt: skip
    grid = (-(-m // tile.block_m), -(-n // tile.block_n), num_parts)
    return Launch(_split, grid, parts, {**options, "SPLIT": num_parts > 1, "EVEN_K": k % block_k == 0})


def _step_within(block_k: int, x_group: int, weight: Packed) -> int:
    """The largest step, a power of two up to `block_k`, that lies within one group on both sides."""
    sizes = [size for size in (x_group, weight.group) if size < weight.in_features]
    while any(size % block_k for size in sizes):
        block_k //= 2
    return block_k
