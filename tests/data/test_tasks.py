"""Names to sources; no TensorFlow, no file is read."""

import pickle

import pytest

from mpt_jax.config import DataConfig
from mpt_jax.data import sources, stdlib_corpus, tasks
from mpt_jax.errors import ConfigError


def config(*names: str, **more) -> DataConfig:
    return DataConfig(tasks=names, **{"rates": ()} | more)


def test_names_specs_and_rows_of_the_table_mix(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "mine", "text:/novels?name=other")
    found = tasks.corpora(config("stdlib_code", "mine", "jsonl:/data/c4.jsonl"))
    assert list(found) == ["stdlib_code", "mine", "c4"]
    assert [type(c) for c in found.values()] == [
        sources.Texts, sources.Files, sources.Files,
    ]  # fmt: skip
    assert found["mine"].name == "mine"


def test_all_problems_come_at_once():
    names = ("stdlib_cod", "jsonl:a?x=1", "text:b", "text:c/b", "nonsense")
    problems = tasks.problems(config(*names))
    assert len(problems) == 4
    assert "unknown task 'stdlib_cod'" in problems[0]
    assert 'did you mean "stdlib_code"' in problems[0]
    assert "unknown key 'x'" in problems[1]
    assert "'b' is named twice; give one of them another name=" in problems[2]
    assert "or FORMAT:PATH" in problems[3]
    with pytest.raises(ConfigError, match="4 problems"):
        tasks.corpora(config(*names))


def test_rates_are_by_name_and_equal_by_default():
    names = ("stdlib_code", "text:b")
    assert tasks.rates(config(*names)) == {"stdlib_code": 1.0, "b": 1.0}
    assert tasks.rates(config(*names, rates=(3.0, 1.0))) == {"stdlib_code": 3, "b": 1}


def test_prepared_sources_keep_their_names():
    prepared = config("a", "b", source="prepared", prepared="/p", rates=(1.0, 2.0))
    assert tasks.names(prepared) == ("a", "b")
    assert tasks.rates(prepared) == {"a": 1.0, "b": 2.0}


def test_texts_in_memory_are_a_corpus_like_any(monkeypatch):
    documents = {f"d{i}": f"text {i}" for i in range(60)}
    monkeypatch.setitem(tasks.TASKS, "mine", lambda: documents)
    corpus = pickle.loads(pickle.dumps(tasks.corpora(config("mine"))["mine"]))
    found = {
        split: [
            row.text for file in corpus.files(split)
            for row in sources.documents(corpus, file, split)
        ]
        for split in corpus.splits
    }  # fmt: skip
    assert found == {
        split: list(stdlib_corpus.select(documents, split).values())
        for split in ("train", "validation")
    }
    before = corpus.fingerprint()
    monkeypatch.setitem(tasks.TASKS, "mine", lambda: documents | {"d0": "other"})
    assert corpus.fingerprint() != before
