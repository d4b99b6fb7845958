"""Exchange: what becomes of one HTTP request, gathered for its one line in the log. Knows no route and no socket."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..runtime.outputs import TextOutput

CLIENT_CLOSED_REQUEST = 499
PROBES = frozenset({"/health", "/ready", "/livez", "/health_generate", "/metrics"})  # asked every few seconds: not worth a line each
CONTROL = frozenset({"/flush_cache", "/abort_request"})  # what changes the server: who did it is always told
_MAX_LINE = 600


@dataclass
class _Run:
    """What one job has made so far: the last output of each of its sequences, the first of every `n` speaks for its prompt."""

    job_id: str
    prompt_tokens: int
    n: int
    latest: dict[int, TextOutput] = field(default_factory=dict)


@dataclass
class Exchange:
    """One request and its answer. Filled in by those who serve it, told by `log` when it is over."""

    request_id: str
    method: str
    path: str
    client: str = ""  # whom the connection is from
    route: str = "other"  # the path of its route, whatever stands for its parameters; "other" where there is none
    status_code: int = 0  # 0: not answered yet
    message: str = ""  # why it failed
    cut: str = ""  # why its jobs were ended before they were done
    started: float = field(default_factory=time.perf_counter)
    runs: list[_Run] = field(default_factory=list)
    places: asyncio.Semaphore | None = None  # in the engine, of all its sequences together

    def begin(self, job_id: str, *, prompt_tokens: int, n: int) -> dict[int, TextOutput]:
        """Note a job that this request runs; the caller keeps the last output of each sequence in what this gives."""
        self.runs.append(_Run(job_id, prompt_tokens, n))
        return self.runs[-1].latest

    def fail(self, status_code: int, message: str) -> None:
        """Note how it failed, whatever status was sent before."""
        self.status_code, self.message = status_code, message

    @property
    def was_cut(self) -> bool:
        """Whether a sequence was still unfinished when its job was cut."""
        finishes = [output.finish for run in self.runs for output in run.latest.values()] or [None]
        return bool(self.cut) and any(finish is None or finish.type == "abort" for finish in finishes)

    @property
    def was_served(self) -> bool:
        """Whether a model's answer was sent, whole or in part."""
        return bool(self.runs) and 0 < self.status_code < 400

    def log(self, logger: logging.Logger) -> None:
        """Tell the whole exchange in one line: a probe or a look at the server for debugging, our failures and cuts as a warning."""
        level = logging.INFO if self.runs or self.status_code >= 400 or self.path in CONTROL else logging.DEBUG
        if self.path in PROBES:
            level = logging.DEBUG
        elif self.status_code >= 500 or self.was_cut:
            level = logging.WARNING
        if logger.isEnabledFor(level):
            fields = self._fields()
            logger.log(level, "%s", _one_line(self._told(fields)), extra={"fields": fields})

    def _fields(self) -> dict[str, object]:
        """What can be searched for, in a log of JSON."""
        outputs = [(run, index, output) for run in self.runs for index, output in run.latest.items()]
        told: dict[str, object] = {
            "request_id": self.request_id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": self.status_code,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        if self.runs:
            told["prompt_tokens"] = sum(run.prompt_tokens for run in self.runs)
            told["cached_tokens"] = sum(output.cached_tokens for run, index, output in outputs if index % run.n == 0)
            told["output_tokens"] = sum(output.completion_tokens for _, _, output in outputs)
        if self.message:
            told["error"] = self.message[:_MAX_LINE]
        return told

    def _told(self, fields: Mapping[str, object]) -> str:
        ended = " (client closed)" if self.status_code == CLIENT_CLOSED_REQUEST else f" (cut: {self.cut})" if self.was_cut else ""
        parts = [f"{self.method} {self.path} {self.status_code}{ended} in {fields['seconds']:.3f} s: request={self.request_id}"]
        if self.client:
            parts.append(f"client={self.client}")
        if self.runs:
            finishes = {output.finish.type if output.finish else "none" for run in self.runs for output in run.latest.values()}
            parts.append(f"id={self.runs[0].job_id}" + (f"+{len(self.runs) - 1}" if self.runs[1:] else ""))
            parts += [f"{name}={fields[name]}" for name in ("prompt_tokens", "cached_tokens", "output_tokens")]
            parts.append(f"finish={','.join(sorted(finishes or {'none'}))}")
        if self.message:
            parts.append(f"error={self.message}")
        return " ".join(parts)


def _one_line(text: str) -> str:
    """What clients sent may stand in it: line ends and control characters are shown, not obeyed, and it is not endless."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_MAX_LINE])
    return shown if len(text) <= _MAX_LINE else shown + "..."
