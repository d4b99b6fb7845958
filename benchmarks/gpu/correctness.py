"""The correctness part: all cases over several processes on one GPU, and the small ones under compute-sanitizer."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cases import Case, all_cases, quick_cases
from .checks import Place, Refused, check
from .record import Budget, Record

TOOLS = ("memcheck", "racecheck", "synccheck")
_PATTERN = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_BATCH = 8
_SANITIZED_S = 60.0  # what starting one tool takes at least


def run(record: Record, place: Place, budget: Budget, *, jobs: int, save: Callable[[], None], quick: bool = False) -> None:
    """Every case that has not been run yet, while the budget lasts."""
    cases = quick_cases(place.facts.arch) if quick else all_cases(place.facts.arch)
    left = [case for case in cases if case.name not in record.correctness]
    batches = [left[start : start + _BATCH] for start in range(0, len(left), _BATCH)]
    with _runner(jobs) as submit:
        for done, found in enumerate(submit(batches, place, budget), start=1):
            record.correctness |= found
            failed = [name for name, result in found.items() if result["fault"]]
            for name in failed:
                print(f"  WRONG {name}: {found[name]['fault']}")
            if done % 8 == 0:
                save()
    save()
    told = summary(record, [case.name for case in cases])
    print(f"correctness: {told}")


def summary(record: Record, names: Sequence[str]) -> str:
    """How many cases were right, wrong, refused and not run."""
    found = [record.correctness[name] for name in names if name in record.correctness]
    wrong = sum(1 for result in found if result["fault"])
    refused = sum(1 for result in found if result["refused"])
    return f"{len(found) - wrong - refused} right, {wrong} wrong, {refused} refused, {len(names) - len(found)} not run yet"


def check_all(cases: Sequence[Case], place: Place) -> dict[str, dict[str, Any]]:
    """Results by name. An error of the device ends the process's use of the GPU, so it is told and not tried again."""
    return {case.name: _result(case, place) for case in cases}


def _result(case: Case, place: Place) -> dict[str, Any]:
    started = time.perf_counter()
    result: dict[str, Any] = {"fault": None, "refused": None, "error": None}
    try:
        result["error"] = round(check(case, place), 4)
    except Refused as reason:
        result["refused"] = str(reason)
    except Exception as error:  # a wrong result, a compiler's error or a device's: all of them are what is looked for
        result["fault"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return result | {"seconds": round(time.perf_counter() - started, 2)}


Submit = Callable[[Sequence[Sequence[Case]], Place, Budget], Iterator[dict[str, dict[str, Any]]]]


@contextmanager
def _runner(jobs: int) -> Iterator[Submit]:
    """Batches in this process, or in `jobs` others, as they are done."""

    def here(batches: Sequence[Sequence[Case]], place: Place, budget: Budget) -> Iterator[dict[str, dict[str, Any]]]:
        for batch in batches:
            if not budget.has(10):
                return
            yield check_all(batch, place)

    if jobs == 1:
        yield here
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:

        def there(batches: Sequence[Sequence[Case]], place: Place, budget: Budget) -> Iterator[dict[str, dict[str, Any]]]:
            waiting = [pool.submit(check_all, batch, place) for batch in batches]
            try:
                for future in as_completed(waiting, timeout=max(1.0, budget.left_s)):
                    yield future.result()
            except TimeoutError:
                print("  out of time: run the same command again, it goes on from here")
            finally:
                for future in waiting:
                    future.cancel()

        yield there


def sanitize(record: Record, place: Place, budget: Budget, *, command: Path, save: Callable[[], None]) -> None:
    """The small cases once more under each tool of compute-sanitizer, in a process of its own."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or not place.is_gpu:
        record.sanitizer = {tool: {"fault": None, "refused": "no compute-sanitizer here"} for tool in TOOLS}
        print("sanitizer: not run, there is no compute-sanitizer here")
        return
    for tool in TOOLS:
        if tool in record.sanitizer or not budget.has(_SANITIZED_S):
            continue
        started = time.perf_counter()
        record.sanitizer[tool] = _sanitized(program, tool, command, budget.left_s) | {"seconds": round(time.perf_counter() - started, 1)}
        print(f"sanitizer: {tool}: {record.sanitizer[tool]['fault'] or 'clean'}")
        save()


def _sanitized(program: str, tool: str, command: Path, seconds: float) -> dict[str, Any]:
    arguments = [program, "--tool", tool, sys.executable, str(command), "quick", "--minutes", f"{max(1.0, seconds / 60 - 0.5):.1f}"]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"fault": None, "refused": f"took longer than {seconds:.0f} s"}
    text = done.stdout + done.stderr
    found = _PATTERN.search(text)
    if found is None:
        return {"fault": f"ended with {done.returncode} and told no summary: {text.strip()[-400:]}", "refused": None}
    count = int(found[1] or found[2] or 0)
    errors = [line for line in text.splitlines() if line.startswith("=========")][:12]
    return {"fault": f"{count} errors; {' | '.join(errors)}" if count or done.returncode else None, "refused": None}
