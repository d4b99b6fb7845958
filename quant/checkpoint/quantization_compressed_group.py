"""One group of a compressed-tensors config: weights, input activations, KV cache. Knows no module names and no tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ..linear_format import ActivationFormat, Granularity, Layout, LinearFormat
from .quantization_base import KVCacheFormat
from .quantization_fields import Fields
from .quantization_fp8 import read_block

_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
_PACKED_BITS = (2, 3, 4, 8)
_STRATEGIES: dict[Layout, tuple[str, ...]] = {
    "pack-quantized": ("tensor", "channel", "group"),
    "float-quantized": ("tensor", "channel", "block"),
    "int-quantized": ("tensor", "channel"),
}
_GRANULARITIES: dict[str, Granularity] = {
    "tensor": "tensor",
    "channel": "channel",
    "group": "group",
    "block": "block",
    "token": "token",
}
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARG_KEYS = {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"}
_WITHOUT_EFFECT = {"observer", "observer_kwargs", "zp_dtype"}  # how scales were found; the zero points' tensors tell their dtype
_SCALE_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_group(group: Fields, config: Fields) -> LinearFormat:
    """The format of a group's modules. Raises CheckpointError naming the key when it is not supported."""
    _refuse_unknown(group, _GROUP_KEYS)
    if not group.names("targets"):
        raise group.missing("targets", 'it must list class names, module names or "re:" patterns')
    if not group.has("weights"):
        raise group.missing("weights", "a group without quantized weights is not supported")
    group.refuse("output_activations", "outputs cannot be quantized. Quantize without output_activations")
    weights = group.section("weights")
    layout = _layout(group, config, weights)
    return replace(_read_weights(weights, layout), activation=_read_activation(group))


def read_kv_cache(config: Fields) -> KVCacheFormat | None:
    scheme = config.section("kv_cache_scheme")
    if not scheme.values:
        return None
    _refuse_unknown(scheme, _ARG_KEYS | _WITHOUT_EFFECT | {"scale_dtype"})
    scheme.integer("num_bits", allowed=(8,))
    dtype: Literal["fp8_e4m3", "int8"] = "fp8_e4m3" if _is_float(scheme) else "int8"
    if not scheme.boolean("symmetric", default=True):
        raise scheme.fault("symmetric", "is not supported: the KV cache must be symmetric")
    strategy = _strategy(scheme, ("tensor", "attn_head"))
    dynamic = scheme.boolean("dynamic", default=False)
    if dynamic and strategy != "tensor":
        raise scheme.fault("dynamic", f"contradicts strategy={strategy!r}: scales per head are static")
    return KVCacheFormat(dtype, "tensor" if strategy == "tensor" else "head", dynamic)


def _layout(group: Fields, config: Fields, weights: Fields) -> Layout:
    owner = group if group.has("format") else config
    if owner is config and config.has("format") and config.text("format") == "mixed-precision":
        raise group.missing("format", 'the file says "mixed-precision", so every group must name its own format')
    remedy = "Quantize the model again with a scheme of one of these"
    written = owner.choice("format", _FORMATS, remedy=remedy)
    if written == "pack-quantized":
        return "pack-quantized"
    if written == "naive-quantized":
        return "float-quantized" if _is_float(weights) else "int-quantized"
    return "float-quantized" if written == "float-quantized" else "int-quantized"


def _read_weights(weights: Fields, layout: Layout) -> LinearFormat:
    _refuse_unknown(weights, _ARG_KEYS | _WITHOUT_EFFECT | {"scale_dtype"})
    if _is_float(weights) != (layout == "float-quantized"):
        raise weights.fault("type", f"contradicts the format {layout}")
    bits = weights.integer("num_bits", allowed=_PACKED_BITS if layout == "pack-quantized" else (8,))
    strategy = _strategy(weights, _STRATEGIES[layout])
    symmetric = weights.boolean("symmetric", default=True)
    if not symmetric and (layout != "pack-quantized" or strategy == "tensor"):
        raise weights.fault("symmetric", f"is not supported: {layout} weights per {strategy} must be symmetric")
    weights.refuse("dynamic", "weights are quantized before they are stored")
    if weights.has("scale_dtype"):
        dtype = weights.text("scale_dtype").removeprefix("torch.")
        if dtype not in _SCALE_DTYPES:
            raise weights.fault("scale_dtype", f"is not supported: it must be one of {', '.join(_SCALE_DTYPES)}")
    return LinearFormat(
        layout,
        bits,
        _GRANULARITIES[strategy],
        group_size=weights.group_size("group_size") if strategy == "group" else None,
        block=_block(weights, strategy),
        symmetric=symmetric,
        act_order=_act_order(weights, layout, strategy),
        said={"bits": weights.said("num_bits"), "group_size": weights.said("group_size" if strategy == "group" else "strategy")},
    )


def _read_activation(group: Fields) -> ActivationFormat | None:
    if not group.has("input_activations"):
        return None
    args = group.section("input_activations")
    _refuse_unknown(args, _ARG_KEYS | _WITHOUT_EFFECT | {"scale_dtype"})
    args.integer("num_bits", allowed=(8,))
    if args.has("dynamic") and args.values["dynamic"] == "local":
        raise args.fault("dynamic", "is not supported: it belongs to NVFP4. It must be true or false")
    dynamic = args.boolean("dynamic", default=False)
    strategy = _strategy(args, ("tensor", "token", "group"))
    if strategy != "tensor" and not dynamic:
        raise args.fault("dynamic", f"contradicts strategy={strategy!r}: only scales per tensor can be static")
    floating = _is_float(args)
    symmetric = args.boolean("symmetric", default=True)
    if floating and not symmetric:
        raise args.fault("symmetric", "is not supported: FP8 activations must be symmetric")
    if not dynamic and not symmetric:
        raise args.fault("symmetric", "is not supported with static scales: static activations must be symmetric")
    size = args.group_size("group_size") if strategy == "group" else None
    return ActivationFormat("fp8_e4m3" if floating else "int8", _GRANULARITIES[strategy], dynamic, group_size=size, symmetric=symmetric)


def _strategy(args: Fields, allowed: tuple[str, ...]) -> str:
    """The strategy, inferred from group_size where it is absent as the compressed-tensors package does; checked against group_size."""
    size = args.group_size("group_size") if args.has("group_size") else None
    inferred = "group" if size is not None else "channel" if args.has("group_size") else "tensor"
    strategy = args.choice("strategy", allowed, default=inferred)
    if strategy == "group" and size is None:
        raise args.fault("group_size", 'contradicts strategy="group": it must be positive')
    if strategy != "group" and size is not None:
        raise args.fault("group_size", f'contradicts strategy={strategy!r}: a positive group size goes with "group"')
    return strategy


def _block(weights: Fields, strategy: str) -> tuple[int, int] | None:
    block = read_block(weights, "block_structure")
    if (block is None) == (strategy == "block"):
        raise weights.fault("block_structure", f"contradicts strategy={strategy!r}")
    return block


def _act_order(weights: Fields, layout: Layout, strategy: str) -> bool:
    """Only "group" (and its old spellings "dynamic" and true) scatters columns over groups and stores weight_g_idx."""
    value = weights.values.get("actorder")
    if value is None or value is False or (isinstance(value, str) and value.lower() in ("static", "weight")):
        return False
    if value is not True and not (isinstance(value, str) and value.lower() in ("group", "dynamic")):
        raise weights.fault("actorder", "is not supported: it must be null, static, weight or group")
    if layout != "pack-quantized" or strategy != "group":
        raise weights.fault("actorder", f"contradicts {layout} per {strategy}: columns can only be ordered over packed groups")
    return True


def _is_float(args: Fields) -> bool:
    return args.choice("type", ("int", "float"), default="int") == "float"


def _refuse_unknown(fields: Fields, known: set[str]) -> None:
    for key in fields.values:
        if fields.has(key) and key not in known:
            raise fields.fault(key, f"is an unknown key. Known here: {', '.join(sorted(known))}")
