"""What `octavo.quantize` refuses: models, folders and recipes, before work starts or when it is seen; and what reads back differently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.calibration.quantize_run import plan, quantize
from octavo.calibration.recipe import Recipe
from octavo.calibration.verify import VerificationError

from .test_quantize import FAST, SMALL, llama, text

__all__ = ["llama", "text"]


def test_a_group_size_that_does_not_fit_names_every_linear(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"group size 64 does not divide the inputs of 2 linears; 32, 16 or -1 would:\n.*0.mlp.down_proj: 96 inputs\n.*1.mlp",
    ) as told:
        quantize(str(llama), tmp_path / "out", method="gptq", group_size=64, seqlen=32)
    assert "q_proj" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_context(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seqlen 512 is beyond the model's context of 128 tokens: give --seqlen 128 or less"):
        quantize(str(llama), tmp_path / "out", group_size=16, seqlen=512)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calibration", ["self", "file"])
def test_a_context_that_is_shorter_than_usual_rows(calibration: str, llama: Path, text: Path, tmp_path: Path) -> None:
    given = str(text) if calibration == "file" else "self"
    done = quantize(str(llama), tmp_path / "out", method="rtn", group_size=16, samples=8, calibration=given, measure_speed=False)
    assert done.recipe.seqlen == 128
    assert done.quality.num_tokens == 127  # one row was held back


def test_a_folder_that_is_not_empty(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(notes.txt\)"):
        quantize(str(llama), tmp_path)


def test_a_model_that_is_quantized_already(llama: Path, text: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "once", **FAST, method="rtn", calibration=str(text))
    with pytest.raises(ValueError, match=r"is quantized already \(awq"):
        quantize(str(tmp_path / "once"), tmp_path / "twice", **FAST)


@pytest.mark.parametrize(("value", "block"), [(float("nan"), 0), (float("inf"), 1)])
def test_weights_that_are_no_numbers(value: float, block: int, llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.{block}.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"model.layers.{block}.mlp.up_proj.weight holds 1 .* NaN or infinite"):
        quantize(str(folder), tmp_path / "out", **FAST, method="gptq", calibration=str(text))
    assert (tmp_path / "out").exists() == (block > 0)  # where no block was done, there is nothing to go on with


def test_a_block_that_is_not_whole_is_seen_before_the_work(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    recipe = Recipe(method="gptq", calibration=str(text), samples=8, seqlen=32, group_size=16)
    save_file({**weights, name: weights[name][:-8].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.weight has another shape than the config says"):
        plan(str(folder), recipe)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint lacks .*up_proj.weight, which LlamaForCausalLM needs"):
        plan(str(folder), recipe)


def test_what_reads_back_differently_is_an_error(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.calibration import output

    pack = output.pack_module

    def wrong(weight: Any, recipe: Any) -> Any:
        tensors = pack(weight, recipe)
        return {**tensors, "scales": tensors["scales"] * 2}

    monkeypatch.setattr(output, "pack_module", wrong)
    with pytest.raises(VerificationError, match="reads back differently"):
        quantize(str(llama), tmp_path / "out", **FAST, method="rtn", calibration=str(text))


def test_a_full_disk_is_seen_before_the_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.calibration import plan as planning

    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"has 0.0 MiB free, and this run needs about"):
        quantize(str(llama), tmp_path / "out", **FAST)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "awk"}, "method 'awk' is not valid: .*did you mean awq"),
        ({"grupsize": 4}, "a recipe has no 'grupsize'; did you mean 'group_size'"),
        ({"bits": 3}, "bits 3 cannot be written as compressed-tensors"),
        (
            {"format": "awq", "bits": 8},
            "bits 8 cannot be written as awq: awq holds 4; gptq holds 2, 4, 8; compressed-tensors holds 4, 8",
        ),
        ({"format": "awq", "symmetric": True}, "awq is read with zero points everywhere"),
        ({"method": "fp8", "format": "awq"}, "method fp8 is written as compressed-tensors"),
        ({"samples": 0}, "samples 0 is not valid: give at least 1"),
        ({"seqlen": 4}, "seqlen 4 is not valid: give at least 16"),
        ({"group_size": 3}, "group_size 3 is not valid"),
        ({"ignore": ("(",)}, "is no regular expression"),
        ({"max_kl": -1.0}, "max_kl -1.0 is not valid"),
        ({"kv_cache": "fp8", "format": "awq"}, "choose that format"),
        ({"method": "int8", "activations": "static"}, "are fp8's"),
        ({"method": "awq", "weight_scales": "tensor"}, "are fp8's: leave them out with method awq"),
        ({"method": "fp8", "group_size": 64}, "method fp8 has no groups"),
        ({"method": "best", "effort": "fast"}, "takes the best effort"),
        (
            {"method": "fp8", "weight_scales": "block", "seqlen": 32},
            r"do not divide 14 linears; .*\n  model.layers.0.self_attn.q_proj: 64 x 64",
        ),
        ({"method": "fp8", "weight_scales": "block", "activations": "static"}, "goes with dynamic inputs"),
        ({"calibration": "no-such-file.txt", "group_size": 16, "seqlen": 32}, "no-such-file.txt"),
    ],
)
def test_recipes_that_cannot_be(options: dict[str, Any], told: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        quantize(str(llama), tmp_path / "out", **options)


def test_a_model_without_a_tokenizer(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no tokenizer that transformers reads"):
        plan(str(folder), Recipe(**SMALL, calibration=str(text)))


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}))
    save_file({"shared.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^T5 is not among the models that transformers generates text with"):
        plan(str(tmp_path), Recipe(**SMALL))
