"""The training step compiles for TPUs that are not here: ``pytest -m aot``.

The compiler is the real one (libtpu, from the aot extra), so a config that does not fit
or a sharding that it cannot place fails here and not on a rented pod.
"""

import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.aot

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30

COMPILE = r"""
import re, sys
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
stack = rf"\w+\[{layers},{int(batch) // int(fsdp)},{seq_len},[\d,]*\]\{{[^}}]*\}}"
in_hbm = [a for a in re.findall(stack, compiled.as_text()) if "S(5)" not in a]
print(
    analysis.argument_size_in_bytes,
    analysis.peak_memory_in_bytes,
    analysis.host_temp_size_in_bytes,
    len(in_hbm),
)
"""


class Memory(NamedTuple):
    """Bytes of one chip: state and batch; at the worst moment; in its host. stacks:
    mentions of activations of all layers in one array that lies on the chip."""

    state: int
    peak: int
    host: int
    stacks: int


def compile_step(*args, context=1) -> Memory:
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
    return Memory(*map(int, done.stdout.split()[-4:]))


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
    memory = compile_step(name, topology, 2, fsdp, tensor, 16, 2048, "full")
    assert 0 < memory.state < memory.peak < hbm_gib * GIB
    assert memory.host == 0


def test_a_row_of_65536_tokens_compiles_on_eight_chips():
    """Two layers of StoryWriter, each chip an eighth of the row and of the state."""
    args = "mpt-7b-storywriter", "v5p:2x2x2", 2, 1, 1, 1, 65_536, "full"
    memory = compile_step(*args, context=8)
    assert memory.state < GIB  # 0.6 billion parameters, 12 bytes each, in eight parts
    assert memory.peak < 8 * GIB


def test_residuals_lie_in_the_host_and_not_on_the_chip():
    """What each of eight layers keeps is there: its input, attention and lse."""
    layers, rows, length = 8, 4, 2048
    args = "mpt-7b", "v5e:2x2", layers, 4, 1, 4 * rows, length
    full, offload = (compile_step(*args, remat) for remat in ("full", "offload"))
    stream, lse = rows * length * 4096 * 2, rows * length * 32 * 4
    assert full.host == 0
    assert full.stacks > 0
    assert offload.stacks == 0
    assert offload.host == pytest.approx(layers * (2 * stream + lse), rel=0.01)
    # On the chip at most what is on its way: of two layers out, of two back.
    assert offload.peak - full.peak < 4 * (2 * stream + lse)


@pytest.mark.slow
def test_all_of_mpt_7b_fits_a_v5e_256():
    memory = compile_step("mpt-7b", "v5e:16x16", 32, 256, 1, 256, 2048, "full")
    assert memory.peak < 15.75 * GIB
