"""Ray Serve's request router for our replicas: what shares a beginning goes to the replica that holds it. Knows no HTTP.

An extension of Ray's own interface, `ray.serve.request_router`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .prefix_index import PrefixIndex, order_of


class PrefixRouter(RequestRouter):  # type: ignore[misc, unused-ignore]
    """Looks at the attributes `blocks` and `avoid` of a call's first argument; a call without blocks goes to the least busy replica."""

    def initialize_state(self, most_ahead: int = 4, max_blocks: int = 1 << 16) -> None:
        """`most_ahead`: requests that a replica may have more than the least busy one, and still get more for what it holds."""
        self._most_ahead = most_ahead
        self._sent: Counter[ReplicaID] = Counter()  # by this router, and not yet answered
        self._index: PrefixIndex[ReplicaID] = PrefixIndex(max_blocks)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        avoided = _asked_of(pending_request, "avoid")
        well = [replica for replica in candidate_replicas if replica.replica_id.unique_id not in avoided]
        by_id = {replica.replica_id: replica for replica in well or candidate_replicas}
        blocks = _blocks_of(pending_request)
        if not blocks:
            return [list(by_id.values())]
        # Ray's own figure counts what others send, and is forgotten after ten seconds without an answer.
        loads = {replica: max(self._sent[replica], self._replica_queue_len_cache.get(replica) or 0) for replica in by_id}
        order = order_of(self._index.matches(blocks, by_id), loads, most_ahead=self._most_ahead, first_block=blocks[0])
        return [[by_id[replica]] for replica in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._sent[replica_id] += 1
        self._index.add(_blocks_of(pending_request), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._sent[replica_id] = max(0, self._sent[replica_id] - 1)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._forget(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before = set(self._replicas)
        super().update_replicas(replicas)
        for gone in before - {replica.replica_id for replica in replicas}:
            self._forget(gone)

    def _forget(self, replica_id: ReplicaID) -> None:
        self._sent.pop(replica_id, None)
        self._index.forget(replica_id)


def _blocks_of(request: PendingRequest | None) -> tuple[bytes, ...]:
    return _asked_of(request, "blocks")


def _asked_of(request: PendingRequest | None, name: str) -> tuple[Any, ...]:
    """An attribute of a call's first argument, empty where there is none."""
    found: tuple[Any, ...] = getattr(request.args[0], name, ()) if request is not None and request.args else ()
    return found
