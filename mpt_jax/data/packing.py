"""Documents to rows of exactly seq_len tokens, as MPT was trained.

Each document is tokenised and ended with EOS; the documents of one source are laid end
to end and cut every seq_len tokens. What is left of a document opens the next row: no
token is dropped, no row is padded, and a long document fills many rows. No id means
padding, not even 0 (SeqIO's own packing ends a document at an inner 0 and drops the EOS
of GPT-NeoX, which is 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

# "tokens", "loss_mask", "segment_ids": (rows, seq_len) int32. Segments count from 1 in
# each row; 0 would be padding.
Batch: TypeAlias = dict[str, np.ndarray]


def tokenize(
    dataset: tf.data.Dataset, output_features: Mapping[str, Any]
) -> tf.data.Dataset:
    """SeqIO preprocessor: {"tokens": text} to {"tokens": ids and EOS}."""
    import tensorflow as tf

    vocabulary = output_features["tokens"].vocabulary

    def encode(document: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        ids = vocabulary.encode_tf(document["tokens"])
        return {"tokens": tf.concat([ids, [vocabulary.eos_id]], axis=0)}

    return dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE)


def concat_and_chop(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int]
) -> tf.data.Dataset:
    """SeqIO preprocessor: documents of any length to rows of sequence_length["tokens"].

    The end of a finite stream that does not fill a row is dropped (< one row).
    """
    import tensorflow as tf

    length = sequence_length["tokens"]

    def chop(rest: tf.Tensor, document: Mapping[str, tf.Tensor]) -> tuple:
        stream = tf.concat([rest, document["tokens"]], axis=0)
        full = tf.size(stream) // length * length
        return stream[full:], tf.reshape(stream[:full], [-1, length])

    rows = dataset.scan(tf.zeros([0], tf.int32), chop).unbatch()
    return rows.map(lambda row: {"tokens": row})


def as_batch(tokens_BL: np.ndarray, *, eos_id: int) -> Batch:
    """The batch of packed rows: every token is a target, an EOS ends its segment.

    Source: llm-foundry@8c8dd48:llmfoundry/data/text_data.py:
      ConcatenatedSequenceCollatorWrapper (sequence ids from EOS).
    >>> as_batch(np.array([[5, 0, 6, 7, 0, 0]]), eos_id=0)["segment_ids"]
    array([[1, 1, 2, 2, 2, 3]], dtype=int32)
    """
    tokens_BL = np.ascontiguousarray(tokens_BL, np.int32)
    ends_BL = (tokens_BL == eos_id).astype(np.int32)
    return {
        "tokens": tokens_BL,
        "loss_mask": np.ones_like(tokens_BL),
        "segment_ids": 1 + np.cumsum(ends_BL, axis=1, dtype=np.int32) - ends_BL,
    }
