"""Tokenises every document once, a shard per input file, by SeqIO's Beam pipeline.

The pipeline is seqio.beam_utils.PreprocessTask, what SeqIO's own caching runs, with
prepared.write_shard where that writes TFRecords: a shard is one element, so that it is
the same bytes wherever it is written, and memory holds some documents, not the shard. A
shard is done when its ``.json`` is there; a run that was stopped does the others.

Importing this module imports apache_beam and TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax.config import DataConfig
from mpt_jax.data import packing, prepared, tasks, vocab
from mpt_jax.data.ledger import Ledger
from mpt_jax.data.prepared import Shard
from mpt_jax.data.seqio_adapters import Vocabulary, quiet, seqio
from mpt_jax.data.sources import Corpus
from mpt_jax.errors import DataError, MptError

with quiet():
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from seqio.beam_utils import PreprocessTask

# Runs in this process and downloads nothing; Beam's own default looks for a binary.
# What the command line says comes later, and wins.
FLAGS = ("--runner=FnApiRunner", "--default_sdk_harness_log_level=WARNING")
ERROR = "error.json"  # what stopped a worker: the others see it and stop, too
# SeqIO finds a task by its name in a registry of the process.
_REGISTRY = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Job:
    """One source and split of a preparation, as its workers need it: picklable."""

    root: str
    data: DataConfig
    source: str
    split: str

    def corpus(self) -> Corpus:
        return tasks.corpora(self.data)[self.source]

    def shards(self) -> list[str]:
        """The path of each shard below root, one for each file, in order."""
        n = len(self.corpus().files(self.split))
        return [f"{self.source}/{self.split}-{i:05d}-of-{n:05d}" for i in range(n)]


class WriteShards(PreprocessTask):
    """SeqIO's PreprocessTask, which writes the documents of a shard where it made them.

    What it makes of a shard is in the shard's ``.json``, see result().
    """

    def __init__(self, job: Job):
        self._job, self._paths = job, job.shards()
        super().__init__(_task(job, Ledger(job.data.max_bad_fraction)), job.split)

    def expand(self, pipeline: Any) -> Any:
        root = self._job.root
        todo = [s for s in self.shards if result(root, self._paths[s[0]]) is None]
        label = f"{self._job.source} {self._job.split}"
        return (
            pipeline
            | f"shards of {label}" >> beam.Create(todo, reshuffle=False)
            | f"spread {label}" >> beam.Reshuffle()
            | f"write {label}" >> beam.Map(self._write)
        )

    def _write(self, shard: tuple[int, str]) -> None:
        root, path = Path(self._job.root), self._paths[shard[0]]
        if (root / ERROR).exists():
            return
        try:
            self._write_documents(root, path, shard)
        except MptError as error:
            # As a file: a runner gives only the text of an exception back.
            told = {"message": error.message, "location": error.location}
            prepared.replace(root / ERROR, json.dumps(told).encode())

    def _write_documents(self, root: Path, path: str, shard: tuple[int, str]) -> None:
        ledger = Ledger(self._job.data.max_bad_fraction)
        lengths = np.zeros(64, np.int64)  # documents by the bits of their length

        def documents() -> Iterator[np.ndarray]:
            try:
                for example in _quietly_begun(self._emit_examples(shard)):
                    batch = example["tokens"]  # ragged
                    ids, splits = batch.flat_values.numpy(), batch.row_splits.numpy()
                    for first, end in itertools.pairwise(splits.tolist()):
                        lengths[(end - first).bit_length()] += 1
                        yield ids[first:end]
            except Exception as error:
                raise ledger.error or error from error

        task = _task(self._job, ledger)
        dtype = prepared.token_dtype(
            task.output_features["tokens"].vocabulary.vocab_size
        )
        with _REGISTRY:
            if task.name in seqio.TaskRegistry.names():
                seqio.TaskRegistry.remove(task.name)
            seqio.TaskRegistry.add_provider(task.name, task)
            written = prepared.write_shard(root, path, documents(), dtype=dtype)
            seqio.TaskRegistry.remove(task.name)
        counted = ledger.summary().get(self._job.source, {})
        made = {
            "shard": dataclasses.asdict(written),
            "rows": counted,
            "lengths": np.trim_zeros(lengths, "b").tolist(),
        }
        prepared.replace(root / f"{path}.json", json.dumps(made).encode())


@functools.lru_cache(maxsize=1)
def _vocabulary(data: DataConfig) -> Vocabulary:
    return Vocabulary(vocab.load_tokenizer(data))


def _quietly_begun(examples: Iterator[Any]) -> Iterator[Any]:
    with quiet():
        first = list(itertools.islice(examples, 1))
    return itertools.chain(first, examples)


def _task(job: Job, ledger: Ledger) -> seqio.Task:
    """tasks.document_task with batches of documents: an element costs 0.2 ms."""
    with quiet():
        task = tasks.document_task(job.corpus(), _vocabulary(job.data), ledger=ledger)
        return seqio.Task(
            task.name,
            source=task.source,
            preprocessors=[packing.tokenize_batches, seqio.CacheDatasetPlaceholder()],
            output_features=task.output_features,
        )


def result(root: str | Path, path: str) -> dict[str, Any] | None:
    """What was made of a shard; None while it is not done."""
    try:
        made = json.loads(Path(root, f"{path}.json").read_bytes())
    except FileNotFoundError:
        return None
    return made | {"shard": Shard(**made["shard"])}


def run(jobs: Sequence[Job], flags: Sequence[str]) -> None:
    """Writes the shards of ``jobs`` that are not done yet; ``flags`` are Beam's.

    Raises: DataError: what a worker found. What Beam raises.
    """
    error = Path(jobs[0].root, ERROR)
    error.unlink(missing_ok=True)
    pipeline = beam.Pipeline(options=PipelineOptions([*FLAGS, *flags]))
    for job in jobs:
        pipeline | f"{job.source} {job.split}" >> WriteShards(job)
    pipeline.run().wait_until_finish()
    if error.exists():
        told = json.loads(error.read_bytes())
        error.unlink()
        raise DataError(told["message"], location=told["location"])
