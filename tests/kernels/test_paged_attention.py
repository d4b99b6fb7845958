"""Paged attention against a float64 softmax over keys gathered by hand, on fresh random data."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.kernels.paged_attention import AttentionPlan, paged_attention, plan_attention, reference
from octavo.kernels.pages import CODE_RANGE, encode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = tuple(CODE_RANGE)


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    plan: AttentionPlan
    kv_dtype: torch.dtype | None = None

    def run(self, **options: float | None) -> Tensor:
        out = torch.empty(self.q.shape)
        return paged_attention(self.q, self.k, self.v, self.plan, scale=self.q.shape[2] ** -0.5, kv_dtype=self.kv_dtype, out=out, **options)

    def numbers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as they are stored, codes times scale."""
        if self.kv_dtype not in CODES:
            return self.k.to(dtype), self.v.to(dtype)
        return tuple(
            x[..., :-4].view(self.kv_dtype).to(dtype) * x[..., -4:].contiguous().view(torch.float32).to(dtype) for x in (self.k, self.v)
        )


def place(table: Tensor, positions: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Pages and offsets of positions."""
    return table.long()[positions // page_size], positions % page_size


def make_case(
    queries: list[int],
    contexts: list[int],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
) -> Case:
    """Sequences on permuted pages; everything that nobody may read is NaN."""
    needed = [-(-c // page_size) for c in contexts]
    spare = 3
    order = torch.randperm(sum(needed) + spare)
    shape = (len(order), kv_heads, page_size, dim)
    k, v = torch.full(shape, math.nan), torch.full(shape, math.nan)
    table = torch.full((len(queries), max(needed, default=1) + 1), len(order) - 1, dtype=torch.int32)
    used = 0
    for b, (context, pages) in enumerate(zip(contexts, needed, strict=True)):
        table[b, :pages] = order[used : used + pages]
        used += pages
        page, offset = place(table[b], torch.arange(context), page_size)
        k[page, :, offset] = torch.randn(context, kv_heads, dim) * spread
        v[page, :, offset] = torch.randn(context, kv_heads, dim)
    starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    plan = plan_attention(starts, torch.tensor(contexts, dtype=torch.int32), table, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    k, v = (encode(x, dtype) if dtype in CODES else x.to(dtype) for x in (k, v))
    return Case(torch.randn(sum(queries), heads, dim), k, v, plan, dtype)


def exact(
    case: Case,
    *,
    dtype: torch.dtype = torch.float64,
    shuffled: bool = False,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Independent of the package: the keys of a sequence gathered, all pairs scored, a softmax over the visible ones.

    `shuffled`: in another order of keys, which changes nothing but the rounding.
    """
    heads, dim = case.q.shape[1:]
    group, page_size = heads // case.k.shape[1], case.k.shape[2]
    out = torch.empty(case.q.shape, dtype=dtype)
    starts, contexts = case.plan.query_start.tolist(), case.plan.context_len.tolist()
    for b, context in enumerate(contexts):
        rows = slice(starts[b], starts[b + 1])
        keys = torch.randperm(context) if shuffled else torch.arange(context)
        page, offset = place(case.plan.page_table[b], keys, page_size)
        k, v = (x[page, :, offset].repeat_interleave(group, dim=1) for x in case.numbers(dtype))
        scores = torch.einsum("qhd,khd->hqk", case.q[rows].to(dtype), k) * dim**-0.5
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        distance = torch.arange(context - (starts[b + 1] - starts[b]), context)[:, None] - keys
        visible = (distance >= 0) & (distance < (sliding_window or context))
        out[rows] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)
    return out


def check(case: Case, **options: float | None) -> None:
    """No worse than twice torch's own float32 error (of the plain reference, on the same stored values).

    Torch's worst element is that of eight orders of keys: in one order alone it is small by chance now and then. On codes ours may be three
    times as far off: a score is rounded once more, when its key's scale is multiplied.
    """
    wanted = exact(case, **options)
    theirs = (exact(case, dtype=torch.float32, **options) - wanted).abs()
    others = [(exact(case, dtype=torch.float32, shuffled=True, **options) - wanted).abs().max() for _ in range(7)]
    ours = (case.run(**options) - wanted).abs()
    assert ours.isfinite().all()
    assert ours.max() <= (3 if case.kv_dtype in CODES else 2) * max(theirs.max(), *others) + 1e-7
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + 1e-8


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
def test_mixed_batch(page_size: int, dtype: torch.dtype) -> None:
    check(make_case([1, 7, 40, 1, 0, 2], [300, 263, 40, 1, 5, 130], page_size=page_size, dtype=dtype))


@pytest.mark.parametrize("dim", [16, 24, 32, 64, 80, 96, 128, 256])
def test_head_dims(dim: int) -> None:
    check(make_case([1, 19, 30], [70, 19, 258], dim=dim, dtype=torch.bfloat16))
    check(make_case([30], [61], dim=dim, dtype=torch.float16))
    check(make_case([30], [61], dim=dim))
    for dtype in CODES:
        check(make_case([30, 1], [61, 270], dim=dim, dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1), (8, 1), (15, 3), (7, 1), (100, 1)])
def test_head_groups(heads: int, kv_heads: int) -> None:
    check(make_case([1, 20, 5], [120, 33, 5], heads=heads, kv_heads=kv_heads, dim=32, dtype=torch.bfloat16))


def test_every_length() -> None:
    lengths = [*range(1, 301, 7), 15, 16, 17, 31, 32, 33, 255, 256, 257]
    check(make_case([1] * len(lengths), lengths, heads=2, kv_heads=1, dim=16, dtype=torch.bfloat16))
    lengths = [1, 2, 5, 6, 7, 16, 95, 96, 97, 130]
    check(make_case(lengths, lengths, heads=2, kv_heads=1, dim=16))


@pytest.mark.parametrize("sliding_window", [1, 2, 16, 37, 250, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *CODES])
def test_sliding_window(sliding_window: int, dtype: torch.dtype) -> None:
    check(make_case([1, 70, 9, 3], [600, 290, 9, 523], dim=16, dtype=dtype), sliding_window=sliding_window)


@pytest.mark.parametrize("soft_cap", [0.3, 5.0, 50.0])
def test_soft_cap(soft_cap: float) -> None:
    check(make_case([1, 30, 2], [300, 40, 2], dim=32, spread=4.0), soft_cap=soft_cap, sliding_window=100)
    check(make_case([1, 30, 2], [300, 40, 2], dim=32, spread=0.01), soft_cap=soft_cap)
    for dtype in CODES:
        check(make_case([1, 60, 40], [300, 290, 90], dim=96, spread=4.0, dtype=dtype), soft_cap=soft_cap, sliding_window=100)


@pytest.mark.parametrize("dtype", [torch.float32, *CODES])
def test_large_scores(dtype: torch.dtype) -> None:
    """Softmax weights that underflow to exact zeros, and a greatest score that changes from block to block."""
    check(make_case([64, 96], [700, 520], dim=32, spread=40.0, dtype=dtype))


@pytest.mark.parametrize(("queries", "context"), [(1, 3000), (6, 2100)])
def test_long_context_is_split(queries: int, context: int) -> None:
    case = make_case([queries], [context], heads=3, kv_heads=1, dim=16, dtype=torch.bfloat16)
    assert case.plan.work.shape[0] > 1 or torch.get_num_threads() == 1
    for _ in range(3):  # counters must be left ready for the next call
        check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *CODES])
def test_bits_do_not_depend_on_company(dtype: torch.dtype) -> None:
    """A row alone, in a batch, in a prompt of one piece or several, and on one thread or more: the same bits."""
    case = make_case([130, 1], [900, 700], dim=32, dtype=dtype)
    whole = case.run()

    def again(queries: int, context: int, row: int) -> Tensor:
        plan = plan_attention(
            torch.tensor([0, queries], dtype=torch.int32),
            torch.tensor([context], dtype=torch.int32),
            case.plan.page_table[row : row + 1].contiguous(),
            num_heads=6,
            num_kv_heads=2,
            head_dim=32,
        )
        start = 0 if row == 0 else 130
        first = start + (context - 770 if row == 0 else 0) - (queries if row == 0 else 0)
        return Case(case.q[first : first + queries], case.k, case.v, plan, dtype).run()

    assert torch.equal(again(1, 700, 1), whole[130:])
    assert torch.equal(again(1, 900, 0), whole[129:130])
    assert torch.equal(again(5, 850, 0), whole[75:80])
    assert torch.equal(again(100, 870, 0), whole[:100])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(again(130, 900, 0), whole[:130])
        assert torch.equal(again(1, 900, 0), whole[129:130])
    finally:
        torch.set_num_threads(threads)


def test_strided_queries_and_guarded_output() -> None:
    case = make_case([3, 1], [20, 50])
    wanted = case.run()
    fused = torch.full((6, 6 * 64 + 200), math.nan)
    fused[:4, 8 : 8 + 6 * 64] = case.q.flatten(1)
    target = torch.full((7, 6 * 64 + 24), 7.0)
    q, out = fused[:, 8 : 8 + 6 * 64].unflatten(1, (6, 64)), target[1:, 16 : 16 + 6 * 64].unflatten(1, (6, 64))
    assert paged_attention(q, case.k, case.v, case.plan, scale=64**-0.5, out=out) is out
    assert torch.equal(out[:4], wanted)
    out[:4] = 7.0
    assert (target == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *CODES])
def test_pages_of_another_layout(dtype: torch.dtype) -> None:
    """Pages as [pages, page_size, heads, dim], and keys and values side by side, without a copy."""
    case = make_case([3, 1], [20, 50], dtype=dtype)
    both = torch.stack([case.k, case.v], dim=1).transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(Case(case.q, both[:, 0], both[:, 1], case.plan, dtype).run(), case.run())


def test_nothing_to_do() -> None:
    empty = make_case([], [])
    assert empty.run().shape == (0, 6, 64)
    idle = make_case([0, 0], [5, 9])
    out = torch.full((2, 6, 64), 7.0)
    paged_attention(torch.randn(2, 6, 64), idle.k, idle.v, idle.plan, scale=1.0, out=out)
    assert (out == 7.0).all()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"soft_cap": 2.0}])
def test_reference(options: dict[str, float]) -> None:
    case = make_case([4, 1, 0], [37, 20, 3])
    case.k, case.v = case.k.nan_to_num(), case.v.nan_to_num()  # it gathers whole pages
    out = reference(case.q, case.k, case.v, case.plan, scale=64**-0.5, out=torch.empty(case.q.shape), **options)
    torch.testing.assert_close(out.double(), exact(case, **options), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"soft_cap": 2.0}])
def test_reference_on_codes(options: dict[str, float], dtype: torch.dtype) -> None:
    case = make_case([4, 1, 0], [37, 20, 3], dtype=dtype)
    case.k, case.v = (torch.where(x[..., -1:] >= 127, 0, x) for x in (case.k, case.v))  # it gathers whole pages: no NaN scales
    scale, out = 64**-0.5, torch.empty(case.q.shape)
    reference(case.q, case.k, case.v, case.plan, scale=scale, kv_dtype=dtype, out=out, **options)
    torch.testing.assert_close(out.double(), exact(case, **options), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", CODES)
def test_scales_differ_within_a_page_and_need_not_be_their_rows_own(dtype: torch.dtype) -> None:
    """Powers of two as scales, from row to row, far from what the codes' own numbers would have."""
    case = make_case([1, 40, 30], [300, 290, 90], dtype=dtype)
    for x in (case.k, case.v):
        scales = x[..., -4:].contiguous().view(torch.float32)
        changed = (scales * 2.0 ** torch.randint(-6, 3, scales.shape)).view(torch.uint8)
        x[..., -4:] = changed
    check(case)


@pytest.mark.parametrize("dtype", CODES)
def test_a_key_or_value_that_is_not_a_number_is_not_hidden(dtype: torch.dtype) -> None:
    case = make_case([1, 1], [20, 300], page_size=1, dtype=dtype)
    for pages in (case.k, case.v):
        number = torch.randn(2, 64)
        number[1, 5] = math.nan
        kept, place = pages.clone(), case.plan.page_table[1, 270]
        pages[place] = encode(number, dtype)[:, None]
        out = case.run()
        assert out[1, 3:].isnan().all()  # the heads that read key head 1
        assert out[1, :3].isfinite().all()
        assert out[0].isfinite().all()
        pages.copy_(kept)


def test_nan_in_a_query_is_not_hidden() -> None:
    case = make_case([1, 1], [20, 300])
    case.q[1, 2, 5] = math.nan
    out = case.run()
    assert out[1, 2].isnan().all()
    assert out[0].isfinite().all()


ALONE_OR_TOGETHER = """
import sys, torch
from octavo.kernels.paged_attention import paged_attention, plan_attention, reference
one = torch.tensor([0, 20], dtype=torch.int32)
plan = plan_attention(one, one[1:].clone(), torch.arange(2, dtype=torch.int32)[None], num_heads=2, num_kv_heads=1, head_dim=32)
for name in sys.argv[1:]:
    q, pages = torch.randn(20, 2, 32), torch.randn(2, 1, 16, 32).to(getattr(torch, name))
    ours, theirs = (f(q, pages, pages, plan, scale=0.2, out=torch.empty_like(q)) for f in (paged_attention, reference))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.long
def test_kernels_that_other_processes_compiled_are_not_confused(tmp_path: Path) -> None:
    """Each process compiles one kernel into the cache; a third loads both from there."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for names in (["bfloat16"], ["float16"], ["bfloat16", "float16"]):
        subprocess.run([sys.executable, "-c", ALONE_OR_TOGETHER, *names], env=environment, check=True)


def test_refusals() -> None:
    case, codes = make_case([2], [20]), make_case([2], [20], dtype=torch.int8)
    odd = torch.zeros(*codes.k.shape[:3], 70, dtype=torch.uint8)[..., :68]
    out = torch.empty(case.q.shape)

    def call(**changes: object) -> None:
        arguments: dict[str, object] = {"q": case.q, "k_pages": case.k, "v_pages": case.v, "plan": case.plan, "scale": 1.0, "out": out}
        paged_attention(**(arguments | changes))

    for changes, text in (
        ({"q": case.q.half()}, "float32"),
        ({"q": case.q[:1]}, "plan has 2 tokens"),
        ({"q": torch.empty(2, 64, 6).transpose(1, 2)}, "contiguous"),
        ({"v_pages": case.v.half()}, "float16"),
        ({"k_pages": case.k.int(), "v_pages": case.v.int()}, "int32"),
        ({"k_pages": case.k[..., :32], "v_pages": case.v[..., :32]}, "pages are"),
        ({"v_pages": case.v.transpose(2, 3).contiguous().transpose(2, 3)}, "equal strides"),
        ({"scale": 0.0}, "scale"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"soft_cap": -1.0}, "soft_cap"),
        ({"out": out[:1]}, "out is"),
        ({"kv_dtype": torch.int8}, "uint8 for torch.int8, not torch.float32"),
        ({"kv_dtype": torch.int16}, "int16"),
        ({"k_pages": codes.k, "v_pages": codes.v}, "with a kv_dtype"),
        ({"k_pages": codes.k[..., :64], "v_pages": codes.v[..., :64], "kv_dtype": torch.int8}, "pages are"),
        ({"k_pages": odd, "v_pages": odd, "kv_dtype": torch.int8}, "quantized pages need"),
    ):
        with pytest.raises(ValueError, match=text):
            call(**changes)
    with pytest.raises(ValueError, match="head_dim"):
        make_case([1], [1], dim=20)
    with pytest.raises(ValueError, match="multiple"):
        make_case([1], [1], heads=5)
    with pytest.raises(ValueError, match="context"):
        make_case([3], [2])
