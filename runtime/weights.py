"""WeightSource: hands a model its tensors, one at a time. Knows neither an architecture nor what a format's bits mean."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from tqdm import tqdm

from ..quant.build import KernelOptions
from ..quant.checkpoint.errors import CheckpointError
from ..quant.checkpoint.gguf_reader import GgufReader
from ..quant.checkpoint.reader import TensorInfo, WeightReader, find_tensor
from ..quant.linear import WeightSpec
from ..quant.module_formats import ModuleFormats
from ..quant.schemes.base import Slice

_KEPT = (torch.float16, torch.bfloat16, torch.float32)
# Written by some tools and without effect on the answer.
_HARMLESS = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


class WeightSource:
    """Reads from `reader`, checks shapes, converts to `weight_dtype`, and shows progress in bytes. A context manager.

    `activation_dtype` is what kernels take and give on `device`; `formats` says how each linear is stored; `is_wanted` which tensors will
    be asked for, by name.
    """

    def __init__(
        self,
        reader: WeightReader,
        formats: ModuleFormats,
        *,
        weight_dtype: torch.dtype,
        activation_dtype: torch.dtype,
        device: torch.device,
        kernel_options: KernelOptions | None = None,
        show_progress: bool = True,
        is_wanted: Callable[[str], bool] | None = None,
    ) -> None:
        self._reader = reader
        self._infos = reader.tensors()
        self.formats = formats
        self.weight_dtype = weight_dtype
        self.activation_dtype = activation_dtype
        self.device = device
        self.kernel_options = kernel_options or KernelOptions()
        self._unread = dict(self._infos)
        total = sum(info.nbytes for name, info in self._infos.items() if is_wanted is None or is_wanted(name))
        # None: a bar on a terminal, nothing in a log file.
        hidden = None if show_progress else True
        self._bar = tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024, disable=hidden, file=sys.stderr)

    def has(self, name: str) -> bool:
        return name in self._infos

    def has_module(self, module: str) -> bool:
        """Whether any tensor belongs to a module."""
        return any(name.startswith(f"{module}.") for name in self._infos)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """One floating-point tensor on the CPU, of exactly `shape`, in `dtype` or the weights'. CheckpointError when it is not so."""
        info = self._infos.get(name)
        if info is not None:
            _check_shape(info, shape)
        tensor = self._reader.read(name)
        self._mark_read(name)
        if not tensor.is_floating_point():
            raise CheckpointError(f"tensor {name!r} holds {tensor.dtype}, where the model has floating point")
        return tensor.to(dtype or self.weight_dtype)

    def read_norm(self, name: str, size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A norm's weights [size] in `dtype` or the activations', on the device. CheckpointError also for a NaN or an infinity."""
        tensor = self.read(name, (size,), dtype or self.activation_dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"tensor {name!r} in {self._infos[name].file} holds NaN or infinity: the file is damaged, download it again"
            )
        return tensor.to(self.device)

    def read_for_linear(self, module: str, spec: WeightSpec, part: Slice, total: tuple[int, int]) -> torch.Tensor | None:
        """One tensor of a module, cut to `part` of `total` (out, in) features; None when it is absent and not required.

        Raises CheckpointError naming file and tensor for a missing one, a shape or a dtype that the format does not have.
        """
        name = next((f"{module}.{other}" for other in (spec.name, *spec.aliases) if f"{module}.{other}" in self._infos), None)
        if name is None:
            if not spec.required:
                return None
            name = f"{module}.{spec.name}"
            find_tensor(self._infos, name, self._root())
        info = self._infos[name]
        is_raw = spec.dtype == torch.uint8
        if not is_raw and not (spec.shape == () and info.shape == (1,)) and not (spec.shape == (1,) and info.shape == ()):
            _check_shape(info, spec.shape)
        ranges = [self._range(info, axis_index, spec, part, total) for axis_index in range(len(spec.axes))]
        tensor = self._read_rows(name, info, ranges[0] if ranges else None, is_raw=is_raw)
        for dim, cut in list(enumerate(ranges))[1:]:
            if cut is not None:
                tensor = tensor.narrow(dim, cut[0], cut[1] - cut[0])
        self._mark_read(name)
        return _converted(tensor, info, spec).contiguous()

    def _range(self, info: TensorInfo, index: int, spec: WeightSpec, part: Slice, total: tuple[int, int]) -> tuple[int, int] | None:
        """Stored elements of one axis that belong to a slice; None: all."""
        axis = spec.axes[index]
        if axis.role == "out":
            bounds, whole = (part.out_start, part.out_stop), total[0]
        elif axis.role in ("in", "group"):
            bounds, whole = (part.in_start, part.in_stop), total[1]
        else:
            return None
        if bounds == (0, whole):
            return None
        try:
            return axis.cut(*bounds, whole)
        except ValueError as error:
            raise CheckpointError(f"tensor {info.name!r} in {info.file}: {error}") from error

    def _read_rows(self, name: str, info: TensorInfo, cut: tuple[int, int] | None, *, is_raw: bool) -> torch.Tensor:
        rows = None if cut is None else slice(*cut)
        if not is_raw:
            return self._reader.read(name, rows)
        if not isinstance(self._reader, GgufReader):
            raise CheckpointError(f"tensor {name!r} in {info.file} is not made of GGUF blocks")
        return torch.from_numpy(self._reader.read_raw(name, rows)[0])

    def _mark_read(self, name: str) -> None:
        info = self._unread.pop(name, None)
        if info is not None:
            self._bar.update(info.nbytes)

    def _root(self) -> Path:
        return next(iter(self._infos.values())).file.parent

    def file_of(self, module: str) -> str:
        """The file that holds a module, for messages."""
        return next((str(info.file) for name, info in self._infos.items() if name.startswith(f"{module}.")), "the checkpoint")

    @property
    def unread(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that nobody asked for and that could have changed the answer."""
        return tuple(name for name in self._unread if not name.endswith(_HARMLESS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()
        self._reader.close()


class HeaderSource(WeightSource):
    """Reads no matrix: gives meta tensors of their form in their place. Scalars and vectors are read, because they decide on forms."""

    def _read_rows(self, name: str, info: TensorInfo, cut: tuple[int, int] | None, *, is_raw: bool) -> torch.Tensor:
        if len(info.shape) < 2:
            return super()._read_rows(name, info, cut, is_raw=is_raw)
        rows = info.shape[0] if cut is None else cut[1] - cut[0]
        if is_raw:
            return torch.empty(rows, info.nbytes // info.shape[0], dtype=torch.uint8, device="meta")
        return torch.empty(rows, *info.shape[1:], dtype=info.dtype, device="meta")


def _check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"tensor {info.name!r} in {info.file} has shape {info.shape}, the config asks for {shape}: config and weights do not fit"
        )


def _converted(tensor: torch.Tensor, info: TensorInfo, spec: WeightSpec) -> torch.Tensor:
    """The tensor in the dtype that the format has. Raises CheckpointError for a stored dtype of another kind."""
    wanted = spec.dtype
    if wanted in (torch.int32, torch.int64) and tensor.dtype in (torch.int32, torch.int64, torch.uint32):
        return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor.to(wanted)
    is_number = tensor.dtype in (*_KEPT, torch.float64)
    if wanted is None and is_number:
        return tensor if tensor.dtype in _KEPT else tensor.float()
    if wanted in _KEPT and is_number:
        return tensor.to(wanted)
    if tensor.dtype == wanted:
        return tensor
    kind = "floating point" if wanted is None or wanted in _KEPT else str(wanted).removeprefix("torch.")
    raise CheckpointError(
        f"tensor {info.name!r} in {info.file} holds {str(tensor.dtype).removeprefix('torch.')} where its format has {kind}: "
        "the quantization config does not fit these weights"
    )
