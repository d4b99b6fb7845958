"""What other engines look for in a folder that Octavo wrote: configs that transformers reads again, names under which linears stay."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from octavo.calibration.out_folder import check_out
from octavo.calibration.quantize_cli import main
from octavo.calibration.quantize_run import plan, quantize
from octavo.calibration.recipe import Recipe
from octavo.calibration.routers import find_routers
from octavo.calibration.sites import find_sites

from .architectures import ARCHITECTURES, VOCAB
from .test_quantize import FAST, llama, text, with_tokenizer

__all__ = ["llama", "text"]


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return content


def test_the_config_stays_as_transformers_wrote_it(text: Path, tmp_path: Path) -> None:
    """Rotary settings by kind of layer have no second spelling."""
    scaled = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    kinds = ["sliding_attention", "full_attention"]
    model = with_tokenizer("gemma3_text", tmp_path / "model", head_dim=16, rope_parameters=scaled, layer_types=kinds)
    out = tmp_path / "out"
    quantize(str(model), out, **FAST, method="rtn", calibration=str(text))
    assert transformers.AutoConfig.from_pretrained(out).rope_parameters == transformers.AutoConfig.from_pretrained(model).rope_parameters
    written = json.loads((out / "config.json").read_text())
    written.pop("quantization_config")
    assert written == json.loads((model / "config.json").read_text())


def test_a_linear_as_wide_as_a_group_is_no_channel(text: Path, tmp_path: Path) -> None:
    model = with_tokenizer("llama", tmp_path / "model", intermediate_size=128)
    result = quantize(
        str(model),
        tmp_path / "out",
        samples=8,
        seqlen=32,
        measure_speed=False,
        method="rtn",
        format="compressed-tensors",
        calibration=str(text),
    )
    assert result.group_size == 64
    weights = config_of(tmp_path / "out")["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("group", 64)


@pytest.mark.parametrize("form", ["awq", "gptq", "compressed-tensors"])
def test_linears_outside_the_blocks_are_named(form: str, text: Path, tmp_path: Path) -> None:
    model = with_tokenizer("opt", tmp_path / "model", word_embed_proj_dim=32, ffn_dim=96)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "vision.tower.proj.weight": torch.ones(8, 8)}, model / "model.safetensors", metadata={"format": "pt"})
    quantize(str(model), tmp_path / "out", **FAST, method="rtn", format=form, calibration=str(text))
    config = config_of(tmp_path / "out")
    for name in ("model.decoder.project_in", "model.decoder.project_out", "vision.tower.proj"):
        if form == "gptq":
            assert any(re.match(rule.removeprefix("-:"), name) for rule in config["dynamic"])
        else:
            assert name in config["modules_to_not_convert" if form == "awq" else "ignore"]


def test_experts_left_wide_are_named_as_one(text: Path, tmp_path: Path) -> None:
    model = with_tokenizer("mixtral", tmp_path / "model")
    options = {**FAST, "method": "rtn", "calibration": str(text), "ignore": (r"layers\.0\.mlp\.experts",)}
    quantize(str(model), tmp_path / "awq", **options)
    named = config_of(tmp_path / "awq")["modules_to_not_convert"]
    assert any(name.endswith("layers.0.mlp.experts") or name.endswith("layers.0.block_sparse_moe.experts") for name in named)
    quantize(str(model), tmp_path / "gptq", **options, format="gptq")
    rules = [rule.removeprefix("-:") for rule in config_of(tmp_path / "gptq")["dynamic"]]
    names = [f"{prefix}layers.0.{moe}.experts" for prefix in ("model.", "language_model.model.") for moe in ("mlp", "block_sparse_moe")]
    assert sum(any(re.match(rule, name) for rule in rules) for name in names) >= 2


@pytest.mark.parametrize("pattern", [r"q_proj$", r"layers\.1\.mlp\.up_proj"])
def test_a_part_of_what_engines_join_is_not_left_out(pattern: str, llama: Path) -> None:
    with pytest.raises(ValueError, match=r"which engines compute as one, model.layers.\d.*(qkv_proj|gate_up_proj): leave out all of them"):
        plan(str(llama), Recipe(method="rtn", group_size=16, calibration="x.txt", seqlen=32, ignore=(pattern,)))


class _Block(nn.Module):
    """Two experts, a shared expert with as many outputs as there are experts, and such a linear before them."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=draw))

        self.k_proj = nn.Linear(16, 8, bias=False)
        self.k_proj.weight = random(8, 16)
        self.back = nn.Linear(8, 16, bias=False)
        self.back.weight = random(16, 8)
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(16, 8, bias=False)
        self.mlp.gate.weight = random(8, 16)
        self.mlp.shared = nn.Linear(16, 8, bias=False)
        self.mlp.shared.weight = random(8, 16)
        self.mlp.experts = nn.Module()
        self.mlp.experts.down = random(8, 16, 16)

    def forward(self, hidden: torch.Tensor, *, dense: bool = False) -> torch.Tensor:
        hidden = hidden + self.back(self.k_proj(hidden))
        chosen = self.mlp.gate(hidden).argmax(-1)
        out = hidden + self.back(self.mlp.shared(hidden))
        if dense:
            return out + torch.bmm(hidden.expand(8, -1, -1), self.mlp.experts.down.mT).sum(0)
        for expert in range(8):
            rows = chosen == expert
            if rows.any():
                out[rows] += nn.functional.linear(hidden[rows], self.mlp.experts.down[expert])
        return out


@torch.no_grad()
def test_what_merely_has_as_many_outputs_as_there_are_experts_is_no_router() -> None:
    block, hidden = _Block().requires_grad_(False), torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in block.named_parameters()}
    sites = find_sites(block, lambda: block(hidden.clone()))
    assert [str(site) for site in find_routers(block, sites, lambda: block(hidden.clone()))] == ["mlp.gate"]
    dense = find_routers(block, sites, lambda: block(hidden.clone(), dense=True))  # there nothing tells which it is
    assert [str(site) for site in dense] == ["mlp.gate", "mlp.shared"]
    assert all(torch.equal(before[name], value) for name, value in block.named_parameters())


def test_kv_scales_go_where_the_checkpoint_has_its_attention(text: Path, tmp_path: Path) -> None:
    options = {**FAST, "method": "rtn", "format": "compressed-tensors", "kv_cache": "fp8", "calibration": str(text)}
    model = with_tokenizer("exaone" if "exaone" in ARCHITECTURES else "llama", tmp_path / "model")
    quantize(str(model), tmp_path / "out", **options)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    scales = {name for name in names if name.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 4
    assert all(any(other.startswith(name.rpartition(".")[0] + ".") for other in names - scales) for name in scales)
    hybrid = with_tokenizer("lfm2", tmp_path / "hybrid")
    quantize(str(hybrid), tmp_path / "half", **options)  # the blocks without attention have none
    assert any(name.endswith(".k_scale") for name in load_file(tmp_path / "half" / "model.safetensors"))
    with pytest.raises(ValueError, match="calls no attention"):
        plan(
            str(with_tokenizer("mamba", tmp_path / "mamba")),
            Recipe(**{k: v for k, v in options.items() if k in ("method", "format", "kv_cache", "calibration")}, seqlen=32, group_size=16),
        )
    with pytest.raises(ValueError, match="caches latent vectors"):
        plan(
            str(with_tokenizer("deepseek_v3", tmp_path / "latent")),
            Recipe(**{k: v for k, v in options.items() if k in ("method", "format", "kv_cache", "calibration")}, seqlen=32, group_size=16),
        )


_FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
_BIGCODE = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}


@pytest.mark.parametrize(
    ("name", "changes", "hindrance"),
    [
        ("falcon", _FALCON, "is a FalconLinear, and it runs quantized weights in plain linears alone"),
        ("gpt_bigcode", _BIGCODE, "the initialisation of GPTBigCodeForCausalLM wants weights"),
        ("mamba", {}, "the initialisation of MambaForCausalLM wants weights"),
        ("lfm2", {}, None),
        ("deepseek_v3", {}, None),
    ],
)
def test_what_transformers_does_not_load_is_told(
    name: str, changes: dict[str, Any], hindrance: str | None, text: Path, tmp_path: Path
) -> None:
    model = with_tokenizer(name, tmp_path / "model", **changes)
    result = quantize(str(model), tmp_path / "out", **FAST, method="rtn", format="compressed-tensors", calibration=str(text))
    told = [note for note in result.notes if "transformers does not load this folder" in note]
    assert len(told) == (hindrance is not None)
    assert all(str(hindrance) in note for note in told)
    assert set(told) <= set(plan(str(model), result.recipe).notes)  # before hours of work
    with nullcontext() if hindrance is None else pytest.raises(AttributeError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_another_models_tokenizer(text: Path, tmp_path: Path) -> None:
    model = with_tokenizer("llama", tmp_path / "model", vocab_size=100, bos_token_id=1)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, and the model knows 100: this is another model's tokenizer"):
        quantize(str(model), tmp_path / "out", **FAST, method="rtn", calibration=str(text))


def test_a_model_that_is_not_served_writes_text_up_to_its_context(tmp_path: Path) -> None:
    model = with_tokenizer("opt", tmp_path / "model", ffn_dim=96, max_position_embeddings=48)
    quantize(str(model), tmp_path / "out", samples=2, seqlen=48, group_size=16, method="rtn", measure_speed=False)


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    model = with_tokenizer("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", "auto_map": code}))
    (model / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="comes as code beside the weights, which Octavo does not run"):
        plan(str(model), Recipe(calibration="x.txt"))


def test_nothing_to_resume(llama: Path, text: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "out", **FAST, method="rtn", calibration=str(text))
    with pytest.raises(ValueError, match="holds a model and no unfinished run: there is nothing to resume"):
        check_out(tmp_path / "out", resume=True)


def test_what_nobody_foresaw_is_told_in_a_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.calibration.quantize_run.FloatModel", lambda *_: {}["surprise"])
    assert main(["--model-path", str(llama), "--out", str(tmp_path / "out"), "--calibration", "x.txt"]) == 1
    told = capsys.readouterr().err
    assert "unexpected: KeyError ('surprise') at " in told
    assert "Traceback" not in told
