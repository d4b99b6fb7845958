"""Proves that a quantized KV cache gives nearly the answers of a plain one, the same however scheduled; and which scales it uses.

The models are tiny and random; what a page holds is proved in tests/kernels.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.config import EngineConfig
from octavo.runtime.core import EngineCore
from octavo.runtime.kv_pool import KVPool, kv_bytes_per_token
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.sampling_params import SamplingParams

VOCAB, LAYERS, KV_HEADS, DIM = 131, 3, 2, 16
KINDS = ("int8", "fp8_e4m3", "fp8_e5m2")
ATTENTION = "model.layers.{}.self_attn."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> EngineCore:
    sizes = {"max_total_tokens": 2048, "max_running_requests": 16, "chunked_prefill_size": 256, "random_seed": 0}
    config = EngineConfig(device="cpu", **{**sizes, **options}).resolve(device="cpu")
    return EngineCore(config, ModelRunner(config, resolve_model(str(folder)), show_progress=False))


def with_tensors(model: Path, folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """A copy of the model with more tensors and more of a config."""
    save_file({**load_file(model / "model.safetensors"), **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**json.loads((model / "config.json").read_text()), **config}))
    return folder


def scales_of_layers(k_name: str, v_name: str, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    names = ((ATTENTION.format(layer) + name, value) for layer in range(LAYERS) for name, value in ((k_name, k), (v_name, v)))
    return {name: value.clone() for name, value in names}


def prompts() -> list[list[int]]:
    generator = random.Random(0)
    shared = [generator.randrange(VOCAB) for _ in range(48)]
    return [
        (shared if index % 2 else []) + [generator.randrange(VOCAB) for _ in range(length)]
        for index, length in enumerate((5, 30, 17, 90, 1, 64))
    ]


def greedy(core: EngineCore) -> list[list[int]]:
    answers: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts()):
        core.add(str(index), prompt, SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True))
        answers[str(index)] = []
    while core.has_work:
        for output in core.step():
            answers[output.request_id] += output.token_ids
    return list(answers.values())


def logprobs(core: EngineCore) -> torch.Tensor:
    """Of every token of every prompt, in chunks: later ones attend to keys and values from the pages."""
    found: dict[str, list[float]] = {}
    for index, prompt in enumerate(prompts()):
        core.add(str(index), prompt, SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=1))
    while core.has_work:
        for output in core.step():
            found.setdefault(output.request_id, []).extend(entry.logprob or 0.0 for entry in output.prompt_logprobs)
    return torch.tensor([value for index in range(len(prompts())) for value in found.get(str(index), [])])


# --- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mean", "most"), [("int8", 0.02, 0.1), ("fp8_e4m3", 0.08, 0.4), ("fp8_e5m2", 0.15, 0.8)])
def test_logprobs_stay_close_to_those_of_a_float32_cache(model: Path, kind: str, mean: float, most: float) -> None:
    exact, found = logprobs(load(model)), logprobs(load(model, kv_cache_dtype=kind))
    assert len(exact) > 200
    difference = (exact - found).abs()
    assert difference.max() > 0
    assert difference.mean() < mean
    assert difference.max() < most


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_cold_warm_and_in_chunks(model: Path, kind: str) -> None:
    core = load(model, kv_cache_dtype=kind)
    cold = greedy(core)
    before = core.scheduler.counters.cached_tokens
    assert greedy(core) == cold
    assert core.scheduler.counters.cached_tokens - before > 150
    for chunk in (1, 7, 64):
        assert greedy(load(model, kv_cache_dtype=kind, chunked_prefill_size=chunk)) == cold
    assert greedy(load(model, kv_cache_dtype=kind, disable_radix_cache=True, page_size=1)) == cold


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_a_plain_cache_may_have_a_dtype_of_its_own(model: Path, kind: str) -> None:
    core = load(model, kv_cache_dtype=kind)
    assert core.runner.pool.k_pages[0].dtype == getattr(torch, kind)
    assert core.runner.dtype == torch.float32
    assert (logprobs(core) - logprobs(load(model))).abs().max() < 0.05


# --- memory ------------------------------------------------------------------------------------------------------------


def test_a_token_of_codes_takes_its_codes_and_two_scales() -> None:
    shape = {"num_layers": 5, "num_kv_heads": 3, "head_dim": 64}
    assert kv_bytes_per_token(**shape, dtype=torch.bfloat16) == 2 * 5 * 3 * 128
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        assert kv_bytes_per_token(**shape, dtype=dtype) == 2 * 5 * 3 * 68
        pool = KVPool(num_pages=7, page_size=4, dtype=dtype, device=torch.device("cpu"), **shape)
        assert pool.nbytes == pool.num_tokens * kv_bytes_per_token(**shape, dtype=dtype)


def test_the_memory_table_names_the_caches_dtype(model: Path) -> None:
    runner = load(model, kv_cache_dtype="fp8").runner
    assert "(fp8_e4m3)" in runner.budget.table()
    assert runner.budget.kv_per_token == 2 * LAYERS * KV_HEADS * (DIM + 4)
    assert "(float32)" in load(model).runner.budget.table()


# --- static scales -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_scale", "v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("kv_scale", "kv_scale"),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (KV_HEADS,), (KV_HEADS, 1, 1)])
def test_scales_are_read_from_the_checkpoint(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, str], shape: tuple[int, ...]
) -> None:
    k, v = torch.linspace(0.01, 0.02, math.prod(shape)).view(shape), torch.linspace(0.03, 0.05, math.prod(shape)).view(shape)
    folder = with_tensors(model, tmp_path, scales_of_layers(*names, k, v))
    with caplog.at_level(logging.INFO, "octavo.runtime"):
        core = load(folder, kv_cache_dtype="fp8_e4m3")
    assert "KV cache: fp8_e4m3, static scales from the checkpoint" in caplog.messages
    assert not [message for message in caplog.messages if "not used" in message]
    assert (logprobs(core) - logprobs(load(model))).abs().mean() < 0.2
    for pages, scale in ((core.runner.pool.k_pages, v if names[0] == "kv_scale" else k), (core.runner.pool.v_pages, v)):
        # Pages that nobody wrote hold anything: the first page was taken by some prompt.
        stored = pages[0][:, :, 0, DIM:].contiguous().view(torch.float32)
        wanted = scale.flatten().expand(KV_HEADS)
        assert (stored[..., 0] == wanted).all(-1).sum() >= 10


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (
            {"k_scale": torch.tensor(0.0), "v_scale": torch.tensor(1.0)},
            "k_scale' holds 0: the scale of a KV cache must be a number above 0",
        ),
        ({"k_scale": torch.tensor(1.0), "v_scale": torch.tensor(math.nan)}, "v_scale' holds nan"),
        ({"k_scale": torch.tensor([1.0, -2.0]), "v_scale": torch.tensor(1.0)}, "k_scale' holds -2"),
        ({"k_scale": torch.tensor(1.0), "v_scale": torch.tensor(math.inf)}, "v_scale' holds inf"),
        ({"k_scale": torch.ones(3), "v_scale": torch.tensor(1.0)}, "one for each of 2 key-value heads"),
        ({"k_scale": torch.ones(1)}, "and no 'model.layers.0.self_attn.v_scale': keys and values need a scale each"),
    ],
)
def test_scales_that_cannot_be_are_refused(model: Path, tmp_path: Path, tensors: Mapping[str, torch.Tensor], text: str) -> None:
    folder = with_tensors(model, tmp_path, {ATTENTION.format(0) + name: value for name, value in tensors.items()})
    with pytest.raises(CheckpointError) as caught:
        load(folder, kv_cache_dtype="fp8_e5m2")
    assert text in str(caught.value)
    load(folder)  # nobody reads them for a plain cache


@pytest.mark.parametrize(
    ("kind", "made_for", "text"),
    [
        ("auto", None, None),
        ("fp8_e4m3", None, "static scales from the checkpoint"),
        ("fp8_e5m2", "float", "static scales from the checkpoint"),
        ("int8", None, "dynamic scale per token and head (the checkpoint's scales are for fp8_e4m3)"),
        ("int8", "float", "dynamic scale per token and head (the checkpoint's scales are for fp8_e4m3)"),
        ("int8", "int", "static scales from the checkpoint"),
        ("fp8_e4m3", "int", "dynamic scale per token and head (the checkpoint's scales are for int8)"),
    ],
)
def test_scales_are_used_for_the_codes_they_were_made_for(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, made_for: str | None, text: str | None
) -> None:
    scheme = {"num_bits": 8, "type": made_for, "strategy": "tensor", "dynamic": False, "symmetric": True}
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme}
    scales = scales_of_layers("k_scale", "v_scale", torch.tensor(0.02), torch.tensor(0.03))
    folder = with_tensors(model, tmp_path, scales, **({"quantization_config": quantization} if made_for else {}))
    with caplog.at_level(logging.INFO, "octavo.runtime"):
        load(folder, kv_cache_dtype=kind)
    lines = [message for message in caplog.messages if message.startswith("KV cache:")]
    assert lines == ([] if text is None else [f"KV cache: {kind}, {text}"])
    assert not [message for message in caplog.messages if "not used" in message]


def test_without_scales_they_are_dynamic_and_said_so(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "octavo.runtime"):
        load(model, kv_cache_dtype="fp8_e4m3")
    assert "KV cache: fp8_e4m3, dynamic scale per token and head (the checkpoint has none)" in caplog.messages
    some = {name: value for name, value in scales_of_layers("k_scale", "v_scale", *torch.ones(2)).items() if ".0." in name}
    with caplog.at_level(logging.INFO, "octavo.runtime"):
        load(with_tensors(model, tmp_path, some), kv_cache_dtype="fp8_e4m3")
    assert "KV cache: fp8_e4m3, static scales from the checkpoint in 1 of 3 layers" in caplog.messages[-3] + caplog.text


def test_a_static_scale_saturates(model: Path, tmp_path: Path) -> None:
    """A scale so small that everything is at the end of the range: the answer is another, and still numbers."""
    folder = with_tensors(model, tmp_path, scales_of_layers("k_scale", "v_scale", torch.tensor(1e-6), torch.tensor(1e-6)))
    found = logprobs(load(folder, kv_cache_dtype="fp8_e4m3"))
    assert found.isfinite().all()
    assert (found - logprobs(load(model))).abs().max() > 0.1
