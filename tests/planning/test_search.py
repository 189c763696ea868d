import dataclasses
import itertools

import pytest

from mpt_jax import partitioning, presets
from mpt_jax.config import TrainConfig, parse
from mpt_jax.planning import analytic, search, topology
from mpt_jax.planning.chips import GIB
from mpt_jax.planning.report import FORMULA_ERROR
from mpt_jax.training.step import make_program


def config(name, **overrides):
    fields = {"steps": "10", "tokens": "none", "optim.schedule.warmup_steps": "2"}
    return parse(TrainConfig, presets.config(name), fields | overrides)


@pytest.mark.parametrize(
    ("optimizer", "data", "context"),
    [("decoupled_adamw", 1, 2), ("decoupled_lionw", 2, 1)],
)
def test_state_bytes_are_those_of_the_program(optimizer, data, context):
    sizes = {"data": data, "fsdp": 2, "tensor": 2, "context": context}
    overrides = {f"mesh.{k}": str(v) for k, v in sizes.items()}
    c = config("mpt-125m", global_batch_size="8", **overrides)
    c = dataclasses.replace(c, optim=dataclasses.replace(c.optim, name=optimizer))
    mesh = partitioning.make_mesh(c.mesh)
    with partitioning.use(mesh):
        struct = make_program(c, mesh).struct
    expected = tuple(
        partitioning.placement(tree).device_bytes
        for tree in (struct.params, struct.opt_state)
    )
    assert analytic.state_bytes(c, sizes) == expected


def test_what_keeps_less_needs_less_and_computes_more():
    plans = [
        analytic.train_step(
            config("mpt-7b", global_batch_size="64", **{"model.remat": remat}), 8
        )
        for remat in search.REMAT
    ]
    peaks = [p.memory.peak for p in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert plans[0].executed_flops < plans[-1].executed_flops
    # Without recomputation the matrices' part is the formula's 6 N.
    none = plans[0]
    assert none.executed_flops == pytest.approx(none.causal_flops, rel=0.03)


def test_the_plan_of_gpus_is_analytic_and_says_so():
    place = topology.parse("h100:8")
    plan = search.plan(config("mpt-1b", global_batch_size="64"), place)
    assert plan.figures.source == "analytic"
    assert plan.figures.compile_seconds is None
    assert plan.needed == plan.figures.memory.peak


def test_the_nearest_change_fits_and_changes_least():
    place = topology.parse("a100-80:8")
    c = config("mpt-7b", global_batch_size="1024", **{"model.remat": "full"})
    plan = search.plan(c, place)
    assert not plan.fits
    assert "does not fit, by" in plan.verdict
    better = search.nearest(c, plan)
    assert better.safe
    assert better.figures.mesh == plan.figures.mesh
    words = search.describe(c, better).split()
    assert [w.partition("=")[0] for w in words] == ["--config.microbatches"]


def test_nothing_helps_a_model_that_is_too_big_for_the_machine():
    c = config("mpt-70b", global_batch_size="8")
    plan = search.plan(c, topology.parse("a100-40:8"))
    assert search.nearest(c, plan) is None


def test_search_ranks_what_fits_by_time():
    place = topology.parse("h100:8")
    c = config("mpt-1b", global_batch_size="64")
    found = search.search(c, place, compile_best=0)
    assert len(found) > 10
    most = place.chip.hbm_gib * GIB / (1 + FORMULA_ERROR)
    assert all(p.needed <= most for p in found)
    seconds = [p.roofline.exposed for p in found]
    # Those within a percent are in the order of what they need.
    assert all(a <= b * 1.011 for a, b in itertools.pairwise(seconds))
    assert {p.config.model.remat for p in found} > {"none", "full", "offload"}
    assert any(p.config.microbatches > 1 for p in found)
    best = found[0].config
    assert best.global_batch_size == c.global_batch_size
