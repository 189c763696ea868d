"""Two layers of every big model on every kind of slice, by libtpu: ``pytest -m aot``.

Golden collectives are rewritten by ``python -m tests.planning.golden aot``.
"""

import json
import os
import subprocess
import sys

import pytest

from mpt_jax.planning.report import FORMULA_ERROR
from tests.launch.flags import sparse_cores
from tests.planning import golden

pytestmark = pytest.mark.aot

LOGITS = 0.1  # of the bytes of two layers and their cache: what is drawn from
SMALL_ARRAYS = 0.02  # of the bytes of matrices: norms and the like, padded or not


def run(*args):
    pytest.importorskip("libtpu", reason="needs the aot extra")
    return golden.cut_in_a_child(*args)


def plan(tmp_path, config, topology, *arguments, **environment):
    """What the verb writes, of two layers."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "mpt_jax.plan", "--config", config, *arguments]
    command += ["--topology", topology, "--config.model.n_layers=2", "--json", str(out)]
    done = subprocess.run(
        command, cwd=golden.ROOT, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", golden.AOT_CUTS, ids=lambda c: golden.cut_name(*c[:3]))
def test_two_layers_communicate_as_before_and_need_what_the_formula_says(case):
    found = run(*case, 2)
    path = golden.FOLDER / f"{golden.cut_name(*case[:3])}.json"
    assert found["facts"] == json.loads(path.read_text())
    assert found["estimate"] == pytest.approx(found["peak"], rel=FORMULA_ERROR)
    for exact in ("parameters", "optimizer", "batch"):
        assert found["guess"][exact] == pytest.approx(found["state"][exact], rel=1e-4)


def test_memory_grows_by_the_same_for_each_layer():
    """So two small compiles say what a deep model needs."""
    case = ("mpt-7b", "v5e:4x4", "fsdp=16", 2048, 64)
    two, four, eight = (run(*case, layers)["peak"] for layers in (2, 4, 8))
    assert two + 3 * (four - two) == pytest.approx(eight, rel=0.03)


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8"])
def test_sparse_cores_exchange_beside_the_computation(topology, tmp_path):
    """With the flags of launch/; without them gradients are summed whole, while all
    else waits."""
    told = sparse_cores()
    without, within = (
        plan(tmp_path, "configs/mpt_7b.py", topology, LIBTPU_INIT_ARGS=text)
        for text in ("", told)
    )
    assert within["LIBTPU_INIT_ARGS"] == told
    sent = {c["kind"]: c["bytes"] for c in within["collectives"] if c["asynchronous"]}
    matrices = 2 * 12 * 4096**2 * 63 / 64  # of two layers, without one's own part
    assert sent["reduce-scatter"] == pytest.approx(4 * matrices, rel=SMALL_ARRAYS)
    assert sent["all-gather"] >= 2 * 2 * matrices  # forward and backward
    exposed = [p["roofline_seconds"]["exposed"] for p in (without, within)]
    assert exposed[1] < exposed[0]


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_generation_holds_its_weights_and_cache(what, tmp_path):
    config = "configs/released/mpt_7b.py"
    values = plan(tmp_path, config, "v5e:2x2", "--what", what)
    # k and v of 2 layers, 8 slots of 2,048 tokens, 8 of 32 heads of 128, in bfloat16;
    # the norms that skipping reads are a thousandth more.
    kv = 2 * 2 * 8 * 2048 * 8 * 128 * 2
    assert values["memory"]["cache"] == pytest.approx(kv, rel=2e-3)
    held = values["memory"]["parameters"] + kv
    assert values["peak_gib"] * 2**30 >= held
    if what == "decode":  # each weight and each key is read once
        assert held <= values["hbm_bytes"] <= (1 + LOGITS) * held
    assert {tuple(c["axes"]) for c in values["collectives"]} == {("tensor",)}
