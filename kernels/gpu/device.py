"""Facts of NVIDIA architectures that kernels are planned by. Asks no device unless told to."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import torch


@dataclass(frozen=True)
class Device:
    """`arch` is 90 for sm_90; `num_sms` streaming multiprocessors, `shared_bytes` at most in one block.

    `fixed_rows` above 0: tiles, and parts of sums, as for so many rows, however many there are; so a row's bits do not depend on that.
    """

    arch: int
    num_sms: int
    shared_bytes: int
    fixed_rows: int = 0

    @property
    def has_fp8(self) -> bool:
        """Whether tensor cores multiply fp8."""
        return self.arch >= 89


# The largest part of each architecture: A100, RTX 3090, L40S, H100 SXM, B200, RTX 5090.
DEVICES: Final[dict[int, Device]] = {
    80: Device(80, 108, 166_912),
    86: Device(86, 82, 101_376),
    89: Device(89, 142, 101_376),
    90: Device(90, 132, 232_448),
    100: Device(100, 148, 232_448),
    120: Device(120, 170, 101_376),
}


def nearest(arch: int) -> Device:
    """The facts of an architecture, or of the newest known below it. Raises ValueError below sm_80."""
    known = [other for other in DEVICES if other <= arch]
    if not known:
        raise ValueError(f"sm_{arch} is older than sm_80, the first architecture that Octavo's kernels are written for")
    facts = DEVICES[max(known)]
    return Device(arch, facts.num_sms, facts.shared_bytes)


FIXED_ROWS: Final = 64  # for runs that have to repeat to the bit: tiles that many rows fill and few do not waste

_pretended: list[Device] = []


@contextmanager
def pretend(device: int | Device) -> Iterator[None]:
    """Within it, any device is this one, or the largest part of an architecture: for compiling ahead, and for the interpreter."""
    _pretended.append(nearest(device) if isinstance(device, int) else device)
    try:
        yield
    finally:
        _pretended.pop()


def is_gpu(device: torch.device) -> bool:
    """Whether kernels for NVIDIA GPUs run there: on CUDA devices, and anywhere while one is pretended."""
    return device.type == "cuda" or bool(_pretended)


def device_of(device: torch.device, *, deterministic: bool = False) -> Device:
    """The facts of a CUDA device at hand, or of the pretended one; with fixed rows where `deterministic`."""
    facts = _pretended[-1] if _pretended else _properties(device.index if device.index is not None else torch.cuda.current_device())
    return replace(facts, fixed_rows=FIXED_ROWS) if deterministic else facts


@functools.cache
def _properties(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    return Device(arch, properties.multi_processor_count, nearest(arch).shared_bytes)
