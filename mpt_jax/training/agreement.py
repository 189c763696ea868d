"""What one process knows and all must act on, in the same step."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """Whether to stop, and what time it is: every step, the same for all processes.

    Signals come to one process and clocks differ, but a save or a stop is a matter of
    all. The answer is the maximum over the devices, a program of its own between two
    steps: to read it after the step before has ended costs nothing, as it has run by
    then. One process asks nobody.
    """

    def __init__(self, mesh: Mesh, *, clock: Callable[[], float] = time.monotonic):
        self._alone = jax.process_count() == 1
        self._first = jax.process_index() == 0
        self._clock, self._start = clock, clock()
        # A row for each device: a row for each process would need another mesh.
        self._shape = (mesh.size, 2)
        self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._maximum = jax.jit(
            lambda votes: votes.max(axis=0),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def ask(self, *, stop: bool) -> None:
        """Before a step: what this process would do after it."""
        if self._alone:
            return
        # Tenths: six years are an int32. Only the first one's clock counts.
        tenths = int(10 * (self._clock() - self._start)) if self._first else 0
        vote = np.array([[stop, tenths]], np.int32)
        votes = jax.make_array_from_callback(self._shape, self._rows, lambda _: vote)
        self._asked = self._maximum(votes)

    def answer(self, *, stop: bool) -> tuple[bool, float]:
        """(stop, seconds): what all do after the step.

        Args: stop: as it is now; counts where there is no one to agree with.
        """
        if self._alone:
            return stop, self._clock() - self._start
        anyone, tenths = np.asarray(self._asked)
        return bool(anyone), tenths / 10
