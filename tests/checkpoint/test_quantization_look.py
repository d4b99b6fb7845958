"""What tensors alone tell: quantized ones without a config, AWQ called GPTQ, bits and group sizes that are other than the config's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.quantization_look import look_at
from octavo.quant.checkpoint.reader import TensorInfo
from octavo.quant.checkpoint.resolve import ModelFiles
from octavo.quant.linear_format import LinearFormat
from octavo.quant.module_formats import ModuleFormats

from ..quant import writers
from ..quant.writers import Written

Q = "model.layers.0.self_attn.q_proj"
STORED = {
    torch.int32: "I32",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}


def infos(written: Written, module: str = Q) -> dict[str, TensorInfo]:
    return {
        f"{module}.{name}": TensorInfo(
            f"{module}.{name}", tuple(tensor.shape), tensor.dtype, tensor.nbytes, Path("model.safetensors"), STORED[tensor.dtype]
        )
        for name, tensor in written.tensors.items()
    }


def formats(folder: Path, written: Written, config: Mapping[str, Any], **side_files: Any) -> ModuleFormats:
    described = {"quantization_config": config} if config else {}
    (folder / "config.json").write_text(json.dumps(described))
    for name, content in side_files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    files = ModelFiles("hf", folder, None, (folder / "model.safetensors",), None, str(folder), folder / "config.json")
    return ModuleFormats(files, described, infos(written))


def of(folder: Path, written: Written, config: Mapping[str, Any], **side_files: Any) -> LinearFormat:
    n, k = written.weight.shape
    return formats(folder, written, config, **side_files).of(Q, in_features=k, out_features=n)


def refusal(folder: Path, written: Written, config: Mapping[str, Any], **side_files: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        of(folder, written, config, **side_files)
    return str(caught.value)


# Without a config

LOOKS = {
    "GPTQ, 4 bits, group_size 64": writers.gptq(48, 128, 64),
    "GPTQ, 8 bits, group_size 32": writers.gptq(48, 128, 32, bits=8, symmetric=False),
    "GPTQ, 3 bits, group_size 64": writers.gptq(64, 128, 64, bits=3),
    "GPTQ, 4 bits, group_size 128": writers.gptq(48, 128, None, act_order=False),
    "AWQ, 4 bits, group_size 32": writers.awq(48, 128, 32),
    "compressed-tensors, pack-quantized": writers.pack_quantized(48, 128),
    "compressed-tensors, int-quantized": writers.int8(48, 128),
    "fp8, compressed-tensors float-quantized per channel": writers.fp8(48, 128, "channel"),
    "fp8 as ModelOpt writes it": writers.fp8(48, 128, "channel", layout="modelopt-fp8"),
    "fp8 in blocks, compressed-tensors": writers.fp8(256, 256, "block"),
    "fp8 with one scale a tensor": writers.fp8(48, 128, "tensor"),
    "fp8 as DeepSeek and transformers write it": writers.fp8(256, 256, "block", layout="fp8").renamed(weight_scale="weight_scale_inv"),
    "GPTQ or AWQ": writers.gptq(48, 128, 64).without("scales"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_quantized_tensors_without_a_config_are_told_by_their_looks(tmp_path: Path, name: str) -> None:
    text = refusal(tmp_path, LOOKS[name], {})
    assert text.startswith(
        f"{tmp_path / 'config.json'} has no quantization_config, but the weights are quantized: {Q} in model.safetensors"
    )
    assert f"looks like {name}" in text
    assert text.endswith("Take config.json from the original checkpoint again, or add the quantization_config")


def test_dense_tensors_look_like_nothing() -> None:
    assert look_at(infos(writers.dense(48, 128))) is None
    dense = infos(writers.dense(48, 128).with_bias())
    assert look_at({**dense, f"{Q}.weight_scale": next(iter(dense.values()))}) is None
    assert look_at({}) is None


# Called by the other's name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("leftover", [{}, {"checkpoint_format": "gptq"}])
def test_gptq_that_is_called_awq(tmp_path: Path, bits: int, leftover: dict[str, Any]) -> None:
    text = refusal(tmp_path, writers.gptq(48, 128, 64, bits=bits), {"quant_method": "awq", "bits": bits, "group_size": 64, **leftover})
    assert f"{tmp_path / 'config.json'}: quantization_config.quant_method='awq' contradicts the weights: {Q} in model.safetensors" in text
    assert f"has qweight [{128 * bits // 32}, 48] of I32 and scales [2, 48] of F16" in text
    assert f"the layout of GPTQ, {bits} bits, group_size 64" in text
    assert "GPTQ packs along the inputs: qweight is [in*bits/32, out], AWQ along the outputs: qweight is [in, out*bits/32]" in text
    assert "Set quant_method to 'gptq'" in text


@pytest.mark.parametrize("leftover", [{"version": "gemm"}, {"checkpoint_format": "gemm"}])
def test_awq_that_is_called_gptq(tmp_path: Path, leftover: dict[str, Any]) -> None:
    text = refusal(tmp_path, writers.awq(48, 128, 64), {"quant_method": "gptq", "bits": 4, "group_size": 64, **leftover})
    assert "quantization_config.quant_method='gptq' contradicts the weights" in text
    assert "the layout of AWQ, 4 bits, group_size 64" in text
    assert "Set quant_method to 'awq'" in text


def test_awq_beside_a_file_of_gptq(tmp_path: Path) -> None:
    text = refusal(tmp_path, writers.awq(48, 128, 64), {}, quantize_config={"bits": 4, "group_size": 64, "desc_act": False})
    assert f"{tmp_path / 'quantize_config.json'}, a file of gptq models, contradicts the weights" in text


def test_autoround_names_its_own_key(tmp_path: Path) -> None:
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True, "packing_format": "auto_round:auto_gptq"}
    text = refusal(tmp_path, writers.awq(48, 128, 64), config)
    assert "quantization_config.packing_format='auto_round:auto_gptq' contradicts the weights" in text
    assert "Set packing_format to 'auto_round:auto_awq'" in text


# Other bits, another group size


def compressed(written: Written, **changed: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(written.config))
    weights = config["config_groups"]["group_0"]["weights"]
    weights.update(changed)
    config["config_groups"]["group_0"]["weights"] = {key: value for key, value in weights.items() if value is not None}
    return config


GPTQ, AWQ, PACK = writers.gptq(48, 512, 64), writers.awq(48, 512, 64), writers.pack_quantized(48, 512, group_size=64, symmetric=False)
CHANNEL = writers.pack_quantized(48, 512, "channel")
WEIGHTS = "quantization_config.config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("written", "config", "texts"),
    [
        (
            GPTQ,
            {**GPTQ.config, "group_size": 32},
            ["quantization_config.group_size=32", f"{Q}.scales has 8 rows for 512 inputs", "group_size 64. Set it to 64"],
        ),
        (GPTQ, {**GPTQ.config, "group_size": -1}, ["group_size=-1", "scales has 8 rows for 512 inputs", "Set it to 64"]),
        (writers.gptq(48, 512, None), {**GPTQ.config}, ["group_size=64", "scales has 1 row for 512 inputs", "Set it to -1"]),
        (writers.gptq(48, 576, 128), {**GPTQ.config}, ["group_size=64", "scales has 5 rows for 576 inputs", "Set it to 128"]),
        (GPTQ, {**GPTQ.config, "bits": 8}, ["quantization_config.bits=8", "qweight has 64 rows for 512 inputs", "4 bits. Set it to 4"]),
        (GPTQ, {**GPTQ.config, "bits": 2, "group_size": 128}, ["bits=2 contradicts", "Set it to 4", "group_size=128 contradicts", "to 64"]),
        (writers.gptq(64, 512, 64, bits=3), {**GPTQ.config}, ["bits=4", "qweight has 48 rows for 512 inputs", "3 bits. Set it to 3"]),
        (
            GPTQ,
            {**GPTQ.config, "dynamic": {".*q_proj": {"bits": 8}}},
            ["quantization_config.dynamic..*q_proj.bits=8", "Set it to 4"],
        ),
        (AWQ, {**AWQ.config, "group_size": 128}, ["group_size=128", "scales has 8 rows for 512 inputs", "Set it to 64"]),
        (AWQ, {**AWQ.config, "group_size": 48}, ["group_size=48", "scales has 8 rows for 512 inputs", "Set it to 64"]),
        (
            AWQ,
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 32},
            ["quantization_config.q_group_size=32 contradicts", "Set it to 64"],
        ),
        (PACK, compressed(PACK, group_size=128), [f"{WEIGHTS}.group_size=128", "weight_scale has 8 columns for 512 inputs", "to 64"]),
        (PACK, compressed(PACK, group_size=48), ["group_size=48", "weight_scale has 8 columns for 512 inputs", "Set it to 64"]),
        (PACK, compressed(PACK, num_bits=8), [f"{WEIGHTS}.num_bits=8", "weight_packed has 64 columns for 512 inputs", "Set it to 4"]),
        (
            PACK,
            compressed(PACK, strategy="channel", group_size=None),
            [f"{WEIGHTS}.strategy='channel'", "8 columns", "Set strategy to group, and group_size to 64"],
        ),
        (
            CHANNEL,
            compressed(CHANNEL, strategy="group", group_size=64),
            ["group_size=64", "weight_scale has 1 column for", "Set strategy to channel, without a group_size"],
        ),
        (writers.pack_quantized(48, 512, "tensor"), compressed(CHANNEL, strategy="tensor", num_bits=8), ["num_bits=8", "Set it to 4"]),
        (
            writers.pack_quantized(48, 512, group_size=64, bits=3, ten_a_word=True),
            compressed(PACK, symmetric=True),
            ["num_bits=4", "weight_packed has 52 columns for 512 inputs", "Set it to 3"],
        ),
    ],
)
def test_what_the_shapes_say_beside_the_key_that_says_otherwise(
    tmp_path: Path, written: Written, config: dict[str, Any], texts: list[str]
) -> None:
    found = refusal(tmp_path, written, config)
    for text in [f"{tmp_path / 'config.json'}: ", "contradicts the weights", "model.safetensors", *texts]:
        assert text in found


@pytest.mark.parametrize(
    "written",
    [
        *(writers.gptq(64, 96, 32, bits=bits, symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
        writers.gptq(13, 64, 32, symmetric=False),
        writers.gptq(40, 72, 32, act_order=True),
        writers.awq(48, 128, None),
        AWQ,
        *(writers.pack_quantized(37, 96, bits=bits, symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
        writers.pack_quantized(37, 96, "tensor"),
        CHANNEL,
    ],
)
def test_tensors_that_fit_are_left_alone(tmp_path: Path, written: Written) -> None:
    assert of(tmp_path, written, written.config) == written.format


def test_tensors_that_no_config_explains_are_left_to_the_reader(tmp_path: Path) -> None:
    """Of another model, or damaged: `qweight` alone would be of 8 bits, and the other tensors are not."""
    damaged = {**GPTQ.tensors, "qweight": torch.zeros(128, 48, dtype=torch.int32)}
    assert of(tmp_path, Written(GPTQ.format, damaged, GPTQ.weight), GPTQ.config) == GPTQ.format
    found = formats(tmp_path, GPTQ, GPTQ.config).of(Q, in_features=1024, out_features=48)
    assert found == GPTQ.format
    with pytest.raises(CheckpointError, match=re.escape("group_size=64 does not divide its 100 input features")):
        formats(tmp_path, AWQ, AWQ.config).of(Q, in_features=100, out_features=48)
