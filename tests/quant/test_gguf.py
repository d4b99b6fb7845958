"""GGUF's blocks through the scheme, against the gguf package's own dequantization, and what they take when packed."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from octavo.kernels.cpu.tile import COLUMNS
from octavo.quant.cpu_kernels import GroupedPanels
from octavo.quant.linear import LinearSpec
from octavo.quant.linear_format import LinearFormat
from octavo.quant.schemes.base import Module, Slice
from octavo.quant.schemes.gguf import BLOCKS
from octavo.quant.schemes.registry import scheme_of

# Where each block has its float16 scales; all other bytes may be anything.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
CPU = torch.device("cpu")


def make_module(kind: str, n: int, k: int) -> Module:
    _, _, bits, size = BLOCKS[kind]
    return Module(LinearFormat("gguf", bits, "group", group_size=size, gguf_type=kind), k, n, False, torch.float32)


def random_blocks(kind: str, n: int, k: int) -> np.ndarray:
    """Rows of blocks of random bytes, with scales of either sign that are numbers."""
    size, weights, _, _ = BLOCKS[kind]
    generator = np.random.default_rng(n + k)
    blocks = generator.integers(0, 256, (n, k // weights, size), dtype=np.uint8)
    for start in HALVES[kind]:
        values = (generator.standard_normal(blocks.shape[:2]) * 0.05).astype(np.float16)
        blocks[..., start : start + 2] = values[..., None].view(np.uint8)
    return blocks.reshape(n, -1)


def spec_of(module: Module) -> LinearSpec:
    form = scheme_of(module.format).form(module)
    return LinearSpec("layer", module.in_features, module.out_features, False, torch.float32, CPU, torch.float32, form)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (COLUMNS + 3, 3)])
def test_weights_are_those_of_the_gguf_package(kind: str, n: int, blocks: int) -> None:
    k = blocks * BLOCKS[kind][1]
    raw, module = random_blocks(kind, n, k), make_module(kind, n, k)
    wanted = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]).copy())
    assert wanted.shape == (n, k)
    weights = scheme_of(module.format).to_canonical({"weight": torch.from_numpy(raw)}, module, Slice.whole(module))
    found = weights.dense()
    # `d * s * q - dmin * m` may be rounded in another order: by the size of its two terms, which can cancel.
    terms = wanted.abs() + (0 if weights.weight.offset is None else wanted.abs().amax(1, keepdim=True))
    assert ((found - wanted).abs() <= torch.finfo(torch.float32).eps * terms).all()
    if weights.weight.offset is None:
        assert torch.equal(found, wanted)
    kernel = GroupedPanels(spec_of(module), weights)
    rows = kernel.rows(torch.arange(n))
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(0))
    for m in (1, 9):
        out = kernel(x[:m], out=torch.empty(m, n))
        exact = x[:m].double() @ wanted.double().T
        assert (out - exact).abs().max() <= 2e-6 * (x[:m].abs().double() @ wanted.abs().double().T).max()


@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_weights_take_hardly_more_than_the_file(kind: str) -> None:
    n, k = 2 * COLUMNS, 1024
    raw, module = random_blocks(kind, n, k), make_module(kind, n, k)
    weights = scheme_of(module.format).to_canonical({"weight": torch.from_numpy(raw)}, module, Slice.whole(module))
    ratio = GroupedPanels(spec_of(module), weights).weight_bytes / raw.nbytes
    assert 0.99 < ratio <= ALLOWED.get(kind, 1.0), ratio


# Scales of 4 or 6 bits take 8: 16 (Q2_K), 4 (Q3_K, Q4_K, Q5_K) bytes a block more.
ALLOWED = {"Q2_K": 1.2, "Q3_K": 1.04, "Q4_K": 1.04, "Q5_K": 1.04}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_scale_that_is_no_number_is_refused(kind: str) -> None:
    raw, module = random_blocks(kind, 4, 512), make_module(kind, 4, 512)
    raw[2, HALVES[kind][-1] : HALVES[kind][-1] + 2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match=r"holds 1 of .* NaN or infinite"):
        scheme_of(module.format).to_canonical({"weight": torch.from_numpy(raw)}, module, Slice.whole(module))
