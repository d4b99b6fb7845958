"""Golden files by the compressed-tensors package itself: what it compresses, ours reads as its own decompression does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.quant.linear_format import ActivationFormat, LinearFormat
from octavo.quant.schemes.base import Module, Slice
from octavo.quant.schemes.pack_quantized import has_padded_words
from octavo.quant.schemes.registry import scheme_of

pytest.importorskip("compressed_tensors", reason="pip install 'compressed-tensors>=0.20' writes the files that these tests read")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

N, K = 48, 96


def scheme_for(**args: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


def make(format_name: str, n: int, k: int, **args: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A random linear through the package: its compressed tensors, and its own decompression of them."""
    scheme = scheme_for(**args)
    weights = scheme.weights
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) + 0.2
    strategy = args["strategy"]
    if strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    elif strategy == "block":
        rows, columns = args["block_structure"]
        cells = weight.reshape(n // rows, rows, k // columns, columns)
        low, high = cells.amin((1, 3)), cells.amax((1, 3))
    else:
        cells = weight.reshape(n, -1, args.get("group_size") or k)
        low, high = cells.amin(2), cells.amax(2)
    scale, zero = calculate_qparams(low, high, weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(format_name)
    compressed = compressor.compress(state, scheme)
    return compressed, compressor.decompress(dict(compressed), scheme)["weight"]


def read(stored: LinearFormat, tensors: dict[str, Tensor], n: int, k: int) -> Tensor:
    module = Module(stored, k, n, False, torch.float32)
    scheme = scheme_of(stored)
    specs = scheme.create_weights(module)
    known = {key for spec in specs for key in (spec.name, *spec.aliases)}
    assert set(tensors) <= known | {"weight_zero_point"}
    for spec in specs:
        tensor = next((tensors[key] for key in (spec.name, *spec.aliases) if key in tensors), None)
        assert tensor is not None or not spec.required, spec.name
        assert tensor is None or tuple(tensor.shape) == spec.shape or {tuple(tensor.shape), spec.shape} == {(), (1,)}, spec.name
    return scheme.to_canonical(tensors, module, Slice.whole(module)).dense()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "size"), [("group", 32), ("channel", None), ("tensor", None)])
def test_pack_quantized(bits: int, symmetric: bool, strategy: str, size: int | None) -> None:
    if strategy == "tensor" and not symmetric:
        pytest.skip("asymmetric scales per tensor are refused by the config's reader")
    options = {"group_size": size} if size else {}
    tensors, wanted = make("pack-quantized", N, K, num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **options)
    assert not has_padded_words(tensors["weight_packed"].shape[1], K) or bits != 3
    stored = LinearFormat("pack-quantized", bits, strategy, size, symmetric=symmetric)  # type: ignore[arg-type]
    torch.testing.assert_close(read(stored, tensors, N, K), wanted.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "k"), [(37, 45), (5, 100)])
def test_pack_quantized_whose_words_are_not_full(n: int, k: int) -> None:
    for bits in (3, 4):
        tensors, wanted = make("pack-quantized", n, k, num_bits=bits, type="int", symmetric=False, strategy="channel")
        stored = LinearFormat("pack-quantized", bits, "channel", symmetric=False)
        torch.testing.assert_close(read(stored, tensors, n, k), wanted.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_float_quantized(strategy: str) -> None:
    n, k = (256, 384) if strategy == "block" else (N, K)
    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    tensors, wanted = make("float-quantized", n, k, num_bits=8, type="float", symmetric=True, strategy=strategy, **block)
    stored = LinearFormat("float-quantized", 8, strategy, block=(128, 128) if block else None)  # type: ignore[arg-type]
    torch.testing.assert_close(read(stored, tensors, n, k), wanted.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_int_quantized(strategy: str) -> None:
    tensors, wanted = make("int-quantized", N, K, num_bits=8, type="int", symmetric=True, strategy=strategy)
    activation = ActivationFormat("int8", "token", dynamic=True)
    stored = LinearFormat("int-quantized", 8, strategy, activation=activation)  # type: ignore[arg-type]
    torch.testing.assert_close(read(stored, tensors, N, K), wanted.float(), rtol=1e-6, atol=0)


def test_which_way_three_bits_are_packed_is_known_by_their_width() -> None:
    for k in range(32, 4097, 32):
        assert not has_padded_words(-(-3 * k // 32), k)
        assert has_padded_words(-(-k // 10), k)
    with pytest.raises(ValueError, match="100 inputs of 3 bits take 10 words in either"):
        has_padded_words(10, 100)
    assert has_padded_words(1, 10)  # where both put the same bits in the same place
