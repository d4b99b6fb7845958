"""ModelConfig: an architecture as flags and numbers, read from a Hugging Face config. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
# The numbers that each type of scaling cannot do without.
_ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


class UnsupportedModel(ValueError):
    """The checkpoint is of an architecture, or uses a feature, that is not implemented."""


@dataclass(frozen=True)
class _Family:
    """What a family's code in transformers fixes that its config does not say. None: the config's own key decides.

    `defaults` are the values of keys that a config leaves out, where the family has its own.
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    qk_norm: bool = False
    sliding_window_key: bool = True  # False: the family ignores `sliding_window`
    needs_use_sliding_window: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN2_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(sliding_window_key=False),
    "MistralForCausalLM": _Family(
        qkv_bias=False,
        output_bias=False,
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, output_bias=False, needs_use_sliding_window=True, defaults=_QWEN2_DEFAULTS),
    "Qwen3ForCausalLM": _Family(qk_norm=True, needs_use_sliding_window=True, defaults={**_QWEN2_DEFAULTS, "head_dim": 128}),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta` and a scaling by type; `scaling` holds that type's own numbers."""

    theta: float
    type: RopeType
    scaling: Mapping[str, Any]
    rotary_dim: int
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model. `sliding_windows` has one entry a layer, None for full attention."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    stored_dtype: str | None  # the config's own dtype, such as "bfloat16"

    def context_length(self, asked: int | None = None) -> int:
        """`asked`, or the most tokens that positions can tell apart. Raises ValueError when more than those are asked for."""
        longest = self.max_position
        if self.rope.type in ("linear", "dynamic", "yarn") and longest == self.rope.original_max_position:
            longest = int(longest * float(self.rope.scaling["factor"]))
        if asked is not None and asked > longest:
            raise ValueError(f"--context-length {asked} is beyond the model's {longest} positions: give at most {longest}")
        return asked or longest

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config. Raises UnsupportedModel for what is not implemented, ValueError for a missing or wrong key."""
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        config = {**family.defaults, **config}
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModel(f"hidden_act {config['hidden_act']!r} is not supported: the Llama family uses silu")
        heads, hidden, layers = _count(config, "num_attention_heads"), _count(config, "hidden_size"), _count(config, "num_hidden_layers")
        kv_heads = _count(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}: the config is damaged")
        head_dim = int(config.get("head_dim") or hidden // heads)
        bias = bool(config.get("attention_bias", False))
        max_position = _count(config, "max_position_embeddings", 2048)
        return cls(
            architecture=architecture,
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=_count(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_count(config, "vocab_size"),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config, head_dim, max_position),
            max_position=max_position,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            sliding_windows=_sliding_windows(config, family, layers),
            stored_dtype=config.get("dtype") or config.get("torch_dtype"),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    names = list(config.get("architectures") or [])
    for name in names:
        if name in FAMILIES:
            return str(name)
    named = ", ".join(names) if names else f"none (model_type {config.get('model_type')!r})"
    raise UnsupportedModel(f"architecture {named} is not supported; supported are {', '.join(sorted(FAMILIES))}")


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}={value!r} in the model's config must be a whole number of at least 1")
    return value


def _rope(config: Mapping[str, Any], head_dim: int, max_position: int) -> RopeConfig:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported are {', '.join(_ROPE_TYPES)}")
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    partial = float(scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or max_position
    if kind == "dynamic":
        original = max_position  # as in transformers, whatever else the config says
    if kind == "yarn" and scaling.get("factor") is None:
        scaling["factor"] = max_position / original
    for key in _ROPE_TYPES[kind]:
        value = scaling.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"rope scaling {kind!r} needs a number {key!r} above 0, and the model's config has {value!r}")
    return RopeConfig(float(theta), cast(RopeType, kind), scaling, int(head_dim * partial) // 2 * 2, int(original))


def _sliding_windows(config: Mapping[str, Any], family: _Family, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if not family.sliding_window_key or window is None or (family.needs_use_sliding_window and not config.get("use_sliding_window", False)):
        return (None,) * layers
    types = config.get("layer_types")
    if types:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in types)
    first = int(config.get("max_window_layers") or 0) if family.needs_use_sliding_window else 0
    return tuple(int(window) if layer >= first else None for layer in range(layers))
