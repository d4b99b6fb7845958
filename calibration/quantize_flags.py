"""The flags of `octavo quantize`. Knows no arithmetic, and loads nothing large: optimum-cli reads them at every start."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .command import at_least
from .recipe import Recipe

REPORT = "report.html"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    default = Recipe()
    add = parser.add_argument_group("model").add_argument
    add("--model-path", "--model", metavar="PATH", help="a folder, a hub id or a .gguf file; none: the embedded model")
    add("--out", type=Path, metavar="DIR", help="where the quantized model goes: an empty folder, or one that does not exist")
    add("--resume", action="store_true", help="go on with an unfinished run in --out")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto: a GPU when there is one (default: auto)")
    add("--dry-run", action="store_true", help="say what would be done, and what memory and disk it would take")

    add = parser.add_argument_group("what").add_argument
    add("--method", metavar="NAME", help=f"auto, awq, gptq, best, fp8, int8 or rtn (default: {default.method})")
    add("--bits", type=at_least(2), metavar="N", help=f"of weights (default: {default.bits})")
    add("--group-size", type=_group_size, metavar="N", help="inputs that share a scale; -1: all of them (default: auto)")
    add("--format", metavar="NAME", help="of the checkpoint: awq, gptq or compressed-tensors (default: auto)")
    add(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one zero point for all (default: what the format is read with everywhere)",
    )
    add("--kv-cache", metavar="NAME", help="fp8: scales for an fp8 KV cache")
    add("--activations", metavar="HOW", help=f"fp8: dynamic or static scales of inputs (default: {default.activations})")
    add("--weight-scales", metavar="HOW", help=f"fp8: a scale a channel, tensor or block (default: {default.weight_scales})")
    add("--ignore", action="append", metavar="REGEX", help="linears to leave as they are, by module path; may be given again")
    add("--effort", metavar="HOW", help=f"fast, default or best (default: {default.effort})")

    add = parser.add_argument_group("calibration").add_argument
    add(
        "--calibration",
        metavar="WHAT",
        help="self (the model writes it), a text, JSONL or chat file, or a hub data set NAME[:CONFIG] (default: self)",
    )
    add(
        "--samples",
        type=at_least(1),
        metavar="N",
        help=f"rows of text at most; --effort says how many of them are used (default: {default.samples})",
    )
    add("--seqlen", type=at_least(1), metavar="N", help="tokens in a row (default: 512, or the model's context where that is less)")
    add("--seed", type=at_least(0), metavar="N", help=f"of everything drawn (default: {default.seed})")
    add(
        "--max-memory",
        type=_size,
        metavar="SIZE",
        help="that weights and activations may take, such as 8GiB; beyond, activations go to disk",
    )

    add = parser.add_argument_group("proof").add_argument
    add("--eval", type=Path, metavar="FILE", help="text to measure quality on (default: samples held back from the calibration)")
    add("--max-ppl-increase", type=_share, metavar="SHARE", help="fail (exit code 3) when perplexity rises by more, such as 3%%")
    add("--max-kl", type=float, metavar="NATS", help="fail (exit code 3) when the KL divergence a token is larger")
    add("--skip-speed", action="store_true", help="do not measure tokens a second before and after")
    add("--report", type=Path, metavar="FILE", help=f"the HTML report's place (default: {REPORT} in --out)")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that flags ask for. Raises ValueError for what cannot be."""
    given: Mapping[str, Any] = {field.name: value for field in fields(Recipe) if (value := getattr(args, field.name, None)) is not None}
    recipe = Recipe.from_dict(given)
    if recipe.eight_bit and given.get("bits", 8) != 8:
        raise ValueError(f"method {recipe.method} makes weights of 8 bits, not {recipe.bits}: leave --bits out")
    return recipe


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or such as 8GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _share(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give such as 3% or 0.03")
    share = float(found[1]) / (100 if found[2] else 1)
    if share > 1 and not found[2]:
        raise argparse.ArgumentTypeError(f"{text!r} would be {share:.0%}: give {text}% or {share / 100:g}")
    return share


def _group_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no group size: give auto, -1, or a number such as 64") from None
