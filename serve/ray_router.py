"""Ray Serve's request router for our replicas: what shares a beginning goes to the replica that holds it. Knows no HTTP.

An extension of Ray's own interface, `ray.serve.request_router`.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .prefix_index import PrefixIndex, order_of


class PrefixRouter(RequestRouter):  # type: ignore[misc, unused-ignore]
    """Looks at the attribute `blocks` of a call's first argument; a call without any goes to the least busy replica."""

    def initialize_state(self, most_ahead: int = 4, max_blocks: int = 1 << 16) -> None:
        """`most_ahead`: requests that a replica may have more than the least busy one, and still get more for what it holds."""
        self._most_ahead = most_ahead
        self._index: PrefixIndex[ReplicaID] = PrefixIndex(max_blocks)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        blocks = _blocks_of(pending_request)
        if not blocks:
            return [list(candidate_replicas)]
        loads = {replica: self._replica_queue_len_cache.get(replica) or 0 for replica in by_id}
        order = order_of(self._index.matches(blocks, by_id), loads, most_ahead=self._most_ahead, first_block=blocks[0])
        return [[by_id[replica]] for replica in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._index.add(_blocks_of(pending_request), replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._index.forget(replica_id)


def _blocks_of(request: PendingRequest | None) -> tuple[bytes, ...]:
    blocks: tuple[bytes, ...] = getattr(request.args[0], "blocks", ()) if request is not None and request.args else ()
    return blocks
