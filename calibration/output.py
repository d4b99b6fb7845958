"""Output: quantized weights and everything else of a model as a folder that engines load. Knows formats' files, and no method.

Weights are written under the names that the original checkpoint has for them, shard by shard.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight
from ..quant.checkpoint.hf_config import read_json
from ..quant.checkpoint.reader import WeightReader
from ..quant.checkpoint.resolve import TOKENIZER_PATTERNS, ModelFiles
from . import writers
from .float_model import FloatModel
from .recipe import Recipe
from .work import BlockResult

SHARD_BYTES = 2 << 30
_NOT_TOKENIZER = {"config.json", "model.safetensors.index.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"}


class ShardWriter:
    """Collects tensors and writes them as safetensors shards, with an index where there is more than one."""

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._tensors: dict[str, Tensor] = {}
        self._size = 0
        self._shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._size and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._tensors[name] = tensor.contiguous()
        self._size += tensor.nbytes
        self.total += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._tensors, self._folder / f"part-{len(self._shards):05}.safetensors", metadata={"format": "pt"})
        self._shards.append(list(self._tensors))
        self._tensors, self._size = {}, 0

    def close(self) -> None:
        """Write what is left, and give the shards their names."""
        if self._tensors:
            self._flush()
        count = len(self._shards)
        names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            os.replace(self._folder / f"part-{i:05}.safetensors", self._folder / name)
        if count > 1:
            index = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            content = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(index.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class BySource:
    """A block under the checkpoint's names: quantized modules by path, the tensors that they replace, and changed parameters."""

    weights: Mapping[str, GroupedWeight]
    replaced: frozenset[str]
    transposed: frozenset[str]  # of the replaced: stored [K, N]
    changed: Mapping[str, Tensor]
    input_scales: Mapping[str, float]  # by module path, where they are static


@dataclass(frozen=True, eq=False)
class Written:
    """What went into a folder: bytes before and after by kind of tensor, and of the quantized weights how many and in how many bytes."""

    groups: Mapping[str, Mapping[str, int]]
    packed_bytes: int
    num_packed: int
    example: GroupedWeight
    transposed: frozenset[str]  # tensors of the original that are stored [K, N], where a quantized module is [N, K]
    kept: tuple[str, ...]  # modules of the blocks with matrices that stayed as they are, by the checkpoint's names


_IN_A_LIST = re.compile(r"\b\w+\.\d+\..*$")
_EXPERT = re.compile(r"(.*\.experts)\.")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def with_fused(kept: Sequence[str]) -> list[str]:
    """`kept`, and what engines make of several of them: they look for a fused module, and for all experts, by a name of its own."""
    known = set(kept)
    parents = sorted({path.rpartition(".")[0] for path in kept})
    fused = [
        f"{parent}.{name}" for parent in parents for name, parts in FUSED.items() if all(f"{parent}.{part}" in known for part in parts)
    ]
    experts = sorted({found[1] for path in kept if (found := _EXPERT.match(path))})  # some of a layer's are never kept alone
    return [*kept, *(path for path in [*fused, *experts] if path not in known)]


def by_source(model: FloatModel, index: int, result: BlockResult) -> BySource:
    """What became of a block, cut and joined as the checkpoint has its tensors."""
    prefix = model.block_prefix(index)
    fields: dict[str, dict[str, Tensor]] = {"codes": {}, "scale": {}, "zeros": {}}
    example: dict[str, GroupedWeight] = {}
    stacks: dict[str, list[GroupedWeight]] = {}
    for site, weight in result.weights.items():
        stacks.setdefault(prefix + site.parameter, []).append(weight)
    whole = {prefix + site.parameter for site in result.weights if site.expert is None}
    for name, parts in stacks.items():
        example[name] = parts[0]
        for field, tensors in fields.items():
            values = [getattr(part, field) for part in parts]
            if values[0] is not None:
                tensors[name] = values[0] if name in whole else torch.stack(values)
    restored = {field: model.names.restore(model.module, tensors) for field, tensors in fields.items()}
    form = next(iter(example.values()), None)
    found: dict[str, GroupedWeight] = {}
    for name, codes in restored["codes"].items():
        assert form is not None
        scale, zeros = restored["scale"][name], restored["zeros"].get(name)
        same = partial(replace, form, group_size=codes.shape[-1] // scale.shape[-1])
        if codes.dim() == 2:
            found[name.removesuffix(".weight")] = same(codes=codes, scale=scale, zeros=zeros)
        else:  # experts that the checkpoint has as one tensor
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            for expert in range(len(codes)):
                own = None if zeros is None else zeros[expert]
                found[f"{parent}.{expert}.{leaf}"] = same(codes=codes[expert], scale=scale[expert], zeros=own)
    changed = model.names.restore(model.module, {prefix + name: value for name, value in result.parameters.items()})
    transposed = frozenset(model.names.simple(prefix + site.parameter) for site in result.weights if site.transposed)
    return BySource(found, frozenset(restored["codes"]), transposed, changed, _input_scales(model, prefix, result))


def _input_scales(model: FloatModel, prefix: str, result: BlockResult) -> dict[str, float]:
    """Static input scales by module path. An expert's go the way of its rows: one number for each, cut and joined as they are."""
    rows: dict[str, list[Tensor]] = {}
    for site, value in zip(result.weights, result.notes.get("input_scales", ()), strict=False):
        rows.setdefault(prefix + site.parameter, []).append(torch.full((result.weights[site].out_features, 1), value))
    whole = {prefix + site.parameter for site in result.weights if site.expert is None}
    tensors = {name: parts[0] if name in whole else torch.stack(parts) for name, parts in rows.items()}
    found: dict[str, float] = {}
    for name, tensor in model.names.restore(model.module, tensors).items():
        path = name.removesuffix(".weight")
        if tensor.dim() == 2:
            found[path] = float(tensor[0, 0])
        else:
            parent, _, leaf = path.rpartition(".")
            found |= {f"{parent}.{expert}.{leaf}": float(tensor[expert, 0, 0]) for expert in range(len(tensor))}
    return found


def pack_module(weight: GroupedWeight, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of a module in the recipe's format."""
    match recipe.layout:
        case "awq":
            return writers.awq_tensors(weight)
        case "gptq":
            return writers.gptq_tensors(weight)
    return writers.compressed_tensors(weight, scale_dtype=weight.scale.dtype, strategy=recipe.strategy)


def write_weights(
    out: Path,
    model: FloatModel,
    reader: WeightReader,
    results: Iterable[BlockResult],
    recipe: Recipe,
) -> Written:
    """Write every tensor of the model."""
    shards = ShardWriter(out)
    tensors = reader.tensors()
    prefixes = [model.block_prefix(index) for index in range(len(model.blocks))]
    of_block: dict[int, list[str]] = {}
    for name in tensors:
        target = model.names.targets.get(name, name)
        index = next((i for i, prefix in enumerate(prefixes) if target.startswith(prefix)), -1)
        of_block.setdefault(index, []).append(name)
    groups = {
        kind: {"before": 0, "after": 0} for kind in ("quantized linears", "other tensors of the blocks", "embedding, head, last norm")
    }
    linears, others, outer = groups.values()
    packed = num_packed = 0
    example: GroupedWeight | None = None
    transposed: set[str] = set()
    kept: list[str] = []

    def keep(name: str, tensor: Tensor, group: dict[str, int]) -> None:
        shards.add(name, tensor)
        group["before"] += tensors[name].nbytes
        group["after"] += tensor.nbytes

    for name in of_block.get(-1, []):
        keep(name, _as_stored(model, reader, name), outer)
    for index, result in enumerate(results):
        block = by_source(model, index, result)
        transposed |= block.transposed
        for name in of_block.get(index, []):
            if name in block.replaced:
                linears["before"] += tensors[name].nbytes
                continue
            if len(tensors[name].shape) > 1 and not name.endswith("bias"):  # which experts have as one matrix
                kept.append(name.removesuffix(".weight"))
            value = block.changed.get(name)
            dtype = model.names.stored[model.names.targets[name]] if value is not None else None
            keep(name, _as_stored(model, reader, name) if value is None else value.to(dtype), others)
        for path, weight in block.weights.items():
            example = example or weight
            num_packed += weight.codes.numel()
            for key, tensor in pack_module(weight, recipe).items():
                packed += tensor.nbytes
                shards.add(f"{path}.{key}", tensor)
            if path in block.input_scales:
                shards.add(f"{path}.input_scale", torch.tensor([block.input_scales[path]]))
        for name, value in result.notes.get("kv_scales", {}).items():
            shards.add(name, torch.tensor([value]))
    linears["after"] = packed
    shards.close()
    assert example is not None
    return Written(groups, packed, num_packed, example, frozenset(transposed), tuple(kept))


def _as_stored(model: FloatModel, reader: WeightReader, name: str) -> Tensor:
    """A tensor as the checkpoint has it; what a GGUF file holds in blocks as bfloat16."""
    tensor = reader.read(name)
    dtype = model.names.stored.get(model.names.targets.get(name, ""))
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def quantization_config(recipe: Recipe, group_size: int, example: GroupedWeight, kept: Sequence[str]) -> dict[str, Any]:
    """config.json's quantization_config. `kept`: module paths of linears that stayed as they are."""
    match recipe.layout:
        case "awq":
            return {**writers.awq_config(group_size), "modules_to_not_convert": list(kept) or None}
        case "gptq":
            config = writers.gptq_config(recipe.bits, group_size, symmetric=recipe.is_symmetric)
            inside = [path for path in kept if path != "lm_head"]
            return config | ({"dynamic": {f"-:{_pattern(path)}": {} for path in inside}} if inside else {})
    config = writers.compressed_config(
        example,
        strategy=recipe.strategy or ("channel" if group_size == -1 else "group"),
        static_inputs=recipe.static_inputs,
        kv_cache=recipe.kv_cache is not None,
    )
    return {**config, "ignore": list(kept)}


def _pattern(path: str) -> str:
    """A regular expression for a module, whatever comes before its list of blocks: engines have other names there."""
    inside = _IN_A_LIST.search(path)
    return f"^.*{re.escape(inside[0])}$" if inside else f"^{re.escape(path)}$"


def write_config(out: Path, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> None:
    content = {key: value for key, value in config.items() if key != "quantization_config"} | {"quantization_config": dict(quantization)}
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tokenizer_files(files: ModelFiles) -> list[Path]:
    """What `copy_tokenizer` copies; none of a GGUF file."""
    if files.kind == "gguf":
        return []
    has_code = "auto_map" in (read_json(files.config_path) if files.config_path is not None else {})
    patterns = (*TOKENIZER_PATTERNS, "additional_chat_templates/*.jinja", *(["*.py"] if has_code else []))
    found = [file for pattern in patterns for file in sorted(files.root.glob(pattern))]
    return [file for file in found if file.is_file() and file.name not in _NOT_TOKENIZER]


def copy_tokenizer(files: ModelFiles, out: Path) -> None:
    """Tokenizer, chat template and generation config, as they are; made from a GGUF file's where there is nothing else."""
    if files.kind == "gguf":
        from transformers import AutoTokenizer

        assert files.gguf_file is not None
        AutoTokenizer.from_pretrained(files.root, gguf_file=files.gguf_file.name).save_pretrained(out)
        return
    for file in tokenizer_files(files):
        place = out / file.relative_to(files.root)
        place.parent.mkdir(exist_ok=True)
        shutil.copy2(file, place)
