"""Reads compiled HLO: instructions, and how often each one runs.

``compiled.as_text()`` is the program of one device after partitioning, fusion and
scheduling. A scanned layer stands there once, in the body of a while loop: what is
counted in it has to be multiplied by the trip counts of the loops around it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from mpt_jax.errors import InternalError

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
    "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``name = shape opcode(operands), attributes``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    def called(self, key: str) -> str | None:
        """The computation that attribute ``key`` names."""
        match = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def branches(self) -> list[str]:
        """Of a conditional."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if match:
            return re.findall(r"[\w.\-]+", match[1])
        names = (self.called(k) for k in ("true_computation", "false_computation"))
        return [name for name in names if name]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; ``root`` names the one that it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


def shape_bytes(shape: str, *, hbm_only: bool = False) -> int:
    """Bytes of an array, or of all arrays of a tuple.

    >>> shape_bytes("(bf16[2,3]{1,0}, /*index=1*/f32[]{:S(1)})")
    16
    >>> shape_bytes("f32[8]{0:T(128)S(1)}", hbm_only=True)
    0
    """
    return sum(array_bytes(shape, hbm_only=hbm_only))


def array_bytes(shape: str, *, hbm_only: bool = False) -> list[int]:
    """As shape_bytes, of each array; 0 for one in on-chip memory, if hbm_only."""
    # S(1) and on are on-chip memories.
    return [
        0
        if hbm_only and re.search(r"S\([1-9]", layout)
        else math.prod(int(d) for d in dims.split(",") if d) * _BITS[dtype] // 8
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]


def parse(text: str) -> Module:
    """The computations of ``compiled.as_text()``.

    Raises: InternalError: there is no entry computation, or a line is not HLO.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            match = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if match:
                name, instructions = match[2], {}
                entry = name if match[1] else entry
            elif line.startswith("}"):
                computations[name] = Computation(name, instructions, root)
        elif " = " in line:
            instruction = _instruction(line)
            instructions[instruction.name] = instruction
            root = instruction.name if line.lstrip().startswith("ROOT ") else root
    if not entry:
        raise InternalError("this is no HLO text: no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(
        name.removeprefix("%"), shape, opcode, operands, arguments, rest[end:]
    )


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise InternalError(f"this is no HLO instruction: {text[:200]}")


# ---------------------------------------------------------------- how often things run


def executed(
    module: Module, *, rounds: int = 1
) -> Iterator[tuple[Instruction, Computation, int]]:
    """Every instruction outside fusions, its computation, and how often it runs.

    Of a conditional the branch that makes most bytes.

    Args: rounds: of a loop whose trip count depends on data.
    """
    Run = tuple[Instruction, Computation, int]

    def made(run: list[Run]) -> int:
        return sum(times * shape_bytes(i.shape) for i, _, times in run)

    def walk(name: str, times: int) -> Iterator[Run]:
        computation = module.computations[name]
        for instruction in computation:
            yield instruction, computation, times
            if instruction.opcode == "while":
                trips = trip_count(module, instruction, computation)
                yield from walk(instruction.called("body"), times * (trips or rounds))
            elif instruction.opcode == "conditional":
                branches = [list(walk(b, times)) for b in instruction.branches()]
                yield from max(branches, key=made)
            elif instruction.opcode == "call":
                yield from walk(instruction.called("to_apply"), times)

    yield from walk(module.entry, 1)


def trip_count(module: Module, loop: Instruction, around: Computation) -> int | None:
    """Of ``i = start; while i < limit: i += step``, which is what a scan compiles to.

    None where the three are not constants. A start that the text does not show is 0,
    as it is of every scan.
    """
    if known := re.search(r'known_trip_count\D*"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called("condition")]
    body = module.computations[loop.called("body")]
    compare = condition[condition.root]
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, limit = (condition[name] for name in compare.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    index = _index(counter)
    advance = _source(body, body[body[body.root].operands[index]])
    if advance.opcode != "add":
        return None
    steps = [_source(body, body[name]) for name in advance.operands]
    steps = [int(s.arguments) for s in steps if s.opcode == "constant"] or [1]
    start = _source(around, around[loop.operands[0]])
    if start.opcode == "tuple":
        start = _source(around, around[start.operands[index]])
    first = int(start.arguments) if start.opcode == "constant" else 0
    return -(-(int(limit.arguments) - first) // steps[0])


def _index(get_tuple_element: Instruction) -> int:
    return int(re.search(r"index=(\d+)", get_tuple_element.attributes)[1])


def _source(computation: Computation, value: Instruction) -> Instruction:
    """``value`` before it was copied about."""
    while value.opcode in ("copy", "copy-start", "copy-done", "bitcast"):
        value = computation[value.operands[0]]
    return value
