"""Which row comes when: an order that any place of can be computed, not walked to.

Everything is a function of a key and an index, so that the place in a stream is one
integer, the same for any number of hosts, and batch 10,000,000 costs what batch 0 does.
The arithmetic is ours or Philox's raw stream, which NumPy never changes: the methods
built on it may.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

# Legend: S sources, P places of a period.

ROUNDS = 6  # 4 make a Feistel network pseudo-random; our round function is a cheap one
# Rows after which the mixture repeats its counts: rates hold to 1 in 131,072.
PERIOD = 2**16
MASK = 2**64 - 1


def key_of(*parts: object) -> int:
    """64 bits that differ for different ``parts`` (integers and strings)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def shuffled(index: int, size: int, *, key: int) -> int:
    """Where ``index`` goes in the permutation of range(size) that ``key`` names.

    A Feistel network over the next power of four; what falls outside walks on.
    Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains (cycle walk).

    >>> sorted(shuffled(i, 10, key=7) for i in range(10)) == list(range(10))
    True
    """
    if not 0 <= index < size:
        raise ValueError(f"index: expected 0 to {size - 1}, got {index}")
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for n in range(ROUNDS):
            left, right = right, left ^ (_mix(right + key + (n << 40)) & low)
        index = left << half | right
        if index < size:
            return index


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every bit in changes half of the bits out."""
    x = x * 0x9E3779B97F4A7C15 & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def counts(weights: Sequence[float], total: int) -> list[int]:
    """``total`` in parts as near to ``weights`` as integers are, none of them 0.

    >>> counts([1, 1, 4], 9)
    [2, 1, 6]
    """
    shares = [total * weight / sum(weights) for weight in weights]
    parts = [max(int(share), 1) for share in shares]
    # Largest remainder; it takes from the largest where the ones above were too many.
    for _ in range(sum(parts), total):
        parts[max(range(len(parts)), key=lambda s: shares[s] - parts[s])] += 1
    for _ in range(total, sum(parts)):
        parts[parts.index(max(parts))] -= 1
    return parts


class Mixture:
    """The source of each row: of every period, ``counts[s]`` rows are of source s.

    Their places in a period are shuffled, anew in each.
    """

    def __init__(self, counts: Sequence[int], *, key: int):
        self.counts, self.period = tuple(counts), sum(counts)
        self._key = key
        self._in_period = functools.lru_cache(maxsize=2)(self._arrange)

    def place(self, row: int) -> tuple[int, int]:
        """(its source, how many rows of that source came before it)."""
        n, at = divmod(row, self.period)
        source_P, before_P = self._in_period(n)
        source = int(source_P[at])
        return source, n * self.counts[source] + int(before_P[at])

    def seen(self, row: int) -> list[int]:
        """How many of the rows before ``row`` are of each source."""
        n, at = divmod(row, self.period)
        source_P, _ = self._in_period(n)
        part = np.bincount(source_P[:at], minlength=len(self.counts))
        return [n * c + int(p) for c, p in zip(self.counts, part, strict=True)]

    def _arrange(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        bits = np.random.Philox(key=(self._key, n)).random_raw(self.period)
        order_P = np.argsort(bits, kind="stable")
        source_P = np.repeat(np.arange(len(self.counts)), self.counts)[order_P]
        before_P = np.empty(self.period, np.int64)
        by_source_P = np.argsort(source_P, kind="stable")
        before_P[by_source_P] = np.concatenate([np.arange(c) for c in self.counts])
        return source_P, before_P
