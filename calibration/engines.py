"""Which engines read a folder that is to be written, as far as it is known of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn

from ..quant.checkpoint.reader import TensorInfo
from .recipe import Recipe

_USUAL_GROUPS = (32, 64, 128, -1)


def hard_storage(
    tensors: Mapping[str, TensorInfo], targets: Mapping[str, str], modules: Iterable[str], transposed: Collection[str]
) -> str | None:
    """What a checkpoint has of the linears `modules`, by path, that no engine is known to read quantized; None where all are plain.

    `targets`: the parameter that each of its `tensors` goes to; `transposed`: the linears that are stored [K, N].
    """
    paths = set(modules)
    if not paths.isdisjoint(transposed):
        return "weights that are stored transposed"
    parameters = {path.partition("[")[0] for path in paths}
    stacked = any(len(tensors[name].shape) > 2 and target.removesuffix(".weight") in parameters for name, target in targets.items())
    return "experts that are one tensor in the checkpoint" if stacked else None


def engines_of(hard: str | None, recipe: Recipe, group_size: int, *, served: bool) -> tuple[str, ...]:
    """Those that are known to read it; `hard`: what `hard_storage` found; `served`: whether Octavo has the architecture."""
    if hard is not None:
        return ()
    others = ("vllm", "sglang") if group_size in _USUAL_GROUPS or recipe.eight_bit else ()
    return (*(("octavo",) if served else ()), *others)


def limits_of(
    hard: str | None, recipe: Recipe, group_size: int, *, make_empty: Callable[[], nn.Module], modules: Iterable[str]
) -> list[str]:
    """A sentence for each thing that keeps an engine from reading the folder.

    `hard`: what `hard_storage` found; `make_empty` makes a transformers model like the original, on the meta device, where one is needed;
    `modules`: what is quantized.
    """
    found = []
    if hard is not None:
        found.append(f"the original has {hard}: no engine is known to read them quantized; Octavo's reader verifies them")
    elif group_size not in _USUAL_GROUPS and not recipe.eight_bit:
        found.append(f"vLLM and SGLang read groups of 32, 64 and 128, not of {group_size}")
    if hard is None and recipe.layout == "compressed-tensors" and (reason := _hindrance(make_empty(), modules)) is not None:
        found.append(f"transformers does not load this folder: {reason}")
    return found


def _hindrance(empty: nn.Module, modules: Iterable[str]) -> str | None:
    """Why transformers cannot load a model with these modules quantized, None where nothing is known.

    compressed-tensors takes `weight` from linears and gives them a forward of its own; after that the model's initialisation still looks
    at each module that was not in the checkpoint whole.
    """
    linears = {path: empty.get_submodule(path) for path in modules if "[" not in path}  # not experts of a parameter
    for path, module in linears.items():
        if type(module).forward is not nn.Linear.forward:
            return f"{path} is a {type(module).__name__}, and it runs quantized weights in plain linears alone"
    for module in empty.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    for module in linears.values():
        module._is_hf_initialized = True  # type: ignore[assignment]
        del module.weight
    try:
        empty.initialize_weights()  # type: ignore[operator]
    except Exception as error:  # other people's code, on a model without weights
        if not isinstance(error, AttributeError) or "'weight'" not in str(error):
            return None
        return f"the initialisation of {type(empty).__name__} wants weights that quantized linears do not have ({error})"
    return None
