"""DummySource: random weights in the form that a config asks for, so that speed can be measured without a download. Reads no file.

What comes out is a model of the config's sizes and formats that says nothing: its weights have the magnitudes of trained ones, so that
activations stay finite. The same config gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch

from ..quant.build import KernelOptions
from ..quant.checkpoint.reader import TensorInfo
from ..quant.linear import WeightSpec
from ..quant.linear_format import LinearFormat
from ..quant.module_formats import ModuleFormats
from ..quant.schemes.base import Slice
from .weights import WeightSource

_MAGNITUDE = 0.02  # of a weight, as models are initialized with
_ROWS = 1 << 12  # made at a time, so that no float32 copy of a matrix is needed


class _NoFiles:
    """A reader of nothing."""

    metadata: Mapping[str, Any] = MappingProxyType({})

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        raise KeyError(name)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class DummySource(WeightSource):
    """Gives every tensor that a model cannot do without, made on the device where it goes, and none that it can."""

    def __init__(
        self, formats: ModuleFormats, *, weight_dtype: torch.dtype, activation_dtype: torch.dtype, device: torch.device,
        kernel_options: KernelOptions | None = None, has_head: bool = True,
    ) -> None:  # fmt: skip
        """`has_head`: the model's head has weights of its own."""
        super().__init__(
            _NoFiles(),
            formats,
            weight_dtype=weight_dtype,
            activation_dtype=activation_dtype,
            device=device,
            kernel_options=kernel_options,
            show_progress=False,
        )
        self._has_head = has_head
        is_meta = device.type == "meta"  # matrices of no data; what is smaller decides on forms and is made
        self._random = torch.Generator("cpu" if is_meta else device).manual_seed(0)

    def has_module(self, module: str) -> bool:
        return module != "lm_head" or self._has_head

    def file_of(self, module: str) -> str:
        return "no file (--load-format dummy)"

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        if self._is_left_empty(shape):
            return torch.empty(shape, dtype=dtype or self.weight_dtype, device=self.device)
        noise = torch.randn(shape, generator=self._random, device=self._random.device)
        return (1.0 + 0.1 * noise).to(dtype or self.weight_dtype)

    def read_for_linear(self, module: str, spec: WeightSpec, part: Slice, total: tuple[int, int]) -> torch.Tensor | None:
        if not spec.required:
            return None
        stored = self.formats.of(module, in_features=total[1], out_features=total[0])
        shape = list(spec.shape)
        for index, axis in enumerate(spec.axes):
            bounds, whole = ((part.out_start, part.out_stop), total[0]) if axis.role == "out" else ((part.in_start, part.in_stop), total[1])
            if axis.role in ("out", "in", "group") and bounds != (0, whole):
                start, stop = axis.cut(*bounds, whole)
                shape[index] = stop - start
        return self._made(spec, tuple(shape), stored)

    def _is_left_empty(self, shape: tuple[int, ...]) -> bool:
        return self.device.type == "meta" and len(shape) > 1

    def _made(self, spec: WeightSpec, shape: tuple[int, ...], stored: LinearFormat) -> torch.Tensor:
        if self._is_left_empty(shape):
            return torch.empty(shape, dtype=spec.dtype or self._usual_dtype(spec), device=self.device)
        if spec.dtype in (torch.int32, torch.int8, torch.uint8):
            is_middle = spec.dtype == torch.int32 and stored.symmetric and "zero" in spec.name
            return self._middle(shape, stored) if is_middle else self._integers(shape, spec.dtype)
        if spec.dtype == torch.float8_e4m3fn:
            return self._normal(shape, spec.dtype, 1.0)
        dtype = spec.dtype or self.weight_dtype
        if spec.name == "bias":
            return torch.zeros(shape, dtype=dtype, device=self._random.device)
        if "scale" not in spec.name:
            return self._normal(shape, dtype, _MAGNITUDE)
        # Codes of b bits spread evenly over 2 ** b values; those of fp8 were drawn with a magnitude of 1, inputs have one of about 3.
        spread = 1.0 if stored.weight_type.startswith("fp") else 2.0**stored.bits / math.sqrt(12.0)
        value = 0.01 if spec.name.startswith(("input", "activation")) else _MAGNITUDE / spread
        return torch.full(shape, value, dtype=torch.float32 if spec.dtype is None else dtype, device=self._random.device)

    def _usual_dtype(self, spec: WeightSpec) -> torch.dtype:
        """Of a matrix that checkpoints may have in any float: what theirs are in."""
        if "scale" not in spec.name:
            return self.weight_dtype
        return torch.float16 if self.formats.method in ("awq", "gptq") else torch.float32

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype, magnitude: float) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=self._random.device)
        for part in torch.split(out, _ROWS) if out.ndim else (out,):
            part.copy_(torch.randn(part.shape, generator=self._random, device=self._random.device) * magnitude)
        return out

    def _integers(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max + 1, shape, generator=self._random, dtype=dtype, device=self._random.device)

    def _middle(self, shape: tuple[int, ...], stored: LinearFormat) -> torch.Tensor:
        """Words of zero points that all are the middle, as symmetric GPTQ stores them."""
        bits, value = stored.bits, (1 << (stored.bits - 1)) - stored.zero_offset
        period = bits // math.gcd(bits, 32)
        words = [sum(((value >> ((32 * word + bit) % bits)) & 1) << bit for bit in range(32)) for word in range(period)]
        signed = torch.tensor([word - (1 << 32) if word >> 31 else word for word in words], dtype=torch.int32)
        return signed.repeat(-(-shape[-1] // period))[: shape[-1]].expand(shape).contiguous().to(self._random.device)
