"""The plans that the compiler made and that are kept, against the formula of today."""

import argparse
import json
import pathlib
import shlex

import pytest

from mpt_jax import cli, plan
from mpt_jax.planning import analytic, topology
from mpt_jax.planning.chips import GIB
from mpt_jax.planning.report import FORMULA_ERROR

ROOT = pathlib.Path(__file__).parents[2]
# Of the training step; the formula has no generation.
PLANS = sorted(
    path
    for path in ROOT.glob("mpt_jax/bench/results/plans/*.json")
    if "--what" not in json.loads(path.read_text())["command"]
)


def config_of(command):
    """(The configuration, the topology) that a plan's command names."""
    parser = argparse.ArgumentParser()
    for name in ("--config", "--topology", "--mesh", "--json"):
        parser.add_argument(name, default="")
    flags, rest = parser.parse_known_args(shlex.split(command)[3:])
    words = (word.removeprefix("--config.").partition("=") for word in rest)
    overrides = {name: value for name, _, value in words}
    path = str(ROOT / flags.config)
    overrides |= plan.mesh_overrides(flags.mesh)
    return cli.load_config(path, overrides), topology.parse(flags.topology)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_formula_is_near_what_the_compiler_said(path):
    values = json.loads(path.read_text())
    config, place = config_of(values["command"])
    figures = analytic.train_step(config, place.n_devices, lanes=place.chip.lanes)
    for exact in ("parameters", "optimizer", "batch"):
        assert getattr(figures.memory, exact) == pytest.approx(values["memory"][exact])
    peak = figures.memory.peak / GIB
    assert peak == pytest.approx(values["peak_gib"], rel=FORMULA_ERROR)
    assert values["fits"] == (values["peak_gib"] <= place.chip.hbm_gib)
