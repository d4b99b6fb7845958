"""What each rank of an engine will hold, from configs and the headers of files, before anything is loaded. Starts nothing."""

from __future__ import annotations

from typing import Any

import torch

from ..quant.build import KernelOptions
from ..quant.checkpoint.hf_config import read_config
from ..quant.checkpoint.open_reader import open_reader
from ..quant.checkpoint.resolve import ModelFiles, resolve_model
from ..quant.module_formats import ModuleFormats
from .config import EngineConfig
from .dummy_weights import DummySource
from .kv_pool import KV_DTYPES, kv_bytes_per_token
from .layers.parallel import TensorParallelGroup
from .model_runner import weight_dtype
from .models.config import ModelConfig
from .models.llama import check_cut, linear_shapes
from .weights import HeaderSource

_SCATTERED = (
    "Act-order: a rank's inputs of o_proj and down_proj belong to all groups, so these are held with a scale for each weight, "
    "at several times their size"
)
_ENDS = ("model.embed_tokens.", "lm_head.")


def plan_ranks(config: EngineConfig, files: ModelFiles) -> str:
    """A line for people. `config` is resolved. Raises ValueError, naming the sizes that work, for a model that cannot be cut so."""
    described = read_config(files)
    model, size = ModelConfig.from_hf(described), config.tp_size
    dtype = weight_dtype(config, files, model)
    options: dict[str, Any] = {"weight_dtype": dtype, "activation_dtype": dtype, "device": torch.device("meta")}
    weights, scattered = "", False
    if config.needs_weights:
        reader = open_reader(files)
        formats = ModuleFormats(files, described, reader.tensors(), quantization=config.quantization)
        with HeaderSource(reader, formats, show_progress=False, **options) as source:
            check_cut(model, source, size)
            scattered = _has_act_order(model, formats)
            sizes = {name: info.nbytes for name, info in reader.tensors().items()}
        weights = f", about {_weight_bytes(model, sizes, size) / 2**30:.2f} GiB of the files' weights"
    else:
        formats = ModuleFormats(files, described, {}, quantization=config.quantization)
        check_cut(model, DummySource(formats, kernel_options=KernelOptions(), has_head=not model.tie_word_embeddings, **options), size)
    share = TensorParallelGroup(size).heads(model.num_heads, model.num_kv_heads)
    kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, dtype)
    kv = kv_bytes_per_token(num_layers=model.num_layers, num_kv_heads=share.kv_heads, head_dim=model.head_dim, dtype=kv_dtype)
    where = (
        f"cuda:0 to cuda:{size - 1}"
        if config.device == "cuda"
        else f"processes of {config.num_threads} thread{'s' * (config.num_threads != 1)}"
    )
    return (
        f"{size} ranks ({where}), every layer cut across them: {share.heads} attention and {share.kv_heads} key-value heads each"
        f"{weights}, {kv / 1024:.1f} KiB of keys and values a token" + (f". {_SCATTERED}" if scattered else "")
    )


def _has_act_order(model: ModelConfig, formats: ModuleFormats) -> bool:
    (down,) = linear_shapes(model, 0, 1).down.sources
    return formats.of(down, in_features=model.intermediate_size, out_features=model.hidden_size).act_order


def check_model(config: EngineConfig) -> None:
    """Raises ValueError for what an engine of `config` would fail to start with, as far as the model's files and config tell."""
    files = resolve_model(config.model_path, revision=config.revision, needs_weights=config.needs_weights)
    ModelConfig.from_hf(read_config(files))
    if config.tp_size > 1:
        plan_ranks(config.resolve(device="cpu"), files)


def _weight_bytes(model: ModelConfig, sizes: dict[str, int], ranks: int) -> float:
    """Bytes of tensors that a rank keeps: its part of linears and vocabulary, and all of the rest."""
    copies = TensorParallelGroup(ranks).heads(model.num_heads, model.num_kv_heads).copies
    parts = {
        f"{module}.": ranks / shape.copies_of(index)
        for layer in range(model.num_layers)
        for shape in linear_shapes(model, layer, copies)
        for index, module in enumerate(shape.sources)
    }
    parts.update(dict.fromkeys(_ENDS, ranks))
    return sum(nbytes / parts.get(name.rpartition(".")[0] + ".", 1) for name, nbytes in sizes.items())
