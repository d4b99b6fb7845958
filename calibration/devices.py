"""Where a quantization computes: the CPU, or a GPU when there is one. Host memory holds the streams; a block is on the device."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..quant.dense_kernels import cpu_has_bf16_units

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """The device that "auto" (CUDA when there is one), "cpu" or "cuda" means. Raises ValueError for one that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r} is not valid: give auto, cpu or cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device cuda is not there: torch finds no CUDA device; give --device cpu, or leave it out")
    return torch.device("cuda", torch.cuda.current_device()) if there and name != "cpu" else CPU


def device_name(device: torch.device) -> str:
    """For people."""
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def free_bytes(device: torch.device) -> int | None:
    """Of a device with a memory of its own; None for the CPU."""
    if device.type != "cuda":
        return None
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def give_back_memory() -> None:
    """Have the C library give back what it holds free: of blocks that come and go it would else keep a little more each time (glibc)."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(device: torch.device) -> int:
    """The most that tensors ever took on a device with a memory of its own; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def has_quick_halves(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpu_has_bf16_units()


def quick_dtype(device: torch.device) -> torch.dtype:
    """What a model multiplies in `quick_products`."""
    return torch.bfloat16 if has_quick_halves(device) else torch.float32


@contextmanager
def quick_products(device: torch.device) -> Iterator[None]:
    """Inside, a model multiplies bfloat16 numbers where that is faster; sums, norms and the hidden state stay float32. For running models
    alone: what is computed of what they give must be outside, or in `exact_products`."""
    if (dtype := quick_dtype(device)) is torch.float32:
        yield
        return
    with torch.autocast(device.type, dtype):
        yield


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Inside, products are of what is multiplied, in `quick_products` too."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Inside, tensors that are made are made on `device`; what must not be says so. A GPU's sums come in one order: runs give the same."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with device:
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
