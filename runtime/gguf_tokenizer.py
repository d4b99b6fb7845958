"""A `tokenizers` tokenizer built from a GGUF file's vocabulary. Knows no chat templates and no Hugging Face folders.

`tokenizer.ggml.pre` names how text is cut before merging. What each name means is llama.cpp's (src/llama-vocab.cpp); the patterns
here are those of the models' original tokenizers, to which llama.cpp's are made equal. A wrong cut gives wrong ids without any
error, so a name that is not in the table is refused.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..quant.checkpoint.errors import CheckpointError
from ..quant.checkpoint.gguf_header import GgufHeader

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"

_PATTERNS: dict[str, str] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
# Digits one by one, then GPT-2's pattern on each stretch between them.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion")
# A word that is a token as a whole stays whole, whatever its merges say; and a beginning-of-text token comes first.
_WHOLE_WORDS_AND_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")


def build_gguf_tokenizer(header: GgufHeader) -> Tokenizer:
    """The tokenizer that the file describes. Raises CheckpointError for a kind or a pre-tokenizer that is not known."""
    embedded = header.metadata.get("tokenizer.huggingface.json")
    if embedded:
        return Tokenizer.from_str(embedded)
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(header)
    elif kind == "llama":
        tokenizer = _sentencepiece(header)
    else:
        raise CheckpointError(
            f"{header.path} has a tokenizer of kind {kind!r}, which is not supported. Supported: gpt2 (byte-level BPE), llama "
            "(sentencepiece BPE). Name the folder of the original tokenizer with --tokenizer-path"
        )
    _add_marked_tokens(tokenizer, header)
    _add_begin_and_end(tokenizer, header)
    return tokenizer


def _tokens(header: GgufHeader) -> list[str]:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{header.path} holds no tokenizer.ggml.tokens: name a tokenizer folder with --tokenizer-path")
    return tokens


def _byte_level(header: GgufHeader) -> Tokenizer:
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in header.metadata.get("tokenizer.ggml.merges", ())]
    vocab = {token: index for index, token in enumerate(_tokens(header))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_AND_BOS))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
        byte_level.use_regex = False
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif pre in _SINGLE_DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre in _GPT2:
        tokenizer.pre_tokenizer = byte_level
    else:
        known = ", ".join(sorted({*_PATTERNS, *_SINGLE_DIGITS, *_GPT2}))
        raise CheckpointError(
            f"{header.path} names the pre-tokenizer {pre!r}, which is not known; cutting text by another's rules would give wrong "
            f"token ids. Known: {known}. Name the folder of the original tokenizer with --tokenizer-path"
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: GgufHeader) -> Tokenizer:
    """Sentencepiece BPE: spaces as U+2581, unknown characters as byte tokens, merges implied by the pieces' scores."""
    tokens = _tokens(header)
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_implied_merges(header, vocab),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefixed else back)
    return tokenizer


def _implied_merges(header: GgufHeader, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, best score first: the order in which sentencepiece would join them."""
    stated = header.metadata.get("tokenizer.ggml.merges")
    if stated:
        return [(left, right) for left, _, right in (merge.partition(" ") for merge in stated)]
    scores = header.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(_tokens(header)):
        raise CheckpointError(f"{header.path} has neither merges nor a score per token: name a tokenizer folder with --tokenizer-path")
    marked = _types(header)
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocab.items():
        if marked[index] in (_CONTROL, _USER_DEFINED, _BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right, (piece[:cut], piece[cut:])))
    ranked.sort()
    return [pair for *_, pair in ranked]


def _types(header: GgufHeader) -> list[int]:
    count = len(_tokens(header))
    types = header.metadata.get("tokenizer.ggml.token_type") or [1] * count
    if len(types) != count:
        raise CheckpointError(f"{header.path} has {count} tokens but {len(types)} token types: convert the model again")
    return list(types)


def _add_marked_tokens(tokenizer: Tokenizer, header: GgufHeader) -> None:
    """Control tokens are found whole in text and hidden when shown; user-defined ones are found whole and shown."""
    marked = list(zip(_tokens(header), _types(header), strict=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in marked if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token, kind in marked if kind == _USER_DEFINED])


def _add_begin_and_end(tokenizer: Tokenizer, header: GgufHeader) -> None:
    sentencepiece = header.metadata.get("tokenizer.ggml.model") == "llama"
    default_bos = sentencepiece or header.metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS_AND_BOS
    tokens = _tokens(header)
    ends: dict[str, tuple[str, int]] = {}
    for kind, default in (("bos", default_bos), ("eos", False)):
        token_id = header.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if header.metadata.get(f"tokenizer.ggml.add_{kind}_token", default) and token_id is not None:
            ends[kind] = (tokens[token_id], token_id)
    add_begin_and_end(tokenizer, bos=ends.get("bos"), eos=ends.get("eos"))


def add_begin_and_end(tokenizer: Tokenizer, *, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> None:
    """Have `encode` put these (token, id) before and after a text, and nothing else."""
    if bos is None and eos is None:
        tokenizer.post_processor = None
        return
    first, last = ("bos:0 " if bos else ""), (" eos:0" if eos else "")
    second_first, second_last = first.replace(":0", ":1"), last.replace(":0", ":1")
    # Stand-in names, because a token's own text may hold the colons and spaces that this little language gives a meaning.
    named = [{"id": name, "ids": [end[1]], "tokens": [end[0]]} for name, end in (("bos", bos), ("eos", eos)) if end is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A:0{last}", pair=f"{first}$A:0{last} {second_first}$B:1{second_last}", special_tokens=named
    )
