"""Documents to rows of exactly seq_len tokens. Each document ends with EOS.

"mpt", as MPT was trained: the documents of one source are laid end to end and cut every
seq_len tokens. What is left of a document opens the next row: no row is padded, and a
long document fills many. "bins": whole documents share a row where they fit, the best
fit first, and its end is padded; a document longer than a row fills rows, and its rest
is packed like a document.

No token is dropped by either, but that a finite tf.data stream packed as "mpt" ends
with its last full row. No id means padding, not even 0 (SeqIO's own packing ends a
document at an inner 0 and drops the EOS of GPT-NeoX, which is 0): padding is where the
segment id is 0.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from mpt_jax.errors import DataError

if TYPE_CHECKING:
    import tensorflow as tf

# Legend: N documents or pieces of them, R rows.

# "tokens", "loss_mask", "segment_ids": (rows, seq_len) int32. Segments count from 1 in
# each row; 0 is padding.
Batch: TypeAlias = dict[str, np.ndarray]
Packing: TypeAlias = Literal["mpt", "bins"]
OnLong: TypeAlias = Literal["split", "truncate"]

# What a row of tf.data has, int32 and of seq_len each.
FEATURES: dict[Packing, tuple[str, ...]] = {
    "mpt": ("tokens",),
    "bins": ("tokens", "segment_ids"),
}

# Documents of a tf.data stream that are packed into bins together: half a row of
# padding in some 200 rows. They are all in memory, 4 bytes a token.
WINDOW = 512

# --------------------------------------------------------------------------- batches


def as_batch(
    tokens_BL: np.ndarray, *, eos_id: int, used_B: np.ndarray | None = None
) -> Batch:
    """The batch of "mpt" rows: every token is a target, an EOS ends its segment.

    Args:
      used_B: tokens of each row, the rest is padding; default all.
    Source: llm-foundry@8c8dd48:llmfoundry/data/text_data.py:
      ConcatenatedSequenceCollatorWrapper (sequence ids from EOS).
    >>> as_batch(np.array([[5, 0, 6, 7, 0, 0]]), eos_id=0)["segment_ids"]
    array([[1, 1, 2, 2, 2, 3]], dtype=int32)
    """
    tokens_BL = np.ascontiguousarray(tokens_BL, np.int32)
    ends_BL = (tokens_BL == eos_id).astype(np.int32)
    segment_ids_BL = 1 + np.cumsum(ends_BL, axis=1, dtype=np.int32) - ends_BL
    loss_mask_BL = np.ones_like(tokens_BL)
    if used_B is not None:
        padding_BL = np.arange(tokens_BL.shape[1]) >= np.asarray(used_B)[:, None]
        segment_ids_BL[padding_BL] = loss_mask_BL[padding_BL] = 0
    return {
        "tokens": tokens_BL,
        "loss_mask": loss_mask_BL,
        "segment_ids": segment_ids_BL,
    }


def as_binned_batch(tokens_BL: np.ndarray, segment_ids_BL: np.ndarray) -> Batch:
    """The batch of "bins" rows: a token is learned from those of its own segment.

    So all but the first of a segment are targets, and its EOS is, whatever its id.

    >>> tokens, segments = [[5, 0, 6, 0, 0]], [[1, 1, 2, 2, 0]]
    >>> batch = as_binned_batch(np.array(tokens), np.array(segments))
    >>> batch["loss_mask"]
    array([[0, 1, 0, 1, 0]], dtype=int32)
    """
    segment_ids_BL = np.ascontiguousarray(segment_ids_BL, np.int32)
    loss_mask_BL = np.zeros_like(segment_ids_BL)
    same_BL = segment_ids_BL[:, 1:] == segment_ids_BL[:, :-1]
    loss_mask_BL[:, 1:] = same_BL & (segment_ids_BL[:, 1:] > 0)
    return {
        "tokens": np.ascontiguousarray(tokens_BL, np.int32),
        "loss_mask": loss_mask_BL,
        "segment_ids": segment_ids_BL,
    }


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


def shares(tokens: Mapping[str, float], *, capacity: float) -> dict[str, float]:
    """The metrics of what was read: each source's share, and how full the rows are.

    Args: tokens: read so far, by source; capacity: those, and padding.
    """
    total = sum(tokens.values())
    if not total:
        return {}
    found = {f"share_of_tokens/{name}": n / total for name, n in tokens.items()}
    return found | {"packing_efficiency": total / capacity}


# --------------------------------------------------------------------------- bins


def best_fit(lengths_N: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece: longest first, into the fullest bin that has the room.

    Pieces of one length are placed together: 10 million documents take seconds.

    Args: lengths_N: in [1, capacity].
    Returns: bins_N, int64, counted from 0 by the first piece in each.
    >>> best_fit(np.array([3, 5, 2, 4]), 6)
    array([0, 1, 2, 2])
    """
    lengths_N = np.asarray(lengths_N)
    if lengths_N.size and not 1 <= lengths_N.min() <= lengths_N.max() <= capacity:
        raise ValueError(f"lengths_N: expected 1 to {capacity}, got {lengths_N}")
    bins_N = np.empty(lengths_N.size, np.int64)
    order_N = np.argsort(-lengths_N, kind="stable")
    _, firsts = np.unique(-lengths_N[order_N], return_index=True)
    open_bins: dict[int, list[np.ndarray]] = defaultdict(list)  # by their room
    rooms: list[int] = []  # those with open bins, ascending
    n_bins = 0

    def keep(room: int, bins: np.ndarray) -> None:
        if room and bins.size:
            if not open_bins[room]:
                bisect.insort(rooms, room)
            open_bins[room].append(bins)

    for pieces in np.split(order_N, firsts[1:]):
        length = int(lengths_N[pieces[0]]) if pieces.size else 0
        while pieces.size:
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):  # no bin has room: new ones, of as many as fit
                each = capacity // length
                bins_N[pieces] = n_bins + np.arange(pieces.size) // each
                full, rest = divmod(pieces.size, each)
                keep(capacity - each * length, n_bins + np.arange(full))
                if rest:
                    keep(capacity - rest * length, np.array([n_bins + full]))
                n_bins += full + bool(rest)
                break
            room = rooms[at]
            bins = open_bins[room].pop()
            if not open_bins[room]:
                del rooms[at]
            n = min(bins.size, pieces.size)
            bins_N[pieces[:n]] = bins[:n]
            keep(room, bins[n:])
            keep(room - length, bins[:n])
            pieces = pieces[n:]
    # As made, the full ones come first: rows of long documents only.
    _, firsts = np.unique(bins_N, return_index=True)
    return np.argsort(np.argsort(firsts))[bins_N]


def split_documents(
    lengths_N: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most ``length``: (document, offset in it, tokens) of each, in order.

    >>> [x.tolist() for x in split_documents(np.array([3, 9]), 4)]
    [[0, 1, 1, 1], [0, 0, 4, 8], [3, 4, 4, 1]]
    """
    n_pieces_N = -(-lengths_N // length)
    document = np.repeat(np.arange(lengths_N.size), n_pieces_N)
    first_N = np.cumsum(n_pieces_N) - n_pieces_N
    offset = (np.arange(document.size) - first_N[document]) * length
    return document, offset, np.minimum(lengths_N[document] - offset, length)


# ------------------------------------------------------------------ rows by their index


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens [start, start + size) of a stream; cut: the document went on there."""

    start: int
    size: int
    cut: bool = False


class Chopped:
    """The rows of "mpt": the stream of the documents, cut; the last row is padded.

    Args: ends_N: where in the stream each document ends; only truncation reads it.
    """

    def __init__(self, tokens: int, length: int, *, ends_N: np.ndarray | None = None):
        self.tokens, self._length, self._ends_N = tokens, length, ends_N
        if ends_N is not None:
            kept_N = np.minimum(np.diff(ends_N, prepend=0), length)
            self._kept_ends_N = np.cumsum(kept_N)
            self.tokens = int(kept_N.sum())
        self.n_rows = -(-self.tokens // length)

    def spans(self, row: int) -> Iterator[Span]:
        begin, end = row * self._length, min((row + 1) * self._length, self.tokens)
        if self._ends_N is None:
            yield Span(begin, end - begin)
            return
        at = int(np.searchsorted(self._kept_ends_N, begin, side="right"))
        while begin < end:
            first = int(self._ends_N[at - 1]) if at else 0
            kept_first = int(self._kept_ends_N[at - 1]) if at else 0
            kept_end = int(self._kept_ends_N[at])
            size = min(end, kept_end) - begin
            whole = int(self._ends_N[at]) - first == kept_end - kept_first
            cut = not whole and begin + size == kept_end
            yield Span(first + begin - kept_first, size, cut)
            begin, at = begin + size, at + 1


class Binned:
    """The rows of "bins": best fit over all documents; 24 bytes of memory for each."""

    def __init__(self, ends_N: np.ndarray, length: int, *, on_long: OnLong):
        lengths_N = np.diff(ends_N, prepend=0)
        starts_N = ends_N - lengths_N
        if on_long == "truncate":
            self._starts = starts_N
            self._sizes = np.minimum(lengths_N, length)
            self._cut = lengths_N > length
        else:
            document, offset, self._sizes = split_documents(lengths_N, length)
            self._starts = starts_N[document] + offset
            self._cut = np.zeros(document.size, bool)
        bins = best_fit(self._sizes, length)
        self._order = np.argsort(bins, kind="stable")
        self._row_ends_R = np.cumsum(np.bincount(bins))
        self.n_rows, self.tokens = self._row_ends_R.size, int(self._sizes.sum())

    def spans(self, row: int) -> Iterator[Span]:
        first = self._row_ends_R[row - 1] if row else 0
        for piece in self._order[first : self._row_ends_R[row]]:
            start, size = int(self._starts[piece]), int(self._sizes[piece])
            yield Span(start, size, bool(self._cut[piece]))


# --------------------------------------------------------------------- rows of tf.data


def tokenize(
    dataset: tf.data.Dataset, output_features: Mapping[str, Any]
) -> tf.data.Dataset:
    """SeqIO preprocessor: {"tokens": some texts} to {"tokens": ids and EOS} of each."""
    return tokenize_batches(dataset, output_features).unbatch()


def tokenize_batches(
    dataset: tf.data.Dataset, output_features: Mapping[str, Any]
) -> tf.data.Dataset:
    """SeqIO preprocessor: tokenize, but the documents of an element stay together."""
    import tensorflow as tf

    vocabulary = output_features["tokens"].vocabulary

    def encode(documents: Mapping[str, tf.Tensor]) -> dict[str, tf.RaggedTensor]:
        texts = documents["tokens"]
        ends = tf.fill([tf.size(texts), 1], vocabulary.eos_id)
        return {"tokens": tf.concat([vocabulary.encode_tf(texts), ends], axis=1)}

    return dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE)


def preprocessors(packing: Packing, *, on_long: OnLong) -> list[Callable[..., Any]]:
    """SeqIO preprocessors from documents that end with EOS to rows.

    The rows have the features FEATURES[packing], each of sequence_length["tokens"].
    """
    pack = {"mpt": concat_and_chop, "bins": bin_documents}[packing]
    return [truncate, pack] if on_long == "truncate" else [pack]


def truncate(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, Any],
    sequence_length: Mapping[str, int],
) -> tf.data.Dataset:
    """SeqIO preprocessor: what a row does not hold is cut off, EOS still ends it."""
    import tensorflow as tf

    length = sequence_length["tokens"]
    end = [output_features["tokens"].vocabulary.eos_id]

    def cut(document: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # All but EOS, up to a row without it.
        return {"tokens": tf.concat([document["tokens"][:-1][: length - 1], end], 0)}

    return dataset.map(cut)


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


def bin_documents(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, Any],
    sequence_length: Mapping[str, int],
) -> tf.data.Dataset:
    """SeqIO preprocessor: packs WINDOW documents at a time; the last of them, too."""
    import tensorflow as tf

    length = sequence_length["tokens"]
    pad_id = output_features["tokens"].vocabulary.eos_id

    def pack(window: Mapping[str, tf.RaggedTensor]) -> dict[str, tf.Tensor]:
        documents = window["tokens"]
        # Declared stateless (it is), or else the iterator could not be saved.
        rows = tf.numpy_function(
            lambda ids, splits: pack_window(ids, splits[1:], length, pad_id=pad_id),
            [documents.flat_values, documents.row_splits],
            [tf.int32, tf.int32],
            stateful=False,
        )
        rows = [tf.ensure_shape(row, [None, length]) for row in rows]
        return dict(zip(FEATURES["bins"], rows, strict=True))

    return dataset.ragged_batch(WINDOW).map(pack).unbatch()


def pack_window(
    tokens: np.ndarray, ends_N: np.ndarray, length: int, *, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_RL, segment_ids_RL) of the documents of a flat array of tokens."""
    layout = Binned(ends_N, length, on_long="split")
    tokens_RL = np.full((layout.n_rows, length), pad_id, np.int32)
    segment_ids_RL = np.zeros((layout.n_rows, length), np.int32)
    for row in range(layout.n_rows):
        at = 0
        for segment, span in enumerate(layout.spans(row), 1):
            here = slice(at, at + span.size)
            tokens_RL[row, here] = tokens[span.start : span.start + span.size]
            segment_ids_RL[row, here] = segment
            at += span.size
    return tokens_RL, segment_ids_RL
