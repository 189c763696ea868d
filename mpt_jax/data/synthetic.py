"""Seeded tokens for tests and benchmarks: no text, no tokenizer, no TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mpt_jax.config import TrainConfig
from mpt_jax.data import packing, position
from mpt_jax.data.packing import Batch


class SyntheticSource:
    """Seeded tokens that a model can learn a little of; the position is one integer.

    Row r of batch b is Philox's stream number b * batch + r: the same for any number of
    hosts, and batch 10,000,000 costs what batch 0 does. Nine tokens in ten are their
    predecessor + 1, the others jump to the id u^4 * vocabulary, u uniform: there are
    frequencies to learn, then successors.
    """

    name = "synthetic tokens"
    part = (0, 1)

    def __init__(self, config: TrainConfig, *, split: str, rows: Sequence[int]):
        self._header = position.header(
            config, split=split, vocab_size=config.model.vocab_size
        )
        # Validation is the same for every seed: losses of two runs compare.
        self._key = (config.seed, 0) if split == "train" else (0, 1)
        self._batch_size, self._length = config.global_batch_size, config.seq_len
        self._vocab_size = config.model.vocab_size
        self._rows = rows
        self._batch = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._batch * self._batch_size
        tokens_BL = np.stack([self._row(first + r) for r in self._rows])
        self._batch += 1
        return packing.as_batch(tokens_BL, eos_id=-1)

    def state(self) -> bytes:
        return position.pack(self._header, {"batch": str(self._batch).encode()})

    def restore(self, state: bytes) -> None:
        self._batch = int(position.unpack(state, self._header)["batch"])

    def rows_of(self) -> list[str]:
        return []

    def metrics(self) -> dict[str, float]:
        return {}

    def describe(self) -> str:
        return "synthetic tokens, in the same order for any number of hosts"

    def close(self) -> None:
        pass

    def _row(self, index: int) -> np.ndarray:
        bits = np.random.Philox(key=self._key, counter=(0, 0, 0, index))
        v_L, u_L = np.random.Generator(bits).random((2, self._length))
        place_L = np.arange(self._length)
        jump_L = np.maximum.accumulate(np.where(v_L < 0.1, place_L, 0))  # latest jump
        # Products, not a power: pow() differs between machines in the last bit.
        landing_L = (u_L * u_L * u_L * u_L * self._vocab_size).astype(np.int64)
        return (landing_L[jump_L] + place_L - jump_L) % self._vocab_size
