"""What there is to train on: SeqIO tasks by name, and their mixture.

To add a source, add a row to TASKS: a spec of sources.py for text in files, or a
function that gives texts by name where they fit in memory (one in 20 is held out). A
configuration may name either, or hold a spec itself. For another file format add a
reader to sources.py.

Tasks are objects made from the configuration: nothing enters SeqIO's global registry,
where a second registration (a notebook cell run twice) is an error. This module imports
without TensorFlow, so a wrong task name is told at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mpt_jax.config import DataConfig, suggest
from mpt_jax.data import packing, sources, stdlib_corpus
from mpt_jax.data.ledger import Ledger
from mpt_jax.data.sources import Corpus
from mpt_jax.errors import ConfigError

if TYPE_CHECKING:
    import seqio

    from mpt_jax.data.seqio_adapters import Vocabulary

# Task -> its texts by name, or where they are.
TASKS: dict[str, Callable[[], Mapping[str, str]] | str] = {
    "stdlib_code": stdlib_corpus.code,
    "stdlib_prose": stdlib_corpus.prose,
    # "novels": "text:~/novels?document=file&holdout=0.01",
}


def corpora(config: DataConfig) -> dict[str, Corpus]:
    """The sources of ``config`` by name, in its order; nothing is read.

    Raises: ConfigError: an unknown task, a bad spec, a name twice.
    """
    found: dict[str, Corpus] = {}
    wrong: list[str] = []
    for text in config.tasks:
        try:
            corpus = _corpus(text)
        except ConfigError as error:
            wrong += error.problems
            continue
        if corpus.name in found:
            hint = "give one of them another name=" if ":" in text else "leave one out"
            wrong.append(f"data.tasks: {corpus.name!r} is named twice; {hint}")
        found[corpus.name] = corpus
    if wrong:
        raise ConfigError(wrong)
    return found


def _corpus(text: str) -> Corpus:
    if text not in TASKS:
        if ":" in text:
            return sources.parse(text)
        known = f"known are {', '.join(TASKS)}, or FORMAT:PATH"
        hint = suggest(text, TASKS)
        raise ConfigError([f"data.tasks: unknown task {text!r}; {known}{hint}"])
    task = TASKS[text]
    if isinstance(task, str):
        return sources.parse(task, name=text)
    return sources.Texts(text, functools.partial(_texts, text))


def _texts(name: str, split: str) -> Mapping[str, str]:
    return stdlib_corpus.select(TASKS[name](), split)


def document_task(
    corpus: Corpus, vocabulary: Vocabulary, *, ledger: Ledger | None = None
) -> seqio.Task:
    """{"tokens": the ids of a document and EOS} of one source; may be cached offline.

    All three arguments but ``ledger`` are picklable.
    """
    from mpt_jax.data import seqio_adapters as adapters

    return adapters.seqio.Task(
        corpus.name,
        source=adapters.open_corpus(corpus, ledger or Ledger()),
        preprocessors=[
            packing.tokenize,
            adapters.seqio.CacheDatasetPlaceholder(),
        ],
        output_features={"tokens": adapters.ids(vocabulary)},
    )


def task(
    corpus: Corpus,
    vocabulary: Vocabulary,
    *,
    config: DataConfig,
    index: int,
    ledger: Ledger | None = None,
) -> seqio.Task:
    """Packed rows of one source; ``config.shuffle_buffer`` are shuffled in memory.

    Each row bears "source", the int32 scalar ``index``: where its text is from.
    """
    from mpt_jax.data import seqio_adapters as adapters

    def mark(dataset: adapters.tf.data.Dataset) -> adapters.tf.data.Dataset:
        source = adapters.tf.constant(index, adapters.tf.int32)
        return dataset.map(lambda row: row | {"source": source})

    features = {
        name: adapters.ids(vocabulary) for name in packing.FEATURES[config.packing]
    }
    return adapters.seqio.Task(
        corpus.name,
        source=adapters.open_corpus(corpus, ledger or Ledger()),
        preprocessors=[
            packing.tokenize,
            # What follows sees the epochs as one stream: none ends within a row.
            adapters.seqio.CacheDatasetPlaceholder(),
            *packing.preprocessors(config.packing, on_long=config.on_long),
            mark,
        ],
        output_features=features | {"source": adapters.ids(vocabulary, rank=0)},
        shuffle_buffer_size=config.shuffle_buffer or None,
    )


def mixture(
    config: DataConfig, vocabulary: Vocabulary, *, ledger: Ledger | None = None
) -> seqio.Mixture:
    """The sources of ``config``; each row comes from one of them, drawn by its rate.

    All rows are of one length, so that the rates are shares of the tokens.
    """
    from mpt_jax.data import seqio_adapters as adapters

    tasks = [
        task(corpus, vocabulary, config=config, index=index, ledger=ledger)
        for index, corpus in enumerate(corpora(config).values())
    ]
    shares = rates(config).values()
    return adapters.seqio.Mixture("mixture", list(zip(tasks, shares, strict=True)))


def names(config: DataConfig) -> tuple[str, ...]:
    """The sources by the index that their rows bear."""
    return config.tasks if config.source == "prepared" else tuple(corpora(config))


def rates(config: DataConfig) -> dict[str, float]:
    """The share of each source, relative; equal ones where the configuration has none.

    >>> rates(DataConfig(tasks=("stdlib_code", "stdlib_prose"), rates=()))
    {'stdlib_code': 1.0, 'stdlib_prose': 1.0}
    """
    shares = config.rates or (1.0,) * len(config.tasks)
    return dict(zip(names(config), shares, strict=True))


def fingerprints(config: DataConfig) -> dict[str, str]:
    """What each task reads, as a hash: a position in other text means nothing."""
    return {name: corpus.fingerprint() for name, corpus in corpora(config).items()}


def problems(config: DataConfig) -> list[str]:
    """What is wrong with ``config.tasks``; no data is read."""
    try:
        corpora(config)
    except ConfigError as error:
        return list(error.problems)
    return []
