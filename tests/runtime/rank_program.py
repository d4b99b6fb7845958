"""One rank of several that compute the same sequences, without an engine around them: what test_tensor_parallel.py starts.

    python -m octavo.tests.runtime.rank_program RANK SIZE STAGES JOBS

SIZE ranks share each of STAGES stages. JOBS is a JSON file: a list of {folder, options, out}. Each rank saves what came out of every job:
logits and bytes of weights, or the text of an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from octavo.runtime.collectives import meet, open_store
from octavo.runtime.pipeline import Place

from .tiny_models import load, run, sequence

SEQUENCES = (sequence(7, chunk=1, decode=2), sequence(45, chunk=45, decode=3), sequence(40, chunk=16, decode=3))


def main(rank: int, size: int, stages: int, jobs: Path) -> None:
    place = jobs.with_suffix(".store")
    place.mkdir(exist_ok=True)
    store, _ = open_store(place, size * stages)
    together = meet(store, Place(rank, size, stages), device=torch.device("cpu"), timeout_s=120)
    for job in json.loads(jobs.read_text()):
        found: object
        try:
            runner = load(Path(job["folder"]), group=together.group, pipeline=together.pipeline, **job["options"])
            found = {"logits": run(runner, SEQUENCES), "held": sum(linear.weight_bytes for linear in runner.model.linears)}
        except ValueError as error:
            found = f"{type(error).__name__}: {error}"
        torch.save(found, f"{job['out']}.{rank}")
    together.pipeline.wait_for_all()  # what was sent last is still to be received


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
