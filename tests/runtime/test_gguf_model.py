"""Proves that the embedded GGUF model is read right: weights, logits and perplexity are those of transformers' own GGUF loader."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

from octavo.quant.checkpoint.hf_config import read_config
from octavo.quant.checkpoint.open_reader import open_reader
from octavo.quant.checkpoint.resolve import find_embedded_model, resolve_model
from octavo.runtime.config import EngineConfig
from octavo.runtime.core import EngineCore
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.tokenizer import Tokenizer, load_tokenizer

TEXT = """The kettle had been singing for some time before anyone noticed it. My grandmother put down her knitting, walked to the stove and
moved it aside, and then she stood at the window, looking out at the snow that had fallen during the night. It lay thick on the roofs
and on the branches of the old pear tree. Nobody had walked across the yard yet. "We will have to dig a path to the well," she said,
and went to find her boots."""
COMPARED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
)

pytestmark = pytest.mark.needs_embedded_model


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The model as transformers reads it. `from_pretrained` would want accelerate, so what it calls is called here."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = read_config(resolve_model(None))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    read = load_gguf_checkpoint(str(find_embedded_model()), return_tensors=True, model_to_load=model, torch_dtype=torch.float32)
    for key in COMPARED_KEYS:
        assert config[key] == pytest.approx(read["config"][key]), key
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embedding
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


def load(dtype: Any) -> EngineCore:
    config = EngineConfig(device="cpu", dtype=dtype, max_total_tokens=1024, max_running_requests=4).resolve(device="cpu")
    return EngineCore(config, ModelRunner(config, resolve_model(None), show_progress=False))


def score(core: EngineCore, tokens: list[int]) -> list[float]:
    """Log-probability of each token but the first, given those before it."""
    core.add("scored", tokens, SamplingParams(max_tokens=0, prompt_logprobs=0))
    outputs = [output for _ in iter(lambda: core.has_work, False) for output in core.step()]
    (reported,) = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
    assert [entry.token_id for entry in reported] == tokens
    return [entry.logprob for entry in reported[1:] if entry.logprob is not None]


def test_every_weight_has_the_value_transformers_gives_it(theirs: Any) -> None:
    state = theirs.state_dict()
    with open_reader(resolve_model(None)) as reader:
        assert {*reader.tensors(), "lm_head.weight"} == set(state)
        for name in reader.tensors():
            assert torch.equal(reader.read(name).float(), state[name]), name


def test_log_probabilities_and_perplexity_are_transformers_in_float32(theirs: Any, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    found = torch.tensor(score(load("float32"), tokens))
    with torch.inference_mode():
        logits = theirs(torch.tensor([tokens])).logits[0]
    expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-3
    perplexity = math.exp(-found.mean().item())
    assert 8 < perplexity < 60  # English that makes sense to it; a wrongly read model is in the thousands


def test_the_default_dtype_costs_no_perplexity_worth_naming(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    core = load("auto")
    assert core.runner.dtype == torch.bfloat16
    exact, rounded = (math.exp(-sum(scores) / len(scores)) for scores in (score(load("float32"), tokens), score(core, tokens)))
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_a_conversation_goes_through_the_template_and_ends_with_the_turn(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(prompt, skip_special_tokens=False) == tokenizer.render_chat(messages)
    core = load("auto")
    ends = frozenset(tokenizer.eos_token_ids)
    core.add("chat", prompt, SamplingParams(max_tokens=40, temperature=0.0), stop_token_ids=ends)
    outputs = [output for _ in iter(lambda: core.has_work, False) for output in core.step()]
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.type == "stop"
    assert outputs[-1].finish.matched == tokenizer.encode("<|im_end|>")[0]
    answer = tokenizer.decode([token for output in outputs for token in output.token_ids])
    assert "Paris" in answer
    assert "<|" not in answer
