"""Tiny random models, saved with transformers, and a driver that stands in for the scheduler, for the tests of the model code.

Every parameter is random, norms and biases included, so that none can go missing unnoticed. The driver deals out shuffled pages and
cuts sequences into steps itself.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.batch import Batch, BatchRow
from octavo.runtime.config import EngineConfig
from octavo.runtime.layers.parallel import TensorParallelGroup
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.pipeline import Pipeline
from octavo.runtime.request import Request
from octavo.runtime.sampling_params import SamplingParams

VOCAB = 131  # a multiple of nothing
POOL_TOKENS = 1024
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# The rest of a model's rotary table hardly turns with a base of 10000 in 100 positions; a small one makes every frequency count.
THETA = {"rope_theta": 100.0}


@dataclass(frozen=True)
class Case:
    """A model: the class of its transformers config, and what it sets beyond TINY."""

    config_class: str
    options: Mapping[str, Any]
    dtype: str = "float32"


def llama(**options: Any) -> Case:
    return Case("LlamaConfig", options)


def roped(**parameters: Any) -> Case:
    return llama(rope_parameters={**THETA, **parameters})


CASES = {
    "llama": llama(),
    "llama-every-head-its-own-keys": llama(num_key_value_heads=4, num_hidden_layers=4),
    "llama-one-key-head": llama(hidden_size=128, num_attention_heads=8, num_key_value_heads=1),
    "llama-three-to-one": llama(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3),
    "llama-head-dim-of-its-own": llama(head_dim=24),
    "llama-biases": llama(attention_bias=True, mlp_bias=True),
    "llama-attention-bias": llama(attention_bias=True),
    "llama-tied": llama(tie_word_embeddings=True),
    "rope-default": roped(rope_type="default"),
    "rope-linear": roped(rope_type="linear", factor=3.0),
    "rope-dynamic-within": roped(rope_type="dynamic", factor=2.0),
    "rope-llama3": roped(**LLAMA3),
    "rope-yarn": roped(**YARN),
    "rope-yarn-attention-factor": roped(**YARN, attention_factor=0.8),
    "rope-yarn-mscale": roped(**YARN, mscale=1.0, mscale_all_dim=0.5),
    "rope-yarn-betas": roped(**YARN, beta_fast=8, beta_slow=2),
    "rope-yarn-not-truncated": roped(**YARN, truncate=False),
    "mistral": Case("MistralConfig", {"sliding_window": None}),
    "mistral-window": Case("MistralConfig", {"sliding_window": 17}),
    "mistral-window-of-one": Case("MistralConfig", {"sliding_window": 1}),
    "mistral-head-dim": Case("MistralConfig", {"sliding_window": 32, "head_dim": 32}),
    "qwen2": Case("Qwen2Config", {}),
    "qwen2-window": Case("Qwen2Config", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1, "num_hidden_layers": 3}),
    "qwen2-window-off": Case("Qwen2Config", {"use_sliding_window": False, "sliding_window": 13, "max_window_layers": 0}),
    "qwen3": Case("Qwen3Config", {"head_dim": 32}),
    "qwen3-biases-tied": Case("Qwen3Config", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": Case("Qwen3Config", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
}


# --- models ----------------------------------------------------------------------------------------------------------


def tiny_llama(**changes: Any) -> Any:
    """A Llama of two layers with large weights, the same at every call."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms around 1, biases around 0, matrices that keep their input's size, with queries and keys large enough to look somewhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 1 + 0.3 * noise if "norm" in name else 0.3 * noise
        elif "embed_tokens" in name:
            value = noise
        else:
            value = noise * (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / parameter.shape[1] ** 0.5
        parameter.data.copy_(value)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Parameters alone: `model.to` would also round the rotary frequencies, which transformers keeps in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_model(case: Case, *, seed: int = 0) -> Any:
    """A transformers model in float32 whose weights are numbers of the case's dtype."""
    import transformers

    config = getattr(transformers, case.config_class)(**{**TINY, **case.options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    return cast(cast(model, getattr(torch, case.dtype)), torch.float32)


def save_model(model: Any, folder: Path, dtype: str = "float32", **options: Any) -> Path:
    cast(model, getattr(torch, dtype)).save_pretrained(folder, **options)
    cast(model, torch.float32)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One whose words are w0, w1, ...: for engines that are asked with token ids, and want a tokenizer."""
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def load(
    folder: Path, *, page_size: int = 16, group: TensorParallelGroup | None = None, pipeline: Pipeline | None = None, **options: Any
) -> ModelRunner:
    usual = {"max_total_tokens": POOL_TOKENS, "max_running_requests": 8, "chunked_prefill_size": 256, "num_threads": 2}
    config = EngineConfig(model_path=str(folder), device="cpu", page_size=page_size, **{**usual, **options})
    return ModelRunner(config.resolve(device="cpu"), resolve_model(str(folder)), group=group, pipeline=pipeline, show_progress=False)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@torch.no_grad()
def expected_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


# --- the driver ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneSequence:
    """`tokens`, of which `prompt_length` are computed in chunks of `chunk` and the rest one by one, as if they had been sampled."""

    tokens: tuple[int, ...]
    prompt_length: int
    chunk: int

    def count_from(self, start: int) -> int:
        return min(self.chunk, self.prompt_length - start) if start < self.prompt_length else 1


def sequence(length: int, *, chunk: int, decode: int = 6, seed: int = 0) -> OneSequence:
    generator = random.Random(seed * 1000 + length)
    return OneSequence(tuple(generator.randrange(VOCAB) for _ in range(length + decode)), length, chunk)


def run(runner: ModelRunner, sequences: Sequence[OneSequence]) -> list[torch.Tensor]:
    """Logits [len(tokens), vocab] of every sequence, all of them side by side: each step takes the next chunk of each."""
    page_size, pages = runner.pool.page_size, list(range(runner.pool.num_pages))
    random.Random(7).shuffle(pages)
    requests = []
    for number, item in enumerate(sequences):
        params = SamplingParams(prompt_logprobs=0)  # which asks for the logits of every prompt position
        count = -(-len(item.tokens) // page_size)
        own = array("i", [pages.pop() for _ in range(count)])
        tokens = list(item.tokens[: item.prompt_length])
        requests.append(Request(str(number), len(tokens), tokens, params, 99, frozenset(), pages=own))
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(request.num_computed < len(item.tokens) for request, item in zip(requests, sequences, strict=True)):
        rows, owners = [], []
        for number, (request, item) in enumerate(zip(requests, sequences, strict=True)):
            start = request.num_computed
            if start == len(item.tokens):
                continue
            if start >= item.prompt_length:
                request.tokens.append(item.tokens[start])
            count = item.count_from(start)
            samples = start + count == len(request.tokens)
            rows.append(BatchRow(request, start, count, samples))
            owners += [number] * (len(request.scored_positions(start, count)) + samples)
        out = runner.forward(Batch(tuple(rows)))
        assert out.shape == (len(owners), VOCAB) or runner.num_ranks > 1
        assert out.dtype == torch.float32
        for number, row in zip(owners, out, strict=True):
            logits[number].append(row.clone())
        for row in rows:
            row.request.num_computed += row.count
            row.request.num_launched += row.count
    return [torch.stack(rows) for rows in logits]


MIXED = (
    sequence(23, chunk=1),
    sequence(45, chunk=7),
    sequence(70, chunk=64),
    sequence(90, chunk=90),
    sequence(1, chunk=1, decode=30),
    sequence(16, chunk=16, decode=20),
)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal within `tolerance` of the spread of the logits."""
    assert found.shape == expected.shape
    error = ((found - expected).abs().max() / expected.std()).item()
    assert error < tolerance, f"error {error:.2e} of a standard deviation"


def assert_same_logits(runner: ModelRunner, model: Any, sequences: Sequence[OneSequence] = MIXED, tolerance: float = 3e-5) -> None:
    for item, found in zip(sequences, run(runner, sequences), strict=True):
        assert_close(found, expected_logits(model, item.tokens), tolerance)
