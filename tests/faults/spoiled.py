"""``python -m mpt_jax.train`` on a stream with bad batches, or with some left out.

    python tests/faults/spoiled.py --nan=9,10 --config=tests/faults/config.py:tiny ...

    --nan, --spike  batches, from 0, whose loss and gradient are not finite or too large
    --without       batches that are left out
    --kill          batches before which the trainer gets SIGKILL
    --terminate     steps right after which it gets SIGTERM
    --hang          batches that never come
    --float64       computes in float64 all that float32 is for

The trainer is the real one, from flags to exit code. Only its synthetic source is
replaced, by one that marks bad batches, and its objective by one that multiplies loss
and gradient of the marked ones. A run and its reference are the same program: they
differ in their streams alone.
"""

import argparse
import dataclasses
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax import cli, train
from mpt_jax.data import feed
from mpt_jax.data.packing import Batch
from mpt_jax.data.synthetic import SyntheticSource
from mpt_jax.objectives import LossSums
from mpt_jax.training import step
from mpt_jax.training.watchdog import Watchdog

# Every token of a marked batch is this one: no row of the synthetic source is constant.
# The factor is of its loss, and so of its gradient.
MARKS = {"nan": (0, float("nan")), "spike": (1, 10.0)}


class SpoiledSource(SyntheticSource):
    """Its position is the real one: resuming and rolling back are the trainer's own."""

    def __init__(self, config: Any, *, split: str, rows: Any, faults: Any):
        super().__init__(config, split=split, rows=rows)
        self._faults = faults if split == "train" else argparse.Namespace()

    def __next__(self) -> Batch:
        while self._batch in self._marked("without"):
            self._batch += 1
        if self._batch in self._marked("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        while self._batch in self._marked("hang"):
            time.sleep(1)
        kinds = [kind for kind in MARKS if self._batch in self._marked(kind)]
        batch = super().__next__()
        for kind in kinds:
            batch["tokens"][:] = MARKS[kind][0]
        return batch

    def _marked(self, kind: str) -> list[int]:
        return getattr(self._faults, kind, [])


def spoiled(pretraining: Callable) -> Callable:
    """``pretraining`` whose objective multiplies the loss of marked batches."""

    def make(*configs: Any) -> step.Objective:
        objective = pretraining(*configs)

        def spoil(params: Any, batch: step.Batch, key: Any) -> LossSums:
            sums = objective(params, batch, key)
            factor = jnp.float32(1)
            for token, marked in MARKS.values():
                factor = jnp.where(jnp.all(batch["tokens"] == token), marked, factor)
            return sums._replace(total=sums.total * factor, ce=sums.ce * factor)

        return spoil

    return make


def terminating(beat: Callable, steps: list[int]) -> Callable:
    """``beat`` of the watchdog, which the trainer calls when it has done a step."""

    def beat_and_terminate(watchdog: Any, step: int) -> None:
        beat(watchdog, step)
        if step in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return beat_and_terminate


def widened(load_config: Callable) -> Callable:
    """``load_config`` for float64, which no config can ask for."""

    def load(*args: Any) -> Any:
        config = load_config(*args)
        model = dataclasses.replace(
            config.model, compute_dtype="float64", param_dtype="float64"
        )
        return dataclasses.replace(config, model=model)

    return load


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    for kind in (*MARKS, "without", "kill", "terminate", "hang"):
        parser.add_argument(f"--{kind}", type=numbers, default=[])
    parser.add_argument("--float64", action="store_true")
    faults, rest = parser.parse_known_args(argv)
    feed.SyntheticSource = functools.partial(SpoiledSource, faults=faults)
    step.pretraining = spoiled(step.pretraining)
    Watchdog.beat = terminating(Watchdog.beat, faults.terminate)
    if faults.float64:
        jax.config.update("jax_enable_x64", True)
        jnp.float32 = jnp.float64
        cli.load_config = widened(cli.load_config)
    return train.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
