"""Incremental detokenization and stop strings, held against decoding the whole and against a naive search."""

from __future__ import annotations

from functools import cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.detokenizer import OutputProcessor
from octavo.runtime.outputs import FinishReason, TextOutput, TokenLogprob, TokenOutput
from octavo.runtime.sampling_params import InvalidParameter, SamplingParams
from octavo.runtime.stop_strings import StopMatcher
from octavo.runtime.tokenizer import Tokenizer, load_tokenizer

LENGTH = FinishReason("length")
EOS = 2


@cache
def smollm2() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


@cache
def sentencepiece_like() -> Tokenizer:
    """Spaces as U+2581, byte tokens for what has no token, a special token: the decoder of Llama 2 and Mistral."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁▁", "é"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, eos_token_ids=(2,), special_tokens={}, chat_templates={})


def processor(params: SamplingParams, tokenizer: Tokenizer | None = None) -> OutputProcessor:
    return OutputProcessor(tokenizer or smollm2(), 5, params, "r1")


def params(**wishes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1000, **wishes})  # type: ignore[arg-type]


def run(
    ids: list[int],
    wishes: SamplingParams,
    *,
    cuts: list[int] | None = None,
    finish: FinishReason = LENGTH,
    tokenizer: Tokenizer | None = None,
) -> list[TextOutput]:
    """Feed tokens in groups of the given sizes (all singly by default) until the processor or the tokens end."""
    target = processor(wishes, tokenizer)
    outputs, start = [], 0
    sizes = iter(cuts or [])
    while start < len(ids) or not ids:
        stop = min(len(ids), start + next(sizes, 1))
        outputs.append(target.push(TokenOutput("r1", tuple(ids[start:stop]), finish=finish if stop == len(ids) else None)))
        if target.finished:
            break
        start = stop
    assert target.finished
    assert [output.finish for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    return outputs


def text_of(outputs: list[TextOutput]) -> str:
    return "".join(output.text for output in outputs)


# --- exactness --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=20), st.lists(st.integers(1, 5), max_size=20), st.booleans())
def test_deltas_add_up_to_the_whole(ids: list[int], cuts: list[int], skip: bool) -> None:
    outputs = run(ids, params(skip_special_tokens=skip), cuts=cuts)
    assert text_of(outputs) == smollm2().decode(ids, skip_special_tokens=skip)
    assert [token for output in outputs for token in output.token_ids] == ids
    assert outputs[-1].completion_tokens == len(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 263), st.integers(256, 263), st.integers(0xC0 + 3, 258)), max_size=16), st.booleans())
def test_deltas_add_up_for_sentencepiece(ids: list[int], skip: bool) -> None:
    outputs = run(ids, params(skip_special_tokens=skip), tokenizer=sentencepiece_like())
    assert text_of(outputs) == sentencepiece_like().decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_sentencepiece_bytes_make_any_text(text: str) -> None:
    """Valid text through byte tokens: the same as the tokenizers library decodes."""
    ids = [byte + 3 for byte in text.encode("utf-8")]
    assert text_of(run([260, *ids], params(), tokenizer=sentencepiece_like())) == "a" + text


def test_incomplete_characters_are_held_back() -> None:
    ids = smollm2().encode("a😀b")
    assert len(ids) > 3
    outputs = run(ids, params())
    assert "\N{REPLACEMENT CHARACTER}" not in text_of(outputs)
    assert "" in [output.text for output in outputs]
    emoji_only_begun = run(ids[:2], params())
    assert text_of(emoji_only_begun) == "a\N{REPLACEMENT CHARACTER}"
    assert emoji_only_begun[-1].text.endswith("\N{REPLACEMENT CHARACTER}")


def test_cost_does_not_grow_with_length() -> None:
    """Each token is decoded once: counted, not timed."""
    tokenizer = smollm2()
    calls = 0
    inner = tokenizer._bytes.of

    def counted(token_id: int) -> bytes:
        nonlocal calls
        calls += 1
        return inner(token_id)

    tokenizer._bytes.of = counted  # type: ignore[method-assign]
    try:
        run(smollm2().encode("word " * 500), params(stop=("never there",)))
    finally:
        del tokenizer._bytes.of  # type: ignore[method-assign]
    assert calls <= 1002


# --- stop strings -----------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: tuple[str, ...], armed_from: int = 1) -> tuple[int, str] | None:
    """End and string of the match that ends first (from the given end on), of those the longest; by trying every end."""
    for end in range(armed_from, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


OVERLAPPING_STOPS = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=2).map(tuple)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=12), STOPS)
def test_stop_strings_over_any_split(pieces: list[str], stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    text = "".join(pieces)
    expected = first_stop(text, stops)
    fed = 0
    for piece in pieces:
        match = matcher.feed(piece)
        if match is not None:
            assert expected == (fed + match.end, match.text)
            return
        fed += len(piece)
        could_begin = [size for size in range(1, fed + 1) if any(stop.startswith(text[fed - size : fed]) for stop in stops)]
        assert matcher.held == max(could_begin, default=0)
    assert expected is None


@settings(max_examples=300, deadline=None)
@given(st.text("ab", min_size=1, max_size=12), OVERLAPPING_STOPS, st.integers(1, 8))
@example("aaa", ("aa",), 3)
def test_matches_before_the_matcher_is_armed_may_overlap_later_ones(text: str, stops: tuple[str, ...], armed_from: int) -> None:
    """ "aa" in "aaa": the match that ends at 2 is passed over, the one that ends at 3 shares a letter with it and counts."""
    matcher = StopMatcher(stops)
    matches = ((end, matcher.feed(text[end - 1], armed=end >= armed_from)) for end in range(1, len(text) + 1))
    found = next(((end, match.text) for end, match in matches if match is not None), None)
    assert found == first_stop(text, stops, armed_from)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "é", "😀", "the", " "]), min_size=1, max_size=10), st.lists(st.integers(1, 4), max_size=10)
)
def test_stop_strings_over_real_tokens(words: list[str], cuts: list[int]) -> None:
    ids = [token for word in words for token in smollm2().encode(word)]
    whole = smollm2().decode(ids)
    for stops in (("bab",), ("é😀", "a é"), ("the ", "b", "heb"), ("😀",)):
        expected = first_stop(whole, stops)
        for keep in (False, True):
            outputs = run(ids, params(stop=stops, no_stop_trim=keep), cuts=cuts)
            if expected is None:
                assert (text_of(outputs), outputs[-1].finish) == (whole, LENGTH)
                continue
            end, matched = expected
            assert text_of(outputs) == whole[: end if keep else end - len(matched)]
            assert outputs[-1].finish == FinishReason("stop", matched=matched)
            used = [token for output in outputs for token in output.token_ids]
            assert len(smollm2().decode(used)) >= end > len(smollm2().decode(used[:-1]).rstrip("\N{REPLACEMENT CHARACTER}"))
            assert outputs[-1].completion_tokens == len(used)


@pytest.mark.parametrize("split", range(1, 12))
def test_every_border_of_one_stop_string(split: int) -> None:
    """ "one STOP two": the border between two tokens falls at each place in turn."""
    text = "one STOP two"
    ids = [*smollm2().encode(text[:split]), *smollm2().encode(text[split:])]
    outputs = run(ids, params(stop=("STOP",)))
    assert text_of(outputs) == "one "
    assert outputs[-1].finish == FinishReason("stop", matched="STOP")


def test_text_that_could_begin_a_stop_is_held_and_given_back() -> None:
    ids = [smollm2().encode(letter)[0] for letter in "abxaby"]
    outputs = run(ids, params(stop=("abz",)))
    assert [output.text for output in outputs] == ["", "", "abx", "", "", "aby"]
    cut_short = run(ids[:5], params(stop=("abz",)))
    assert [output.text for output in cut_short] == ["", "", "abx", "", "ab"]


def test_tokens_after_the_stop_are_dropped_with_their_logprobs() -> None:
    ids = tuple(smollm2().encode(letter)[0] for letter in "abcde")
    logprobs = tuple(TokenLogprob(token, -1.0) for token in ids)
    target = processor(params(stop=("bc",)))
    output = target.push(TokenOutput("r1", ids, logprobs=logprobs, finish=LENGTH, cached_tokens=4, num_retractions=1))
    assert (output.text, output.token_ids, output.logprobs) == ("a", ids[:3], logprobs[:3])
    assert (output.prompt_tokens, output.completion_tokens, output.cached_tokens, output.num_retractions) == (5, 3, 4, 1)
    assert output.finish == FinishReason("stop", matched="bc")


@pytest.mark.parametrize(("min_tokens", "shown"), [(0, "a"), (3, "a"), (4, "abca"), (6, "abca"), (7, "abcabcab")])
def test_min_tokens_passes_over_early_matches(min_tokens: int, shown: str) -> None:
    """One letter a token: "bc" ends at tokens 3 and 6. A match that begins before min_tokens and ends at it or later counts."""
    ids = [smollm2().encode(letter)[0] for letter in "abcabcab"]
    for cuts in ([], [8], [2, 3, 3]):
        assert text_of(run(ids, params(stop=("bc",), min_tokens=min_tokens), cuts=cuts)) == shown


# --- the engine's own finish ------------------------------------------------------------------------------------------


def test_the_stop_token_is_not_shown() -> None:
    hello = smollm2().encode("Hello")
    finish = FinishReason("stop", matched=EOS)
    for wishes in (params(), params(skip_special_tokens=False)):
        outputs = run([*hello, EOS], wishes, finish=finish)
        assert text_of(outputs) == "Hello"
        assert (outputs[-1].token_ids, outputs[-1].completion_tokens, outputs[-1].finish) == ((EOS,), len(hello) + 1, finish)
    assert text_of(run([*hello, EOS], params(skip_special_tokens=False, no_stop_trim=True), finish=finish)) == "Hello<|im_end|>"
    assert text_of(run([*hello, EOS], params(skip_special_tokens=False))) == "Hello<|im_end|>"
    plain = smollm2().encode(" world")
    assert text_of(run([*hello, *plain], params(stop_token_ids=tuple(plain)), finish=FinishReason("stop", matched=plain[-1]))) == "Hello"


def test_held_text_comes_out_at_a_stop_token_and_at_an_abort() -> None:
    ids = [smollm2().encode(letter)[0] for letter in "xab"]
    outputs = run([*ids, EOS], params(stop=("abc",)), finish=FinishReason("stop", matched=EOS))
    assert [output.text for output in outputs] == ["x", "", "", "ab"]
    target = processor(params(stop=("abc",)))
    target.push(TokenOutput("r1", tuple(ids)))
    last = target.push(TokenOutput("r1", (), finish=FinishReason("abort", message="gone", status_code=499)))
    assert (last.text, last.token_ids, last.completion_tokens, last.finish and last.finish.type) == ("ab", (), 3, "abort")


def test_nothing_follows_the_end() -> None:
    target = processor(params())
    target.push(TokenOutput("r1", (), finish=LENGTH))
    assert target.finished
    with pytest.raises(RuntimeError, match="'r1' has finished"):
        target.push(TokenOutput("r1", (5,)))


def test_prompt_logprobs_pass_through() -> None:
    prompt = (TokenLogprob(1, None), TokenLogprob(2, -0.5))
    assert processor(params()).push(TokenOutput("r1", (5,), prompt_logprobs=prompt)).prompt_logprobs == prompt


def test_without_a_tokenizer_there_are_ids_and_no_text() -> None:
    target = OutputProcessor(None, 3, params(), "r1")
    output = target.push(TokenOutput("r1", (7, 8), finish=LENGTH))
    assert (output.text, output.token_ids, output.completion_tokens, output.finish) == ("", (7, 8), 2, LENGTH)
    with pytest.raises(InvalidParameter, match=r"stop=\['x'\] needs a tokenizer"):
        OutputProcessor(None, 3, params(stop=("x",)), "r1")
