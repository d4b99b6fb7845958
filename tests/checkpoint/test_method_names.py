"""Names for --quantization: synonyms, and whether one fits the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from octavo.quant.checkpoint.method_names import canonical_method, check_method

CONFIG = Path("m") / "config.json"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("awq", "awq"),
        ("AWQ_Marlin", "awq"),
        ("awq-gemm", "awq"),
        ("auto_awq", "awq"),
        ("gptq_marlin", "gptq"),
        ("auto-gptq", "gptq"),
        ("gptqmodel", "gptq"),
        ("compressed_tensors", "compressed-tensors"),
        ("compressed-tensors", "compressed-tensors"),
        ("w8a8_fp8", "fp8"),
        ("fp8_per_channel", "fp8"),
        ("w8a8_int8", "int8"),
        ("w4a16", "int4"),
        ("modelopt_fp8", "modelopt"),
        ("gguf", "gguf"),
        (" auto ", "auto"),
        ("none", "none"),
        ("dense", "none"),
        ("unquantized", "none"),
        ("unquant", "none"),
    ],
)
def test_synonyms(name: str, method: str) -> None:
    assert canonical_method(name) == method
    assert canonical_method(method) == method


@pytest.mark.parametrize(("name", "hint"), [("apq", "'awq'"), ("gptqq", "'gptq'"), ("fp8_per_tensor", "'fp8"), ("int-8", "'int8'")])
def test_the_nearest_name_is_offered(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"quantization {name!r} is not known. Did you mean {hint}")) as caught:
        canonical_method(name)
    assert "Known: auto, none, fp8, int8, int4, awq, gptq, compressed-tensors, modelopt, gguf" in str(caught.value)


@pytest.mark.parametrize("name", ["", "bitsandbytes", "marlin", "mxfp4"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"quantization '{name}' is not known"):
        canonical_method(name)


@pytest.mark.parametrize(
    ("flag", "method", "types"),
    [
        ("auto", None, set()),
        ("auto", "awq", {"int4"}),
        ("none", None, set()),
        ("fp8", None, set()),
        ("w8a8_int8", None, set()),
        ("int4", None, set()),
        ("awq_marlin", "awq", {"int4"}),
        ("gptq_marlin", "gptq", {"int8"}),
        ("modelopt_fp8", "modelopt", {"fp8"}),
        ("gguf", "gguf", set()),
        ("fp8", "fp8", {"fp8"}),
        ("fp8", "compressed-tensors", {"fp8"}),
        ("fp8", "modelopt", {"fp8"}),
        ("int8", "compressed-tensors", {"int8"}),
        ("int4", "awq", {"int4"}),
        ("int4", "gptq", {"int4"}),
        ("int4", "compressed-tensors", {"int4", "fp8"}),
    ],
)
def test_a_flag_that_fits(flag: str, method: str | None, types: set[str]) -> None:
    check_method(flag, method, CONFIG, weight_types=types)


@pytest.mark.parametrize(
    ("flag", "method", "types"),
    [
        ("awq", "gptq", {"int4"}),
        ("gptq", "awq", {"int4"}),
        ("awq", "compressed-tensors", {"int4"}),
        ("none", "awq", {"int4"}),
        ("fp8", "awq", {"int4"}),
        ("int4", "gptq", {"int8"}),
        ("int8", "compressed-tensors", {"fp8"}),
        ("compressed-tensors", "fp8", {"fp8"}),
        ("modelopt", "fp8", {"fp8"}),
        ("int4", "gguf", set()),
    ],
)
def test_a_flag_that_contradicts(flag: str, method: str, types: set[str]) -> None:
    with pytest.raises(ValueError, match=f"--quantization {flag} contradicts the checkpoint, which is {method}") as caught:
        check_method(flag, method, CONFIG, weight_types=types)
    assert str(CONFIG) in str(caught.value)


@pytest.mark.parametrize("flag", ["awq", "gptq_marlin"])
def test_a_dense_model_must_be_quantized_first(flag: str) -> None:
    method = canonical_method(flag)
    with pytest.raises(ValueError, match=re.escape(f"octavo quantize --model-path m --method {method} --out DIR")):
        check_method(flag, None, CONFIG)
    with pytest.raises(ValueError, match="--model-path MODEL"):
        check_method(flag, None, None)


@pytest.mark.parametrize("flag", ["compressed-tensors", "modelopt", "gguf"])
def test_a_dense_model_cannot_become_a_checkpoint_format(flag: str) -> None:
    with pytest.raises(ValueError, match=f"needs a checkpoint quantized with {flag}, but this model is dense.*fp8, int8, int4"):
        check_method(flag, None, CONFIG)
