"""Runs the few PTX instructions that kernels write inline, over numpy arrays of 32-bit registers. Knows nothing of Triton.

Each register is a uint32 array with one element for every pack of elements: an instruction runs for all packs at once. Unknown
instructions are an error. Meanings: NVIDIA's PTX ISA, chapters on logic, shift, permute and half-precision arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch

Register = np.ndarray
_TYPES = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


def run(text: str, constraints: str, inputs: list[np.ndarray], output_bits: list[int], pack: int) -> list[np.ndarray]:
    """Outputs as unsigned integers of their width, flat; inputs are arrays of one size, taken `pack` elements at a time."""
    registers: dict[str, Register] = {}
    num_packs = inputs[0].size // pack
    counts = [max(1, pack * bits // 32) for bits in output_bits]
    outputs = sum(counts)
    wanted = constraints.split(",")
    names = [f"${index}" for index in range(len(wanted))]
    if any(not name.startswith("=") for name in wanted[:outputs]) or any(name.startswith("=") for name in wanted[outputs:]):
        raise ValueError(f"{outputs} outputs fill registers of constraints {constraints!r}")
    filled: list[Register] = []
    for values in inputs:
        flat = np.ascontiguousarray(values).reshape(num_packs, pack)
        if flat.dtype.itemsize * pack < 4:
            raise ValueError(f"{pack} elements of {flat.dtype} do not fill a register")
        filled += list(flat.view(np.uint32).T)
    if len(filled) != len(wanted) - outputs:
        raise ValueError(f"{len(filled)} registers of inputs for constraints {constraints!r}")
    registers.update(zip(names[outputs:], filled, strict=True))
    for statement in _statements(text):
        _step(statement, registers, num_packs)
    found, at = [], 0
    for count, bits in zip(counts, output_bits, strict=True):
        words = np.stack([registers[name] for name in names[at : at + count]], axis=1)
        found.append(np.ascontiguousarray(words).view({8: np.uint8, 16: np.uint16, 32: np.uint32}[bits]).reshape(-1))
        at += count
    return found


def _statements(text: str) -> list[str]:
    body = re.sub(r"//[^\n]*", "", text).replace("{", " ").replace("}", " ")
    lines = [line.strip() for line in body.split(";")]
    return [line for line in lines if line and not line.startswith(".reg")]


def _step(statement: str, registers: dict[str, Register], count: int) -> None:
    name, _, rest = statement.partition(" ")
    target, *operands = [part.strip() for part in rest.split(",")]
    values = [
        registers[operand] if operand in registers else np.full(count, int(operand, 0) & 0xFFFFFFFF, np.uint32) for operand in operands
    ]
    registers[target] = _operation(name)(*values).astype(np.uint32)


def _operation(name: str) -> Callable[..., Register]:
    head, *modifiers = name.split(".")
    bitwise: dict[str, Callable[..., Register]] = {
        "mov.b32": lambda a: a,
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "xor.b32": np.bitwise_xor,
        "shr.u32": lambda a, b: np.where(b < 32, a >> np.minimum(b, 31), 0),
        "shr.b32": lambda a, b: np.where(b < 32, a >> np.minimum(b, 31), 0),
        "shl.b32": lambda a, b: np.where(b < 32, a << np.minimum(b, 31), 0),
        "lop3.b32": _lop3,
        "prmt.b32": _prmt,
    }
    if name in bitwise:
        return bitwise[name]
    kind = _TYPES.get(modifiers[-1]) if modifiers else None
    if kind is not None and head in ("add", "sub", "mul", "fma") and modifiers[:-1] in ([], ["rn"]):
        return _halves(head, kind)
    raise NotImplementedError(f"PTX instruction {name}")


def _lop3(a: Register, b: Register, c: Register, table: Register) -> Register:
    out = np.zeros_like(a)
    for index in range(8):
        if int(table[0]) >> index & 1:
            term = np.full_like(a, 0xFFFFFFFF)
            for operand, bit in ((a, 4), (b, 2), (c, 1)):
                term &= operand if index & bit else ~operand
            out |= term
    return out


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    both = np.stack([a, b], axis=1).copy().view(np.uint8)  # 8 bytes a pack
    out = np.zeros((a.size, 4), np.uint8)
    for place in range(4):
        nibble = int(selector[0]) >> (4 * place) & 15
        byte = both[:, nibble & 7]
        out[:, place] = np.where(byte & 0x80, 0xFF, 0) if nibble & 8 else byte
    return out.view(np.uint32).reshape(-1)


def _halves(head: str, kind: torch.dtype) -> Callable[..., Register]:
    """Two numbers of 16 bits in each register, rounded once."""

    def operation(*registers: Register) -> Register:
        numbers = [torch.from_numpy(np.ascontiguousarray(x).view(np.uint16).copy()).view(kind).double() for x in registers]
        if head == "fma":
            value = numbers[0] * numbers[1] + numbers[2]
        else:
            value = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[head](*numbers)
        return value.to(kind).view(torch.uint16).numpy().view(np.uint32)

    return operation
