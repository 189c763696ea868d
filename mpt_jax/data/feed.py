"""Batches for one host, with a position that can be saved and restored exactly.

Three sources: "seqio" (the mixture of tasks.py through tf.data), "prepared" (tokens on
disk, indexed.py) and "synthetic" (seeded tokens). A source gives host rows: of the
global batch, those that this process's devices hold. Prepared and synthetic batches are
the same for any number of processes, and so is a place in them; of SeqIO, each part of
the batch reads its own share of the files, and a place is that of a part. TensorFlow is
imported when a SeqIO source is opened, by the others never.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np

from mpt_jax.config import TrainConfig
from mpt_jax.data import indexed, packing, position, tasks, vocab
from mpt_jax.data.indexed import PreparedSource
from mpt_jax.data.ledger import Ledger
from mpt_jax.data.notes import note
from mpt_jax.data.packing import Batch
from mpt_jax.data.synthetic import SyntheticSource
from mpt_jax.errors import CheckpointError, ConfigError, DataError
from mpt_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tensorflow as tf

Split: TypeAlias = Literal["train", "validation"]

SEEN = "seen.json"  # of a position: tokens read, then those of each source


class Source(Protocol):
    """An endless (train) stream of host batches. Close it: see SeqioSource.close.

    name: what it reads, for messages. part: (index, count) of the part that its
    positions are of; (0, 1) where they are those of any number of hosts.
    """

    name: str
    part: tuple[int, int]

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

    def rows_of(self) -> list[str]:
        """The source of each row of the last batch given; [] where there are none."""
        ...

    def metrics(self) -> dict[str, float]:
        """What was read up to the last batch given: packing.shares, or nothing."""
        ...

    def describe(self) -> str:
        """What this is, for the log; on what its order and positions depend."""
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
    rows: Sequence[int] | None = None,
) -> Source:
    """The batches of ``split`` for one host: endless for "train", one epoch otherwise.

    Args:
      tokenizer: of the run, as tokenizer() gives it.
      process_index, process_count: which host; default what JAX says.
      rows: of each global batch, those of this host; default the part that these say.
    Raises:
      ConfigError: an unknown task, or a batch that the hosts cannot share evenly.
      DataError: a tokenizer with more ids than the model, or no data.
    """
    host = _host(process_index, process_count)
    rows = _host_rows(config, host) if rows is None else rows
    if config.data.source == "synthetic":
        return SyntheticSource(config, split=split, rows=rows)
    if tokenizer is None:
        raise ValueError(f"tokenizer: {config.data.source} needs one, got None")
    if config.data.source == "seqio" and (problems := tasks.problems(config.data)):
        raise ConfigError(problems)
    if split == "validation" or config.eval.batches:  # now, not at the run's end
        _check_validation(config)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is "
            f"{config.model.vocab_size}; raise it to a multiple of 128 at or above",
            location="data.tokenizer",
        )
    if config.data.source == "prepared":
        return PreparedSource(config, split=split, tokenizer=tokenizer, rows=rows)
    if len(rows) * host[1] != config.global_batch_size:
        message = (
            f"mesh: this process holds {len(rows)} rows of {config.global_batch_size}, "
            f"which are not one of {host[1]} equal parts, as text through SeqIO needs; "
            "prepare the data, or use another mesh"
        )
        raise ConfigError([message])
    return SeqioSource(config, split=split, tokenizer=tokenizer, host=host)


def _check_validation(config: TrainConfig) -> None:
    """Raises: DataError: no source of ``config`` has a validation split."""
    if config.data.source == "prepared":
        splits: dict[str, Collection[str]] = indexed.splits(config.data)
    else:
        splits = {n: c.splits for n, c in tasks.corpora(config.data).items()}
    if not any("validation" in has for has in splits.values()):
        raise DataError(
            "no validation split; give a task validation= or holdout= in its spec, or "
            "set eval.batches to 0",
            location=", ".join(splits),
        )


def validation_batches(
    config: TrainConfig,
    n: int,
    *,
    tokenizer: Tokenizer | None,
    process_index: int | None = None,
    process_count: int | None = None,
    rows: Sequence[int] | None = None,
) -> list[Batch]:
    """The first ``n`` batches of the validation split, the same for every seed.

    Fewer, with a line that says so, where the split has fewer. The global batches are
    the same for any number of hosts: each host reads all rows and keeps its own.

    Raises: DataError: not one batch. ConfigError, DataError: as open_source.
    """
    if rows is None:
        rows = _host_rows(config, _host(process_index, process_count))
    alone = {"process_index": 0, "process_count": 1}
    source = open_source(config, split="validation", tokenizer=tokenizer, **alone)
    with contextlib.closing(source):
        batches = [
            {name: array[list(rows)] for name, array in batch.items()}
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
        self._tokenizer, self._host, self.part = tokenizer, host, host
        self._ledger = Ledger(config.data.max_bad_fraction)
        self._names = tasks.names(config.data)
        self.name = f"{split} split of {', '.join(self._names)}"
        self._seen_S = np.zeros(len(self._names), np.int64)  # tokens of each source
        self._source_B = np.zeros(0, np.int32)  # of the last batch
        self._read = 0  # tokens of all rows, padding included
        self._header = position.header(
            config,
            split=split,
            tokenizer=tokenizer.fingerprint,
            rates=tasks.rates(config.data),
            text=tasks.fingerprints(config.data),
            packing=config.data.packing,
            on_long=config.data.on_long,
            shuffle_buffer=config.data.shuffle_buffer,
            process=f"{host[0]} of {host[1]}",
            tensorflow=tf.__version__,
        )
        # Emptied at exit, too: a live iterator over Python functions can hang it.
        self._iterators: list[tf.data.Iterator] = [self._start()]
        weakref.finalize(self, self._iterators.clear)

    def _start(self) -> tf.data.Iterator:
        """An iterator at the beginning, of a dataset of its own.

        Two iterators of one dataset share the seeds of their next epochs.
        """
        from mpt_jax.data.seqio_adapters import Vocabulary, quiet, seqio

        data, train = self._config.data, self._split == "train"
        with quiet():
            vocabulary = Vocabulary(self._tokenizer)
            mixture = tasks.mixture(data, vocabulary, ledger=self._ledger)
            rows = mixture.get_dataset(
                dict.fromkeys(packing.FEATURES[data.packing], self._config.seq_len),
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
        rows = self._next_rows()
        tokens_BL, self._source_B = rows["tokens"], rows["source"]
        packing.check_ids(
            tokens_BL, vocab_size=self._tokenizer.vocab_size, location=self.name
        )
        if "segment_ids" in rows:
            batch = packing.as_binned_batch(tokens_BL, rows["segment_ids"])
        else:
            batch = packing.as_batch(tokens_BL, eos_id=self._tokenizer.eos_id)
        used_B = np.count_nonzero(batch["segment_ids"], axis=1)
        np.add.at(self._seen_S, self._source_B, used_B)
        self._read += tokens_BL.size
        return batch

    def _next_rows(self) -> dict[str, np.ndarray]:
        from mpt_jax.data.seqio_adapters import tf

        try:
            return {name: rows.numpy() for name, rows in next(self._open()).items()}
        except StopIteration:
            if self._split == "validation":
                raise
            raise DataError(
                "a task has no text for this host", location=self.name
            ) from None
        except tf.errors.OpError as error:
            if self._ledger.error is not None:
                raise self._ledger.error from error
            raise DataError(error.message, location=self.name) from error

    def state(self) -> bytes:
        from mpt_jax.data.seqio_adapters import tf

        checkpoint = tf.train.Checkpoint(iterator=self._open())
        try:
            with tempfile.TemporaryDirectory() as directory:
                checkpoint.write(f"{directory}/position")
                written = sorted(Path(directory).iterdir())
                files = {file.name: file.read_bytes() for file in written}
                files[SEEN] = json.dumps([self._read, *self._seen_S.tolist()]).encode()
        except (tf.errors.OpError, OSError) as error:
            message = f"the data position cannot be saved: {error}"
            raise CheckpointError(message, location=tempfile.gettempdir()) from error
        return position.pack(self._header, files)

    def restore(self, state: bytes) -> None:
        from mpt_jax.data.seqio_adapters import tf

        files = position.unpack(state, self._header)
        self._read, *self._seen_S[:] = json.loads(files.pop(SEEN))
        self._iterators[:] = [self._start()]
        with tempfile.TemporaryDirectory() as directory:
            for name, content in files.items():
                Path(directory, Path(name).name).write_bytes(content)
            checkpoint = tf.train.Checkpoint(iterator=self._open())
            try:
                checkpoint.read(f"{directory}/position").assert_consumed()
            except (tf.errors.OpError, AssertionError) as error:
                message = f"the data position cannot be restored: {error}"
                raise CheckpointError(message, location=self.name) from error

    def rows_of(self) -> list[str]:
        return [self._names[source] for source in self._source_B]

    def metrics(self) -> dict[str, float]:
        """Of this host's rows; the mixture is the same on all."""
        seen = dict(zip(self._names, self._seen_S.tolist(), strict=True))
        return packing.shares(seen, capacity=self._read)

    def describe(self) -> str:
        return (
            "text through SeqIO: its order and its positions hold for "
            f"{self._host[1]} host(s) only; data that python -m mpt_jax.prepare wrote "
            "is the same for any number"
        )

    def close(self) -> None:
        """Stops tf.data's threads: alive at the end they can hang the interpreter."""
        self._iterators.clear()

    def _open(self) -> tf.data.Iterator:
        if not self._iterators:
            raise ValueError("the source is closed")
        return self._iterators[0]


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
