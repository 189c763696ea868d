"""Text <-> ids without TensorFlow: SentencePiece models and raw bytes.

The stdlib tokenizer of the embedded corpus is trained in data/vocab.py; here a model is
only loaded, so that generation and export run on machines without TensorFlow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from mpt_jax.errors import DataError


class Tokenizer(Protocol):
    """What the package asks of a tokenizer; ids are in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int:
        """Ends every document. May be 0, as in GPT-NeoX: no id means padding."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers only if they give the same ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without EOS. Raises: DataError: a lone surrogate."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; EOS is the empty string, half a character is U+FFFD."""
        ...


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        message = f"character {error.start} is a lone surrogate: not text"
        raise DataError(message) from None


class ByteTokenizer:
    """The id of a byte is its value; EOS is 256.

    >>> ByteTokenizer().encode("h\u00e9")
    [104, 195, 169]
    >>> ByteTokenizer().decode([104, 195, 169, 256])
    'h\u00e9'
    """

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != self.eos_id).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model. ``model`` is the serialized file, for TensorFlow's own op.

    decode(encode(text)) is ``text`` for models that normalise nothing and fall back to
    bytes (ours), but for U+2581, which SentencePiece itself writes for a space.
    """

    def __init__(self, model: bytes, *, location: str = ""):
        """Raises: DataError: ``model`` (read from ``location``) is not usable."""
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
            self.vocab_size: int = self._processor.get_piece_size()
        except RuntimeError:
            self.vocab_size = 0
        if self.vocab_size == 0:  # an empty file parses as an empty model
            message = f"not a SentencePiece model ({len(model)} bytes)"
            raise DataError(message, location=location)
        self.model = model
        self.eos_id: int = self._processor.eos_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if self.eos_id < 0:
            message = "this SentencePiece model has no EOS; train one with --eos_id"
            raise DataError(message, location=location)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


def load(name: str) -> Tokenizer:
    """The tokenizer of ``name``: "bytes", or the path of a SentencePiece .model.

    Raises: DataError: the file is missing or is not a SentencePiece model.
    """
    if name == "bytes":
        return ByteTokenizer()
    try:
        model = Path(name).expanduser().read_bytes()
    except OSError as error:
        message = f"cannot read the tokenizer: {error.strerror}"
        raise DataError(message, location=name) from None
    return SentencePieceTokenizer(model, location=name)
