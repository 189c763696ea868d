"""lm-evaluation-harness' own client of OpenAI's API, local-completions.

It needs lm-eval[api] and transformers (for the tokenizer), here or in an environment
of their own: LM_EVAL_PYTHON names its interpreter.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from mpt_jax import loading
from mpt_jax.generation.sampling import Sampling
from tests.generation import checkpoint
from tests.serving import fake

# float32 sums of up to 20 log-probabilities, read in chunks of another length.
SCORE_RTOL = 1e-5
DOCS = [
    {"q": "user and assistant", "choices": ["system", "Response"], "gold": 0},
    {"q": "the system of", "choices": ["a user\n", "the assistant", "x"], "gold": 1},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""
CODE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

url, tokenizer, tasks = sys.argv[1:]
args = {"model": "fake", "base_url": url + "/v1/completions", "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface", "num_concurrent": 2, "max_length": 128}
found = lm_eval.simple_evaluate("local-completions", model_args=args, tasks=["tiny"],
                                task_manager=TaskManager(include_path=tasks))
print(json.dumps([s["resps"] for s in found["samples"]["tiny"]]))
"""
PYTHON = os.environ.get("LM_EVAL_PYTHON", sys.executable)
HERE = all(map(importlib.util.find_spec, ("lm_eval", "transformers", "tenacity")))


@pytest.mark.lm_eval
@pytest.mark.skipif(
    not HERE and PYTHON == sys.executable, reason="needs lm-eval[api], transformers"
)
def test_the_harness_gets_the_models_scores(tmp_path):
    folder = tmp_path / "model"
    checkpoint.write(folder)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    )
    (tmp_path / "tiny.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    (tmp_path / "tasks").mkdir()
    text = TASK.format(data=tmp_path / "tiny.jsonl")
    (tmp_path / "tasks" / "tiny.yaml").write_text(text)

    loaded = loading.load(folder)
    engine = loaded.engine(n_slots=4, capacity=128)
    service = fake.service(engine, tokenizer=loaded.need_tokenizer())
    with fake.running(service) as url:
        done = subprocess.run(
            [PYTHON, "-c", CODE, url, str(folder), str(tmp_path / "tasks")],
            capture_output=True, text=True,
            env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    scoring = Sampling(max_tokens=0, logprobs=1, prompt_logprobs=True)
    encode = service.tokenizer.encode
    for doc, answers in zip(DOCS, found, strict=True):
        for choice, [(told, greedy)] in zip(doc["choices"], answers, strict=True):
            context, whole = encode(doc["q"]), encode(f"{doc['q']} {choice}")
            (scored,) = loading.generate(loaded, [whole], scoring)
            tokens = scored.prompt_logprobs[len(context) :]
            expected = sum(token.logprob for token in tokens)
            assert float(told) == pytest.approx(expected, rel=SCORE_RTOL)
            best = all(token.id == token.top[0][0] for token in tokens)
            assert str(greedy) == str(best)
