"""A model of 1.5 billion random weights: within 6 GiB of resident memory, killed at a random point, the same bytes after it went on."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from .conftest import _write_tokenizer

pytestmark = pytest.mark.long
LIMIT_BYTES = 6 << 30


def write_model(folder: Path) -> None:
    """A random Llama, block by block, so that the test itself needs little."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=22, num_attention_heads=16, num_key_value_heads=4
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    draw = torch.Generator().manual_seed(0)

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else (torch.randn(shape, generator=draw) * 0.02).bfloat16()
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        attention = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048)}
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}self_attn.{key}_proj.weight": shape for key, shape in attention.items()}
        mlp = {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}
        shapes |= {f"{prefix}mlp.{key}_proj.weight": shape for key, shape in mlp.items()}
        shapes |= {f"{prefix}{key}_layernorm.weight": (2048,) for key in ("input", "post_attention")}
        shard(f"model-{i:05}.safetensors", shapes)
    shard(
        "model-outer.safetensors",
        {"model.embed_tokens.weight": (32000, 2048), "lm_head.weight": (32000, 2048), "model.norm.weight": (2048,)},
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _write_tokenizer(folder, adds_bos=False, swapped=False)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def test_a_large_model(tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    write_model(model)
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    base = [sys.executable, "-m", "octavo", "quantize", "--model-path", str(model), "--calibration", str(text), "--method", "gptq"]
    base += ["--samples", "16", "--seqlen", "256", "--max-memory", "6GiB", "--skip-speed"]
    started = time.monotonic()
    subprocess.run([*base, "--out", str(tmp_path / "whole")], check=True)
    seconds = time.monotonic() - started
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["peak_bytes"] < LIMIT_BYTES

    process = subprocess.Popen([*base, "--out", str(tmp_path / "again")])
    time.sleep(random.uniform(0.1, 0.8) * seconds)
    process.kill()
    process.wait()
    subprocess.run([*base, "--out", str(tmp_path / "again"), "--resume"], check=True)
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")
