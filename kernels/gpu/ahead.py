"""Compiles Triton kernels for an architecture on a machine without a GPU: what serving would launch there. Knows no kernel and no model.

Inside of `target(90)` every Launch is compiled in place of being run, and any device is an H100: meta tensors do for arguments. What
comes out is what the JIT would have made on that GPU, under the same key, in the folder that TRITON_CACHE_DIR names: a server that
finds the folder at the same path compiles nothing. That asks for the same Triton, kernel sources and TRITON_ variables.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .device import Device, nearest, pretend
from .launch import Launch, collecting

# Of the stand-in: Triton keeps what it compiled by device, and what lies under 0 is the first real GPU's.
_DEVICE_INDEX = -1
_compiled_for: int | None = None


class CannotCompile(RuntimeError):
    """Kernels cannot be compiled here, or one of them not for this architecture. The text has the remedy or the compiler's reason."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel for one architecture: Triton's own object, the constexpr arguments that made it, and what ptxas told, if it ran."""

    arch: int
    options: Mapping[str, Any]
    binary: Any
    log: str

    @property
    def name(self) -> str:
        return str(self.binary.metadata.name).lstrip("_")

    @property
    def tile(self) -> str:
        """Its blocks, as far as they are named so: "16x128x128"."""
        return "x".join(str(self.options[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in self.options)


@dataclass
class Compiler:
    """Compiles launches for a device. `compiled` by Triton's hash, in the order in which they were first launched."""

    device: Device
    compiled: dict[str, Compiled] = field(default_factory=dict)

    def take(self, launch: Launch) -> None:
        """Compile it, where that has not been done. Raises CannotCompile."""
        told = io.StringIO()
        try:
            with contextlib.redirect_stdout(told):  # the log of ptxas, and where that fails the whole assembly
                binary = launch.compile()
        except Exception as error:  # Triton's own errors, LLVM's, MLIR's RuntimeError: they share no narrower base
            name = launch.kernel.fn.__name__.lstrip("_")
            raise CannotCompile(
                f"{name} with {_described(launch.options)} does not compile for sm_{self.device.arch}: {_reason(error)}"
            ) from error
        self.compiled.setdefault(binary.hash, Compiled(self.device.arch, launch.options, binary, told.getvalue()))


@contextlib.contextmanager
def target(arch: int) -> Iterator[Compiler]:
    """Until the end of the block, in the whole process, launches are compiled for `arch` (90 for sm_90) and not run.

    One architecture in the life of a process: Triton 3.6 takes its conversions from fp8 to bfloat16 from the first. Raises CannotCompile
    for a second one, under TRITON_INTERPRET=1 and without Triton; ValueError for an architecture that is too old.
    """
    global _compiled_for
    compiler = Compiler(nearest(arch))
    _check_triton()
    if _compiled_for not in (None, arch):
        raise CannotCompile(f"this process has compiled for sm_{_compiled_for}: compile for sm_{arch} in another one")
    from triton import knobs
    from triton.runtime import driver

    _compiled_for, before = arch, driver._active
    driver.set_active(_Driver(arch))
    try:
        with knobs.nvidia.scope(), pretend(arch), collecting(compiler.take):
            knobs.nvidia.dump_ptxas_log = True
            yield compiler
    finally:
        driver.set_active(before)


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise CannotCompile("Triton is not installed, and it compiles the kernels for GPUs: pip install triton")
    from triton import knobs

    if knobs.runtime.interpret:
        raise CannotCompile("TRITON_INTERPRET=1 has kernels interpreted in this process, and then none can be compiled: unset it")


class _Driver:
    """What Triton's compiler asks of a driver, for a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return _DEVICE_INDEX

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _described(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _reason(error: Exception) -> str:
    """The line that says what was wrong: of ptxas its first error, else the last line."""
    text = str(error)
    of_ptxas = re.search(r"error\s*:\s*(.+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {of_ptxas[1] if of_ptxas else lines[-1] if lines else 'no reason given'}"
