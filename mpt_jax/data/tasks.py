"""What there is to train on: SeqIO tasks by name, and their mixture.

To add text that fits in memory, add a row to TASKS; for any other source give the Task
another ``seqio.DataSource`` than Documents. Tasks are objects made from the
configuration: nothing enters SeqIO's global registry, where a second registration (a
notebook cell run twice) is an error. This module imports without TensorFlow, so a wrong
task name is told at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mpt_jax.config import DataConfig
from mpt_jax.data import packing, stdlib_corpus

if TYPE_CHECKING:
    import seqio

    from mpt_jax.data.seqio_adapters import Vocabulary

# Task -> its documents by name.
TASKS: dict[str, Callable[[], Mapping[str, str]]] = {
    "stdlib_code": stdlib_corpus.code,
    "stdlib_prose": stdlib_corpus.prose,
}


def task(name: str, vocabulary: Vocabulary, *, shuffle_buffer: int) -> seqio.Task:
    """Packed rows of one source; ``shuffle_buffer`` of them are shuffled in memory."""
    from mpt_jax.data.seqio_adapters import Documents, seqio, tf

    documents = TASKS[name]
    return seqio.Task(
        name,
        source=Documents(
            lambda split: stdlib_corpus.select(documents(), split),
            splits=stdlib_corpus.SPLITS,
        ),
        preprocessors=[packing.tokenize, packing.concat_and_chop],
        output_features={"tokens": seqio.Feature(vocabulary, dtype=tf.int32)},
        shuffle_buffer_size=shuffle_buffer or None,
    )


def mixture(config: DataConfig, vocabulary: Vocabulary) -> seqio.Mixture:
    """The tasks of ``config``; each row comes from one of them, drawn by its rate."""
    from mpt_jax.data.seqio_adapters import seqio

    tasks = [
        task(name, vocabulary, shuffle_buffer=config.shuffle_buffer)
        for name in config.tasks
    ]
    return seqio.Mixture("mixture", list(zip(tasks, config.rates, strict=True)))


def fingerprints(config: DataConfig) -> dict[str, str]:
    """What each task reads, as a hash: a position in other text means nothing."""
    return {name: stdlib_corpus.fingerprint(TASKS[name]()) for name in config.tasks}


def problems(config: DataConfig) -> list[str]:
    """What is wrong with ``config.tasks``; no data is read."""
    found = []
    for name in config.tasks:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            known = f"known are {', '.join(TASKS)}"
            found.append(f"data.tasks: unknown task {name!r}; {known}{hint}")
    if len(set(config.tasks)) < len(config.tasks):
        found.append(f"data.tasks: a task is named twice in {config.tasks}")
    return found
