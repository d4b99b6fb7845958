"""WorkFolder: what a quantization has finished, on disk, so that it can go on after a stop. Knows no method.

Blocks are written whole and renamed into place: what is there is complete. A run goes on only with the same recipe, model and samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..kernels.grouped_linear import GroupedWeight
from .devices import CPU
from .importance import Importance
from .sites import Site

_TOLD = 60  # characters of a value, in an error


@dataclass(frozen=True, eq=False)
class BlockResult:
    """What became of a block: quantized weights by site, changed parameters (float32, by name in the block), notes."""

    weights: Mapping[Site, GroupedWeight]
    parameters: Mapping[str, Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Results(Sequence[BlockResult]):
    """Finished blocks, read from the work folder when they are asked for."""

    def __init__(self, work: WorkFolder, names: Sequence[str]) -> None:
        self._work, self._names = work, names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> BlockResult: ...

    @overload
    def __getitem__(self, index: slice) -> Results: ...

    def __getitem__(self, index: int | slice) -> BlockResult | Results:
        if isinstance(index, slice):
            return Results(self._work, self._names[index])
        return self._work.load_block(self._names[index])

    def notes(self) -> list[Mapping[str, Any]]:
        """What is noted of each block, without its weights."""
        return [self._work.load_notes(name) for name in self._names]


class OtherRunError(ValueError):
    """What lies in a work folder belongs to another run."""


class WorkFolder:
    """A folder, made where it is not there. `resume`: go on with what is in it; else it begins anew.

    Raises OtherRunError where what is there is another run's.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self._identity = json.loads(json.dumps(identity))
        known = self.path / "run.json"
        if known.is_file() and resume:
            before = json.loads(known.read_text(encoding="utf-8"))
            if before != self._identity:
                changed = ", ".join(_changed(before, self._identity))
                raise OtherRunError(f"{path} holds an unfinished run with another {changed}: give what it was begun with, or delete it")
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            write_whole(known, json.dumps(self._identity, indent=1).encode())

    def decided(self, now: Mapping[str, Any]) -> Mapping[str, Any]:
        """What was decided when the run began, which is `now` where it begins."""
        file = self.path / "decided.json"
        if not file.is_file():
            write_whole(file, json.dumps(now).encode())
        found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").is_file()

    def save_block(self, name: str, result: BlockResult) -> None:
        tensors: dict[str, Tensor] = {f"p/{key}": value.to(CPU).contiguous() for key, value in result.parameters.items()}
        about: list[dict[str, Any]] = []
        for i, (site, weight) in enumerate(result.weights.items()):
            fields = {"codes": weight.codes, "scale": weight.scale}
            if weight.zeros is not None:
                fields["zeros"] = weight.zeros
            tensors |= {f"w/{i}/{key}": value.to(CPU).contiguous() for key, value in fields.items()}
            about.append(
                {
                    "site": [site.parameter, site.expert, site.transposed],
                    "bits": weight.bits,
                    "group_size": weight.group_size,
                    "zero": weight.zero,
                }
            )
        metadata = {"weights": json.dumps(about), "notes": json.dumps(result.notes)}
        self._place(name, lambda file: save_file(tensors, file, metadata=metadata))

    def load_block(self, name: str) -> BlockResult:
        with safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
            names = set(file.keys())
            weights = {}
            for i, about in enumerate(json.loads(metadata["weights"])):
                zeros = file.get_tensor(f"w/{i}/zeros") if f"w/{i}/zeros" in names else None
                weights[Site(*about["site"])] = GroupedWeight(
                    file.get_tensor(f"w/{i}/codes"),
                    about["bits"],
                    about["group_size"],
                    file.get_tensor(f"w/{i}/scale"),
                    zero=about["zero"],
                    zeros=zeros,
                )
            parameters = {key.removeprefix("p/"): file.get_tensor(key) for key in sorted(names) if key.startswith("p/")}
            return BlockResult(weights, parameters, json.loads(metadata["notes"]))

    def load_notes(self, name: str) -> Mapping[str, Any]:
        with safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
            notes: Mapping[str, Any] = json.loads(file.metadata()["notes"])
            return notes

    def save_tokens(self, tokens: Tensor) -> None:
        self._place("tokens", lambda file: save_file({"tokens": tokens.contiguous()}, file))

    def load_tokens(self) -> Tensor:
        with safe_open(self.path / "tokens.safetensors", framework="pt") as file:
            tokens: Tensor = file.get_tensor("tokens")
            return tokens

    def save_importance(self, importance: Sequence[Importance]) -> None:
        """Of all blocks, in dtypes as they are."""
        tensors: dict[str, Tensor] = {}
        about: list[list[Any]] = []
        for index, block in enumerate(importance):
            for number, (site, sizes) in enumerate(block.tokens.items()):
                parts = block.outputs[site]
                about.append([index, site.parameter, site.expert, site.transposed, len(parts)])
                tensors[f"{index}/{number}"] = sizes.contiguous()
                tensors |= {f"{index}/{number}/{i}": part for i, part in enumerate(parts)}
        self._place("importance", lambda file: save_file(tensors, file, metadata={"sites": json.dumps(about)}))

    def load_importance(self, index: int) -> Importance:
        """Of block `index`, as it was saved; empty where it has no site that is weighed."""
        with safe_open(self.path / "importance.safetensors", framework="pt") as file:
            of_block = [about for about in json.loads(file.metadata()["sites"]) if about[0] == index]
            tokens: dict[Site, Tensor] = {}
            outputs: dict[Site, list[Tensor]] = {}
            for number, (_, *about, parts) in enumerate(of_block):
                site = Site(*about)
                tokens[site] = file.get_tensor(f"{index}/{number}")
                outputs[site] = [file.get_tensor(f"{index}/{number}/{i}") for i in range(parts)]
        return Importance(tokens, outputs)

    def _place(self, name: str, write: Any) -> None:
        part = self.path / f"{name}.part"
        write(part)
        os.replace(part, self.path / f"{name}.safetensors")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, and what it was; of a recipe, which of its fields."""
    found: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old != new:
            of_recipe = key == "recipe" and None not in (old, new)
            found += _changed(before[key], now[key]) if of_recipe else [f"{key} ({str(old)[:_TOLD]})"]
    return found


def version_of_code() -> str:
    """Octavo's version, and what its quantizer's code hashes to: only the same code goes on to the same bytes."""
    code = hashlib.blake2b(digest_size=4)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    return f"{__version__} ({code.hexdigest()})"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)
