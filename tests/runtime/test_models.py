"""The Llama family against transformers: the same logits for every position, whatever the chunks, the pages and the neighbours.

Tiny random models are saved with transformers; every parameter is random, norms and biases included, so that none can go missing
unnoticed. The driver below stands in for the scheduler: it deals out shuffled pages and cuts sequences into steps itself.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.batch import Batch, BatchRow
from octavo.runtime.config import EngineConfig
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.models.config import FAMILIES, ModelConfig, UnsupportedModel
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
    config = getattr(transformers, case.config_class)(**{**TINY, **case.options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    return cast(cast(model, getattr(torch, case.dtype)), torch.float32)


def save_model(model: Any, folder: Path, dtype: str = "float32", **options: Any) -> Path:
    cast(model, getattr(torch, dtype)).save_pretrained(folder, **options)
    cast(model, torch.float32)
    return folder


def load(folder: Path, *, page_size: int = 16, **options: Any) -> ModelRunner:
    config = EngineConfig(
        model_path=str(folder),
        device="cpu",
        page_size=page_size,
        max_total_tokens=POOL_TOKENS,
        max_running_requests=8,
        chunked_prefill_size=256,
        num_threads=2,
        **options,
    )
    return ModelRunner(config.resolve(device="cpu"), resolve_model(str(folder)), show_progress=False)


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
        assert out.shape == (len(owners), VOCAB)
        assert out.dtype == torch.float32
        for number, row in zip(owners, out, strict=True):
            logits[number].append(row.clone())
        for row in rows:
            row.request.num_computed += row.count
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


# --- the same logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_in_float32(name: str, tmp_path: Path) -> None:
    model = make_model(CASES[name])
    folder = save_model(model, tmp_path)
    for page_size in (1, 16, 64):
        assert_same_logits(load(folder, page_size=page_size), model)


def test_a_prompt_alone_has_the_bits_it_has_among_others(tmp_path: Path) -> None:
    model = make_model(CASES["llama"])
    runner = load(save_model(model, tmp_path))
    alone = [run(runner, [item])[0] for item in MIXED]
    for found, item in zip(alone, MIXED, strict=True):
        assert_close(found, expected_logits(model, item.tokens), 3e-5)


def test_dynamic_rope_beyond_the_original_context_is_that_of_decoding_token_by_token(tmp_path: Path) -> None:
    original, length = 32, 80
    case = llama(max_position_embeddings=original, rope_parameters={**THETA, "rope_type": "dynamic", "factor": 3.0})
    model = make_model(case)
    runner = load(save_model(model, tmp_path))
    assert runner.context_length == 3 * original
    tokens = sequence(length, chunk=1, decode=0).tokens
    cache = transformers.DynamicCache(config=model.config)
    steps = []
    with torch.no_grad():
        for token in tokens:
            steps.append(model(torch.tensor([[token]]), cache=cache, use_cache=True).logits[0, -1])
    chunks = (1, 7, 64, length)
    for found in run(runner, [OneSequence(tokens, length, chunk) for chunk in chunks] + [OneSequence(tokens, 20, 20)]):
        assert_close(found, torch.stack(steps), 3e-5)


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "llama-biases"), ("bfloat16", "qwen3"), ("float16", "qwen2")])
def test_half_precision_errs_no_more_than_twice_transformers(dtype: str, name: str, tmp_path: Path) -> None:
    """Against float32 on the same (rounded) weights. Activations here are float32, keys and values in the weights' dtype."""
    model = make_model(replace(CASES[name], dtype=dtype))
    folder = save_model(model, tmp_path, dtype)
    runner = load(folder)
    assert runner.dtype == runner.pool.dtype == getattr(torch, dtype)
    expected = [expected_logits(model, item.tokens) for item in MIXED]
    cast(model, getattr(torch, dtype))
    theirs = [(expected_logits(model, item.tokens) - right).abs() for item, right in zip(MIXED, expected, strict=True)]
    ours = [(found - right).abs() for found, right in zip(run(runner, MIXED), expected, strict=True)]
    assert torch.cat(ours).mean() <= 2 * torch.cat(theirs).mean()
    assert torch.cat(ours).max() <= 2 * torch.cat(theirs).max()


def test_a_dtype_that_was_asked_for_replaces_the_stored_one(tmp_path: Path) -> None:
    model = make_model(replace(CASES["llama"], dtype="float16"))
    runner = load(save_model(model, tmp_path, "float16"), dtype="float32")
    assert runner.dtype == torch.float32
    assert_same_logits(runner, model)


def test_sharded_safetensors_load_the_same(tmp_path: Path) -> None:
    model = make_model(CASES["llama-biases"])
    folder = save_model(model, tmp_path, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_same_logits(load(folder), model)


# --- configs as they are found ----------------------------------------------------------------------------------------


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 4 wrote rope_theta, rope_scaling and torch_dtype, and no layer types."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    return config


@pytest.mark.parametrize("name", ["rope-default", "rope-llama3", "rope-yarn", "qwen2-window", "qwen2-window-off", "mistral-window"])
def test_configs_in_the_old_spelling_mean_the_same(name: str, tmp_path: Path) -> None:
    model = make_model(CASES[name])
    if name.startswith("qwen2-window"):
        model.config.sliding_window = 13  # transformers 5 clears it when it is off; version 4 wrote it all the same
    folder = save_model(model, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(old_spelling(json.loads(path.read_text()))))
    assert_same_logits(load(folder), model)


def test_a_yarn_config_without_a_factor_takes_the_ratio_of_the_contexts(tmp_path: Path) -> None:
    model = make_model(roped(**YARN))
    folder = save_model(model, tmp_path)
    edit_config(folder, rope_parameters={**THETA, **YARN, "factor": None})
    assert_same_logits(load(folder), model)  # 512 positions of an original 128 are a factor of 4


def test_the_original_context_of_dynamic_scaling_is_the_models_own(tmp_path: Path) -> None:
    """transformers takes max_position_embeddings, whatever else the scaling says."""
    model = make_model(CASES["rope-dynamic-within"])
    folder = save_model(model, tmp_path)
    rope = {**THETA, "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
    assert_same_logits(load(edit_config(folder, rope_parameters=rope)), model)


@pytest.mark.parametrize("config_class", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config"])
def test_keys_that_a_config_leaves_out_have_the_familys_defaults(config_class: str) -> None:
    theirs = getattr(transformers, config_class)()
    architecture = config_class.replace("Config", "ForCausalLM")
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ours = ModelConfig.from_hf({"architectures": [architecture], **{key: getattr(theirs, key) for key in counts}})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_windows[0] == (theirs.sliding_window if config_class == "MistralConfig" else None)


def test_qwen_windows_begin_where_transformers_begins_them_when_nothing_is_said() -> None:
    options = {"use_sliding_window": True, "num_hidden_layers": 30}
    theirs = transformers.Qwen2Config(**options)
    counts = {key: getattr(theirs, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    ours = ModelConfig.from_hf({"architectures": ["Qwen2ForCausalLM"], **counts, **options})
    windows = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types)
    assert ours.sliding_windows == windows
    assert set(windows) == {None, 4096}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(make_model(CASES["llama"]), tmp_path)


def test_an_architecture_that_is_not_implemented_lists_those_that_are(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="GPTNeoXForCausalLM is not supported") as error:
        load(edit_config(folder, architectures=["GPTNeoXForCausalLM"]))
    assert all(name in str(error.value) for name in FAMILIES)
    with pytest.raises(UnsupportedModel, match=r"none \(model_type 'llama'\)"):
        load(edit_config(folder, architectures=None))


def test_a_rope_type_that_is_not_implemented_lists_those_that_are(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'longrope' is not supported; supported are default, linear, dynamic, llama3, yarn"):
        load(edit_config(folder, rope_parameters={**THETA, "rope_type": "longrope"}))


@pytest.mark.parametrize(
    ("rope", "missing"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "dynamic"}, "factor"),
        ({key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}, "low_freq_factor"),
        ({**LLAMA3, "factor": "eight"}, "factor"),
    ],
)
def test_a_rope_scaling_that_lacks_a_number_names_it(folder: Path, rope: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=rf"rope scaling '{rope['rope_type']}' needs a number '{missing}' above 0"):
        load(edit_config(folder, rope_parameters={**THETA, **rope}))


def test_another_activation_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="hidden_act 'gelu' is not supported: the Llama family uses silu"):
        load(edit_config(folder, hidden_act="gelu"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", None, "hidden_size=None in the model's config must be a whole number"),
        ("num_hidden_layers", 0, "num_hidden_layers=0"),
        ("num_attention_heads", "4", "num_attention_heads='4'"),
        ("num_key_value_heads", 3, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ],
)
def test_a_damaged_config_names_the_key_and_the_value(folder: Path, key: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(edit_config(folder, **{key: value}))


def test_a_tensor_of_another_shape_names_both_shapes(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'model.layers.0.mlp.gate_proj.weight' .* has shape \(88, 64\), the config asks for \(90, 64\)"
    ):
        load(edit_config(folder, intermediate_size=90))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def test_a_missing_tensor_is_named_with_its_like(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match=rf"no tensor '{name}' .* there is model.layers.0.self_attn.k_proj.weight"):
        load(rewrite(folder, lambda tensors: tensors.pop(name)))


def test_a_config_with_more_layers_than_the_weights_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.2.input_layernorm.weight'"):
        load(edit_config(folder, num_hidden_layers=3))


def test_integer_weights_are_refused_and_not_rounded(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=rf"'{name}' holds torch.int8, where a dense model has floating point"):
        load(rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})))


def test_tensors_that_nobody_reads_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="octavo.runtime"):
        load(folder)
        assert not caplog.records
        load(rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})))
    assert "1 tensors of the checkpoint are not used, the first is model.layers.0.self_attn.q_proj.bias" in caplog.text


def test_a_context_beyond_the_models_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--context-length 513 is beyond the model's 512 positions: give at most 512"):
        load(folder, context_length=513)
    assert load(folder, context_length=100).context_length == 100
