"""What a ring computes and sends, counted in programs that nobody runs."""

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from mpt_jax import partitioning, presets
from mpt_jax.config import RematPolicy, TrainConfig, parse
from mpt_jax.kernels import attention, attention_tpu
from mpt_jax.kernels.sharded import Layout, sharded_attention
from mpt_jax.planning import collectives, hlo, work
from mpt_jax.training.step import make_program
from tests.planning import golden

LAYOUT = Layout(("data",), ("context",), (), (), ("context",))
MOST_BYTES_OF_AGREEING = 1024


def mesh_of(**sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices
    )


def ring_of(mesh, heads, **options):
    """Attention with ALiBi, so that how far keys go depends on the data."""
    slopes_H = jnp.full(heads, 0.01, jnp.float32)
    call = functools.partial(sharded_attention, slopes_H=slopes_H, softmax_scale=1.0)
    return functools.partial(call, mesh=mesh, layout=LAYOUT, **options)


def test_kernels_of_a_ring_count_as_half_of_the_square(monkeypatch):
    """However many halves of parts meet, and some only once in a round: two products
    forward, two when that is computed again, five backward."""
    for table in (attention._BACKENDS, attention._GRADIENTS):
        name = table["tpu"].split(":")[1]
        tiles = attention_tpu.TPU["TPU v5 lite"]
        kernel = functools.partial(
            getattr(attention_tpu, name), interpret=True, tiles=tiles
        )
        monkeypatch.setattr(attention_tpu, name, kernel)
    B, L, H, D = 2, 4096, 8, 128
    ring = ring_of(mesh_of(data=2, context=4), H, implementation="tpu")

    def loss(q, k, v):
        return ring(q, k, v).astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((B, L, H, D), jnp.bfloat16)
    traced = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2))).trace(x, x, x)
    assert work.matmul_flops(traced.jaxpr.jaxpr) == (2 + 2 + 5) * B * H * L * L * D


def test_a_ring_that_may_end_early_counts_all_the_way_round():
    mesh = mesh_of(data=1, context=8)
    B, L, H, D, n = 1, 32, 2, 4, 8
    ring = ring_of(mesh, H, implementation="xla", skip=2.0**-24)
    where = jax.NamedSharding(mesh, jax.P(None, "context"))
    x = jax.ShapeDtypeStruct((B, L, H, D), jnp.float32, sharding=where)
    text = jax.jit(ring).lower(x, x, x).compile().as_text()
    found = collectives.find(hlo.parse(text), dict(mesh.shape))
    sent = sum(c.bytes for c in found if c.kind == "collective-permute")
    part = B * (L // n) * H * D * 4
    # Keys and values n - 1 times; q, k and v are dealt, out is dealt back.
    assert sent == (2 * (n - 1) + 3 + 1) * part
    agreed = sum(c.bytes for c in found if c.kind != "collective-permute")
    assert agreed < MOST_BYTES_OF_AGREEING


def test_each_remat_policy_computes_again_what_it_says():
    flops = {name: _step_flops(name) for name in get_args(RematPolicy)}
    assert flops["none"] == flops["dots"] < flops["attention"] < flops["full"]
    assert flops["offload"] == flops["attention"]


def _step_flops(remat):
    values = presets.config(global_batch_size=2, steps=10)
    values.model.update({**golden.TINY, "remat": remat})
    config = parse(TrainConfig, values)
    mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
    with partitioning.use(mesh):
        program = make_program(config, mesh)
        traced = program.step.trace(program.struct, program.batch_struct(config))
    return work.matmul_flops(traced.jaxpr.jaxpr)
