"""Whole folders whose config and weights contradict each other, as a user has them: what ends the start, and what is but warned of."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.quant.checkpoint.errors import CheckpointError

from ..quant import writers
from .test_quantized_loading import LAYOUTS, SEQUENCES, Q, Writer, edit_quantization, edit_tensors, make
from .tiny_models import assert_close, expected_logits, load, run


def without_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def zero_scales(name: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.{name}"].zero_()

    return lambda folder: edit_tensors(folder, change)


BAD: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "gptq-without-config": ("gptq", without_config, ("config.json has no quantization_config", "GPTQ, 4 bits, group_size 64")),
    "awq-without-config": ("awq", without_config, ("config.json has no quantization_config", "AWQ, 4 bits, group_size 64")),
    "pack-without-config": ("pack", without_config, ("config.json has no quantization_config", "pack-quantized")),
    "fp8-without-config": ("float-channel", without_config, ("config.json has no quantization_config", "fp8, compressed-tensors")),
    "int8-without-config": ("int8", without_config, ("config.json has no quantization_config", "int-quantized")),
    "gptq-called-awq": ("gptq", lambda folder: edit_quantization(folder, quant_method="awq"), ("'awq' contradicts", "to 'gptq'")),
    "awq-called-gptq": ("awq", lambda folder: edit_quantization(folder, quant_method="gptq"), ("'gptq' contradicts", "to 'awq'")),
    "awq-group-size": ("awq", lambda folder: edit_quantization(folder, group_size=32), ("group_size=32 contradicts", "Set it to 64")),
    "gptq-zero-scales": ("gptq", zero_scales("scales"), (Q, "model.safetensors", "scales is 0 in all of its 256", "download it again")),
    "awq-zero-scales": ("awq", zero_scales("scales"), (Q, "model.safetensors", "scales is 0 in all of its 256", "download it again")),
    "pack-zero-scales": ("pack", zero_scales("weight_scale"), (Q, "model.safetensors", "weight_scale is 0 in all", "download it again")),
    "fp8-zero-scales": ("float-channel", zero_scales("weight_scale"), (Q, "model.safetensors", "weight_scale is 0 in all")),
    "fp8-zero-scale": ("float-static", zero_scales("weight_scale"), (Q, "model.safetensors", "weight_scale is 0 in all of its 1")),
    "int8-zero-scales": ("int8", zero_scales("weight_scale"), (Q, "model.safetensors", "weight_scale is 0 in all")),
}


@pytest.mark.parametrize("name", BAD)
def test_what_ends_the_start(tmp_path: Path, name: str) -> None:
    layout, damage, texts = BAD[name]
    made = make(tmp_path, LAYOUTS[layout].write)
    damage(made.folder)
    with pytest.raises(CheckpointError) as caught:
        load(made.folder)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda n, k, seed: writers.awq(n, k, 64, seed=seed), {"zero_point": False}),
        (lambda n, k, seed: writers.gptq(n, k, 64, symmetric=False, seed=seed), {"sym": True}),
        (lambda n, k, seed: writers.gptq(n, k, 64, v2=True, zeros=torch.full((n, k // 64), 5), seed=seed), {"sym": True}),
    ],
)
def test_stored_zero_points_are_used_whatever_the_config_calls_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Writer, said: dict[str, bool]
) -> None:
    made = make(tmp_path, write)
    edit_quantization(made.folder, **said)
    with caplog.at_level(logging.WARNING, "octavo"):
        runner = load(made.folder)
    (record,) = caplog.records
    key, value = next(iter(said.items()))
    for text in (
        "model.layers.0.self_attn.q_proj in ",
        "model.safetensors",
        f"config.json: quantization_config.{key}={value}",
        "would be 8",
    ):
        assert text in record.getMessage()
    for item, found in zip(SEQUENCES, run(runner, SEQUENCES), strict=True):
        assert_close(found, expected_logits(made.dense, item.tokens), 3e-5)
    assert not any(built.spec.form.symmetric for layer in runner.model.layers for linear in layer.linears for built in linear.kernels)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda n, k, seed: writers.awq(n, k, 64, zeros=torch.full((n, k // 64), 8), seed=seed), {"zero_point": False}),
        (lambda n, k, seed: writers.awq(n, k, 64, seed=seed), {"zero_point": True}),
        (lambda n, k, seed: writers.gptq(n, k, 64, seed=seed), {"sym": True}),
        (lambda n, k, seed: writers.gptq(n, k, 64, bits=8, v2=True, seed=seed), {"sym": True}),
        (lambda n, k, seed: writers.gptq(n, k, 64, symmetric=False, seed=seed), {"sym": False}),
    ],
)
def test_zero_points_that_fit_are_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Writer, said: dict[str, bool]) -> None:
    made = make(tmp_path, write)
    edit_quantization(made.folder, **said)
    with caplog.at_level(logging.WARNING, "octavo"):
        load(made.folder)
    assert caplog.records == []


# --- a forced backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "backend", "texts"),
    [
        (
            "gptq",
            "torch_matmul",
            ("quantized linears (gptq int4, groups of 64)", "takes dense weights, not int4 in groups of 64", "cpu_grouped"),
        ),
        ("int8", "torch_matmul", ("(int-quantized int8, per channel", "takes dense weights, not int8 per channel", "give cpu_int8 or")),
        ("gptq", "cpu_int8", ("(gptq int4, groups of 64)", "multiplies int8 weights with whole-number inputs, not int4 in groups of 64")),
    ],
)
def test_a_backend_that_only_dense_linears_could_have_is_refused(tmp_path: Path, layout: str, backend: str, texts: tuple[str, ...]) -> None:
    made = make(tmp_path, LAYOUTS[layout].write)
    with pytest.raises(ValueError, match=rf"--linear-backend {backend} is made for none of this model's quantized linears") as caught:
        load(made.folder, linear_backend=backend)
    for text in (*texts, "Leave the option out"):
        assert text in str(caught.value)


def test_a_backend_that_a_quantized_linear_takes_is_forced(tmp_path: Path) -> None:
    made = make(tmp_path, LAYOUTS["int8"].write)
    assert set(load(made.folder).kernels_in_use()) >= {"cpu_int8"}
    used = load(made.folder, linear_backend="cpu_grouped").kernels_in_use()
    assert "cpu_grouped" in used
    assert "cpu_int8" not in used
