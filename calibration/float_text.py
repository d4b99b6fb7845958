"""Text drawn from the float model: by Octavo's Engine where it serves the architecture, else by transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .self_text import TEMPERATURE, Generate

if TYPE_CHECKING:
    from octavo import Engine

logger = logging.getLogger(__name__)

_BATCH = 32
_POOL_BYTES = 1 << 30  # of keys and values, at most
_PROMPT_TOKENS = 128  # room for them


def batch_of(config: Any, seqlen: int) -> int:
    """How many texts of `seqlen` tokens are drawn at once, by what keys and values of them take. `config` is transformers'."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // max(1, getattr(text, "num_attention_heads", 1))
    per_text = (seqlen + _PROMPT_TOKENS) * 2 * text.num_hidden_layers * heads * width * 2
    return int(max(1, min(_BATCH, _POOL_BYTES // max(1, per_text))))


def served(model_path: str | None) -> bool:
    """Whether Octavo's Engine serves this architecture."""
    from octavo import Engine

    try:
        Engine.inspect(model_path)
    except ValueError:
        return False
    return True


@contextmanager
def drawing(model_path: str | None, root: str, seqlen: int, batch: int, device: torch.device) -> Iterator[Generate]:
    """A Generate of the model, which is in memory inside, for `batch` texts of up to about `seqlen` tokens at a time."""
    engine = _engine(model_path, batch, batch * (seqlen + _PROMPT_TOKENS), device) if served(model_path) else None
    if engine is None:
        yield _by_transformers(root, device)
        return
    with engine:

        def generate(prompts: Sequence[Sequence[int]], count: int, seed: int) -> Sequence[Sequence[int]]:
            params = [{"max_new_tokens": count, "temperature": TEMPERATURE, "sampling_seed": seed + i} for i in range(len(prompts))]
            return [
                result["output_ids"] for result in engine.generate(input_ids=[list(prompt) for prompt in prompts], sampling_params=params)
            ]

        yield generate


def _engine(model_path: str | None, batch: int, max_total_tokens: int, device: torch.device) -> Engine | None:
    """None where a config of a known architecture lies beside weights that the Engine does not know."""
    from octavo import Engine

    options: dict[str, Any] = {"max_running_requests": batch, "max_total_tokens": max_total_tokens, "device": device.type}
    try:
        return Engine(model_path, show_progress=False, num_threads=torch.get_num_threads(), **options)
    except ValueError as error:
        logger.warning("Octavo's engine does not read this model (%s): transformers writes the calibration text", error)
        return None


def _by_transformers(root: str, device: torch.device) -> Generate:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype="auto", trust_remote_code=False).eval().to(device)
    given = model.generation_config
    # What else its makers advise, such as penalties, would bend what it writes.
    model.generation_config = GenerationConfig(eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id, use_cache=given.use_cache)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def generate(prompts: Sequence[Sequence[int]], count: int, seed: int) -> Sequence[Sequence[int]]:
        torch.manual_seed(seed)
        answers = []
        for prompt in prompts:  # one at a time: padding is not every architecture's to read
            begun = list(prompt) if context is None else list(prompt[: context // 2])
            prefix = torch.tensor([begun], device=device)
            room = count if context is None else min(count, context - len(begun))
            drawn = model.generate(prefix, max_new_tokens=room, do_sample=True, temperature=TEMPERATURE, top_p=1.0, top_k=0)
            answers.append(drawn[0, len(begun) :].tolist())
        return answers

    return generate
