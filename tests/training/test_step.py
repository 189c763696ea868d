"""The step: the same numbers on every mesh and microbatch count, none of them bad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpt_jax import partitioning
from mpt_jax.config import TrainConfig, parse
from mpt_jax.models import mpt
from mpt_jax.objectives import next_token_loss
from mpt_jax.training.step import make_program, pretraining

B, L, V, STEPS = 8, 16, 48, 4
# Float32 steps whose sums are taken in another order: an epsilon of 1.2e-7 a few times.
MESH_RTOL = 2e-6


def config(**fields) -> TrainConfig:
    model = {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": V, "max_seq_len": L,
        "compute_dtype": "float32",
        "attn_config": {"alibi": True, "attn_uses_sequence_id": True},
    }  # fmt: skip
    base = {
        "steps": 20, "global_batch_size": B, "model": model,
        "loss": {"chunk_tokens": 7},
        # A large eps: Adam's division by near-zero moments would amplify rounding.
        "optim": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 1e-3,
                  "schedule": {"warmup_steps": 2}},
    }  # fmt: skip
    overrides = {k: str(v) for k, v in fields.items()}
    return parse(TrainConfig, base, overrides)


def batch(seed=0, bad=False):
    r = np.random.default_rng(seed)
    return {
        "tokens": r.integers(0, V, (B, L)).astype(np.int32) + (V if bad else 0),
        # Very unequal rows: a mean of means would be far off.
        "loss_mask": (r.random((B, L)) < r.random((B, 1))).astype(np.int32),
        "segment_ids": 1 + np.cumsum(r.random((B, L)) < 0.2, 1).astype(np.int32),
    }


def run(c: TrainConfig, *, steps=STEPS, bad=(), devices=None):
    mesh = partitioning.make_mesh(c.mesh, devices)
    with partitioning.use(mesh):
        program = make_program(c, mesh)
        state, history = program.init(jax.random.key(c.seed)), []
        for i in range(steps):
            placed = jax.device_put(batch(i, i in bad), program.batch_sharding)
            state, metrics = program.step(state, placed)
            history.append({k: float(v) for k, v in metrics.items()})
    return state, history


@pytest.fixture(scope="module")
def baseline():
    return run(config(**{"mesh.fsdp": 1}), devices=jax.devices()[:1])[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"mesh.fsdp": 8},
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
        {"mesh.data": 2, "mesh.fsdp": 1, "mesh.tensor": 4, "microbatches": 4},
        {
            "mesh.fsdp": 2,
            "mesh.tensor": 4,
            "model.scan_layers": False,
            "microbatches": 2,
        },
        {"mesh.fsdp": 4, "mesh.data": 2, "model.remat": "full"},
    ],
    ids=lambda f: " ".join(f"{k.split('.')[-1]}={v}" for k, v in f.items()),
)
def test_meshes_and_microbatches_give_the_same_run(baseline, fields):
    _, history = run(config(**fields))
    for name in ("loss", "grad_norm", "param_norm", "update_norm", "learned_tokens"):
        got, expected = ([h[name] for h in x] for x in (history, baseline))
        np.testing.assert_allclose(got, expected, rtol=MESH_RTOL, err_msg=name)


def test_loss_is_the_mean_over_learned_tokens(baseline):
    c = config()
    params = mpt.init(c.model, jax.random.key(c.seed))
    b = batch(0)
    hidden = mpt.hidden_states(c.model, params, b["tokens"],
                               segment_ids_BL=b["segment_ids"])  # fmt: skip
    sums = next_token_loss(hidden, params["wte"]["weight"], b["tokens"], b["loss_mask"])
    np.testing.assert_allclose(baseline[0]["loss"], sums.ce / sums.weight, rtol=1e-5)
    assert baseline[0]["learned_tokens"] == b["loss_mask"][:, 1:].sum()


def test_norms_are_those_of_the_trees(baseline):
    c = config(**{"mesh.fsdp": 1})
    params = mpt.init(c.model, jax.random.key(c.seed))
    loss = lambda p: (lambda s: s.total / s.weight)(  # noqa: E731
        pretraining(c.model, c.loss)(p, jax.tree.map(jnp.asarray, batch(0)), None)
    )
    norms = optax.tree.norm(jax.grad(loss)(params)), optax.tree.norm(params)
    got = baseline[0]["grad_norm"], baseline[0]["param_norm"]
    np.testing.assert_allclose(got, norms, rtol=1e-4)
    assert baseline[0]["update_norm"] == 0  # the warmup starts from 0
    assert baseline[1]["update_norm"] > 0


def test_a_step_that_is_not_finite_is_not_applied():
    c = config()
    state, history = run(c, bad={2})
    assert [h["finite"] for h in history] == [1, 1, 0, 1]
    assert (int(state.step), int(state.skipped)) == (4, 1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    # As if the bad batch had never been in the stream; the schedule waits for it too.
    mesh = partitioning.make_mesh(c.mesh)
    with partitioning.use(mesh):
        program = make_program(c, mesh)
        other = program.init(jax.random.key(c.seed))
        for i in (0, 1, 3):
            placed = jax.device_put(batch(i), program.batch_sharding)
            other, metrics = program.step(other, placed)
    assert float(metrics["learning_rate"]) == history[3]["learning_rate"]
    for got, expected in zip(*map(jax.tree.leaves, (state.params, other.params)),
                             strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, expected)


def test_gradient_noise_of_dropout_changes_with_the_step():
    c = config(
        **{
            "model.resid_pdrop": 0.5,
            "optim.schedule.warmup_steps": 4,
            "optim.schedule.name": "constant",
            "optim.lr": 1e-12,
        }
    )
    mesh = partitioning.make_mesh(c.mesh)
    with partitioning.use(mesh):
        program = make_program(c, mesh)
        state, losses = program.init(jax.random.key(0)), []
        for _ in range(2):
            placed = jax.device_put(batch(0), program.batch_sharding)
            state, metrics = program.step(state, placed)
            losses.append(float(metrics["loss"]))
        sums = program.evaluate(state.params, placed)
    assert losses[0] != losses[1]
    assert float(sums.ce / sums.weight) not in losses  # evaluation drops nothing


@pytest.mark.parametrize("name", ["decoupled_adamw", "decoupled_lionw", "adamw",
                                  "adafactor"])  # fmt: skip
def test_every_optimizer_learns_on_a_mesh(name):
    # Fields that an optimizer has no use for must keep their defaults.
    betas = {} if name == "adafactor" else {"optim.betas": "0.9,0.99"}
    if name in ("adafactor", "decoupled_lionw"):
        betas["optim.eps"] = 1e-8
    lr = {"decoupled_lionw": 3e-3, "adafactor": 0.3}.get(name, 1e-2)
    c = config(**{"mesh.fsdp": 4, "mesh.tensor": 2, "optim.name": name, "optim.lr": lr,
                  "optim.schedule.warmup_steps": 0, **betas})  # fmt: skip
    mesh = partitioning.make_mesh(c.mesh)
    with partitioning.use(mesh):
        program = make_program(c, mesh)
        state = program.init(jax.random.key(0))
        placed = jax.device_put(batch(0), program.batch_sharding)
        losses = []
        for _ in range(12):
            state, metrics = program.step(state, placed)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5


def test_state_is_sharded_as_promised_and_donated():
    c = config(**{"mesh.fsdp": 4, "mesh.tensor": 2})
    mesh = partitioning.make_mesh(c.mesh)
    with partitioning.use(mesh):
        program = make_program(c, mesh)
        state = program.init(jax.random.key(0))
        placed = jax.device_put(batch(0), program.batch_sharding)
        new, _ = program.step(state, placed)
    for tree in (state, new):
        jax.tree.map(
            lambda x, s: None if x.sharding == s.sharding else pytest.fail(str(s)),
            tree,
            program.struct,
        )
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    up = new.params["blocks"]["ffn"]["up_proj"]["weight"]
    assert up.addressable_shards[0].data.size == up.size // 8


def test_the_objective_is_a_value():
    """Any function of (params, batch, key) to sums trains."""
    c = config()

    def only_first_half(params, batch, key):
        mask = batch["loss_mask"].at[:, L // 2 :].set(0)
        return pretraining(c.model, c.loss)(params, batch | {"loss_mask": mask}, key)

    mesh = partitioning.make_mesh(c.mesh)
    with partitioning.use(mesh):
        program = make_program(c, mesh, objective=only_first_half)
        state = program.init(jax.random.key(0))
        placed = jax.device_put(batch(0), program.batch_sharding)
        _, metrics = program.step(state, placed)
    assert metrics["learned_tokens"] == batch(0)["loss_mask"][:, 1 : L // 2].sum()


def test_config_is_hashable():
    """jit's static arguments and functools.cache rely on it."""
    assert hash(config().model) == hash(dataclasses.replace(config().model))
