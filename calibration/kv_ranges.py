"""Ranges of the keys and values that attention reads, for an fp8 KV cache with static scales. Knows no architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FP8_MAX = 448.0
_MARGIN = 1.05  # for what was not seen, and what the last pass moves


class KVRanges:
    """The largest |k| and |v| of each attention module that `watching` saw, by its path in the block."""

    def __init__(self) -> None:
        self.largest: dict[str, tuple[float, float]] = {}

    def saw(self, module: str, k: Tensor, v: Tensor) -> None:
        before = self.largest.get(module, (0.0, 0.0))
        self.largest[module] = (max(before[0], float(k.abs().max())), max(before[1], float(v.abs().max())))

    def scales(self) -> dict[str, float]:
        """What a code is multiplied with: `<module>.k_scale` and `<module>.v_scale`, as llm-compressor names them."""
        found = {}
        for module, (k, v) in self.largest.items():
            found[f"{module}.k_scale"], found[f"{module}.v_scale"] = (_MARGIN * max(size, 1e-6) / FP8_MAX for size in (k, v))
        return found

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Inside, calls of scaled_dot_product_attention in `block` are seen."""
        inside: list[str] = []
        handles: list[Any] = []
        for name, module in block.named_modules():
            if name and any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
                handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
        try:
            with _Watch(self, inside):
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, ranges: KVRanges, inside: Sequence[str]) -> None:
        super().__init__()
        self._ranges, self._inside = ranges, inside

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self._inside:
            k = args[1] if len(args) > 1 else given["key"]
            v = args[2] if len(args) > 2 else given["value"]
            self._ranges.saw(self._inside[-1], k, v)
        return func(*args, **given)
