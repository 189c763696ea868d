"""The step on every kind of mesh: the same losses, and what its devices exchange."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax import partitioning
from mpt_jax.training.step import make_program
from tests.training.test_step import MESH_RTOL, B, L, V, batch, config, run

SHAPES = {
    "data=2 fsdp=2 tensor=2": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    "context=8": {"mesh.fsdp": 1, "mesh.context": 8},
    "fsdp=2 context=4": {"mesh.fsdp": 2, "mesh.context": 4, "microbatches": 2},
    "data=4 context=2": {
        "mesh.data": 4,
        "mesh.fsdp": 1,
        "mesh.context": 2,
        "model.remat": "offload",
    },
    "tensor=2 context=4": {
        "mesh.fsdp": 1,
        "mesh.tensor": 2,
        "mesh.context": 4,
        "model.remat": "attention",
    },
    "fsdp=2 tensor=2 context=2": {
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "mesh.context": 2,
        "loss.chunk_tokens": 3,
    },
    "data=2 tensor=2 context=2": {
        "mesh.data": 2,
        "mesh.fsdp": 1,
        "mesh.tensor": 2,
        "mesh.context": 2,
        "model.scan_layers": False,
    },
}
# Sums in another order, in float64: an epsilon of 2.2e-16 a few hundred times.
FLOAT64_RTOL = 1e-12
NAMES = ("loss", "grad_norm", "param_norm", "update_norm", "learned_tokens")
# Every feature whose positions could be lost where rows are cut.
FEATURES = {
    "model.learned_pos_emb": True,
    "model.attn_config.alibi": False,
    "model.attn_config.sliding_window_size": 5,
    "model.attn_config.attn_logit_softcapping": 4.0,
    "model.attn_config.attn_type": "multiquery_attention",
}
quick = {"tensor=2 context=4"}


@contextlib.contextmanager
def in_float64():
    """All that is written as float32 is float64."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(jnp, "float32", jnp.float64)
        yield


def wide(c):
    model = dataclasses.replace(c.model, compute_dtype="float64", param_dtype="float64")
    return dataclasses.replace(c, model=model)


def assert_same(history, expected, rtol):
    for name in NAMES:
        got, want = ([h[name] for h in x] for x in (history, expected))
        np.testing.assert_allclose(got, want, rtol=rtol, err_msg=name)


def alone(c):
    return run(c, devices=jax.devices()[:1])[1]


@pytest.mark.parametrize(
    "shape",
    [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES],
)
def test_every_mesh_gives_the_same_losses(shape):
    fields = SHAPES[shape]
    _, history = run(config(**fields))
    assert_same(history, alone(config(**{"mesh.fsdp": 1})), MESH_RTOL)


@pytest.mark.slow
def test_every_mesh_gives_the_same_losses_in_float64():
    with in_float64():
        expected = alone(wide(config(**{"mesh.fsdp": 1})))
        for shape, fields in SHAPES.items():
            _, history = run(wide(config(**fields)))
            try:
                assert_same(history, expected, FLOAT64_RTOL)
            except AssertionError as error:
                raise AssertionError(shape) from error


@pytest.mark.slow
def test_positions_survive_the_cut():
    fields = SHAPES["fsdp=2 tensor=2 context=2"]
    _, history = run(config(**FEATURES, **fields))
    expected = alone(config(**FEATURES, **{"mesh.fsdp": 1}))
    assert_same(history, expected, MESH_RTOL)


@pytest.mark.slow
def test_gradients_are_bitwise_the_same_for_a_fixed_mesh():
    c = config(**SHAPES["fsdp=2 tensor=2 context=2"])
    first, second = (run(c)[0] for _ in range(2))
    for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_under_context_is_that_of_one_device():
    sums = []
    for fields, devices in (
        ({"mesh.fsdp": 1}, jax.devices()[:1]),
        ({"mesh.fsdp": 2, "mesh.context": 4}, None),
    ):
        c = config(**fields)
        mesh = partitioning.make_mesh(c.mesh, devices)
        with partitioning.use(mesh):
            program = make_program(c, mesh)
            params = program.init(jax.random.key(c.seed)).params
            placed = jax.device_put(batch(), program.batch_sharding)
            sums.append(program.evaluate(params, placed))
    np.testing.assert_allclose(sums[1], sums[0], rtol=MESH_RTOL)


def test_no_device_holds_whole_rows_of_logits_or_of_keys():
    """tensor cuts the vocabulary, context the rows: only parameters are gathered."""
    c = config(**SHAPES["fsdp=2 tensor=2 context=2"])
    mesh = partitioning.make_mesh(c.mesh)
    with partitioning.use(mesh):
        program = make_program(c, mesh)
        lowered = program.step.lower(program.struct, program.batch_struct(c))
        text = lowered.compile().as_text()
    gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather\(", text)
    shapes = [tuple(map(int, dims.split(","))) for _, dims in gathered if dims]
    assert shapes
    assert "collective-permute" in text
    for shape in shapes:
        assert shape[:2] != (B // 2, L), shape  # this device's whole rows of anything
        assert not (len(shape) > 2 and V in shape), shape  # the head has two dims
