"""GPT-NeoX's ids against what others published, where the files are there."""

import hashlib
import json

import numpy as np
import pytest

from mpt_jax import tokenizer
from mpt_jax.data import sources

SPELT = {"eos_in_text", "eos_only", "padding_in_text"}


@pytest.fixture(scope="module")
def neox(shared_data) -> tokenizer.HuggingFaceTokenizer:
    return tokenizer.load(str(shared_data / "tokenizer" / "20B_tokenizer.json"))


def cases(folder, name) -> list:
    return json.loads((folder / "tokenizer" / name).read_text())["cases"]


def test_the_published_encodings(shared_data, neox):
    for case in cases(shared_data, "golden.json"):
        ids = neox.encode_special(case["text"])
        assert ids == case["ids"], case["name"]
        plain = neox.encode(case["text"])
        assert (plain == ids) == (case["name"] not in SPELT), case["name"]
        assert neox.eos_id not in plain
        if case["decoded_equals_text"] and case["name"] not in SPELT:
            assert neox.decode(ids) == case["text"]


def test_encodings_that_others_published(shared_data, neox):
    found = cases(shared_data, "external_golden.json")
    assert len(found) > 100
    assert neox.encode_batch([c["text"] for c in found]) == [c["ids"] for c in found]


def test_the_vocabulary_is_neox(neox):
    assert (neox.vocab_size, neox.eos_id) == (50277, 0)


def test_chatml_ids_are_mpt_chats(shared_data):
    file = shared_data / "tokenizer" / "20B_tokenizer.json"
    chat = tokenizer.load(f"{file}+chatml")
    assert chat.vocab_size == 50279
    assert chat.encode_special("<|im_start|><|im_end|>") == [50277, 50278]


@pytest.mark.parametrize("name", ["cc_web", "wikipedia", "papers_s2"])
def test_documents_give_the_published_tokens(shared_data, neox, name):
    golden = json.loads((shared_data / "tokenizer" / "golden.json").read_text())
    (known,) = (d for d in golden["documents"] if f"/{name}." in d["file"])
    corpus = sources.parse(f"jsonl:{shared_data / known['file']}")
    (file,) = corpus.files("train")
    rows = sources.documents(corpus, file, "train")
    ids = neox.encode_batch([row.text for row in rows])
    assert sum(map(len, ids)) == known["tokens"]
    first = hashlib.sha256(np.array(ids[0], "<u4").tobytes())
    assert first.hexdigest() == known["first_doc"]["sha256_of_uint32le"]
