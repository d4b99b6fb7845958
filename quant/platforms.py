"""Which kernels a device has, fastest first, and what a device is called. Knows no kernel's inside and no checkpoint."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

import torch

from ..kernels.gpu.device import device_of, is_gpu
from .cpu_kernels import GroupedPanels, Int8Panels, WidePanels
from .dense_kernels import PackedPanels, TorchMatmul
from .gpu_kernels import TritonDense, TritonFp8, TritonInt8, TritonW4A8, TritonWeightOnly
from .gpu_peer_kernels import AwqExtension, TorchInt4Pack, TorchScaledMM
from .linear import LinearKernel
from .reference_kernel import FloatReference

ENTRY_POINTS = "octavo.quant"  # packages outside the tree: an entry point names a function that takes no argument and registers

# By platform; a GPU takes the list of its own architecture, or the newest one below it. Behind the kernels that are taken by themselves
# stand those to be chosen by name: other people's, and TritonW4A8, which quantizes inputs though the format does not.
_WEIGHT_ONLY: tuple[type[LinearKernel], ...] = (TorchMatmul, TritonDense, TritonInt8, TritonWeightOnly)
_FP8: tuple[type[LinearKernel], ...] = (TorchMatmul, TritonDense, TritonFp8, TritonInt8, TritonWeightOnly, TritonW4A8, TorchScaledMM)
_INT4: tuple[type[LinearKernel], ...] = (TorchInt4Pack, AwqExtension, FloatReference)
_KERNELS: dict[str, tuple[type[LinearKernel], ...]] = {
    "cpu": (PackedPanels, Int8Panels, WidePanels, GroupedPanels, TorchMatmul, FloatReference),
    "sm_80": _WEIGHT_ONLY + _INT4,
    "sm_89": _FP8 + _INT4,
    "sm_90": _FP8 + _INT4,
    "sm_100": _FP8 + _INT4,
}


def platform_of(device: torch.device) -> str:
    """ "cpu", or a CUDA device's architecture such as "sm_90". Meta tensors lie on the GPU that kernels are compiled ahead for."""
    if device.type == "meta" or (device.type != "cuda" and is_gpu(device)):
        return f"sm_{device_of(device).arch}"
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def kernels_for(device: torch.device) -> tuple[type[LinearKernel], ...]:
    """The ordered list of a device's platform. Raises ValueError for a device without one."""
    return kernels_for_platform(platform_of(device))


def kernels_for_platform(platform: str) -> tuple[type[LinearKernel], ...]:
    """The ordered list of "cpu" or an architecture such as "sm_90", at hand or not. Raises ValueError for one that has none."""
    load_plugins()
    if platform in _KERNELS:
        return _KERNELS[platform]
    known = sorted((name for name in _KERNELS if name.startswith("sm_")), key=_architecture)
    below = [name for name in known if platform.startswith("sm_") and _architecture(name) <= _architecture(platform)]
    if not below:
        raise ValueError(f"no linear kernels for {platform}: there are some for {', '.join(_KERNELS)}")
    return _KERNELS[below[-1]]


def kernel_names() -> tuple[str, ...]:
    """Every registered kernel's name, for --linear-backend."""
    load_plugins()
    return tuple(dict.fromkeys(kernel.name for kernels in _KERNELS.values() for kernel in kernels))


def register_kernel(platform: str, kernel: type[LinearKernel], *, before: str | None = None) -> None:
    """Put a kernel into a platform's list, before the one of that name or first of all. Raises ValueError for an unknown name."""
    kernels = _KERNELS.get(platform, (FloatReference,))
    names = [other.name for other in kernels]
    if before is not None and before not in names:
        raise ValueError(f"platform {platform} has no kernel {before!r}: it has {', '.join(names)}")
    if kernel.name in names:
        raise ValueError(f"platform {platform} already has a kernel {kernel.name!r}")
    place = names.index(before) if before is not None else 0
    _KERNELS[platform] = (*kernels[:place], kernel, *kernels[place:])


@functools.cache
def load_plugins() -> None:
    """Let installed packages register their kernels and schemes, once."""
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()()


def _architecture(platform: str) -> int:
    return int(platform.removeprefix("sm_"))
