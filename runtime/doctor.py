"""`examine`: everything `octavo doctor` tells, as plain data, and what of it would keep a server from working. Prints nothing."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..quant.kernel_trials import Choice, Trial, kernel_choices, kernel_trials
from ..quant.platforms import kernels_for, platform_of
from .config import EngineConfig
from .doctor_machine import Machine, read_machine
from .doctor_packages import OptionalPackage, optional_packages, requirement_faults, versions
from .model_runner import choose_device


@dataclass(frozen=True)
class DeviceKernels:
    """The linear kernels of one platform, fastest first; `fault` in their place where there are none."""

    device: str
    platform: str
    kernels: tuple[str, ...]
    choices: tuple[Choice, ...]
    trials: tuple[Trial, ...]
    fault: str | None = None


@dataclass(frozen=True)
class KernelCache:
    """Where compiled CPU kernels are kept. Without a writable folder each start compiles them again."""

    folder: str
    is_writable: bool
    num_kernels: int


@dataclass(frozen=True)
class Diagnosis:
    """`problems`: what would keep `octavo serve` from working, with remedies; empty when nothing would."""

    machine: Machine
    versions: dict[str, str | None]
    devices: tuple[DeviceKernels, ...]
    default_device: str
    packages: tuple[OptionalPackage, ...]
    cache: KernelCache
    problems: tuple[str, ...]


def examine() -> Diagnosis:
    """Look, import and compute for some seconds. Nothing is fetched; nothing is written but compiled kernels."""
    with ThreadPoolExecutor(1) as pool:
        packages = pool.submit(optional_packages)  # they wait for other processes
        machine = read_machine()
        devices = [_device_kernels(torch.device(name)) for name in (["cpu", "cuda"] if machine.cuda_devices else ["cpu"])]
    default = choose_device(EngineConfig()).type
    served_on = next(device for device in devices if device.device == default)
    cache = _cache(Path(os.environ["NUMBA_CACHE_DIR"]))
    problems = [*requirement_faults(), *_problems(served_on, cache)]
    return Diagnosis(
        machine=machine,
        versions=versions(),
        devices=tuple(devices),
        default_device=default,
        packages=packages.result(),
        cache=cache,
        problems=tuple(problems),
    )


def _device_kernels(device: torch.device) -> DeviceKernels:
    platform = platform_of(device)
    try:
        kernels = kernels_for(device)
    except ValueError as error:
        return DeviceKernels(device.type, platform, (), (), (), str(error))
    return DeviceKernels(device.type, platform, tuple(kernel.name for kernel in kernels), kernel_choices(device), kernel_trials(device))


def _problems(device: DeviceKernels, cache: KernelCache) -> list[str]:
    if device.fault is not None:
        return [f"{device.fault}: serve with --device cpu"]
    if device.device == "cpu" and not cache.is_writable:  # then none can be tried either
        return [f"compiled CPU kernels cannot be kept in {cache.folder}: set OCTAVO_CACHE_DIR to a folder that can be written to"]
    wrong = [f"kernel {trial.kernel} fails on {trial.weights}: {trial.fault}" for trial in device.trials if trial.fault is not None]
    missing = [f"no kernel takes {choice.weights} on {device.platform}" for choice in device.choices if choice.kernel is None]
    return wrong + missing


def _cache(folder: Path) -> KernelCache:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return KernelCache(str(folder), existing.is_dir() and os.access(existing, os.W_OK | os.X_OK), sum(1 for _ in folder.rglob("*.nbc")))
