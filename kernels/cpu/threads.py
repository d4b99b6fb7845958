"""Run a compiled kernel on the thread team that torch already has. Knows OpenMP's entry point and no kernel.

A second pool (Numba's own) would fight torch's for the same cores: each spins for a while after its region ends. So kernels
run on torch's own OpenMP team, through the entry point that compilers use (`GOMP_parallel`, which LLVM's and Intel's
runtimes export too). Where no such library is loaded, kernels run on the calling thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
from pathlib import Path
from typing import Any, Final

import torch
from numba import types

KERNEL_SIGNATURE: Final = types.void(types.int64)  # the address of an int64 array: what GOMP_parallel's void* holds


@functools.cache
def _openmp() -> Any:
    """torch's OpenMP runtime, or None."""
    names = re.compile(r"lib(gomp|iomp5|omp)[^/]*\.(so|dylib)[^/]*$")
    candidates: list[str] = []
    maps = Path("/proc/self/maps")
    if maps.exists():
        candidates = sorted({line.split()[-1] for line in maps.read_text().splitlines() if names.search(line)})
    torch_lib = os.path.join(os.path.dirname(torch.__file__), "")
    candidates.sort(key=lambda path: not path.startswith(torch_lib))
    for path in candidates:
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_thread_num"):
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


@functools.cache
def openmp_library() -> str | None:
    """Path of the OpenMP runtime that kernels run on; None when they run on one thread."""
    library = _openmp()
    return None if library is None else str(library._name)


class Kernel:
    """A compiled kernel `f(address of int64 arguments)` and how to start it on a team.

    The first two arguments are reserved: [0] counts tasks handed out (set to 0 at each start; kernels take the next task
    with an atomic add, so a thread that lost its core holds nobody up), [1] is the team's size.
    """

    def __init__(self, cfunc: Any) -> None:
        self._cfunc = cfunc  # keeps the machine code alive
        self._address = int(cfunc.address)
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._address)

    def __call__(self, threads: int, *arguments: int) -> None:
        """Run on `threads` threads (at most torch's) and wait. The interpreter lock is free meanwhile."""
        library = _openmp() if threads > 1 else None
        # Fresh bytes for each call: the kernel counts tasks in them, and nobody else has seen them.
        packed = struct.pack(f"{len(arguments) + 2}q", 0, 1 if library is None else threads, *arguments)
        if library is None:
            self._serial(packed)
        else:
            library.GOMP_parallel(self._address, packed, threads, 0)


def team_size() -> int:
    """How many threads torch uses within an operation."""
    return torch.get_num_threads()
