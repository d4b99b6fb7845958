"""Slices of every layout for two and four ranks: cut as create_weights says, they join, or add up, to the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.quant.linear import Axis, LinearSpec, WeightSpec, legal_cuts
from octavo.quant.linear_format import LinearFormat
from octavo.quant.platforms import kernels_for
from octavo.quant.reference_kernel import FloatReference
from octavo.quant.schemes.base import Slice
from octavo.quant.schemes.load_time import load_time_format
from octavo.quant.schemes.registry import scheme_of

from . import writers
from .test_gguf import BLOCKS, make_module, random_blocks
from .writers import FP8_GROUP, Written

CPU = torch.device("cpu")
# All of 128 outputs; inputs of which a quarter, or a half, ends inside a group or a block.
CASES: dict[str, Callable[[], Written]] = {
    "dense": lambda: writers.dense(128, 96).with_bias(),
    "awq": lambda: writers.awq(128, 128, 32).with_bias(),
    "awq-through-groups": lambda: writers.awq(128, 192, 64),
    "awq-channel": lambda: writers.awq(128, 96, None),
    "gptq": lambda: writers.gptq(128, 128, 32, symmetric=False).with_bias(),
    "gptq-through-groups": lambda: writers.gptq(128, 192, 64, symmetric=False),
    "gptq-ragged": lambda: writers.gptq(128, 160, 64),
    "gptq-channel": lambda: writers.gptq(128, 96, None),
    "gptq-3-bits": lambda: writers.gptq(128, 384, 128, bits=3, symmetric=False),
    "gptq-2-bits": lambda: writers.gptq(128, 192, 64, bits=2),
    "gptq-8-bits": lambda: writers.gptq(128, 96, 32, bits=8),
    "gptq-act-order": lambda: writers.gptq(128, 128, 32, act_order=True, symmetric=False),
    "gptq-act-order-no-g-idx": lambda: replace(
        writers.gptq(128, 192, 64).without("g_idx"), format=replace(writers.gptq(128, 192, 64).format, act_order=True)
    ),
    "pack": lambda: writers.pack_quantized(128, 128, symmetric=False).with_bias(),
    "pack-through-groups": lambda: writers.pack_quantized(128, 192, group_size=64, symmetric=False),
    "pack-channel": lambda: writers.pack_quantized(128, 96, "channel", symmetric=False),
    "pack-tensor": lambda: writers.pack_quantized(128, 96, "tensor"),
    "pack-actorder": lambda: writers.pack_quantized(128, 128, act_order=True, symmetric=False),
    "pack-3-bits": lambda: writers.pack_quantized(128, 384, group_size=128, bits=3, symmetric=False),
    "pack-3-bits-ten-a-word": lambda: writers.pack_quantized(160, 320, group_size=64, bits=3, symmetric=False, ten_a_word=True),
    "pack-w8a8": lambda: writers.pack_quantized(128, 128, "channel", bits=8),
    "float-tensor": lambda: writers.fp8(128, 96, "tensor", activation=None),
    "float-channel": lambda: writers.fp8(128, 96, "channel", activation=None).with_bias(),
    "float-block": lambda: writers.fp8(256, 512, "block", activation=None),
    "float-through-blocks": lambda: writers.fp8(192, 576, "block", activation=None),
    "modelopt-channel": lambda: writers.fp8(128, 96, "channel", layout="modelopt-fp8", activation=None),
    "modelopt-through-blocks": lambda: writers.fp8(192, 576, "block", layout="modelopt-fp8", activation=None),
    "int8": lambda: writers.int8(128, 96, activation=None).with_bias(),
    "int8-tensor": lambda: writers.int8(128, 96, "tensor", activation=None),
    **{f"gguf-{kind}": (lambda kind=kind: gguf_weight(kind)) for kind in BLOCKS},
}


def gguf_weight(kind: str) -> Written:
    n, k = 128, 4 * BLOCKS[kind][1]
    module, blocks = make_module(kind, n, k), torch.from_numpy(random_blocks(kind, n, k))
    whole = scheme_of(module.format).to_canonical({"weight": blocks}, module, Slice.whole(module))
    return Written(module.format, {"weight": blocks}, whole.dense().double())


def cut(written: Written, part: Slice) -> dict[str, Tensor]:
    """A rank's tensors, cut along the axes of create_weights as the loader cuts them."""
    n, k = written.weight.shape
    tensors = {}
    for spec in scheme_of(written.format).create_weights(written.module):
        tensor = written.tensors.get(spec.name)
        if tensor is None:
            assert not spec.required
            continue
        for dim, axis in enumerate(spec.axes):
            if axis.role == "out" and (part.out_start, part.out_stop) != (0, n):
                start, stop = axis.cut(part.out_start, part.out_stop, n)
            elif axis.role in ("in", "group") and (part.in_start, part.in_stop) != (0, k):
                start, stop = axis.cut(part.in_start, part.in_stop, k)
            else:
                continue
            tensor = tensor.narrow(dim, start, stop - start)
        tensors[spec.name] = tensor.contiguous()
    return tensors


def run(written: Written, part: Slice, x: Tensor, *, with_bias: bool = True) -> tuple[Tensor, Tensor]:
    """A slice's result by the float reference, and its weight; the CPU has a kernel for it too."""
    tensors = cut(written, part)
    if not with_bias:
        tensors.pop("bias", None)
    scheme = scheme_of(written.format)
    weights = scheme.to_canonical(tensors, written.module, part)
    spec = LinearSpec(
        "layer", part.in_features, part.out_features, "bias" in tensors, torch.float32, CPU, torch.float32, scheme.form(written.module)
    )
    assert not next(kernel for kernel in kernels_for(CPU) if kernel.refuses(spec) is None).is_reference
    return FloatReference(spec, weights)(x, out=torch.empty(len(x), part.out_features)), weights.dense()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_outputs_of_ranks_join(name: str, ranks: int) -> None:
    written = CASES[name]()
    n, k = written.weight.shape
    assert ranks in legal_cuts(scheme_of(written.format).create_weights(written.module), "out", n)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    whole, _ = run(written, Slice.whole(written.module), x)
    parts = [run(written, Slice(rank * n // ranks, (rank + 1) * n // ranks, 0, k), x) for rank in range(ranks)]
    close(torch.cat([weight for _, weight in parts]), written.weight)
    close(torch.cat([out for out, _ in parts], dim=1), whole)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_outputs_of_ranks_add_up(name: str, ranks: int) -> None:
    written = CASES[name]()
    n, k = written.weight.shape
    assert ranks in legal_cuts(scheme_of(written.format).create_weights(written.module), "in", k)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    whole, _ = run(written, Slice.whole(written.module), x)
    bounds = [(rank * k // ranks, (rank + 1) * k // ranks) for rank in range(ranks)]
    parts = [run(written, Slice(0, n, *pair), x[:, slice(*pair)].contiguous(), with_bias=pair[0] == 0) for pair in bounds]
    close(torch.cat([weight for _, weight in parts], dim=1), written.weight)
    close(sum(out.double() for out, _ in parts), whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("k", [512, 576])
def test_weights_quantized_while_loading(method: str, ranks: int, k: int) -> None:
    """A rank quantizes what it holds, as finely as the whole: 576 inputs are cut through groups of 64."""
    written = replace(writers.dense(128, k), format=load_time_format(method, k))
    _, whole = run(written, Slice.whole(written.module), torch.zeros(1, k))
    error = (whole - written.weight).norm()
    bounds = [(rank * k // ranks, (rank + 1) * k // ranks) for rank in range(ranks)]
    parts = [run(written, Slice(0, 128, *pair), torch.zeros(1, k // ranks))[1] for pair in bounds]
    assert (torch.cat(parts, dim=1) - written.weight).norm() <= 1.02 * error
    rows = [run(written, Slice(rank * 128 // ranks, (rank + 1) * 128 // ranks, 0, k), torch.zeros(1, k))[1] for rank in range(ranks)]
    assert torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize(
    "make",
    [lambda: writers.int8(128, 96), lambda: writers.fp8(128, 96, "channel"), lambda: writers.fp8(256, 512, "block", activation=FP8_GROUP)],
)
def test_quantized_inputs_of_ranks_join(make: Callable[[], Written]) -> None:
    """Along the outputs every rank has all inputs, so their scales too."""
    written = make()
    n, k = written.weight.shape
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    whole, _ = run(written, Slice.whole(written.module), x)
    parts = [run(written, Slice(rank * n // 4, (rank + 1) * n // 4, 0, k), x)[0] for rank in range(4)]
    close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize(
    ("make", "role", "total", "wanted"),
    [
        (lambda: writers.awq(24, 64, 32), "out", 24, [1, 3]),  # eight outputs a word
        (lambda: writers.awq(24, 64, 32), "in", 64, [1, 2, 4, 8, 16, 32, 64]),
        (lambda: writers.gptq(24, 24, 8), "in", 24, [1, 3]),  # eight inputs a word
        (lambda: writers.gptq(64, 96, 32, bits=3), "in", 96, [1, 3]),
        (lambda: writers.gptq(64, 96, 32, bits=3), "out", 64, [1, 2]),
        (lambda: writers.pack_quantized(12, 64), "out", 12, [1, 2, 3, 4, 6, 12]),  # symmetric: nothing packed along the outputs
        (lambda: writers.pack_quantized(16, 64, symmetric=False), "out", 16, [1, 2]),
        (lambda: writers.pack_quantized(60, 60, "channel", bits=3, symmetric=False, ten_a_word=True), "in", 60, [1, 2, 3, 6]),
        (lambda: writers.fp8(6, 4, "channel"), "out", 6, [1, 2, 3, 6]),
        (lambda: gguf_weight("Q4_K"), "in", 1024, [1, 2, 4]),
    ],
)
def test_legal_cuts(make: Callable[[], Written], role: str, total: int, wanted: list[int]) -> None:
    written = make()
    assert legal_cuts(scheme_of(written.format).create_weights(written.module), role, total) == wanted  # type: ignore[arg-type]


def test_a_cut_inside_a_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="a cut at 12 of 24 falls inside a unit of 8"):
        Axis("out", values=8).cut(12, 24, 24)
    assert Axis("group", values=32, straddles=True).cut(48, 96, 96) == (1, 3)
    assert Axis("in", 32, 3).cut(32, 40, 40) == (3, 4)
    assert legal_cuts((WeightSpec("w", (3,), None, (Axis("out", 2),)),), "out", 6) == [1, 3]
    assert LinearFormat("awq", 4, "group", 32).describe() == "awq int4, groups of 32"
