"""The door to TensorFlow: a silent import, and what SeqIO needs to see of our objects.

Importing this module imports TensorFlow (10 s, 700 MB); nothing imports it at its top.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

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
    import tensorflow_text as tf_text

__all__ = ["Documents", "Vocabulary", "quiet", "seqio", "tf"]


class Documents(seqio.DataSource):
    """Texts in memory as a SeqIO source of {"tokens": text}.

    Indices are shuffled (all of them, anew each epoch) and sharded, never the texts: a
    saved position holds some integers, not the corpus.
    """

    def __init__(
        self, read: Callable[[str], Mapping[str, str]], *, splits: Sequence[str]
    ):
        """read: split -> texts by name; called when a dataset is made."""
        super().__init__(splits=splits, performs_internal_shuffling=True)
        self._read = read

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        documents = self._read(split)
        texts = tf.constant(list(documents.values()), tf.string)
        dataset = tf.data.Dataset.range(len(documents))
        if shuffle and documents:
            dataset = dataset.shuffle(len(documents), seed=seed)
        if shard_info:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        return dataset.map(lambda i: {"tokens": texts[i]})


class Vocabulary(seqio.Vocabulary):
    """A Tokenizer as SeqIO sees it.

    Its TensorFlow side is made of native ops: a Python function in the graph would make
    the iterator impossible to save and can hang the interpreter at exit.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer
        if isinstance(tokenizer, SentencePieceTokenizer):
            self._ops = tf_text.SentencepieceTokenizer(model=tokenizer.model)
        elif isinstance(tokenizer, ByteTokenizer):
            self._ops = None
        else:
            kind = type(tokenizer).__name__
            raise NotImplementedError(f"no TensorFlow op for {kind}")

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
        if self._ops is not None:
            return self._ops.tokenize(s)
        return tf.cast(tf.io.decode_raw(s, tf.uint8), tf.int32)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        if self._ops is not None:
            return self._ops.detokenize(ids)
        raise NotImplementedError("decode bytes with Tokenizer.decode")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vocabulary)
            and other._tokenizer.fingerprint == self._tokenizer.fingerprint
        )

    __hash__ = None
