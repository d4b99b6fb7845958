"""`octavo.quantize` end to end on tiny models: every format read back, other architectures, resuming, gates, and from Python."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from octavo import Engine
from octavo.calibration import budget, quantize_run, streams, walk
from octavo.calibration.float_model import FloatModel
from octavo.calibration.quality import by_transformers
from octavo.calibration.quantize_result import GateError
from octavo.calibration.quantize_run import plan, quantize
from octavo.calibration.recipe import Recipe
from octavo.calibration.verify import DequantizingReader
from octavo.quant.checkpoint.open_reader import open_reader
from octavo.quant.checkpoint.resolve import resolve_model

from .architectures import ARCHITECTURES, make
from .conftest import MakeModel, _write_tokenizer

SMALL: dict[str, Any] = {"samples": 8, "seqlen": 32, "group_size": 16}
EIGHT: dict[str, Any] = {"samples": 8, "seqlen": 32, "measure_speed": False}
FAST: dict[str, Any] = {**SMALL, "measure_speed": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} times {i} is {i * i}, and the word is {chr(97 + i % 26) * 3}.\n" for i in range(200)))
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("llama", tmp_path_factory.mktemp("llama"))


def with_tokenizer(name: str, folder: Path, **changes: Any) -> Path:
    make(name, folder, **changes)
    _write_tokenizer(folder, adds_bos=False, swapped=False)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


FORMS = [
    {"method": "rtn"},
    {"method": "awq"},
    {"method": "gptq", "format": "gptq"},
    {"method": "gptq", "format": "gptq", "symmetric": False},
    {"method": "gptq", "format": "gptq", "bits": 8},
    {"method": "gptq", "format": "compressed-tensors"},
    {"method": "gptq", "format": "compressed-tensors", "symmetric": False},
    {"method": "auto"},
    {"method": "rtn", "group_size": -1, "format": "compressed-tensors"},
    {"method": "fp8"},
    {"method": "fp8", "weight_scales": "tensor", "activations": "static"},
    {"method": "int8"},
    {"method": "fp8", "kv_cache": "fp8"},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_every_form_is_served_as_it_was_solved(form: dict[str, Any], llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = quantize(str(llama), out, **{**(FAST if form["method"] not in ("fp8", "int8") else EIGHT), **form}, calibration=str(text))
    assert result.verified == 0  # the folder's logits, read back by Octavo's loader
    assert len(result.modules) == 14
    assert result.quality is not None
    assert result.quality.by == "octavo"
    assert 0 < result.quality.kl_mean < 0.3
    assert not (out / ".quantize").exists()
    original = load_file(llama / "model.safetensors")
    read = DequantizingReader(out, open_reader(resolve_model(str(llama))).tensors())
    weight = original["model.layers.1.mlp.down_proj.weight"]
    if form["method"] in ("rtn", "gptq", "fp8"):  # nothing was rescaled
        assert float((read.read("model.layers.1.mlp.down_proj.weight") - weight).norm() / weight.norm()) < 0.2
    with Engine(str(out), show_progress=False) as engine:
        assert len(engine.generate("1 times", {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True})["output_ids"]) == 4


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "llama"])
def test_architectures_it_was_not_written_for(name: str, text: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(name, tmp_path / "model")
    result = quantize(str(folder), tmp_path / "out", **FAST, method="auto", calibration=str(text))
    assert result.verified <= 1e-5
    assert result.quality is not None
    assert result.quality.kl_mean < 0.2
    assert result.bits_per_weight < 6
    assert not any("router" in module or module.endswith("mlp.gate") for module in result.modules)
    experts = ARCHITECTURES[name].get("num_local_experts", ARCHITECTURES[name].get("num_experts", 0))
    if experts:
        assert sum("[" in module for module in result.modules) == 2 * 2 * experts


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_expert_has_its_static_input_scale(name: str, text: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(name, tmp_path / "model")
    quantize(str(folder), tmp_path / "out", **EIGHT, method="fp8", activations="static", calibration=str(text))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    modules = {key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")}
    assert sum("experts" in module for module in modules) == 2 * 4 * (3 if name == "mixtral" else 2)
    assert {key.removesuffix(".input_scale") for key in tensors if key.endswith(".input_scale")} == modules
    assert all(float(tensors[f"{module}.input_scale"]) > 0 for module in modules)


def test_better_methods_are_better(make_model: MakeModel, text: Path, tmp_path: Path) -> None:
    folder, _ = make_model()
    kl = {}
    for method in ("rtn", "gptq", "auto"):
        result = quantize(
            str(folder),
            tmp_path / method,
            **{**FAST, "samples": 24, "group_size": 8},
            method=method,
            calibration=str(text),
            eval_text=text,
        )
        kl[method] = result.quality.kl_mean
    assert kl["auto"] < kl["gptq"] < kl["rtn"]


def test_transformers_reads_compressed_tensors(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(str(llama), out, **FAST, method="gptq", format="compressed-tensors", calibration=str(text))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokens = torch.arange(30)[None] + 40
    with torch.no_grad():
        theirs = model(tokens).logits[0]
    with Engine(str(out), dtype="float32", show_progress=False) as engine:
        ours = torch.cat([logits for _, logits in engine.prompt_logits(tokens[0].tolist())])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "stop_at"), [("llama", 0), ("llama", 1), ("llama", "tuning"), ("gemma4_text", 3)])
def test_what_was_stopped_goes_on_to_the_same_bytes(
    name: str, stop_at: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK_TOKENS", 64)
    folder = with_tokenizer(name, tmp_path / "model")
    options = {**FAST, "method": "auto", "calibration": str(text)}
    quantize(str(folder), tmp_path / "whole", **options)

    with monkeypatch.context() as patched:
        if stop_at == "tuning":
            patched.setattr(quantize_run, "tune_model", _stop)
        else:
            solve = walk.solve_group

            def once(*args: Any) -> Any:
                if (tmp_path / "again" / ".quantize" / "default" / f"block-{stop_at - 1:05}.safetensors").exists() or not stop_at:
                    raise KeyboardInterrupt
                return solve(*args)

            patched.setattr(walk, "solve_group", once)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(folder), tmp_path / "again", **options)
    with pytest.raises(ValueError, match="--resume"):
        quantize(str(folder), tmp_path / "again", **options)
    with pytest.raises(ValueError, match=r"unfinished run with another seed \(0\): give"):
        quantize(str(folder), tmp_path / "again", **{**options, "seed": 1}, resume=True)
    quantize(str(folder), tmp_path / "again", **options, resume=True)
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_activations_on_disk_give_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {**FAST, "method": "gptq", "calibration": str(text)}
    in_memory = quantize(str(llama), tmp_path / "memory", **options)
    assert plan(str(llama), Recipe(**SMALL, calibration=str(text), max_memory=1 << 20)).on_disk
    on_disk = quantize(str(llama), tmp_path / "disk", **options, max_memory=1 << 20)
    assert digests(tmp_path / "disk") == digests(tmp_path / "memory")
    assert (in_memory.quality.by, on_disk.quality.by) == ("octavo", "transformers")  # the latter a block at a time
    assert on_disk.quality.num_tokens == in_memory.quality.num_tokens
    assert on_disk.quality.perplexity == pytest.approx(in_memory.quality.perplexity, rel=0.01)  # bfloat16 there, float32 here
    assert on_disk.quality.kl_mean == pytest.approx(in_memory.quality.kl_mean, rel=0.1)


@pytest.mark.parametrize(("rest", "measured"), [(0, 62), (5, 62), (30, 91)])
def test_transformers_measure_a_shorter_last_window(rest: int, measured: int, llama: Path) -> None:
    """As the engine does, but for a rest of fewer than 24 tokens."""
    reader = open_reader(resolve_model(str(llama)))
    model = FloatModel(transformers.AutoConfig.from_pretrained(llama), reader)
    model.load_outer()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (64 + rest,), generator=draw).tolist()
    found = by_transformers(model, model, tokens, seqlen=32, text="drawn")
    assert torch.is_grad_enabled()
    assert found.num_tokens == measured
    assert found.kl_mean == 0
    model.load_all()
    nll = torch.zeros(0)
    for at in range(0, len(tokens), 32):
        row = torch.tensor([tokens[at : at + 32]])
        if row.shape[1] < 24:
            continue
        hidden, calls = model.calls(row)
        with torch.no_grad():
            for block, call in zip(model.blocks, calls, strict=True):
                hidden = call.run(block, hidden)
            logits = model.logits(row, hidden)[0]
        nll = torch.cat([nll, torch.nn.functional.cross_entropy(logits[:-1], row[0, 1:], reduction="none")])
    assert len(nll) == measured
    assert found.perplexity == pytest.approx(float(nll.double().mean().exp()), rel=1e-5)


def test_engines_compute_with_the_threads_that_torch_was_given(llama: Path, tmp_path: Path) -> None:
    """More than OMP_NUM_THREADS, after the model wrote its text, and two runs side by side waited for each other most of the time."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        quantize(str(llama), tmp_path / "out", **SMALL, method="rtn", calibration="self")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_model_too_large_to_write_its_own_text(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write its own calibration text in 0.0 GiB: give --calibration FILE"):
        quantize(str(llama), tmp_path / "out", **FAST, max_memory=1 << 20)


def test_tuning_that_does_not_fit_is_left_out_and_said(llama: Path, text: Path, tmp_path: Path) -> None:
    result = quantize(str(llama), tmp_path / "out", **FAST, method="auto", calibration=str(text), max_memory=1 << 20)
    assert any("tuning left out" in note for note in result.notes)


def test_the_gate_fails_and_names_the_modules(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"KL is .* above 1e-06.*\n  model.layers") as failed:
        quantize(str(llama), tmp_path / "out", **FAST, method="rtn", max_kl=1e-6, calibration=str(text))
    assert failed.value.result.out == tmp_path / "out"


def test_ignored_modules_stay_and_are_named_in_the_config(llama: Path, text: Path, tmp_path: Path) -> None:
    result = quantize(str(llama), tmp_path / "out", **FAST, method="gptq", ignore=(r"layers\.0\.", "down_proj"), calibration=str(text))
    assert len(result.modules) == 6
    assert "model.layers.0.self_attn.q_proj" in result.kept
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.down_proj" in config["modules_to_not_convert"]
    assert "model.layers.0.mlp.down_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_auto_climbs_until_the_gate_holds(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_TUNING_STEPS", {"fast": 0, "default": 2, "best": 4})
    options = {**FAST, "method": "auto", "calibration": str(text)}
    fast = quantize(str(llama), tmp_path / "fast", **options, max_kl=10.0)
    assert fast.recipe.effort == "fast"
    assert len(fast.modules) == 14
    least = fast.quality.kl_mean * 0.01
    with pytest.raises(GateError) as failed:
        quantize(str(llama), tmp_path / "all", **options, max_kl=least)
    last = failed.value.result
    assert last.recipe.effort == "best"
    assert last.seconds["attempts before"] > last.seconds["blocks"]  # three of them
    assert "attempts before" not in fast.seconds
    assert len(last.modules) == 7  # the worse of the two blocks stayed as it was
    assert sorted(path.name for path in (tmp_path / "all").iterdir() if path.name.startswith(".")) == []
    with Engine(str(tmp_path / "all"), show_progress=False) as engine:
        assert engine.generate("1 times", {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True})["output_ids"]


# -- from Python ------------------------------------------------------------------------------------------------------


def test_recipes_are_the_same_again_from_json() -> None:
    recipe = Recipe(method="gptq", ignore=("a", "b"), max_kl=0.1, group_size=32)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_gptq_config_of_transformers_is_taken(llama: Path, text: Path, tmp_path: Path) -> None:
    config = transformers.GPTQConfig(bits=4, group_size=16, sym=True, dataset=None, desc_act=False)
    result = quantize(
        str(llama), tmp_path / "out", recipe=config, samples=8, seqlen=32, measure_speed=False, calibration=str(text), ignore=("down",)
    )
    assert (result.recipe.layout, result.recipe.is_symmetric, result.group_size) == ("gptq", True, 16)
    assert len(result.modules) == 12
    with pytest.raises(ValueError, match="desc_act"):
        Recipe.from_gptq_config(transformers.GPTQConfig(bits=4, group_size=16, desc_act=True))
    with pytest.raises(ValueError, match="list of texts"):
        Recipe.from_gptq_config(transformers.GPTQConfig(bits=4, dataset=["a text"], desc_act=False))


def test_a_report_holds_a_recipe_that_makes_the_same_again(llama: Path, text: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "once", **FAST, method="gptq", calibration=str(text))
    recipe = json.loads((tmp_path / "once" / "report.json").read_text())["recipe"]
    again = quantize(str(llama), tmp_path / "again", recipe=recipe, report=tmp_path / "page.html")
    files = [tmp_path / name / "model.safetensors" for name in ("once", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "once" / "config.json").stat().st_mode}
    assert (tmp_path / "page.html").exists()
    assert not (tmp_path / "again" / "report.html").exists()
    assert again.engines == ("octavo",)  # groups of 16 are no other engine's
    assert "vllm" not in (tmp_path / "again" / "README.md").read_text().split("---")[2]
    with pytest.raises(ValueError, match="give either a recipe or its fields"):
        quantize(str(llama), tmp_path / "no", recipe=recipe, bits=4)
    with pytest.raises(ValueError, match=r"'recipe\.json' is no recipe: give json\.loads"):
        quantize(str(llama), tmp_path / "no", recipe="recipe.json")
