"""A device that is not there: tensors that say they are on it, are computed by the CPU, and may not meet the CPU's in one operation.

python -m tests.calibration.pretend_device MODEL OUT TEXT METHOD quantizes on it. A process of its own: a backend is registered for good.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
FEW_STEPS = {"fast": 0, "default": 3, "best": 3}
_MAY_MIX = ("aten::copy_", "aten::_to_copy")


class Far(torch.Tensor):
    """A tensor of that device, around the CPU's."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Far:
        far: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        far.inner = inner
        return far

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Far({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_far = any(isinstance(tensor, Far) for tensor in tensors)
    if is_far and name not in _MAY_MIX and any(not isinstance(tensor, Far) and tensor.dim() for tensor in tensors):
        raise RuntimeError(f"{name} was given tensors of two devices")
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == NAME:
        is_far, kwargs = True, {**kwargs, "device": torch.device("cpu")}
    elif device is not None:
        is_far = False
    near = [tree_map(lambda leaf: leaf.inner if isinstance(leaf, Far) else leaf, given) for given in (args, kwargs)]
    out = func(*near[0], **near[1])
    if name.endswith("_") and args:
        return args[0]
    return tree_map(lambda leaf: Far(leaf) if isinstance(leaf, Tensor) else leaf, out) if is_far else out


def _empty(size: Sequence[int], **options: Any) -> Tensor:
    return Far(torch.empty(size, dtype=options.get("dtype")))


def _empty_strided(size: Sequence[int], stride: Sequence[int], **options: Any) -> Tensor:
    return Far(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    near = [tensor.inner if isinstance(tensor, Far) else tensor for tensor in (target, source)]
    near[0].copy_(near[1])
    return target


def register() -> torch.library.Library:
    """Make the device known to torch, as long as what this gives is kept."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)  # type: ignore[no-untyped-call]
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    return library


def recording(solve_group: Callable[..., Any], seen: list[Tensor]) -> Callable[..., Any]:
    """`solve_group`, and what it is given of the first three linears goes to `seen`: weights, second moments of inputs, of gradients."""
    left = 3

    def recorded(weights: Sequence[Tensor], moments: Any, grid: Any, steps: Any, gradients: Sequence[Tensor] | None = None) -> Any:
        nonlocal left
        if left > 0:
            seen.extend(one.to("cpu").clone() for one in (*weights, moments.hessian, *(gradients or ())))
        left -= len(weights)
        return solve_group(weights, moments, grid, steps, gradients)

    return recorded


def main(model: str, out: str, text: str, method: str) -> None:
    from octavo.calibration import budget, quantize_run, walk
    from octavo.calibration.quantize_report import to_json

    library = register()
    seen: list[Tensor] = []
    walk.solve_group = recording(walk.solve_group, seen)
    budget._TUNING_STEPS = FEW_STEPS
    quantize_run.device_of = lambda name: torch.device(NAME, 0)  # type: ignore[assignment]
    form: dict[str, Any] = {"method": method, "calibration": text, "samples": 8, "seqlen": 32, "measure_speed": False}
    result = quantize_run.quantize(model, out, **form, eval_text=Path(text))
    del library
    torch.save(seen, f"{out}.given")
    print(to_json(result, result.out))


if __name__ == "__main__":
    main(*sys.argv[1:])
