"""Batches for one host, with a position that can be saved and restored exactly.

Two sources: "seqio" (the mixture of tasks.py through tf.data) and "synthetic" (seeded
tokens, no TensorFlow). A source gives host rows: of the global batch, process i of n
holds the i-th part. TensorFlow is imported when a SeqIO source is opened.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np

from mpt_jax.config import TrainConfig
from mpt_jax.data import packing, position, tasks, vocab
from mpt_jax.data.notes import note
from mpt_jax.data.packing import Batch
from mpt_jax.data.synthetic import SyntheticSource
from mpt_jax.errors import CheckpointError, ConfigError, DataError
from mpt_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tensorflow as tf

Split: TypeAlias = Literal["train", "validation"]


class Source(Protocol):
    """An endless (train) stream of host batches. Close it: see SeqioSource.close."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state(self) -> bytes:
        """The position after the last batch given, with what it is a position in."""
        ...

    def restore(self, state: bytes) -> None:
        """Goes on where ``state`` was taken.

        Raises: CheckpointError: damaged, or of another run (with the differences).
        """
        ...

    def close(self) -> None: ...


def tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer of a run (trained first if need be); None for synthetic tokens."""
    if config.data.source == "synthetic":
        return None
    return vocab.load_tokenizer(config.data)


def open_source(
    config: TrainConfig,
    *,
    split: Split = "train",
    tokenizer: Tokenizer | None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Source:
    """The batches of ``split`` for one host: endless for "train", one epoch otherwise.

    Args:
      tokenizer: of the run, as tokenizer() gives it.
      process_index, process_count: which host; default what JAX says.
    Raises:
      ConfigError: an unknown task, or a batch that the hosts cannot share evenly.
      DataError: a tokenizer with more ids than the model, or no data.
    """
    host = _host(process_index, process_count)
    rows = _host_rows(config, host)
    if config.data.source == "synthetic":
        return SyntheticSource(config, split=split, rows=rows)
    if problems := tasks.problems(config.data):
        raise ConfigError(problems)
    if tokenizer is None:
        raise ValueError("tokenizer: a SeqIO source needs one, got None")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is "
            f"{config.model.vocab_size}; raise it to a multiple of 128 at or above",
            location="data.tokenizer",
        )
    return SeqioSource(config, split=split, tokenizer=tokenizer, host=host)


def validation_batches(
    config: TrainConfig,
    n: int,
    *,
    tokenizer: Tokenizer | None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> list[Batch]:
    """The first ``n`` batches of the validation split, the same for every seed.

    Fewer, with a line that says so, where the split has fewer. The global batches are
    the same for any number of hosts: each host reads all rows and keeps its own.

    Raises: DataError: not one batch. ConfigError, DataError: as open_source.
    """
    own = _host_rows(config, _host(process_index, process_count))
    alone = {"process_index": 0, "process_count": 1}
    source = open_source(config, split="validation", tokenizer=tokenizer, **alone)
    with contextlib.closing(source):
        batches = [
            {name: array[own.start : own.stop] for name, array in batch.items()}
            for batch in itertools.islice(source, n)
        ]
    if not batches:
        raise DataError(
            f"less than one batch of {config.global_batch_size} rows of "
            f"{config.seq_len} tokens; lower global_batch_size or data.seq_len",
            location=f"validation split of {', '.join(config.data.tasks)}",
        )
    if len(batches) < n:
        note(f"validation: {len(batches)} batches instead of {n}: the split ends there")
    return batches


class SeqioSource:
    """The SeqIO mixture, shuffled by the run's seed; its position is tf.data's own.

    A position holds for the same seed, text, tokenizer, mixture, shape, number of hosts
    and TensorFlow (its graph is part of it): anything else is refused by name.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        split: Split,
        tokenizer: Tokenizer,
        host: tuple[int, int],
    ):
        from mpt_jax.data.seqio_adapters import tf

        self._config, self._split = config, split
        self._tokenizer, self._host = tokenizer, host
        self._header = position.header(
            config,
            split=split,
            tokenizer=tokenizer.fingerprint,
            rates=dict(zip(config.data.tasks, config.data.rates, strict=True)),
            text=tasks.fingerprints(config.data),
            shuffle_buffer=config.data.shuffle_buffer,
            process=f"{host[0]} of {host[1]}",
            tensorflow=tf.__version__,
        )
        self._iterator: tf.data.Iterator | None = self._start()

    def _start(self) -> tf.data.Iterator:
        """An iterator at the beginning, of a dataset of its own.

        Two iterators of one dataset share the seeds of their next epochs.
        """
        from mpt_jax.data.seqio_adapters import Vocabulary, quiet, seqio

        data, train = self._config.data, self._split == "train"
        with quiet():
            rows = tasks.mixture(data, Vocabulary(self._tokenizer)).get_dataset(
                {"tokens": self._config.seq_len},
                split=self._split,
                shuffle=train and data.shuffle_buffer > 0,
                seed=self._config.seed if train else 0,
                shard_info=seqio.ShardInfo(*self._host) if self._host[1] > 1 else None,
                num_epochs=None if train else 1,
                trim_output_features=False,
            )
            size = len(_host_rows(self._config, self._host))
            # Two batches ahead: the step waits only where reading is the slower.
            return iter(rows.batch(size, drop_remainder=True).prefetch(2))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        from mpt_jax.data.seqio_adapters import tf

        try:
            tokens_BL = next(self._open())["tokens"].numpy()
        except StopIteration:
            if self._split == "validation":
                raise
            raise DataError(
                "a task has no text for this host", location=self._name()
            ) from None
        except tf.errors.OpError as error:
            raise DataError(error.message, location=self._name()) from error
        check_ids(
            tokens_BL, vocab_size=self._tokenizer.vocab_size, location=self._name()
        )
        return packing.as_batch(tokens_BL, eos_id=self._tokenizer.eos_id)

    def state(self) -> bytes:
        from mpt_jax.data.seqio_adapters import tf

        checkpoint = tf.train.Checkpoint(iterator=self._open())
        try:
            with tempfile.TemporaryDirectory() as directory:
                checkpoint.write(f"{directory}/position")
                written = sorted(Path(directory).iterdir())
                files = {file.name: file.read_bytes() for file in written}
        except (tf.errors.OpError, OSError) as error:
            message = f"the data position cannot be saved: {error}"
            raise CheckpointError(message, location=tempfile.gettempdir()) from error
        return position.pack(self._header, files)

    def restore(self, state: bytes) -> None:
        from mpt_jax.data.seqio_adapters import tf

        files = position.unpack(state, self._header)
        self._iterator = self._start()
        with tempfile.TemporaryDirectory() as directory:
            for name, content in files.items():
                Path(directory, Path(name).name).write_bytes(content)
            checkpoint = tf.train.Checkpoint(iterator=self._iterator)
            try:
                checkpoint.read(f"{directory}/position").assert_consumed()
            except (tf.errors.OpError, AssertionError) as error:
                message = f"the data position cannot be restored: {error}"
                raise CheckpointError(message, location=self._name()) from error

    def close(self) -> None:
        """Stops tf.data's threads: alive at the end they can hang the interpreter."""
        self._iterator = None

    def _open(self) -> tf.data.Iterator:
        if self._iterator is None:
            raise ValueError("the source is closed")
        return self._iterator

    def _name(self) -> str:
        return f"{self._split} split of {', '.join(self._config.data.tasks)}"


def check_ids(tokens_BL: np.ndarray, *, vocab_size: int, location: str) -> None:
    """Refuses ids that the model would silently clamp, wrap or turn into NaN.

    Raises: DataError: naming the first row and id outside [0, vocab_size).
    """
    if tokens_BL.min() >= 0 and tokens_BL.max() < vocab_size:
        return
    row, column = np.argwhere((tokens_BL < 0) | (tokens_BL >= vocab_size))[0]
    raise DataError(
        f"row {row} has id {tokens_BL[row, column]} at token {column}; the tokenizer's "
        f"ids are 0 to {vocab_size - 1}",
        location=location,
    )


def _host(index: int | None, count: int | None) -> tuple[int, int]:
    """(process index, process count); what is not given is JAX's."""
    if index is None or count is None:
        import jax

        return jax.process_index(), jax.process_count()
    return index, count


def _host_rows(config: TrainConfig, host: tuple[int, int]) -> range:
    """The rows of each global batch that are this host's."""
    index, count = host
    rows, rest = divmod(config.global_batch_size, count)
    if rest:
        raise ConfigError(
            [f"global_batch_size: {rows * count + rest} does not divide over {count} "
             "processes"]
        )  # fmt: skip
    return range(index * rows, (index + 1) * rows)
