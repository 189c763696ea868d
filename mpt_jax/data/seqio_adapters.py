"""The door to TensorFlow: a silent import, and what SeqIO needs to see of our objects.

Importing this module imports TensorFlow (10 s, 700 MB); nothing imports it at its top.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import random
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mpt_jax.data.ledger import Ledger
from mpt_jax.data.sources import Corpus, Files, Texts
from mpt_jax.errors import DataError
from mpt_jax.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops warnings, and what C++ writes to stderr unless the block raises.

    Around the import: TensorFlow speaks of CUDA before it reads any log level. Around
    the making of a dataset: its SentencePiece speaks of normalisation, and AutoGraph
    uses what Python 3.13 deprecates.
    """
    real = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except BaseException:
            noise.seek(0)
            os.write(real, noise.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)


# For the messages that come later. A user's own setting wins.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
with quiet():
    import tensorflow as tf

    # tf.data runs on the CPU. TensorFlow would otherwise take all GPU memory from JAX.
    tf.config.set_visible_devices([], "GPU")
    import seqio
    import tensorflow_datasets as tfds
    import tensorflow_text as tf_text

__all__ = ["Vocabulary", "ids", "open_corpus", "quiet", "seqio", "tf", "tfds"]


def open_corpus(corpus: Corpus, ledger: Ledger) -> seqio.DataSource:
    """The documents of a corpus in chunks; those of files count in ``ledger``."""
    if isinstance(corpus, Texts):
        return TextDocuments(corpus)
    return FileDocuments(corpus, ledger)


def ids(vocabulary: seqio.Vocabulary, *, rank: int = 1) -> seqio.Feature:
    return seqio.Feature(vocabulary, dtype=tf.int32, rank=rank, add_eos=False)


def _epochs(
    n: int, read: Callable[[tf.data.Dataset], tf.data.Dataset], *, seed: int | None
) -> tf.data.Dataset:
    """``read`` of the indices below ``n``, once and in order; with a seed without end,
    in another order each epoch.

    The order is a function of seed and epoch. tf.data's shuffle would draw the seeds of
    later epochs from a state that a position loses where it is saved while the last
    batch of an epoch is given out.
    """
    if seed is None or n == 0:
        return read(tf.data.Dataset.range(n))

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        key = tf.stack([tf.constant(seed, tf.int64), number])

        def shuffled(index: tf.Tensor) -> tf.Tensor:
            return tf.random.experimental.index_shuffle(index, key, n - 1)

        return read(tf.data.Dataset.range(n).map(shuffled))

    return tf.data.Dataset.counter().flat_map(epoch)


class _Source(seqio.DataSource):
    """What both sources of documents have in common; shuffled, they never end.

    An element is {"tokens": some texts}, as many as are worth a call of the tokenizer.
    """

    def __init__(self, corpus: Corpus):
        super().__init__(splits=corpus.splits, performs_internal_shuffling=True)
        self._corpus = corpus

    def list_shards(self, split: str) -> Sequence[str]:
        return self._corpus.files(split)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        n, read = self._open(split, shuffle)
        if shuffle and seed is None:
            seed = random.randrange(2**31)

        def read_shard(indices: tf.data.Dataset) -> tf.data.Dataset:
            if shard_info:
                indices = indices.shard(shard_info.num_shards, shard_info.index)
            return read(indices)

        return _epochs(n, read_shard, seed=seed if shuffle else None)


class TextDocuments(_Source):
    """Texts in memory. A saved position holds some integers, not the corpus."""

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def _open(self, split: str, shuffle: bool) -> tuple[int, Callable]:
        documents = list(self._corpus.read(split).values())
        texts = tf.constant(documents, tf.string)
        return len(documents), lambda indices: indices.batch(CHUNK_ROWS).map(
            lambda batch: {"tokens": tf.gather(texts, batch)}
        )


class FileDocuments(_Source):
    """Documents of files, read by sources.py.

    Files are shuffled and sharded; FILES_AT_ONCE of them are read in turns, so that a
    row's neighbours are not its file's. A saved position holds row numbers and the
    chunks that are being given out.
    """

    def __init__(self, corpus: Files, ledger: Ledger):
        super().__init__(corpus)
        self._ledger = ledger

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def _open(self, split: str, shuffle: bool) -> tuple[int, Callable]:
        files = self._corpus.files(split)
        names = tf.constant(files)
        chunks = _Chunks(self._corpus, split, len(files), self._ledger)

        def read(indices: tf.data.Dataset) -> tf.data.Dataset:
            return indices.interleave(
                lambda index: chunks.dataset(names[index]),
                cycle_length=FILES_AT_ONCE if shuffle else 1,
                num_parallel_calls=None,  # in turns: the order is the same every time
            )

        return len(files), read


# An element costs 0.2 ms, as much as tokenising 200 tokens; those that are being worked
# on are part of a saved position.
CHUNK_ROWS, CHUNK_CHARACTERS = 64, 1 << 18
FILES_AT_ONCE = 8


class _Chunks:
    """Some rows of a file from a number on: a pure function for tf.data.

    tf.data saves only what has no state of its own. What is kept here, readers by file
    and place, saves no more than reading again from the start of a file.
    """

    def __init__(self, corpus: Files, split: str, n_files: int, ledger: Ledger):
        self._corpus, self._split, self._ledger = corpus, split, ledger
        self._readers: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()
        self._n_files, self._barren = n_files, 0  # barren: in a row, without a text

    def dataset(self, file: tf.Tensor) -> tf.data.Dataset:
        """The texts of a file, some at a time."""

        def read(start: tf.Tensor, _: tf.Tensor) -> tuple:
            texts, end = tf.numpy_function(
                self.read, [file, start], [tf.string, tf.int64], stateful=False
            )
            return tf.ensure_shape(end, []), (
                tf.ensure_shape(texts, [None]),
                end > start,
            )

        chunks = tf.data.Dataset.counter().scan(tf.constant(0, tf.int64), read)
        chunks = chunks.take_while(lambda texts, more: more)
        chunks = chunks.filter(lambda texts, more: tf.size(texts) > 0)
        return chunks.map(lambda texts, more: {"tokens": texts})

    def read(self, file: bytes, start: np.int64) -> tuple[np.ndarray, np.int64]:
        """(texts, the row after the last one read); no row is left where it is start.

        Raises: DataError: as the reader and the ledger do, kept in the ledger.
        """
        path, at = file.decode(), int(start)
        with self._lock:
            reader = self._readers.pop((path, at), None)
        reader = reader or self._corpus.rows(path, self._split, at)
        texts: list[bytes] = []
        characters = 0
        try:
            for row in itertools.islice(reader, CHUNK_ROWS):
                at += 1
                if row is None:
                    continue
                text = self._ledger.admit(self._corpus.name, row)
                if text is not None:
                    texts.append(text.encode())
                    characters += len(text)
                if characters >= CHUNK_CHARACTERS:
                    break
            self._note_yield(bool(texts), ended=at == start)
        except DataError as error:
            self._ledger.error = error
            raise
        if at > start:
            with self._lock:
                self._readers[path, at] = reader
                if len(self._readers) > 2 * FILES_AT_ONCE:
                    self._readers.popitem(last=False)
        return np.array(texts, object), np.int64(at)

    def _note_yield(self, some: bool, *, ended: bool) -> None:
        """Shuffled files are read without end: they must not be read in vain."""
        with self._lock:
            self._barren = 0 if some else self._barren + ended
            if self._barren <= self._n_files:
                return
        message = f"none of the rows of its {self._split} split is kept"
        raise DataError(message, location=self._corpus.name)


class Vocabulary(seqio.Vocabulary):
    """A Tokenizer as SeqIO sees it.

    SentencePiece and bytes are native ops. Any other tokenizer is a Python function of
    a batch of texts, declared to have no state: tf.data refuses to save one that might,
    and a process may hang at its end while an iterator over one is alive.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    @functools.cached_property
    def _ops(self) -> tf_text.SentencepieceTokenizer | None:
        if not isinstance(self._tokenizer, SentencePieceTokenizer):
            return None
        with tf.init_scope():  # not of the graph of the first dataset that asks
            return tf_text.SentencepieceTokenizer(model=self._tokenizer.model)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_ops"}

    @property
    def bos_id(self) -> None:
        return None

    @property
    def eos_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def unk_id(self) -> None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """int32 ids of a text; of a vector of texts, ragged ones (N, None)."""
        if self._ops is not None:
            return self._ops.tokenize(s)
        texts = tf.reshape(s, [-1])
        if isinstance(self._tokenizer, ByteTokenizer):
            joined = tf.strings.reduce_join(texts)
            flat = tf.cast(tf.io.decode_raw(joined, tf.uint8), tf.int32)
            lengths = tf.strings.length(texts)
        else:
            flat, lengths = tf.numpy_function(
                self._encode_batch, [texts], [tf.int32, tf.int32], stateful=False
            )
            flat, lengths = (tf.ensure_shape(t, [None]) for t in (flat, lengths))
        if s.shape.rank == 0:
            return flat
        return tf.RaggedTensor.from_row_lengths(flat, lengths, validate=False)

    def _encode_batch(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = self._tokenizer.encode_batch([text.decode() for text in texts])
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
        return flat, np.array([len(i) for i in ids], np.int32)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(ids: np.ndarray) -> bytes:
            return self._tokenizer.decode(ids.tolist()).encode()

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.ensure_shape(text, [])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vocabulary)
            and other._tokenizer.fingerprint == self._tokenizer.fingerprint
        )

    __hash__ = None
