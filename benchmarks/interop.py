"""Round-to-nearest checkpoints of a dense model in every common format, and prompt log-probabilities of two engines side by side.

python benchmarks/interop.py write DENSE_MODEL OUT          OUT/awq, gptq, ct-int4, ct-int4-sym, ct-int8, ct-fp8
python benchmarks/interop.py score MODEL --json FILE        with Octavo's Engine
python benchmarks/interop.py score-url URL MODEL --json FILE    with a server that answers `prompt_logprobs` (vLLM's)
python benchmarks/interop.py compare FILE FILE
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. Both cities lie on rivers: the Seine and the Tiber.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "In the beginning the universe was hot and dense. It expanded and cooled, and matter gathered into stars and galaxies.",
    "A recipe for bread needs flour, water, salt and yeast; knead the dough, let it rise, and bake it until the crust is brown.",
)
GROUP_SIZE = 64


def write(model: Path, out: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from octavo.calibration import writers
    from octavo.kernels.grouped_linear import GroupedWeight
    from octavo.quant.schemes import load_time

    def int4(weight: torch.Tensor) -> GroupedWeight:
        return load_time.quantize_int4(weight.float(), GROUP_SIZE, lowest_zero=1)  # GPTQ cannot hold 0

    def symmetric(weight: torch.Tensor) -> GroupedWeight:
        groups = weight.float().reshape(weight.shape[0], -1, GROUP_SIZE)
        scale = (groups.abs().amax(2) / 7.5).clamp_min(1e-6).to(torch.float16)
        codes = (torch.round(groups / scale.float()[..., None]) + 8).clamp(0, 15).flatten(1).to(torch.uint8)
        return GroupedWeight(codes, 4, GROUP_SIZE, scale, zero=8)

    formats: dict[str, tuple[Callable[[torch.Tensor], GroupedWeight], Callable[[GroupedWeight], dict[str, torch.Tensor]], Any]] = {
        "awq": (int4, writers.awq_tensors, lambda w: writers.awq_config(GROUP_SIZE)),
        "gptq": (symmetric, writers.gptq_tensors, lambda w: writers.gptq_config(4, GROUP_SIZE, symmetric=True)),
        "gptq-asym": (int4, writers.gptq_tensors, lambda w: writers.gptq_config(4, GROUP_SIZE, symmetric=False)),
        "ct-int4": (int4, writers.compressed_tensors, writers.compressed_config),
        "ct-int4-sym": (symmetric, writers.compressed_tensors, writers.compressed_config),
        "ct-int8": (lambda w: load_time.quantize_int8(w.float()), writers.compressed_tensors, writers.compressed_config),
        "ct-fp8": (lambda w: load_time.quantize_fp8(w.float()), writers.compressed_tensors, writers.compressed_config),
    }
    for name, (quantize, pack, config_of) in formats.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        last: GroupedWeight | None = None
        for shard in sorted(model.glob("*.safetensors")):
            with safe_open(shard, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    value = file.get_tensor(key)
                    if value.ndim == 2 and key.startswith("model.layers."):
                        last = quantize(value)
                        module = key.removesuffix(".weight")
                        tensors |= {f"{module}.{part}": tensor for part, tensor in pack(last).items()}
                    else:
                        tensors[key] = value.to(torch.float16) if name in ("awq", "gptq", "gptq-asym") else value
        assert last is not None
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = config_of(last)
        if name in ("awq", "gptq", "gptq-asym"):
            config["torch_dtype"] = config["dtype"] = "float16"
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for file in model.iterdir():
            if file.suffix not in (".safetensors",) and file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy(file, folder)
        print(f"{folder}: {sum(t.nbytes for t in tensors.values()) / 2**20:.1f} MiB")


def score(model: str, dtype: str) -> list[list[float]]:
    from octavo import Engine

    with Engine(model_path=model, dtype=dtype, max_total_tokens=4096) as engine:
        print(json.dumps(engine.get_server_info()["quantization"]["layers"][1:3], indent=1), file=sys.stderr)
        found = []
        for text in TEXTS:
            ids = engine.tokenizer.encode(text)
            found.append(engine.score(ids[:1], [ids[1:]])[0])
    return found


def score_url(url: str, model: str) -> list[list[float]]:
    import httpx

    found = []
    for text in TEXTS:
        body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status().json()
        entries = answer["choices"][0]["prompt_logprobs"]
        found.append([next(iter(entry.values()))["logprob"] for entry in entries if entry])
    return found


def compare(first: Path, second: Path) -> None:
    import torch

    a, b = (json.loads(path.read_text()) for path in (first, second))
    x, y = (torch.tensor([value for row in rows for value in row]) for rows in (a, b))
    difference = (x - y).abs()
    print(f"{first.name} v {second.name}: {x.numel()} tokens, mean {x.mean():.4f} v {y.mean():.4f}, ", end="")
    print(f"|difference| mean {difference.mean():.4f}, max {difference.max():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("write")
    one.add_argument("model", type=Path)
    one.add_argument("out", type=Path)
    two = commands.add_parser("score")
    two.add_argument("model")
    two.add_argument("--dtype", default="bfloat16")
    two.add_argument("--json", type=Path, required=True)
    three = commands.add_parser("score-url")
    three.add_argument("url")
    three.add_argument("model")
    three.add_argument("--json", type=Path, required=True)
    four = commands.add_parser("compare")
    four.add_argument("files", type=Path, nargs=2)
    given = parser.parse_args()
    if given.command == "write":
        write(given.model, given.out)
    elif given.command == "compare":
        compare(*given.files)
    else:
        rows = score(given.model, given.dtype) if given.command == "score" else score_url(given.url, given.model)
        given.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
