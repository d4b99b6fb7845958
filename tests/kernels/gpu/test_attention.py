"""Paged attention, and rotary embedding with the way into the pages, under the interpreter, against their float references."""

from __future__ import annotations

import pytest
import torch

from octavo.benchmarks.gpu.attention_cases import KV, KV_DTYPES, AttentionCase, RopeCase, stored
from octavo.benchmarks.gpu.cases import Dtype
from octavo.benchmarks.gpu.checks import Place, check
from octavo.kernels.gpu import attention_plan
from octavo.kernels.gpu.attention_plan import empty_items, launch_splits, launch_tiles, most_splits, most_tiles
from octavo.kernels.gpu.device import DEVICES, Device
from octavo.kernels.gpu.paged_attention import Pages, launch, split_shape
from octavo.kernels.gpu.workspace import Workspace
from octavo.kernels.paged_attention import paged_attention, plan_attention, reference

from .interpreter import products_rounded_once

CPU = torch.device("cpu")
# Few multiprocessors: fewer blocks that find nothing to do.
H100 = Place(CPU, Device(90, 5, DEVICES[90].shared_bytes))
A100 = Place(CPU, Device(80, 5, DEVICES[80].shared_bytes))

kinds = pytest.mark.parametrize("kv", list(KV_DTYPES))
MIXED = ((1, 5, 1, 20, 1), (1, 5, 280, 50, 17))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kv"), [*((6, 2, kv) for kv in KV_DTYPES), (2, 2, "bf16"), (8, 2, "bf16"), (8, 1, "bf16"), (8, 1, "int8")]
)
def test_heads_that_share_keys(heads: int, kv_heads: int, kv: KV) -> None:
    check(AttentionCase(*MIXED, heads, kv_heads, 64, 16, kv, "fp16" if kv == "fp16" else "bf16"), H100)


@pytest.mark.parametrize(
    ("dim", "kv"),
    [
        *((dim, "bf16") for dim in (80, 128)),
        (128, "fp8_e4m3"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((96, "bf16"), (256, "bf16"), (80, "int8"), (128, "int8"), (256, "fp8_e5m2"))
        ),
    ],
)
def test_head_sizes(dim: int, kv: KV) -> None:
    check(AttentionCase((1, 9), (70, 40), 4, 2, dim, 16, kv), H100)


@pytest.mark.parametrize(
    ("page_size", "kv", "window", "cap"),
    [
        (1, "bf16", None, None),
        (64, "bf16", 33, None),
        (16, "bf16", None, 5.0),
        (16, "bf16", 7, 20.0),
        (1, "fp8_e4m3", 7, 20.0),
        (64, "fp8_e4m3", None, None),
        (16, "fp8_e4m3", 33, None),
    ],
)
def test_pages_windows_and_caps(page_size: int, kv: KV, window: int | None, cap: float | None) -> None:
    check(AttentionCase(*MIXED, page_size=page_size, kv=kv, window=window, cap=cap), H100)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
@kinds
def test_without_fp8_units(kv: KV, dtype: Dtype) -> None:
    check(AttentionCase((1, 20), (100, 90), kv=kv, dtype=dtype), A100)


@pytest.mark.parametrize("contexts", [(300,), (256, 257), (1, 2, 3), (1024, 1, 64)])
def test_decoding_alone(contexts: tuple[int, ...]) -> None:
    check(AttentionCase((1,) * len(contexts), contexts), H100)


@pytest.mark.parametrize(("kv", "static"), [*((kv, False) for kv in KV_DTYPES), *((kv, True) for kv in ("fp8_e4m3", "fp8_e5m2", "int8"))])
def test_rope_and_store(kv: KV, static: bool) -> None:
    for dtype in ("bf16", "fp16", "fp32"):
        check(RopeCase(19, kv=kv, dtype=dtype, static=static), H100)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "turned"), [(9, 3, 80, 40), (32, 8, 128, 128), (2, 1, 256, 64), (4, 4, 96, 96)])
@pytest.mark.parametrize("norms", [True, False])
def test_rope_of_other_shapes(heads: int, kv_heads: int, dim: int, turned: int, norms: bool) -> None:
    check(RopeCase(3, heads, kv_heads, dim, turned, norms=norms), H100)


def items_of(queries: list[int], contexts: list[int], per_tile: int, fixed: int = 0) -> list[tuple[int, int]]:
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32)
    context_len = torch.tensor(contexts, dtype=torch.int32)
    if per_tile:
        out = empty_items(most_tiles(len(queries), sum(queries), per_tile), per_tile, CPU)
        launch_tiles(starts, context_len, out)()
    else:
        room = most_splits(len(queries), num_kv_heads=8, device=DEVICES[90]) if not fixed else sum(-(-c // fixed) for c in contexts)
        out = empty_items(room, 0, CPU)
        launch_splits(starts, context_len, out, num_kv_heads=8, device=DEVICES[90], fixed_chunk=fixed)()
        assert int(out.chunk) % attention_plan.KEYS == 0
    found = [(sequence, part) for sequence, part in out.items.tolist() if sequence >= 0]
    assert all(sequence == -1 for sequence, _ in out.items.tolist()[len(found) :])
    return found


def test_tiles_cover_prompts_alone() -> None:
    assert items_of([1, 33, 1, 32, 64, 1], [50, 33, 9, 100, 64, 1], 32) == [(1, 0), (1, 1), (3, 0), (4, 0), (4, 1)]


def test_splits_cover_decoding_sequences_and_fill_the_device() -> None:
    assert items_of([1, 2, 1], [200, 1000, 3], 0) == [(0, 0), (2, 0)]
    found = items_of([1] * 4, [100_000, 10, 50_000, 256], 0)
    wanted = -(-4 * 132 // 8)
    assert wanted - 4 <= len(found) <= wanted + 4
    for sequence in range(4):
        parts = [part for owner, part in found if owner == sequence]
        assert parts == list(range(len(parts)))
    assert items_of([1, 1], [300, 100], 0, fixed=128) == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_a_plan_of_thousands_of_sequences() -> None:
    count = 2000
    contexts = [1 + index % 700 for index in range(count)]
    found = items_of([1] * count, contexts, 0)
    assert [owner for owner, part in found if part == 0] == list(range(count))
    assert len(found) <= count + -(-4 * 132 // 8)


def test_random_plans_have_every_part_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        count = int(torch.randint(1, 70, (1,), generator=generator))
        queries = torch.where(torch.rand(count, generator=generator) < 0.5, 1, torch.randint(2, 200, (count,), generator=generator))
        contexts = queries + torch.randint(0, 4000, (count,), generator=generator)
        lists = queries.tolist(), contexts.tolist()
        tiles = [(b, part) for b, q in enumerate(lists[0]) if q > 1 for part in range(-(-q // 16))]
        assert items_of(*lists, 16) == tiles
        found = items_of(*lists, 0)
        assert {owner for owner, _ in found} == {b for b, q in enumerate(lists[0]) if q == 1}


def test_a_row_is_the_same_whatever_else_is_in_the_batch_when_splits_are_fixed() -> None:
    """And counters are back at zero; a sequence of no keys leaves its row alone, as rows that fill a graph up."""
    generator = torch.Generator().manual_seed(1)
    pages = Pages(*(torch.randn(40, 2, 16, 64, generator=generator).bfloat16() for _ in range(2)))
    table = torch.randperm(40, generator=generator).int().repeat(3, 1)
    q = torch.randn(3, 4, 64, generator=generator).bfloat16()
    rows = []
    for contexts in ((500, 100, 0), (500, 600, 640)):
        context_len = torch.tensor(contexts, dtype=torch.int32)
        starts = torch.arange(4, dtype=torch.int32)
        out, workspace = torch.full((3, 4, 64), torch.nan, dtype=torch.bfloat16), Workspace(CPU)
        items = empty_items(16, 0, CPU)
        launch_splits(starts, context_len, items, num_kv_heads=2, device=H100.facts, fixed_chunk=128)()
        launch(
            q, pages, starts, context_len, table, items, split_shape(2, 64, quantized=False), scale=0.125, out=out, device=DEVICES[90],
            workspace=workspace,
        )()  # fmt: skip
        assert int(workspace.arrived.abs().sum()) == 0
        rows.append(out)
    assert torch.equal(rows[0][0], rows[1][0])
    assert not torch.equal(rows[0][1], rows[1][1])
    assert rows[0][2].isnan().all()
    plan = plan_attention(starts, context_len, table, num_heads=4, num_kv_heads=2, head_dim=64)
    wanted = reference(q, pages.k, pages.v, plan, scale=0.125, out=torch.empty(3, 4, 64))
    torch.testing.assert_close(rows[1].float(), wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kv", ["bf16", "fp8_e4m3", "int8"])
def test_a_querys_bits_are_its_own_where_runs_have_to_repeat(kv: KV) -> None:
    """The last token of a prompt, computed with it or alone as if it had been generated; without the flag it would differ."""
    context, heads, kind = 300, 4, KV_DTYPES[kv]
    source = torch.Generator().manual_seed(0)
    with H100.pretended():  # codes and scales lie as on a GPU
        pages = [stored(torch.randn(-(-context // 16), 2, 16, 64, generator=source), kind) for _ in range(2)]
    table = torch.arange(-(-context // 16), dtype=torch.int32)[None]
    q = torch.randn(context, heads, 64, generator=source).bfloat16()

    def attended(first: int, *, deterministic: bool) -> torch.Tensor:
        starts = torch.tensor([0, context - first], dtype=torch.int32)
        out = torch.empty_like(q[first:])
        with H100.pretended(), products_rounded_once():
            plan = plan_attention(
                starts, torch.tensor([context], dtype=torch.int32), table, num_heads=heads, num_kv_heads=2, head_dim=64, kv_dtype=kind,
                num_tokens=context - first, deterministic=deterministic,
            )  # fmt: skip
            return paged_attention(q[first:], *pages, plan, scale=0.125, kv_dtype=kind, out=out)

    whole = attended(0, deterministic=True)
    with H100.pretended():
        later = [pages[0][-2:].clone(), pages[1][-2:].clone()]
        for tensor in pages:  # what no query before them sees
            tensor[-2:] = stored(100 * torch.randn(2, 2, 16, 64, generator=source), kind)
    assert torch.equal(attended(0, deterministic=True)[: context - 28], whole[: context - 28])
    for tensor, before in zip(pages, later, strict=True):
        tensor[-2:] = before
    for first in (context - 1, context - 40, 250):
        assert torch.equal(attended(first, deterministic=True), whole[first:]), first
    alone, beside = (attended(first, deterministic=False)[-1] for first in (context - 1, context - 40))
    assert not torch.equal(alone, beside)
