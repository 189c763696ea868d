import hashlib
import io

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_jax import tokenizer
from mpt_jax.data import vocab
from mpt_jax.errors import DataError

SOURCE = (
    "def area(r: float) -> float:\n"
    '    """Circle\'s area.\n\n    Args:\n\tr: radius, in m\n    """\n'
    "    return  3.14159 * r ** 2   # caf\u00e9, \U0001f600\n\n\n"
)
# SentencePiece writes U+2581 for a space and reads it back as one; lone surrogates are
# not text.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def model() -> bytes:
    return vocab.train([SOURCE * 3], vocab_size=360)


@pytest.fixture(scope="module")
def sentencepiece(model) -> tokenizer.Tokenizer:
    return tokenizer.SentencePieceTokenizer(model)


@pytest.fixture(params=["bytes", "sentencepiece"])
def any_tokenizer(request, sentencepiece) -> tokenizer.Tokenizer:
    return tokenizer.ByteTokenizer() if request.param == "bytes" else sentencepiece


@pytest.mark.parametrize(
    "text",
    [SOURCE, "", " ", "\n", "\t\t\n  \n", "a\r\nb", "\0", "\ufeffx", "<|endoftext|>",
     "  lead", "trail  ", "e\u0301 \ufb01 \u00a0", "\u2028", "</s><unk><0x41>"],
)  # fmt: skip
def test_round_trip(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert all(0 <= i < any_tokenizer.vocab_size for i in ids)
    assert any_tokenizer.eos_id not in ids  # not even for the text of the EOS piece


@given(text=TEXT)
@settings(deadline=None, max_examples=50)
def test_round_trip_of_any_text(sentencepiece, text):
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_decode_skips_eos_and_marks_half_a_character(any_tokenizer):
    ids = any_tokenizer.encode("a\u00e9")
    eos = any_tokenizer.eos_id
    assert any_tokenizer.decode([eos, *ids, eos]) == "a\u00e9"
    half = tokenizer.ByteTokenizer().encode("\u00e9")[:1]
    assert tokenizer.ByteTokenizer().decode(half) == "\ufffd"


def test_newline_and_tab_are_pieces_and_indentation_is_one(sentencepiece):
    assert sentencepiece.encode("\n\t") == [2, 3]  # after EOS and unk
    assert len(sentencepiece.encode("    ")) == 1


def test_lone_surrogate_is_refused(any_tokenizer):
    with pytest.raises(DataError, match="character 2 is a lone surrogate"):
        any_tokenizer.encode("ab\ud800")


def test_load_reads_a_file_and_fingerprints_it(tmp_path, model, sentencepiece):
    path = tmp_path / "m.model"
    path.write_bytes(model)
    loaded = tokenizer.load(str(path))
    assert loaded.encode(SOURCE) == sentencepiece.encode(SOURCE)
    assert loaded.fingerprint == hashlib.sha256(model).hexdigest()
    assert (loaded.vocab_size, loaded.eos_id) == (360, 0)
    assert tokenizer.load("bytes").vocab_size == 257


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_load_refuses_a_missing_or_corrupt_file(tmp_path, model, content):
    path = tmp_path / "m.model"
    with pytest.raises(DataError, match="cannot read the tokenizer: No such file") as e:
        tokenizer.load(str(path))
    assert e.value.location == str(path)
    path.write_bytes(model[: len(model) // 2] if content is None else content)
    with pytest.raises(DataError, match="not a SentencePiece model"):
        tokenizer.load(str(path))


def test_load_refuses_a_model_without_eos(tmp_path):
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([SOURCE]), model_writer=out, vocab_size=60, eos_id=-1,
        model_type="char", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match="has no EOS"):
        tokenizer.SentencePieceTokenizer(out.getvalue())
