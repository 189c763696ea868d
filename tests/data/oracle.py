"""Packing in plain Python: the definition that tf.data must agree with."""

from collections.abc import Iterable, Sequence


def pack(documents: Iterable[Sequence[int]], *, length: int, eos_id: int) -> list:
    stream = [i for document in documents for i in [*document, eos_id]]
    return [
        stream[at : at + length] for at in range(0, len(stream) - length + 1, length)
    ]


def segments(row: Sequence[int], eos_id: int) -> list[int]:
    segment, out = 1, []
    for token in row:
        out.append(segment)
        segment += token == eos_id
    return out
