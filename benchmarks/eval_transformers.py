"""Perplexity of a checkpoint by transformers, over the same windows as `octavo eval`: an independent figure to hold ours against.

    python benchmarks/eval_transformers.py MODEL --text FILE [--seqlen 1024] [--max-windows 4] [--dtype float32]

Reads what transformers reads; quantized folders of compressed-tensors want `pip install compressed-tensors accelerate`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import transformers


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval()
    tokens = tokenizer(given.text.read_text(encoding="utf-8"))["input_ids"]
    nll, count = 0.0, 0
    for start in range(0, min(len(tokens), given.seqlen * given.max_windows), given.seqlen):
        ids = torch.tensor([tokens[start : start + given.seqlen]])
        if ids.shape[1] < 2:
            break
        logits = model(ids).logits[0, :-1].float()
        nll += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    print(f"perplexity {math.exp(nll / count):.4f} over {count} tokens")


if __name__ == "__main__":
    main()
