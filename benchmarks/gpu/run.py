"""The one command for a machine with a GPU: `python benchmarks/gpu/run.py [PART ...]`, from a bare checkout. `--help` explains.

It needs torch, triton and numpy, and neither an installation of this package nor a network.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _find_octavo() -> None:
    """The package is the checkout that this file lies in, installed or not; and this folder's files are no modules of their own."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    if "octavo" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("octavo", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["octavo"] = module
    spec.loader.exec_module(module)


_find_octavo()  # at import: the processes that this one starts import it again, under another name

if __name__ == "__main__":
    try:
        from octavo.benchmarks.gpu.command import main
    except ModuleNotFoundError as error:
        print(f"run.py: {error}. It wants torch for CUDA, triton and numpy: run it with a Python that has them.", file=sys.stderr)
        sys.exit(3)
    sys.exit(main(sys.argv[1:]))
