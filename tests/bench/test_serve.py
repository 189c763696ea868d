"""The bench of the server, on a model so small that only the plumbing is timed."""

import json

import pytest

from mpt_jax import presets
from mpt_jax.bench import serve
from mpt_jax.config import ModelConfig, parse
from tests.serving import checkpoint


@pytest.mark.slow  # compiles a small engine, and starts a process of clients
def test_a_result_has_a_row_for_each_number_of_streams(monkeypatch, tmp_path):
    cfg = parse(ModelConfig, checkpoint.MODEL)
    monkeypatch.setattr(presets, "model", lambda name: cfg)
    out = tmp_path / "r.json"
    words = "--streams 1 2 --requests 2 --prompt 8 --tokens 6 --rounds 1 --out"
    assert serve.main([*words.split(), str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["streams"] for row in result["rows"]] == [1, 2]
    assert result["rows"][0]["over_one_stream"] == 1
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])
    assert all(row["first_token_p50_ms"] > 0 for row in result["rows"])
