"""Opening sources in tests: two small tasks in memory, and the batches of a config."""

import contextlib

import numpy as np
import pytest

from mpt_jax.config import TrainConfig, parse
from mpt_jax.data import feed, tasks
from mpt_jax.tokenizer import ByteTokenizer

# Letters tell a row's task, numbers its document. Lengths are 2 to 60 bytes: documents
# share rows and rows share documents.
LOWER = {f"l{i}": f"{i}" + "abcdefgh"[i % 8] * (i % 59) for i in range(160)}
UPPER = {f"u{i}": f"{i}" + "ABCDEFGH"[i % 8] * (i % 59) for i in range(160)}
TINY = {
    "steps": 1,
    "global_batch_size": 4,
    "model": {"vocab_size": 257},
    "data": {
        "tasks": ("lower", "upper"),
        "rates": (3.0, 1.0),
        "tokenizer": "bytes",
        "seq_len": 32,
        "shuffle_buffer": 16,
    },
}


def make_config(overrides=None) -> TrainConfig:
    """TINY with overrides, whose values need not be text."""
    texts = {path: str(value) for path, value in (overrides or {}).items()}
    return parse(TrainConfig, TINY, texts)


@pytest.fixture(scope="module")
def small_tasks():
    """Makes LOWER and UPPER tasks that a config can name. Imports TensorFlow: 10 s,
    here and not in the first test."""
    from mpt_jax.data import seqio_adapters  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "lower", lambda: LOWER)
        patch.setitem(tasks.TASKS, "upper", lambda: UPPER)
        yield


@contextlib.contextmanager
def opened(config, *, split="train", index=0, count=1, tokenizer=None):
    """The source of a config for one of ``count`` hosts, closed at the end."""
    source = feed.open_source(
        config, split=split, tokenizer=tokenizer or ByteTokenizer(),
        process_index=index, process_count=count,
    )  # fmt: skip
    with contextlib.closing(source):
        yield source


def take(source, n: int) -> np.ndarray:
    return np.concatenate([next(source)["tokens"] for _ in range(n)])
