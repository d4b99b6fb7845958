"""Recipe: what a quantization is asked to be. Checked as soon as it exists; knows no model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

if TYPE_CHECKING:
    import torch

Method = Literal["auto", "awq", "gptq", "best", "fp8", "int8", "rtn"]
Format = Literal["auto", "awq", "gptq", "compressed-tensors"]
Effort = Literal["fast", "default", "best"]
KVCache = Literal["fp8"]

_BITS: Mapping[str, tuple[int, ...]] = {"awq": (4,), "gptq": (2, 4, 8), "compressed-tensors": (4, 8)}
_EIGHT_BIT = ("fp8", "int8")
# What transformers calls data sets in a GPTQConfig, as the hub does.
_TRANSFORMERS_DATASETS = {"wikitext2": "wikitext:wikitext-2-raw-v1", "c4": "allenai/c4:en", "c4-new": "allenai/c4:en"}
MIN_SEQLEN, MIN_SAMPLES = 16, 1
_SEQLEN = 512


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is to be quantized. Raises ValueError, naming value and remedy, for what cannot be.

    method          rtn, awq, gptq and best make weights of `bits`; fp8 and int8 make 8-bit weights and inputs; auto climbs from cheap to
                    thorough until the gate holds
    group_size      inputs that share a scale; "auto": 64, or what divides every linear, at most 128
    format          of the checkpoint; auto: awq for asymmetric 4 bits, gptq for symmetric ones, compressed-tensors for the others
    seqlen          tokens in a row; "auto": 512, or the model's context where that is less
    symmetric       one zero point for all; None: what every engine reads (asymmetric for awq, symmetric for the others)
    calibration     "self": the model writes its own; else a text, JSONL or chat file, or a hub data set (NAME or NAME:CONFIG)
    activations     of fp8: inputs rounded by a scale found for each token as it comes ("dynamic") or from calibration ("static")
    weight_scales   of fp8: one a channel, one a tensor, or one a block of 128 x 128
    ignore          regular expressions over module paths: what matches stays as it is
    max_ppl_increase, max_kl    the gate: share of the original's perplexity; nats a token
    max_memory      bytes that activations and weights may take; beyond, activations go to disk
    """

    method: Method = "auto"
    bits: int = 4
    group_size: int | Literal["auto"] = "auto"
    format: Format = "auto"
    symmetric: bool | None = None
    calibration: str = "self"
    samples: int = 128
    seqlen: int | Literal["auto"] = "auto"
    seed: int = 0
    kv_cache: KVCache | None = None
    activations: Literal["dynamic", "static"] = "dynamic"
    weight_scales: Literal["channel", "tensor", "block"] = "channel"
    effort: Effort = "default"
    ignore: tuple[str, ...] = ()
    max_ppl_increase: float | None = None
    max_kl: float | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("format", Format), ("effort", Effort)):
            _choice(name, getattr(self, name), get_args(kind))
        _choice("kv_cache", self.kv_cache, (None, "fp8"))
        _choice("activations", self.activations, ("dynamic", "static"))
        _choice("weight_scales", self.weight_scales, ("channel", "tensor", "block"))
        object.__setattr__(self, "ignore", _patterns(self.ignore))
        object.__setattr__(self, "calibration", _name(self.calibration))
        for name in ("bits", "samples", "seqlen", "seed"):
            value = getattr(self, name)
            if type(value) is not int and (name, value) != ("seqlen", "auto"):
                raise ValueError(f"{name} {value!r} is not valid: give a whole number")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed} is not valid: give a number from 0 to {(1 << 63) - 1}")
        if self.symmetric not in (None, True, False) or type(self.symmetric) is int:
            raise ValueError(f"symmetric {self.symmetric!r} is not valid: give True, False or None")
        for name, least in (("samples", MIN_SAMPLES), ("seqlen", MIN_SEQLEN)):
            if (value := getattr(self, name)) != "auto" and value < least:
                raise ValueError(f"{name} {value} is not valid: give at least {least}")
        if self.group_size != "auto" and (type(self.group_size) is not int or (self.group_size < 8 and self.group_size != -1)):
            raise ValueError(
                f"group_size {self.group_size!r} is not valid: give auto, -1 (one group a row), or 8 and more, such as 64 or 128"
            )
        self._check_form()
        for name in ("max_ppl_increase", "max_kl", "max_memory"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 < value < float("inf")):
                raise ValueError(f"{name} {value!r} is not valid: give a number above 0")

    def _check_form(self) -> None:
        if self.method != "fp8" and (self.activations, self.weight_scales) != ("dynamic", "channel"):
            raise ValueError(f"activations and weight_scales are fp8's: leave them out with method {self.method}")
        if self.method == "best" and self.effort == "fast":
            raise ValueError("method best takes the best effort: leave effort out, or choose method auto")
        if self.eight_bit:
            if self.group_size != "auto":
                raise ValueError(f"method {self.method} has no groups: leave group_size {self.group_size} out")
            if self.symmetric is not None:
                raise ValueError(f"method {self.method} is symmetric: leave symmetric out")
            if self.effort != "default":
                raise ValueError(f"method {self.method} knows no effort: leave effort {self.effort} out")
            if self.format not in ("auto", "compressed-tensors"):
                raise ValueError(f"method {self.method} is written as compressed-tensors, not {self.format}: leave format out")
            if self.weight_scales == "block" and self.activations == "static":
                raise ValueError("weight_scales block goes with dynamic inputs, a scale for each 128 of a token: leave activations out")
            if self.bits not in (4, 8):  # 4 is what nobody asked for
                raise ValueError(f"method {self.method} makes weights of 8 bits, not {self.bits}: leave bits out")
            return
        allowed = _BITS[self.layout]
        if self.bits not in allowed:
            held = "; ".join(f"{name} holds {', '.join(map(str, bits))}" for name, bits in _BITS.items())
            raise ValueError(f"bits {self.bits} cannot be written as {self.layout}: {held}")
        if self.layout == "awq" and self.symmetric:
            raise ValueError("awq is read with zero points everywhere: for symmetric weights choose format gptq or compressed-tensors")
        if self.kv_cache is not None and self.layout != "compressed-tensors":
            raise ValueError(f"kv_cache {self.kv_cache} is written in compressed-tensors alone, not in {self.layout}: choose that format")

    @property
    def eight_bit(self) -> bool:
        return self.method in _EIGHT_BIT

    @property
    def layout(self) -> Literal["awq", "gptq", "compressed-tensors"]:
        """The format, decided."""
        if self.format != "auto":
            return self.format
        if self.eight_bit or self.kv_cache is not None or self.bits not in (2, 4):
            return "compressed-tensors"
        return "gptq" if self.symmetric or self.bits == 2 else "awq"

    @property
    def strategy(self) -> Literal["channel", "tensor", "block"] | None:
        """What a scale of eight-bit weights covers; None for others."""
        if not self.eight_bit:
            return None
        return self.weight_scales if self.method == "fp8" else "channel"

    def form(self, group_size: int) -> str:
        """The form of the weights, for people."""
        if self.eight_bit:
            inputs = "static" if self.static_inputs else "dynamic"
            return f"{self.method}, a scale a {self.strategy}, {inputs} inputs"
        size = "a row" if group_size == -1 else group_size
        return f"{self.bits} bits, {'symmetric' if self.is_symmetric else 'asymmetric'}, groups of {size}"

    @property
    def static_inputs(self) -> bool:
        """Whether inputs are rounded by scales that calibration finds."""
        return self.method == "fp8" and self.activations == "static"

    @property
    def is_symmetric(self) -> bool:
        """Symmetry, decided: readers of GPTQ agree on symmetric weights alone, and with compressed-tensors 0.20 transformers too."""
        return self.symmetric if self.symmetric is not None else self.layout != "awq"

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales are written as."""
        import torch

        return torch.bfloat16 if self.layout == "compressed-tensors" else torch.float16

    @property
    def row_tokens(self) -> int:
        """`seqlen`, decided where `within` gave the recipe."""
        return _SEQLEN if self.seqlen == "auto" else self.seqlen

    def within(self, context: int | None) -> Self:
        """The recipe, `seqlen` decided, for a model with so many tokens of context (None: unknown). Raises ValueError for one beyond it."""
        if self.seqlen == "auto":
            return replace(self, seqlen=_SEQLEN if context is None else min(_SEQLEN, context))
        if context is not None and self.seqlen > context:
            raise ValueError(f"seqlen {self.seqlen} is beyond the model's context of {context} tokens: give --seqlen {context} or less")
        return self

    @property
    def lowest_zero(self) -> int:
        """The least zero point that the format holds."""
        return 1 if self.layout == "gptq" else 0

    def ignores(self, module: str) -> bool:
        """Whether a module, by its path, is to stay as it is."""
        return any(re.search(pattern, module) for pattern in self.ignore)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A recipe from JSON's values. Raises ValueError for a key that does not exist."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise ValueError(
                    f"a recipe has no {key!r}" + (f"; did you mean {near[0]!r}?" if near else f": it has {', '.join(sorted(known))}")
                )
        return cls(**values)

    @classmethod
    def from_gptq_config(cls, config: Any, **changes: Any) -> Self:
        """What a transformers GPTQConfig asks for, with `changes` to a recipe's fields.

        Of its options, `bits`, `group_size`, `sym` and `dataset` (a name) mean the same here; damping and order are chosen here. Raises
        ValueError for a config of another method, for options that would change the result and are not taken, for texts given in place of
        a name, and for `desc_act` with a group size, which engines refuse.
        """
        if not hasattr(config, "quant_method"):
            raise ValueError(f"{config!r} is no recipe: give a Recipe, a dictionary of its fields, or a transformers GPTQConfig")
        method = config.quant_method
        method = getattr(method, "value", method)
        if method != "gptq":
            raise ValueError(f"a transformers config of method {method} is not taken: give a GPTQConfig, or this recipe's own fields")
        for option, usual in (("modules_in_block_to_quantize", (None,)), ("checkpoint_format", (None, "gptq"))):
            if getattr(config, option, None) not in usual:
                raise ValueError(
                    f"a GPTQConfig's {option}={getattr(config, option)!r} is not taken: leave it out; ignore=... keeps linears"
                )
        if getattr(config, "desc_act", False) and config.group_size != -1:
            raise ValueError(
                "desc_act with a group size is refused by vLLM: give desc_act=False; columns are taken in order of importance anyway"
            )
        dataset = getattr(config, "dataset", None)
        if dataset is not None and not isinstance(dataset, str):
            raise ValueError("a GPTQConfig's list of texts is not taken: write them to a file and give calibration=FILE")
        dataset = _TRANSFORMERS_DATASETS.get(dataset, dataset) if dataset else None
        given = {"method": "gptq", "format": "gptq", "bits": config.bits, "group_size": config.group_size, "symmetric": config.sym}
        return cls.from_dict({**given, **({"calibration": dataset} if dataset else {}), **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON's values, from which `from_dict` makes an equal recipe."""
        return {**asdict(self), "ignore": list(self.ignore)}

    def calibration_file(self) -> Path | None:
        """The file of the calibration text; None where it is none."""
        path = Path(self.calibration).expanduser()
        return path if self.calibration != "self" and path.is_file() else None


def _patterns(ignore: Any) -> tuple[str, ...]:
    """One pattern or several, checked."""
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore) if isinstance(ignore, list | tuple) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"ignore {ignore!r} is not valid: give a regular expression, or several")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"ignore {pattern!r} is no regular expression: {error}") from None
    return patterns


def _name(calibration: Any) -> str:
    if not isinstance(calibration, str | Path) or not str(calibration).strip():
        raise ValueError(f"calibration {calibration!r} is not valid: give a file, self, or the name of a hub data set")
    return str(calibration)


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        told = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{name} {value!r} is not valid: choose from {', '.join(str(choice) for choice in choices if choice is not None)}{told}"
        )
