"""What a quantization did, for people and programs: a summary, report.json, report.html and a model card. Computes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import __version__
from .quantize_flags import REPORT
from .quantize_page import page_of
from .quantize_result import QuantizeResult

_SERVED_BY_NONE = "no engine is known to read this folder, see the notes"
_MIB, _GIB = 1 << 20, 1 << 30


def summary(result: QuantizeResult) -> str:
    """The table that is printed at the end."""
    rows = [(name, value) for name, value in facts(result)]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    lines += [
        "",
        "size by kind of tensor (MiB)",
        *(f"  {name:<30}{before:>10.1f} -> {after:>8.1f}" for name, before, after in sizes(result)),
    ]
    lines += ["", "read on", f"  {REPORT}, report.json and README.md in {result.out}"]
    lines += ["", "serve it", *(f"  {line}" for line in commands(result) or [_SERVED_BY_NONE])]
    return "\n".join(lines)


def facts(result: QuantizeResult) -> list[tuple[str, str]]:
    """What there is to say, as names and values."""
    recipe = result.recipe
    rows = [
        ("model", result.model),
        ("written to", f"{result.out} ({recipe.layout}; {recipe.form(result.group_size)}; method {recipe.method}, effort {recipe.effort})"),
        ("linears", f"{len(result.modules)} quantized, {result.bits_per_weight:.2f} bits a weight; {len(result.kept)} left as they are"),
        (
            "read back",
            "every quantized tensor and the logits equal what was meant"
            if result.verified == 0
            else f"every quantized tensor equals what was meant; logits differ by {result.verified:.1g} of the largest at most",
        ),
    ]
    quality = result.quality
    if recipe.kv_cache is not None:
        measured = "quality is measured with such a cache" if quality.kv_cache is not None else "NOT in what is measured below"
        rows.append(("KV cache", f"scales for {recipe.kv_cache}, which the engine is told to use when it starts; {measured}"))
    rows += [
        ("measured on", f"{quality.num_tokens:,} tokens of {quality.text}, windows of {quality.seqlen}, by {quality.by}"),
        ("perplexity", f"{quality.original_perplexity:.4f} -> {quality.perplexity:.4f} ({quality.ppl_increase:+.2%})"),
        ("KL(original || quantized)", f"{quality.kl_mean:.4f} nats a token"),
        ("top-1 agreement", f"{quality.top1_agreement_percent:.2f} %"),
    ]
    if recipe.max_ppl_increase is not None or recipe.max_kl is not None:
        rows.append(("quality gate", f"DOES NOT HOLD: {result.gate}" if result.gate else "holds"))
    before, after = result.speed_before, result.speed_after
    if before is not None and after is not None:
        rows.append(
            (
                "tokens/s on this machine",
                f"alone {before.alone:.1f} -> {after.alone:.1f}, "
                f"{before.num_together} together {before.together:.1f} -> {after.together:.1f}",
            )
        )
    rows.append(
        ("time", ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items() if seconds >= 0.5) or "under a second")
    )
    rows.append(("peak memory", f"{result.peak_bytes / _GIB:.2f} GiB (estimated: {result.estimated_peak_bytes / _GIB:.2f})"))
    rows.append(("computed on", result.device + (f", {result.device_peak_bytes / _GIB:.2f} GiB of it" if result.device_peak_bytes else "")))
    if result.kept:
        rows.append(("left as they are", _listed(result.kept)))
    rows += [("note", note) for note in result.notes]
    return rows


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def sizes(result: QuantizeResult) -> list[tuple[str, float, float]]:
    """Kinds of tensors, with their MiB before and after."""
    rows = [(name, size["before"] / _MIB, size["after"] / _MIB) for name, size in result.groups.items()]
    return [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def commands(result: QuantizeResult) -> list[str]:
    """Commands that serve the folder, of engines that read it."""
    cache = "" if result.recipe.kv_cache is None else " --kv-cache-dtype fp8_e4m3"  # by that name in all three
    if_known = "" if "octavo" in result.engines else "  # if it has this architecture"
    known = {
        "octavo": f"octavo serve --model-path {result.out}{cache}",
        "vllm": f"vllm serve {result.out}{cache}{if_known}",
        "sglang": f"python -m sglang.launch_server --model-path {result.out}{cache}{if_known}",
    }
    return [command for engine, command in known.items() if engine in result.engines]


def write_reports(result: QuantizeResult, folder: Path, report: Path | None = None) -> None:
    """report.json, the HTML report (at `report`, or in `folder` too) and the model card. Raises OSError."""
    page = report or folder / REPORT
    data = folder / "report.json"
    card = folder / "README.md"
    data.write_text(to_json(result, folder) + "\n", encoding="utf-8")
    page.write_text(page_of(result, facts(result), sizes(result), commands(result)), encoding="utf-8")
    card.write_text(model_card(result), encoding="utf-8")


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def to_json(result: QuantizeResult, folder: Path) -> str:
    """All of a result as a JSON object, format 1, with the SHA-256 of the weight files that were verified, in `folder`."""
    content: dict[str, Any] = {
        "format": 1,
        "octavo": __version__,
        **asdict(result),
        "out": str(result.out),
        "recipe": result.recipe.to_dict(),
    }
    content["sha256"] = {file.name: _digest(file) for file in sorted(folder.glob("*.safetensors"))}
    if result.quality is not None:
        content["quality"]["ppl_increase"] = result.quality.ppl_increase
    return json.dumps(content, indent=1)


def model_card(result: QuantizeResult) -> str:
    """A README for the folder."""
    public = replace(result, model=Path(result.model).name, out=Path())  # others have other folders
    table = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in facts(public))
    serve = f"```\n{chr(10).join(lines)}\n```" if (lines := commands(public)) else f"Serving: {_SERVED_BY_NONE}."
    asked = result.recipe.to_dict()
    file = result.recipe.calibration_file()
    recipe = json.dumps({**asked, "calibration": file.name} if file is not None else asked, indent=1)
    return (
        f"---\nlibrary_name: transformers\ntags:\n- quantized\n- {result.recipe.layout}\n- octavo\n---\n\n"
        f"# {Path(result.model).name}, quantized\n\nMade by `octavo quantize`.\n\n| | |\n|---|---|\n{table}\n"
        f"{serve}\n\nThe recipe, from which `octavo.quantize(model, out, recipe={{...}})` makes the same again:\n\n```json\n{recipe}\n```\n"
    )
