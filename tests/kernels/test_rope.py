"""Rotation and storing of keys and values, against complex multiplication in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from octavo.kernels.rope import reference, rope_and_store


def table(positions: int, rotary_dim: int) -> Tensor:
    inverse = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def rotated(x: Tensor, cos_sin: Tensor, positions: Tensor, norm: Tensor | None) -> Tensor:
    """x [T, heads, D] as float64."""
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    half = cos_sin.shape[2]
    turn = torch.complex(cos_sin[positions, 0].double(), cos_sin[positions, 1].double())[:, None]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "rotary_dim", "page_size", "norms"),
    [
        (1, 9, 3, 64, 64, 16, False),
        (40, 4, 2, 128, 128, 16, True),
        (7, 3, 1, 80, 32, 1, False),
        (130, 8, 8, 16, 16, 64, True),
        (3, 2, 1, 96, 36, 16, True),
    ],
)
def test_against_float64(
    dtype: torch.dtype, rows: int, heads: int, kv_heads: int, dim: int, rotary_dim: int, page_size: int, norms: bool
) -> None:
    width = (heads + 2 * kv_heads) * dim
    buffer = torch.randn(rows + 1, width + 40)
    before = buffer.clone()
    qkv = buffer[:rows, 16 : 16 + width]
    cos_sin = table(500, rotary_dim)
    positions = torch.randint(0, 500, (rows,))
    pages = -(-rows // page_size) + 2
    slots = torch.randperm(pages * page_size)[:rows]
    slots[rows // 2] = -1
    k_pages, v_pages = (torch.full((pages, kv_heads, page_size, dim), 7.0, dtype=dtype) for _ in range(2))
    q_norm, k_norm = (torch.randn(dim) for _ in range(2)) if norms else (None, None)
    rope_and_store(
        qkv, positions, slots, cos_sin, k_pages, v_pages, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, q_norm=q_norm, k_norm=k_norm
    )
    old = before[:rows, 16 : 16 + width].unflatten(1, (-1, dim))
    new = qkv.unflatten(1, (-1, dim))
    for part, norm in ((slice(0, heads), q_norm), (slice(heads, heads + kv_heads), k_norm)):
        torch.testing.assert_close(new[:, part].double(), rotated(old[:, part], cos_sin, positions, norm), atol=2e-6, rtol=2e-6)
    values = slice(heads + kv_heads, None)
    assert torch.equal(new[:, values], old[:, values])
    # exactly what stands in qkv now, rounded as torch rounds; nothing else touched
    wanted_k, wanted_v = torch.full_like(k_pages, 7.0), torch.full_like(v_pages, 7.0)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted_k[slot // page_size, :, slot % page_size] = new[row, heads : heads + kv_heads].to(dtype)
            wanted_v[slot // page_size, :, slot % page_size] = new[row, values].to(dtype)
    assert torch.equal(k_pages, wanted_k)
    assert torch.equal(v_pages, wanted_v)
    buffer[:rows, 16 : 16 + width] = before[:rows, 16 : 16 + width]
    assert torch.equal(buffer, before)


def test_rounding_to_bfloat16() -> None:
    """Ties to even, infinities and NaN, through the value heads, which are not rotated."""
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, math.inf, -math.inf, math.nan, 1e-40] * 2)
    qkv = torch.cat([torch.zeros(32), values])[None]
    k_pages, v_pages = (torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16) for _ in range(2))
    one = torch.zeros(1, dtype=torch.int64)
    rope_and_store(qkv, one, one, table(1, 16), k_pages, v_pages, num_heads=1, num_kv_heads=1, head_dim=16)
    torch.testing.assert_close(v_pages.flatten(), values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_reference() -> None:
    qkv, positions, slots = torch.randn(6, 4 * 32), torch.arange(6), torch.tensor([0, 3, -1, 2, 9, 7])
    pages = [torch.zeros(3, 1, 4, 32, dtype=torch.bfloat16) for _ in range(4)]
    twin, norm = qkv.clone(), torch.rand(32)
    rope_and_store(
        qkv, positions, slots, table(9, 16), pages[0], pages[1], num_heads=2, num_kv_heads=1, head_dim=32, q_norm=norm, k_norm=norm
    )
    reference(twin, positions, slots, table(9, 16), pages[2], pages[3], num_heads=2, q_norm=norm, k_norm=norm, norm_eps=1e-6)
    torch.testing.assert_close(qkv, twin, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pages[0], pages[2], atol=1e-6, rtol=2**-7)
    assert torch.equal(pages[1], pages[3])
    half = qkv.bfloat16()  # another dtype goes to the reference
    rope_and_store(half, positions, slots, table(9, 16), pages[0], pages[1], num_heads=2, num_kv_heads=1, head_dim=32)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(("position", "slot"), [(9, 0), (-1, 0), (0, 12), (0, -2)])
def test_outside_the_tables(position: int, slot: int) -> None:
    qkv = torch.randn(2, 3 * 16)
    before = qkv.clone()
    k_pages, v_pages = torch.zeros(3, 1, 4, 16), torch.zeros(3, 1, 4, 16)
    positions, slots = torch.tensor([0, position]), torch.tensor([1, slot])
    with pytest.raises(IndexError, match="row 1: position"):
        rope_and_store(qkv, positions, slots, table(9, 16), k_pages, v_pages, num_heads=1, num_kv_heads=1, head_dim=16)
    assert torch.equal(qkv[1], before[1])
    good = torch.zeros(2, dtype=torch.int64)
    rope_and_store(qkv, good, good, table(9, 16), k_pages, v_pages, num_heads=1, num_kv_heads=1, head_dim=16)


def test_refusals() -> None:
    good = torch.zeros(2, dtype=torch.int64)
    pages = torch.zeros(3, 1, 4, 16)

    def call(qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_pages: Tensor) -> None:
        rope_and_store(qkv, positions, good, cos_sin, k_pages, pages, num_heads=1, num_kv_heads=1, head_dim=16)

    for arguments, text in (
        ((torch.zeros(2, 40), good, table(9, 16), pages), "qkv is"),
        ((torch.zeros(2, 48), good.int(), table(9, 16), pages), "int64"),
        ((torch.zeros(2, 48), good, table(9, 32), pages), "cos_sin"),
        ((torch.zeros(2, 48), good, table(9, 16), pages.half()), "pages must both"),
    ):
        with pytest.raises(ValueError, match=text):
            call(*arguments)


RANGE = {torch.float8_e4m3fn: (-448.0, 448.0), torch.float8_e5m2: (-57344.0, 57344.0), torch.int8: (-128.0, 127.0)}


def cast(x: Tensor, kv_dtype: torch.dtype, scale: Tensor) -> Tensor:
    """Codes as torch casts them, as bytes."""
    scaled = (x / scale).clamp(*RANGE[kv_dtype])
    if kv_dtype == torch.int8:
        scaled = scaled.round().nan_to_num(nan=0.0)
    return scaled.to(kv_dtype).view(torch.uint8)


@pytest.mark.parametrize("kv_dtype", RANGE)
@pytest.mark.parametrize("scales", ["dynamic", "number", "heads"])
@pytest.mark.parametrize(("rows", "dim", "page_size"), [(1, 16, 1), (37, 80, 16), (130, 64, 64), (5, 96, 16), (9, 256, 1)])
def test_codes_are_torchs_casts(kv_dtype: torch.dtype, scales: str, rows: int, dim: int, page_size: int) -> None:
    heads, kv_heads = 4, 2
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim) * torch.randn(rows, 1).exp()
    pages = -(-rows // page_size) + 1
    slots = torch.randperm(pages * page_size)[:rows]
    slots[rows // 2] = -1 if rows > 1 else 0
    stored = [torch.full((pages, kv_heads, page_size, dim + 4), 7, dtype=torch.uint8) for _ in range(2)]
    given = {"dynamic": (None, None), "number": (0.013, 0.7), "heads": (torch.tensor([0.5, 0.01]), torch.tensor([0.002, 3.0]))}[scales]
    rope_and_store(
        qkv, torch.randint(0, 500, (rows,)), slots, table(500, 16), *stored, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
        kv_dtype=kv_dtype, k_scale=given[0], v_scale=given[1],
    )  # fmt: skip
    parts = qkv.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)[1:]
    for found, x, static in zip(stored, parts, given, strict=True):
        own = x.abs().amax(-1, keepdim=True) / RANGE[kv_dtype][1]
        scale = own if static is None else torch.as_tensor(static).reshape(-1, 1)
        wanted = torch.full_like(found, 7)
        kept = slots >= 0
        row = torch.cat([cast(x, kv_dtype, scale), scale.expand(rows, kv_heads, 1).contiguous().view(torch.uint8)], dim=-1)
        wanted[slots[kept] // page_size, :, slots[kept] % page_size] = row[kept]
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kv_dtype", RANGE)
def test_every_kind_of_float_becomes_the_code_torch_casts_it_to(kv_dtype: torch.dtype) -> None:
    """Random bit patterns, all codes' own numbers, the ties between them and their neighbours, through the value heads."""
    codes = torch.arange(256, dtype=torch.uint8).view(kv_dtype).float()
    ladder = codes[codes.isfinite()].sort().values
    ties = (ladder[1:] + ladder[:-1]) / 2
    exact = torch.cat([codes, ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf))])
    bits = torch.randint(-(2**31), 2**31, (64 * 200,)).int().view(torch.float32)
    values = torch.cat([exact, torch.zeros(-len(exact) % 64), bits]).view(-1, 64)
    rows = len(values)
    pages = [torch.zeros(rows, 1, 1, 68, dtype=torch.uint8) for _ in range(2)]
    qkv = torch.cat([torch.zeros(rows, 128), values], dim=1)
    order = torch.arange(rows)
    rope_and_store(
        qkv, torch.zeros_like(order), order, table(1, 16), *pages, num_heads=1, num_kv_heads=1, head_dim=64, kv_dtype=kv_dtype, v_scale=1.0
    )
    found = pages[1][:, 0, 0]
    assert torch.equal(found[:, :64], cast(values, kv_dtype, torch.ones(())))
    scales = found[:, 64:].contiguous().view(torch.float32)[:, 0]
    assert torch.equal(scales.isnan(), values.isnan().any(-1))
    assert (scales[~scales.isnan()] == 1).all()
    assert not pages[0][..., :64].any()  # keys of zeros: codes 0, scale 1
    assert (pages[0][..., 64:].contiguous().view(torch.float32) == 1).all()


@pytest.mark.parametrize("kv_dtype", RANGE)
def test_dynamic_scales_of_odd_rows(kv_dtype: torch.dtype) -> None:
    """NaN and infinities, denormals, one huge number: what the reference in torch makes of them, bit for bit."""
    values = torch.randn(7, 32)
    values[1, 3], values[2, 4], values[3] = math.nan, -math.inf, math.nan
    values[4] *= 1e-42
    values[5], values[6, 9] = 0.0, 3e38
    values[5, 0] = 1e-45
    order, found, wanted = torch.arange(7), *([torch.zeros(7, 1, 1, 36, dtype=torch.uint8) for _ in range(2)] for _ in range(2))
    qkv = torch.cat([torch.zeros(7, 64), values], dim=1)
    zero = torch.zeros_like(order)
    rope_and_store(qkv, zero, order, table(1, 16), *found, num_heads=1, num_kv_heads=1, head_dim=32, kv_dtype=kv_dtype)
    reference(qkv, zero, order, table(1, 16), *wanted, num_heads=1, q_norm=None, k_norm=None, norm_eps=1e-6, kv_dtype=kv_dtype)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours[..., :32], theirs[..., :32])
        scales = [x[..., 32:].contiguous().view(torch.float32) for x in (ours, theirs)]
        torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
    assert scales[0].flatten().isnan().tolist() == [False, True, True, True, False, False, False]


def test_refusals_of_quantized_pages() -> None:
    good, qkv = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 48)
    codes, plain = torch.zeros(3, 1, 4, 20, dtype=torch.uint8), torch.zeros(3, 1, 4, 16)
    for pages, options, text in (
        (codes, {}, "with a kv_dtype"),
        (codes[..., :16], {"kv_dtype": torch.int8}, "pages are"),
        (plain, {"kv_dtype": torch.int8}, "uint8"),
        (plain, {"k_scale": 1.0}, "belong to quantized pages"),
        (codes, {"kv_dtype": torch.int8, "k_scale": -1.0}, "above 0"),
        (codes, {"kv_dtype": torch.int8, "v_scale": torch.ones(2)}, "static scales"),
    ):
        with pytest.raises(ValueError, match=text):
            rope_and_store(qkv, good, good, table(9, 16), pages, pages, num_heads=1, num_kv_heads=1, head_dim=16, **options)
