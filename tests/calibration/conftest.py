"""Tiny random Llamas with a byte-level tokenizer, saved as transformers saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from octavo.calibration import devices

BOS = 256
MakeModel = Callable[..., tuple[Path, Any]]


def _write_tokenizer(folder: Path, *, adds_bos: bool, swapped: bool) -> None:
    """A token a byte. `swapped` numbers them backwards."""
    alphabet = sorted(ByteLevel.alphabet(), reverse=swapped)
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<s>"])
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every machine; test_quick_products.py and what runs in processes of its own multiply as the machine does best."""
    monkeypatch.setattr(devices, "has_quick_halves", lambda device: False)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes a model: its folder, and the same model of transformers in float64. Equal seeds give equal weights."""

    def make(
        seed: int = 0, *, vocab_size: int = 263, context: int = 512, adds_bos: bool = False, swapped: bool = False
    ) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            initializer_range=0.2,
            bos_token_id=BOS,
        )
        model = transformers.LlamaForCausalLM(config).eval()
        model.save_pretrained(folder)
        _write_tokenizer(folder, adds_bos=adds_bos, swapped=swapped)
        return folder, model.double()

    return make


@pytest.fixture(scope="session")
def tiny(make_model: MakeModel) -> tuple[Path, Any]:
    return make_model()


@pytest.fixture(scope="session")
def without_weights(tiny: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose weights cannot be loaded: what is refused of it, is refused before."""
    folder = tmp_path_factory.mktemp("without") / "model"
    shutil.copytree(tiny[0], folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="session")
def other(make_model: MakeModel) -> tuple[Path, Any]:
    return make_model(1)
