"""What mpt_jax/runtime.py asks of XLA."""

import jax
import jax.numpy as jnp

from mpt_jax import runtime
from mpt_jax.config import MeshConfig
from mpt_jax.partitioning import make_mesh


def test_xla_knows_every_option_of_this_platform():
    options = runtime.compiler_options(make_mesh(MeshConfig()))
    assert options == runtime.COMPILER_OPTIONS["cpu"]
    jax.jit(lambda x: x + 1, compiler_options=options).lower(jnp.ones(2)).compile()
