"""The attention bench: it measures, refuses wrong kernels, says what it left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpt_jax.bench import attention, attention_peers
from mpt_jax.bench.attention_peers import Problem

QUICK = ["--lengths", "48", "--slopes", "mpt-7b", "--rounds", "1"]
QUICK += ["--sample_seconds", "0.001"]


@pytest.fixture(autouse=True)
def no_ceiling(monkeypatch):
    """The matmul that is timed for the ceiling takes seconds."""
    monkeypatch.setattr(attention, "_matmul_tflops", lambda platform: 0.25)


def test_help_says_what_is_run(capsys):
    assert attention.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--max_gib" in text
    assert "--only" in text


def test_a_run_writes_what_it_prints(tmp_path, capsys):
    out, image = tmp_path / "r.json", tmp_path / "r.png"
    args = [*QUICK, "--only", "ours,naive", "--out", str(out), "--plot", str(image)]
    assert attention.main(args) == 0
    result = json.loads(out.read_text())
    assert result["command"].endswith(" ".join(args))
    assert {"commit", "date", "versions", "device", "matmul_tflops"} < set(result)
    assert [row["contender"] for row in result["rows"]] == ["ours", "naive"]
    for row in result["rows"]:
        assert set(attention.COLUMNS) <= set(row)
        assert row["both_ms"] > 0
        assert 0 < row["error"] < attention.ERROR_LIMIT
    assert capsys.readouterr().out.count("mpt-7b  1  48") == 2
    assert image.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_left_out_with_a_reason(capsys):
    """32k naive needs 96 GiB; nothing of that size is made to find out."""
    args = [*QUICK, "--lengths", "32768", "--only", "naive,jax.nn xla", "--max_gib"]
    assert attention.main([*args, "18"]) == 0
    assert capsys.readouterr().out.count("needs about 96 GiB of 18") == 2


def test_a_wrong_kernel_fails_the_bench_before_it_is_timed(monkeypatch, capsys):
    def broken(problem: Problem) -> attention_peers.Runner:
        runner = attention_peers.CPU["naive"](problem)
        out, *rest = runner.backward()
        return runner._replace(backward=lambda: (out * 1.001, *rest))

    monkeypatch.setitem(attention_peers.CPU, "ours", broken)
    assert attention.main([*QUICK, "--only", "ours"]) == 1
    assert "ours is wrong" in capsys.readouterr().err


def test_an_unknown_contender_is_named(capsys):
    assert attention.main([*QUICK, "--only", "flash4"]) == 2
    assert "--only: got {'flash4'}" in capsys.readouterr().err


def test_an_absent_package_is_reported_and_not_fatal(monkeypatch, capsys):
    def absent(problem: Problem) -> attention_peers.Runner:
        raise ImportError("no tokamax here")

    monkeypatch.setitem(attention_peers.CPU, "tokamax", absent)
    assert attention.main([*QUICK, "--only", "tokamax"]) == 0
    assert "ImportError: no tokamax here" in capsys.readouterr().out


def test_flops_are_the_causal_half():
    problem = Problem(2, 1024, 4, 64, "float32", "mpt-7b", (0.5,) * 4, 1.0)
    products = 2 * 2 * problem.length**2 * problem.head_dim
    assert problem.forward_flops == problem.batch * problem.heads * products / 2
    q, k, *_ = problem.tensors
    logits = (q[0, :, 0] @ k[0, :, 0].T) * problem.scale
    np.testing.assert_allclose(logits.std(), problem.logit_std, rtol=0.05)
