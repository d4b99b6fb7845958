"""Eight-bit weights, static ranges and SmoothQuant, on fresh random data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.calibration.eight_bit import fp8_weight, input_scale, int8_weight, rounded_rows, search_smoothing
from octavo.calibration.kv_ranges import KVRanges
from octavo.calibration.moments import Moments
from octavo.calibration.writers import compressed_tensors
from octavo.kernels.grouped_linear import dequantize


@pytest.mark.parametrize(("granularity", "shape"), [("channel", (256, 1)), ("tensor", (1,)), ("block", (2, 3))])
def test_fp8_scales_cover_what_they_say(granularity: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 10, 256)[:, None]
    found = fp8_weight(weight, granularity, torch.bfloat16)  # type: ignore[arg-type]
    written = compressed_tensors(found, scale_dtype=torch.bfloat16, strategy=granularity)  # type: ignore[arg-type]
    assert tuple(written["weight_scale"].shape) == shape
    scale = written["weight_scale"].float()
    if granularity == "block":
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    values = written["weight"].float() * scale
    assert torch.equal(values, dequantize(found))
    error = (values - weight).abs()
    largest = weight.abs().amax() if granularity == "tensor" else weight.abs().amax(1, keepdim=True)
    assert bool((error <= weight.abs() / 16 + largest * 2**-9).all())  # three bits of mantissa; the smallest steps are absolute


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide a weight of 64 x 128"):
        fp8_weight(torch.randn(64, 128), "block", torch.bfloat16)


def test_int8_is_within_half_a_step() -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    found = int8_weight(weight, torch.bfloat16)
    assert float(((dequantize(found) - weight).abs() / found.scale.float()).max()) <= 0.9  # bfloat16's scale may be 0.4 % too small
    assert int(found.codes.min()) >= -127


def test_smoothing_helps_where_inputs_have_outliers_and_is_never_worse() -> None:
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(32, 64, generator=draw), torch.randn(16, 64, generator=draw)]
    calm = torch.randn(200, 64, generator=draw)
    wild = calm.clone()
    wild[:, ::16] *= 60
    for rows, most in ((calm, 1.0), (wild, 0.5)):
        found = search_smoothing(weights, rows, rows.abs().amax(0), torch.arange(64), 64, torch.bfloat16)
        assert found.relative_error <= most
        exact = [rows @ weight.t() for weight in weights]

        def error(factors: torch.Tensor, rows: torch.Tensor = rows, exact: list[torch.Tensor] = exact) -> float:
            given = rounded_rows(rows / factors)
            outs = [given @ dequantize(int8_weight(weight * factors, torch.bfloat16)).t() for weight in weights]
            return sum(float((out - want).square().sum()) for out, want in zip(outs, exact, strict=True))

        assert error(found.factors) / error(torch.ones(64)) == pytest.approx(found.relative_error, rel=1e-3)


def test_a_static_scale_holds_everything_seen() -> None:
    moments = Moments(8)
    moments.add(torch.tensor([[1.0, -9.0, 0, 0, 0, 0, 0, 0]]))
    moments.add(torch.ones(3, 8))
    assert input_scale(moments) == pytest.approx(9 / 448)


def test_keys_and_values_are_seen_where_attention_reads_them() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(self.proj(x), key=x * 3, value=x * -5)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.self_attn(x)
            return out

    block, ranges = Block(), KVRanges()
    with ranges.watching(block):
        for size in (1.0, 2.0, 0.5):
            block(torch.full((1, 2, 4, 8), size))
    assert ranges.largest == {"self_attn": (6.0, 10.0)}
    margin = 1.05  # for what was not seen
    assert ranges.scales() == pytest.approx({"self_attn.k_scale": margin * 6 / 448, "self_attn.v_scale": margin * 10 / 448})
    block(torch.full((1, 2, 4, 8), 100.0))
    assert ranges.largest == {"self_attn": (6.0, 10.0)}
