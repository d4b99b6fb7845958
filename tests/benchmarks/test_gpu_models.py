"""Whole models timed by benchmarks/gpu/run.py: on a GPU that is interpreted, and what is kept and counted of their figures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from octavo.benchmarks.gpu import model_timings
from octavo.benchmarks.gpu.checks import Place
from octavo.benchmarks.gpu.command import main
from octavo.benchmarks.gpu.model_timings import LLAMA_8B, PEER, Load, Variant, idle_share, time_peer
from octavo.benchmarks.gpu.record import Budget
from octavo.kernels.gpu.device import DEVICES

from ..kernels.gpu.interpreter import mend

mend()
H100 = Place(torch.device("cpu"), DEVICES[90])


@pytest.mark.long
def test_models_are_timed_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine on the interpreted GPU with a model of one layer, and transformers beside it."""
    config = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 200, "max_position_embeddings": 256}
    options = {"max_total_tokens": 512, "chunked_prefill_size": 64}
    broken = Variant("broken", {**config, "num_attention_heads": 0}, options)
    load = Load(decode=((2, 20),), prefill=(40,), offline=((3, 5, 2),), steps=2)
    out = ["model", "report", "--out", str(tmp_path)]
    assert main(out, place=H100, variants=(Variant("tiny", config, options), broken), load=load) == 1
    assert "broken: " in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["model"]
    assert found["tiny"]["fault"] is None
    assert found["tiny"]["decode"]["2 x 20"]["tokens_s"] == pytest.approx(2 / found["tiny"]["decode"]["2 x 20"]["step_ms"] * 1e3)
    assert 0 < found["tiny"]["decode"]["2 x 20"]["host_ms"] <= found["tiny"]["decode"]["2 x 20"]["step_ms"]
    assert set(found["tiny"]["offline"]) == set(found[PEER]["offline"]) == {"5/2"}
    page = (tmp_path / "README.md").read_text()
    assert "| tiny | decode 2 x 20 |" in page
    assert "| tiny | prefill 40 |" in page
    assert f"| {PEER} | offline 5/2 |" in page
    assert "| broken | " in page
    before = (tmp_path / "results.json").read_text()
    assert main(out, place=H100, variants=(Variant("tiny", config, options), broken), load=load) == 1
    assert json.loads((tmp_path / "results.json").read_text())["model"] == json.loads(before)["model"], "what is known is not timed again"


def test_the_peer_may_write_what_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It steps in a thread of its own, where what was made in inference mode cannot be written: transformers 5.17 did that."""
    asked: list[bool] = []

    @contextlib.contextmanager
    def batching(self: Any, **options: Any) -> Iterator[Any]:
        asked.append(torch.is_inference_mode_enabled() or next(self.parameters()).is_inference())
        one = SimpleNamespace(is_finished=lambda: True, generated_tokens=[1, 2])
        yield SimpleNamespace(add_requests=lambda **options: None, get_result=lambda timeout: one)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "continuous_batching_context_manager", batching)
    config = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 200}
    with torch.inference_mode():  # as the parts are run
        *_, found = time_peer(Variant("tiny", config), H100, Load(offline=((3, 5, 2), (2, 5, 2))), Budget(1.0))
    assert (found["fault"], found["unfinished"], set(found["offline"])) == (None, False, {"5/2"})
    assert asked == [False, False]


def test_a_model_that_time_cut_off_is_timed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it had is kept until then, and is no fault; nor is the fault of somebody else's engine ours."""
    ends = [True, False]

    def timed(variant: Variant, *args: Any) -> Iterator[dict[str, Any]]:
        found = {"fault": None, "unfinished": True, "weight_bytes": 1, "decode": {}, "prefill": {"9": {"tokens_s": 2.0}}, "offline": {}}
        yield found
        if not ends.pop():
            return
        found["unfinished"] = False
        yield found

    def fails(*args: Any) -> Iterator[dict[str, Any]]:
        raise RuntimeError("not ours")
        yield

    monkeypatch.setattr(model_timings, "time_variant", timed)
    monkeypatch.setattr(model_timings, "time_peer", fails)
    arguments: dict[str, Any] = {"place": H100, "variants": (Variant("tiny", {}),)}
    assert main(["model", "report", "--out", str(tmp_path)], **arguments) == 0
    assert "timed tiny, not to its end" in capsys.readouterr().out
    page = (tmp_path / "README.md").read_text()
    assert "| tiny | prefill 9 | 2 |" in page
    assert "| tiny | not to its end: run the same command again |" in page
    assert main(["model", "--out", str(tmp_path)], **arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())["model"]
    assert (found["tiny"]["unfinished"], found[PEER]["fault"], ends) == (False, "RuntimeError: not ours", [])


def test_what_an_offline_load_will_take() -> None:
    rates = {"prefill": {"1": {"tokens_s": 100.0}, "2": {"tokens_s": 50.0}}, "decode": {"1": {"tokens_s": 10.0}}, "offline": {}}
    assert model_timings._offline_s(rates, 4, 200, 30) == pytest.approx(1.1 * 4 * (2 + 3))
    assert model_timings._offline_s({"prefill": {}, "decode": {}}, 4, 200, 30) == 0


def test_the_idle_share_is_what_no_kernel_covers() -> None:
    assert idle_share([]) == 1.0
    assert idle_share([(0, 4), (1, 2), (5, 8), (7, 10)]) == pytest.approx(0.1)
    assert idle_share([(3, 7)]) == 0.0
