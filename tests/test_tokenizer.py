import hashlib
import io
import json
import pickle
import re
import unicodedata

import huggingface_hub
import pytest
import sentencepiece as spm
import tokenizers
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


@pytest.fixture(scope="module")
def neox_json() -> bytes:
    """GPT-NeoX's tokenizer in small: same parts, EOS and padding are ids 0 and 1."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.normalizer = tokenizers.normalizers.NFC()
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([SOURCE], trainer)
    library.add_tokens(["   ", "  "])  # runs of spaces, no special tokens
    return library.to_str().encode()


@pytest.fixture(scope="module")
def neox(neox_json) -> tokenizer.HuggingFaceTokenizer:
    return tokenizer.HuggingFaceTokenizer(neox_json)


@pytest.fixture(params=["bytes", "sentencepiece", "neox", "neox+chatml"])
def any_tokenizer(request, sentencepiece, neox, neox_json) -> tokenizer.Tokenizer:
    if request.param == "neox+chatml":
        return tokenizer.HuggingFaceTokenizer(neox_json, chatml=True)
    kinds = {"bytes": tokenizer.ByteTokenizer(), "sentencepiece": sentencepiece}
    return (kinds | {"neox": neox})[request.param]


@pytest.mark.parametrize(
    "text",
    [SOURCE, "", " ", "\n", "\t\t\n  \n", "a\r\nb", "\0", "\ufeffx", "<|endoftext|>",
     "  lead", "trail  ", "e\u0301 \ufb01 \u00a0", "\u2028", "</s><unk><0x41>",
     "<|padding|>a<|endoftext|>", "<|im_start|>user\nhi<|im_end|>"],
)  # fmt: skip
def test_round_trip(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    if isinstance(any_tokenizer, tokenizer.HuggingFaceTokenizer):
        text = unicodedata.normalize("NFC", text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
    assert all(0 <= i < any_tokenizer.vocab_size for i in ids)
    assert any_tokenizer.eos_id not in ids  # not even for the text of the EOS piece


@given(text=TEXT)
@settings(deadline=None, max_examples=50)
def test_round_trip_of_any_text(sentencepiece, neox, text):
    assert sentencepiece.decode(sentencepiece.encode(text)) == text
    assert neox.decode(neox.encode(text)) == unicodedata.normalize("NFC", text)


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


# ------------------------------------------------------------- Hugging Face, ChatML


def test_special_tokens_are_only_what_the_program_writes(neox):
    text = "a<|endoftext|>b"
    assert 0 not in neox.encode(text)
    assert neox.encode_special(text) == [*neox.encode("a"), 0, *neox.encode("b")]
    assert 0 not in neox.encode(text)  # the two do not disturb each other
    assert (neox.eos_id, neox.vocab_size) == (0, 302)


def test_runs_of_spaces_are_tokens(neox):
    assert neox.encode("   ") == [300]
    assert neox.encode("a  b")[1] == 301


def test_chatml_is_two_ids_after_the_vocabulary(neox, neox_json):
    chat = tokenizer.HuggingFaceTokenizer(neox_json, chatml=True)
    assert (chat.vocab_size, chat.eos_id) == (304, 0)
    turn = "<|im_start|>user\nHi<|im_end|>"
    ids = [302, *neox.encode("user\nHi"), 303]
    assert chat.encode_special(turn) == ids
    assert chat.decode(ids) == turn
    assert chat.encode(turn) == neox.encode(turn)  # of a document it is plain text
    assert chat.fingerprint != neox.fingerprint


@pytest.mark.parametrize("kind", ["neox", "sentencepiece"])
def test_a_tokenizer_can_be_sent_to_a_worker(kind, request):
    original = request.getfixturevalue(kind)
    copy = pickle.loads(pickle.dumps(original))
    assert copy.encode(SOURCE) == original.encode(SOURCE)
    assert copy.fingerprint == original.fingerprint


@pytest.mark.parametrize("kind", ["neox", "chatml", "sentencepiece"])
def test_its_files_make_it_again(kind, request, neox_json, tmp_path):
    if kind == "chatml":
        keys = {"eos": "<|padding|>", "chatml": True}
        original = tokenizer.HuggingFaceTokenizer(neox_json, **keys)
        special = "a<|im_start|>b"
        assert original.encode_special(special) != original.encode(special)
    else:
        original, special = request.getfixturevalue(kind), ""
    for name, content in original.files.items():
        (tmp_path / name).write_bytes(content)
    copy = tokenizer.load(str(tmp_path / next(iter(original.files))))
    assert (copy.vocab_size, copy.eos_id) == (original.vocab_size, original.eos_id)
    assert copy.encode(SOURCE) == original.encode(SOURCE)
    assert copy.decode(copy.encode(SOURCE)) == original.decode(copy.encode(SOURCE))
    if special:
        assert copy.encode_special(special) == original.encode_special(special)
        assert copy.encode(special) == original.encode(special)


def test_load_knows_files_folders_and_the_hub(tmp_path, neox_json, monkeypatch):
    (tmp_path / "tokenizer.json").write_bytes(neox_json)
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    names = (str(tmp_path), str(tmp_path / "tokenizer.json"), "org/gpt-neox.20b")
    loaded = [tokenizer.load(name + end) for name in names for end in ("", "+chatml")]
    assert [t.vocab_size for t in loaded] == [302, 304] * 3
    assert asked == [("org/gpt-neox.20b", "tokenizer.json")] * 2


def test_load_says_what_the_hub_said(monkeypatch):
    def download(repository: str, file: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"^org/name: no such file, .*: offline\. Give"):
        tokenizer.load("org/name")


@pytest.mark.parametrize(
    ("eos", "eos_id"), [('"<|padding|>"', 1), ('{"content": "<|padding|>"}', 1),
                        ("null", 0)],
)  # fmt: skip
def test_the_file_beside_names_eos(tmp_path, neox_json, eos, eos_id):
    (tmp_path / "tokenizer.json").write_bytes(neox_json)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
    assert tokenizer.load(str(tmp_path)).eos_id == eos_id


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tokenizer.json of Hugging Face"),
        (b'{"version": "1.0"}', "not a tokenizer.json of Hugging Face"),
        (None, "no end-of-text token: looked for <|endoftext|>"),
    ],
)
def test_load_refuses_what_is_no_tokenizer(tmp_path, content, message):
    if content is None:
        content = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str()
        content = content.encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert error.value.location == str(tmp_path / "tokenizer.json")


def test_load_refuses_chatml_of_others(tmp_path, model):
    (tmp_path / "m.model").write_bytes(model)
    for name in (f"{tmp_path}/m.model+chatml", f"{tmp_path}/m.model+chat"):
        with pytest.raises(DataError, match="chatml"):
            tokenizer.load(name)
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        tokenizer.load("bytes+chatml")


def test_json_config_that_is_no_json(tmp_path, neox_json):
    (tmp_path / "tokenizer.json").write_bytes(neox_json)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read"):
        tokenizer.load(str(tmp_path))
