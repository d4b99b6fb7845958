"""What a recipe refuses before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.calibration.recipe import Recipe

NO_NUMBERS = [
    {"max_kl": float("nan")},
    {"max_kl": float("inf")},
    {"max_memory": "8GiB"},
    {"max_ppl_increase": "5%"},
    {"bits": "4"},
    {"bits": True},
]


@pytest.mark.parametrize("fields", NO_NUMBERS)
def test_what_is_no_number_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} .* is not valid: give a"):
        Recipe.from_dict(fields)


def test_one_pattern_is_a_pattern() -> None:
    assert Recipe.from_dict({"ignore": "down_proj"}).ignore == ("down_proj",)
