"""Text as it comes, whole characters and stop strings: nothing lost, nothing twice."""

import io

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_jax import tokenizer
from mpt_jax.generation.text import Stream

TEXT = "na\u00efve caf\u00e9 \U0001f600\U0001f680 \u65e5\u672c  two  spaces\n\tx = 1\n"


def neox():
    """GPT-NeoX's in small: a byte-level BPE."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator([TEXT], trainer)
    return tokenizer.HuggingFaceTokenizer(library.to_str().encode())


def spm(*, dummy_prefix):
    """With a dummy prefix as in Llama: a text's first space is not written."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 9),
        model_writer=model, model_type="bpe", vocab_size=280, byte_fallback=True,
        add_dummy_prefix=dummy_prefix, eos_id=0, unk_id=1,
        bos_id=-1, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return tokenizer.SentencePieceTokenizer(model.getvalue())


TOKENIZERS = {
    "bytes": tokenizer.ByteTokenizer(),
    "neox": neox(),
    "sentencepiece": spm(dummy_prefix=False),
    "dummy_prefix": spm(dummy_prefix=True),
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def streamed(name, ids, **keys):
    stream = Stream(TOKENIZERS[name], **keys)
    parts = [stream.push([i]) for i in ids]
    parts.append(stream.finish())
    assert "".join(parts) == stream.text
    return stream, parts


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_of_any_tokens_make_their_text(name, data):
    """Whatever ids a model may say, half characters and all."""
    top = TOKENIZERS[name].vocab_size - 1
    # Specials in the middle: see test_specials_do_not_eat_spaces.
    ids = data.draw(st.lists(st.integers(2, top), max_size=40))
    stream, _ = streamed(name, ids)
    assert stream.text == TOKENIZERS[name].decode(ids)


@every_tokenizer
@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_parts_of_a_text_after_a_prompt(name, text):
    prompt = TOKENIZERS[name].encode("the cat")
    ids = TOKENIZERS[name].encode(text)
    stream, _ = streamed(name, ids, prompt_ids=prompt)
    decode = TOKENIZERS[name].decode
    assert decode(prompt) + stream.text == decode([*prompt, *ids])


@every_tokenizer
def test_no_part_shows_half_a_character(name):
    ids = TOKENIZERS[name].encode(TEXT * 2)
    stream, parts = streamed(name, ids)
    assert stream.text == TOKENIZERS[name].decode(ids)
    assert "\ufffd" not in "".join(parts)
    assert sum(bool(part) for part in parts) > len(parts) / 4  # and it does stream


@every_tokenizer
def test_broken_bytes_do_not_hold_back_for_ever(name):
    kind = TOKENIZERS[name]
    half = kind.encode("\U0001f680")[-1]
    if kind.decode([half]) != "\ufffd":
        pytest.skip("the rocket is one token")
    stream, parts = streamed(name, [half] * 50)
    assert stream.text == kind.decode([half] * 50)
    assert len("".join(parts[:-1])) >= 47


def test_a_character_that_the_prompt_began_is_completed():
    ids = tokenizer.ByteTokenizer().encode("\u00e9x")
    stream, _ = streamed("bytes", ids[1:], prompt_ids=[65, ids[0]])
    assert stream.text == "\u00e9x"


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_first_stop_string_ends_the_text(name, data):
    alphabet = st.sampled_from("ab\u00e9\U0001f680 ")
    text = data.draw(st.text(alphabet, max_size=30))
    stops = data.draw(st.lists(st.text(alphabet, min_size=1, max_size=4), max_size=3))
    ids = TOKENIZERS[name].encode(text)
    whole = TOKENIZERS[name].decode(ids)
    stream, parts = streamed(name, ids, stop=stops)
    found = [at for at in map(whole.find, stops) if at >= 0]
    # Of several, the one that is complete first; then the earliest of those.
    assert stream.stopped == bool(found)
    if not found:
        assert stream.text == whole
    else:
        assert whole.startswith(stream.text)
        assert any(whole[len(stream.text) :].startswith(stop) for stop in stops)
        assert not any(stop in stream.text for stop in stops)
        assert parts[-1] == ""


def test_what_may_become_a_stop_string_waits():
    stream = Stream(tokenizer.ByteTokenizer(), stop=("\n\nUser:", "END"))
    encode = tokenizer.ByteTokenizer().encode
    assert stream.push(encode("hi\n")) == "hi"
    assert stream.push(encode("\nUse")) == ""
    assert stream.push(encode("ful EN")) == "\n\nUseful "
    assert stream.push(encode("D and more")) == ""
    assert stream.stopped
    assert stream.push(encode("more")) == stream.finish() == ""
    assert stream.text == "hi\n\nUseful "
