"""The tokenizer of a data configuration; trains the stdlib one once and caches it."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpt_jax import durable, tokenizer
from mpt_jax.config import DataConfig
from mpt_jax.data import sources, stdlib_corpus, tasks
from mpt_jax.data.ledger import Ledger
from mpt_jax.data.notes import note
from mpt_jax.data.sources import Corpus
from mpt_jax.errors import DataError

# Anything that changes the trained model below must change this number: it names the
# cached file.
RECIPE = 1
# More text changes a vocabulary of a few thousand pieces little: 2.90 characters per
# token from 2 MB, 2.93 from 5 MB.
TRAINING_CHARACTERS = 4_000_000
# For a larger vocabulary: 100 million characters for GPT-NeoX's 50,000 pieces.
CHARACTERS_PER_PIECE = 2_000
# SentencePiece leaves out longer lines (of bytes: at most four to a character).
LINE_CHARACTERS = 4192 // 4


def load_tokenizer(config: DataConfig) -> tokenizer.Tokenizer:
    """The tokenizer that ``config`` names, trained first if it is a new "stdlib" one.

    Raises: DataError: a missing or corrupt file, a cache directory that cannot be
      written, a vocabulary size that the corpus cannot fill, no corpus.
    """
    if config.tokenizer != "stdlib":
        return tokenizer.load(config.tokenizer)
    path = _cached_model(config)
    if not path.exists():
        note("training tokenizer (once)...")
        model = train(
            stdlib_corpus.code().values(), vocab_size=config.tokenizer_vocab_size
        )
        _write(path, model)
    return tokenizer.load(str(path))


def train_on_sources(config: DataConfig, *, ledger: Ledger | None = None) -> bytes:
    """A SentencePiece model of the training text that ``config`` names.

    Of each source as many characters as its rate says, from all of its files in turns.

    Raises: DataError: no or too many bad rows, or as train().
    """
    ledger = ledger or Ledger(config.max_bad_fraction)
    size = config.tokenizer_vocab_size
    characters = max(TRAINING_CHARACTERS, CHARACTERS_PER_PIECE * size)
    shares = tasks.rates(config)
    lines: list[str] = []
    for name, corpus in tasks.corpora(config).items():
        wanted = characters * shares[name] / sum(shares.values())
        for text in _documents(corpus, ledger):
            for line in text.split("\n"):
                starts = range(0, len(line), LINE_CHARACTERS)
                lines += [line[at : at + LINE_CHARACTERS] for at in starts]
            wanted -= len(text)
            if wanted <= 0:
                break
    return train(lines, vocab_size=size, characters=characters)


def _documents(corpus: Corpus, ledger: Ledger) -> Iterator[str]:
    """The training documents of all files, one of each in turns."""
    files = corpus.files("train")
    readers = [sources.documents(corpus, file, "train") for file in files]
    while readers:
        for reader in tuple(readers):
            row = next(reader, None)
            if row is None:
                readers.remove(reader)
            elif (text := ledger.admit(corpus.name, row)) is not None:
                yield text


def train(
    texts: Iterable[str], *, vocab_size: int, characters: int = TRAINING_CHARACTERS
) -> bytes:
    """A SentencePiece BPE model of ``texts`` that loses nothing.

    No normalisation and no dummy prefix; unknown characters are bytes; newline and tab
    are pieces of their own and runs of spaces become pieces, so that indentation is
    cheap and decode(encode(source)) is the source. EOS is id 0, as in GPT-NeoX. BPE
    because it trains in 1 s, unigram in 10 s, with as many characters per token.

    Raises: DataError: ``texts`` cannot fill ``vocab_size``, or it is under ~400 (256
      bytes, 4 special pieces, every character that occurs).
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, characters),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            eos_id=0,
            eos_piece="<|endoftext|>",
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error)
        message = f"cannot train a tokenizer of {vocab_size} pieces: {reason}"
        raise DataError(message, location="data.tokenizer_vocab_size") from None
    return model.getvalue()


def _lines(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Lines of about the first ``characters``, in an order that mixes all modules.

    A newline is a piece of its own, so no piece can span two lines.
    """
    seen = 0
    for text in sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest()):
        if seen > characters:
            return
        seen += len(text)
        yield from text.split("\n")


def _cached_model(config: DataConfig) -> Path:
    """The file of this vocabulary size, recipe, library version and corpus."""
    import sentencepiece

    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mpt_jax")
    directory = Path(config.cache_dir or cache).expanduser()
    key = "-".join(
        (
            "stdlib",
            str(config.tokenizer_vocab_size),
            f"py{sys.version_info.major}.{sys.version_info.minor}",
            f"spm{sentencepiece.__version__}",
            f"r{RECIPE}",
            stdlib_corpus.fingerprint(stdlib_corpus.code()),
        )
    )
    return directory / f"{key}.model"


def _write(path: Path, content: bytes) -> None:
    """Writes at once or not at all: of two racing processes the last one wins whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, lambda to: to.write_bytes(content))
    except OSError as error:
        message = f"cannot cache the tokenizer: {error.strerror}; set data.cache_dir"
        raise DataError(message, location=str(path.parent)) from None
