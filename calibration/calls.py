"""Calls: what a model calls its blocks with, recorded while stand-ins hand the hidden state on. Knows no checkpoint and no quantization."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Gives = Callable[[Tensor], Any]
# What blocks give: a hidden state, or a tuple that begins with it. The model's code tells by what it does.
GIVES: tuple[Gives, ...] = (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None))


@dataclass(frozen=True, eq=False)
class Call:
    """What a block is called with beside the hidden state, which is its first argument or the keyword `hidden_name`.

    `board`: the keyword of a mapping, one for all blocks of a pass, on which some leave what others read, such as keys and values.
    `streams_first`: whether the block itself takes and gives [streams, B, T, H].
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_name: str | None
    board: str | None = None
    streams_first: bool = False

    def run(self, block: nn.Module, hidden: Tensor, board: MutableMapping[str, Any] | None = None) -> Tensor:
        """The hidden state [B, T, ...] that the block makes of `hidden`, with another `board` than that of the pass that was followed."""
        hidden = hidden.movedim(2, 0) if self.streams_first else hidden
        kwargs = self.kwargs if board is None or self.board is None else {**self.kwargs, self.board: board}
        if self.hidden_name is None:
            out = block(hidden, *self.args, **kwargs)
        else:
            out = block(*self.args, **{**kwargs, self.hidden_name: hidden})
        result: Tensor = out[0] if isinstance(out, tuple | list) else out
        return result.movedim(0, 2) if self.streams_first else result

    def board_of(self, content: Mapping[str, Any]) -> MutableMapping[str, Any] | None:
        """A board of the kind that blocks expect, with this on it; None where they have none."""
        if self.board is None:
            return None
        made: MutableMapping[str, Any] = type(self.kwargs[self.board])()
        made.update(content)
        return made


def board_of(calls: Sequence[Call]) -> str | None:
    """The keyword under which all blocks were given one and the same mapping with nothing in it, as yet."""
    for name, value in calls[0].kwargs.items() if len(calls) > 1 else ():
        if isinstance(value, MutableMapping) and not value and all(call.kwargs.get(name) is value for call in calls):
            return name
    return None


class NotFollowingError(Exception):
    """A block was handed something else than the one before it gave."""


class Recorder:
    """Stands in for the blocks: each hands its hidden state on (the last one `instead`), and what it was called with is kept."""

    def __init__(self, blocks: Sequence[nn.Module], gives: Gives, instead: Tensor | None) -> None:
        self._blocks, self._gives, self._instead = blocks, gives, instead
        self.calls: list[Call] = []
        self.order: list[int] = []  # of the blocks that were called
        self.first: Tensor = torch.empty(0)
        self._previous: Tensor | None = None

    def __enter__(self) -> Recorder:
        for index, block in enumerate(self._blocks):
            block.forward = self._stand_in(index, inspect.signature(type(block).forward))
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            del block.forward

    def _stand_in(self, index: int, signature: inspect.Signature) -> Callable[..., Any]:
        names = list(signature.parameters)[1:]

        def forward(*args: Any, **kwargs: Any) -> Any:
            name = None if args else names[0]
            hidden = args[0] if args else kwargs[names[0]]
            if index and (not isinstance(hidden, Tensor) or self._previous is None or hidden is not self._previous):
                raise NotFollowingError
            if not index:
                self.first = hidden
            kept = {key: value for key, value in kwargs.items() if key != name}
            self.calls.append(Call(args[1:], kept, name))
            self.order.append(index)
            if self._instead is not None and index == len(self._blocks) - 1:
                hidden = self._instead
            self._previous = hidden
            return self._gives(hidden)

        return forward
