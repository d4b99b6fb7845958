"""The kernels under the oldest Triton that is supported and under the newest: interpreted, and compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.benchmarks.gpu.record import ROOT
from octavo.kernels.gpu.config import operations, table_architectures
from octavo.kernels.gpu.device import DEVICES

HERE = Path(__file__).parent
FOLDERS = {version: Path(sys.prefix, f"triton-{version}") for version in ("3.6.0", "newest")}
INTERPRETED = ("test_scaled_linear.py", "test_grouped_linear.py", "test_quantize_rows.py")
# Every kernel and every width of weights, rows off the tile; not all sizes of groups, nor what only values decide.
SELECTED = "(few_rows and fp8) or (test_bits and zeros) or fp8_weights or fp8_inputs or (values_and and bf16)"


def start(folder: Path, *command: str, interpret: bool) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen(
        [sys.executable, *command], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(running: dict[str, subprocess.Popen[str]], *, codes: tuple[int, ...] = (0,)) -> dict[str, str]:
    """What each printed, once all are done. Raises AssertionError for one that failed."""
    printed = {version: process.communicate()[0] for version, process in running.items()}
    for version, process in running.items():
        assert process.returncode in codes, f"Triton {version}: {printed[version][-3000:]}"
    return printed


pytestmark = pytest.mark.skipif(
    not all(folder.is_dir() for folder in FOLDERS.values()), reason="other versions of Triton are not installed: make .venv/.installed-dev"
)


def test_versions_are_what_they_are_called() -> None:
    printed = finished(
        {version: start(folder, "-c", "import triton; print(triton.__version__)", interpret=False) for version, folder in FOLDERS.items()}
    )
    assert printed["3.6.0"].strip() == "3.6.0"
    newest = tuple(int(part) for part in re.findall(r"\d+", printed["newest"])[:2])
    assert newest >= (3, 9)


@pytest.mark.long
def test_interpreted_under_each_version() -> None:
    command = ("-m", "pytest", "-q", "-k", SELECTED, *(str(HERE / name) for name in INTERPRETED))
    printed = finished({version: start(folder, *command, interpret=True) for version, folder in FOLDERS.items()})
    for version, text in printed.items():
        assert "[100%]" in text, (version, text[-500:])


_SPILLED_AT_MOST = 64  # bytes: registers are given out by another ptxas, and few spills cost little


@pytest.mark.parametrize(
    ("arch", "ops"),
    [
        (90, ("fp8",)),
        (100, ("w4a16",)),
        (120, ("fp8",)),
        *(pytest.param(arch, operations(arch), marks=pytest.mark.long) for arch in sorted({*table_architectures(), *DEVICES})),
    ],
    ids=lambda value: f"sm_{value}" if isinstance(value, int) else value[0] if len(value) == 1 else "all",
)
def test_compiled_by_each_version(arch: int, ops: tuple[str, ...]) -> None:
    """What one version fits into shared or tensor memory another may not, and then it could not be launched."""
    command = ("-m", "octavo", "kernels", "report", "--json", "--arch", f"sm_{arch}", *(f"--op={op}" for op in ops))
    printed = finished({version: start(folder, *command, interpret=False) for version, folder in FOLDERS.items()}, codes=(0, 1))
    for version, text in printed.items():
        rows = json.loads(text)
        assert {row["op"] for row in rows} == set(ops), version
        faults = [
            (row["op"], row["max_m"], fault)
            for row in rows
            for fault in row["faults"]
            if not fault.startswith("spills") or row["spill_store_bytes"] > _SPILLED_AT_MOST
        ]
        assert faults == [], version
