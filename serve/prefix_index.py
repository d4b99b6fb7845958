"""Which replica was sent the most of a text's beginning before. Knows no text but its bytes, no tokens and no network.

A router that keeps what shares a beginning together finds it in that replica's prefix cache. Texts are cut into blocks; each block's key
holds all before it, so that a replica has seen a beginning exactly if it has seen its last block.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

BLOCK_BYTES = 128  # some thirty tokens
MOST_BLOCKS = 512  # of a text: what comes later tells replicas apart no more
_ENOUGH = BLOCK_BYTES * MOST_BLOCKS  # bytes of a beginning that are looked at
_MOST_BODY = 1 << 20  # bytes; to read a larger one would hold up every stream beside it
Replica = TypeVar("Replica", bound=Hashable)


def blocks_of(text: bytes) -> tuple[bytes, ...]:
    """Keys of the whole blocks that a text begins with, eight bytes each."""
    keys: list[bytes] = []
    digest = hashlib.blake2b(digest_size=8)
    for end in range(BLOCK_BYTES, min(len(text), BLOCK_BYTES * MOST_BLOCKS) + 1, BLOCK_BYTES):
        digest.update(text[end - BLOCK_BYTES : end])
        keys.append(digest.digest())
    return tuple(keys)


def beginning_of(body: bytes) -> bytes:
    """What a request's answer begins with, as bytes that are alike where its tokens are; empty for what is no request for text."""
    if len(body) > _MOST_BODY:
        return b""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return b""
    if not isinstance(asked, dict):
        return b""
    if isinstance(messages := asked.get("messages"), list):
        parts: list[bytes] = []
        for one in [asked.get("tools"), *messages]:
            parts.append(json.dumps(one, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace"))
            if sum(map(len, parts)) > _ENOUGH:
                break
        return b"\n".join(parts)[:_ENOUGH]
    for name in ("prompt", "text", "input_ids"):
        if name in asked:
            return _bytes_of(asked[name])
    return b""


def _bytes_of(prompt: Any) -> bytes:
    """Of several prompts the first."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt[:_ENOUGH].encode("utf-8", "replace")
    if isinstance(prompt, list):
        prompt = prompt[: _ENOUGH // 4]
    if isinstance(prompt, list) and all(isinstance(token, int) and 0 <= token < 1 << 32 for token in prompt):
        return b"".join(token.to_bytes(4, "little") for token in prompt)
    return b""


class PrefixIndex(Generic[Replica]):
    """Remembers up to `max_blocks` blocks, those used last."""

    def __init__(self, max_blocks: int = 1 << 16) -> None:
        self._max_blocks = max_blocks
        self._seen: OrderedDict[bytes, set[Replica]] = OrderedDict()

    def add(self, blocks: Sequence[bytes], replica: Replica) -> None:
        """The replica has been sent a text with these blocks."""
        for block in reversed(blocks):  # the first is then the youngest: a beginning outlives what follows it
            self._seen.setdefault(block, set()).add(replica)
            self._seen.move_to_end(block)
        while len(self._seen) > self._max_blocks:
            self._seen.popitem(last=False)

    def matches(self, blocks: Sequence[bytes], replicas: Collection[Replica]) -> Mapping[Replica, int]:
        """How many of a text's first blocks each replica has seen."""
        found = dict.fromkeys(replicas, 0)
        still = set(replicas)
        for number, block in enumerate(blocks, 1):
            still &= self._seen.get(block, set())
            if not still:
                break
            found.update(dict.fromkeys(still, number))
        return found

    def forget(self, replica: Replica) -> None:
        """It is gone, and its cache with it."""
        for block in [block for block, replicas in self._seen.items() if replica in replicas]:
            self._seen[block].discard(replica)
            if not self._seen[block]:
                del self._seen[block]


def order_of(matches: Mapping[Replica, int], loads: Mapping[Replica, int], *, most_ahead: int, first_block: bytes) -> list[Replica]:
    """Replicas in the order in which a request should try them.

    Who has seen most of it comes first, unless that one has more than `most_ahead` requests more than the least busy; else the least busy,
    and of those that are equally busy the one that the text's first block falls to, so that several routers choose alike.
    """
    least = min(loads.values())

    def key(replica: Replica) -> tuple[int, int, bytes]:
        keeps = matches[replica] if loads[replica] - least <= most_ahead else 0
        return (-keeps, loads[replica], hashlib.blake2b(first_block + str(replica).encode(), digest_size=8).digest())

    return sorted(matches, key=key)
