"""Other people's int4 kernels from a folder that was carried along: what `--peers DIR` finds in it. Copies nothing of theirs.

    DIR/marlin      a checkout of https://github.com/IST-DASLab/marlin; compiled here with nvcc, which takes minutes
    DIR/conch       https://pypi.org/project/conch-triton-kernels/, unpacked so that DIR/conch/conch/__init__.py is there
    DIR/gemlite     https://pypi.org/project/gemlite/, unpacked so that DIR/gemlite/gemlite/__init__.py is there

Each takes symmetric int4 in groups of 128 and float16 inputs, so all multiply the same numbers; the results are checked like our own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.kernels.grouped_linear import GroupedWeight, dequantize

from .record import one_line

# Takes x [M, K] float16 and where the product may go; gives it where it lies elsewhere.
PeerLinear = Callable[[Tensor, Tensor], Tensor | None]


class Peer(Protocol):
    """Somebody else's int4 linear."""

    name: str

    def linears(self, weights: Sequence[GroupedWeight]) -> list[PeerLinear]:
        """Pack symmetric weights in groups of 128, codes [N, K], scales float16, as the peer wants them."""


class Marlin:
    """IST-DASLab's CUDA kernel, through the layer that comes with it."""

    name = "marlin"

    def __init__(self, folder: Path) -> None:
        from torch.utils.cpp_extension import load

        sources = sorted(str(path) for path in (folder / "marlin").glob("marlin_cuda*") if path.suffix in (".cpp", ".cu"))
        if not sources:
            raise FileNotFoundError(f"{folder}/marlin has no marlin_cuda*.cpp and .cu")
        sys.modules["marlin_cuda"] = load("marlin_cuda", sources, extra_cuda_cflags=["-O3"])
        self._module = _imported("marlin", folder)

    def linears(self, weights: Sequence[GroupedWeight]) -> list[PeerLinear]:
        """All with the first one's numbers: packing is slow, and takes place on the host."""
        weight = weights[0]
        n, k = weight.codes.shape
        layer = self._module.Layer(k, n, groupsize=weight.group_size).to(weight.codes.device)
        linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float16, device="meta")
        linear.weight = torch.nn.Parameter(dequantize(weight).half(), requires_grad=False)
        layer.pack(linear, weight.scale.half())
        mul, scales, workspace = self._module.mul, layer.s, layer.workspace

        def call(packed: Tensor, x: Tensor, out: Tensor) -> None:
            mul(x, packed, out, scales, workspace)

        return [partial(call, layer.B.clone()) for _ in weights]


class Conch:
    """Conch's mixed-precision product in Triton."""

    name = "conch"

    def __init__(self, folder: Path) -> None:
        _imported("conch", folder)
        self._gemm: Any = importlib.import_module("conch.ops.quantization.gemm").mixed_precision_gemm

    def linears(self, weights: Sequence[GroupedWeight]) -> list[PeerLinear]:
        return [self._linear(weight) for weight in weights]

    def _linear(self, weight: GroupedWeight) -> PeerLinear:
        words = _words(weight.codes)
        scales, gemm, size = weight.scale.half().t().contiguous(), self._gemm, weight.group_size

        def call(x: Tensor, out: Tensor) -> Tensor:
            product: Tensor = gemm(x, words, scales, None, weight_size_bits=4, weight_bias=8, group_size=size)
            return product

        return call


class GemLite:
    """GemLite's kernels in Triton, which tune themselves at the first call."""

    name = "gemlite"

    def __init__(self, folder: Path) -> None:
        _imported("gemlite", folder)
        self._helper: Any = importlib.import_module("gemlite.helper").A16Wn

    def linears(self, weights: Sequence[GroupedWeight]) -> list[PeerLinear]:
        return [self._linear(weight) for weight in weights]

    def _linear(self, weight: GroupedWeight) -> PeerLinear:
        scales = weight.scale.half()
        helper = self._helper(device=str(weight.codes.device), dtype=torch.float16)
        layer: Any = helper.from_weights(weight.codes, scales, torch.full_like(scales, 8), 4, weight.group_size)

        def call(x: Tensor, out: Tensor) -> Tensor:
            product: Tensor = layer(x)
            return product

        return call


_PEERS: tuple[tuple[str, Callable[[Path], Peer]], ...] = (("marlin", Marlin), ("conch", Conch), ("gemlite", GemLite))


def load_peers(folder: Path) -> tuple[tuple[Peer, ...], dict[str, str]]:
    """Those that load, and why the others do not."""
    loaded, faults = [], {}
    for name, peer in _PEERS:
        try:
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"{folder / name} is not there")
            loaded.append(peer(folder / name))
        except Exception as error:  # a compiler, a linker or another torch: whatever it is, the others are timed
            faults[name] = one_line(error)
    return tuple(loaded), faults


def _imported(name: str, folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def _words(codes: Tensor) -> Tensor:
    """int32 [K / 8, N], the first input in the lowest bits."""
    nibbles = codes.t().reshape(-1, 8, codes.shape[0]).to(torch.int32)
    words = torch.zeros_like(nibbles[:, 0])
    for place in range(8):
        words |= nibbles[:, place] << (4 * place)
    return words.contiguous()
