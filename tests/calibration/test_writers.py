"""What is written comes back as it was: every layout that calibration writes, read by the scheme that serves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.calibration import writers
from octavo.kernels.grouped_linear import GroupedWeight, dequantize
from octavo.quant.checkpoint.quantization_awq import read_awq
from octavo.quant.checkpoint.quantization_base import QuantizationConfig
from octavo.quant.checkpoint.quantization_compressed import read_compressed_tensors
from octavo.quant.checkpoint.quantization_fields import Fields
from octavo.quant.checkpoint.quantization_gptq import read_gptq
from octavo.quant.schemes.base import Module, Slice
from octavo.quant.schemes.registry import scheme_of

N, K, GROUP = 32, 128, 32
NAME = "model.layers.0.mlp.up_proj"


def fields(values: dict[str, object]) -> Fields:
    return Fields(values, Path("m/config.json"), "m/config.json: quantization_config.")


def read_back(tensors: dict[str, torch.Tensor], config: QuantizationConfig) -> torch.Tensor:
    stored = config.for_linear(NAME, in_features=K, out_features=N)
    module, scheme = Module(stored, K, N, False, torch.bfloat16), scheme_of(stored)
    for spec in scheme.create_weights(module):
        if spec.required:
            assert tuple(tensors[spec.name].shape) == spec.shape
    weight = scheme.to_canonical(tensors, module, Slice.whole(module)).weight
    assert isinstance(weight, GroupedWeight)
    return dequantize(weight)


def integers(bits: int, *, lowest: int = 0, symmetric: bool = False) -> GroupedWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator).to(torch.uint8)
    scale = (torch.rand(N, K // GROUP, generator=generator) + 0.1).to(torch.bfloat16).to(torch.float16)  # exact in both
    if symmetric:
        return GroupedWeight(codes, bits, GROUP, scale, zero=1 << (bits - 1))
    zeros = torch.randint(lowest, 1 << bits, scale.shape, generator=generator).to(torch.uint8)
    zeros[0, 0], zeros[-1, -1] = lowest, (1 << bits) - 1
    return GroupedWeight(codes, bits, GROUP, scale, zeros=zeros)


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq(symmetric: bool) -> None:
    weight = integers(4, symmetric=symmetric)
    assert torch.equal(read_back(writers.awq_tensors(weight), read_awq(fields(writers.awq_config(GROUP)))), dequantize(weight))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(bits: int, symmetric: bool) -> None:
    weight = integers(bits, lowest=1, symmetric=symmetric)
    config = read_gptq(fields(writers.gptq_config(bits, GROUP, symmetric=symmetric)))
    assert torch.equal(read_back(writers.gptq_tensors(weight), config), dequantize(weight))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_packed(bits: int, symmetric: bool) -> None:
    weight = integers(bits, symmetric=symmetric)
    config = read_compressed_tensors(fields(writers.compressed_config(weight)))
    assert torch.equal(read_back(writers.compressed_tensors(weight), config), dequantize(weight))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_compressed_tensors_with_quantized_inputs(dtype: torch.dtype) -> None:
    codes = torch.randint(-100, 101, (N, K), generator=torch.Generator().manual_seed(0)).to(torch.float32).to(dtype)
    weight = GroupedWeight(codes, 8, K, torch.full((N, 1), 0.5))
    config = read_compressed_tensors(fields(writers.compressed_config(weight)))
    stored = config.for_linear(NAME, in_features=K, out_features=N)
    assert stored.activation is not None
    assert (stored.activation.granularity, stored.activation.dynamic) == ("token", True)
    assert torch.equal(read_back(writers.compressed_tensors(weight), config), dequantize(weight))


def test_what_a_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold a zero point of 0"):
        writers.gptq_tensors(integers(4))
    with pytest.raises(ValueError, match="AWQ holds codes of 4 bits"):
        writers.awq_tensors(integers(8))
    with pytest.raises(ValueError, match="pack-quantized holds codes of 4 or 8 bits"):
        writers.compressed_tensors(integers(2))
