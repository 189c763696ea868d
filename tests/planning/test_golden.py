"""An all-gather that a change adds shows here, on a laptop and without libtpu.

Rewrite the files with ``python -m tests.planning.golden`` and review the diff.
"""

import json
import math
import re

import jax
import pytest

from mpt_jax import partitioning
from mpt_jax.models import mpt
from mpt_jax.planning import analytic
from tests.planning import golden

# The formula gathers each matrix as often as it is used; the compiler may keep some,
# and scatters the table's gradient under tensor parallelism.
OF_BYTES = 0.2


@pytest.mark.parametrize("mesh", golden.CPU_MESHES, ids=golden.name)
def test_the_step_shards_and_communicates_as_before(mesh):
    path = golden.FOLDER / f"cpu_{golden.name(mesh)}.json"
    assert golden.cpu(mesh) == json.loads(path.read_text())


@pytest.mark.parametrize("case", golden.AOT_CUTS, ids=lambda c: golden.cut_name(*c[:3]))
def test_parameters_of_every_preset_lie_as_before(case):
    """What the aot tests see in the program, from the rules alone."""
    preset, _, mesh, seq_len, rows = case
    path = golden.FOLDER / f"{golden.cut_name(*case[:3])}.json"
    config = golden.cut_config(preset, mesh, seq_len, rows, layers=2)
    axes = jax.tree_util.tree_leaves_with_path(
        mpt.param_axes(config.model), is_leaf=lambda x: isinstance(x, tuple)
    )
    specs = {
        jax.tree_util.keystr(at, simple=True, separator="."): str(partitioning.spec(x))
        for at, x in axes
    }
    assert specs == json.loads(path.read_text())["shardings"]


@pytest.mark.parametrize("case", golden.AOT_CUTS, ids=lambda c: golden.cut_name(*c[:3]))
def test_the_formula_sends_what_the_compiler_sends(case):
    preset, _, mesh, seq_len, rows = case
    path = golden.FOLDER / f"{golden.cut_name(*case[:3])}.json"
    values = json.loads(path.read_text())
    sent = [int(re.search(r"(\d+) bytes", c)[1]) for c in values["collectives"]]
    config = golden.cut_config(preset, mesh, seq_len, rows, layers=2)
    figures = analytic.train_step(config, math.prod(values["mesh"].values()))
    assert figures.collective_bytes == pytest.approx(sum(sent), rel=OF_BYTES)
