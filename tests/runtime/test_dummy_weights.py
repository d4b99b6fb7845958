"""--load-format dummy: models of a config alone, in every format, that load, compute and stay finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.config import EngineConfig
from octavo.runtime.core import EngineCore
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.sampling_params import SamplingParams

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16", "attention_bias": True,
}  # fmt: skip
CT = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": False},
        },
    },
}  # fmt: skip
FORMATS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "fp8 while loading": (None, {"quantization": "fp8"}),
    "int4 while loading": (None, {"quantization": "int4"}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, {}),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}, {}),
    "gptq 3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": True, "desc_act": True}, {}),
    "gptq asymmetric": ({"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": False, "desc_act": False}, {}),
    "fp8 blocks": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, {}),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, {}),
    "compressed-tensors": (CT, {}),
}


def config_folder(path: Path, quantization: dict[str, Any] | None, **changes: Any) -> Path:
    config = {**LLAMA, **changes}
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    return path


def config_of(folder: Path, **options: Any) -> EngineConfig:
    sizes = {"max_total_tokens": 512, "max_running_requests": 4, "chunked_prefill_size": 64}
    return EngineConfig(model_path=str(folder), load_format="dummy", device="cpu", **sizes, **options).resolve(device="cpu")


def load(folder: Path, **options: Any) -> ModelRunner:
    return ModelRunner(config_of(folder, **options), resolve_model(str(folder), needs_weights=False), show_progress=False)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_and_computes(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantization, options = FORMATS[name]
    runner = load(config_folder(tmp_path, quantization), **options)
    core = EngineCore(config_of(tmp_path, **options), runner)
    core.add("one", list(range(100)), SamplingParams(max_tokens=4, temperature=0.0, logprobs=1))
    found = []
    while core.has_work:
        found += [logprob for output in core.step() for logprob in output.logprobs]
    assert len(found) == 4
    assert all(logprob.logprob < 0 for logprob in found)
    weight = runner.model.layers[1].down.rows(torch.arange(256)).float()
    assert weight.shape == (256, 512)
    assert 0.01 < float(weight.std()) < 0.04
    assert abs(float(weight.mean())) < 0.005  # integer codes reach further down than up
    assert "zero points" not in caplog.text, "symmetric formats get symmetric weights"


def test_it_is_the_same_model_every_time_and_a_tied_head_is_tied(tmp_path: Path) -> None:
    config_folder(tmp_path, None, tie_word_embeddings=True)
    first, second = load(tmp_path), load(tmp_path)
    assert first.model.head is first.model.embedding
    rows = torch.arange(300)
    assert torch.equal(first.model.embedding.rows(rows), second.model.embedding.rows(rows))


def test_what_has_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve_model(str(tmp_path), needs_weights=False)
    with pytest.raises(ValueError, match=r"--load-format dummy makes weights out of a config\.json"):
        EngineConfig(load_format="dummy")
    with pytest.raises(ValueError, match=r"--load-format 'dumy' is not valid: give auto or dummy"):
        EngineConfig(model_path="x", load_format="dumy")  # type: ignore[arg-type]


def test_flags_for_gpus_are_said_to_have_no_effect_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = config_folder(tmp_path, None)
    with caplog.at_level("INFO"):
        load(folder, cuda_graph_max_bs=4, disable_overlap_schedule=True)
    assert "no effect on the CPU: --cuda-graph-max-bs 4, --disable-overlap-schedule" in caplog.text
