"""The machine, as `octavo doctor` tells it: processor, memory, CUDA devices. Knows no kernel and no model."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .memory import DeviceMemory, device_memory

# LLVM's names of the instruction sets that kernels here or oneDNN choose by, and ours.
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512vnni": "AVX512-VNNI",
    "avxvnni": "AVX-VNNI",
    "avx512bf16": "AVX512-BF16",
    "amx-int8": "AMX-INT8",
    "amx-bf16": "AMX-BF16",
    "neon": "NEON",
    "dotprod": "DotProd",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Processor:
    """The CPU. `usable_cores`: those this process may run on; `quota`: how many cores' worth of time its container has, None: no limit."""

    model: str
    architecture: str
    usable_cores: int
    machine_cores: int
    quota: float | None
    has: tuple[str, ...]
    lacks: tuple[str, ...]


@dataclass(frozen=True)
class CudaDevice:
    """A GPU that torch sees."""

    name: str
    architecture: str
    memory: DeviceMemory


@dataclass(frozen=True)
class Machine:
    """What there is to compute on. `cuda_note`: driver and runtime, or why there is no CUDA device."""

    processor: Processor
    memory: DeviceMemory
    cuda_devices: tuple[CudaDevice, ...]
    cuda_note: str


def read_machine() -> Machine:
    """Look at this machine; nothing is allocated on a GPU but its context."""
    return Machine(_processor(), device_memory(torch.device("cpu")), _cuda_devices(), _cuda_note())


def _processor() -> Processor:
    from llvmlite import binding

    features = binding.get_host_cpu_features()  # what the compiled kernels are made for
    is_arm = platform.machine().lower() in ("aarch64", "arm64")
    arm_only = ("neon", "dotprod", "i8mm", "bf16", "sve")
    ours = {name: told for name, told in _INSTRUCTION_SETS.items() if (name in arm_only) == is_arm}
    return Processor(
        model=_model_name(Path("/proc/cpuinfo")) or platform.processor() or "unknown",
        architecture=platform.machine(),
        usable_cores=len(os.sched_getaffinity(0)),
        machine_cores=os.cpu_count() or 1,
        quota=_cpu_quota(Path("/sys/fs/cgroup")),
        has=tuple(told for name, told in ours.items() if features.get(name)),
        lacks=tuple(told for name, told in ours.items() if not features.get(name)),
    )


def _model_name(cpuinfo: Path) -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1].strip() if found else None


def _cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that the cgroup (version 2, then 1) allows."""
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            text = (root / quota).read_text() + (" " + (root / period).read_text() if period else "")
            allowed, each = map(int, text.split())
        except (OSError, ValueError):  # absent, or "max": no limit
            continue
        if allowed > 0:
            return allowed / each
    return None


def _cuda_devices() -> tuple[CudaDevice, ...]:
    if not torch.cuda.is_available():
        return ()
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return tuple(
        CudaDevice(torch.cuda.get_device_name(device), "sm_{}{}".format(*torch.cuda.get_device_capability(device)), device_memory(device))
        for device in devices
    )


def _cuda_note() -> str:
    driver = _driver_version(Path("/proc/driver/nvidia/version"))
    built_for = torch.version.cuda
    if torch.cuda.is_available():
        return f"driver {driver or 'unknown'}, torch built for CUDA {built_for}"
    if driver is None:
        return "no NVIDIA driver here" + ("" if built_for else ", and torch is a CPU build")
    if built_for is None:
        return f"driver {driver} is here, but torch is a CPU build: install a CUDA build of torch to use the GPU"
    return f"driver {driver} is here, torch is built for CUDA {built_for} and sees no device: the driver may be too old for it"


def _driver_version(path: Path) -> str | None:
    found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", path.read_text()) if path.is_file() else None
    return found[1] if found else None
