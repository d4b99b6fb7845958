"""What each rank of an engine will hold, from configs and the headers of files, before anything is loaded. Starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..quant.build import KernelOptions
from ..quant.checkpoint.hf_config import read_config
from ..quant.checkpoint.open_reader import open_reader
from ..quant.checkpoint.resolve import ModelFiles, resolve_model
from ..quant.module_formats import ModuleFormats
from .config import EngineConfig
from .dummy_weights import DummySource
from .hosts import Machine
from .kv_pool import KV_DTYPES, kv_bytes_per_token
from .layers.parallel import TensorParallelGroup
from .models.config import ModelConfig
from .models.llama import check_cut, linear_shapes
from .pipeline import Place, check_stages
from .weight_dtype import weight_dtype
from .weights import HeaderSource

_GIB = 1 << 30
_SCATTERED = (
    "Act-order: a rank's inputs of o_proj and down_proj belong to all groups, so these are held with a scale for each weight, "
    "at several times their size"
)
_ENDS = ("model.embed_tokens.", "lm_head.")


def places(config: EngineConfig, machines: Sequence[Machine]) -> list[str]:
    """Where each rank is, for people. `config` is resolved."""
    a_node = config.ranks_per_node
    devices = ["cpu" if config.device == "cpu" else f"cuda:{rank % a_node}" for rank in range(config.num_ranks)]
    return [device if len(machines) == 1 else f"{machines[rank // a_node].name} {device}" for rank, device in enumerate(devices)]


@dataclass(frozen=True)
class RankPlan:
    """What the ranks of a resolved `config` will hold, in bytes: of the files' weights (None: there are no files), of keys and values."""

    config: EngineConfig
    model: ModelConfig
    weights: tuple[float, ...] | None
    kv_per_token: tuple[int, ...]
    is_scattered: bool

    @classmethod
    def of(cls, config: EngineConfig, files: ModelFiles) -> RankPlan:
        """Raises ValueError, naming the sizes that work, for a model that cannot be cut so."""
        described = read_config(files)
        model = ModelConfig.from_hf(described)
        dtype = weight_dtype(config, files, model)
        options: dict[str, Any] = {"weight_dtype": dtype, "activation_dtype": dtype, "device": torch.device("meta")}
        check_stages(model.num_layers, config.num_stages)
        sizes, scattered = None, False
        if config.needs_weights:
            reader = open_reader(files)
            formats = ModuleFormats(files, described, reader.tensors(), quantization=config.quantization)
            with HeaderSource(reader, formats, show_progress=False, **options) as source:
                check_cut(model, source, config.tp_size)
                scattered = config.tp_size > 1 and _has_act_order(model, formats)
                sizes = {name: info.nbytes for name, info in reader.tensors().items()}
        else:
            formats = ModuleFormats(files, described, {}, quantization=config.quantization)
            dummy = DummySource(formats, kernel_options=KernelOptions(), has_head=not model.tie_word_embeddings, **options)
            check_cut(model, dummy, config.tp_size)
        ranks = [Place(rank, config.tp_size, config.num_stages) for rank in range(config.num_ranks)]
        kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, dtype)
        share = TensorParallelGroup(config.tp_size).heads(model.num_heads, model.num_kv_heads)
        kv = [
            kv_bytes_per_token(
                num_layers=len(place.layers(model.num_layers)), num_kv_heads=share.kv_heads, head_dim=model.head_dim, dtype=kv_dtype
            )
            for place in ranks
        ]
        weights = None if sizes is None else tuple(weight_bytes(model, sizes, place) for place in ranks)
        return cls(config, model, weights, tuple(kv), scattered)

    def describe(self, machines: Sequence[Machine]) -> str:
        """A table for people: what each rank will hold and where, and how many tokens the KV cache will have room for."""
        config, model = self.config, self.model
        share = TensorParallelGroup(config.tp_size).heads(model.num_heads, model.num_kv_heads)
        cut = f"every layer cut across {config.tp_size} ({share.heads} attention and {share.kv_heads} key-value heads each)"
        stages = f"layers in {config.num_stages} stages"
        how = ", ".join([cut] * (config.tp_size > 1) + [stages] * (config.num_stages > 1))
        where = places(config, machines)
        threads = f" (processes of {config.num_threads} thread{'s' * (config.num_threads != 1)})" if config.device == "cpu" else ""
        lines = [f"{config.num_ranks} ranks{threads}: {how}"]
        rooms = [self._room(rank, machines) for rank in range(config.num_ranks)]
        for rank, place in enumerate(where):
            layers = Place(rank, config.tp_size, config.num_stages).layers(model.num_layers)
            ends = ", embedding" * (layers.start == 0) + ", head" * (layers.stop == model.num_layers)
            weights = f"  about {self.weights[rank] / _GIB:.2f} GiB of the files' weights" if self.weights is not None else ""
            lines.append(
                f"  rank {rank}  {place:<{max(map(len, where))}}  layers {layers.start}-{layers.stop - 1}{ends}{weights}"
                f"  {self.kv_per_token[rank] / 1024:.1f} KiB of keys and values a token"
            )
        known = [room for room in rooms if room is not None]
        if known:
            least = rooms.index(min(known))
            if min(known) > 0:
                lines.append(f"  Room for about {min(known):,} tokens in the KV cache (rank {least} has the least)")
            else:
                lines.append(f"  This does not fit: {self._remedy(least, machines)}")
        if self.is_scattered:
            lines.append(f"  {_SCATTERED}")
        return "\n".join(lines)

    def _device_total(self, rank: int, machines: Sequence[Machine]) -> float:
        """Bytes of memory that a rank has to itself."""
        a_node = self.config.ranks_per_node
        devices = machines[rank // a_node].devices
        return devices[0].total / a_node if self.config.device == "cpu" else devices[rank % a_node].total

    def _room(self, rank: int, machines: Sequence[Machine]) -> int | None:
        """Tokens of KV cache, about; None where it is not known what weights will take."""
        if self.weights is None or self.config.quantization in ("fp8", "int8", "int4"):
            return None
        budget = self._device_total(rank, machines) * self.config.memory_fraction - self.weights[rank]
        room = int(budget / self.kv_per_token[rank])
        return room if self.config.max_total_tokens is None else min(room, self.config.max_total_tokens)

    def _remedy(self, rank: int, machines: Sequence[Machine]) -> str:
        assert self.weights is not None
        total = self._device_total(rank, machines)
        within = f"{self.config.memory_fraction:g} of {total / _GIB:.1f} GiB"
        told = f"rank {rank} would hold {self.weights[rank] / _GIB:.1f} GiB of weights within {within}"
        least = -(-int(sum(self.weights)) // max(1, int(total * self.config.memory_fraction))) + 1
        return f"{told}. Use more ranks (at least about {least} in all: --tp-size, --pp-size, --nnodes), or --quantization fp8 or int4"


def _has_act_order(model: ModelConfig, formats: ModuleFormats) -> bool:
    (down,) = linear_shapes(model, 0, 1).down.sources
    return formats.of(down, in_features=model.intermediate_size, out_features=model.hidden_size).act_order


def check_model(config: EngineConfig) -> None:
    """Raises ValueError for what an engine of `config` would fail to start with, as far as the model's files and config tell."""
    files = resolve_model(config.model_path, revision=config.revision, needs_weights=config.needs_weights)
    ModelConfig.from_hf(read_config(files))
    if config.num_ranks > 1:
        RankPlan.of(config.resolve(device="cpu"), files)


def weight_bytes(model: ModelConfig, sizes: dict[str, int], place: Place) -> float:
    """Bytes of tensors that a rank keeps: its part of its stage's linears and vocabulary, and all of the stage's other tensors."""
    ranks = place.tp_size
    copies = TensorParallelGroup(ranks).heads(model.num_heads, model.num_kv_heads).copies
    layers = place.layers(model.num_layers)
    parts = {
        f"{module}.": ranks / shape.copies_of(index)
        for layer in layers
        for shape in linear_shapes(model, layer, copies)
        for index, module in enumerate(shape.sources)
    }
    parts.update(dict.fromkeys(_ENDS, ranks))
    is_tied = not any(name.startswith("lm_head.") for name in sizes)
    here = {name: nbytes for name, nbytes in sizes.items() if place.holds(name, model.num_layers, is_tied=is_tied)}
    return sum(nbytes / parts.get(name.rpartition(".")[0] + ".", 1) for name, nbytes in here.items())
