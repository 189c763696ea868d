"""Text <-> ids without TensorFlow: GPT-NeoX's BPE, SentencePiece models, raw bytes.

Text is only text: what looks like a special token in it ("<|endoftext|>") is encoded as
the characters that it is, so that no document can end itself. The stdlib tokenizer of
the embedded corpus is trained in data/vocab.py; here a model is only loaded, so that
generation and export run on machines without TensorFlow.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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

    @property
    def files(self) -> Mapping[str, bytes]:
        """name -> content: what load() makes this tokenizer of again, in a folder.

        Empty for bytes, which need none.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without EOS. Raises: DataError: a lone surrogate."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """encode() of each text, on all cores where the library can."""
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
    files: Mapping[str, bytes] = {}

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [self.encode(text) for text in texts]

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
        self.files = {"tokenizer.model": model}
        if self.eos_id < 0:
            message = "this SentencePiece model has no EOS; train one with --eos_id"
            raise DataError(message, location=location)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        for text in texts:
            _utf8(text)
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


# Appended after the vocabulary, as MPT-Chat does: 50277 and 50278 of GPT-NeoX, which
# are padding rows of its embedding.
CHATML = ("<|im_start|>", "<|im_end|>")
# The first that a vocabulary has ends its documents, unless tokenizer_config.json says.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's ``tokenizers``, such as GPT-NeoX-20B's.

    decode(encode(text)) is ``text`` after the Unicode normalisation that the file asks
    for (GPT-NeoX: NFC).
    """

    def __init__(
        self, content: bytes, *, eos: str = "", chatml: bool = False, location: str = ""
    ):
        """eos: the piece that ends documents; default the first of END_OF_TEXT.

        Raises: DataError: ``content`` (read from ``location``) is not usable.
        """
        from tokenizers import Tokenizer as Library

        self._content, self._chatml = content, chatml
        try:
            self._library = Library.from_buffer(content)
        except Exception as error:  # the Rust library raises nothing more specific
            message = f"not a tokenizer.json of Hugging Face: {error}"
            raise DataError(message, location=location) from None
        self._library.no_truncation()
        self._library.no_padding()
        if chatml:
            self._library.add_special_tokens(list(CHATML))
        self._library.encode_special_tokens = True  # as the text that they are
        ids = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1
        known = [piece for piece in ([eos] if eos else END_OF_TEXT) if piece in ids]
        if not known:
            message = (
                f"no end-of-text token: looked for {eos or ', '.join(END_OF_TEXT)}"
            )
            raise DataError(message, location=location)
        self.eos_id: int = ids[known[0]]
        kind = b"+chatml" if chatml else b""
        self.fingerprint = hashlib.sha256(content + kind).hexdigest()

    @property
    def files(self) -> Mapping[str, bytes]:
        eos = {"eos_token": self._library.id_to_token(self.eos_id)}
        return {
            "tokenizer.json": self._library.to_str().encode(),
            "tokenizer_config.json": json.dumps(eos).encode(),
        }

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        for text in texts:
            _utf8(text)
        encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [e.ids for e in encoded]

    def encode_special(self, text: str) -> list[int]:
        """As encode(), but a special token that ``text`` spells out is one.

        For templates that the program writes, never for text from outside.
        """
        return self._special.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _special(self) -> Any:
        other = copy.deepcopy(self._library)
        other.encode_special_tokens = False
        return other

    def decode(self, ids: Iterable[int]) -> str:
        text = [int(i) for i in ids if i != self.eos_id]
        return self._library.decode(text, skip_special_tokens=False)


def load(name: str) -> Tokenizer:
    """The tokenizer of ``name``.

    "bytes"; the path of a SentencePiece .model, of a tokenizer.json (any .json), or of
    a folder with tokenizer.json; or a name on the Hugging Face hub ("EleutherAI/
    gpt-neox-20b"), fetched once into the hub's cache. A tokenizer.json's name may end
    in "+chatml", which appends CHATML to the vocabulary.

    Raises: DataError: the file is missing or is not what it should be.
    """
    path, plus, extension = name.partition("+")
    if plus and extension != "chatml":
        message = f"unknown extension {extension!r}; known is chatml"
        raise DataError(message, location=name)
    if path == "bytes" and not plus:
        return ByteTokenizer()
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        file = _from_hub(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        message = f"cannot read the tokenizer: {error.strerror}"
        raise DataError(message, location=name) from None
    if file.suffix == ".json":
        eos = _configured_eos(file.parent / "tokenizer_config.json")
        return HuggingFaceTokenizer(
            content, eos=eos, chatml=bool(plus), location=str(file)
        )
    if plus:
        message = "only a tokenizer.json can be extended by +chatml"
        raise DataError(message, location=name)
    return SentencePieceTokenizer(content, location=str(file))


def _configured_eos(file: Path) -> str:
    """What the file beside a tokenizer.json names as EOS; "" if it does not."""
    try:
        eos = json.loads(file.read_bytes()).get("eos_token")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"cannot be read: {error}", location=str(file)) from None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return eos if isinstance(eos, str) else ""


def _from_hub(name: str) -> Path:
    """The local copy of a hub repository's tokenizer.json, fetched if need be."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # of the network, the hub, the disk: the hub has dozens
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        message = (
            "no such file, and the Hugging Face hub does not give its tokenizer.json: "
            f"{reason}. Give the path of a tokenizer.json"
        )
        raise DataError(message, location=name) from None
