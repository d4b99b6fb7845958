"""Every layout through every kernel that does not refuse it, against the same whole numbers dequantized and multiplied in float64.

Tensors are written by tests/quant/writers.py, which shares nothing with the schemes; inputs are rounded as the format says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.quant.linear import LinearKernel, LinearSpec, LinearWeights
from octavo.quant.linear_format import ActivationFormat, LinearFormat
from octavo.quant.platforms import kernels_for
from octavo.quant.schemes.base import Module, Slice
from octavo.quant.schemes.gguf import BLOCKS, GgufScheme
from octavo.quant.schemes.load_time import load_time_format
from octavo.quant.schemes.registry import scheme_of

from . import writers
from .writers import FP8_GROUP, FP8_STATIC, FP8_TOKEN, INT8_STATIC, INT8_TOKEN, Written, rounded

CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps
ROWS = (1, 5, 13)

CASES: dict[str, Callable[[], Written]] = {
    "dense": lambda: writers.dense(37, 50),
    "awq": lambda: writers.awq(40, 128, 32),
    "awq-one-word": lambda: writers.awq(8, 16, 16),
    "awq-channel": lambda: writers.awq(24, 72, None),
    "awq-bias": lambda: writers.awq(64, 192, 64).with_bias(),
    "awq-zeros-0": lambda: writers.awq(16, 64, 32, zeros=torch.zeros(16, 2, dtype=torch.int64)),
    "awq-zeros-15": lambda: writers.awq(16, 64, 32, zeros=torch.full((16, 2), 15)),
    "awq-negative-words": lambda: writers.awq(16, 64, 32, codes=torch.full((16, 64), 15)),
    **{
        f"gptq-{'v2' if v2 else 'v1'}-{bits}-{'sym' if symmetric else 'asym'}": (
            lambda v2=v2, bits=bits, symmetric=symmetric: writers.gptq(64, 96, 32, bits=bits, v2=v2, symmetric=symmetric)
        )
        for v2 in (False, True)
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    },
    "gptq-no-g-idx": lambda: writers.gptq(40, 96, 32).without("g_idx"),
    "gptq-channel": lambda: writers.gptq(40, 96, None, symmetric=False),
    "gptq-bias": lambda: writers.gptq(40, 96, 32, symmetric=False).with_bias(),
    "gptq-act-order": lambda: writers.gptq(40, 128, 32, act_order=True, symmetric=False),
    "gptq-act-order-3": lambda: writers.gptq(32, 128, 32, act_order=True, bits=3),
    "gptq-act-order-no-g-idx": lambda: replace(
        writers.gptq(40, 96, 32).without("g_idx"), format=replace(writers.gptq(40, 96, 32).format, act_order=True)
    ),
    "gptq-ragged": lambda: writers.gptq(40, 72, 32, symmetric=False),
    "gptq-ragged-act-order": lambda: writers.gptq(40, 72, 32, symmetric=False, act_order=True),
    "gptq-one-group-of-zeros": lambda: _zeroed(writers.gptq(40, 96, 32)),
    "gptq-sym-with-other-zeros": lambda: writers.gptq(40, 96, 32, zeros=torch.full((40, 3), 7)),
    "gptq-odd-n": lambda: writers.gptq(13, 64, 32, symmetric=False),
    **{
        f"pack-{bits}-{'sym' if symmetric else 'asym'}-{granularity}": (
            lambda bits=bits, symmetric=symmetric, granularity=granularity: writers.pack_quantized(
                37, 96, granularity, 32, bits=bits, symmetric=symmetric
            )
        )
        for bits in (2, 4, 8)
        for symmetric in (True, False)
        for granularity in ("group", "channel", "tensor")
        if symmetric or granularity != "tensor"
    },
    **{
        f"pack-3-{'ten-a-word' if ten else 'stream'}-{k}-{'sym' if symmetric else 'asym'}": (
            lambda ten=ten, k=k, symmetric=symmetric: writers.pack_quantized(
                37, k, "group", 16, bits=3, symmetric=symmetric, ten_a_word=ten
            )
        )
        for ten in (False, True)
        for k in (64, 80, 96)
        for symmetric in (True, False)
    },
    "pack-actorder": lambda: writers.pack_quantized(40, 128, act_order=True),
    "pack-actorder-asym": lambda: writers.pack_quantized(40, 128, act_order=True, symmetric=False),
    "pack-no-shape": lambda: writers.pack_quantized(40, 128).without("weight_shape"),
    "pack-bias": lambda: writers.pack_quantized(40, 128, symmetric=False, scale_dtype=torch.float16).with_bias(),
    "pack-w8a8": lambda: writers.pack_quantized(40, 128, "channel", bits=8, activation=INT8_TOKEN),
    "pack-w4a8": lambda: writers.pack_quantized(40, 128, bits=4, activation=INT8_TOKEN),
    **{
        f"float-{granularity}-{'dynamic' if activation.dynamic else 'static'}": (
            lambda granularity=granularity, activation=activation: writers.fp8(37, 96, granularity, activation=activation)
        )
        for granularity in ("tensor", "channel")
        for activation in (FP8_TOKEN, FP8_STATIC)
    },
    "float-weights-only": lambda: writers.fp8(37, 96, "channel", activation=None, scale_dtype=torch.bfloat16),
    "float-block": lambda: writers.fp8(256, 256, "block", activation=FP8_GROUP),
    "float-block-ragged-n": lambda: writers.fp8(200, 256, "block", activation=FP8_GROUP),
    "float-block-ragged-k": lambda: writers.fp8(130, 192, "block", activation=FP8_GROUP),
    "float-bias": lambda: writers.fp8(37, 96, "channel").with_bias(),
    "fp8-scalar": lambda: writers.fp8(37, 96, "tensor", layout="fp8", scale_shape=()),
    "fp8-one": lambda: writers.fp8(37, 96, "tensor", layout="fp8", scale_shape=(1,)),
    "fp8-static": lambda: writers.fp8(37, 96, "tensor", layout="fp8", scale_shape=(), activation=FP8_STATIC),
    "fp8-block": lambda: writers.fp8(200, 256, "block", layout="fp8", activation=FP8_GROUP),
    "modelopt-tensor": lambda: writers.fp8(37, 96, "tensor", layout="modelopt-fp8", activation=FP8_STATIC),
    "modelopt-channel": lambda: writers.fp8(37, 96, "channel", layout="modelopt-fp8"),
    "modelopt-block": lambda: writers.fp8(200, 256, "block", layout="modelopt-fp8", activation=None),
    "int8-dynamic": lambda: writers.int8(37, 100),
    "int8-static": lambda: writers.int8(37, 100, activation=INT8_STATIC),
    "int8-tensor": lambda: writers.int8(37, 100, "tensor"),
    "int8-weights-only": lambda: writers.int8(37, 100, activation=None),
    "int8-bias": lambda: writers.int8(37, 100).with_bias(),
    "int8-asymmetric-inputs": lambda: writers.int8(37, 100, activation=ActivationFormat("int8", "token", dynamic=True, symmetric=False)),
}


def _zeroed(written: Written) -> Written:
    """One group of one output all zeros, as tools write it: scale 0."""
    scales, weight = written.tensors["scales"].clone(), written.weight.clone()
    scales[1, 5] = 0.0
    weight[5, 32:64] = 0.0
    return replace(written, tensors={**written.tensors, "scales": scales}, weight=weight)


def canonical(written: Written) -> LinearWeights:
    return scheme_of(written.format).to_canonical(written.tensors, written.module, Slice.whole(written.module))


def spec_of(written: Written) -> LinearSpec:
    n, k = written.weight.shape
    form = scheme_of(written.format).form(written.module)
    return LinearSpec("layer", k, n, "bias" in written.tensors, torch.float32, CPU, torch.float32, form, written.format.describe())


def assert_computes(kernel: LinearKernel, written: Written, m: int) -> None:
    n, k = written.weight.shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    bias = written.tensors["bias"].double() if "bias" in written.tensors else torch.zeros(n, dtype=torch.float64)
    inputs = rounded(x, written.format.activation, written.tensors.get("input_scale"))
    exact = inputs @ written.weight.T + bias
    plain = torch.nn.functional.linear(inputs.float(), written.weight.float(), bias.float()).double()
    steps = written.weight.abs().amax(1)  # codes are summed around their middle: no more than a few times the greatest weight
    room = EPS * (2 * inputs.abs() @ written.weight.abs().T + 4 * k**0.5 * inputs.abs().amax(1, keepdim=True) * steps + bias.abs()).max()
    out = kernel(x, out=torch.full((m, n), float("nan")))
    assert (out.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + room
    assert room < 0.02 * exact.std()  # or the bound could not fail


@pytest.mark.parametrize("name", CASES)
def test_every_layout_on_every_kernel(name: str) -> None:
    written = CASES[name]()
    spec, weights = spec_of(written), canonical(written)
    torch.testing.assert_close(weights.dense().double(), written.weight, rtol=1e-6, atol=1e-9)
    taking = [kernel for kernel in kernels_for(CPU) if kernel.refuses(spec) is None]
    assert any(not kernel.is_reference for kernel in taking)
    for kernel_type in taking:
        kernel = kernel_type(spec, canonical(written))
        for m in ROWS:
            assert_computes(kernel, written, m)
        ids = torch.tensor([0, written.weight.shape[0] - 1, 3])
        torch.testing.assert_close(kernel.rows(ids).double(), written.weight[ids], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["fp8", "int8", "int4"])
@pytest.mark.parametrize(("n", "k"), [(37, 100), (24, 128), (16, 48)])
def test_dense_weights_quantized_while_loading(method: str, n: int, k: int) -> None:
    """No weight is further from the original than half a step of its own scale, and kernels compute what came of them."""
    dense = writers.dense(n, k)
    stored = load_time_format(method, k)
    made = replace(dense, format=stored)
    weights = canonical(made)
    found = weights.dense().double()
    peak = dense.weight.abs().amax(1, keepdim=True)
    step = {"fp8": (dense.weight.abs() / 8).clamp_min(float(peak.max()) / 448 / 512), "int8": peak / 127, "int4": peak * 2 / 15}[method]
    assert ((found - dense.weight).abs() <= step * 0.51).all() if method != "int4" else ((found - dense.weight).abs() <= step).all()
    assert (found - dense.weight).norm() < {"fp8": 0.04, "int8": 0.01, "int4": 0.15}[method] * dense.weight.norm()
    made = replace(made, weight=found)
    for kernel_type in [kernel for kernel in kernels_for(CPU) if kernel.refuses(spec_of(made)) is None]:
        for m in ROWS:
            assert_computes(kernel_type(spec_of(made), canonical(made)), made, m)


def test_rows_and_groups_of_zeros_are_quantized_while_loading() -> None:
    for method in ("fp8", "int8", "int4"):
        weight = writers.dense(9, 64).weight.float()
        weight[3] = 0.0
        weight[5, :32] = 0.0
        made = Written(load_time_format(method, 64), {"weight": weight}, weight.double())
        found = canonical(made).dense()
        assert torch.equal(found[3], torch.zeros(64))
        assert torch.equal(found[5, :32], torch.zeros(32))


BAD: dict[str, tuple[Callable[[], Written], str]] = {
    "awq-nan-scale": (lambda: _damaged(writers.awq(16, 64, 32), "scales", float("nan")), "scales holds 1 of 32 values"),
    "gptq-inf-scale": (lambda: _damaged(writers.gptq(16, 64, 32), "scales", float("inf")), "scales holds 1 of 32 values"),
    "pack-nan-scale": (lambda: _damaged(writers.pack_quantized(16, 64), "weight_scale", float("nan")), "weight_scale holds 1 of 32"),
    "fp8-nan-scale": (lambda: _damaged(writers.fp8(16, 64, "channel"), "weight_scale", float("nan")), "weight_scale holds 1 of 16"),
    "int8-nan-scale": (lambda: _damaged(writers.int8(16, 64), "weight_scale", float("nan")), "weight_scale holds 1 of 16"),
    "awq-zero-scales": (lambda: _zero(writers.awq(16, 64, 32), "scales"), "scales is 0 in all of its 32 values: .*download it again"),
    "gptq-zero-scales": (lambda: _zero(writers.gptq(16, 64, 32), "scales"), "scales is 0 in all of its 32 values"),
    "pack-zero-scales": (lambda: _zero(writers.pack_quantized(16, 64), "weight_scale"), "weight_scale is 0 in all of its 32"),
    "fp8-zero-scale": (lambda: _zero(writers.fp8(16, 64, "tensor"), "weight_scale"), "weight_scale is 0 in all of its 1 values"),
    "int8-zero-scales": (lambda: _zero(writers.int8(16, 64), "weight_scale"), "weight_scale is 0 in all of its 16"),
    "load-time-nan": (
        lambda: _damaged(replace(writers.dense(16, 64), format=load_time_format("int4", 64)), "weight", float("nan")),
        "weight holds 1 of 1024",
    ),
    "fp8-nan-weight": (lambda: _with(writers.fp8(16, 64, "channel"), "weight", _nan_codes()), "weight holds 1024 NaN of 1024 fp8"),
    "fp8-input-scale-0": (
        lambda: _with(writers.fp8(16, 64, "tensor", activation=FP8_STATIC), "input_scale", torch.tensor(0.0)),
        "input_scale is 0",
    ),
    "int8-input-scale-nan": (
        lambda: _with(writers.int8(16, 64, activation=INT8_STATIC), "input_scale", torch.tensor(float("nan"))),
        "input_scale is nan",
    ),
    "gptq-g-idx-too-far": (
        lambda: _with(writers.gptq(16, 64, 32, act_order=True), "g_idx", torch.full((64,), 2, dtype=torch.int32)),
        "g_idx names groups 2 to 2, and scales has 2",
    ),
    "gptq-g-idx-negative": (
        lambda: _with(writers.gptq(16, 64, 32, act_order=True), "g_idx", torch.full((64,), -1, dtype=torch.int32)),
        "g_idx names groups -1",
    ),
    "gptq-g-idx-scattered-unsaid": (
        lambda: _with(writers.gptq(16, 64, 32), "g_idx", writers.gptq(16, 64, 32, act_order=True).tensors["g_idx"]),
        "desc_act=false",
    ),
    "pack-g-idx-too-far": (
        lambda: _with(writers.pack_quantized(16, 64, act_order=True), "weight_g_idx", torch.full((64,), 2, dtype=torch.int32)),
        "weight_g_idx names groups 2 to 2 of 2",
    ),
    "pack-shape": (lambda: _with(writers.pack_quantized(16, 64), "weight_shape", torch.tensor([16, 60])), r"weight_shape says \[16, 60\]"),
}


def _damaged(written: Written, name: str, value: float) -> Written:
    tensor = written.tensors[name].clone()
    tensor.view(-1)[3] = value
    return _with(written, name, tensor)


def _zero(written: Written, name: str) -> Written:
    return _with(written, name, torch.zeros_like(written.tensors[name]))


def _with(written: Written, name: str, tensor: Tensor) -> Written:
    return replace(written, tensors={**written.tensors, name: tensor})


def _nan_codes() -> Tensor:
    return torch.full((16, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", BAD)
def test_damaged_tensors_are_refused(name: str) -> None:
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        canonical(make())


def test_a_g_idx_of_zeros_is_a_placeholder() -> None:
    written = writers.gptq(16, 64, 32)
    found = canonical(_with(written, "g_idx", torch.zeros(64, dtype=torch.int32)))
    torch.testing.assert_close(found.dense().double(), written.weight, rtol=1e-6, atol=1e-9)


def test_every_layout_has_a_case() -> None:
    layouts = {make().format.layout for make in CASES.values()} | {"load-time", "gguf"}
    from octavo.quant.schemes import registry

    assert layouts == set(registry._SCHEMES)


def test_specs_are_the_tensors() -> None:
    """create_weights names every tensor a writer writes, with its shape; what is missing may be."""
    for name, make in CASES.items():
        written = make()
        specs = scheme_of(written.format).create_weights(written.module)
        for spec in specs:
            tensor = next((written.tensors[key] for key in (spec.name, *spec.aliases) if key in written.tensors), None)
            assert tensor is not None or not spec.required, (name, spec.name)
            if tensor is not None:
                assert tuple(tensor.shape) == spec.shape or {tuple(tensor.shape), spec.shape} == {(), (1,)}, (name, spec.name)
                assert spec.dtype in (None, tensor.dtype) or spec.name == "bias", (name, spec.name)
                assert len(spec.axes) == len(spec.shape), (name, spec.name)
        assert set(written.tensors) <= {key for spec in specs for key in (spec.name, *spec.aliases)}, name


def test_a_module_of_a_layout_that_nobody_registered() -> None:
    module = Module(LinearFormat("awq", 4, "group", 32), 64, 16, False, torch.float32)
    with pytest.raises(ValueError, match="no scheme reads layout 'marlin'"):
        scheme_of(replace(module.format, layout="marlin"))  # type: ignore[arg-type]


# Without matrices


def form_of(weights: LinearWeights) -> dict[str, object]:
    """Shapes, dtypes and numbers, but for the one zero point of all groups, which is a value."""
    parts = {"bias": weights.bias, "input_scale": weights.input_scale}
    parts |= {"weight": weights.weight} if isinstance(weights.weight, Tensor) else vars(weights.weight)
    parts.pop("zero", None)
    return {name: (tuple(part.shape), part.dtype) if isinstance(part, Tensor) else part for name, part in parts.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_form_is_known_without_matrices(name: str) -> None:
    written = CASES[name]()
    tensors = {key: tensor.to("meta") if tensor.ndim > 1 else tensor for key, tensor in written.tensors.items()}
    assert form_of(canonical(replace(written, tensors=tensors))) == form_of(canonical(written))


@pytest.mark.parametrize("method", ["fp8", "int8", "int4"])
def test_the_form_of_what_is_quantized_while_loading_is_known_without_matrices(method: str) -> None:
    written = replace(writers.dense(37, 96), format=load_time_format(method, 96))
    tensors = {key: tensor.to("meta") for key, tensor in written.tensors.items()}
    assert form_of(canonical(replace(written, tensors=tensors))) == form_of(canonical(written))


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_form_of_gguf_blocks_is_known_without_matrices(kind: str) -> None:
    size, per_block, bits, group = BLOCKS[kind]
    blocks = torch.zeros(5, 2 * size, dtype=torch.uint8)
    module = Module(LinearFormat("gguf", bits, "group", group_size=group, gguf_type=kind), 2 * per_block, 5, False, torch.float32)
    real, meta = (GgufScheme().to_canonical({"weight": weight}, module, Slice.whole(module)) for weight in (blocks, blocks.to("meta")))
    assert form_of(meta) == form_of(real)
