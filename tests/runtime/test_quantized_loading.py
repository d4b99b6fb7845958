"""Tiny random models in every family of quantized layouts: they load at their own width and compute what transformers computes on the
dequantized weights; and what is wrong with a checkpoint is said with file, tensor and remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import octavo
from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.linear_format import ActivationFormat

from ..quant import writers
from ..quant.writers import FP8_GROUP, FP8_STATIC, INT8_STATIC, Written
from .tiny_models import assert_close, expected_logits, llama, load, make_model, run, save_model, save_tokenizer, sequence

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
SEQUENCES = (sequence(23, chunk=1), sequence(45, chunk=45))
Writer = Callable[[int, int, int], Written]


@dataclass(frozen=True)
class Layout:
    """How linears [n, k] are written, and how far logits may be off: where inputs are rounded, a last bit can move a code."""

    write: Writer
    tolerance: float = 3e-5


LAYOUTS: dict[str, Layout] = {
    "awq": Layout(lambda n, k, seed: writers.awq(n, k, 64, seed=seed)),
    "gptq": Layout(lambda n, k, seed: writers.gptq(n, k, 64, seed=seed)),
    "gptq-v2-asym-8": Layout(lambda n, k, seed: writers.gptq(n, k, 32, bits=8, v2=True, symmetric=False, seed=seed)),
    "gptq-3": Layout(lambda n, k, seed: writers.gptq(n, k, 64, bits=3, seed=seed)),
    "gptq-act-order": Layout(lambda n, k, seed: writers.gptq(n, k, 64, act_order=True, symmetric=False, seed=seed)),
    "gptq-biases-unsaid": Layout(lambda n, k, seed: writers.gptq(n, k, 64, seed=seed).with_bias(seed)),
    "pack": Layout(lambda n, k, seed: writers.pack_quantized(n, k, group_size=64, seed=seed)),
    "pack-asym": Layout(lambda n, k, seed: writers.pack_quantized(n, k, group_size=64, symmetric=False, seed=seed)),
    "pack-3": Layout(lambda n, k, seed: writers.pack_quantized(n, k, group_size=64, bits=3, seed=seed)),
    "pack-3-ten-a-word": Layout(lambda n, k, seed: writers.pack_quantized(n, k, group_size=64, bits=3, ten_a_word=True, seed=seed)),
    "float-channel": Layout(lambda n, k, seed: writers.fp8(n, k, "channel", seed=seed), 0.1),
    "float-static": Layout(lambda n, k, seed: writers.fp8(n, k, "tensor", activation=FP8_STATIC, seed=seed), 0.1),
    "float-block": Layout(lambda n, k, seed: writers.fp8(n, k, "block", activation=FP8_GROUP, seed=seed), 0.1),
    "float-weights-only": Layout(lambda n, k, seed: writers.fp8(n, k, "channel", activation=None, seed=seed)),
    "int8": Layout(lambda n, k, seed: writers.int8(n, k, seed=seed), 0.03),
    "int8-static": Layout(lambda n, k, seed: writers.int8(n, k, activation=INT8_STATIC, seed=seed), 0.03),
}


@dataclass(frozen=True)
class Model:
    """A folder, the same model in transformers, and the bytes of its quantized tensors in the file."""

    folder: Path
    dense: Any
    nbytes: int


def make(tmp_path: Path, write: Writer) -> Model:
    model = make_model(llama(**SIZES))
    folder = save_model(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    config: dict[str, Any] = {}
    total = 0
    for seed, (name, linear) in enumerate(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        written = write(linear.out_features, linear.in_features, seed)
        linear.weight.data = written.weight.float()
        if "bias" in written.tensors:
            linear.bias = torch.nn.Parameter(written.tensors["bias"].float())
        if written.format.activation is not None:
            linear.register_forward_pre_hook(rounding(written.format.activation, written.tensors.get("input_scale")))
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{key}": tensor for key, tensor in written.tensors.items()})
        total += sum(tensor.nbytes for key, tensor in written.tensors.items() if key != "bias")
        config = written.config
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    return Model(folder, model, total)


def rounding(activation: ActivationFormat, scale: Tensor | None) -> Callable[..., tuple[Tensor]]:
    def hook(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        flat = args[0].reshape(-1, args[0].shape[-1])
        return (writers.rounded(flat, activation, scale).float().view(args[0].shape),)

    return hook


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_the_dequantized_weights(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    made = make(tmp_path, layout.write)
    runner = load(made.folder)
    used = runner.kernels_in_use()
    assert "reference" not in used
    assert set(used) - {"cpu_packed_panels", "torch_matmul"} == {"cpu_int8" if name.startswith("int8") else "cpu_grouped"}
    for item, found in zip(SEQUENCES, run(runner, SEQUENCES), strict=True):
        assert_close(found, expected_logits(made.dense, item.tokens), layout.tolerance)


@pytest.mark.parametrize("name", ["awq", "gptq-3", "gptq-act-order", "pack-asym", "float-weights-only"])
def test_perplexity_is_that_of_the_dequantized_weights(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, LAYOUTS[name].write)
    save_tokenizer(made.folder)
    windows = [sequence(length, chunk=1, decode=0, seed=seed).tokens for seed, length in enumerate((40, 40, 17))]
    nll, count = 0.0, 0
    for tokens in windows:
        logits = expected_logits(made.dense, tokens)[:-1]
        nll += float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(tokens[1:]), reduction="sum"))
        count += len(tokens) - 1
    options = {"device": "cpu", "num_threads": 2, "dtype": "float32"}
    found = octavo.evaluate(
        str(made.folder),
        token_ids=[token for tokens in windows for token in tokens],
        seqlen=40,
        engine_options=options,
        show_progress=False,
    )
    assert found.num_tokens == count
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-4)


@pytest.mark.parametrize("name", ["awq", "gptq", "pack", "pack-asym", "gptq-3", "pack-3"])
def test_weights_are_held_at_the_width_of_the_file(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, LAYOUTS[name].write)
    held = sum(linear.weight_bytes for layer in load(made.folder).model.layers for linear in layer.linears)
    # GPTQ's symmetric zero points, all alike, its group indices and weight_shape need not be held.
    tensors = load_file(made.folder / "model.safetensors")
    spared = sum(tensor.nbytes for key, tensor in tensors.items() if key.endswith((".g_idx", ".weight_shape")))
    if name.startswith("gptq"):
        spared += sum(tensor.nbytes for key, tensor in tensors.items() if key.endswith(".qzeros"))
    assert abs(held - (made.nbytes - spared)) <= 0.01 * made.nbytes


@pytest.mark.parametrize("method", ["fp8", "int8", "int4"])
def test_quantized_while_loading(tmp_path: Path, method: str) -> None:
    model = make_model(llama(**SIZES))
    folder = save_model(model, tmp_path / "model")
    whole = load(folder)
    runner = load(folder, quantization=method)
    assert "reference" not in runner.kernels_in_use()
    for item, found in zip(SEQUENCES, run(runner, SEQUENCES), strict=True):
        wanted = expected_logits(model, item.tokens)
        error = float((found - wanted).norm() / wanted.norm())
        assert 1e-6 < error < {"fp8": 0.25, "int8": 0.08, "int4": 0.6}[method], error
    held, full = (sum(linear.weight_bytes for layer in loaded.model.layers for linear in layer.linears) for loaded in (runner, whole))
    assert held < full * {"fp8": 0.27, "int8": 0.27, "int4": 0.16}[method]


# --- bad input -------------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_quantization(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {key: value for key, value in {**config["quantization_config"], **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.{name}": tensor}))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.__delitem__(f"{Q}.{name}"))


def scales_with(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.scales"][0, 3] = value

    return lambda folder: edit_tensors(folder, change)


def contradiction(folder: Path) -> None:
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 64, "desc_act": False, "sym": True}))


def truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncated_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:-20])


BAD: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "nan-scale": (scales_with(float("nan")), (Q, "model.safetensors", "scales holds 1 of", "damaged")),
    "infinite-scale": (scales_with(float("inf")), (Q, "model.safetensors", "scales holds 1 of", "damaged")),
    "wrong-shape": (
        put("qweight", torch.zeros(15, 128, dtype=torch.int32)),
        (f"{Q}.qweight", "model.safetensors", "(15, 128)", "(16, 128)", "do not fit"),
    ),
    "wrong-dtype": (
        put("qweight", torch.zeros(16, 128, dtype=torch.float32)),
        (f"{Q}.qweight", "model.safetensors", "float32", "int32", "does not fit"),
    ),
    "scales-of-integers": (
        put("scales", torch.zeros(2, 128, dtype=torch.int32)),
        (f"{Q}.scales", "model.safetensors", "int32", "floating point"),
    ),
    "missing-tensor": (without("scales"), (f"{Q}.scales", "model")),
    "extra-tensor": (put("weight_scale", torch.ones(1)), (f"{Q}.weight_scale",)),
    "unknown-method": (
        lambda folder: edit_quantization(folder, quant_method="quip"),
        ("config.json", "'quip'", "Supported:", "--quantization"),
    ),
    "wrong-group-size": (
        lambda folder: edit_quantization(folder, group_size=32),
        ("config.json: quantization_config.group_size=32", ".scales has 2 rows for 128 inputs", "group_size 64", "model.safetensors"),
    ),
    "wrong-bits": (
        lambda folder: edit_quantization(folder, bits=8),
        ("config.json: quantization_config.bits=8", ".qweight has 16 rows for 128 inputs", "4 bits. Set it to 4", "model.safetensors"),
    ),
    "no-bits": (lambda folder: edit_quantization(folder, bits=None), ("config.json", "bits")),
    "unknown-bits": (lambda folder: edit_quantization(folder, bits=7), ("config.json", "bits=7", "must be")),
    "contradiction": (contradiction, ("config.json", "quantize_config.json", "bits", "contradicts", "remove the file")),
    "truncated-weights": (truncated_weights, ("model.safetensors",)),
    "truncated-config": (truncated_config, ("config.json",)),
    "scattered-g-idx": (
        put("g_idx", torch.arange(127, -1, -1, dtype=torch.int32) // 64),
        (Q, "model.safetensors", "g_idx", "desc_act=true"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(tmp_path: Path, name: str) -> None:
    damage, texts = BAD[name]
    made = make(tmp_path, LAYOUTS["gptq"].write)
    damage(made.folder)
    with pytest.raises(CheckpointError) as caught:
        load(made.folder)
    for text in texts:
        assert text in str(caught.value)


def test_three_bits_packed_either_way_at_one_width(tmp_path: Path) -> None:
    """Where the tensor's width does not tell how codes of 3 bits are packed, nothing is guessed."""

    def write(n: int, k: int, seed: int) -> Written:
        return writers.pack_quantized(n, k, "channel", bits=3, seed=seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "intermediate_size", 100)
        made = make(tmp_path, write)
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.weight_packed' in .*model.safetensors: 100 inputs of 3 bits take 10 words"):
        load(made.folder)
