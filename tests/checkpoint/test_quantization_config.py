"""What checkpoints say about their quantization: AWQ, GPTQ, AutoRound, FP8, ModelOpt; where it stands, and when it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.quantization_config import KVCacheFormat, QuantizationConfig, read_quantization_config
from octavo.quant.checkpoint.resolve import ModelFiles
from octavo.quant.linear_format import DENSE, ActivationFormat, LinearFormat

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741
UP = "model.layers.0.mlp.up_proj"
DOWN10 = "model.layers.10.mlp.down_proj"
HEAD = "lm_head"

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True, "packing_format": "auto_round:auto_gptq"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}

AWQ_64 = LinearFormat("awq", 4, "group", group_size=64, symmetric=False)
GPTQ_64 = LinearFormat("gptq", 4, "group", group_size=64, symmetric=True, zero_offset=1)


def read(folder: Path, config: dict[str, Any] | None = None, **side_files: Any) -> QuantizationConfig | None:
    """Read a folder with these files: read(folder, {...config.json...}, quantize_config={...})."""
    (folder / "config.json").write_text(json.dumps(config or {}))
    for name, content in side_files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    files = ModelFiles("hf", folder, None, (folder / "model.safetensors",), None, str(folder), folder / "config.json")
    return read_quantization_config(files, config or {})


def read_one(folder: Path, quantization: dict[str, Any], **changed: Any) -> QuantizationConfig:
    found = read(folder, {"quantization_config": {**quantization, **changed}})
    assert found is not None
    return found


def stored(found: QuantizationConfig, module: str = Q, k: int = 576, n: int = 576) -> LinearFormat:
    return found.for_linear(module, in_features=k, out_features=n)


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


# Where it stands


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"compression_config": None}])
def test_a_dense_checkpoint_has_none(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read(tmp_path, config) is None


def test_gguf_has_none(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ))
    file = tmp_path / "m.gguf"
    assert read_quantization_config(ModelFiles("gguf", tmp_path, file, (file,), None, "m", None), {"quantization_config": AWQ}) is None


@pytest.mark.parametrize(
    ("config", "side", "method", "source"),
    [
        ({"quantization_config": AWQ}, {}, "awq", "config.json"),
        ({"compression_config": AWQ}, {}, "awq", "config.json"),
        ({"text_config": {"quantization_config": GPTQ}}, {}, "gptq", "config.json"),
        ({}, {"quantize_config": without(GPTQ, "quant_method")}, "gptq", "quantize_config.json"),
        ({}, {"quantize_config": AWQ}, "awq", "quantize_config.json"),
        ({}, {"quant_config": {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}}, "awq", "quant_config.json"),
        ({}, {"hf_quant_config": {"producer": {}, "quantization": {"quant_algo": "FP8"}}}, "modelopt", "hf_quant_config.json"),
        ({}, {"quantization_config": ROUND}, "gptq", "quantization_config.json"),
        ({"quantization_config": {"quant_algo": "FP8", "config_groups": {}}}, {}, "modelopt", "config.json"),
        ({"quantization_config": {"config_groups": {}, "format": "dense"}}, {}, "compressed-tensors", "config.json"),
        ({"quantization_config": {**AWQ, "quant_method": "AWQ"}}, {}, "awq", "config.json"),
    ],
)
def test_every_place_is_found(tmp_path: Path, config: dict[str, Any], side: dict[str, Any], method: str, source: str) -> None:
    found = read(tmp_path, config, **side)
    assert found is not None
    assert (found.method, found.source) == (method, tmp_path / source)


@pytest.mark.parametrize(
    ("first", "name", "second"),
    [
        (AWQ, "quant_config", {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}),
        (AWQ, "quantize_config", {**AWQ, "checkpoint_format": "gemm", "sym": True, "pack_dtype": "int32", "meta": {"quantizer": ["x"]}}),
        (without(GPTQ, "group_size"), "quantize_config", {"group_size": 64, "bits": 4, "damp_percent": 0.1}),
        (MODELOPT, "hf_quant_config", {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"], "kv_cache_quant_algo": None}}),
        (
            {**MODELOPT, "kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": False}},
            "hf_quant_config",
            {"quantization": {"quant_algo": "fp8", "exclude_modules": ["lm_head"], "kv_cache_quant_algo": "FP8"}},
        ),
    ],
)
def test_sources_that_agree_or_add_to_each_other(tmp_path: Path, first: dict[str, Any], name: str, second: dict[str, Any]) -> None:
    found = read(tmp_path, {"quantization_config": first}, **{name: second})
    assert found is not None
    assert stored(found) != DENSE


@pytest.mark.parametrize(
    ("first", "name", "second", "values"),
    [
        (AWQ, "quant_config", {"w_bit": 4, "q_group_size": 128}, ["group_size=64", "quant_config.json: q_group_size=128"]),
        (GPTQ, "quantize_config", {**GPTQ, "bits": 8}, ["quantization_config.bits=4", "quantize_config.json: bits=8"]),
        (GPTQ, "quant_config", {"w_bit": 4, "q_group_size": 64}, ["'gptq'", "'awq'"]),
        (GPTQ, "quantize_config", {**GPTQ, "desc_act": True}, ["desc_act=False", "desc_act=True"]),
        (MODELOPT, "hf_quant_config", {"quantization": {"quant_algo": "NVFP4"}}, ["'FP8'", "'NVFP4'"]),
        ({**GPTQ, "checkpoint_format": "gptq"}, "quantize_config", {**GPTQ, "checkpoint_format": "gptq_v2"}, ["'gptq'", "'gptq_v2'"]),
    ],
)
def test_sources_that_contradict_each_other(
    tmp_path: Path, first: dict[str, Any], name: str, second: dict[str, Any], values: list[str]
) -> None:
    with pytest.raises(CheckpointError, match="contradicts") as caught:
        read(tmp_path, {"quantization_config": first}, **{name: second})
    for text in [str(tmp_path / "config.json"), str(tmp_path / f"{name}.json"), *values]:
        assert text in str(caught.value)


def test_two_spellings_in_one_file_must_agree(tmp_path: Path) -> None:
    assert stored(read_one(tmp_path, AWQ, w_bit=4, format="GEMM")) == AWQ_64
    with pytest.raises(CheckpointError, match=r"q_group_size=32 contradicts group_size=64 in the same file"):
        read_one(tmp_path, AWQ, q_group_size=32)


@pytest.mark.parametrize(
    "method",
    ["bitsandbytes", "hqq", "aqlm", "quip", "eetq", "spqr", "torchao", "mxfp4", "quark", "fbgemm_fp8", "marlin", "bitnet", "vptq", ""],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(repr(method))) as caught:
        read_one(tmp_path, {"quant_method": method})
    for text in ["config.json", "awq, gptq, compressed-tensors, fp8, modelopt", "dense original"]:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "'bitsandbytes' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method is missing: it must be one of awq"),
        ({"quantization_config": {"quant_method": 4}}, "quant_method=4 is a int, but must be a string"),
        ({"quantization_config": [1]}, "quantization_config=[1] is a list, but must be an object"),
    ],
)
def test_no_sound_method(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        read(tmp_path, config)


def test_a_side_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json is not valid JSON"):
        read(tmp_path)


# What each method's keys mean


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, AWQ_64),
        ({"version": None}, AWQ_64),
        ({"version": "GEMM", "modules_to_not_convert": None, "backend": "autoawq", "do_fuse": False}, AWQ_64),
        ({"zero_point": False}, LinearFormat("awq", 4, "group", group_size=64)),
        ({"zero_point": None, "sym": True}, AWQ_64),
        ({"group_size": -1}, LinearFormat("awq", 4, "channel", symmetric=False)),
        ({"group_size": 32}, LinearFormat("awq", 4, "group", group_size=32, symmetric=False)),
        ({"modules_to_not_convert": ["k_proj"]}, AWQ_64),
        ({"modules_to_not_convert": ["q_proj"]}, DENSE),
        ({"modules_to_not_convert": ["attn.q"]}, DENSE),
        ({"modules_to_not_convert": [""]}, AWQ_64),
        ({"dynamic": {r"-:.*q_proj": {}}}, DENSE),
        ({"dynamic": {r".*q_proj": {"group_size": 32}}}, LinearFormat("awq", 4, "group", group_size=32, symmetric=False)),
        (
            {"method": "awq", "format": "gemm", "checkpoint_format": "gemm", "pack_dtype": "int32", "desc_act": False, "adapter": None},
            AWQ_64,
        ),
    ],
)
def test_awq(tmp_path: Path, changed: dict[str, Any], expected: LinearFormat) -> None:
    found = read_one(tmp_path, AWQ, **changed)
    assert stored(found) == expected
    assert stored(found, HEAD, n=49152) == DENSE
    assert found.weight_types == {"int4"}


def test_awq_with_a_quantized_lm_head(tmp_path: Path) -> None:
    assert stored(read_one(tmp_path, AWQ, lm_head=True), HEAD) == AWQ_64


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, GPTQ_64),
        ({"checkpoint_format": "gptq", "is_marlin_format": False}, GPTQ_64),
        ({"format": "gptq", "checkpoint_format": "GPTQ"}, GPTQ_64),
        ({"checkpoint_format": "gptq_v2"}, LinearFormat("gptq", 4, "group", group_size=64)),
        ({"format": "gptq_v2"}, LinearFormat("gptq", 4, "group", group_size=64)),
        ({"sym": False}, LinearFormat("gptq", 4, "group", group_size=64, symmetric=False, zero_offset=1)),
        ({"sym": None}, LinearFormat("gptq", 4, "group", group_size=64, symmetric=False, zero_offset=1)),
        ({"desc_act": True}, LinearFormat("gptq", 4, "group", group_size=64, act_order=True, zero_offset=1)),
        ({"desc_act": True, "static_groups": True}, LinearFormat("gptq", 4, "group", group_size=64, act_order=True, zero_offset=1)),
        ({"desc_act": None}, LinearFormat("gptq", 4, "group", group_size=64, act_order=True, zero_offset=1)),
        ({"desc_act": True, "group_size": -1}, LinearFormat("gptq", 4, "channel", zero_offset=1)),
        ({"bits": 2}, LinearFormat("gptq", 2, "group", group_size=64, zero_offset=1)),
        ({"bits": 3}, LinearFormat("gptq", 3, "group", group_size=64, zero_offset=1)),
        ({"bits": 8, "group_size": 128}, LinearFormat("gptq", 8, "group", group_size=128, zero_offset=1)),
        ({"modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.up_proj"]]}, GPTQ_64),
        ({"modules_in_block_to_quantize": ["model.layers.0.self_attn.q_proj"]}, GPTQ_64),
        ({"modules_in_block_to_quantize": ["self_attn.k_proj"]}, DENSE),
        ({"modules_in_block_to_quantize": ["self_attn.q"]}, DENSE),
        ({"modules_in_block_to_quantize": []}, GPTQ_64),
        ({"dynamic": {}}, GPTQ_64),
        ({"dynamic": {"q_proj": {"bits": 8}}}, GPTQ_64),  # matched from the path's beginning
        ({"dynamic": {r".*\.q_proj": {"bits": 8, "group_size": 32}}}, LinearFormat("gptq", 8, "group", group_size=32, zero_offset=1)),
        ({"dynamic": {r"+:.*attn": {"sym": False}}}, LinearFormat("gptq", 4, "group", group_size=64, symmetric=False, zero_offset=1)),
        ({"dynamic": {r"+:.*q_": {"desc_act": True}}}, LinearFormat("gptq", 4, "group", group_size=64, act_order=True, zero_offset=1)),
        ({"dynamic": {r"+:.*q_": {"bits": None, "damp_percent": 0.1}}}, GPTQ_64),
        ({"dynamic": {r"-:model\.layers\.0\.": {}}}, DENSE),
        ({"dynamic": {r"-:.*q_proj": None}}, DENSE),
        ({"dynamic": {r"+:.*q_proj": {"bits": 8}, r"-:.*": {}}}, LinearFormat("gptq", 8, "group", group_size=64, zero_offset=1)),
        ({"dynamic": {r"-:.*": {}, r"+:.*q_proj": {"bits": 8}}}, DENSE),
    ],
)
def test_gptq(tmp_path: Path, changed: dict[str, Any], expected: LinearFormat) -> None:
    found = read_one(tmp_path, GPTQ, **changed)
    assert stored(found) == expected
    assert stored(found, HEAD) == DENSE


def test_gptq_with_a_quantized_lm_head(tmp_path: Path) -> None:
    assert stored(read_one(tmp_path, GPTQ, lm_head=True, modules_in_block_to_quantize=["mlp.up_proj"]), HEAD) == GPTQ_64
    assert stored(read_one(tmp_path, GPTQ, lm_head=True, dynamic={"-:lm_head": {}}), HEAD) == DENSE
    assert stored(read_one(tmp_path, GPTQ, lm_head=True, dynamic={"lm_head": {"bits": 8}}), HEAD).bits == 8


def test_weight_types_name_every_width(tmp_path: Path) -> None:
    assert read_one(tmp_path, GPTQ, dynamic={".*down": {"bits": 8}, "-:.*up": {}}).weight_types == {"int4", "int8"}


@pytest.mark.parametrize(
    ("module", "changed", "expected"),
    [
        (Q, {}, GPTQ_64),
        (HEAD, {}, DENSE),
        (HEAD, {"extra_config": {"lm_head": {"bits": 4}}}, GPTQ_64),
        (Q, {"extra_config": {Q: {"bits": 16, "data_type": "float"}}}, DENSE),
        (Q, {"extra_config": {Q: {"bits": 8, "group_size": None}}}, LinearFormat("gptq", 8, "group", group_size=64, zero_offset=1)),
        (Q, {"extra_config": {r".*self_attn.*": {"bits": 16}}}, DENSE),
        (UP, {"extra_config": {r".*self_attn.*": {"bits": 16}}}, GPTQ_64),
        (Q, {"block_name_to_quantize": "model.layers"}, GPTQ_64),
        (Q, {"block_name_to_quantize": ["visual.blocks", "model.layers"]}, GPTQ_64),
        (Q, {"block_name_to_quantize": "visual.blocks,audio"}, DENSE),
        (Q, {"sym": False}, LinearFormat("gptq", 4, "group", group_size=64, symmetric=False, zero_offset=1)),
        (Q, {"packing_format": "auto_round:auto_awq"}, LinearFormat("awq", 4, "group", group_size=64)),
        (Q, {"packing_format": "auto_round:auto_awq", "sym": False}, AWQ_64),
    ],
)
def test_autoround(tmp_path: Path, module: str, changed: dict[str, Any], expected: LinearFormat) -> None:
    found = read_one(tmp_path, ROUND, **changed)
    assert stored(found, module) == expected
    assert found.method == changed.get("packing_format", "auto_gptq").rpartition("auto_")[2]


FP8_TOKEN = LinearFormat("fp8", 8, "tensor", activation=ActivationFormat("fp8_e4m3", "token", dynamic=True))
FP8_BLOCK = LinearFormat(
    "fp8", 8, "block", block=(128, 128), activation=ActivationFormat("fp8_e4m3", "group", dynamic=True, group_size=128)
)


@pytest.mark.parametrize(
    ("module", "changed", "expected"),
    [
        (Q, {}, FP8_TOKEN),
        (Q, {"activation_scheme": None, "fmt": "e4m3"}, FP8_TOKEN),
        (
            Q,
            {"activation_scheme": "static"},
            LinearFormat("fp8", 8, "tensor", activation=ActivationFormat("fp8_e4m3", "tensor", dynamic=False)),
        ),
        (Q, {"weight_block_size": [128, 128], "fmt": "e4m3", "scale_fmt": "ue8m0"}, FP8_BLOCK),
        (HEAD, {"weight_block_size": [128, 128]}, DENSE),
        (Q, {"ignored_layers": [Q]}, DENSE),
        (Q, {"modules_to_not_convert": [Q]}, DENSE),
        (Q, {"ignored_layers": ["model.layers.0.self_attn"]}, DENSE),
        (Q, {"ignored_layers": ["model.layers.0."]}, DENSE),
        (Q, {"ignored_layers": ["self_attn.q_proj"]}, DENSE),
        (Q, {"ignored_layers": ["model.layers.0.self_attn.q", "layers.0", "q_pro", ""]}, FP8_TOKEN),
        (Q, {"ignored_layers": ["model.layers.0.self_attn.qkv_proj"]}, DENSE),
        (K, {"ignored_layers": ["model.layers.0.self_attn.qkv_proj"]}, DENSE),
        (O, {"ignored_layers": ["model.layers.0.self_attn.qkv_proj"]}, FP8_TOKEN),
        (UP, {"ignored_layers": ["model.layers.0.mlp.gate_up_proj"]}, DENSE),
        (UP, {"ignored_layers": ["model.layers.1.mlp.gate_up_proj"]}, FP8_TOKEN),
        (DOWN10, {"ignored_layers": ["model.layers.1"]}, FP8_TOKEN),
    ],
)
def test_fp8(tmp_path: Path, module: str, changed: dict[str, Any], expected: LinearFormat) -> None:
    found = read_one(tmp_path, FP8, **changed)
    assert stored(found, module) == expected
    assert (found.kv_cache, found.weight_types) == (None, {"fp8"})


@pytest.mark.parametrize(
    ("module", "changed", "expected"),
    [
        (Q, {}, "modelopt-fp8 fp8, per tensor, activations fp8_e4m3 per tensor, static"),
        (HEAD, {}, "dense"),
        (HEAD, {"ignore": []}, "modelopt-fp8 fp8, per tensor, activations fp8_e4m3 per tensor, static"),
        (Q, {"ignore": ["model.layers.0*"]}, "dense"),
        (Q, {"ignore": ["*self_attn*"]}, "dense"),
        (Q, {"ignore": ["model.layers.0.self_attn"]}, "dense"),
        (Q, {"ignore": ["model.layers.0.self_attn.qkv_proj"]}, "dense"),
        (UP, {"ignore": ["*.self_attn.*"]}, "modelopt-fp8 fp8, per tensor, activations fp8_e4m3 per tensor, static"),
        (Q, {"quant_algo": "fp8_per_channel_per_token"}, "modelopt-fp8 fp8, per channel, activations fp8_e4m3 per token, dynamic"),
        (Q, {"quant_algo": "FP8_PB_WO"}, "modelopt-fp8 fp8, blocks of 128x128"),
    ],
)
def test_modelopt(tmp_path: Path, module: str, changed: dict[str, Any], expected: str) -> None:
    assert stored(read_one(tmp_path, MODELOPT, **changed), module, k=512, n=256).describe() == expected


@pytest.mark.parametrize(
    ("quantization", "kv_cache"),
    [
        (MODELOPT, None),
        ({**MODELOPT, "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, KVCacheFormat("fp8_e4m3", "tensor", False)),
        (
            {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
            KVCacheFormat("fp8_e4m3", "tensor", False),
        ),
        ({**FP8, "kv_cache_scheme": "static"}, KVCacheFormat("fp8_e4m3", "tensor", False)),
        ({**FP8, "kv_cache_quant_algo": "FP8"}, KVCacheFormat("fp8_e4m3", "tensor", False)),
        (AWQ, None),
    ],
)
def test_kv_cache(tmp_path: Path, quantization: dict[str, Any], kv_cache: KVCacheFormat | None) -> None:
    assert read_one(tmp_path, quantization).kv_cache == kv_cache


# What is refused


@pytest.mark.parametrize(
    ("base", "changed", "problem"),
    [
        (AWQ, {"version": "gemv"}, "quantization_config.version='gemv' is not supported: it must be gemm"),
        (AWQ, {"version": "gemv_fast"}, "'gemv_fast'"),
        (AWQ, {"version": "marlin"}, "'marlin'"),
        (AWQ, {"version": "exllama"}, "'exllama'"),
        (AWQ, {"version": "ipex"}, "'ipex'"),
        (AWQ, {"version": None, "checkpoint_format": "gemv"}, "quantization_config.checkpoint_format='gemv'"),
        (AWQ, {"backend": "llm-awq"}, "'llm-awq' is not supported"),
        (AWQ, {"bits": 8}, "bits=8 is not supported: it must be 4"),
        (AWQ, {"bits": "4"}, "bits='4' is a str, but must be a number: 4"),
        (AWQ, {"bits": True}, "bits=True is a bool"),
        (AWQ, {"bits": None}, "bits is missing: it must be 4"),
        (AWQ, {"group_size": 0}, "group_size=0 is no group size"),
        (AWQ, {"group_size": -2}, "group_size=-2 is no group size"),
        (AWQ, {"group_size": 64.0}, "group_size=64.0 is a float"),
        (AWQ, {"group_size": None}, "group_size is missing"),
        (AWQ, {"zero_point": "yes"}, "zero_point='yes' is a str, but must be true or false"),
        (AWQ, {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head' is a str, but must be a list of strings"),
        (AWQ, {"modules_to_not_convert": [1]}, "holds 1, but must be a list of strings"),
        (AWQ, {"dynamic": {".*": {"bits": 8}}}, "quantization_config.dynamic..*.bits=8 is not supported"),
        (GPTQ, {"bits": 5}, "bits=5 is not supported: it must be one of 2, 3, 4, 8"),
        (GPTQ, {"bits": "4"}, "bits='4' is a str"),
        (GPTQ, {"bits": None}, "bits is missing: it must be one of 2, 3, 4, 8"),
        (GPTQ, {"group_size": 0}, "group_size=0"),
        (GPTQ, {"group_size": None}, "group_size is missing"),
        (GPTQ, {"sym": 1}, "sym=1 is a int"),
        (
            GPTQ,
            {"checkpoint_format": "marlin"},
            "checkpoint_format='marlin' is not supported: it must be one of gptq, gptq_v2. Save it again",
        ),
        (GPTQ, {"checkpoint_format": "bitblas"}, "'bitblas'"),
        (GPTQ, {"checkpoint_format": "gptq_p"}, "'gptq_p'"),
        (GPTQ, {"format": "ipex"}, "quantization_config.format='ipex'"),
        (GPTQ, {"format": "gptq", "checkpoint_format": "gptq_v2"}, "contradicts"),
        (GPTQ, {"is_marlin_format": True}, "is_marlin_format=True is not supported"),
        (GPTQ, {"pack_dtype": "int16"}, "pack_dtype='int16' is not supported"),
        (GPTQ, {"adapter": {"name": "lora"}}, "adapter="),
        (GPTQ, {"rotation": "hadamard"}, "rotation='hadamard'"),
        (GPTQ, {"dynamic": {"+:(": {}}}, "'(' is no regular expression"),
        (GPTQ, {"dynamic": {"-:[": {}}}, "'[' is no regular expression"),
        (GPTQ, {"dynamic": [1]}, "dynamic=[1] is a list, but must be an object"),
        (GPTQ, {"dynamic": {".*": 4}}, "=4 is a int, but must be an object"),
        (GPTQ, {"dynamic": {".*": {"group_size": 0}}}, "dynamic..*.group_size=0"),
        (GPTQ, {"dynamic": {".*": {"checkpoint_format": "marlin"}}}, "'marlin'"),
        (ROUND, {"packing_format": "auto_round:gptqmodel"}, "'auto_round:gptqmodel' is not supported"),
        (ROUND, {"packing_format": "auto_round"}, "'auto_round' is not supported"),
        (ROUND, {"packing_format": None}, "packing_format is missing: it must be one of auto_round:auto_gptq"),
        (ROUND, {"data_type": "mx_fp"}, "data_type='mx_fp'"),
        (ROUND, {"act_bits": 8}, "act_bits=8 is not supported"),
        (ROUND, {"bits": None}, "bits is missing"),
        (ROUND, {"extra_config": {"a(": {}}}, "'a(' is no regular expression"),
        (FP8, {"activation_scheme": "per_channel"}, "'per_channel' is not supported: it must be one of dynamic, static"),
        (FP8, {"activation_scheme": "static", "weight_block_size": [128, 128]}, "contradicts weight_block_size"),
        (FP8, {"fmt": "e5m2"}, "fmt='e5m2' is not supported"),
        (FP8, {"weight_block_size": [128]}, "weight_block_size=[128] is no block"),
        (FP8, {"weight_block_size": [0, 128]}, "is no block"),
        (FP8, {"weight_block_size": 128}, "is no block"),
        (FP8, {"weight_block_size": [128, True]}, "is no block"),
        (FP8, {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        (FP8, {"modules_to_convert": ["embed"]}, "modules_to_convert="),
        (FP8, {"kv_cache_scheme": "dynamic"}, "kv_cache_scheme='dynamic'"),
        (MODELOPT, {"quant_algo": "NVFP4"}, "'NVFP4' is not supported"),
        (MODELOPT, {"quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ' is not supported"),
        (MODELOPT, {"quant_algo": "MIXED_PRECISION"}, "'MIXED_PRECISION' is not supported"),
        (MODELOPT, {"quant_algo": None}, "quant_algo is missing: it must be one of fp8"),
        (MODELOPT, {"kv_cache_quant_algo": "NVFP4"}, "'NVFP4' is not supported"),
        (MODELOPT, {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_scheme"),
        (MODELOPT, {"ignore": "lm_head"}, "must be a list of strings"),
    ],
)
def test_refusals_name_file_key_and_value(tmp_path: Path, base: dict[str, Any], changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)) as caught:
        read_one(tmp_path, base, **changed)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "k", "n", "problem"),
    [
        ({**AWQ, "group_size": 128}, 576, 576, "group_size=128 does not divide its 576 input features: quantize with group_size 64"),
        (AWQ, 100, 64, "quantize it per channel"),
        (AWQ, 64, 100, "100 is no multiple of 8"),
        ({**GPTQ, "bits": 3}, 100, 64, "multiples of 32"),
        ({**GPTQ, "bits": 3}, 64, 100, "multiples of 32"),
        ({**MODELOPT, "quant_algo": "FP8_PB_WO"}, 576, 128, "whole blocks of 128x128"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, quantization: dict[str, Any], k: int, n: int, problem: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)) as caught:
        stored(read_one(tmp_path, quantization), Q, k, n)
    assert Q in str(caught.value)


@pytest.mark.parametrize("quantization", [{**GPTQ, "group_size": 128}, {**FP8, "weight_block_size": [128, 128]}])
def test_short_last_groups_and_blocks_fit(tmp_path: Path, quantization: dict[str, Any]) -> None:
    assert stored(read_one(tmp_path, quantization), Q, 576, 192) != DENSE


def test_a_dense_module_may_have_any_shape(tmp_path: Path) -> None:
    assert stored(read_one(tmp_path, AWQ, modules_to_not_convert=["q_proj"]), Q, 7, 5) == DENSE


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.floats(allow_nan=False), st.text(max_size=6), st.just([]), st.just({})
)
KEYS = ["bits", "group_size", "zero_point", "version", "sym", "desc_act", "checkpoint_format", "dynamic", "lm_head", "weight_block_size"]
KEYS += ["quant_algo", "packing_format", "extra_config", "ignore", "config_groups", "format", "activation_scheme", "kv_cache_scheme"]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=st.sampled_from([AWQ, GPTQ, ROUND, FP8, MODELOPT]), changed=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_json_is_read_or_refused(tmp_path: Path, base: dict[str, Any], changed: dict[str, Any]) -> None:
    problem = ""
    try:
        found = read_one(tmp_path, base, **changed)
        for module in (Q, UP, HEAD):
            stored(found, module, 512, 256)
    except CheckpointError as error:
        problem = str(error)
    assert not problem or "config.json" in problem
