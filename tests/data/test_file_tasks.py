"""Files through SeqIO to rows. Needs TensorFlow: importing it takes 10 s."""

import gzip
import itertools
import json
import pathlib
import pickle

import numpy as np
import pytest

from mpt_jax import cli, tokenizer
from mpt_jax.config import TrainConfig, parse
from mpt_jax.data import feed, sources, tasks
from mpt_jax.data.ledger import Ledger
from mpt_jax.errors import DataError
from mpt_jax.tokenizer import ByteTokenizer
from tests.data import oracle
from tests.data.feeds import opened, take

EOS = ByteTokenizer.eos_id
# Different in their first characters; some fill several rows, most share one.
TEXTS = [f"<{i}>" + "abcdefgh"[i % 8] * (i * 7 % 90) for i in range(300)]


@pytest.fixture(scope="module", autouse=True)
def tf():
    from mpt_jax.data.seqio_adapters import tf

    return tf


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tf):
    """TEXTS in every format: three files of 100 each, or one of 300."""
    root = tmp_path_factory.mktemp("texts")
    for part in range(3):
        texts = TEXTS[100 * part : 100 * (part + 1)]
        lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
        (root / f"part{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (root / f"lines{part}.txt").write_text("\n".join(texts))
        with tf.io.TFRecordWriter(str(root / f"part.tfrecord-{part}-of-3")) as writer:
            for number, text in enumerate(texts):
                writer.write(example(tf, text, number))
    return root


def example(tf, text: str, number: int) -> bytes:
    feature = {
        "text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()])),
        "n": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
    }
    features = tf.train.Features(feature=feature)
    return tf.train.Example(features=features).SerializeToString()


def make_config(*specs: str, **changes) -> TrainConfig:
    data = {"tasks": specs, "rates": (), "tokenizer": "bytes", "seq_len": 64,
            "shuffle_buffer": 16}  # fmt: skip
    return parse(
        TrainConfig,
        {"steps": 1, "global_batch_size": 4, "model": {"vocab_size": 512},
         "eval": {"batches": 0},
         "data": data | changes},
    )  # fmt: skip


def documents_of(rows: np.ndarray) -> list[str]:
    ends = [-1, *np.flatnonzero(rows.ravel() == EOS)]
    pairs = itertools.pairwise(ends)
    return [ByteTokenizer().decode(rows.ravel()[a + 1 : b]) for a, b in pairs]


FORMATS = ["jsonl:{}", "text:{}?document=line", "tfrecord:{}"]


@pytest.mark.parametrize("spec", FORMATS)
def test_rows_are_the_documents_in_file_order(folder, spec):
    with opened(make_config(spec.format(folder), shuffle_buffer=0)) as source:
        rows = take(source, 40)
    expected = [[*ByteTokenizer().encode(text)] for text in TEXTS * 2]
    packed = oracle.pack(expected, length=64, eos_id=EOS)
    assert rows.tolist() == packed[: len(rows)]


@pytest.mark.parametrize("spec", FORMATS)
def test_resume_is_exact_in_the_middle_of_files(folder, spec):
    config = make_config(spec.format(folder))
    with opened(config) as source:
        take(source, 13)
        state = source.state()
        expected = take(source, 80)  # an epoch is 53
    with opened(config) as fresh:
        fresh.restore(state)
        np.testing.assert_array_equal(take(fresh, 80), expected)


def test_epochs_hold_every_document_once_in_a_new_order(folder):
    with opened(make_config(f"jsonl:{folder}", shuffle_buffer=1)) as source:
        seen = documents_of(take(source, 130))
    first, second = seen[:300], seen[300:600]
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second
    assert first[:8] != TEXTS[:8]


@pytest.mark.parametrize("count", [2, 4])  # 4 hosts share 3 files by documents
def test_hosts_read_disjoint_documents(folder, count):
    seen = []
    for index in range(count):
        config = make_config(f"jsonl:{folder}", shuffle_buffer=0)
        with opened(config, index=index, count=count) as source:
            seen.append(documents_of(take(source, 110)))
    parts = [set(documents) for documents in seen]
    assert set.union(*parts) == set(TEXTS)
    assert sum(map(len, parts)) == len(TEXTS)


def test_rows_name_their_source(folder):
    names = (f"jsonl:{folder}?name=a", f"tfrecord:{folder}?name=b")
    config = make_config(*names, rates=(3.0, 1.0))
    from mpt_jax.data.seqio_adapters import Vocabulary

    mixture = tasks.mixture(config.data, Vocabulary(ByteTokenizer()))
    rows = mixture.get_dataset(
        {"tokens": 64}, num_epochs=None, seed=0, trim_output_features=False
    )
    found = [int(row["source"]) for row in rows.take(600)]
    assert abs(np.mean(found) - 0.25) < 0.07  # four standard deviations


def test_a_bad_row_stops_the_run_with_its_place(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    with opened(make_config(f"jsonl:{tmp_path}")) as source:
        with pytest.raises(
            DataError, match=r"a\.jsonl:2: wrong type: .* a number"
        ) as e:
            take(source, 1)
    assert "Traceback" not in str(e.value)


def test_bad_rows_below_the_share_are_passed_over(tmp_path, capsys):
    rows = [json.dumps({"text": text}) for text in TEXTS]
    rows[7:7] = ["{", '{"txt": "x"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    config = make_config(f"jsonl:{tmp_path}", max_bad_fraction=0.05, shuffle_buffer=0)
    with opened(config) as source:
        assert documents_of(take(source, 65))[: len(TEXTS)] == TEXTS
    noted = capsys.readouterr().err
    assert "bad row 1 of 8" in noted
    assert "a.jsonl:9: missing field: no field 'text'; the row has 'txt'" in noted


def test_a_damaged_record_names_file_and_place(folder, tmp_path):
    content = bytearray((folder / "part.tfrecord-0-of-3").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.tfrecord").write_bytes(content)
    with opened(make_config(f"tfrecord:{tmp_path}")) as source:
        with pytest.raises(DataError, match=r"a\.tfrecord: .* after record \d+: corr"):
            take(source, 30)


def test_an_empty_training_split_is_an_error_not_a_loop(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "lang": "COBOL"}\n' * 200)
    with opened(make_config(f"jsonl:{tmp_path}?filter=stack")) as source:
        with pytest.raises(DataError, match="none of the rows of its train split is k"):
            take(source, 1)


def test_a_file_that_goes_missing_is_named(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
        )
    with opened(make_config(f"jsonl:{tmp_path}", shuffle_buffer=0)) as source:
        (tmp_path / "1.jsonl").unlink()
        with pytest.raises(DataError, match=r"1\.jsonl: .*No such file"):
            take(source, 200)


# -------------------------------------------------------------------- vocabularies


def texts_of(n: int) -> list[str]:
    return ["", "a", "caf\u00e9 \U0001f600", *TEXTS[:n]]


@pytest.fixture(scope="module")
def neox() -> tokenizer.Tokenizer:
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(TEXTS, trainer)
    return tokenizer.HuggingFaceTokenizer(library.to_str().encode())


@pytest.fixture(scope="module")
def sentencepiece() -> tokenizer.Tokenizer:
    from mpt_jax.data import vocab

    return tokenizer.SentencePieceTokenizer(
        vocab.train([f"{t} {t}" for t in TEXTS], vocab_size=300)
    )


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "neox"])
def test_seqio_sees_the_tokenizers_ids(kind, request, tf):
    from mpt_jax.data.seqio_adapters import Vocabulary

    plain = ByteTokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    vocabulary = Vocabulary(plain)
    texts = texts_of(20)
    ids = [plain.encode(text) for text in texts]
    assert [vocabulary.encode(text) for text in texts] == ids
    assert vocabulary.encode_tf(tf.constant(texts)).to_list() == ids
    assert vocabulary.encode_tf(tf.constant(texts[2])).numpy().tolist() == ids[2]
    decoded = [vocabulary.decode_tf(tf.constant(i, tf.int32)).numpy() for i in ids[1:]]
    assert [text.decode() for text in decoded] == texts[1:]
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy == vocabulary
    assert copy.encode_tf(tf.constant(texts)).to_list() == ids


def test_vocabularies_differ_where_ids_do(neox, sentencepiece):
    from mpt_jax.data.seqio_adapters import Vocabulary

    both = [Vocabulary(neox), Vocabulary(sentencepiece), Vocabulary(ByteTokenizer())]
    assert all((a == b) == (a is b) for a in both for b in both)


def test_eos_of_id_0_reaches_the_loss_weights(folder, neox):
    """As GPT-NeoX's: neither padding nor dropped nor unlearnt."""
    assert neox.eos_id == 0
    config = make_config(f"jsonl:{folder}", shuffle_buffer=0)
    with opened(config, tokenizer=neox) as source:
        batches = [next(source) for _ in range(12)]
    rows = np.concatenate([b["tokens"] for b in batches])
    expected = oracle.pack([neox.encode(t) for t in TEXTS * 2], length=64, eos_id=0)
    assert rows.tolist() == expected[: len(rows)]
    assert (rows == 0).any()
    for batch in batches:
        assert (batch["loss_mask"] == 1).all()
        assert (batch["segment_ids"] > 0).all()


def test_resume_is_exact_with_a_python_tokenizer(folder, neox):
    config = make_config(f"jsonl:{folder}", packing="bins")
    with opened(config, tokenizer=neox) as source:
        take(source, 9)
        state = source.state()
        expected = take(source, 60)
    with opened(config, tokenizer=neox) as fresh:
        fresh.restore(state)
        np.testing.assert_array_equal(take(fresh, 60), expected)


# ------------------------------------------------------------------------ real data


def test_tfds_by_name(shared_data):
    folder = shared_data / "pretrain"
    spec = f"tfds:c4/en:3.0.1?data_dir={folder / 'tfds'}"
    corpus = sources.parse(spec)
    assert corpus.splits == ("train", "validation")

    def read(corpus, split: str) -> list[str]:
        return [
            row.text for file in corpus.files(split)
            for row in sources.documents(corpus, file, split)
        ]  # fmt: skip

    train = read(corpus, "train")
    assert len(train) == 1000
    assert len(read(corpus, "validation")) == 200
    part = sources.parse(f"{spec}&train=train[30%25:50%25]")
    assert read(part, "train") == train[300:500]
    copy = read(sources.parse(f"jsonl:{folder}/c4_en.jsonl.gz"), "train")
    # All but three short ones, which only the TFDS copy has.
    assert len({text.strip() for text in train} - {text.strip() for text in copy}) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:c4/en:3.1.0?data_dir={}", "finds no prepared data|not found|Failed"),
        ("tfds:nonsense?data_dir={}", "Dataset nonsense not found"),
        ("tfds:c4/en:3.0.1?data_dir={}&train=tain", "Unknown split 'tain'"),
    ],
)
def test_tfds_that_is_not_there_is_named(shared_data, spec, message):
    corpus = sources.parse(spec.format(shared_data / "pretrain" / "tfds"))
    with pytest.raises(DataError, match=message):
        corpus.files("train")


@pytest.mark.slow  # reads ten sources, of which one is books
def test_the_mixture_of_mpt_7b_in_miniature(shared_data, tmp_path):
    for file in (shared_data / "pretrain").glob("*.jsonl.gz"):
        (tmp_path / file.name).symlink_to(file)
    json_file = shared_data / "tokenizer" / "20B_tokenizer.json"
    (tmp_path / "tokenizer.json").symlink_to(json_file)
    file = pathlib.Path(__file__).parents[2] / "configs" / "tiny_mixture.py"
    config = cli.load_config(f"{file}:{tmp_path}", {"data.shuffle_buffer": "8"})
    shares = tasks.rates(config.data)
    assert len(shares) == 10
    assert sum(shares.values()) == pytest.approx(1)
    with opened(config, tokenizer=feed.tokenizer(config)) as source:
        rows = [next(source) for _ in range(60)]
        seen = source.metrics()
    assert all(row["tokens"].shape == (8, 256) for row in rows)
    for name, share in shares.items():
        (found,) = (v for k, v in seen.items() if k.endswith(f"/{name}"))
        # 480 rows, or 40 tokens short of them: four standard deviations.
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 480)


def test_a_ledger_is_shared_by_the_tasks(folder):
    from mpt_jax.data.seqio_adapters import Vocabulary

    ledger = Ledger()
    config = make_config(f"jsonl:{folder}?name=a", f"tfrecord:{folder}?name=b")
    vocabulary = Vocabulary(ByteTokenizer())
    for corpus in tasks.corpora(config.data).values():
        documents = tasks.document_task(corpus, vocabulary, ledger=ledger).get_dataset(
            split="train", shuffle=False
        )
        ids = [row["tokens"].numpy().tolist() for row in documents]
        assert ids == [[*ByteTokenizer().encode(text), EOS] for text in TEXTS]
    assert {name: s["documents"] for name, s in ledger.summary().items()} == {
        "a": 300, "b": 300,
    }  # fmt: skip
