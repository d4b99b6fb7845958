"""Request: the state of one sequence from arrival to finish. Plain values; knows no tensors."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from .outputs import FinishReason
from .radix_cache import RadixNode
from .sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """One sequence. `tokens` is the prompt and what was generated; `num_computed` of them have their KV in `pages`.

    A step may be launched before the one ahead of it has landed. `num_launched` tokens then are, or will be, in pages, and `num_awaited`
    tokens that launched steps sample follow `tokens`; the last of them is number `awaited_row` among the tokens of the last launched step.
    The first `num_tree_pages` pages belong to the radix tree, and `node` (locked) is where that prefix ends; the rest are its own.
    """

    request_id: str
    prompt_length: int
    tokens: list[int]
    params: SamplingParams
    max_tokens: int  # params.max_tokens, or what context and pool leave
    stop_token_ids: frozenset[int]
    namespace: str = ""
    priority: int = 0
    arrival: int = 0
    num_computed: int = 0
    num_launched: int = 0
    num_awaited: int = 0
    awaited_row: int = -1
    pages: array[int] = field(default_factory=lambda: array("i"))
    num_tree_pages: int = 0
    node: RadixNode | None = None
    cached_tokens: int | None = None  # prompt tokens found cached when first admitted
    num_retractions: int = 0
    leader: Request | None = field(default=None, repr=False)  # while waiting: who computes the pages that this one will share
    num_followed: int = 0  # leading tokens known to equal the leader's
    finish: FinishReason | None = None
    arrived_s: float = 0.0  # by time.monotonic
    started_s: float | None = None  # when its first step was launched

    @property
    def queue_s(self) -> float:
        """Seconds that it waited for its first step; 0 while it does."""
        return 0.0 if self.started_s is None else self.started_s - self.arrived_s

    @property
    def is_running(self) -> bool:
        return self.node is not None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def num_pending(self) -> int:
        """Tokens that no step computes yet, an awaited one among them: 1 while decoding, more while prefilling."""
        return len(self.tokens) + self.num_awaited - self.num_launched

    @property
    def num_sampled(self) -> int:
        """Tokens generated and awaited."""
        return self.num_generated + self.num_awaited

    @property
    def has_next(self) -> bool:
        """Whether another step is wanted, whatever the awaited tokens are."""
        awaited = self.num_awaited
        return len(self.tokens) + awaited > self.num_launched and (awaited == 0 or self.num_sampled < self.max_tokens)

    @property
    def is_prefilling(self) -> bool:
        return self.num_launched < self.prompt_length or self.num_pending > 1

    @property
    def will_share(self) -> bool:
        """Whether full pages of a prompt are still to come into the tree."""
        return self.num_computed < self.prompt_length or len(self.tokens) - self.num_computed > 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and self.num_generated == 0

    @property
    def num_cacheable(self) -> int:
        """How many leading tokens may come from the cache: all but the last, and none whose logits are asked for."""
        limit = len(self.tokens) - 1
        return min(limit, max(0, self.params.prompt_logprobs_start - 1)) if self.wants_prompt_logprobs else limit

    def scored_positions(self, start: int, count: int) -> range:
        """Those of the positions start .. start+count-1 whose logits give a prompt log-probability that was asked for."""
        if not self.wants_prompt_logprobs:
            return range(0)
        return range(max(start, self.params.prompt_logprobs_start - 1, 0), min(start + count, self.prompt_length - 1))

    def finish_after(self, token: int) -> FinishReason | None:
        """Whether the sequence ends with `token`, its newest one."""
        if self.num_generated >= self.params.min_tokens and token in self.stop_token_ids:
            return FinishReason("stop", matched=token)
        if self.num_generated >= self.max_tokens:
            return FinishReason("length")
        return None
