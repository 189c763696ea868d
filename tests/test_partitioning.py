"""The sharding helper raises where Flax's would be silent."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mpt_jax import partitioning, presets
from mpt_jax.config import MeshConfig
from mpt_jax.errors import ConfigError, InternalError
from mpt_jax.models import mpt


@pytest.fixture
def mesh():
    with partitioning.use(
        partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    ) as mesh:
        yield mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({}, (1, 8, 1, 1)), ({"data": 2, "tensor": 2}, (2, 2, 2, 1)),
     ({"data": 8, "fsdp": 1}, (8, 1, 1, 1))],
)  # fmt: skip
def test_mesh_takes_every_device(sizes, shape):
    assert tuple(partitioning.make_mesh(MeshConfig(**sizes)).shape.values()) == shape


def test_a_mesh_that_leaves_devices_idle_is_refused():
    with pytest.raises(ConfigError, match="does not use 8 devices"):
        partitioning.make_mesh(MeshConfig(data=2, fsdp=2))


def test_a_constraint_reaches_the_program(mesh):
    f = jax.jit(lambda x: partitioning.shard(x * 2, "batch", None, "act_mlp"))
    y = f(jnp.ones((4, 3, 6)))
    assert y.sharding.spec == P(("data", "fsdp"), None, "tensor")
    assert partitioning.shards("batch") == 4


def test_without_a_mesh_there_is_nothing_to_do():
    x = jnp.ones((2, 3))
    assert partitioning.shard(x, "batch", None) is x
    assert partitioning.shards("batch") == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("batch", "lenght"), "unknown logical axis 'lenght'"),
        (("embed", "batch"), "used twice"),
        (("batch",), "do not fit shape"),
        (("act_mlp", "batch"), "does not split"),
    ],
)
def test_strictness(mesh, axes, message):
    with pytest.raises(InternalError, match=message):
        partitioning.shard(jnp.ones((3, 4)), *axes)


def test_a_typo_raises_on_one_device_too():
    with pytest.raises(InternalError, match="unknown logical axis"):
        partitioning.shard(jnp.ones((3,)), "btach")


def test_a_mesh_that_is_not_ours_raises(mesh):
    other = partitioning.make_mesh(MeshConfig())
    token = partitioning._MESH.set(None)
    try:
        with pytest.raises(InternalError, match=r"without partitioning\.use"):
            partitioning.shard(jnp.ones((3,)), None)
    finally:
        partitioning._MESH.reset(token)
    assert partitioning.current_mesh() is mesh
    del other


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_every_large_parameter_of_every_preset_is_split(name, sizes):
    """FSDP leaves only norms and biases whole: under 0.1 % of the parameters."""
    mesh = partitioning.make_mesh(MeshConfig(**sizes))
    cfg = presets.model(name)
    total = whole = 0
    for spec in jax.tree.leaves(mpt.param_specs(cfg)):
        named = partitioning.sharding(mesh, spec.axes, spec.shape)
        parts = spec.struct.size // _size(named.shard_shape(spec.shape))
        assert parts in (1, 2, 4, 8)
        total += spec.struct.size
        whole += spec.struct.size * (parts < 8)
    assert whole / total < 0.02 if "tensor" in sizes else whole / total < 0.01


def _size(shape):
    size = 1
    for n in shape:
        size *= n
    return size


class _OfSlice:
    """A device as it appears in a pod of several slices."""

    def __init__(self, device, slice_index):
        self.device, self.slice_index = device, slice_index

    def __getattr__(self, name):
        return getattr(self.device, name)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 4, "context": 2},
        {"data": 4, "context": 2},
    ],
)
def test_only_data_and_fsdp_cross_slices(sizes):
    """The slices are halves of the mesh, along its outermost axis of enough parts."""
    devices = [_OfSlice(d, i % 2) for i, d in enumerate(jax.devices())]
    mesh = partitioning.make_mesh(MeshConfig(**({"fsdp": 1} | sizes)), devices)
    of = [d.slice_index for d in mesh.devices.reshape(-1)]
    assert of == [0] * 4 + [1] * 4


def test_a_tensor_axis_across_slices_is_refused():
    devices = [_OfSlice(d, i % 2) for i, d in enumerate(jax.devices())]
    with pytest.raises(ConfigError, match=r"make mesh\.data a multiple of 2"):
        partitioning.make_mesh(MeshConfig(fsdp=1, tensor=8), devices)
