"""`octavo doctor`: prints what the machine has, which kernels it gets and whether they compute right. Examines nothing itself."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..runtime.start import prepare_environment
from .parser import Parser

if TYPE_CHECKING:
    from ..runtime.doctor import DeviceKernels, Diagnosis
    from ..runtime.doctor_machine import Machine

WIDTH = 110
_GIB = 1 << 30
_SERVING = ("octavo.runtime.process", "octavo.serve.app", "octavo.serve.server")  # what `octavo serve` loads


def main(argv: list[str], *, prog: str = "octavo doctor") -> int:
    """Print the diagnosis: 0 when serving would work, 1 when something it needs is broken, 2 for a bad command line."""
    parser = Parser(
        prog=prog,
        description="Tell what this machine has, which kernel each kind of weights gets and why, and check that kernels compute right.",
        epilog="Ends with code 0 when serving would work, 1 when not. Reaches no network; writes nothing but compiled kernels.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=WIDTH),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    try:
        as_json = "json" in parser.parse_all(argv)
    except SystemExit as end:
        return int(end.code or 0)
    prepare_environment()
    if not as_json:
        print("Trying kernels and packages: some seconds, more the first time, when kernels are compiled.", file=sys.stderr)
    broken = list(_import_faults(["octavo.runtime.doctor"]))
    if broken:  # without torch and its like, nothing else can be told
        print(json.dumps({"ok": False, "problems": broken}) if as_json else "\n".join(_verdict(broken)))
        return 1
    from ..runtime.doctor import examine

    found = examine()
    found = dataclasses.replace(found, problems=(*found.problems, *_import_faults(_SERVING)))
    ok = not found.problems
    print(json.dumps({"ok": ok, **dataclasses.asdict(found)}, indent=2) if as_json else "\n".join(report(found)))
    return 0 if ok else 1


def _import_faults(modules: Iterable[str]) -> Iterator[str]:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a damaged installation raises what it likes
            told = " ".join(f"{type(error).__name__}: {error}".split())
            yield f"{module} cannot be loaded ({told}): install Octavo again, with its requirements"


def report(found: Diagnosis) -> Iterator[str]:
    """The diagnosis for people, line by line, in WIDTH columns."""
    yield from _machine(found.machine)
    yield from ["", "Versions"]
    shown = [f"{name} {version or '(not installed)'}" for name, version in found.versions.items()]
    yield from textwrap.wrap(", ".join(shown), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    for device in found.devices:
        yield ""
        yield from _kernels(device, is_default=device.device == found.default_device)
    yield from ["", "Optional packages"]
    for package in found.packages:
        there = f"{package.version} works" if package.tried else f"{package.version} is there, not tried"
        state = there if package.fault is None else f"{package.version}, no: {package.fault}" if package.version else "not installed"
        yield from _wrapped(f"  {package.name:<20}{state}", 22)
        yield from _wrapped(f"  {'':<20}{package.use}" + (f" ({package.install})" if package.version is None else ""), 22)
    state = "writable" if found.cache.is_writable else "NOT writable: no model starts on the CPU; set OCTAVO_CACHE_DIR to a folder that is"
    yield from ["", "Compiled CPU kernels", f"  {found.cache.folder}", f"  {found.cache.num_kernels} there, {state}", ""]
    yield from _verdict(found.problems)


def _machine(machine: Machine) -> Iterator[str]:
    cpu = machine.processor
    cores = f"{cpu.usable_cores} of {cpu.machine_cores} cores usable"
    if cpu.quota is not None:
        cores += f", the container's limit is {cpu.quota:g} cores' time"
    yield from ["Machine", f"  CPU      {cpu.model} ({cpu.architecture}), {cores}"]
    yield f"           has {', '.join(cpu.has) or 'no vector instructions that matter here'}" + (
        f"; lacks {', '.join(cpu.lacks)}" if cpu.lacks else ""
    )
    yield f"  memory   {machine.memory.free / _GIB:.2f} GiB free of {machine.memory.total / _GIB:.2f} GiB ({machine.memory.name})"
    for device in machine.cuda_devices:
        memory = device.memory
        yield f"  CUDA     {device.name} ({device.architecture}), {memory.free / _GIB:.2f} GiB free of {memory.total / _GIB:.2f} GiB"
    yield from _wrapped(f"  CUDA     {machine.cuda_note}", 11)


def _kernels(device: DeviceKernels, *, is_default: bool) -> Iterator[str]:
    yield f"Kernels for linear layers on {device.platform}" + (", where octavo serve runs by default" if is_default else "")
    if device.fault is not None:
        yield from _wrapped(f"  {device.fault}", 4)
        return
    yield from _wrapped(f"  fastest first: {', '.join(device.kernels)}", 4)
    width = max(len(choice.weights) for choice in device.choices)
    for choice in device.choices:
        slow = "  (slow: no kernel of this platform is made for such weights yet)" if choice.is_reference else ""
        yield f"  {choice.weights:<{width}}  {choice.kernel or 'NONE'}{slow}"
        for name, reason in choice.refused:
            yield from _wrapped(f"      not {name}: {reason}", 10)
    yield "  self-tests against the float reference"
    names = {trial.kernel: None for trial in device.trials}
    for name in names:
        trials = [trial for trial in device.trials if trial.kernel == name]
        wrong = [trial for trial in trials if trial.fault is not None]
        count = f"{len(trials)} kind{'s' if len(trials) > 1 else ''} of weights, {sum(trial.milliseconds for trial in trials):.0f} ms"
        yield f"    {'FAIL' if wrong else 'PASS'}  {name}  ({count})"
        for trial in wrong:
            yield from _wrapped(f"        {trial.weights}: {trial.fault}", 12)


def _verdict(problems: Iterable[str]) -> Iterator[str]:
    lines = [line for problem in problems for line in _wrapped(f"  - {problem}", 4)]
    yield from ["Serving would not work:", *lines] if lines else ["Serving works here."]


def _wrapped(text: str, indent: int) -> list[str]:
    initial = " " * (len(text) - len(text.lstrip(" ")))
    return textwrap.wrap(text.strip(), WIDTH, initial_indent=initial, subsequent_indent=" " * indent, break_on_hyphens=False)
