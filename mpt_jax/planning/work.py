"""Arithmetic and memory traffic of a program: FLOPs of its jaxpr, bytes of its HLO."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

from mpt_jax.planning.hlo import (
    Computation,
    Instruction,
    Module,
    array_bytes,
    executed,
    shape_bytes,
)


def matmul_flops(jaxpr: Any, *, rounds: int = 1) -> float:
    """FLOPs of all matrix products of a traced program, over all devices.

    Loops count in full and recomputation is in it, as rematerialised code is in the
    jaxpr; of a conditional the dearest branch. Attention kernels, a ring's together,
    are their products over half of the square, which is what is causal; what ALiBi lets
    them skip depends on data.

    Args: rounds: of a loop without a fixed length.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "pallas_call":
            total += _attention(eqn)
        else:
            inner = [matmul_flops(j, rounds=rounds) for j in _jaxprs(eqn.params)]
            if name == "cond":
                total += max(inner, default=0)
            elif name == "scan":
                total += eqn.params["length"] * sum(inner)
            elif name == "while":
                total += rounds * sum(inner)
            elif name == "shard_map":
                around = _ring(eqn)
                total += around or eqn.params["mesh"].size * sum(inner)
            else:
                total += sum(inner)
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def _dot(eqn: Any) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed


def _attention(eqn: Any) -> float:
    """q_BHLD and k_BKSD are the first arrays of four dims that the kernel takes."""
    arrays = [v.aval.shape for v in eqn.invars if len(v.aval.shape) == 4]
    (B, H, L, D), (_, _, S, _) = arrays[0], arrays[2 if _is_backward(eqn) else 1]
    return _products(_is_backward(eqn), B * H * L * S * D)


def _ring(eqn: Any) -> float | None:
    """Of a shard_map in which kernels go round a ring, over whole rows; else None.

    What a visit computes depends on how far apart the parts are, of which its shapes
    say nothing. Longest are q_BLHD and its like; what the forward keeps is in parts.
    """
    inside = list(_equations(eqn.params["jaxpr"]))
    kernels = [e for e in inside if e.primitive.name == "pallas_call"]
    if not kernels or all(e.primitive.name != "ppermute" for e in inside):
        return None
    shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
    four = [shape for shape in shapes if len(shape) == 4]
    B, L, H, D = max(four, key=lambda shape: (shape[1], math.prod(shape)))
    return _products(any(map(_is_backward, kernels)), B * H * L * L * D)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Of a jaxpr and of all in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _jaxprs(eqn.params):
            yield from _equations(inner)


def _is_backward(kernel: Any) -> bool:
    return len(kernel.outvars) > 2


def _products(backward: bool, square: float) -> float:
    """Two products forward, five backward, of the half that is causal."""
    return (5 if backward else 2) * 2.0 * square / 2


# -------------------------------------------------------------------------------- HBM

_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota",
}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast"}  # of libtpu
_SLICES = {"dynamic-slice", "slice", "gather"}
_SAME = {"bitcast", "convert", "copy"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written


def hbm_bytes(module: Module, *, rounds: int = 1) -> int:
    """Bytes that one device reads from and writes to its main memory, loops included.

    Of each instruction (a fusion is one) its operands and results, as far as they are
    not in on-chip memory; of an operand that is only sliced, and of a buffer that is
    updated in place, only the slice, however deep in a fusion that happens.

    Args: rounds: of a loop whose trip count depends on data.
    """
    return sum(
        times * _traffic(module, instruction, computation)
        for instruction, computation, times in executed(module, rounds=rounds)
    )


def _traffic(module: Module, instruction: Instruction, around: Computation) -> int:
    opcode, out = instruction.opcode, array_bytes(instruction.shape, hbm_only=True)
    if opcode in _FREE or _target(instruction) in _FREE_CALLS:
        return 0
    if opcode.endswith("-done"):
        return sum(out)
    operands = [
        shape_bytes(around[name].shape, hbm_only=True) for name in instruction.operands
    ]
    if opcode == "slice-start":  # (operand, slice, context)
        return min(operands[0], array_bytes(instruction.shape)[1])
    if opcode.endswith("-start"):
        return sum(operands)  # its result counts where it is done
    if opcode.endswith("-update"):
        return sum(operands[1:])  # of what has started
    if opcode in _SLICES:
        return sum(out) + min(sum(out), operands[0])
    if opcode in _UPDATES:
        return 2 * operands[_UPDATES[opcode]]
    if opcode == "fusion":
        body = module.computations[instruction.called("calls")]
        read = [_read(module, body, n) for n in range(len(operands))]
        written = _written(module, body, body[body.root])
        return sum(map(min, operands, read)) + sum(map(min, out, written))
    return sum(out) + sum(operands)


def _target(instruction: Instruction) -> str | None:
    match = re.search(r'custom_call_target="(\w+)"', instruction.attributes)
    return match and match[1]


def _read(module: Module, body: Computation, number: int) -> int:
    """Bytes that a fusion takes of its parameter ``number``."""
    (value,) = (
        i for i in body if i.opcode == "parameter" and int(i.arguments) == number
    )
    taken = sum(_taken(module, user, of) for user, of in _users(body, value))
    return min(taken, shape_bytes(value.shape))


def _users(
    body: Computation, value: Instruction
) -> Iterator[tuple[Instruction, Instruction]]:
    """Those that use a value, looking through changes of its type alone, and what of
    it each takes."""
    for user in body:
        if value.name in user.operands:
            if user.opcode in _SAME and user.name != body.root:
                yield from _users(body, user)
            else:
                yield user, value


def _taken(module: Module, user: Instruction, value: Instruction) -> int:
    """Bytes of ``value`` that ``user`` reads."""
    if user.opcode in _SLICES:
        return shape_bytes(user.shape)
    if user.opcode in _UPDATES and user.operands[0] == value.name:
        return 0
    if user.opcode == "fusion":
        body = module.computations[user.called("calls")]
        places = [n for n, name in enumerate(user.operands) if name == value.name]
        return sum(_read(module, body, n) for n in places)
    return shape_bytes(value.shape)


def _source(body: Computation, value: Instruction) -> Instruction:
    """What ``value`` is but for changes of its type."""
    while value.opcode in _SAME:
        value = body[value.operands[0]]
    return value


def _written(module: Module, body: Computation, value: Instruction) -> list[int]:
    """Bytes that a fusion writes of each array of ``value``, in ``body``."""
    if value.opcode == "tuple":
        each = (_written(module, body, body[name]) for name in value.operands)
        return list(itertools.chain(*each))
    source = _source(body, value)
    if source.opcode in _UPDATES:
        if _source(body, body[source.operands[0]]).opcode == "parameter":
            return [shape_bytes(body[source.operands[_UPDATES[source.opcode]]].shape)]
    elif source.opcode == "fusion":
        inner = module.computations[source.called("calls")]
        return _written(module, inner, inner[inner.root])
    return array_bytes(value.shape)
