"""Scores against apply()'s log-softmax; then the harness itself, where it is there."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax import lm_eval, loading
from mpt_jax.config import ModelConfig, parse
from mpt_jax.errors import UserError
from mpt_jax.interop import read
from mpt_jax.models import mpt, weights
from mpt_jax.tokenizer import ByteTokenizer
from tests.generation import checkpoint

# float32, of 24 bits, whose sums of up to eighty terms come in another order.
SCORE_RTOL = 2e-6
MODEL = {
    "d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": 264, "max_seq_len": 80,
    "no_bias": True, "attn_config": {"alibi": True}, "compute_dtype": "float32",
}  # fmt: skip
MAX_LENGTH = 80


@pytest.fixture(scope="module")
def cfg() -> ModelConfig:
    return parse(ModelConfig, MODEL)


@pytest.fixture(scope="module")
def params(cfg):
    params = mpt.init(cfg, jax.random.key(0))
    # Far from uniform, or all scores would be the same.
    return jax.tree.map(lambda a: a * 1.5 if a.ndim > 1 else a, params)


@pytest.fixture(scope="module")
def loaded(cfg, params) -> loading.Loaded:
    return loading.Loaded(
        cfg=cfg, params=weights.unstack(params), tokenizer=ByteTokenizer(),
        eos_ids=(256,), bos_id=None, name="tiny",
    )  # fmt: skip


@pytest.fixture(scope="module")
def oracle(cfg, params):
    """(context, continuation) -> (log P, is greedy), one at a time and unpadded."""

    @jax.jit
    def logits(tokens_1L):
        return mpt.apply(cfg, params, tokens_1L)[0]

    def score(context, continuation):
        tokens = [*context, *continuation][-MAX_LENGTH - 1 :]
        # One length for one program; what is on the right is not seen.
        padded = np.zeros((1, MAX_LENGTH), np.int32)
        padded[0, : len(tokens) - 1] = tokens[:-1]
        logits_LV = np.asarray(logits(padded), np.float64)
        total, greedy = 0.0, True
        for i in range(len(tokens) - len(continuation), len(tokens)):
            row = logits_LV[i - 1]
            total += row[tokens[i]] - np.log(np.exp(row - row.max()).sum()) - row.max()
            greedy &= row.argmax() == tokens[i]
        return total, greedy

    return score


def pairs(n: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(0, 256, size).tolist()  # noqa: E731
    return [(draw(rng.integers(1, 60)), draw(rng.integers(1, 30))) for _ in range(n)]


def test_scores_are_those_of_apply(loaded, oracle):
    asked = pairs(9)
    asked.append(([1] * 100, [2, 3]))  # cut off on the left
    asked.append(([5], list(range(80))))  # as long as can be
    asked.append((list(range(70)), list(range(40))))  # cut off, most is scored
    found = dict(lm_eval.score(loaded, asked, max_length=MAX_LENGTH, batch_size=4))
    assert sorted(found) == list(range(len(asked)))
    for i, pair in enumerate(asked):
        logprob, greedy = oracle(*pair)
        assert found[i].logprob == pytest.approx(logprob, rel=SCORE_RTOL)
        assert found[i].is_greedy == greedy


def test_int8_scores_as_float32_where_nothing_is_rounded(loaded, params):
    """Of entries that are all 127 * 2^-10 or its negative."""
    exact = jax.tree.map(
        lambda a: jnp.sign(a) * 127 * 2**-10 if a.ndim > 2 else a, params
    )
    exact["wte"]["weight"] = jnp.sign(params["wte"]["weight"]) * 127 * 2**-10
    wide = weights.unstack(exact)
    want, got = (
        dict(lm_eval.score(
            dataclasses.replace(loaded, params=p), pairs(4), max_length=MAX_LENGTH,
            batch_size=4,
        ))
        for p in (wide, weights.quantize(wide))
    )  # fmt: skip
    for i in range(4):
        assert got[i].logprob == pytest.approx(want[i].logprob, rel=SCORE_RTOL)
        assert got[i].is_greedy == want[i].is_greedy


def test_a_greedy_continuation_is_seen_as_one(loaded, cfg, params):
    likeliest = jax.jit(lambda t: jnp.argmax(mpt.apply(cfg, params, t)[0], axis=-1))
    tokens = np.zeros((1, MAX_LENGTH), np.int32)
    tokens[0, 0] = 7
    for i in range(1, 6):
        tokens[0, i] = likeliest(tokens)[i - 1]
    ids = tokens[0, :6].tolist()
    asked = [(ids[:1], ids[1:]), (ids[:2], ids[2:]), (ids[:1], [*ids[1:5], ids[5] ^ 1])]
    found = dict(lm_eval.score(loaded, asked, max_length=MAX_LENGTH, batch_size=4))
    assert [found[i].is_greedy for i in range(3)] == [True, True, False]


def test_batches_do_not_change_scores(loaded):
    asked = pairs(5)
    one = dict(lm_eval.score(loaded, asked, max_length=MAX_LENGTH, batch_size=1))
    four = dict(lm_eval.score(loaded, asked, max_length=MAX_LENGTH, batch_size=4))
    for i in range(5):
        assert one[i].logprob == pytest.approx(four[i].logprob, rel=SCORE_RTOL)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 81)])
def test_what_cannot_be_scored_is_refused(loaded, pair):
    with pytest.raises(UserError, match="request 1: "):
        dict(
            lm_eval.score(
                loaded, [([1], [2]), pair], max_length=MAX_LENGTH, batch_size=1
            )
        )


# ------------------------------------------------------------------------- the harness

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
GENERATE = """\
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "none"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a stone"], "answer": 0},
    {"question": "user said", "choices": ["system", "so"], "answer": 1},
    {"question": "Response " * 50, "choices": ["yes", "no"], "answer": 1},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> pathlib.Path:
    """A folder of tasks for --include_path."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.json"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for name, text in (("c", CHOICE), ("g", GENERATE), ("r", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(file=data))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("models") / "mpt-7b-chat"
    checkpoint.write(path)
    return path


@pytest.mark.lm_eval
@pytest.mark.filterwarnings("ignore")  # the harness's own, and those of datasets
def test_harness_gets_the_scores_of_apply(folder, tasks, monkeypatch, tmp_path):
    import lm_eval as harness
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    model = lm_eval.MptJax(str(folder), batch_size=2, max_length=64)
    results = harness.simple_evaluate(
        model, tasks=["tiny_choice", "tiny_generate", "tiny_rolling"],
        task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0,
    )  # fmt: skip

    cfg, encode = model.loaded.cfg, model.tokenizer.encode
    _, params = read.load(folder)

    def logprobs(tokens):
        logits_1LV = mpt.apply(cfg, params, jnp.asarray([tokens], jnp.int32))
        return np.asarray(jax.nn.log_softmax(logits_1LV[0]), np.float64)

    for sample in results["samples"]["tiny_choice"]:
        doc = sample["doc"]
        for choice, [(told, _)] in zip(doc["choices"], sample["resps"], strict=True):
            whole = encode(f"{doc['question']} {choice}")
            n = len(whole) - len(encode(doc["question"].rstrip()))
            rows = logprobs(whole[-65:-1])[-n:]
            expected = rows[np.arange(n), whole[-n:]].sum()
            assert float(told) == pytest.approx(expected, rel=SCORE_RTOL)

    bits, n_bytes = 0.0, 0
    for question in QUESTIONS:
        text = question["question"]
        ids, n_bytes = encode(text), n_bytes + len(text.encode())
        # Windows of 64 predictions, the last one filled up with known context.
        for start in range(0, len(ids), 64):
            targets = ids[start : start + 64]
            known = [model.eot_token_id, *ids][: start + len(targets)][-64:]
            if start + 64 > len(ids) and start:
                known = [model.eot_token_id, *ids][-65:-1]
            rows = logprobs(known)[-len(targets) :]
            bits -= rows[np.arange(len(targets)), targets].sum() / np.log(2)
    told = results["results"]["tiny_rolling"]["bits_per_byte,none"]
    assert told == pytest.approx(bits / n_bytes, rel=SCORE_RTOL)

    for sample in results["samples"]["tiny_generate"]:
        ids = encode(sample["doc"]["question"])[-58:]
        new = []
        for _ in range(6):
            new.append(
                int(logprobs(ids + new)[-1][: model.tokenizer.vocab_size].argmax())
            )
        expected = model.tokenizer.decode(new).partition("\n")[0]
        assert sample["resps"] == [[expected]]


@pytest.mark.lm_eval
def test_command_line_of_the_harness_knows_the_model(folder, tasks, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mpt_jax.lm_eval", "run", "--model", "mpt_jax",
         "--model_args", f"checkpoint={folder},max_length=64", "--tasks", "tiny_choice",
         "--include_path", str(tasks), "--batch_size", "2", "--apply_chat_template"],
        capture_output=True, text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout


@pytest.mark.lm_eval
def test_what_the_harness_may_not_ask_is_refused(folder):
    model = lm_eval.MptJax(str(folder), max_length=64)
    with pytest.raises(UserError, match="unknown num_beams"):
        model._request(0, "x", {"num_beams": 3})
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        model._request(0, "x", {"max_gen_toks": 64})
