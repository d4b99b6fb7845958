"""What a recipe refuses before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo.calibration.quantize_run import quantize
from octavo.calibration.recipe import Recipe

NO_NUMBERS = [
    {"max_kl": float("nan")},
    {"max_kl": float("inf")},
    {"max_memory": "8GiB"},
    {"max_ppl_increase": "5%"},
    {"bits": "4"},
    {"bits": True},
    {"samples": 8.5},
    {"samples": "12"},
    {"seqlen": None},
    {"seqlen": 64.0},
    {"seqlen": "all"},
    {"seed": "x"},
    {"max_kl": True},
    {"symmetric": "no"},
    {"symmetric": 1},
    {"calibration": None},
    {"calibration": ""},
    {"calibration": ["a"]},
    {"ignore": 5},
    {"ignore": [5]},
]


@pytest.mark.parametrize("fields", NO_NUMBERS)
def test_what_is_no_number_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} .* is not valid: give "):
        Recipe.from_dict(fields)


def test_one_pattern_is_a_pattern() -> None:
    assert Recipe.from_dict({"ignore": "down_proj"}).ignore == ("down_proj",)
    assert Recipe(ignore="down_proj").ignore == ("down_proj",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seqlen", "context", "wanted"), [("auto", 128, 128), ("auto", 4096, 512), ("auto", None, 512), (64, 128, 64), (600, None, 600)]
)
def test_rows_are_as_long_as_the_context_allows(seqlen: Any, context: int | None, wanted: int) -> None:
    decided = Recipe(seqlen=seqlen).within(context)
    assert decided.seqlen == decided.row_tokens == wanted


def test_a_path_is_a_name() -> None:
    assert Recipe(calibration=Path("text.txt")) == Recipe(calibration="text.txt")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [[1], 5, object()])
def test_what_is_no_recipe(value: Any) -> None:
    with pytest.raises(ValueError, match="is no recipe: give a Recipe"):
        quantize(None, "out", recipe=value)


def test_paths_that_are_none() -> None:
    with pytest.raises(ValueError, match="model_path 5 is not valid: give a folder"):
        quantize(5, "out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out None is not valid: give a folder"):
        quantize(None, None)  # type: ignore[arg-type]
