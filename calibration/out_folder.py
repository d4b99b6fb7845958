"""The output folder of a quantization: what may lie there before, and how a finished model gets into it. Knows nothing of models."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

WORK, MODEL = ".quantize", "model"  # inside the output folder, until a run is done; the model inside an attempt's folder
_PUBLISHING = "publishing"  # in WORK, while files are moved out of it


def existing(out: Path) -> Path:
    """`out`, or the nearest above it that is there: a folder or a file."""
    return next(path for path in (out, *out.absolute().parents) if path.exists())


def check_out(out: Path, *, resume: bool) -> None:
    """Raises ValueError where `out` holds something else than an unfinished run, or one that nobody asked to go on with."""
    place = existing(out)
    if place != out:
        if not place.is_dir():
            raise ValueError(f"{out} cannot be made: {place} is a file")
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder")
    others = [path.name for path in out.iterdir() if path.name != WORK]
    if resume and "config.json" in others and not (out / WORK).exists():
        raise ValueError(f"{out} holds a model and no unfinished run: there is nothing to resume")
    if others and not (resume and (out / WORK / _PUBLISHING).is_file()):
        raise ValueError(f"{out} is not empty ({', '.join(sorted(others)[:3])}): give another folder, or empty it")
    if (out / WORK).exists() and not resume:
        raise ValueError(f"{out} holds an unfinished run: add --resume (resume=True) to go on with it, or delete {out / WORK}")


def publish(made: Path, out: Path) -> None:
    """Move a finished model out of the work folder, and remove that."""
    (out / WORK / _PUBLISHING).touch()
    for file in made.glob("*.safetensors"):  # which the library makes for their owner's eyes alone
        shutil.copymode(out / WORK / _PUBLISHING, file)
    for file in sorted(made.iterdir(), key=lambda file: (file.name == "config.json", file.name)):  # without it, no engine takes the folder
        os.replace(file, out / file.name)
    done = out / f"{WORK}-done"  # a stop from here on leaves a finished model and nothing unfinished in it
    shutil.rmtree(done, ignore_errors=True)
    (out / WORK).rename(done)
    shutil.rmtree(done)
