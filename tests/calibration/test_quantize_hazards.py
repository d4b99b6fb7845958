"""What goes wrong around a quantization: late errors do not lose the work, stops do not change it, files say what engines look for,
and memory goes back."""

from __future__ import annotations

import gc
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from octavo.calibration import out_folder, quantize_run
from octavo.calibration import plan as planning
from octavo.calibration.float_model import FloatModel
from octavo.calibration.kv_ranges import FP8_MAX, KVRanges
from octavo.calibration.quantize_run import quantize
from octavo.calibration.recipe import Recipe
from octavo.calibration.samples import NotEnoughTextError
from octavo.calibration.verify import DequantizingReader
from octavo.quant.checkpoint.open_reader import open_reader
from octavo.quant.checkpoint.resolve import resolve_model

from .test_quantize import FAST, digests, with_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} plus {i} is {i + i}, said {chr(97 + i % 26) * 3}.\n" for i in range(200)))
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("llama", tmp_path_factory.mktemp("llama"))


# -- late errors ------------------------------------------------------------------------------------------------------


def test_a_speed_that_cannot_be_measured_is_a_note(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("the device is out of memory")

    monkeypatch.setattr(quantize_run, "speed_of", fails)
    options = {**FAST, "measure_speed": True, "method": "rtn", "calibration": str(text)}
    result = quantize(str(llama), tmp_path / "out", **options)
    assert "speed was not measured: the device is out of memory" in result.notes
    assert (tmp_path / "out" / "config.json").exists()
    small = quantize(str(llama), tmp_path / "small", **options, max_memory=1 << 20)  # no engine may hold the whole model
    assert small.speed_before is None
    assert not any("speed" in note for note in small.notes)


def test_speed_is_measured_where_rows_fill_the_context(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {**FAST, "seqlen": 128, "measure_speed": True, "method": "rtn", "calibration": str(text)}
    result = quantize(str(llama), tmp_path / "out", **options)
    assert result.speed_after is not None
    assert result.speed_after.alone > 0


@pytest.mark.parametrize(("content", "told"), [(b"", "has 0 tokens"), ("größer".encode("latin-1") * 99, "is not UTF-8")])
def test_a_text_to_evaluate_on_is_read_before_the_work(llama: Path, text: Path, tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "eval.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"eval.txt {told}"):
        quantize(str(llama), tmp_path / "out", **FAST, calibration=str(text), eval_text=file)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_of_a_text_is_told_so_that_it_helps(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("abcdefgh" * 80)  # 20 rows of 32
    options = {**FAST, "method": "auto", "effort": "best", "calibration": str(file)}
    with pytest.raises(NotEnoughTextError, match="to measure on") as told:
        quantize(str(llama), tmp_path / "out", **{**options, "samples": 40})
    found = re.search(r"--samples (\d+)", str(told.value))
    assert found is not None
    quantize(str(llama), tmp_path / "out", **{**options, "effort": "fast", "samples": int(found[1])})


def test_paths_may_be_strings_and_texts_may_be_paths(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {**FAST, "method": "rtn", "calibration": text}
    quantize(llama, str(tmp_path / "out"), **options, report=str(tmp_path / "page.html"))
    assert "<html" in (tmp_path / "page.html").read_text()


# -- stops ------------------------------------------------------------------------------------------------------------


def test_less_memory_later_does_not_change_the_bytes(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**FAST, "method": "auto", "calibration": str(text)}
    quantize(str(llama), tmp_path / "whole", **options)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quantize_run, "tune_model", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(llama), tmp_path / "again", **options)
    monkeypatch.setattr(planning, "_available_memory", lambda: 1 << 20)
    quantize(str(llama), tmp_path / "again", **options, resume=True)
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")
    untuned = quantize(str(llama), tmp_path / "untuned", **options)
    assert any("tuning left out" in note for note in untuned.notes)


def test_a_limit_may_change_when_a_run_goes_on(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**FAST, "method": "gptq", "calibration": str(text)}
    with monkeypatch.context() as patched:
        patched.setattr(quantize_run, "write_weights", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(str(llama), tmp_path / "out", **options)
    result = quantize(str(llama), tmp_path / "out", **options, resume=True, max_memory=1 << 30, max_kl=10.0)
    assert result.holds


def test_another_version_does_not_go_on(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**FAST, "method": "gptq", "calibration": str(text)}
    with monkeypatch.context() as patched:
        patched.setattr(quantize_run, "version_of_code", lambda: "0.0.1 (0123abcd)")
        patched.setattr(quantize_run, "write_weights", _stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(llama), tmp_path / "out", **options)
    with pytest.raises(ValueError, match="an unfinished run with another version of octavo"):
        quantize(str(llama), tmp_path / "out", **options, resume=True)


def _stopped(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_a_stop_while_files_are_moved(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, moved = tmp_path / "out", []
    options = {**FAST, "method": "rtn", "calibration": str(text)}

    def move(source: Path, target: Path) -> None:
        if target.parent == out:
            moved.append(target.name)
            if len(moved) == 2:
                raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(out_folder.os, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(llama), out, **options)
    assert not (out / "config.json").exists()  # it goes last: no engine takes half a model
    quantize(str(llama), out, **options, resume=True)
    assert not (out / ".quantize").exists()
    quantize(str(llama), tmp_path / "whole", **options)
    assert digests(out) == digests(tmp_path / "whole")


# -- what engines look for --------------------------------------------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_routers_are_named_among_what_stays(text: Path, tmp_path: Path) -> None:
    folder = with_tokenizer("qwen2_moe", tmp_path / "model")
    result = quantize(str(folder), tmp_path / "ct", **FAST, method="rtn", format="compressed-tensors", calibration=str(text))
    assert {f"model.layers.{i}.mlp.gate" for i in range(2)} <= set(config_of(tmp_path / "ct")["ignore"])
    assert "model.layers.0.mlp.gate" in result.kept
    quantize(str(folder), tmp_path / "awq", **FAST, method="rtn", calibration=str(text))
    assert "model.layers.1.mlp.gate" in config_of(tmp_path / "awq")["modules_to_not_convert"]


def test_what_stays_has_the_checkpoints_names(text: Path, tmp_path: Path) -> None:
    folder = with_tokenizer("mixtral", tmp_path / "model")
    options = {**FAST, "method": "rtn", "format": "compressed-tensors", "calibration": str(text)}
    quantize(str(folder), tmp_path / "out", **options, ignore=(r"layers\.0\.",))
    kept = set(config_of(tmp_path / "out")["ignore"])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.removesuffix(".weight") for name in written if "layers.0." in name and written[name].dim() > 1} <= kept
    assert not any("[" in path for path in kept)
    assert "model.layers.0.self_attn.qkv_proj" in kept  # as engines call what they fuse
    with pytest.raises(ValueError, match=r"some experts of .* which are one tensor"):
        quantize(str(folder), tmp_path / "some", **options, ignore=(r"\[2\]",))


def test_gptqs_rules_match_fused_modules(llama: Path, text: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "out", **FAST, method="gptq", format="gptq", ignore=(r"layers\.0\.",), calibration=str(text))
    rules = [rule.removeprefix("-:") for rule in config_of(tmp_path / "out")["dynamic"]]
    for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        assert any(re.match(rule, f"model.layers.0.{module}") for rule in rules)
        assert not any(re.match(rule, f"model.layers.1.{module}") for rule in rules)


def test_scales_of_the_kv_cache_hold_what_the_written_model_makes(llama: Path, tmp_path: Path) -> None:
    out, text, row = tmp_path / "out", tmp_path / "text.txt", "a row of thirty-two characters.\n"
    text.write_text(row * 40)
    options = {**FAST, "method": "awq", "format": "compressed-tensors", "kv_cache": "fp8", "calibration": str(text)}
    quantize(str(llama), out, **options)
    written = load_file(out / "model.safetensors")
    tokens = torch.tensor([transformers.AutoTokenizer.from_pretrained(llama)(row).input_ids])
    assert tokens.shape == (1, 32)
    with DequantizingReader(out, open_reader(resolve_model(str(llama))).tensors()) as reader:
        model = FloatModel(transformers.AutoConfig.from_pretrained(llama), reader)
        model.load_all()
        for index, block in enumerate(model.blocks):
            ranges = KVRanges()
            hidden, calls = model.calls(tokens)
            for other in range(index):
                hidden = calls[other].run(model.blocks[other], hidden)
            with ranges.watching(block), torch.no_grad():
                calls[index].run(block, hidden)
            for key, largest in zip(("k_scale", "v_scale"), ranges.largest["self_attn"], strict=True):
                scale = float(written[f"model.layers.{index}.self_attn.{key}"])
                assert largest / (FP8_MAX * scale) == pytest.approx(1 / 1.05, rel=1e-3)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ignore": ("no_such_proj",)}, "'no_such_proj' matches no linear of the model: they are called model.layers.0"),
        ({"method": "int8", "symmetric": False}, "method int8 is symmetric"),
        ({"method": "fp8", "effort": "best"}, "method fp8 knows no effort"),
    ],
)
def test_options_that_would_do_nothing(options: dict[str, Any], told: str, llama: Path, text: Path, tmp_path: Path) -> None:
    size = {} if options.get("method") in ("int8", "fp8") else {"group_size": 16}
    with pytest.raises(ValueError, match=re.escape(told)):
        quantize(str(llama), tmp_path / "out", samples=8, seqlen=32, **size, **options, calibration=str(text))


def test_configs_of_transformers_that_are_not_taken() -> None:
    with pytest.raises(ValueError, match="method awq is not taken"):
        Recipe.from_gptq_config(transformers.AwqConfig(bits=4))
    with pytest.raises(ValueError, match="modules_in_block_to_quantize"):
        Recipe.from_gptq_config(transformers.GPTQConfig(bits=4, desc_act=False, modules_in_block_to_quantize=[["q_proj"]]))
    assert Recipe.from_gptq_config(transformers.GPTQConfig(bits=4, desc_act=False, dataset="c4")).calibration == "allenai/c4:en"


def _live_floats() -> dict[int, tuple[int, ...]]:
    """Shapes of the float32 tensors of some size that this process holds, by identity."""
    gc.collect()
    tensors = (found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter))
    return {id(one): tuple(one.shape) for one in tensors if not one.is_meta and one.dtype == torch.float32 and one.numel() >= 2048}


def test_nothing_of_the_original_is_held_while_both_models_are(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, measure, given_back = _live_floats(), quantize_run.by_engine, []

    def looked(*args: Any, **options: Any) -> Any:
        assert {shape for key, shape in _live_floats().items() if key not in before} == set()
        assert len(given_back) >= 4, "after the samples, the blocks, the writing and the verifying"
        return measure(*args, **options)

    monkeypatch.setattr(quantize_run, "by_engine", looked)
    monkeypatch.setattr(quantize_run, "give_back_memory", lambda: given_back.append(1))
    quantize(str(llama), tmp_path / "out", calibration=str(text), method="gptq", **FAST)
