"""Pipeline: the stages that a model's layers are divided into, and what they hand on. Of one stage it does nothing.

Ranks are numbered from the last stage to the first, so that rank 0, which samples, has the logits at hand.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Sending(Protocol):
    """A message that is on its way."""

    def wait(self) -> object:
        """Until what was sent may be written over; on a GPU, whatever is launched after this call waits so."""
        ...


class Everyone(Protocol):
    """All ranks of an engine."""

    def send(self, tensor: torch.Tensor, to: int) -> Sending:
        """Begin to send a contiguous tensor to a rank, which receives as many in the same order."""
        ...

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """What a rank sends next, in place."""
        ...

    def smallest(self, number: int) -> int:
        """The least of the ranks' numbers."""
        ...


@dataclass(frozen=True)
class Place:
    """Where rank `rank` stands among `tp_size * pp_size`: its stage, from the front, and its number among the ranks that share it."""

    rank: int
    tp_size: int
    pp_size: int

    @property
    def stage(self) -> int:
        """0 for the stage that has the first layers."""
        return self.pp_size - 1 - self.rank // self.tp_size

    @property
    def tp_rank(self) -> int:
        """Its number among the ranks of its stage."""
        return self.rank % self.tp_size

    def layers(self, num_layers: int) -> range:
        """The stage's layers. The last stages have the fewest: one of them has the head too."""
        share, more = divmod(num_layers, self.pp_size)
        start = self.stage * share + min(self.stage, more)
        return range(start, start + share + (self.stage < more))

    def holds(self, name: str, num_layers: int, *, is_tied: bool) -> bool:
        """Whether a tensor of the checkpoint, by its Hugging Face name, is this stage's. `is_tied`: the head is the embedding."""
        parts = name.split(".")
        if name.startswith("model.layers.") and parts[2].isdecimal() and int(parts[2]) < num_layers:
            return int(parts[2]) in self.layers(num_layers)
        is_last = self.stage == self.pp_size - 1
        if name.startswith("model.embed_tokens."):
            return self.stage == 0 or (is_last and is_tied)
        return is_last


def check_stages(num_layers: int, pp_size: int) -> None:
    """Raises ValueError where there are more stages than layers."""
    if pp_size > num_layers:
        raise ValueError(
            f"--pp-size {pp_size} is not possible: this model has {num_layers} layers, and each stage wants one; give at most that"
        )


@dataclass
class Pipeline:
    """Place `place` of a pipeline. Without `everyone` it knows its layers, and nothing is sent (one stage, or meta tensors)."""

    place: Place = field(default_factory=lambda: Place(0, 1, 1))
    everyone: Everyone | None = None
    _sent: deque[tuple[torch.Tensor, Sending]] = field(default_factory=deque, init=False)

    @property
    def size(self) -> int:
        """Stages."""
        return self.place.pp_size

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.place.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the final norm and the head."""
        return self.place.stage == self.size - 1

    def receive(self, hidden: torch.Tensor) -> None:
        """Put in `hidden` [T, hidden_size] what the stage before hands on for a step; on the first stage nothing."""
        if not self.is_first and self.everyone is not None:
            self.everyone.receive(hidden, self.place.rank + self.place.tp_size)

    def hand_on(self, hidden: torch.Tensor) -> None:
        """Send `hidden` to the stage after this one, from a copy, so that the next step need not wait; on the last stage nothing."""
        if self.is_last or self.everyone is None:
            return
        while len(self._sent) >= self.size:  # what stages further on have not taken yet
            self._sent.popleft()[1].wait()
        copy = hidden.clone(memory_format=torch.contiguous_format)
        self._sent.append((copy, self.everyone.send(copy, self.place.rank - self.place.tp_size)))

    def smallest(self, number: int) -> int:
        """The least of all ranks' numbers."""
        return number if self.everyone is None else self.everyone.smallest(number)

    def wait_for_all(self) -> None:
        """Until every rank has come here."""
        self.smallest(0)
