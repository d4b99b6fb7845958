"""Time paged attention against torch's scaled_dot_product_attention over contiguous float32 keys and values, in the same run.

    python -m octavo.benchmarks.kernels.bench_paged_attention        (or run this file)

Prints GB/s of keys and values read, GFLOP/s of the two products (visible pairs alone), and torch's time over ours. Then the same
cases on pages of bfloat16 and of the three kinds of codes, timed in turn: the time of each, and bfloat16's over it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.kernels.paged_attention import AttentionPlan, paged_attention, plan_attention
from octavo.kernels.pages import encode

HEADS, KV_HEADS, DIM, PAGE_SIZE = 9, 3, 64, 16
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
CASES = (
    # name, sequences, queries each, context
    ("decode", 1, 1, 256),
    ("decode", 1, 1, 4096),
    ("decode", 8, 1, 1024),
    ("decode", 64, 1, 256),
    ("decode", 64, 1, 1024),
    ("verify", 8, 5, 1024),
    ("prefill", 1, 128, 128),
    ("prefill", 1, 512, 512),
    ("extend", 1, 512, 1024),
    ("extend", 1, 512, 4096),
)


def best_time(run: Callable[[], object], budget_s: float = 0.4) -> float:
    """The fastest of as many runs as fit the budget, in seconds."""
    run()
    best, spent = float("inf"), 0.0
    while spent < budget_s:
        start = time.perf_counter()
        run()
        taken = time.perf_counter() - start
        best, spent = min(best, taken), spent + taken
    return best


def num_layers(sequences: int, context: int, shape: tuple[int, int, int]) -> int:
    """Several layers' pages in turn, so that short contexts are not read from a cache that a model would have lost meanwhile."""
    slots = sequences * -(-context // PAGE_SIZE) * PAGE_SIZE
    return max(1, min(16, (1 << 27) // (slots * shape[1] * shape[2] * 4)))


def make_plan(sequences: int, queries: int, context: int, shape: tuple[int, int, int]) -> AttentionPlan:
    pages = -(-context // PAGE_SIZE)
    table = torch.randperm(sequences * pages).int().view(sequences, pages)
    starts = torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    return plan_attention(starts, lengths, table, num_heads=shape[0], num_kv_heads=shape[1], head_dim=shape[2])


def bench(name: str, sequences: int, queries: int, context: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    heads, kv_heads, dim = shape
    layers = num_layers(sequences, context, shape)
    k, v = (torch.randn(layers, sequences * -(-context // PAGE_SIZE), kv_heads, PAGE_SIZE, dim).to(dtype) for _ in range(2))
    q = torch.randn(sequences * queries, heads, dim)
    out = torch.empty_like(q)
    plan = make_plan(sequences, queries, context, shape)

    def ours() -> None:
        for layer in range(layers):
            paged_attention(q, k[layer], v[layer], plan, scale=dim**-0.5, out=out)

    def whole(x: Tensor) -> Tensor:
        return x[0, plan.page_table.long()].transpose(1, 2).flatten(2, 3)[:, :, :context].float().repeat_interleave(heads // kv_heads, 1)

    keys, values = whole(k), whole(v)
    queries_first = q.view(sequences, queries, heads, dim).transpose(1, 2).contiguous()
    own = torch.arange(context - queries, context)[:, None]
    mask = torch.arange(context)[None, :] <= own

    def theirs() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(queries_first, keys, values, attn_mask=None if queries == 1 else mask)

    taken = best_time(ours) / layers
    torch_taken = best_time(theirs)
    read = 2 * sequences * context * kv_heads * dim * k.element_size()
    pairs = sequences * sum(range(context - queries + 1, context + 1))
    paged_attention(q, k[0], v[0], plan, scale=dim**-0.5, out=out)
    error = (out.view(sequences, queries, heads, dim).transpose(1, 2) - theirs()).abs().max().item()
    rates = f"{read / taken / 1e9:8.1f} GB/s{4 * pairs * heads * dim / taken / 1e9:8.1f} GFLOP/s   torch / ours{torch_taken / taken:7.2f}"
    case = f"{name:8}{sequences:4} x {queries:4} on {context:5}  {str(dtype)[6:]:9} {heads}/{kv_heads}x{dim:<4}"
    print(f"{case}{taken * 1e6:10.1f} us{rates}  error {error:.1e}")


def compare(name: str, sequences: int, queries: int, context: int, shape: tuple[int, int, int], rounds: int = 15) -> None:
    """One case on pages of each kind, a round of each in turn, so that a slow moment of the machine meets all of them."""
    heads, kv_heads, dim = shape
    layers, plan = num_layers(sequences, context, shape), make_plan(sequences, queries, context, shape)
    q = torch.randn(sequences * queries, heads, dim)
    out = torch.empty_like(q)
    numbers = [torch.randn(layers, sequences * -(-context // PAGE_SIZE), kv_heads, PAGE_SIZE, dim) for _ in range(2)]
    pages = {torch.bfloat16: [x.bfloat16() for x in numbers]} | {dtype: [encode(x, dtype) for x in numbers] for dtype in CODES}
    best = dict.fromkeys(pages, float("inf"))
    for _ in range(rounds):
        for dtype, (k, v) in pages.items():

            def step(dtype: torch.dtype = dtype, k: Tensor = k, v: Tensor = v) -> None:
                for layer in range(layers):
                    paged_attention(q, k[layer], v[layer], plan, scale=dim**-0.5, kv_dtype=dtype, out=out)

            best[dtype] = min(best[dtype], best_time(step, 0.02) / layers)
    times = "  ".join(f"{str(dtype)[6:]} {taken * 1e6:8.1f} us ({best[torch.bfloat16] / taken:.2f})" for dtype, taken in best.items())
    print(f"{name:8}{sequences:4} x {queries:4} on {context:5}  {heads}/{kv_heads}x{dim:<4} {times}")


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for case in CASES:
        bench(*case, torch.bfloat16, (HEADS, KV_HEADS, DIM))
    for shape in ((32, 8, 128), (8, 8, 64), (8, 2, 256)):
        for case in (("decode", 8, 1, 1024), ("extend", 1, 512, 1024)):
            bench(*case, torch.bfloat16, shape)
    for dtype in (torch.float32, torch.float16):
        for case in (("decode", 8, 1, 1024), ("extend", 1, 512, 1024)):
            bench(*case, dtype, (HEADS, KV_HEADS, DIM))
    for case in CASES:
        compare(*case, (HEADS, KV_HEADS, DIM))
    for shape in ((32, 8, 128), (8, 8, 64), (8, 2, 256)):
        for case in (("decode", 8, 1, 1024), ("extend", 1, 512, 1024)):
            compare(*case, shape)


if __name__ == "__main__":
    main()
