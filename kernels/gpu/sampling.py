"""Drawing tokens on a GPU without sorting a row, and penalties. The contract stands in kernels/sampling.py.

A row is cut into spans, one for each program; whoever comes last of a row's programs does what concerns the whole row. So a step is a few
launches one after another, none of which the host waits for, and all sums are taken in one order.

A filter keeps a beginning of the row in its order (largest logit first, lowest id among equals), so it is known by a cut: the key of the
last logit kept, and how many of that key are. A cut is searched by counting, or weighing, what lies above 15 pivots at once; the next
search looks only between the two pivots that the cut lies between, at a list of what was found there. The first searches space their
pivots evenly in logits, which soon leaves few; the others in keys, which ends at a single one whatever the logits are.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu.logit_rows import LOWEST_EXPONENT
from .launch import Launch
from .workspace import Workspace, workspace_of

SPAN: Final = 4096  # logits of a program
_LIST: Final = 1024  # of them on a list, at most
_BY_LOGIT: Final = 3  # searches with pivots spaced in logits
_BY_KEY: Final = 8  # and in keys: 16 ** 8 is the number of keys
_NUM_PIVOTS = tl.constexpr(15)
_PIECES = tl.constexpr(16)
# What is known of a row, float64: the cut's bracket (from LOW to below HIGH), what lies at or above HIGH, what is looked for; the cut of
# the filter before and how many of its key it keeps, the row's largest logit, and whether top_p leaves the row alone.
_LOW, _HIGH, _ABOVE, _TARGET, _BEFORE_CUT, _BEFORE_TIES, _PEAK, _IS_OFF = (tl.constexpr(place) for place in range(8))
_STATE: Final = 8
_WIDTH = tl.constexpr(_STATE)
_EVERYTHING = tl.constexpr(2.0**31)
_LOWEST = tl.constexpr(LOWEST_EXPONENT)
_LEAST = tl.constexpr(-3.4e38)
_IN_PROMPT = tl.constexpr(1 << 30)  # sampling.IN_PROMPT


@triton.jit
def _key(x):
    """int32 in the order of the floats; 0 and -0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _logit(key):
    """The float of a key."""
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, peak, temperature, least):
    z = (x - peak) / temperature
    weight = tl.where(z >= _LOWEST, tl.exp(z), 0.0)
    return tl.where(weight >= least, weight, 0.0)


@triton.jit
def _arrive(arrived, row, num_spans):
    """Whether this program is the last of its row; what the others stored is there then."""
    tl.debug_barrier()  # every thread has stored before one of them counts
    is_last = tl.atomic_add(arrived + row, 1, sem="acq_rel") == num_spans - 1
    if is_last:
        tl.store(arrived + row, 0)
    return is_last


@triton.jit(do_not_specialize=["num_spans"])
def _peaks(
    logits, temperature, top_k, min_p, peaks, ids, state, out, arrived, stride, vocab, num_spans,
    DRAWS: tl.constexpr, HAS_TOP_K: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """The largest logit of each row and its id, -1 in a row without a distribution; where tokens are drawn, also the first bracket."""
    row, span = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token = span * SPAN + tl.arange(0, SPAN)
    x = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf"))
    peak = tl.max(x, 0)
    first = tl.min(tl.where(x == peak, token, vocab), 0)
    is_bad = tl.max((~(x < float("inf"))).to(tl.int32), 0) > 0
    tl.store(peaks + row * num_spans + span, tl.where(is_bad, float("nan"), peak))
    tl.store(ids + row * num_spans + span, first)
    if _arrive(arrived, row, num_spans):
        every = tl.arange(0, SPANS)
        found = tl.load(peaks + row * num_spans + every, mask=every < num_spans, other=-float("inf"), cache_modifier=".cg")
        places = tl.load(ids + row * num_spans + every, mask=every < num_spans, other=vocab, cache_modifier=".cg")
        best = tl.max(found, 0)
        is_bad = (tl.max((~(found < float("inf"))).to(tl.int32), 0) > 0) | (best == -float("inf"))
        token_id = tl.min(tl.where(found == best, places, vocab), 0)
        tl.store(out + row, tl.where(is_bad, -1, token_id).to(tl.int64))
        if DRAWS:
            heat = tl.load(temperature + row)
            depth = tl.minimum(-_LOWEST, -tl.log(tl.maximum(tl.load(min_p + row), 1.2e-38)))
            # All that weighs anything lies above it, rounding included.
            bound = tl.maximum(best - (depth * 1.0001 + 1e-5) * heat - 1e-5 * tl.abs(best), _LEAST)
            low, high = _key(bound), _key(best).to(tl.int64) + 1
            wanted = _EVERYTHING
            if HAS_TOP_K:
                k = tl.load(top_k + row)
                wanted = tl.where(k > 0, k, 0).to(tl.float64)
                wanted = tl.where(wanted > 0, wanted, _EVERYTHING)
            place = state + row * _WIDTH
            tl.store(place + _LOW, low.to(tl.float64))
            tl.store(place + _HIGH, tl.where(wanted < _EVERYTHING, high, low.to(tl.int64) + 1).to(tl.float64))
            tl.store(place + _ABOVE, 0.0)
            tl.store(place + _TARGET, wanted)
            # Nothing is drawn where it is not a number.
            tl.store(place + _PEAK, tl.where(is_bad | (heat <= 0), float("nan"), best).to(tl.float64))


@triton.jit
def _look(
    source, count, low, high, pivots, peak, heat, least, mine, into, length,
    BY_WEIGHT: tl.constexpr, SIZE: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Store what of `count` logits lies within the bracket at or above each pivot, how many or their weights; and put it all on a list.

    The list's length is -1 where there is no room for it.
    """
    at, index = tl.arange(0, SIZE), tl.arange(0, _PIECES)
    x = tl.load(source + at, mask=at < count, other=-float("inf"))
    keys, weight = _key(x), _weight(x, peak, heat, least)
    is_within = (keys >= low) & (keys < high) & (weight > 0)
    found = tl.zeros([_PIECES], tl.float64)
    for i in tl.static_range(_NUM_PIVOTS):
        pivot = tl.sum(tl.where(index == i, pivots, 0), 0)
        is_above = is_within & (keys >= pivot)
        part = tl.sum(tl.where(is_above, weight, 0.0).to(tl.float64), 0) if BY_WEIGHT else tl.sum(is_above.to(tl.int32), 0).to(tl.float64)
        found = tl.where(index == i, part, found)
    tl.store(mine + index, found)
    place = tl.cumsum(is_within.to(tl.int32), 0) - 1
    kept = tl.sum(is_within.to(tl.int32), 0)
    tl.store(into + place, x, mask=is_within & (place < LIST))
    tl.store(length, tl.where(kept <= LIST, kept, -1))


@triton.jit(do_not_specialize=["num_spans", "rows", "step"])
def _search(
    logits, temperature, min_p, state, found, lists, lengths, arrived, stride, vocab, num_spans, rows, step,
    BY_WEIGHT: tl.constexpr, BY_LOGIT: tl.constexpr, FIRST: tl.constexpr, SPAN: tl.constexpr,
    LIST: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Cut every row's bracket into 16 and keep the piece in which the cut lies."""
    row, span = tl.program_id(1).to(tl.int64), tl.program_id(0)
    place = state + row * _WIDTH
    low, high = tl.load(place + _LOW).to(tl.int64), tl.load(place + _HIGH).to(tl.int64)
    peak = tl.load(place + _PEAK).to(tl.float32)
    if (high - low > 1) & (peak > -float("inf")):
        heat = tl.load(temperature + row)
        least = tl.load(min_p + row)
        index = tl.arange(0, _PIECES)
        if BY_LOGIT:
            share = (index + 1) / 16.0
            between = _logit(low.to(tl.int32)) * (1.0 - share) + _logit((high - 1).to(tl.int32)) * share
            pivots = tl.minimum(tl.maximum(_key(between), low.to(tl.int32)), (high - 1).to(tl.int32))
        else:
            pivots = (low + (high - low) * (index + 1) // 16).to(tl.int32)
        cell, cells = row * num_spans + span, rows.to(tl.int64) * num_spans
        mine = found + cell * _PIECES
        into, length = lists + ((step % 2) * cells + cell) * LIST, lengths + (step % 2) * cells + cell
        before = (step + 1) % 2
        listed = -1
        if not FIRST:
            listed = tl.load(lengths + before * cells + cell)
        if listed < 0:
            start = span * SPAN
            whole = logits + row * stride + start
            _look(whole, vocab - start, low, high, pivots, peak, heat, least, mine, into, length, BY_WEIGHT, SPAN, LIST)
        else:
            source = lists + (before * cells + cell) * LIST
            _look(source, listed, low, high, pivots, peak, heat, least, mine, into, length, BY_WEIGHT, LIST, LIST)
        if _arrive(arrived, row, num_spans):
            every = tl.arange(0, SPANS)
            all_found = found + (row * num_spans + every[:, None]) * _PIECES + index[None, :]
            parts = tl.load(all_found, mask=(every < num_spans)[:, None], other=0.0, cache_modifier=".cg")
            above = tl.load(place + _ABOVE)
            reached = tl.sum(parts, 0) + above
            does = (reached >= tl.load(place + _TARGET)) & (index < _NUM_PIVOTS)
            fails = (~does) & (index < _NUM_PIVOTS)  # pivots need not rise: interpolation rounds
            tl.store(place + _LOW, tl.maximum(tl.max(tl.where(does, pivots.to(tl.int64), low), 0), low).to(tl.float64))
            tl.store(place + _HIGH, tl.min(tl.where(fails, pivots.to(tl.int64), high), 0).to(tl.float64))
            tl.store(place + _ABOVE, tl.max(tl.where(fails, reached, above), 0))


@triton.jit
def _ties_kept(place, weight_of_cut, BY_WEIGHT: tl.constexpr):
    """How many of the cut's key are kept, lowest ids first, at most."""
    above, target = tl.load(place + _ABOVE), tl.load(place + _TARGET)
    ties = target - above
    if BY_WEIGHT:
        before_ties = tl.load(place + _BEFORE_TIES)
        wanted = tl.ceil(ties / tl.maximum(weight_of_cut, 1.2e-38))
        wanted = tl.maximum(wanted, tl.where(above > 0, 0.0, 1.0))
        at_most = tl.where(tl.load(place + _LOW) == tl.load(place + _BEFORE_CUT), before_ties, _EVERYTHING)
        ties = tl.where(tl.load(place + _IS_OFF) > 0, before_ties, tl.minimum(wanted, at_most))
    return tl.maximum(tl.minimum(ties, _EVERYTHING), 0.0)


@triton.jit
def _weight_of_cut(place, peak, heat):
    cut = _logit(tl.load(place + _LOW).to(tl.int64).to(tl.int32))
    return tl.sum(_weight(cut + tl.zeros([1], tl.float32), peak, heat, 0.0), 0).to(tl.float64)


@triton.jit(do_not_specialize=["num_spans"])
def _kept(
    logits, temperature, top_p, min_p, uniform, state, masses, ties, out, arrived, stride, vocab, num_spans,
    DRAWS: tl.constexpr, BY_WEIGHT: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Weigh what the cut keeps of each row; then draw from it, or begin the search for the cut that top_p makes of it."""
    row, span = tl.program_id(1).to(tl.int64), tl.program_id(0)
    place = state + row * _WIDTH
    peak = tl.load(place + _PEAK).to(tl.float32)
    if peak > -float("inf"):  # and a number
        heat = tl.load(temperature + row)
        least = tl.load(min_p + row)
        cut = tl.load(place + _LOW).to(tl.int64).to(tl.int32)
        token = span * SPAN + tl.arange(0, SPAN)
        x = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf"))
        keys, weight = _key(x), _weight(x, peak, heat, least)
        tl.store(masses + row * num_spans + span, tl.sum(tl.where(keys > cut, weight, 0.0).to(tl.float64), 0))
        tl.store(ties + row * num_spans + span, tl.sum(((keys == cut) & (weight > 0)).to(tl.int32), 0))
        if _arrive(arrived, row, num_spans):
            every = tl.arange(0, SPANS)
            mass = tl.load(masses + row * num_spans + every, mask=every < num_spans, other=0.0, cache_modifier=".cg")
            tied = tl.load(ties + row * num_spans + every, mask=every < num_spans, other=0, cache_modifier=".cg")
            of_cut = _weight_of_cut(place, peak, heat)
            keeps = _ties_kept(place, of_cut, BY_WEIGHT)
            before = (tl.cumsum(tied, 0) - tied).to(tl.float64)
            kept = tl.minimum(tl.maximum(keeps - before, 0.0), tied.to(tl.float64))
            mass += kept * of_cut
            if DRAWS:
                running = tl.cumsum(mass, 0)
                target = tl.load(uniform + row) * tl.sum(mass, 0)
                last = tl.max(tl.where(mass > 0, every, 0), 0)
                chosen = tl.minimum(tl.sum((running <= target).to(tl.int32), 0), last)
                start = tl.sum(tl.where(every < chosen, mass, 0.0), 0)
                ties_left = tl.sum(tl.where(every == chosen, kept, 0.0), 0)
                token = chosen * SPAN + tl.arange(0, SPAN)
                x = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf"))
                keys, weight = _key(x), _weight(x, peak, heat, least)
                is_tie = (keys == cut) & (weight > 0)
                rank = tl.cumsum(is_tie.to(tl.int32), 0)
                share = tl.where((keys > cut) | (is_tie & (rank <= ties_left)), weight, 0.0).to(tl.float64)
                is_past = (tl.cumsum(share, 0) + start > target) & (share > 0)
                first = tl.min(tl.where(is_past, token, vocab), 0)
                final = tl.max(tl.where(share > 0, token, 0), 0)  # rounding could carry the target past it
                tl.store(out + row, tl.minimum(first, final).to(tl.int64))
            else:
                p = tl.load(top_p + row).to(tl.float64)
                high = _key(peak).to(tl.int64) + 1
                tl.store(place + _BEFORE_CUT, cut.to(tl.float64))
                tl.store(place + _BEFORE_TIES, keeps)
                tl.store(place + _HIGH, tl.where(p < 1, high, cut.to(tl.int64) + 1).to(tl.float64))
                tl.store(place + _ABOVE, 0.0)
                tl.store(place + _TARGET, p * tl.sum(mass, 0))
                tl.store(place + _IS_OFF, tl.where(p < 1, 0.0, 1.0).to(tl.float64))


@triton.jit
def _penalise(logits, counts, rows, slots, factors, stride, vocab, BLOCK: tl.constexpr):
    index = tl.program_id(1)
    row, slot = tl.load(rows + index).to(tl.int64), tl.load(slots + index).to(tl.int64)
    repetition = tl.load(factors + index * 3)
    frequency, presence = tl.load(factors + index * 3 + 1), tl.load(factors + index * 3 + 2)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + slot * vocab + token, mask=token < vocab, other=0)
    at = logits + row * stride + token
    x = tl.load(at, mask=count != 0, other=0.0)
    x = tl.where(x > 0, x / repetition, x * repetition)
    generated = (count & (_IN_PROMPT - 1)).to(tl.float32)
    tl.store(at, tl.where(generated > 0, x - frequency * generated - presence, x), mask=count != 0)


@triton.jit
def _count(tokens, counts, rows, slots, vocab):
    index = tl.program_id(0)
    token, slot = tl.load(tokens + tl.load(rows + index)), tl.load(slots + index).to(tl.int64)
    if token >= 0:
        tl.atomic_add(counts + slot * vocab + token, 1, sem="relaxed")


class _Scratch:
    """Views into one buffer of the device's workspace."""

    def __init__(self, rows: int, spans: int, workspace: Workspace, *, lists: bool) -> None:
        cells = rows * spans
        sizes = (
            8 * rows * _STATE,
            8 * cells * 16 if lists else 0,
            8 * cells,
            4 * cells,
            4 * cells,
            8 * cells,
            8 * cells * _LIST if lists else 0,
        )
        buffer = workspace.take("sampling", sum(-(-size // 16) * 16 for size in sizes))
        parts: list[Tensor] = []
        for size in sizes:
            parts.append(buffer[:size])
            buffer = buffer[-(-size // 16) * 16 :]
        dtypes = (torch.float64, torch.float64, torch.float64, torch.float32, torch.int32, torch.int32, torch.float32)
        self.state, self.found, self.masses, self.peaks, self.ids, self.lengths, self.lists = (
            part.view(dtype) for part, dtype in zip(parts, dtypes, strict=True)
        )


def launches(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    uniform: Tensor | None,
    out: Tensor,
    workspace: Workspace,
) -> list[Launch]:
    """The launches, in order, that fill out int64 [B] with a token of each row of logits [B, V]; all greedy without a temperature.

    With a temperature there is a `min_p` too.
    """
    rows, vocab = logits.shape
    spans = -(-vocab // SPAN)
    searches = top_k is not None or top_p is not None
    space = _Scratch(rows, spans, workspace, lists=searches)
    grid, padded = (spans, rows), triton.next_power_of_2(spans)
    shape: dict[str, Any] = {"SPAN": SPAN, "SPANS": padded, "num_warps": 8, "num_stages": 1}
    sizes = (logits.stride(0), vocab, spans)
    arrived = workspace.arrived
    # What is not there stands in for itself: a pointer of its type, so that there are few kernels, and flags that nobody reads it.
    heat, k = space.peaks if temperature is None else temperature, space.ids if top_k is None else top_k
    p, least = heat if top_p is None else top_p, heat if min_p is None else min_p
    first = (logits, heat, k, least, space.peaks, space.ids, space.state, out, arrived, *sizes)
    flags = {"DRAWS": temperature is not None, "HAS_TOP_K": top_k is not None}
    todo = [Launch(_peaks, grid, first, {**flags, **shape})]
    if temperature is None:
        return todo

    def search(*, by_weight: bool) -> None:
        args = (logits, heat, least, space.state, space.found, space.lists, space.lengths, arrived, *sizes, rows)
        for step in range(_BY_LOGIT + _BY_KEY):
            flags = {"BY_WEIGHT": by_weight, "BY_LOGIT": step < _BY_LOGIT, "FIRST": step == 0, "LIST": _LIST}
            todo.append(Launch(_search, grid, (*args, step), {**flags, **shape}))

    def kept(*, draws: bool, by_weight: bool) -> None:
        args = (logits, heat, p, least, uniform, space.state, space.masses, space.ids, out, arrived, *sizes)
        todo.append(Launch(_kept, grid, args, {"DRAWS": draws, "BY_WEIGHT": by_weight, **shape}))

    if top_k is not None:
        search(by_weight=False)
    if top_p is not None:
        kept(draws=False, by_weight=False)
        search(by_weight=True)
    kept(draws=True, by_weight=top_p is not None)
    return todo


def sample_tokens(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    uniform: Tensor | None,
) -> Tensor:
    """int64 [B]: see kernels/sampling.py."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if temperature is not None and min_p is None:
        min_p = torch.zeros_like(temperature)
    if out.numel():
        for launch in launches(logits, temperature, top_k, top_p, min_p, uniform, out, workspace_of(logits.device)):
            launch()
    return out


def penalise(logits: Tensor, counts: Tensor, rows: Tensor, slots: Tensor, factors: Tensor) -> Launch:
    """The launch that is `apply_counted_penalties`."""
    vocab, block = logits.shape[1], 2048
    args = (logits, counts, rows, slots, factors, logits.stride(0), vocab)
    return Launch(_penalise, (-(-vocab // block), rows.shape[0]), args, {"BLOCK": block, "num_warps": 8, "num_stages": 1})


def count(tokens: Tensor, counts: Tensor, rows: Tensor, slots: Tensor) -> Launch:
    """The launch that is `count_tokens`."""
    return Launch(_count, (rows.shape[0],), (tokens, counts, rows, slots, counts.shape[1]), {"num_warps": 1, "num_stages": 1})
