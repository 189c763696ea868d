"""What devices say to each other in a compiled program, by kind and mesh axis."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mpt_jax.errors import InternalError
from mpt_jax.planning.hlo import Computation, Instruction, Module, executed, shape_bytes

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Which attribute of an instruction names its own program; the last two are how libtpu,
# older and newer, leaves one to the sparse cores.
_BODIES = {
    "fusion": "calls", "async-start": "calls", "call-start": "to_apply",
    "custom-call-start": "called_computations",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes, in one run of the program.

    calls: places in the program; count: how often they run, loops included;
    bytes: what one device receives in all of them, by the ring algorithm; asynchronous:
    whether computation goes on meanwhile (a start and a done apart).
    """

    kind: str
    axes: tuple[str, ...]
    asynchronous: bool
    calls: int
    count: int
    bytes: int


def find(module: Module, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """The collectives of a program that was compiled for ``mesh``, name -> size.

    The device at place i of mesh.devices.flat is partition i of the program. Groups of
    one device are left out.
    """
    table: dict[tuple, list[int]] = {}
    for kind, groups, operand, asynchronous, times in _each(module, mesh):
        size = max(len(group) for group in groups)
        axes = _varying(groups, mesh)
        if size < 2 or not axes:
            continue
        row = table.setdefault((axes, kind, asynchronous), [0, 0, 0])
        row[0] += 1
        row[1] += times
        row[2] += round(times * operand * _received(kind, size))
    rows = ((k, a, s, *row) for (a, k, s), row in sorted(table.items()))
    return tuple(Collective(*row) for row in rows)


def _received(kind: str, n: int) -> float:
    """Bytes that a device receives per byte of its operand, in a ring of n."""
    if kind == "all-gather":
        return n - 1
    if kind == "all-reduce":
        return 2 * (n - 1) / n
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return (n - 1) / n
    return 1


Found = tuple[str, list[list[int]], int, bool, int]


def _each(module: Module, mesh: Mapping[str, int]) -> Iterator[Found]:
    """(kind, groups, bytes of the operands, asynchronous, times)."""
    n = math.prod(mesh.values())
    fused: dict[str, list[Any]] = {}
    for instruction, computation, times in executed(module):
        kind = instruction.opcode.removesuffix("-start")
        started = kind != instruction.opcode
        if kind in KINDS:
            yield (
                kind,
                _groups(instruction, n),
                _operand_bytes(instruction, computation),
                started,
                times,
            )
        body = _BODIES.get(instruction.opcode)
        inner = body and instruction.called(body)
        if inner is None:
            continue
        for part, around in _collectives_in(module, inner):
            # An asynchronous one stands in several fusions of one channel: where it
            # starts, where it goes on beside a matmul, and where it is done.
            channel = re.search(r"channel_id=(\d+)", part.attributes)
            key = channel[1] if channel else f"{inner}/{part.name}"
            asynchronous = started or "async" in instruction.name + inner
            before = fused.get(key)
            if before is None or times < before[-1]:
                # What a TPU sums and slices in one is called after what it does.
                scatter = around.name.startswith("all-reduce-scatter")
                kind = "reduce-scatter" if scatter else part.opcode
                size = _operand_bytes(part, around)
                fused[key] = [kind, _groups(part, n), size, asynchronous, times]
            fused[key][3] |= asynchronous
    for found in fused.values():
        yield tuple(found)


def _collectives_in(
    module: Module, name: str
) -> Iterator[tuple[Instruction, Computation]]:
    body = module.computations[name]
    for instruction in body:
        if instruction.opcode in KINDS:
            yield instruction, body
        elif instruction.opcode == "fusion":
            yield from _collectives_in(module, instruction.called("calls"))


def _operand_bytes(instruction: Instruction, around: Computation) -> int:
    return sum(shape_bytes(around[name].shape) for name in instruction.operands)


def _varying(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    shape = tuple(mesh.values())
    varying = np.zeros(len(shape), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), shape))
        varying |= (places != places[:, :1]).any(axis=1)
    return tuple(itertools.compress(mesh, varying))


def _groups(instruction: Instruction, n: int) -> list[list[int]]:
    """The partitions that talk to each other, in any of HLO's three notations.

    Raises: InternalError: a fourth one.
    """
    text = instruction.attributes
    if "source_target_pairs=" in text:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        found = re.findall(r"(\d+),(\d+)", pairs[1] if pairs else "")
        return [[int(a), int(b)] for a, b in found] or [[0]]
    if match := re.search(r"replica_groups=\{(\{.*?\})?\}", text):
        lists = re.findall(r"\{([\d,]+)\}", match[1] or "")
        return [[int(i) for i in group.split(",")] for group in lists] or [
            list(range(n))
        ]
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    )
    if iota:
        shape, dims = _ints(iota[1]), _ints(iota[2])
        order = _ints(iota[3]) if iota[3] else range(len(dims))
        return np.arange(n).reshape(dims).transpose(order).reshape(shape).tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{(.*?)\}", text)
    if named and ":" not in named[3]:
        sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", named[1])}
        along = [list(sizes).index(a) for a in re.findall(r"'([^']+)'", named[3])]
        ids = np.arange(n)
        if match := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2]):
            dims = _ints(match[1])
            ids = ids.reshape(dims).transpose(
                _ints(match[2]) if match[2] else range(len(dims))
            )
        rest = [axis for axis in range(len(sizes)) if axis not in along]
        places = ids.reshape(list(sizes.values())).transpose([*rest, *along])
        members = math.prod(list(sizes.values())[axis] for axis in along)
        return places.reshape(-1, members).tolist()
    raise InternalError(f"replica groups in an unknown notation: {text[:200]}")


def _ints(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]
