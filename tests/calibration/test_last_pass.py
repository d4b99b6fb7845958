"""A long last pass: what it draws from, which is the given text and more that the model writes itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.calibration import budget, quantize_run, run_texts
from octavo.calibration.quantize_run import plan, quantize
from octavo.calibration.recipe import Recipe
from octavo.calibration.self_text import SilentModelError
from octavo.calibration.solve import Steps
from octavo.calibration.tune_model import Tuned, tune_model

from .test_quantize import FAST, digests, with_tokenizer

STEPS = 20
OPTIONS: dict[str, Any] = {**FAST, "method": "best"}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_TUNING_STEPS", {"fast": 0, "default": 3, "best": STEPS})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} less {i} is none, so {chr(97 + i % 26) * 3}.\n" for i in range(200)))
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("llama", tmp_path_factory.mktemp("llama"), initializer_range=0.2)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int, float]]:
    """The samples of each last pass, how many were given, and the KL that it left."""
    seen: list[tuple[Tensor, int, float]] = []

    def watching(model: Any, tokens: Tensor, num_given: int, targets: Any, *args: Any, **options: Any) -> Tuned:
        assert targets.shape[:2] == tokens.shape
        tuned = tune_model(model, tokens, num_given, targets, *args, **options)
        seen.append((tokens, num_given, tuned.kl_after))
        return tuned

    monkeypatch.setattr(quantize_run, "tune_model", watching)
    return seen


def test_it_sees_as_many_samples_as_it_has_steps(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    quantize(str(llama), tmp_path / "out", **OPTIONS, calibration=str(text))
    quantize(str(llama), tmp_path / "short", **{**OPTIONS, "method": "auto"}, calibration=str(text))
    quantize(str(llama), tmp_path / "own", **OPTIONS, calibration="self")
    (tokens, given, _), (short, all_given, _), (own, of_own, _) = seen
    assert (len(tokens), given) == (STEPS, FAST["samples"])
    assert torch.equal(tokens[:given], short)  # given before own, and nothing of what is held back to measure on
    assert len(short) == all_given == FAST["samples"]
    assert (len(own), of_own) == (STEPS, FAST["samples"])
    assert len(own.unique(dim=0)) == STEPS
    recipe = {name: value for name, value in OPTIONS.items() if name != "measure_speed"}
    described = [plan(str(llama), Recipe(**recipe, calibration=which)).describe() for which in (str(text), "self")]
    assert f"{STEPS} steps over the whole model, on 12 samples more, which the model writes" in described[0]
    assert "which the model writes" not in described[1]  # all are


def test_stopped_in_it_and_resumed_it_gives_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**OPTIONS, "group_size": -1}
    monkeypatch.setitem(budget._METHODS, "best", lambda recipe: Steps())  # so coarse that tuning helps
    seen = watched(monkeypatch)
    quantize(str(llama), tmp_path / "whole", **options, calibration=str(text))
    assert "tuning did not help" not in caplog.text  # else nothing of it would be compared

    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quantize_run, "tune_model", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(llama), tmp_path / "again", **options, calibration=str(text))
    monkeypatch.setattr(run_texts, "drawing", stop)  # what was written is not written again
    quantize(str(llama), tmp_path / "again", **options, calibration=str(text), resume=True)
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")
    (tokens, *left), (again, *left_again) = seen
    assert torch.equal(tokens, again)
    assert left == left_again


@pytest.mark.parametrize("error", [SilentModelError("it ends its texts at once"), RuntimeError("probability tensor contains inf")])
def test_a_model_that_cannot_write_is_tuned_on_what_was_given(
    error: Exception, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **options: Any) -> Tensor:
        raise error

    monkeypatch.setattr(run_texts, "write_samples", fails)
    seen = watched(monkeypatch)
    result = quantize(str(llama), tmp_path / "out", **OPTIONS, calibration=str(text))
    assert len(seen[0][0]) == seen[0][1] == FAST["samples"]
    assert f"could not write any ({type(error).__name__}: {error})" in caplog.text
    assert any("the model wrote none of its own" in note for note in result.notes)
    with pytest.raises((ValueError, RuntimeError), match=str(error)):
        quantize(str(llama), tmp_path / "own", **OPTIONS, calibration="self")


def test_given_text_of_another_tokenizer_is_refused_before_the_model_writes(text: Path, tmp_path: Path) -> None:
    folder = with_tokenizer("llama", tmp_path / "model", vocab_size=60)
    for calibration in (str(text), "self"):
        with pytest.raises(ValueError, match="this is another model's tokenizer"):
            quantize(str(folder), tmp_path / "out", **OPTIONS, calibration=calibration)
        assert not (tmp_path / "out").exists()


def test_its_samples_go_to_disk_rather_than_leaving_it_out(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_TUNING_STEPS", {"best": 768})
    recipe = Recipe(method="best", group_size=16, samples=256, seqlen=128)
    in_memory = plan(str(llama), replace(recipe, max_memory=850 << 20))
    on_disk = plan(str(llama), replace(recipe, max_memory=in_memory.peak_bytes - 1))
    assert [(each.on_disk, each.skipped_tuning, each.budget.own_samples) for each in (in_memory, on_disk)] == [
        (False, None, 512),
        (True, None, 512),
    ]
    assert on_disk.peak_bytes < in_memory.peak_bytes
