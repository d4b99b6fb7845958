"""The texts of a run: rows of tokens to calibrate on, and what quality is measured on."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .budget import budget_of
from .float_text import batch_of, drawing
from .original import Original
from .progress import Progress
from .recipe import Recipe
from .samples import hub_loader, hub_texts, might_be_on_hub, read_texts, rows_of
from .self_text import Generate, OwnText, SilentModelError, write_samples
from .work import WorkFolder, write_whole

logger = logging.getLogger(__name__)

_HELD_BACK = 1 / 8  # of the samples, on top of them, to measure on
_MOST_HELD_BACK = 64  # rows
EVAL_TOKENS = 1 << 14  # of a file, that quality is measured on
_LEAST_EVAL_TOKENS = 16
_ENOUGH_TOKENS = 4096  # to judge on: with fewer, the perplexity of equal models differs by percents from text to text


class RunTexts:
    """`eval_tokens`: what the file `eval_text` holds, None without one: samples held back are measured on then.

    Raises ValueError, before any work is done, for an evaluation text that is missing, unreadable or too short.
    """

    def __init__(self, original: Original, recipe: Recipe, eval_text: Path | None, device: torch.device) -> None:
        self.original, self.recipe, self.device = original, recipe, device
        self.eval_text = eval_text
        self.eval_tokens = None if eval_text is None else self._read_eval_text(eval_text)

    def _read_eval_text(self, file: Path) -> list[int]:
        if not file.is_file():
            raise ValueError(f"there is no file {file} to evaluate on")
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): convert it first") from None
        tokens: list[int] = self.original.tokenizer(content).input_ids[:EVAL_TOKENS]
        self.original.check_vocabulary(max(tokens, default=0))
        if len(tokens) < _LEAST_EVAL_TOKENS:
            raise ValueError(f"{file} has {len(tokens)} tokens: give a text of at least {_LEAST_EVAL_TOKENS} to evaluate on")
        return tokens

    def check_calibration(self) -> None:
        """Raises ValueError for a calibration file that will not do. Of hub data sets, whether they could be read here is looked at."""
        if self.recipe.calibration == "self":
            _ = self.original.tokenizer
        elif self.recipe.calibration_file() is not None or not might_be_on_hub(self.recipe.calibration):
            self._text_rows()
        else:
            hub_loader(self.recipe.calibration)

    def samples(self, work: WorkFolder, identity: Mapping[str, Any], *, own: int) -> tuple[Tensor, Tensor]:
        """int64 [samples + own, seqlen] to calibrate on, the last `own` of them written by the model whatever text was given, and int64
        [R, seqlen] held back. Taken from `work` where they lie there. A model that cannot write adds none to a text.

        What the model itself writes is kept beside `work`, so that each attempt of a run, known by `identity`, goes on with the text of
        the one before.
        """
        given = self._samples + self._held_back
        if not work.has("tokens"):
            file = work.path.parent / "own-text.json"
            if self.recipe.calibration == "self":
                try:
                    rows = self._own_rows(file, identity, given + own)
                except SilentModelError as error:
                    raise ValueError(f"{error}. Give --calibration FILE") from error
            else:
                rows = self._text_rows()
                self.original.check_vocabulary(int(rows.max()))
                if own:
                    try:
                        rows = torch.cat([rows, self._own_rows(file, identity, own)])
                    except Exception as error:  # an engine, transformers or a kernel failed: the given text is enough
                        told = f"{type(error).__name__}: {error}"
                        logger.warning("the last pass has no samples of the model's own, which could not write any (%s)", told)
            work.save_tokens(rows)
        rows = work.load_tokens()
        return torch.cat([rows[: self._samples], rows[given:]]), rows[self._samples : given]

    def same_text(self) -> str | None:
        """What is to be said where quality is measured on the text that is calibrated on."""
        given = self.recipe.calibration_file()
        if given is None or self.eval_text is None or not given.samefile(self.eval_text):
            return None
        return f"quality is measured on {self.eval_text}, which is calibrated on too: that flatters; leave --eval out, or give another text"

    def few_tokens(self, count: int | None = None) -> str | None:
        """What is to be said of quality that is measured on `count` tokens (None: on what there is); None for enough of them."""
        if count is None:
            count = self._held_back * self.recipe.row_tokens if self.eval_tokens is None else len(self.eval_tokens)
        if count >= _ENOUGH_TOKENS:
            return None
        gated = self.recipe.max_ppl_increase is not None or self.recipe.max_kl is not None
        what = "the quality gate is judged" if gated else "quality is measured"
        return f"{what} on {count:,} tokens only, which says little: give a longer --eval FILE, or more --samples"

    @property
    def _samples(self) -> int:
        return budget_of(self.recipe).samples

    @property
    def _held_back(self) -> int:
        return 0 if self.eval_text is not None else min(_MOST_HELD_BACK, max(1, round(self.recipe.samples * _HELD_BACK)))

    def _own_rows(self, file: Path, identity: Mapping[str, Any], count: int) -> Tensor:
        original, recipe = self.original, self.recipe
        key = {**identity, "recipe": [recipe.row_tokens, recipe.seed]}
        found = json.loads(file.read_text()) if file.is_file() else {}
        text = OwnText(found["tokens"], found["asked"], found["drawn"]) if found.get("of") == key else OwnText()
        batch = batch_of(original.transformers_config(), recipe.row_tokens)
        with ExitStack() as opened, Progress("writing text", count * recipe.row_tokens, "tokens") as bar:

            @functools.cache  # what lies in the file may be enough
            def draws() -> Generate:
                return opened.enter_context(drawing(original.model_path, str(original.files.root), recipe.row_tokens, batch, self.device))

            def generate(prompts: Sequence[Sequence[int]], num_tokens: int, seed: int) -> Sequence[Sequence[int]]:
                original.check_vocabulary(max(max(prompt, default=0) for prompt in prompts))
                return draws()(prompts, num_tokens, seed)

            rows = write_samples(
                generate,
                original.tokenizer,
                samples=count,
                seqlen=recipe.row_tokens,
                seed=recipe.seed,
                batch=batch,
                text=text,
                on_tokens=bar.step,
            )
        write_whole(file, json.dumps({"of": key, **asdict(text)}).encode())
        return rows

    def _text_rows(self) -> Tensor:
        recipe, tokenizer = self.recipe, self.original.tokenizer
        file = recipe.calibration_file()
        texts = hub_texts(recipe.calibration, tokenizer) if file is None else read_texts(file, tokenizer)
        rows = rows_of(
            texts,
            tokenizer,
            samples=self._samples + self._held_back,
            seqlen=recipe.row_tokens,
            where=recipe.calibration,
            of=recipe.samples + self._held_back,
            beside=self._held_back,
        )
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))]
