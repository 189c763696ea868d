"""A run whose heads are dealt to devices is the run of one device, checkpoints too."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mpt_jax import partitioning
from mpt_jax.config import CheckpointConfig, MeshConfig
from mpt_jax.models import mpt
from mpt_jax.training.checkpoints import Checkpoints, open_checkpoint
from mpt_jax.training.step import TrainState, make_program
from tests.training.test_step import MESH_RTOL, B, L, V, batch, config

FIELDS = {
    "model.n_heads": 8,
    "model.n_layers": 1,
    "model.attention_skip": 2**-24,
    "model.attn_config.attn_type": "grouped_query_attention",
    "model.attn_config.kv_n_heads": 4,
    "model.attn_config.qk_ln": True,
    "optim.name": "adamw",
}
DEALT = (0, 1, 6, 7, 2, 3, 4, 5)  # on two devices, in groups of two


class Run:
    """Some steps on a mesh of ``tensor`` devices and fsdp on the rest."""

    def __init__(self, tensor: int, n_devices: int, **fields):
        self.config = config(**FIELDS | fields)
        sizes = MeshConfig(fsdp=n_devices // tensor, tensor=tensor)
        self.mesh = partitioning.make_mesh(sizes, jax.devices()[:n_devices])
        with partitioning.use(self.mesh):
            self.program = make_program(self.config, self.mesh)
        self.losses: list[float] = []

    def init(self) -> None:
        with partitioning.use(self.mesh):
            self.state = self.program.init(jax.random.key(self.config.seed))

    def steps(self, numbers) -> None:
        with partitioning.use(self.mesh):
            for n in numbers:
                placed = jax.device_put(batch(n), self.program.batch_sharding)
                self.state, metrics = self.program.step(self.state, placed)
                self.losses.append(float(metrics["loss"]))

    def save(self, folder, step: int) -> None:
        items = self.program.to_stored(self.state._asdict(), on_host=True)
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            checkpoints.save(
                step, params=items.pop("params"), opt_state=items, data=b"", meta={}
            )

    def restore(self, folder) -> None:
        struct = self.program.stored._asdict()
        params = struct.pop("params")
        found = open_checkpoint(folder).restore(params, struct)
        items = {"params": found.params, **found.opt_state}
        with partitioning.use(self.mesh):
            self.state = TrainState(**self.program.to_memory(items))


@pytest.fixture(scope="module")
def one():
    run = Run(tensor=1, n_devices=1)
    assert run.program.layout.head_order is None
    run.init()
    return run


@pytest.fixture(scope="module")
def two():
    run = Run(tensor=2, n_devices=4)
    assert run.program.layout.head_order.heads == DEALT
    run.init()
    return run


def test_a_checkpoint_holds_the_heads_in_their_own_order(one, two, tmp_path):
    """Init, too: what two devices make and save is what one does, to the bit."""
    for run in (one, two):
        run.save(tmp_path / str(run.mesh.size), 1)
    stored = [open_checkpoint(tmp_path / str(run.mesh.size)) for run in (one, two)]
    cfg = one.config.model
    first, second = (s.restore_params(mpt.abstract_params(cfg)) for s in stored)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))
    in_memory = two.state.params["blocks"]["attn"]["out_proj"]["weight"]
    own = second["blocks"]["attn"]["out_proj"]["weight"]
    np.testing.assert_array_equal(in_memory, own[:, np.asarray(DEALT)])
    assert stored[0].arrays == stored[1].arrays


def test_validation_does_not_see_the_order(one, two):
    sums = []
    for run in (one, two):
        with partitioning.use(run.mesh):
            placed = jax.device_put(batch(7), run.program.batch_sharding)
            sums.append(run.program.evaluate(run.state.params, placed))
    np.testing.assert_allclose(sums[1].ce, sums[0].ce, rtol=MESH_RTOL)


@pytest.mark.slow
def test_a_run_goes_on_at_any_tensor_size(one, two, tmp_path):
    """Two steps on two devices, saved, then two on four, on one, and on two again: the
    moments follow the heads."""
    one.steps(range(4))
    two.steps(range(2))
    two.save(tmp_path, 2)
    two.steps(range(2, 4))
    four = Run(tensor=4, n_devices=4)
    four.restore(tmp_path)
    four.steps(range(2, 4))
    alone = Run(tensor=1, n_devices=1)
    alone.restore(tmp_path)
    cfg, tokens = one.config.model, batch(9)["tokens"]
    assert tokens.shape == (B, L)
    assert tokens.max() < V

    np.testing.assert_allclose(two.losses, one.losses, rtol=MESH_RTOL)
    np.testing.assert_allclose(four.losses, one.losses[2:], rtol=MESH_RTOL)
    saved = open_checkpoint(tmp_path).restore_params(mpt.abstract_params(cfg))
    np.testing.assert_array_equal(
        mpt.apply(cfg, saved, tokens), mpt.apply(cfg, alone.state.params, tokens)
    )
