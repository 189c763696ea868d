"""What lies otherwise in memory than in a checkpoint, and that nobody knows of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax import partitioning
from mpt_jax.config import MeshConfig
from mpt_jax.models import heads, mpt
from mpt_jax.training.checkpoints import open_checkpoint
from mpt_jax.training.layout import Layout
from tests.models.test_heads import small
from tests.training.test_heads import DEALT, Run
from tests.training.test_step import MESH_RTOL


@pytest.mark.parametrize("apart", [False, True])
def test_moving_keeps_places_and_shares_what_does_not_move(apart):
    cfg = small(n_layers=3)
    layout = Layout(heads.order(cfg, shards=2, length=16), apart)
    axes = mpt.param_axes(cfg)
    mesh = partitioning.make_mesh(MeshConfig(fsdp=4, tensor=2))
    with partitioning.use(mesh):
        stored = jax.tree.map(
            lambda s, a: jax.device_put(
                jnp.arange(s.size, dtype=s.dtype).reshape(s.shape),
                partitioning.sharding(mesh, a, s.shape),
            ),
            mpt.abstract_params(cfg),
            axes,
        )
        own, table = jax.tree.map(np.asarray, stored), stored["wte"]["weight"]
        wq = stored["blocks"]["attn"]["Wq"]["weight"]
        where = wq.sharding
        struct = layout.struct(stored, axes)
        moved = layout.to_memory(stored, axes)
        again = layout.to_stored(moved, axes, on_host=True)
    assert wq.is_deleted()
    assert moved["wte"]["weight"] is again["wte"]["weight"] is table
    got = moved["blocks"]["attn"]["Wq"]["weight"]
    got = np.stack(got) if apart else got
    want = own["blocks"]["attn"]["Wq"]["weight"][:, :, layout.head_order.heads]
    np.testing.assert_array_equal(got, want)
    jax.tree.map(np.testing.assert_array_equal, again, own)
    back = again["blocks"]["attn"]["Wq"]["weight"]
    assert back.sharding.is_equivalent_to(
        where.with_memory_kind("pinned_host"), back.ndim
    )
    jax.tree.map(
        lambda x, s: None if (x.shape, x.sharding) == (s.shape, s.sharding)
        else pytest.fail(f"{x.shape} {x.sharding}: {s}"),
        moved, struct,
    )  # fmt: skip


def test_a_run_of_layers_apart_is_one_of_scanned_layers(tmp_path):
    """Two steps apart on four devices, saved, two more scanned on one: the checkpoint
    is the same, and goes on the same, as if all had been scanned."""
    scanned = {"model.n_layers": 2, "model.scan_layers": True}
    one = Run(tensor=1, n_devices=1, **scanned)
    apart = Run(tensor=2, n_devices=4, **scanned | {"model.scan_layers": False})
    assert apart.program.layout.head_order.heads == DEALT
    for run in (one, apart):
        run.init()
        run.save(tmp_path / f"{run.mesh.size}", 1)
    first, second = (open_checkpoint(tmp_path / n) for n in ("1", "4"))
    assert first.arrays == second.arrays
    assert isinstance(apart.state.params["blocks"]["norm_1"]["weight"], tuple)

    one.steps(range(4))
    apart.steps(range(2))
    apart.save(tmp_path / "4", 2)
    apart.steps(range(2, 4))
    later = Run(tensor=1, n_devices=1, **scanned)
    later.restore(tmp_path / "4")
    later.steps(range(2, 4))
    np.testing.assert_allclose(apart.losses, one.losses, rtol=MESH_RTOL)
    np.testing.assert_allclose(later.losses, one.losses[2:], rtol=MESH_RTOL)
    back = Run(tensor=2, n_devices=4, **scanned | {"model.scan_layers": False})
    back.restore(tmp_path / "4")
    back.steps(range(2, 4))
    assert back.losses == apart.losses[2:]
