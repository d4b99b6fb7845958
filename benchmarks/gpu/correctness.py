"""The correctness part: all cases over several processes on one GPU, and the small ones under compute-sanitizer."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from octavo.kernels.gpu.device import DEVICES

from .attention_cases import attention_cases
from .cases import Named, all_cases, quick_cases
from .checks import Place, Refused, check
from .record import Budget, Record, one_line
from .sampling_cases import sampling_cases

TOOLS = ("memcheck", "racecheck", "synccheck")
_PATTERN = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_BATCH = 8
_CASE_S = 10.0
_RACE_FREE = ("_split", "_stream", "_multiply", "_dequantize", "_attend", "_plan", "_peaks", "_search", "_kept")
_SANITIZED_S = 60.0  # what starting one tool takes at least
TOOL_S = 180.0  # what one may take, where other parts are to have their turn
OLDER = (80, 89)  # whose code a newer GPU can run: other tables of tiles, other matrix instructions


def run(
    record: Record, place: Place, budget: Budget, *, jobs: int, save: Callable[[], None], quick: bool = False, older: int | None = None
) -> None:  # fmt: skip
    """Every case that has not been run yet, while the budget lasts; with `older`, as on that architecture (80 for sm_80).

    Then the kernels are planned and compiled for it, and assembled for the GPU at hand: nothing but the assembler's part is not what
    the older GPU would run.
    """
    said = ""
    if older is not None:
        place, said = replace(place, facts=replace(DEVICES[older], num_sms=place.facts.num_sms)), f"as sm_{older}: "
    cases = cases_of(place.facts.arch, quick=quick)
    while left := [case for case in cases if said + case.name not in record.correctness]:
        before = len(record.correctness)
        batches = [left[start : start + _BATCH] for start in range(0, len(left), _BATCH)]
        for results in _results(batches, place, budget, jobs, older):
            found = {said + name: result for name, result in results.items()}
            record.correctness |= found
            for name, result in found.items():
                if result["fault"]:
                    print(f"  WRONG {name}: {result['fault']}")
            save()
        # A process whose device failed checks no more: what it left is begun again, as long as that gets on.
        if not budget.has(_CASE_S) or len(record.correctness) == before:
            break
    names = [said + case.name for case in cases]
    if any(name not in record.correctness for name in names):
        print("  not all cases were run: run the same command again, it goes on from here")
    print(f"correctness: {said}{summary(record, names)}")


def cases_of(arch: int, *, quick: bool) -> list[Named]:
    """What is checked on an architecture, all of it or little."""
    linears = quick_cases(arch) if quick else all_cases(arch)
    return [*linears, *attention_cases(quick=quick), *sampling_cases(quick=quick)]


def summary(record: Record, names: Sequence[str]) -> str:
    """How many cases were right, wrong, refused and not run."""
    found = [record.correctness[name] for name in names if name in record.correctness]
    wrong = sum(1 for result in found if result["fault"])
    refused = sum(1 for result in found if result["refused"])
    return f"{len(found) - wrong - refused} right, {wrong} wrong, {refused} refused, {len(names) - len(found)} not run yet"


_is_broken = False  # the device failed in this process, and every later call would fail too


def check_all(cases: Sequence[Named], place: Place) -> dict[str, dict[str, Any]]:
    """Results by name; none of the cases after one with which the device failed, in this process for good."""
    global _is_broken
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        if _is_broken:
            break
        found[case.name] = _result(case, place)
        _is_broken = place.is_gpu and found[case.name]["fault"] is not None and not device_answers()
    return found


def device_answers() -> bool:
    """Whether the GPU still computes in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _result(case: Named, place: Place) -> dict[str, Any]:
    started = time.perf_counter()
    result: dict[str, Any] = {"fault": None, "refused": None, "error": None}
    try:
        result["error"] = round(check(case, place), 4)
    except Refused as reason:
        result["refused"] = str(reason)
    except Exception as error:  # a wrong result, a compiler's error or a device's: all of them are what is looked for
        result["fault"] = one_line(error)
    return result | {"seconds": round(time.perf_counter() - started, 2)}


def _results(
    batches: Sequence[Sequence[Named]], place: Place, budget: Budget, jobs: int, older: int | None
) -> Iterator[dict[str, dict[str, Any]]]:  # fmt: skip
    """Batches in this process, or in `jobs` others, as they are done; fewer when time runs out or a process dies.

    Code for an older GPU is made in others: Triton keeps what a process compiled, whatever it was compiled for.
    """
    if jobs == 1 and not (older and place.is_gpu):
        for batch in batches:
            if not budget.has(_CASE_S):
                return
            yield check_all(batch, place)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(older,))
    waiting = [pool.submit(check_all, batch, place) for batch in batches]
    try:
        for future in as_completed(waiting, timeout=max(1.0, budget.left_s)):
            yield future.result()
    except (TimeoutError, BrokenProcessPool) as error:
        print(f"  stopped: {one_line(error)}")
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # one that hangs in a kernel would be waited for
            process.kill()


def _begin(older: int | None) -> None:
    """What a process does first."""
    torch.set_num_threads(1)
    if older is not None:
        knobs.runtime.override_arch = f"sm{older}"


def sanitize(record: Record, place: Place, budget: Budget, *, command: Path, save: Callable[[], None], most_s: float) -> None:
    """The small cases once more under each tool of compute-sanitizer, in a process of its own, for `most_s` seconds at most."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or not place.is_gpu:
        record.sanitizer = {tool: {"fault": None, "refused": "no compute-sanitizer here"} for tool in TOOLS}
        print("sanitizer: not run, there is no compute-sanitizer here")
        return
    for tool in TOOLS:
        is_done = tool in record.sanitizer and not record.sanitizer[tool]["refused"]
        if is_done or not budget.has(_SANITIZED_S):
            continue
        started = time.perf_counter()
        record.sanitizer[tool] = _sanitized(program, tool, command, min(budget.left_s, most_s)) | {
            "seconds": round(time.perf_counter() - started, 1)
        }
        print(f"sanitizer: {tool}: {record.sanitizer[tool]['fault'] or 'clean'}")
        save()


def _sanitized(program: str, tool: str, command: Path, seconds: float) -> dict[str, Any]:
    """What the tool found. Of races only those in kernels with sums over blocks or tiles count, which are ours to mend."""
    arguments = [program, "--tool", tool, "--report-api-errors", "no", "--target-processes", "application-only"]
    arguments += [sys.executable, str(command), "quick", "--minutes", f"{max(1.0, seconds / 60 - 0.5):.1f}"]
    # Without torch's cache every tensor is an allocation of its own, beyond which the tool sees accesses.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"fault": None, "refused": f"took longer than {seconds:.0f} s"}
    found = _PATTERN.findall(text)
    if not found:
        return {"fault": f"ended with {process.returncode} and told no summary: {text.strip()[-400:]}", "refused": None}
    count = sum(int(errors or hazards or 0) for errors, hazards in found)
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    if tool == "racecheck" and not any(name in line for line in lines for name in _RACE_FREE):
        count = 0  # in reductions over warps, which Triton generates (triton-lang/triton#7264)
    return {"fault": f"{count} errors; {' | '.join(lines[:12])}" if count or process.returncode else None, "refused": None}
