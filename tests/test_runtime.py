"""What mpt_jax/runtime.py asks of XLA and of the C library."""

import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mpt_jax import runtime
from mpt_jax.config import MeshConfig
from mpt_jax.partitioning import make_mesh

FAULTS_OF_A_SECOND_ALLOCATION = """
import ctypes, resource, sys
from mpt_jax import runtime
if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(256 << 20))
    ctypes.memset(ctypes.c_void_p(block), 1, 256 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps its own ways"
)
def test_freed_memory_is_kept():
    def faults(what):
        command = [sys.executable, "-c", FAULTS_OF_A_SECOND_ALLOCATION, what]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    # 256 MiB are 65,536 pages, or 128 huge ones.
    assert faults("keep") < 100 < faults("give back")


def test_xla_knows_every_option_of_this_platform():
    options = runtime.compiler_options(make_mesh(MeshConfig()))
    assert options == runtime.COMPILER_OPTIONS["cpu"]
    jax.jit(lambda x: x + 1, compiler_options=options).lower(jnp.ones(2)).compile()
