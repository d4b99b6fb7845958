"""Memory: how large the KV pool can be, and the budget table that says so. Knows sizes, not tensors' contents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from .config import EngineConfig

_GIB = 1 << 30
_HEADROOM = 0.9  # of what is free now: the rest is for activations, the allocator and other processes
_MEASURED_MARGIN = 0.02  # of the device, where a step was measured: fragments, captured graphs, libraries that load late


class OutOfMemoryPlan(ValueError):
    """Weights and the smallest useful KV pool do not fit; the text says what to change and by how much."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of the device (for the CPU, of the machine or the container) and how many are free now."""

    name: str
    total: int
    free: int

    def share(self, ranks: int) -> DeviceMemory:
        """An equal part of it for each of `ranks` processes."""
        return self if ranks == 1 else DeviceMemory(f"1/{ranks} of {self.name}", self.total // ranks, self.free // ranks)


@dataclass(frozen=True)
class MemoryBudget:
    """What goes where, in bytes; `num_tokens` is the KV pool's size, which the flag in `decided_by` set.

    `activations`: what a step allocates at most, where that was measured; weights and workspace are no part of what is free then.
    """

    device: DeviceMemory
    weights: int
    workspace: int
    kv_per_token: int
    kv_dtype: str
    num_tokens: int
    decided_by: str  # flag and value
    allowed_more: str | None = None  # the other flag, where both were given
    activations: int | None = None

    def table(self) -> str:
        """The budget for people, with the flags that move it."""
        kv = self.num_tokens * self.kv_per_token
        measured = self.activations is not None
        left = self.device.free - (self.workspace if self.activations is None else self.activations) - kv
        rows = (
            ("weights (loaded)", self.weights, ""),
            ("workspace", self.workspace, "buffers of one step" if measured else "activations of one step"),
            *((("activations", self.activations, "of the largest step, measured"),) if self.activations is not None else ()),
            ("KV cache", kv, f"{self.num_tokens:,} tokens of {self.kv_per_token / 1024:.1f} KiB ({self.kv_dtype})"),
            ("left", left, f"of {self.device.total / _GIB:.2f} GiB"),
        )
        lines = [f"Memory of {self.device.name}:"]
        lines += [f"  {name:<17}{size / _GIB:8.2f} GiB  {note}".rstrip() for name, size, note in rows]
        beside = f" ({self.allowed_more} allows more)" if self.allowed_more else ""
        lines.append(
            f"  The KV cache follows {self.decided_by}{beside}: raise it to hold more tokens, lower it to leave more memory to others."
        )
        return "\n".join(lines)


def device_memory(device: torch.device) -> DeviceMemory:
    """Read the device's memory now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(torch.cuda.get_device_name(device), total, free)
    machine = psutil.virtual_memory()
    limit, used = _container_memory()
    if limit is not None and limit < machine.total:
        return DeviceMemory("this container", limit, min(machine.available, limit - used))
    return DeviceMemory("this machine", machine.total, machine.available)


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """The cgroup's memory limit and use (version 2, then 1), without cached files that nobody uses; None without a limit."""
    for limit, used, stat, unused in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            figures = dict(line.split() for line in (root / stat).read_text().splitlines())
            return int((root / limit).read_text()), max(0, int((root / used).read_text()) - int(figures.get(unused, 0)))
        except (OSError, ValueError):
            continue
    return None, 0


class _Wish(NamedTuple):
    """A pool that one flag asks for, and the most that the flag can be on this device."""

    tokens: int
    flag: str
    most: str


def plan_memory(
    config: EngineConfig,
    *,
    device: DeviceMemory,
    weights: int,
    workspace: int,
    kv_per_token: int,
    kv_dtype: str,
    context_length: int,
    activations: int | None = None,
) -> MemoryBudget:
    """Size the KV pool, in whole pages: by --max-total-tokens, by --mem-fraction-static, or by the smaller of both.

    Without `activations` (the CPU) the fraction is for weights, workspace and KV. With them, measured after weights and workspace were
    allocated, it is as SGLang means it: for all that is on the device and stays, the KV pool included; the rest is for what steps allocate.
    Raises OutOfMemoryPlan when what was asked for, or one page, does not fit.
    """
    page = config.page_size
    if activations is None:
        used, room = weights + workspace, int(device.free * _HEADROOM) - workspace
    else:
        used, room = device.total - device.free, device.free - activations - int(_MEASURED_MARGIN * device.total)
    if room < page * kv_per_token:
        raise OutOfMemoryPlan(
            f"{device.name} has {device.free / _GIB:.2f} GiB free, not enough for "
            f"{f'a workspace of {workspace / _GIB:.2f} GiB' if activations is None else f'steps that take {activations / _GIB:.2f} GiB'} "
            "and one page of KV cache: free some memory, or lower --chunked-prefill-size or --page-size"
        )
    asked, fraction = config.max_total_tokens, config.memory_fraction
    wishes = []
    if asked is not None:
        wishes.append(_Wish(asked, f"--max-total-tokens {asked}", str(room // kv_per_token // page * page)))
    if asked is None or config.mem_fraction_static is not None:
        parts = f"weights ({weights / _GIB:.2f} GiB) and workspace ({workspace / _GIB:.2f} GiB)"
        if activations is not None:
            parts += f", {used / _GIB:.2f} GiB with what else is on the device,"
        budget = _budget_of(config, device=device, used=used, parts=parts, page_bytes=page * kv_per_token)
        most = _rounded_down((used + room) / device.total)
        wishes.append(_Wish(budget // kv_per_token, f"--mem-fraction-static {fraction:g}", most))
    wish, *more = sorted(wishes)
    is_asked_for = asked is not None or config.mem_fraction_static is not None
    if is_asked_for and wish.tokens // page * page * kv_per_token > room:
        raise OutOfMemoryPlan(
            f"{wish.flag} asks for {wish.tokens * kv_per_token / _GIB:.2f} GiB of KV cache "
            f"and {device.name} has {room / _GIB:.2f} GiB to give: lower it to at most {wish.most}"
        )
    tokens = min(wish.tokens, room // kv_per_token)
    if wish.tokens != asked:
        # More than every running request at full context can never be in use at once.
        tokens = min(tokens, config.max_running_requests * (-(-context_length // page) * page))
    return MemoryBudget(
        device, weights, workspace, kv_per_token, kv_dtype, tokens // page * page, wish.flag, more[0].flag if more else None, activations
    )


def _budget_of(config: EngineConfig, *, device: DeviceMemory, used: int, parts: str, page_bytes: int) -> int:
    """Bytes of KV cache within the fraction, of which `used` are gone for `parts`. Raises OutOfMemoryPlan when they hold no page."""
    fraction = config.memory_fraction
    budget = int(device.total * fraction) - used
    if budget < page_bytes:
        least = (used + page_bytes) / device.total
        raise OutOfMemoryPlan(
            f"{parts} leave no KV cache within "
            f"--mem-fraction-static {fraction:g} of {device.total / _GIB:.2f} GiB: "
            f"raise it above {min(least + 0.01, 0.99):.2f}, or use a smaller model"
        )
    return budget


def _rounded_down(fraction: float) -> str:
    """A fraction in three places that is never more than it was: what a message advises has to work."""
    return f"{int(fraction * 1000) / 1000:g}"
