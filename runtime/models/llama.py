"""The Llama family (Llama, Mistral, Qwen2, Qwen3) by config flags. Knows neither checkpoint formats nor who schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...kernels.paged_attention import paged_attention
from ...kernels.rms_norm import add_rms_norm
from ...kernels.rope import rope_and_store
from ..forward_batch import ForwardBatch
from ..kv_pool import KVPool
from ..layers.linear import LinearShape, ParallelLinear, Split, can_be_cut
from ..layers.parallel import TensorParallelGroup
from ..layers.rope import rope_table
from ..pipeline import Pipeline, check_stages
from ..weights import WeightSource
from .config import ModelConfig
from .kv_scales import KVScales, read_kv_scales


@dataclass(frozen=True)
class Workspace:
    """Buffers for the activations of up to `max_tokens` tokens; every layer writes over the last one's."""

    residual: torch.Tensor
    normed: torch.Tensor
    hidden: torch.Tensor
    qkv: torch.Tensor
    attention: torch.Tensor
    gate_up: torch.Tensor
    activated: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in vars(self).values())


class LinearShapes(NamedTuple):
    """The linears of a decoder block."""

    qkv: LinearShape
    output: LinearShape
    gate_up: LinearShape
    down: LinearShape


def linear_shapes(config: ModelConfig, index: int, kv_copies: int) -> LinearShapes:
    """The linears of block `index`, each key-value head of which lies on `kv_copies` ranks."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def shape(name: str, sources: tuple[str, ...], inputs: int, parts: tuple[int, ...], bias: bool, split: Split) -> LinearShape:
        prefix = f"model.layers.{index}."
        copies = (1, kv_copies, kv_copies) if len(parts) == 3 else ()
        return LinearShape(prefix + name, tuple(prefix + module for module in sources), inputs, parts, bias, split, copies)

    qkv, gate_up = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    return LinearShapes(
        shape("self_attn.qkv_proj", qkv, hidden, (q_size, kv_size, kv_size), config.qkv_bias, "out"),
        shape("self_attn.o_proj", ("self_attn.o_proj",), q_size, (hidden,), config.output_bias, "in"),
        shape("mlp.gate_up_proj", gate_up, hidden, (inner, inner), config.mlp_bias, "out"),
        shape("mlp.down_proj", ("mlp.down_proj",), inner, (hidden,), config.mlp_bias, "in"),
    )


def check_cut(config: ModelConfig, source: WeightSource, ranks: int) -> None:
    """Raises ValueError, naming the sizes that work, where the model cannot be cut over `ranks` ranks in the way it is stored."""

    def works(size: int) -> bool:
        if size == 1:
            return True
        try:
            copies = TensorParallelGroup(size).heads(config.num_heads, config.num_kv_heads).copies
        except ValueError:
            return False
        return all(can_be_cut(shape, size, source) for index in range(config.num_layers) for shape in linear_shapes(config, index, copies))

    if not works(ranks):
        legal = [size for size in range(1, config.num_heads + 1) if works(size)]
        raise ValueError(
            f"--tp-size {ranks} cannot cut this model ({config.num_heads} attention heads, {config.num_kv_heads} key-value heads, "
            f"{config.intermediate_size} inner features, {source.formats.method or 'dense'}): sizes that work are "
            f"{', '.join(map(str, legal))}"
        )


class _Layer:
    """One decoder block: attention and gated MLP, each behind an RMS norm."""

    def __init__(self, config: ModelConfig, index: int, source: WeightSource, group: TensorParallelGroup, *, has_kv_scales: bool) -> None:
        self._config = config
        self._window = config.sliding_windows[index]
        share = group.heads(config.num_heads, config.num_kv_heads)
        self.heads, self.kv_heads = share.heads, share.kv_heads
        hidden, dim = config.hidden_size, config.head_dim
        prefix = f"model.layers.{index}"
        shapes = linear_shapes(config, index, share.copies)

        def norm(name: str, size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
            return source.read_norm(f"{prefix}.{name}.weight", size, dtype)

        self._input_norm = norm("input_layernorm", hidden)
        self.qkv = ParallelLinear(shapes.qkv, source, group)
        self._q_norm = norm("self_attn.q_norm", dim, torch.float32) if config.qk_norm else None
        self._k_norm = norm("self_attn.k_norm", dim, torch.float32) if config.qk_norm else None
        scales = read_kv_scales(source, f"{prefix}.self_attn", config.num_kv_heads) if has_kv_scales else None
        self.kv_scales = None
        if scales is not None:
            self.kv_scales = KVScales(*(whole.narrow(0, share.first_kv_head, share.kv_heads) for whole in (scales.k, scales.v)))
        self.output = ParallelLinear(shapes.output, source, group)
        self._mlp_norm = norm("post_attention_layernorm", hidden)
        self.gate_up = ParallelLinear(shapes.gate_up, source, group)
        self.down = ParallelLinear(shapes.down, source, group)

    @property
    def linears(self) -> tuple[ParallelLinear, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    def forward(
        self,
        batch: ForwardBatch,
        space: Workspace,
        cos_sin: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        kv_dtype: torch.dtype,
        *,
        is_first: bool,
    ) -> None:
        """Reads and writes `space`: `residual` and, except into the first layer, `hidden` that is still to be added to it."""
        eps, heads, kv_heads, dim = self._config.norm_eps, self.heads, self.kv_heads, self._config.head_dim
        x, residual = (space.residual, None) if is_first else (space.hidden, space.residual)
        qkv = self.qkv.after_norm(x, residual, self._input_norm, eps, space.normed, out=space.qkv)
        rope_and_store(
            qkv,
            batch.positions,
            batch.slots,
            cos_sin,
            k_pages,
            v_pages,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            norm_eps=eps,
            kv_dtype=kv_dtype,
            k_scale=self.kv_scales.k if self.kv_scales else None,
            v_scale=self.kv_scales.v if self.kv_scales else None,
        )
        query = qkv[:, : heads * dim].view(-1, heads, dim)
        attended = space.attention.view(-1, heads, dim)
        paged_attention(query, k_pages, v_pages, batch.plan, scale=dim**-0.5, sliding_window=self._window, kv_dtype=kv_dtype, out=attended)
        self.output(space.attention, out=space.hidden)
        self.gate_up.after_norm(space.hidden, space.residual, self._mlp_norm, eps, space.normed, out=space.gate_up)
        self.down.after_gate(space.gate_up, space.activated, out=space.hidden)


class LlamaModel:
    """Embedding, layers, final norm and head. Weights are read on construction, layer by layer.

    `has_kv_scales`: static scales of keys and values are read too, where the checkpoint has them; the KV pool must hold codes then.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        *,
        max_position: int,
        group: TensorParallelGroup | None = None,
        pipeline: Pipeline | None = None,
        has_kv_scales: bool = False,
    ) -> None:
        self.config = config
        self._group = group = group or TensorParallelGroup()
        pipeline = pipeline or Pipeline()
        check_stages(config.num_layers, pipeline.size)
        check_cut(config, source, group.size)
        self.device, self.activation_dtype = source.device, source.activation_dtype
        self.cos_sin = rope_table(config.rope, max_position, source.device)
        self.is_tied = config.tie_word_embeddings or not source.has_module("lm_head")
        self.embedding = self._vocabulary_linear("model.embed_tokens", source) if pipeline.is_first else None
        indices = pipeline.place.layers(config.num_layers)
        self.layers = [_Layer(config, index, source, group, has_kv_scales=has_kv_scales) for index in indices]
        self._final_norm = source.read_norm("model.norm.weight", config.hidden_size) if pipeline.is_last else None
        self.head = None
        if pipeline.is_last and self.is_tied and self.embedding is not None:
            self.head = self.embedding
        elif pipeline.is_last:
            self.head = self._vocabulary_linear("model.embed_tokens" if self.is_tied else "lm_head", source)

    def _vocabulary_linear(self, module: str, source: WeightSource) -> ParallelLinear:
        shape = LinearShape(module, (module,), self.config.hidden_size, (self.config.vocab_size,), False, "vocabulary")
        return ParallelLinear(shape, source, self._group)

    @property
    def linears(self) -> tuple[ParallelLinear, ...]:
        """Every linear of this stage once."""
        ends = [linear for linear in (self.embedding, self.head) if linear is not None]
        return (*dict.fromkeys(ends), *(linear for layer in self.layers for linear in layer.linears))

    @property
    def weight_bytes(self) -> int:
        return sum(linear.weight_bytes for linear in self.linears)

    def make_workspace(self, max_tokens: int) -> Workspace:
        """Buffers for steps of up to `max_tokens` tokens."""
        first = self.layers[0]
        hidden, query = self.config.hidden_size, first.output.in_features
        widths = (hidden, hidden, hidden, first.qkv.out_features, query, first.gate_up.out_features, first.down.in_features)
        return Workspace(*(torch.zeros(max_tokens, width, dtype=self.activation_dtype, device=self.device) for width in widths))

    def forward(self, batch: ForwardBatch, pool: KVPool, space: Workspace, *, into: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of `batch.logits_rows`, float32 [R, vocab_size], in `into` where it is given. Writes new keys and values into `pool`.

        A stage that is not the first finds in `space.residual` what comes from the one before; one that is not the last leaves there what
        goes to the next, and gives what is of no use.
        """
        tokens = batch.num_tokens
        space = Workspace(*(buffer[:tokens] for buffer in vars(space).values()))
        if self.embedding is not None:
            space.residual.copy_(self._embedded(self.embedding, batch.input_ids))
        for index, layer in enumerate(self.layers):
            layer.forward(batch, space, self.cos_sin, pool.k_pages[index], pool.v_pages[index], pool.dtype, is_first=index == 0)
        if self._final_norm is None:
            space.residual.add_(space.hidden)
            return torch.empty(batch.logits_rows.shape[0], 0, device=self.device) if into is None else into
        add_rms_norm(space.hidden, space.residual, self._final_norm, self.config.norm_eps, out=space.normed)
        return self.logits(space.normed[batch.logits_rows], into=into)

    def logits(self, hidden: torch.Tensor, *, into: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [R, vocab_size] of final hidden states [R, hidden_size]; on other ranks than the first their own part, of no use."""
        size, group = self.config.vocab_size, self._group
        start, stop = group.vocabulary(size)
        own = torch.empty(hidden.shape[0], group.vocabulary_share(size), dtype=self.activation_dtype, device=self.device)
        assert self.head is not None, "the last stage has it"
        self.head(hidden, out=own[:, : stop - start])
        out = group.gather_columns(own)[:, :size]
        if into is None:
            return out.float()
        return into.copy_(out) if group.rank == 0 else into

    def _embedded(self, embedding: ParallelLinear, ids: torch.Tensor) -> torch.Tensor:
        """The embedding's rows of tokens, of which this rank may hold a part."""
        if self._group.size == 1:
            return embedding.rows(ids)
        start, stop = self._group.vocabulary(self.config.vocab_size)
        rows = embedding.rows((ids - start).clamp(0, stop - start - 1))
        is_here = (ids >= start) & (ids < stop)
        return self._group.all_reduce(torch.where(is_here[:, None], rows, 0).contiguous())
