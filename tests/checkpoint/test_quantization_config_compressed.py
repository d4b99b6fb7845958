"""compressed-tensors' configs: groups, targets, ignored modules and their formats, held against the package where it is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.quantization_compressed import read_compressed_tensors
from octavo.quant.checkpoint.quantization_config import KVCacheFormat, QuantizationConfig, read_quantization_config
from octavo.quant.checkpoint.quantization_fields import Fields
from octavo.quant.checkpoint.resolve import ModelFiles
from octavo.quant.linear_format import DENSE, ActivationFormat, LinearFormat

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
MODULES = (Q, UP, DOWN, "model.layers.10.mlp.down_proj", "lm_head")

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "dynamic": False, "observer": "minmax"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
TOKEN8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True, "observer": None, "observer_kwargs": {}}
TOKEN_INT8 = {**TOKEN8, "type": "int"}
KV8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}

PACKED = LinearFormat("pack-quantized", 4, "group", group_size=64)


def group(
    weights: dict[str, Any] | None, activations: dict[str, Any] | None = None, targets: tuple[str, ...] = ("Linear",), **more: Any
) -> Any:
    return {"targets": list(targets), "weights": weights, "input_activations": activations, "output_activations": None, **more}


def config(*groups: dict[str, Any], form: str | None = "pack-quantized", **more: Any) -> dict[str, Any]:
    base = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"]}
    return {**base, "config_groups": {f"group_{i}": entry for i, entry in enumerate(groups)}, **more}


def read(values: dict[str, Any]) -> QuantizationConfig:
    return read_compressed_tensors(Fields(values, Path("m/config.json"), "m/config.json: quantization_config."))


def stored(values: dict[str, Any], module: str = Q, k: int = 576) -> LinearFormat:
    return read(values).for_linear(module, in_features=k, out_features=192)


def test_it_is_read_from_config_json(tmp_path: Path) -> None:
    files = ModelFiles("hf", tmp_path, None, (tmp_path / "model.safetensors",), None, "m", tmp_path / "config.json")
    for key in ("quantization_config", "compression_config"):
        found = read_quantization_config(files, {key: config(group(INT4))})
        assert found is not None
        assert (found.method, found.source, found.weight_types) == ("compressed-tensors", tmp_path / "config.json", {"int4"})


@pytest.mark.parametrize(
    ("weights", "activations", "form", "expected"),
    [
        (INT4, None, "pack-quantized", PACKED),
        ({**INT4, "symmetric": False}, None, "pack-quantized", LinearFormat("pack-quantized", 4, "group", group_size=64, symmetric=False)),
        ({**INT4, "strategy": None}, None, "pack-quantized", PACKED),
        ({**INT4, "strategy": "channel", "group_size": -1}, None, "pack-quantized", LinearFormat("pack-quantized", 4, "channel")),
        ({**INT4, "strategy": None, "group_size": -1}, None, "pack-quantized", LinearFormat("pack-quantized", 4, "channel")),
        ({**INT4, "strategy": None, "group_size": None}, None, "pack-quantized", LinearFormat("pack-quantized", 4, "tensor")),
        ({**INT4, "num_bits": 2}, None, "pack-quantized", LinearFormat("pack-quantized", 2, "group", group_size=64)),
        ({**INT4, "num_bits": 3}, None, "pack-quantized", LinearFormat("pack-quantized", 3, "group", group_size=64)),
        ({**INT4, "num_bits": 8}, None, "pack-quantized", LinearFormat("pack-quantized", 8, "group", group_size=64)),
        ({**INT4, "actorder": "static"}, None, "pack-quantized", PACKED),
        ({**INT4, "actorder": "weight"}, None, "pack-quantized", PACKED),
        ({**INT4, "actorder": False}, None, "pack-quantized", PACKED),
        ({**INT4, "actorder": "group"}, None, "pack-quantized", LinearFormat("pack-quantized", 4, "group", group_size=64, act_order=True)),
        ({**INT4, "actorder": True}, None, "pack-quantized", LinearFormat("pack-quantized", 4, "group", group_size=64, act_order=True)),
        (
            {**INT4, "scale_dtype": "torch.bfloat16", "zp_dtype": "torch.int8"},
            TOKEN_INT8,
            "pack-quantized",
            LinearFormat("pack-quantized", 4, "group", group_size=64, activation=ActivationFormat("int8", "token", dynamic=True)),
        ),
        (INT8, None, "int-quantized", LinearFormat("int-quantized", 8, "channel")),
        (
            INT8,
            TOKEN_INT8,
            "int-quantized",
            LinearFormat("int-quantized", 8, "channel", activation=ActivationFormat("int8", "token", True)),
        ),
        (
            {**INT8, "strategy": "tensor"},
            {**TOKEN_INT8, "strategy": "tensor", "dynamic": False},
            "int-quantized",
            LinearFormat("int-quantized", 8, "tensor", activation=ActivationFormat("int8", "tensor", False)),
        ),
        (
            INT8,
            TOKEN_INT8,
            "naive-quantized",
            LinearFormat("int-quantized", 8, "channel", activation=ActivationFormat("int8", "token", True)),
        ),
        (
            FLOAT8,
            TOKEN8,
            "float-quantized",
            LinearFormat("float-quantized", 8, "channel", activation=ActivationFormat("fp8_e4m3", "token", True)),
        ),
        (
            {**FLOAT8, "strategy": "tensor"},
            {**TOKEN8, "strategy": "tensor", "dynamic": False},
            "float-quantized",
            LinearFormat("float-quantized", 8, "tensor", activation=ActivationFormat("fp8_e4m3", "tensor", False)),
        ),
        (
            {**FLOAT8, "strategy": "tensor"},
            {**TOKEN8, "strategy": "tensor"},
            "float-quantized",
            LinearFormat("float-quantized", 8, "tensor", activation=ActivationFormat("fp8_e4m3", "tensor", True)),
        ),
        (
            {**FLOAT8, "strategy": "block", "block_structure": [128, 128]},
            {**TOKEN8, "strategy": "group", "group_size": 128},
            "float-quantized",
            LinearFormat("float-quantized", 8, "block", block=(128, 128), activation=ActivationFormat("fp8_e4m3", "group", True, 128)),
        ),
        (
            {**FLOAT8, "strategy": "block", "block_structure": "64x128"},
            None,
            "naive-quantized",
            LinearFormat("float-quantized", 8, "block", block=(64, 128)),
        ),
        (FLOAT8, None, "naive-quantized", LinearFormat("float-quantized", 8, "channel")),
    ],
)
def test_formats(weights: dict[str, Any], activations: dict[str, Any] | None, form: str, expected: LinearFormat) -> None:
    values = config(group(weights, activations), form=form)
    assert stored(values) == expected
    assert stored(values, "lm_head") == DENSE
    assert stored(config(group(weights, activations, format=form), form="mixed-precision")) == expected


def test_a_groups_own_format_wins() -> None:
    packed, floating = group(INT4, targets=(r"re:.*mlp",), format="pack-quantized"), group(FLOAT8, TOKEN8, format="float-quantized")
    for form in ("mixed-precision", "int-quantized", None):
        values = config(packed, floating, form=form)
        assert (stored(values).layout, stored(values, UP).layout) == ("float-quantized", "pack-quantized")
        assert read(values).weight_types == {"fp8", "int4"}


def int4_group(size: int, *targets: str) -> dict[str, Any]:
    return group({**INT4, "group_size": size}, targets=targets)


TARGETING: list[tuple[list[tuple[str, ...]], list[str], list[int | None]]] = [
    ([("Linear",)], [], [1, 1, 1, 1, 1]),
    ([("Linear",)], ["lm_head"], [1, 1, 1, 1, None]),
    ([("Linear",)], ["re:.*lm_head"], [1, 1, 1, 1, None]),
    ([("Linear",)], ["re:lm"], [1, 1, 1, 1, None]),
    ([("Linear",)], ["re:head"], [1, 1, 1, 1, 1]),
    ([("Linear",)], [r"re:model\.layers\.1\."], [1, 1, 1, 1, 1]),
    ([("Linear",)], [r"re:model\.layers\.1"], [1, 1, 1, None, 1]),
    ([("Linear",)], ["model.layers.0", "q_proj"], [1, 1, 1, 1, 1]),
    ([("Linear",)], ["Linear"], [None] * 5),
    ([(Q,)], [], [1, None, None, None, None]),
    ([("re:.*mlp",)], [], [None, 1, 1, 1, None]),
    ([("Embedding", "LlamaAttention")], [], [None] * 5),
    ([("Linear",), ("re:.*down_proj",)], [], [1, 1, 2, 2, 1]),
    ([("Linear",), ("re:.*down_proj",), (DOWN,)], [], [1, 1, 3, 2, 1]),
    ([(DOWN,), ("re:.*down_proj",), ("Linear",)], [], [3, 3, 1, 2, 3]),
    ([("re:model.*mlp",), ("re:.*down_proj",)], [], [None, 1, 2, 2, None]),  # by their text, not by their place
    ([(DOWN,), ("Linear",)], [DOWN], [2, 2, None, 2, 2]),
    ([("Linear", "re:.*mlp"), (DOWN,)], ["lm_head"], [1, 1, 2, 1, None]),
]  # groups, ignore, and which group each of MODULES is in; None for dense


def targeting(groups: list[tuple[str, ...]], ignore: list[str]) -> dict[str, Any]:
    """Group i has group size 16 * i, so that one sees which was taken."""
    return config(*(int4_group(16 * (i + 1), *targets) for i, targets in enumerate(groups)), ignore=ignore)


def our_answer(values: dict[str, Any]) -> list[int | None]:
    return [stored(values, module, 16 * 60).group_size for module in MODULES]


@pytest.mark.parametrize(("groups", "ignore", "taken"), TARGETING)
def test_targets(groups: list[tuple[str, ...]], ignore: list[str], taken: list[int | None]) -> None:
    assert our_answer(targeting(groups, ignore)) == [None if group is None else 16 * group for group in taken]


@pytest.mark.parametrize(("groups", "ignore", "taken"), TARGETING)
def test_the_package_agrees_on_targets(groups: list[tuple[str, ...]], ignore: list[str], taken: list[int | None]) -> None:
    assert packages_answer(targeting(groups, ignore)) == [None if group is None else 16 * group for group in taken]


def packages_answer(values: dict[str, Any]) -> list[int | None]:
    """The group sizes that the compressed-tensors package gives MODULES."""
    match = pytest.importorskip("compressed_tensors.utils.match", reason="compressed-tensors is not installed")
    import torch

    linear = torch.nn.Linear(1, 1)
    sizes = {target: entry["weights"]["group_size"] for entry in values["config_groups"].values() for target in entry["targets"]}
    answer: list[int | None] = []
    for module in MODULES:
        quantized = match.is_match(module, linear, list(sizes), values["ignore"])
        answer.append(sizes[match.match_targets(module, linear, list(sizes))[0]] if quantized else None)
    return answer


TARGETS = st.sampled_from(["Linear", "Embedding", Q, DOWN, "lm_head", "re:.*mlp", "re:.*down", "re:model", "re:down", "q_proj", "re:.*0"])


@settings(deadline=None, max_examples=100)
@given(targets=st.lists(TARGETS, min_size=1, max_size=5, unique=True), ignore=st.lists(TARGETS, max_size=2))
def test_targets_are_chosen_as_the_package_does(targets: list[str], ignore: list[str]) -> None:
    values = targeting([(target,) for target in targets], ignore)
    assert our_answer(values) == packages_answer(values)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (None, None),
        ({}, None),
        (KV8, KVCacheFormat("fp8_e4m3", "tensor", dynamic=False)),
        ({**KV8, "dynamic": True}, KVCacheFormat("fp8_e4m3", "tensor", dynamic=True)),
        ({**KV8, "strategy": "attn_head"}, KVCacheFormat("fp8_e4m3", "head", dynamic=False)),
        ({**KV8, "type": "int"}, KVCacheFormat("int8", "tensor", dynamic=False)),
    ],
)
def test_kv_cache(scheme: dict[str, Any] | None, expected: KVCacheFormat | None) -> None:
    assert read(config(group(INT4), kv_cache_scheme=scheme)).kv_cache == expected


def test_a_quantized_cache_beside_dense_weights() -> None:
    found = read(config(form="dense", kv_cache_scheme=KV8))
    assert found.for_linear(Q, in_features=3, out_features=3) == DENSE
    assert (found.kv_cache, found.weight_types) == (KVCacheFormat("fp8_e4m3", "tensor", dynamic=False), frozenset())


@pytest.mark.parametrize("status", [None, "compressed", "frozen"])
@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
def test_status_of_formats_with_one_weight_name(status: str | None, form: str) -> None:
    assert stored(config(group(FLOAT8), form=form, quantization_status=status)).layout == "float-quantized"


@pytest.mark.parametrize(
    "more",
    [
        {"sparsity_config": {}},
        {"sparsity_config": None, "transform_config": None},
        {"sparsity_config": {"format": "dense"}, "transform_config": {}},
        {"transform_config": {"config_groups": {}}, "global_compression_ratio": 1.5, "version": "0.20.0", "quantization_status": None},
    ],
)
def test_keys_that_ask_for_nothing(more: dict[str, Any]) -> None:
    assert stored(config(group(INT4), **more)) == PACKED


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (config(group(INT4), form="nvfp4-pack-quantized"), "quantization_config.format='nvfp4-pack-quantized' is not supported"),
        (config(group(INT4), form="mxfp4-pack-quantized"), "'mxfp4-pack-quantized' is not supported"),
        (config(group(INT4), form="mxfp8-quantized"), "'mxfp8-quantized' is not supported"),
        (config(group(INT4), form="marlin-24"), "'marlin-24' is not supported"),
        (config(group(INT4), form="dense"), "'dense' is not supported"),
        (config(group(INT4), form="fakequant"), "'fakequant' is not supported"),
        (config(group(INT4), form=None), "format is missing: it must be one of pack-quantized"),
        (config(group(INT4), form="mixed-precision"), "config_groups.group_0.format is missing"),
        (config(group(INT4, format="marlin-24")), "config_groups.group_0.format='marlin-24'"),
        (
            config(group(INT4), quantization_status="frozen"),
            "quantization_status='frozen' is not supported: the weights are not compressed",
        ),
        (config(group(INT4), quantization_status="initialized"), "save_compressed=True"),
        (config(group(FLOAT8), form="float-quantized", quantization_status="calibration"), "save_compressed=True"),
        (config(group(INT4), quantization_status="done"), "quantization_status='done'"),
        (config(group(INT4), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format='sparse-24-bitmask'"),
        (config(group(INT4), transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), "transform_config="),
        (config(group(INT4), moe_sparsity_config={"method": "prune"}), "moe_sparsity_config="),
        (config(group(None)), "config_groups.group_0.weights is missing"),
        (config({**group(INT4), "output_activations": TOKEN8}), "output_activations="),
        (config({**group(INT4), "targets": []}), "config_groups.group_0.targets is missing"),
        (config({**group(INT4), "targets": "Linear"}), "targets='Linear' is a str, but must be a list of strings"),
        (config({**group(INT4), "foo": 1}), "config_groups.group_0.foo=1 is an unknown key"),
        (config(config_groups={"W4A16": ["Linear"]}), "preset"),
        (config(config_groups={"a": 4}), "a=4 is a int, but must be an object"),
        (config(config_groups=[1]), "config_groups=[1] is a list, but must be an object"),
        (config(group(INT4), ignore=["re:("]), "'(' is no regular expression"),
        (config(group(INT4, targets=("re:[",))), "'[' is no regular expression"),
        (config(int4_group(32, "Linear"), int4_group(64, "Linear")), "another group has too"),
        (config(group({**INT4, "num_bits": 5})), "num_bits=5 is not supported: it must be one of 2, 3, 4, 8"),
        (config(group({**INT4, "num_bits": "4"})), "num_bits='4' is a str"),
        (config(group({**INT4, "num_bits": None})), "num_bits is missing"),
        (config(group({**INT4, "type": "float"})), "type='float' contradicts the format pack-quantized"),
        (config(group({**INT4, "strategy": "block"})), "strategy='block' is not supported: it must be one of tensor, channel, group"),
        (config(group({**INT4, "strategy": "tensor_group"})), "'tensor_group'"),
        (config(group({**INT4, "group_size": None})), 'group_size=None contradicts strategy="group"'),
        (config(group({**INT4, "group_size": 0})), "group_size=0 is no group size"),
        (config(group({**INT4, "strategy": "channel"})), "group_size=64 contradicts strategy='channel'"),
        (config(group({**INT4, "block_structure": [1, 1]})), "block_structure=[1, 1] contradicts strategy='group'"),
        (config(group({**INT4, "actorder": "random"})), "actorder='random'"),
        (config(group({**INT4, "actorder": "group", "strategy": "channel", "group_size": -1})), "actorder='group' contradicts"),
        (config(group({**INT4, "dynamic": True})), "weights.dynamic=True"),
        (config(group({**INT4, "scale_dtype": "torch.uint8"})), "scale_dtype='torch.uint8'"),
        (config(group({**INT4, "symmetric": False, "strategy": "tensor", "group_size": None})), "symmetric=False"),
        (config(group({**INT4, "is_new": 1})), "weights.is_new=1 is an unknown key"),
        (config(group({**INT8, "num_bits": 4}), form="int-quantized"), "num_bits=4 is not supported: it must be 8"),
        (config(group({**INT8, "symmetric": False}), form="int-quantized"), "symmetric=False"),
        (config(group({**INT8, "strategy": "group", "group_size": 64}), form="int-quantized"), "strategy='group'"),
        (config(group(INT8), form="float-quantized"), "type='int' contradicts the format float-quantized"),
        (config(group({**FLOAT8, "num_bits": 4}), form="float-quantized"), "num_bits=4"),
        (config(group({**FLOAT8, "strategy": "group", "group_size": 64}), form="float-quantized"), "strategy='group'"),
        (config(group({**FLOAT8, "strategy": "block"}), form="float-quantized"), "block_structure=None contradicts strategy='block'"),
        (config(group(INT4, {**TOKEN_INT8, "num_bits": 4})), "input_activations.num_bits=4 is not supported: it must be 8"),
        (config(group(INT4, {**TOKEN_INT8, "dynamic": "local"})), "dynamic='local' is not supported"),
        (config(group(INT4, {**TOKEN_INT8, "dynamic": False})), "dynamic=False contradicts strategy='token'"),
        (
            config(group(INT4, {**TOKEN_INT8, "strategy": "channel"})),
            "strategy='channel' is not supported: it must be one of tensor, token",
        ),
        (config(group(FLOAT8, {**TOKEN8, "symmetric": False}), form="float-quantized"), "input_activations.symmetric=False"),
        (
            config(group(INT8, {**TOKEN_INT8, "strategy": "tensor", "dynamic": False, "symmetric": False}), form="int-quantized"),
            "input_activations.symmetric=False",
        ),
        (config(kv_cache_scheme={**KV8, "num_bits": 4}), "kv_cache_scheme.num_bits=4"),
        (config(kv_cache_scheme={**KV8, "symmetric": False}), "kv_cache_scheme.symmetric=False"),
        (config(kv_cache_scheme={**KV8, "strategy": "token"}), "strategy='token' is not supported: it must be one of tensor, attn_head"),
        (config(kv_cache_scheme={**KV8, "strategy": "attn_head", "dynamic": True}), "dynamic=True contradicts strategy='attn_head'"),
    ],
)
def test_refusals_name_file_key_and_value(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)) as caught:
        read(values)
    assert "m/config.json: quantization_config." in str(caught.value)


def test_groups_must_divide() -> None:
    with pytest.raises(CheckpointError, match="group_size=128 does not divide its 576 input features: quantize with group_size 64"):
        stored(config(int4_group(128, "Linear")))
    assert stored(config(int4_group(128, "Linear")), "lm_head") == DENSE


@pytest.mark.parametrize(
    ("preset", "form", "expected"),
    [
        ("W4A16", "pack-quantized", "pack-quantized int4, groups of 128"),
        ("W4A16_ASYM", "pack-quantized", "pack-quantized int4, groups of 128, asymmetric"),
        ("W8A16", "pack-quantized", "pack-quantized int8, groups of 128"),
        ("W8A8", "int-quantized", "int-quantized int8, per channel, activations int8 per token, dynamic"),
        ("FP8", "float-quantized", "float-quantized fp8, per tensor, activations fp8_e4m3 per tensor, static"),
        ("FP8_DYNAMIC", "float-quantized", "float-quantized fp8, per channel, activations fp8_e4m3 per token, dynamic"),
        ("FP8_BLOCK", "float-quantized", "float-quantized fp8, blocks of 128x128, activations fp8_e4m3 per group of 128, dynamic"),
    ],
)
def test_what_the_package_writes_for_its_presets(preset: str, form: str, expected: str) -> None:
    package = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    written = package.QuantizationConfig(
        config_groups={preset: ["Linear"]}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    assert stored(written.model_dump(mode="json"), k=1024).describe() == expected
