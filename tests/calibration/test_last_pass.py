"""A long last pass: what it draws from, which is the given text and more that the model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.calibration import budget, quantize_run, run_texts
from octavo.calibration.quantize_run import plan, quantize
from octavo.calibration.recipe import Recipe
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
    return with_tokenizer("llama", tmp_path_factory.mktemp("llama"))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int]]:
    """The samples of each last pass, and how many were given."""
    seen: list[tuple[Tensor, int]] = []

    def watching(model: Any, tokens: Tensor, num_given: int, targets: Any, *args: Any, **options: Any) -> Tuned:
        seen.append((tokens, num_given))
        assert targets.shape[:2] == tokens.shape
        return tune_model(model, tokens, num_given, targets, *args, **options)

    monkeypatch.setattr(quantize_run, "tune_model", watching)
    return seen


def test_it_sees_as_many_samples_as_it_has_steps(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    quantize(str(llama), tmp_path / "out", **OPTIONS, calibration=str(text))
    quantize(str(llama), tmp_path / "short", **{**OPTIONS, "method": "auto"}, calibration=str(text))
    quantize(str(llama), tmp_path / "own", **OPTIONS, calibration="self")
    (tokens, given), (short, all_given), (own, of_own) = seen
    assert (len(tokens), given) == (STEPS, FAST["samples"])
    assert torch.equal(tokens[:given], short)  # given before own, and nothing of what is held back to measure on
    assert len(short) == all_given == FAST["samples"]
    assert (len(own), of_own) == (STEPS, FAST["samples"])
    assert len(own.unique(dim=0)) == STEPS
    recipe = {name: value for name, value in OPTIONS.items() if name != "measure_speed"}
    assert "12 samples of them written by the model itself" in plan(str(llama), Recipe(**recipe, calibration=str(text))).describe()


def test_stopped_in_it_and_resumed_it_gives_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(str(llama), tmp_path / "whole", **OPTIONS, calibration=str(text))

    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quantize_run, "tune_model", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(llama), tmp_path / "again", **OPTIONS, calibration=str(text))
    monkeypatch.setattr(run_texts, "write_samples", stop)  # what was written is not written again
    quantize(str(llama), tmp_path / "again", **OPTIONS, calibration=str(text), resume=True)
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


def test_a_model_that_writes_nothing_is_tuned_on_what_was_given(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*args: Any, **options: Any) -> Tensor:
        raise ValueError("the model ends its texts at once")

    monkeypatch.setattr(run_texts, "write_samples", silent)
    seen = watched(monkeypatch)
    result = quantize(str(llama), tmp_path / "out", **OPTIONS, calibration=str(text))
    assert len(seen[0][0]) == seen[0][1] == FAST["samples"]
    assert any("the model wrote none of its own" in note for note in result.notes)
