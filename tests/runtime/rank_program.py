"""One rank of several that compute the same sequences, without an engine around them: what test_tensor_parallel.py starts.

    python -m octavo.tests.runtime.rank_program RANK SIZE JOBS

JOBS is a JSON file: a list of {folder, options, out}. Each rank saves what came out of every job: logits and bytes of weights, or the
text of an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from octavo.runtime.collectives import ProcessGroup, open_store
from octavo.runtime.layers.parallel import TensorParallelGroup

from .tiny_models import load, run, sequence

SEQUENCES = (sequence(7, chunk=1, decode=2), sequence(45, chunk=45, decode=3), sequence(40, chunk=16, decode=3))


def main(rank: int, size: int, jobs: Path) -> None:
    place = jobs.with_suffix(".store")
    place.mkdir(exist_ok=True)
    store = open_store(place, size)
    group = ProcessGroup(store, rank=rank, size=size, device=torch.device("cpu"), timeout_s=120)
    for job in json.loads(jobs.read_text()):
        found: object
        try:
            runner = load(Path(job["folder"]), group=TensorParallelGroup(size, rank, group), **job["options"])
            found = {"logits": run(runner, SEQUENCES), "held": sum(linear.weight_bytes for linear in runner.model.linears)}
        except ValueError as error:
            found = f"{type(error).__name__}: {error}"
        torch.save(found, f"{job['out']}.{rank}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
