"""results.json: what was found so far, so that a run that was cut off goes on where it stopped. Knows no kernel."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("kernels", "quant", "runtime", "calibration", "benchmarks/gpu")


class Budget:
    """Minutes that one run may take."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def has(self, seconds: float) -> bool:
        return self.left_s > seconds


@dataclass
class Record:
    """What results.json holds. `correctness` by case, `sanitizer` by tool, `answers` by model, `timings` by format and shape,
    `attention` by step, `model` by variant, `sweeps` by operation."""

    machine: dict[str, Any]
    sources: str
    correctness: dict[str, dict[str, Any]] = field(default_factory=dict)
    sanitizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    ceilings: dict[str, float | None] | None = None
    timings: dict[str, dict[str, Any]] = field(default_factory=dict)
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, dict[str, Any]] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    sweeps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, machine: dict[str, Any], *, fresh: bool) -> Record:
        """What lies in the folder, where it is of this card and these sources; else an empty one. Says why it begins anew."""
        now = cls(machine, source_digest())
        file = folder / "results.json"
        if fresh or not file.is_file():
            return now
        before = cls.read(folder)
        for name in ("gpu", "torch", "triton"):
            if before.machine.get(name) != machine.get(name):
                print(f"{file} is of {name} {before.machine.get(name)}, not {machine.get(name)}: beginning anew")
                return now
        if before.sources != now.sources:
            print(f"{file} is of other sources ({before.sources}, now {now.sources}): beginning anew")
            return now
        return before

    @classmethod
    def read(cls, folder: Path) -> Record:
        """What lies in the folder, of whatever card. Raises FileNotFoundError."""
        return cls(**json.loads((folder / "results.json").read_text(encoding="utf-8")))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / "results.json.new"
        new.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")
        new.replace(folder / "results.json")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """The card and what drives it, for people and for telling two records apart."""
    facts: dict[str, Any] = {
        "gpu": "interpreted on the CPU", "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(), "commit": _told("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown",
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name, "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda, "driver": _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "limits": _told("nvidia-smi", "--query-gpu=power.limit,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"),
        }  # fmt: skip
    return facts


def folder_name(machine: dict[str, Any]) -> str:
    """The card's name as a folder's: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower()).strip("-")


def source_digest() -> str:
    """Of all that results depend on in this tree."""
    digest = hashlib.sha256()
    for part in _SOURCES:
        for path in sorted(path for path in (ROOT / part).rglob("*") if path.suffix in (".py", ".json")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def one_line(error: BaseException) -> str:
    """An error as a record keeps it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _told(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
