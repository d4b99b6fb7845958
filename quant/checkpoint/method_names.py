"""Names for --quantization: which mean the same, and whether one fits a checkpoint. Knows no config keys and no tensors."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

# Every name is looked up in lower case with "-" as "_". A name that fixes a granularity we do not choose by name is not here.
_METHODS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "none": ("dense", "unquantized", "unquant"),
    "fp8": ("w8a8_fp8", "fp8_per_channel", "fp8_per_token"),
    "int8": ("w8a8_int8", "w8a8"),
    "int4": ("w4a16",),
    "awq": ("awq_marlin", "awq_gemm", "auto_awq", "autoawq"),
    "gptq": ("gptq_marlin", "auto_gptq", "autogptq", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors",),
    "modelopt": ("modelopt_fp8",),
    "gguf": (),
}
_CANONICAL = {name.replace("-", "_"): method for method, synonyms in _METHODS.items() for name in (method, *synonyms)}
_LOAD_TIME = ("fp8", "int8", "int4")


def canonical_method(name: str) -> str:
    """The one name of a method, such as "awq" for "awq_marlin". Raises ValueError with the list and the nearest name."""
    key = name.strip().lower().replace("-", "_")
    method = _CANONICAL.get(key)
    if method is None:
        near = get_close_matches(key, _CANONICAL, n=1, cutoff=0.5)
        hint = f" Did you mean {_CANONICAL[near[0]]!r}?" if near else ""
        raise ValueError(f"quantization {name!r} is not known.{hint} Known: {', '.join(_METHODS)}")
    return method


def check_method(flag: str, checkpoint_method: str | None, source: Path | None, *, weight_types: Collection[str] = ()) -> None:
    """Whether --quantization fits the checkpoint: `checkpoint_method` is its QuantizationConfig's method, "gguf", or None for a dense one.

    fp8, int8 and int4 quantize a dense model while it loads. On a quantized checkpoint they fit when it holds weights of that type
    (`weight_types`, as QuantizationConfig has them): they name the weights' type and width, not the packing and not the activations.
    The other names must be the checkpoint's own. Raises ValueError naming both, with the remedy.
    """
    method = canonical_method(flag)
    if method in ("auto", checkpoint_method) or (checkpoint_method is None and method in ("none", *_LOAD_TIME)):
        return
    if checkpoint_method is None:
        raise ValueError(_on_dense(flag, method, source))
    if method in weight_types:
        return
    holds = f" with {' and '.join(sorted(weight_types))} weights" if weight_types else ""
    raise ValueError(
        f"--quantization {flag} contradicts the checkpoint, which is {checkpoint_method}{holds}{_says(source)}: "
        f"leave the option out to use it as it is, or name the model's dense original"
    )


def _on_dense(flag: str, method: str, source: Path | None) -> str:
    text = f"--quantization {flag} needs a checkpoint quantized with {method}, but this model is dense{_says(source)}"
    if method in ("awq", "gptq"):
        model = source.parent if source is not None else "MODEL"
        command = f"octavo quantize --model-path {model} --method {method} --out DIR"
        return f"{text}. Quantize it first: {command}"
    return f"{text}. Leave the option out, or quantize while loading with one of {', '.join(_LOAD_TIME)}"


def _says(source: Path | None) -> str:
    return f" ({source})" if source is not None else ""
