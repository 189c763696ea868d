"""The training step compiles for TPUs that are not here: ``pytest -m aot``.

The compiler is the real one (libtpu, from the aot extra), so a config that does not fit
or a sharding that it cannot place fails here and not on a rented pod.
"""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30

COMPILE = """
import dataclasses, sys
import jax
from jax.experimental import topologies
from mpt_jax import partitioning, presets
from mpt_jax.config import TrainConfig, parse
from mpt_jax.training.step import make_program

name, topology, layers, fsdp, tensor, batch, seq_len, remat, context = sys.argv[1:]
values = presets.config(name, global_batch_size=int(batch), steps=10)
config = parse(TrainConfig, values, {
    "tokens": "none", "model.n_layers": layers, "data.seq_len": seq_len,
    "model.remat": remat, "mesh.fsdp": fsdp, "mesh.tensor": tensor,
    "mesh.context": context,
    "optim.schedule.warmup_steps": "2",
})
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = partitioning.make_mesh(config.mesh, devices)
with partitioning.use(mesh):
    program = make_program(config, mesh)
    lowered = program.step.lower(program.struct, program.batch_struct(config))
    compiled = lowered.compile()
analysis = compiled.memory_analysis()
print(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes)
"""


def compile_step(*args, context=1) -> tuple[int, int]:
    """(bytes of state and batch, of temporaries) of one chip."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers do not share a chip
    }
    command = [sys.executable, "-c", COMPILE, *map(str, args), str(context)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    state, temporary = done.stdout.split()[-2:]
    return int(state), int(temporary)


@pytest.mark.parametrize(
    ("name", "topology", "fsdp", "tensor", "hbm_gib"),
    [
        ("mpt-7b", "v5e:4x4", 16, 1, 16),
        ("mpt-7b", "v5e:4x4", 4, 4, 16),
        ("mpt-30b", "v5p:2x2x4", 16, 1, 95),
    ],
)
def test_two_layers_of_a_big_model_compile(name, topology, fsdp, tensor, hbm_gib):
    """Two layers at full width: every sharding and kernel of the real thing."""
    state, temporary = compile_step(name, topology, 2, fsdp, tensor, 16, 2048, "full")
    assert 0 < state + temporary < hbm_gib * GIB


def test_a_row_of_65536_tokens_compiles_on_eight_chips():
    """Two layers of StoryWriter, each chip an eighth of the row and of the state."""
    args = "mpt-7b-storywriter", "v5p:2x2x2", 2, 1, 1, 1, 65_536, "full"
    state, temporary = compile_step(*args, context=8)
    assert state < GIB  # 0.6 billion parameters, 12 bytes each, in eight parts
    assert state + temporary < 8 * GIB


def test_residuals_in_host_memory_compile():
    args = "mpt-7b", "v5e:2x2", 2, 4, 1, 4, 2048
    on_chip, on_host = (compile_step(*args, remat)[1] for remat in ("full", "offload"))
    assert on_host < 1.5 * on_chip


@pytest.mark.slow
def test_all_of_mpt_7b_fits_a_v5e_256():
    state, temporary = compile_step(
        "mpt-7b", "v5e:16x16", 32, 256, 1, 256, 2048, "full"
    )
    assert state + temporary < 16 * GIB
