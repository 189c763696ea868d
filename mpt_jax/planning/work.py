"""Arithmetic and memory traffic of a program: FLOPs of its jaxpr, bytes of its HLO."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mpt_jax.planning.hlo import Computation, Instruction, Module, executed, shape_bytes


def matmul_flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products of a traced program, over all devices.

    Loops count in full and recomputation is in it, as rematerialised code is in the
    jaxpr; of a conditional the dearest branch, of a loop without a fixed length one
    round. Attention kernels, a ring's together, are their products over half of the
    square, which is what is causal; what ALiBi lets them skip depends on data.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "pallas_call":
            total += _attention(eqn)
        else:
            inner = [matmul_flops(j) for j in _jaxprs(eqn.params)]
            if name == "cond":
                total += max(inner, default=0)
            elif name == "scan":
                total += eqn.params["length"] * sum(inner)
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
_SLICES = {"dynamic-slice", "slice", "gather"}


def hbm_bytes(module: Module) -> int:
    """Bytes that one device reads from and writes to its main memory, loops included.

    Of each instruction (a fusion is one) its operands and results, as far as they are
    not in on-chip memory; of an operand that is only sliced, and of a buffer that is
    updated in place, only the slice.
    """
    return sum(
        times * _traffic(module, instruction, computation)
        for instruction, computation, times in executed(module)
    )


def _traffic(module: Module, instruction: Instruction, around: Computation) -> int:
    opcode, out = instruction.opcode, shape_bytes(instruction.shape, hbm_only=True)
    if opcode in _FREE:
        return 0
    if opcode.endswith("-done"):
        return out
    operands = [
        shape_bytes(around[name].shape, hbm_only=True) for name in instruction.operands
    ]
    if opcode.endswith("-start"):
        return sum(operands)  # its result counts where it is done
    if opcode in _SLICES:
        return out + min(out, operands[0])
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode == "fusion":
        body = module.computations[instruction.called("calls")]
        return _fused(body, operands, out)
    return out + sum(operands)


def _fused(body: Computation, operands: list[int], out: int) -> int:
    """A fusion reads its parameters once; an aliased update writes its slice only."""
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    read = 0
    for instruction in body:
        if instruction.opcode != "parameter":
            continue
        size = operands[int(instruction.arguments)]
        read += min(
            size, sum(_part(u, instruction, size) for u in _through(users, instruction))
        )
    root = body[body.root]
    while root.opcode in ("bitcast", "copy", "convert"):
        root = body[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        out = min(out, shape_bytes(body[root.operands[1]].shape))
    return read + out


def _through(
    users: dict[str, list[Instruction]], value: Instruction
) -> list[Instruction]:
    """Those that use a value, looking through changes of its type alone."""
    found = []
    for user in users.get(value.name, []):
        same = user.opcode in ("bitcast", "convert")
        found += _through(users, user) or [user] if same else [user]
    return found


def _part(user: Instruction, value: Instruction, size: int) -> int:
    if user.opcode in _SLICES:
        return shape_bytes(user.shape)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
        return 0
    return size
