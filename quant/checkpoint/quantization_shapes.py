"""Bits and group size as a module's packed tensors have them, held against what its config says. Reads no tensor."""

from __future__ import annotations

from collections.abc import Mapping

from ..linear_format import LinearFormat
from ..schemes.words import num_words
from .errors import CheckpointError
from .reader import TensorInfo

_BITS = (2, 3, 4, 8)
_RAGGED_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # what tools offer; GPTQ's last group may be short
_LAYOUTS = ("gptq", "awq", "pack-quantized")


def refuse_other_shapes(
    stored: LinearFormat, module: str, tensors: Mapping[str, TensorInfo], *, in_features: int, out_features: int
) -> None:
    """Raises CheckpointError, naming the config's key, when the tensors are a sound whole of other bits or another group size.

    Tensors that no bits and no group size explain are left to whoever reads them: a model of other sizes, or a damaged file.
    """
    if stored.layout not in _LAYOUTS:
        return
    names = _shapes(stored.layout, 4, 1, in_features, out_features)
    infos = {name: tensors[f"{module}.{name}"] for name in names if f"{module}.{name}" in tensors}
    is_packed = stored.layout == "pack-quantized"
    codes, scales = (infos.get(name) for name in (("weight_packed", "weight_scale") if is_packed else ("qweight", "scales")))
    if codes is None or scales is None:
        return
    groups = 1
    if len(scales.shape) == 2:
        groups = scales.shape[1 if is_packed else 0]
    else:
        del infos[scales.name.rpartition(".")[2]]  # one number for the whole weight
    bits, sizes = _bits_of(stored.layout, infos, groups, in_features, out_features), _sizes(stored.layout, groups, in_features)
    if not bits or not sizes:
        return
    faults = []
    if stored.bits not in bits:
        faults.append(_bits_fault(stored, codes, bits, out_features if stored.layout == "awq" else in_features))
    if groups != -(-in_features // (stored.group_size or in_features)):
        faults.append(_groups_fault(stored, scales, groups, sizes, in_features))
    if faults:
        raise CheckpointError(
            f"{' '.join(faults)} (The weights are in {codes.file}. If the config is right, they are another model's: "
            "take both from one checkpoint again)"
        )


def _shapes(layout: str, bits: int, groups: int, inputs: int, outputs: int, *, padded: bool = False) -> dict[str, tuple[int, int]]:
    """The shapes of a module's packed tensors."""
    over_inputs, over_outputs = (num_words(size, bits, padded=padded) for size in (inputs, outputs))
    if layout == "pack-quantized":
        return {
            "weight_packed": (outputs, over_inputs),
            "weight_zero_point": (over_outputs, groups),
            "weight_scale": (outputs, groups),
        }
    codes = (over_inputs, outputs) if layout == "gptq" else (inputs, over_outputs)
    return {"qweight": codes, "qzeros": (groups, over_outputs), "scales": (groups, outputs)}


def _bits_of(layout: str, infos: Mapping[str, TensorInfo], groups: int, inputs: int, outputs: int) -> list[int]:
    """The widths of codes that give exactly the shapes that there are."""
    found = []
    for bits in _BITS:
        ways = (False, True) if layout == "pack-quantized" and bits == 3 else (False,)
        wanted = [_shapes(layout, bits, groups, inputs, outputs, padded=padded) for padded in ways]
        if any(all(info.shape == shapes[name] for name, info in infos.items()) for shapes in wanted):
            found.append(bits)
    return found


def _sizes(layout: str, groups: int, inputs: int) -> list[int]:
    """The group sizes that make so many groups; -1 where one group has all inputs."""
    if groups == 1:
        return [-1]
    whole = {inputs // groups} if groups and inputs % groups == 0 else set()
    return sorted(whole | {size for size in _RAGGED_SIZES if layout == "gptq" and -(-inputs // size) == groups})


def _bits_fault(stored: LinearFormat, codes: TensorInfo, bits: list[int], features: int) -> str:
    counted = f"{codes.shape[0]} rows" if stored.layout == "gptq" else f"{codes.shape[1]} columns"
    values, side = " or ".join(map(str, bits)), "outputs" if stored.layout == "awq" else "inputs"
    said = stored.said.get("bits", f"bits={stored.bits}")
    return f"{said} contradicts the weights: {codes.name} has {counted} for {features} {side}, which is {values} bits. Set it to {values}."


def _groups_fault(stored: LinearFormat, scales: TensorInfo, groups: int, sizes: list[int], features: int) -> str:
    is_packed = stored.layout == "pack-quantized"
    counted = f"{groups} {'column' if is_packed else 'row'}{'s' if groups > 1 else ''}"
    values = " or ".join(map(str, sizes))
    remedy = f"Set it to {values}."
    if is_packed and groups == 1:
        remedy = "Set strategy to channel, without a group_size."
    elif is_packed and stored.granularity != "group":
        remedy = f"Set strategy to group, and group_size to {values}."
    said = stored.said.get("group_size", f"group_size={stored.group_size}")
    return f"{said} contradicts the weights: {scales.name} has {counted} for {features} inputs, which is group_size {values}. {remedy}"
