"""Compiles the GPU kernels of common model families into a folder, while an image is built. Needs no GPU.

    python docker/compile_families.py sm90 FOLDER [FAMILY ...]

A family is a folder of docker/families with a config.json: the sizes are all that kernels depend on. What is named after a family, such as
llama-3-8b-awq, belongs to it. The 70B ones are cut over four ranks, the others not at all. fp8 is compiled for a family's plain config,
where the architecture has it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FAMILIES = Path(__file__).parent / "families"
_NO_FP8 = ("sm_80",)


def runs(arch: str, wanted: Sequence[str]) -> Iterator[list[str]]:
    """Arguments of `octavo kernels compile`. Raises ValueError for a family that there is not."""
    known = sorted(path.parent.name for path in FAMILIES.glob("*/config.json"))
    for family in wanted:
        if family not in known:
            raise ValueError(f"there is no family {family!r}: there are {', '.join(known)}")
    for name in known:
        if wanted and not any(name == family or name.startswith(f"{family}-") for family in wanted):
            continue
        ranks = "4" if "70b" in name else "1"
        words = ["--arch", arch, "--load-format", "dummy", "--model", str(FAMILIES / name), "--tp-size", ranks]
        yield words
        if not name.endswith(("-awq", "-gptq")) and arch not in _NO_FP8:
            yield [*words, "--quantization", "fp8"]


def main(arch: str, folder: str, *wanted: str) -> int:
    """0 when everything was compiled."""
    arch = arch if arch.startswith("sm_") else f"sm_{arch.removeprefix('sm')}"
    try:
        planned = list(runs(arch, wanted))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for number, words in enumerate(planned, 1):
        print(f"{number} of {len(planned)}: {' '.join(words)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "octavo", "kernels", "compile", *words, "--cache-dir", folder], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
