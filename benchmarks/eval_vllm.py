"""Perplexity of a checkpoint by vLLM, over the same windows as `octavo eval`: an independent figure to hold ours against.

    python benchmarks/eval_vllm.py MODEL --text FILE [--seqlen 1024] [--max-windows 4] [--dtype bfloat16]

Wants vLLM alone, in an environment of its own.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    from vllm import LLM, SamplingParams

    engine = LLM(given.model, dtype=given.dtype, max_model_len=given.seqlen + 8, enforce_eager=True, enable_prefix_caching=False)
    tokens = engine.get_tokenizer()(given.text.read_text(encoding="utf-8"))["input_ids"]
    starts = range(0, min(len(tokens), given.seqlen * given.max_windows), given.seqlen)
    windows = [window for start in starts if len(window := tokens[start : start + given.seqlen]) > 1]
    answers = engine.generate(
        [{"prompt_token_ids": window} for window in windows], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    )
    nll, count = 0.0, 0
    for window, answer in zip(windows, answers, strict=True):
        for token, found in zip(window[1:], answer.prompt_logprobs[1:], strict=True):
            nll -= found[token].logprob
            count += 1
    print(f"perplexity {math.exp(nll / count):.4f} over {count} tokens")


if __name__ == "__main__":
    main()
