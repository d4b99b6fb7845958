"""One launch of a Triton kernel as a value, and where launches go: to the GPU, or to whoever collects them. Knows no kernel.

Launchers build these from tensors alone, allocate nothing and decide nothing from values on the device: so they can be captured in a
CUDA graph, and compiled ahead on a machine without a GPU (ahead.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Said though it is the default: Triton 3.10 changes it.
_ALWAYS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """`kernel` is a @triton.jit function, `options` its constexpr arguments with num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: Mapping[str, Any]

    def __call__(self) -> None:
        """Run it on the current stream, or hand it to the collector."""
        if _collector is None:
            self.kernel[self.grid](*self.args, **_ALWAYS, **self.options)
        else:
            _collector(self)

    def compile(self) -> Any:
        """The compiled kernel for the active driver's target, not run."""
        return self.kernel.warmup(*self.args, grid=self.grid, **_ALWAYS, **self.options)


_collector: Callable[[Launch], None] | None = None


@contextlib.contextmanager
def collecting(collector: Callable[[Launch], None]) -> Iterator[None]:
    """Until the end of the block, in the whole process, launches are handed to `collector` and not run."""
    global _collector
    before, _collector = _collector, collector
    try:
        yield
    finally:
        _collector = before
