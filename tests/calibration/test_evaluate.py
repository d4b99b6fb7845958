"""Holds octavo.evaluate against a plain float64 loop over transformers, and its arithmetic against torch's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo.calibration.evaluate import Piece, in_step, kl_divergence, score_windows
from octavo.calibration.windows import Window, windows_of

BOS = 256
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. " * 2
ENGINE = {"device": "cpu", "num_threads": 2, "chunked_prefill_size": 32}


def evaluate(model: tuple[Path, Any], reference: tuple[Path, Any] | None = None, **options: Any) -> octavo.EvalResult:
    other = None if reference is None else str(reference[0])
    return octavo.evaluate(str(model[0]), reference=other, **{"engine_options": ENGINE, "show_progress": False, "seqlen": 64, **options})


@torch.no_grad()
def plain_loop(models: Sequence[Any], tokens: list[int], seqlen: int, stride: int) -> tuple[list[float], np.ndarray, float]:
    """Perplexities, KL(last || first) of every token and agreement, in float64, the way the transformers documentation does it."""
    nll, kl, agreed, previous_end, count = [0.0 for _ in models], [], 0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + seqlen, len(tokens))
        ids = torch.tensor([tokens[begin:end]])
        keep = min(end - previous_end, ids.shape[1] - 1)  # the last tokens, those not scored before; never the window's first
        rows = [model(ids).logits[0, :-1][ids.shape[1] - 1 - keep :] for model in models]
        targets = ids[0, ids.shape[1] - keep :]
        for index, logits in enumerate(rows):
            nll[index] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item() if keep else 0.0
        log_probabilities = [logits.log_softmax(-1) for logits in rows]
        kl.append(torch.nn.functional.kl_div(log_probabilities[0], log_probabilities[-1], reduction="none", log_target=True).sum(-1))
        agreed += int((rows[0].argmax(-1) == rows[-1].argmax(-1)).sum())
        count += keep
        previous_end = end
        if end == len(tokens):
            break
    return [math.exp(total / count) for total in nll], torch.cat(kl).numpy(), agreed / count


@pytest.mark.parametrize(
    ("seqlen", "stride", "count"), [(64, 64, 150), (64, 16, 150), (50, 49, 150), (200, 200, 150), (300, 7, 150), (2, 2, 13), (3, 1, 12)]
)
def test_figures_are_those_of_a_plain_loop(tiny: tuple[Path, Any], other: tuple[Path, Any], seqlen: int, stride: int, count: int) -> None:
    tokens = list(TEXT.encode())[:count]
    found = evaluate(tiny, other, token_ids=tokens, seqlen=seqlen, stride=stride)
    (perplexity, of_reference), kl, agreement = plain_loop([tiny[1], other[1]], tokens, seqlen, stride)
    assert found.num_tokens == len(kl)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.reference_perplexity == pytest.approx(of_reference, rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(perplexity / of_reference, rel=1e-4)
    assert (found.kl_mean, found.kl_max) == pytest.approx((kl.mean(), kl.max()), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.top1_agreement_percent == pytest.approx(100 * agreement, abs=1e-9)


def test_a_model_is_itself(tiny: tuple[Path, Any]) -> None:
    found = evaluate(tiny, tiny, text=TEXT)
    assert (found.kl_mean, found.kl_p99, found.kl_max) == (0.0, 0.0, 0.0)
    assert found.top1_agreement_percent == 100.0
    assert found.perplexity == found.reference_perplexity
    assert found.perplexity_ratio == 1.0


def test_a_text_is_what_its_tokens_are(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    from_text, from_file = evaluate(tiny, text=TEXT), evaluate(tiny, text=file)
    from_tokens = evaluate(tiny, token_ids=octavo_tokens(tiny, TEXT))
    assert from_text.perplexity == from_file.perplexity == from_tokens.perplexity
    assert from_text.setup.tokens_sha256 == from_file.setup.tokens_sha256 == from_tokens.setup.tokens_sha256
    assert (from_text.setup.text, from_file.setup.text) == (None, "text.txt")
    assert from_tokens.setup.add_bos is None


def octavo_tokens(model: tuple[Path, Any], text: str) -> list[int]:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(model[0] / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("adds_bos", "add_bos", "has_bos"), [(False, "auto", False), (True, "auto", True), (False, "yes", True), (True, "no", False)]
)
def test_bos_stands_once_before_the_text(make_model: Callable[..., Any], adds_bos: bool, add_bos: Any, has_bos: bool) -> None:
    model = make_model(adds_bos=adds_bos)
    found = evaluate(model, text=TEXT, add_bos=add_bos)
    tokens = [BOS] * has_bos + octavo_tokens(model, TEXT)
    ((expected, _), _, _) = plain_loop([model[1], model[1]], tokens, 64, 64)
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert found.setup.bos_token_id == (BOS if has_bos else None)


def test_limits_take_the_beginning(tiny: tuple[Path, Any]) -> None:
    tokens = list(TEXT.encode())
    assert evaluate(tiny, token_ids=tokens, max_windows=2).num_tokens == 126
    assert evaluate(tiny, token_ids=tokens, max_tokens=70).num_tokens == 63 + 5
    whole, same = evaluate(tiny, token_ids=tokens[:128]), evaluate(tiny, token_ids=tokens, max_windows=2)
    assert (whole.perplexity, whole.setup.tokens_sha256) == (same.perplexity, same.setup.tokens_sha256)


def test_the_result_as_json_has_everything(tiny: tuple[Path, Any]) -> None:
    found = json.loads(evaluate(tiny, text=TEXT, engine_options={**ENGINE, "dtype": "bfloat16"}).to_json())
    assert found["format"] == 1
    assert found["model"]["dtype"] == "bfloat16"
    assert found["model"]["weight_bytes"] > 0
    assert found["reference"] is None
    assert found["kl_mean"] is None
    assert found["setup"]["seqlen"] == found["setup"]["stride"] == 64


def test_the_reference_keeps_its_own_dtype(tiny: tuple[Path, Any]) -> None:
    options = {**ENGINE, "dtype": "bfloat16", "kv_cache_dtype": "int8"}
    found = evaluate(tiny, tiny, text=TEXT, engine_options=options)
    assert found.reference is not None
    assert (found.model.dtype, found.model.kv_cache_dtype) == ("bfloat16", "int8")
    assert (found.reference.dtype, found.reference.kv_cache_dtype) == ("float32", "float32")
    assert found.kl_mean is not None
    assert 0 < found.kl_mean < 0.1
    asked = evaluate(tiny, tiny, text=TEXT, engine_options=options, reference_dtype="float16").reference
    assert asked is not None
    assert asked.dtype == "float16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either a text or token_ids"),
        ({"text": "a", "token_ids": [1]}, "either a text or token_ids"),
        ({"text": "a"}, "there are 1 tokens, and perplexity needs at least 2"),
        ({"text": TEXT, "seqlen": 513}, "seqlen 513 is beyond the context length of .*, 512 tokens: give at most 512"),
        ({"text": TEXT, "seqlen": 1}, "seqlen 1 is not valid"),
        ({"text": TEXT, "stride": 65}, "stride 65 is not valid: give 1 to 64"),
        ({"text": TEXT, "stride": 0}, "stride 0 is not valid"),
        ({"text": TEXT, "max_tokens": 1}, "max_tokens 1 is not valid"),
        ({"text": TEXT, "max_windows": 0}, "max_windows 0 is not valid"),
        ({"text": TEXT, "max_windows": 1, "max_tokens": 9}, "max_tokens 9 and max_windows 1"),
        ({"text": TEXT, "add_bos": "maybe"}, "add_bos 'maybe'"),
        ({"text": TEXT, "engine_options": {"dtpye": "float32"}}, "no option dtpye"),
        ({"text": TEXT, "reference_dtype": "float33", "with_reference": True}, "float33"),
        ({"token_ids": [1, 2, 900]}, "token id 900 is out of range"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tiny: tuple[Path, Any], options: dict[str, Any], words: str) -> None:
    reference = tiny if options.pop("with_reference", False) else None
    with pytest.raises((ValueError, TypeError), match=words):
        evaluate(tiny, reference, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seqlen": 513}, "seqlen 513 is beyond the context length of .*, 512 tokens: give at most 512"),
        ({"engine_options": {"context_length": 32}}, "beyond the context length of .*, 32 tokens"),
        ({"engine_options": {"context_length": 600}}, "--context-length 600 is beyond the model's 512 positions"),
        ({"engine_options": {"linear_backend": "magic"}}, "--linear-backend 'magic' is not valid"),
        ({"seqlen": 1}, "seqlen 1 is not valid"),
        ({"stride": 65}, "stride 65 is not valid"),
        ({"max_tokens": 1}, "max_tokens 1 is not valid"),
        ({"reference": "no/such/model"}, "^the reference: .*'no/such/model'"),
        ({"reference_dtype": "float33"}, "^the reference: --dtype 'float33' is not valid"),
        ({"vocab_size": 270}, "vocabulary of 263 tokens and .* one of 270"),
        ({"context": 32}, "beyond the context length of .*, 32 tokens"),
    ],
)
def test_what_config_and_options_tell_is_refused_before_weights_are_read(
    without_weights: Path, make_model: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    made = {name: options.pop(name) for name in ("vocab_size", "context") if name in options}
    reference = str(make_model(**made)[0]) if made else options.pop("reference", str(without_weights))
    with pytest.raises(ValueError, match=words):
        octavo.evaluate(str(without_weights), reference=reference, text=TEXT, **{"seqlen": 64, **options})


def test_a_file_given_as_text_and_a_missing_file(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a")
    with pytest.raises(ValueError, match="is the name of a file"):
        evaluate(tiny, text=str(file))
    with pytest.raises(ValueError, match=r"text\.txt: there are 1 tokens"):
        evaluate(tiny, text=file)
    with pytest.raises(FileNotFoundError):
        evaluate(tiny, text=tmp_path / "none.txt")


def test_models_that_cannot_be_compared(tiny: tuple[Path, Any], make_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"263 tokens and .* 270 tokens|vocabulary of 263 tokens and .* one of 270"):
        evaluate(tiny, make_model(vocab_size=270), text=TEXT)
    with pytest.raises(ValueError, match="read the text differently, first at token 0"):
        evaluate(tiny, make_model(swapped=True), text=TEXT)
    with pytest.raises(ValueError, match=r"beyond the context length of .*, 32 tokens"):
        evaluate(tiny, make_model(context=32), text=TEXT)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def source(logits: torch.Tensor, *, cut: int) -> Callable[[Sequence[int]], list[Piece]]:
    return lambda ids: [(at, logits[at : at + cut][: len(ids) - at]) for at in range(0, len(ids), cut)]


@given(st.integers(2, 40), st.integers(2, 12), st.data())
def test_windows_score_each_token_once_with_context_before_it(num_tokens: int, seqlen: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seqlen))
    windows = windows_of(num_tokens, seqlen=seqlen, stride=stride)
    scored = [token for window in windows for token in range(window.first_scored, window.end)]
    starts = set(range(0, num_tokens, seqlen)) if stride == seqlen else {0}
    assert scored == [token for token in range(num_tokens) if token not in starts]
    assert all(window.start < window.first_scored < window.end <= window.start + seqlen for window in windows)


@given(st.integers(1, 9), st.integers(1, 9))
def test_pieces_cut_differently_go_in_step(ours: int, theirs: int) -> None:
    logits = torch.arange(20.0)[:, None].expand(20, 2)
    rows = list(in_step(source(logits, cut=ours)(range(20)), source(-logits, cut=theirs)(range(20))))
    assert torch.equal(torch.cat([a for _, a, _ in rows]), logits)
    assert torch.equal(torch.cat([b for _, _, b in rows]), -logits)
    assert [int(a[0, 0]) for _, a, _ in rows] == [at for at, _, _ in rows]


def test_a_reference_that_ends_early_is_an_error() -> None:
    with pytest.raises(ValueError, match="no logits for position 4"):
        list(in_step([(0, torch.zeros(8, 3))], [(0, torch.zeros(4, 3))]))


def test_kl_is_torchs_own() -> None:
    torch.manual_seed(0)
    model, reference = (torch.randn(9, 5000) * 4).log_softmax(-1), (torch.randn(9, 5000) * 4).log_softmax(-1)
    expected = torch.nn.functional.kl_div(model.double(), reference.double(), reduction="none", log_target=True).sum(-1)
    found = kl_divergence(reference, model)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-5)


def test_what_a_model_rules_out() -> None:
    never = torch.tensor([[0.0, -torch.inf, 0.0]]).log_softmax(-1)
    always = torch.zeros(1, 3).log_softmax(-1)
    assert kl_divergence(never, always).item() == pytest.approx(math.log(1.5))
    assert kl_divergence(never, never).item() == 0.0
    assert kl_divergence(always, never).item() == math.inf
    certain = torch.tensor([[1e4, 0.0, 0.0]] * 2)
    scores = score_windows([0, 1], [Window(0, 2, 1)], source(certain, cut=1))
    assert (scores.nll, scores.perplexity) == (1e4, math.inf)


def test_a_nan_is_an_error() -> None:
    logits = torch.zeros(4, 3)
    logits[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not a number"):
        score_windows([0, 1, 2, 0], [Window(0, 4, 1)], source(logits, cut=4))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(30, 11), torch.randn(30, 11)
    tokens = torch.randint(11, (30,)).tolist()
    windows = windows_of(30, seqlen=30, stride=30)
    whole = score_windows(tokens, windows, source(ours, cut=30), source(theirs, cut=30))
    monkeypatch.setattr("octavo.calibration.evaluate._BLOCK_LOGITS", 40)
    parts = score_windows(tokens, windows, source(ours, cut=7), source(theirs, cut=5))
    assert (parts.nll, parts.reference_nll, parts.agreement) == pytest.approx((whole.nll, whole.reference_nll, whole.agreement), rel=1e-12)
    assert whole.kl is not None
    assert parts.kl is not None
    assert np.allclose(parts.kl, whole.kl, rtol=1e-6)
