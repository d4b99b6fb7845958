"""Attention over pages, and the way of keys and values into them: cases and their checks, through the operations that models call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.kernels.paged_attention import paged_attention, plan_attention, reference
from octavo.kernels.pages import CODE_RANGE, quantize, row_width, split_rows, storage_dtype
from octavo.kernels.rope import reference as rope_reference
from octavo.kernels.rope import rope_and_store

from .cases import Dtype, Named
from .checks import ROUNDING, Place, check_case, worst_of
from .data import DTYPES, generator
from .guarded import Guarded

KV = Literal["bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8"]
KV_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8,
}  # fmt: skip
_SPARE = 3  # pages that nobody may read
# What rounding the weights of values may change, relative to what the values' magnitudes would give; and of the result's norm.
_WEIGHTS = {torch.bfloat16: (2.0**-8, 4e-3), torch.float16: (2.0**-10, 1e-3)}
_CODES = (2.0**-7, 5e-3)


@dataclass(frozen=True)
class AttentionCase(Named):
    """One step: queries and contexts of each sequence."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    page_size: int = 16
    kv: KV = "bf16"
    dtype: Dtype = "bf16"
    window: int | None = None
    cap: float | None = None


@dataclass(frozen=True)
class RopeCase(Named):
    """`tokens` new ones; `turned` of each head's elements are rotated."""

    tokens: int
    heads: int = 6
    kv_heads: int = 2
    dim: int = 64
    turned: int = 64
    page_size: int = 16
    kv: KV = "bf16"
    dtype: Dtype = "bf16"
    norms: bool = False
    static: bool = False


@check_case.register
def _(case: AttentionCase, place: Place, tile: object) -> float:
    kind, dtype, device = KV_DTYPES[case.kv], DTYPES[case.dtype], place.device
    source = generator(sum(case.contexts) + case.dim)
    with place.pretended():
        k_pages, v_pages, table = _filled(case, kind, place)
        starts = torch.tensor([0, *itertools.accumulate(case.queries)], dtype=torch.int32)
        tokens, contexts = int(starts[-1]), torch.tensor(case.contexts, dtype=torch.int32)
        q = torch.full((tokens, case.heads * case.dim + 32), math.nan, dtype=dtype)
        q[:, 16:-16] = torch.randn(tokens, case.heads * case.dim, generator=source)
        q = q.to(device)[:, 16:-16].view(tokens, case.heads, case.dim)
        plan = plan_attention(
            starts.to(device), contexts.to(device), table, num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim,
            kv_dtype=kind, num_tokens=tokens,
        )  # fmt: skip
        out = Guarded((tokens, case.heads * case.dim), dtype, stride=case.heads * case.dim + 16, device=device)
        bits = []
        for _ in range(2):
            out.poison()
            paged_attention(
                q, k_pages, v_pages, plan, scale=case.dim**-0.5, sliding_window=case.window, soft_cap=case.cap, kv_dtype=kind,
                out=out.tensor.view(tokens, case.heads, case.dim),
            )  # fmt: skip
            out.check()
            bits.append(out.tensor.clone())
        assert torch.equal(*bits), "a second run gives other bits"
        exact, size = (
            reference(
                q, k_pages, values, plan, scale=case.dim**-0.5, sliding_window=case.window, soft_cap=case.cap, kv_dtype=kind,
                out=torch.empty(tokens, case.heads, case.dim, device=device),
            ).flatten(1)
            for values in (v_pages, _magnitudes(v_pages, kind))
        )  # fmt: skip
    elementwise, by_norm = _CODES if kind in CODE_RANGE else _WEIGHTS[kind]
    found, rounding = out.tensor.double(), ROUNDING[dtype]
    off = float((found - exact).norm() / exact.norm())
    assert off <= by_norm + rounding, f"off by {off:.2g} of the result's norm, allowed {by_norm + rounding:.2g}"
    return worst_of(found, exact.double(), 1.01 * rounding * exact.double().abs() + elementwise * size.double() + 1e-6)


def _filled(case: AttentionCase, kind: torch.dtype, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the table of pages: the sequences' in any order, and NaN wherever nobody may read."""
    needed = [-(-context // case.page_size) for context in case.contexts]
    source = generator(len(case.contexts) + case.dim)
    order = torch.randperm(sum(needed) + _SPARE, generator=source)
    table = torch.full((len(needed), max(needed) + 1), int(order[-1]), dtype=torch.int32)
    shape = (len(order), case.kv_heads, case.page_size, case.dim)
    numbers = [torch.full(shape, math.nan) for _ in range(2)]
    used = 0
    for b, (context, pages) in enumerate(zip(case.contexts, needed, strict=True)):
        table[b, :pages] = order[used : used + pages]
        used += pages
        position = torch.arange(context)
        page, offset = table[b].long()[position // case.page_size], position % case.page_size
        for tensor in numbers:
            tensor[page, :, offset] = torch.randn(context, case.kv_heads, case.dim, generator=source)
    k_pages, v_pages = (stored(tensor.to(place.device), kind) for tensor in numbers)
    return k_pages, v_pages, table.to(place.device)


def stored(numbers: Tensor, kind: torch.dtype) -> Tensor:
    """Pages that hold `numbers`."""
    if kind not in CODE_RANGE:
        return numbers.to(kind)
    pages = torch.zeros(*numbers.shape[:3], row_width(numbers.shape[3], kind), dtype=torch.uint8, device=numbers.device)
    codes, scales = split_rows(pages, kind)
    new_codes, new_scales = quantize(numbers, kind)
    codes.copy_(new_codes)
    scales.copy_(new_scales)
    return pages


def _magnitudes(pages: Tensor, kind: torch.dtype) -> Tensor:
    """Pages of the magnitudes of what others hold."""
    if kind not in CODE_RANGE:
        return pages.abs()
    codes, scales = split_rows(pages, kind)
    return stored(codes.view(kind).float().abs() * scales.unsqueeze(-1), kind)


@check_case.register
def _(case: RopeCase, place: Place, tile: object) -> float:
    kind, dtype, device = KV_DTYPES[case.kv], DTYPES[case.dtype], place.device
    source, width = generator(case.tokens + case.dim), (case.heads + 2 * case.kv_heads) * case.dim
    given = torch.randn(case.tokens, width, generator=source).mul(3).to(dtype).to(device)
    qkv = Guarded((case.tokens, width), dtype, stride=width + 16, device=device)
    qkv.tensor.copy_(given)
    positions = torch.randint(0, 500, (case.tokens,), generator=source).to(device)
    num_pages = case.tokens // case.page_size + 2
    slots = torch.randperm(num_pages * case.page_size, generator=source)[: case.tokens]
    slots[0] = -1
    slots = slots.to(device)
    angles = torch.rand(500, case.turned // 2, generator=source) * 6
    cos_sin = torch.stack([angles.cos(), angles.sin()], 1).contiguous().to(device)
    q_norm, k_norm = ((torch.rand(case.dim, generator=source) + 0.5).to(device) if case.norms else None for _ in range(2))
    static = (torch.rand(case.kv_heads, generator=source) / 50 + 0.01).to(device) if case.static else None
    shape = (num_pages * case.kv_heads * case.page_size, row_width(case.dim, kind))
    k_guard, v_guard = (Guarded(shape, storage_dtype(kind), device=device) for _ in range(2))
    k_pages, v_pages = (guard.tensor.view(num_pages, case.kv_heads, case.page_size, -1) for guard in (k_guard, v_guard))
    wanted_k, wanted_v = k_pages.clone(), v_pages.clone()
    with place.pretended():
        rope_and_store(
            qkv.tensor, positions, slots, cos_sin, k_pages, v_pages, num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim,
            q_norm=q_norm, k_norm=k_norm, kv_dtype=kind, k_scale=static, v_scale=static,
        )  # fmt: skip
        for guard in (qkv, k_guard, v_guard):
            guard.check()
        exact = given.float()
        options: dict[str, Any] = {"num_heads": case.heads, "norm_eps": 1e-6, "kv_dtype": kind, "k_scale": static, "v_scale": static}
        rope_reference(exact, positions, slots, cos_sin, wanted_k, wanted_v, q_norm=q_norm, k_norm=k_norm, **options)
        # Keys and values are stored as they stand rounded in qkv: so bit for bit.
        still = torch.stack([torch.ones_like(cos_sin[:, 0]), torch.zeros_like(cos_sin[:, 0])], 1).contiguous()
        wanted_k, wanted_v = k_pages.clone(), v_pages.clone()
        rope_reference(qkv.tensor.clone(), positions, slots, still, wanted_k, wanted_v, q_norm=None, k_norm=None, **options)
    for name, found, wanted in (("keys", k_pages, wanted_k), ("values", v_pages, wanted_v)):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), f"{name} in the pages are not those in qkv"
    size = given.float().abs().amax(1, keepdim=True).double() * (4 if case.norms else 1)
    return worst_of(qkv.tensor.double(), exact.double(), 1.01 * ROUNDING[dtype] * exact.double().abs() + 1e-6 * size)


def attention_cases(*, quick: bool) -> Iterator[AttentionCase | RopeCase]:
    """Decoding, prompts on cached prefixes, both together; every kind of pages, head sizes and numbers of heads that share keys."""
    kinds: tuple[KV, ...] = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8")
    if quick:
        for kv in kinds[::2]:
            yield AttentionCase((1, 40, 1), (700, 60, 3), kv=kv)
            yield RopeCase(5, kv=kv)
        return
    for kv in kinds:
        dtype: Dtype = "fp16" if kv == "fp16" else "bf16"
        for heads, kv_heads in ((4, 4), (6, 2), (8, 2), (32, 4)):
            for dim in (64, 80, 96, 128, 256):
                yield AttentionCase((1, 1, 200, 3, 1), (1, 5000, 300, 3, 257), heads, kv_heads, dim, 16, kv, dtype)
        for page_size in (1, 16, 64):
            yield AttentionCase((1,) * 40, tuple(range(1, 1200, 30)), 32, 8, 128, page_size, kv, dtype)
            yield AttentionCase((300, 7, 64), (300, 2007, 640), 32, 8, 128, page_size, kv, dtype, window=100, cap=30.0)
        for dim, turned in ((64, 64), (80, 40), (128, 128), (256, 64)):
            yield RopeCase(33, 9, 3, dim, turned, 16, kv, dtype, norms=dim == 128)
            yield RopeCase(1, 32, 8, dim, turned, 16, kv, dtype, static=kv not in ("bf16", "fp16"))
