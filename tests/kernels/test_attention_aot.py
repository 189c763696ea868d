"""The attention kernels for machines that are not here.

By default only to the compiler's input, which needs nothing but JAX. ``pytest -m aot``
compiles to machine code with the real compilers of the aot extra.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mpt_jax.kernels.attention import Operands, Rule
from mpt_jax.kernels.attention_tpu import attention_tpu

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5p"])
@pytest.mark.parametrize(
    ("length", "head_dim", "rule"),
    [
        (65_536, 128, {}),
        (600, 112, {"window": 300, "logit_softcap": 30.0}),
    ],
    ids=["65536_tokens", "everything"],
)
def test_tpu_kernels_lower_without_a_tpu(kind, length, head_dim, rule):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("device",), abstract_device=device)
    tensor = jax.ShapeDtypeStruct((1, length, 2, head_dim), jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def both(q, k, v, slopes, ids, prefix):
        masks = (ids, ids, prefix) if rule else ()
        x = Operands(slopes, *masks)
        results, pull = jax.vjp(
            lambda *a: attention_tpu(*a, Rule(head_dim**-0.5, **rule), x), q, k, v
        )
        return results, pull(results)

    prefix = jax.ShapeDtypeStruct((1, length), jnp.bool_)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(both).trace(tensor, tensor, tensor, slopes, row, prefix)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2


COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mpt_jax.kernels import attention as op
from mpt_jax.kernels.sharded import Layout, sharded_attention

topology, case = sys.argv[1:]
L, H, K, D, devices, options, masks = {
    "65536": (65_536, 2, 2, 128, 1, {}, False),
    "head_112": (2048, 2, 2, 112, 1, {}, True),
    "head_64_gqa": (2048, 8, 2, 64, 1, {}, False),
    "float32": (1000, 2, 2, 128, 1, {}, False),
    "everything": (2048, 2, 1, 128, 1, {"window": 600, "logit_softcap": 30.0}, True),
    "bidirectional": (2048, 2, 2, 128, 1, {"causal": False}, False),
    "one_token": (1, 2, 2, 128, 1, {}, False),
    "sharded": (2048, 4, 4, 128, 4, {}, True),
}[case]
dtype = jnp.float32 if case == "float32" else jnp.bfloat16
found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
shape = (2, 2) if devices == 4 else (1, 1)
mesh = Mesh(np.asarray(found[:devices]).reshape(shape), ("data", "tensor"))
layout = Layout(("data",), (), ("tensor",), ("tensor",) if K > 1 else ())

def array(dtype, *dims, spec=P("data")):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

heads = P("data", None, "tensor")
q = array(dtype, 2, L, H, D, spec=heads)
k = array(dtype, 2, L, K, D, spec=heads if K > 1 else P("data"))
ids, prefix = array(jnp.int32, 2, L), array(jnp.bool_, 2, L)
slopes = array(jnp.float32, H, spec=P("tensor"))

def both(q, k, v, slopes, ids, prefix):
    given = dict(options)
    if masks:
        given |= {"q_segment_ids_BL": ids, "kv_segment_ids_BS": ids}
        given |= {"prefix_mask_BS": prefix}
    results, pull = jax.vjp(
        lambda *a: sharded_attention(
            *a, slopes, mesh=mesh, layout=layout, softmax_scale=D**-0.5,
            return_lse=True, implementation="tpu", **given,
        ), q, k, v,
    )
    return results, pull(results)

with jax.set_mesh(mesh):
    jax.jit(both).lower(q, k, k, slopes, ids, prefix).compile()
print("compiled")
"""


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "case"),
    [
        *(
            (chip, "65536")
            for chip in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
        ),
        ("tpu7x:2x2x1", "everything"),
        ("v5e:2x2", "head_112"),
        ("v5e:2x2", "head_64_gqa"),
        ("v5e:2x2", "float32"),
        ("v4:2x2x1", "everything"),
        ("v5e:2x2", "bidirectional"),
        ("v5e:2x2", "one_token"),
        ("v5e:2x2", "sharded"),
    ],
)
def test_tpu_kernels_compile_without_a_tpu(topology, case):
    """A tile that does not fit VMEM, or that Mosaic cannot express, fails here."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # pytest -n; there is no TPU to fight over
    }
    command = [sys.executable, "-c", COMPILE, topology, case]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "compiled"
