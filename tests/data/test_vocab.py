import concurrent.futures
import json
import multiprocessing
import os
import pathlib

import pytest

from mpt_jax import tokenizer
from mpt_jax.config import DataConfig
from mpt_jax.data import stdlib_corpus, vocab
from mpt_jax.errors import DataError

CORPUS = {
    f"m{i}.py": f"class C{i}:\n    def f{i}(self, x):\n\treturn self.x{i} + x\n"
    for i in range(100)
}


@pytest.fixture
def small_corpus(monkeypatch):
    monkeypatch.setattr(stdlib_corpus, "code", lambda: CORPUS)


def config(directory, **changes) -> DataConfig:
    settings = {"cache_dir": str(directory), "tokenizer_vocab_size": 320} | changes
    return DataConfig(**settings)


def test_trains_once_then_reads_the_cache(tmp_path, small_corpus, capsys, monkeypatch):
    first = vocab.load_tokenizer(config(tmp_path / "cache"))
    assert capsys.readouterr().err == "training tokenizer (once)...\n"
    assert first.vocab_size == 320
    assert first.eos_id == 0
    monkeypatch.setattr(vocab, "train", None)  # a second training would raise
    second = vocab.load_tokenizer(config(tmp_path / "cache"))
    assert second.fingerprint == first.fingerprint
    assert capsys.readouterr().err == ""


def test_each_corpus_size_and_recipe_has_its_model(tmp_path, small_corpus, monkeypatch):
    paths = {vocab._cached_model(config(tmp_path))}
    paths.add(vocab._cached_model(config(tmp_path, tokenizer_vocab_size=321)))
    monkeypatch.setattr(vocab, "RECIPE", vocab.RECIPE + 1)
    paths.add(vocab._cached_model(config(tmp_path)))
    monkeypatch.setattr(stdlib_corpus, "code", lambda: CORPUS | {"z.py": "pass\n"})
    paths.add(vocab._cached_model(config(tmp_path)))
    assert len(paths) == 4


def test_default_cache_is_xdg(small_corpus, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert vocab._cached_model(config("")).parent == pathlib.Path("/x/mpt_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    home = pathlib.Path.home()
    assert vocab._cached_model(config("")).parent == home / ".cache/mpt_jax"


def train_in_a_process(directory: str) -> str:
    stdlib_corpus.code = lambda: CORPUS
    return vocab.load_tokenizer(config(directory)).fingerprint


def test_racing_processes_get_the_same_model(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        prints = set(pool.map(train_in_a_process, [str(tmp_path)] * 4))
    assert len(prints) == 1
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-written is left


def test_bad_vocabulary_sizes_are_errors():
    for size in (270, 30_000):
        with pytest.raises(
            DataError, match=f"cannot train a tokenizer of {size} pieces"
        ):
            vocab.train(CORPUS.values(), vocab_size=size)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_unwritable_cache_names_the_knob(tmp_path, small_corpus):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match=r"set data\.cache_dir"):
        vocab.load_tokenizer(config(tmp_path))


def test_cache_below_a_file_names_the_knob(tmp_path, small_corpus):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache_dir"):
        vocab.load_tokenizer(config(tmp_path / "file" / "cache"))


def test_stdlib_tokenizer_round_trips_source_code(tmp_path):
    tokenizer = vocab.load_tokenizer(config(tmp_path, tokenizer_vocab_size=2048))
    characters = tokens = 0
    for text in stdlib_corpus.select(stdlib_corpus.code(), "validation").values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        characters, tokens = characters + len(text), tokens + len(ids)
    assert characters / tokens > 2.5  # 2.9 measured; 1 would be characters


def test_a_tokenizer_of_sources_sees_each_by_its_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(vocab, "TRAINING_CHARACTERS", 40_000)
    monkeypatch.setattr(vocab, "CHARACTERS_PER_PIECE", 1)
    for name, letters in (("a", "abcde"), ("b", "vwxyz")):
        rows = (
            {"text": " ".join(letters[i % 5 :] + letters[: j % 5] for j in range(40))}
            for i in range(500)
        )
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{name}.jsonl").write_text(text)
    tasks = (f"jsonl:{tmp_path}/a.jsonl", f"jsonl:{tmp_path}/b.jsonl")
    seen = []
    real = vocab.train
    monkeypatch.setattr(
        vocab, "train", lambda lines, **kw: seen.extend(lines) or real(lines, **kw)
    )
    settings = config("", tasks=tasks, rates=(3.0, 1.0), tokenizer_vocab_size=300)
    model = tokenizer.SentencePieceTokenizer(vocab.train_on_sources(settings))
    assert model.vocab_size == 300
    sizes = [
        sum(len(line) for line in seen if line[0] in s) for s in ("abcde", "vwxyz")
    ]
    assert sum(sizes) == pytest.approx(40_000, rel=0.02)
    assert sizes[0] / sizes[1] == pytest.approx(3, rel=0.05)
    assert max(map(len, seen)) <= vocab.LINE_CHARACTERS


def test_a_tokenizer_of_bad_rows_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nno JSON\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: bad JSON"):
        vocab.train_on_sources(config("", tasks=(f"jsonl:{tmp_path}",), rates=()))
