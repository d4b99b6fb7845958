"""The Llama family (Llama, Mistral, Qwen2, Qwen3) by config flags. Knows neither checkpoint formats nor who schedules."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.paged_attention import paged_attention
from ...kernels.rms_norm import add_rms_norm
from ...kernels.rope import rope_and_store
from ..forward_batch import ForwardBatch
from ..kv_pool import KVPool
from ..layers.linear import LinearShape, ParallelLinear
from ..layers.parallel import TensorParallelGroup
from ..layers.rope import rope_table
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


class _Layer:
    """One decoder block: attention and gated MLP, each behind an RMS norm."""

    def __init__(self, config: ModelConfig, index: int, source: WeightSource, group: TensorParallelGroup, *, has_kv_scales: bool) -> None:
        self._config = config
        self._window = config.sliding_windows[index]
        self.heads = group.share("attention heads", config.num_heads)
        self.kv_heads = group.share("key-value heads", config.num_kv_heads)
        hidden, dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
        prefix = f"model.layers.{index}"

        def linear(name: str, sources: tuple[str, ...], inputs: int, parts: tuple[int, ...], bias: bool, split: str) -> ParallelLinear:
            full = tuple(f"{prefix}.{module}" for module in sources)
            return ParallelLinear(LinearShape(f"{prefix}.{name}", full, inputs, parts, bias, split), source, group)  # type: ignore[arg-type]

        def norm(name: str, size: int) -> torch.Tensor:
            return source.read_norm(f"{prefix}.{name}.weight", size)

        self._input_norm = norm("input_layernorm", hidden)
        self.qkv = linear(
            "self_attn.qkv_proj",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            hidden,
            (q_size, kv_size, kv_size),
            config.qkv_bias,
            "out",
        )
        self._q_norm = norm("self_attn.q_norm", dim) if config.qk_norm else None
        self._k_norm = norm("self_attn.k_norm", dim) if config.qk_norm else None
        scales = read_kv_scales(source, f"{prefix}.self_attn", config.num_kv_heads) if has_kv_scales else None
        self.kv_scales = None if scales is None else KVScales(group.slice_of(scales.k, 0), group.slice_of(scales.v, 0))
        self.output = linear("self_attn.o_proj", ("self_attn.o_proj",), q_size, (hidden,), config.output_bias, "in")
        self._mlp_norm = norm("post_attention_layernorm", hidden)
        inner = config.intermediate_size
        self.gate_up = linear("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), hidden, (inner, inner), config.mlp_bias, "out")
        self.down = linear("mlp.down_proj", ("mlp.down_proj",), inner, (hidden,), config.mlp_bias, "in")

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
        has_kv_scales: bool = False,
    ) -> None:
        self.config = config
        self._group = group = group or TensorParallelGroup()
        self.device, self.activation_dtype = source.device, source.activation_dtype
        self.cos_sin = rope_table(config.rope, max_position, source.device)
        vocabulary = (config.vocab_size,)
        self.embedding = self._vocabulary_linear("model.embed_tokens", vocabulary, source)
        self.layers = [_Layer(config, index, source, group, has_kv_scales=has_kv_scales) for index in range(config.num_layers)]
        self._final_norm = source.read_norm("model.norm.weight", config.hidden_size)
        tied = config.tie_word_embeddings or not source.has_module("lm_head")
        self.head = self.embedding if tied else self._vocabulary_linear("lm_head", vocabulary, source)

    def _vocabulary_linear(self, module: str, parts: tuple[int, ...], source: WeightSource) -> ParallelLinear:
        shape = LinearShape(module, (module,), self.config.hidden_size, parts, False, "none")
        return ParallelLinear(shape, source, self._group)

    @property
    def linears(self) -> tuple[ParallelLinear, ...]:
        """Every linear once."""
        ends = (self.embedding,) if self.head is self.embedding else (self.embedding, self.head)
        return (*ends, *(linear for layer in self.layers for linear in layer.linears))

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
        """Logits of `batch.logits_rows`, float32 [R, vocab_size], in `into` where it is given. Writes new keys and values into `pool`."""
        tokens = batch.num_tokens
        space = Workspace(*(buffer[:tokens] for buffer in vars(space).values()))
        space.residual.copy_(self.embedding.rows(batch.input_ids))
        for index, layer in enumerate(self.layers):
            layer.forward(batch, space, self.cos_sin, pool.k_pages[index], pool.v_pages[index], pool.dtype, is_first=index == 0)
        add_rms_norm(space.hidden, space.residual, self._final_norm, self.config.norm_eps, out=space.normed)
        return self.logits(space.normed[batch.logits_rows], into=into)

    def logits(self, hidden: torch.Tensor, *, into: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [R, vocab_size] of final hidden states [R, hidden_size]."""
        out = torch.empty(hidden.shape[0], self.config.vocab_size, dtype=self.activation_dtype, device=self.device)
        self.head(hidden, out=out)
        return out.float() if into is None else into.copy_(out)
