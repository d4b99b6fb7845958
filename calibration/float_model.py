"""FloatModel: a transformers model whose weights come and go block by block. Knows no quantization and no text.

Parameters begin on the meta device. Those outside the blocks (embedding, last norm, head) and those of one block are read from the
checkpoint when asked for, and let go again. The blocks' inputs beside the hidden state (masks, rotary tables) are taken from the model
itself: it is run with blocks that hand their input on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.checkpoint.reader import WeightReader
from ..quant.schemes.base import check_finite
from .calls import GIVES, Call, NotFollowingError, Recorder, board_of
from .devices import CPU, quick_products

FLOATS = ("F32", "F16", "BF16", "F64")


class UnknownArchitectureError(ValueError):
    """A model whose blocks cannot be run one after the other."""


class FloatModel:
    """A causal language model in float32 on `device`. Raises UnknownArchitectureError where there are no blocks to be found."""

    def __init__(self, config: Any, reader: WeightReader, device: torch.device = CPU) -> None:
        from transformers import AutoModelForCausalLM

        with _parameters_on_meta():
            try:
                self.module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    raise
                raise UnknownArchitectureError(
                    f"{type(config).__name__.removesuffix('Config')} is not among the models that transformers generates text with from "
                    "left to right (AutoModelForCausalLM)"
                ) from None
        self.module.eval().requires_grad_(False)
        self.device = device
        for module in self.module.modules():
            module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None})
        self.is_quick = False  # whether its blocks are known to run in `quick_products`
        self._reader = reader
        self.blocks_path, self.blocks = _find_blocks(self.module)
        self.names = _Names(self.module, reader)

    def quickly(self) -> contextlib.AbstractContextManager[None]:
        """The context for blocks to run in that need not be exact."""
        return quick_products(self.device) if self.is_quick else contextlib.nullcontext()

    @functools.cached_property
    def hidden_shape(self) -> tuple[int, ...]:
        """Of one token's state on its way from block to block: [H], or [streams, H]. What is outside the blocks must be loaded."""
        return tuple(self.calls(torch.zeros(1, 2, dtype=torch.int64))[0].shape[2:])

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was made for together; None where its config says nothing."""
        return context_of(self.module.config)

    @property
    def vocab_size(self) -> int:
        size: int = self.module.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        return size

    def block_prefix(self, index: int) -> str:
        return f"{self.blocks_path}.{index}."

    def stored_of(self, index: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The tensors that the checkpoint has for a block: the parameter, by its name in the block, that each goes to, and its shape."""
        prefix, tensors = self.block_prefix(index), self._reader.tensors()
        targets = [(target, name) for name, target in self.names.targets.items() if target.startswith(prefix)]
        return tuple(sorted((target.removeprefix(prefix), tuple(tensors[name].shape)) for target, name in targets))

    def outer_linears(self) -> list[str]:
        """Paths of linears outside the blocks, by the model and, where it has other names, by the checkpoint; and of matrices of the
        checkpoint that this model has no place for, which another engine may have."""
        prefix = self.blocks_path + "."
        inside = {
            f"{name}.weight"
            for name, module in self.module.named_modules()
            if not name.startswith(prefix) and not isinstance(module, nn.Embedding) and _is_matrix(getattr(module, "weight", None))
        }
        theirs = [name for name, target in self.names.targets.items() if target in inside]
        paths = [name.removesuffix(".weight") for name in [*inside, *theirs, *self.names.unused_matrices]]
        return sorted(set(paths))

    def load_outer(self) -> None:
        """Read every parameter outside the blocks."""
        prefix = self.blocks_path + "."
        self._load([name for name, target in self.names.targets.items() if not target.startswith(prefix)])
        self.module.tie_weights()  # type: ignore[operator]
        left = [name for name, tensor in self.module.state_dict().items() if tensor.is_meta and not name.startswith(prefix)]
        if left:
            raise UnknownArchitectureError(f"the checkpoint lacks {', '.join(left[:3])}, which {type(self.module).__name__} needs")

    def load_block(self, index: int) -> nn.Module:
        """Read a block's parameters; gives the block."""
        prefix = self.block_prefix(index)
        self._load([name for name, target in self.names.targets.items() if target.startswith(prefix)])
        left = [name for name, tensor in self.blocks[index].state_dict().items() if tensor.is_meta]
        if left:
            raise UnknownArchitectureError(f"the checkpoint lacks {prefix}{left[0]}, which {type(self.module).__name__} needs")
        return self.blocks[index]

    def load_all(self) -> None:
        """Read every parameter that is not there."""
        self.load_outer()
        for index in range(len(self.blocks)):
            self.load_block(index)

    def free_block(self, index: int) -> None:
        """Let a block's parameters go."""
        _free(self.blocks[index].modules())

    def free_outer(self) -> None:
        """Let every parameter outside the blocks go."""
        inside = {module for block in self.blocks for module in block.modules()}
        _free(module for module in self.module.modules() if module not in inside)

    def _load(self, sources: Sequence[str]) -> None:
        self.names.put(self.module, {name: self._read(name) for name in sources}, self.device)

    def _read(self, name: str) -> Tensor:
        """A tensor as it will be written where it stays as it is: what a GGUF file has in blocks is rounded. Raises ValueError for NaN."""
        tensor = self._reader.read(name)
        if not tensor.is_floating_point():
            return tensor
        check_finite(name, tensor)
        in_blocks = self._reader.tensors()[name].stored not in FLOATS
        return tensor.to(self.names.stored[self.names.targets[name]]) if in_blocks else tensor

    # -- running ------------------------------------------------------------------------------------------------------

    def calls(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden state [B, T, ...] that enters the first block for `tokens` int64 [B, T], and what each block is called with."""
        recorder = self._followed(tokens, None)[1]
        if recorder.order != list(range(len(self.blocks))):
            raise UnknownArchitectureError(
                f"{type(self.module).__name__} does not call its blocks once each, in their order: it cannot be quantized block by block"
            )
        first = recorder.first.movedim(0, 2) if self._streams_first else recorder.first
        if first.shape[:2] != tokens.shape:
            raise UnknownArchitectureError(
                f"{type(self.module).__name__} gives its blocks other positions than its tokens have: it cannot be quantized so"
            )
        name = board_of(recorder.calls)
        return first, [replace(call, board=name, streams_first=self._streams_first) for call in recorder.calls]

    @functools.cached_property
    def _streams_first(self) -> bool:
        shape = self._followed(torch.zeros(1, 2, dtype=torch.int64), None)[1].first.shape
        return len(shape) == 4 and shape[1:3] == (1, 2) != shape[:2]

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The logits [B, T, vocab_size] after the last block gave `hidden` for `tokens`."""
        out: Tensor = self._followed(tokens, hidden.movedim(2, 0) if self._streams_first else hidden)[0].logits
        return out

    def _followed(self, tokens: Tensor, instead: Tensor | None) -> tuple[Any, Recorder]:
        """What the model gives when its blocks hand their input on, the last one `instead`; and what was recorded."""
        cause: Exception | None = None
        options: dict[str, Any] = {"input_ids": tokens.to(self.device), "use_cache": False}
        keeping: list[dict[str, Any]] = [{}]
        if "logits_to_keep" in inspect.signature(self.module.forward).parameters:  # told a number, some leave tokens out of blocks too
            if instead is None:  # nobody looks at logits, and of a large vocabulary they take GiB
                keeping = [{"logits_to_keep": 1}, {"logits_to_keep": torch.tensor([-1], device=self.device)}]
            else:
                keeping = [{}, {"logits_to_keep": torch.arange(tokens.shape[1], device=self.device)}]
        for gives, kept in itertools.product(GIVES, keeping):
            recorder = Recorder(self.blocks, gives, instead)
            try:
                with recorder, torch.set_grad_enabled(instead is not None and torch.is_grad_enabled()):
                    return self.module(**options, **kept), recorder
            except (NotFollowingError, TypeError, ValueError, IndexError, AttributeError) as error:  # it expects something else of a block
                cause = cause or error
        raise UnknownArchitectureError(
            f"{type(self.module).__name__} does not hand a block's output to the next as it is: it cannot be quantized block by block"
        ) from cause


def context_of(config: Any) -> int | None:
    """Tokens that a model of transformers' `config` was made for together; None where it says nothing."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def _free(modules: Iterable[nn.Module]) -> None:
    """Have their own parameters on the meta device."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and their buffers, which no checkpoint holds, for real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = type(param)(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dim() >= 2


def _find_blocks(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The list of blocks: of all module lists that are in no other, the one with the most parameters."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    if not outer:
        raise UnknownArchitectureError(f"{type(model).__name__} has no list of blocks: it cannot be quantized block by block")
    name, found = max(outer, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    return name, list(found)


class _Names:
    """Which tensor of the checkpoint goes to which parameter, by transformers' own rules, and how to put it there."""

    def __init__(self, model: nn.Module, reader: WeightReader) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        self.targets: dict[str, str] = {}  # a converted tensor stands for the first parameter that it goes to
        self.stored: dict[str, torch.dtype] = {}  # by parameter: what its values are written as where they stay floats
        self.unused_matrices: list[str] = []  # of the checkpoint
        self._converted: set[str] = set()  # checkpoint names that are not simply a parameter
        self._used: list[Any] = []  # of the mapping
        for name, info in reader.tensors().items():
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if target not in state and name in state:
                target = name
            if target in state:
                self.targets[name] = target
                self.stored[target] = info.dtype if info.stored in FLOATS else torch.bfloat16
                if pattern is not None:
                    self._converted.add(name)
            elif len(info.shape) >= 2 and name.endswith(".weight"):
                self.unused_matrices.append(name)
        self._simple = {target: name for name, target in self.targets.items() if name not in self._converted}

    def stored_as(self, parameter: str) -> torch.dtype:
        """What a parameter's values are written as: one that shares a tensor with others as its block's others are."""
        if parameter in self.stored:
            return self.stored[parameter]
        block = re.match(r".*?\.\d+\.", parameter)
        near = [dtype for name, dtype in self.stored.items() if block is not None and name.startswith(block[0])]
        return near[0] if near else torch.bfloat16

    def module(self, path: str) -> str:
        """The checkpoint's name of a module, by its parameters'."""
        for parameter, name in self._simple.items():
            if parameter.startswith(path + ".") and name.endswith(inside := parameter.removeprefix(path)):
                return name.removesuffix(inside)
        return path

    def simple(self, parameter: str) -> str:
        """The checkpoint's name of a parameter that is one of its tensors. Raises UnknownArchitectureError for others."""
        if parameter not in self._simple:
            raise UnknownArchitectureError(f"{parameter} is stored transposed and made of several tensors: --ignore it")
        return self._simple[parameter]

    def put(self, model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Convert tensors by checkpoint names and make them the model's parameters, on `device`."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            how = LoadStateDictConfig(weight_mapping=self._mapping, dtype=None, device_map={"": device})
            info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), how)
        finally:
            if bars:
                logging.enable_progress_bar()
        used = {id(entry) for entry in (*self._used, *model._weight_conversions)}  # type: ignore[misc]
        self._used = [entry for entry in self._mapping if id(entry) in used]
        if info.conversion_errors or info.mismatched_keys:
            what = [
                *info.conversion_errors.values(),
                *(f"{name} has another shape than the config says" for name, *_ in info.mismatched_keys),
            ]
            raise UnknownArchitectureError(f"the checkpoint does not fit {type(model).__name__}: {what[0]}")

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by parameter name under the checkpoint's names, cut or joined as they lie there. Those that belong together are given
        together. What is true of weights [N, K] is of anything with their first axes, such as the scales of their groups."""
        from transformers.core_model_loading import revert_weight_conversion

        found = {self._simple[name]: tensor for name, tensor in tensors.items() if name in self._simple}
        others = {name: tensor for name, tensor in tensors.items() if name not in self._simple}
        if others:
            model._weight_conversions = self._used  # type: ignore[assignment]
            is_narrow = all(tensor.shape[-1] == 1 for tensor in others.values())
            if is_narrow:  # transformers 5.17 drops every axis of length 1 where it cuts a tensor, also that of a row's one group
                others = {name: tensor.expand(*tensor.shape[:-1], 2) for name, tensor in others.items()}
            for name, tensor in revert_weight_conversion(model, others).items():
                found[self._known(name, model)] = tensor[..., :1].contiguous() if is_narrow else tensor
        return found

    def _known(self, name: str, model: nn.Module) -> str:
        """A reverted name with or without the prefix that this checkpoint's names have."""
        prefix = str(model.base_model_prefix) + "."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in self.targets:
                return candidate
        return name
