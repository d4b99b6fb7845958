"""What quantized folders cost, side by side: perplexity on one text, KL on others, against one original, by one evaluator.

python benchmarks/quality/compare.py off-grid MODEL OUT [--seed N]       the same function, its weights on no grid
python benchmarks/quality/compare.py measure ORIGINAL --text FILE [--other FILE ...] --json FILE NAME=FOLDER[:SECONDS] ...
python benchmarks/quality/compare.py plot OUT.png FILE.json ...          losses of perplexity by name, a dot a file

Folders may be of any tool: whatever Octavo loads. `off-grid` multiplies the inputs of linears by random factors from 0.7 to 1.4 and divides
what feeds them, so that a model that was quantized once does not look better than it is: a quantizer would find its old grid again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

_SPREAD = 0.35  # of the factors' logarithms


def off_grid(model: Path, out: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from octavo.calibration.float_model import FloatModel
    from octavo.calibration.plan import probe_inputs
    from octavo.calibration.walk import structure_of
    from octavo.quant.checkpoint.open_reader import open_reader
    from octavo.quant.checkpoint.resolve import resolve_model

    reader = open_reader(resolve_model(str(model)))
    floats = FloatModel(AutoConfig.from_pretrained(model), reader)
    floats.load_outer()
    inputs = probe_inputs(floats)
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: reader.read(name) for name in reader.tensors()}
    for index in range(len(floats.blocks)):
        block = floats.load_block(index)
        for fold in structure_of(floats, inputs, index, block, with_folds=True).folds:
            fold.apply(block, torch.exp(torch.empty(fold.num_factors).uniform_(-_SPREAD, _SPREAD, generator=draw)))
        changed = {floats.block_prefix(index) + name: value.data for name, value in block.named_parameters()}
        for name, value in floats.names.restore(floats.module, changed).items():
            tensors[name] = value.to(tensors[name].dtype).contiguous()
        floats.free_block(index)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
            shutil.copy2(file, out / file.name)


def measure(original: str, text: Path, others: list[Path], windows: int, folders: list[str]) -> dict[str, Any]:
    from octavo import evaluate

    rows = []
    for entry in folders:
        name, _, rest = entry.partition("=")
        folder, _, seconds = rest.partition(":")
        found = evaluate(folder, reference=original, text=text, max_windows=windows)
        row: dict[str, Any] = {
            "name": name,
            "seconds": float(seconds) if seconds else None,
            "perplexity": found.perplexity,
            "original": found.reference_perplexity,
            "loss": found.perplexity - (found.reference_perplexity or math.nan),
            "kl": {text.name: found.kl_mean},
        }
        for other in others:
            row["kl"][other.name] = evaluate(folder, reference=original, text=other, max_windows=windows).kl_mean
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"original": original, "text": text.name, "windows": windows, "rows": rows}


def plot(out: Path, files: list[Path]) -> None:
    from matplotlib.figure import Figure

    losses: dict[str, list[float]] = {}
    for file in files:
        for row in json.loads(file.read_text())["rows"]:
            losses.setdefault(row["name"], []).append(row["loss"])
    names = sorted(losses, key=lambda name: sum(losses[name]) / len(losses[name]))
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.2))
    axes = figure.subplots()
    for at, name in enumerate(names):
        axes.barh(at, sum(losses[name]) / len(losses[name]), color="#9bb7d4")
        axes.plot(losses[name], [at] * len(losses[name]), "k.", markersize=5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("perplexity above the original's")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("off-grid")
    one.add_argument("model", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--seed", type=int, default=0)
    one = commands.add_parser("measure")
    one.add_argument("original")
    one.add_argument("folders", nargs="+", metavar="NAME=FOLDER[:SECONDS]")
    one.add_argument("--text", type=Path, required=True)
    one.add_argument("--other", type=Path, action="append", default=[])
    one.add_argument("--windows", type=int, default=60)
    one.add_argument("--json", type=Path, required=True)
    one = commands.add_parser("plot")
    one.add_argument("out", type=Path)
    one.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "off-grid":
        off_grid(args.model, args.out, args.seed)
    elif args.command == "measure":
        args.json.write_text(json.dumps(measure(args.original, args.text, args.other, args.windows, args.folders), indent=1) + "\n")
    else:
        plot(args.out, args.files)


if __name__ == "__main__":
    main()
