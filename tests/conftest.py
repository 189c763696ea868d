"""Gives every test process the same machine: eight CPU devices and strict JAX.

JAX_PLATFORMS chooses another one: `JAX_PLATFORMS=cuda,cpu pytest -m gpu`.
"""

import os

# Inherited by the programs that tests start. TensorFlow reads the TF_ ones at import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # silences its notice, too

import jax

# For this process only: a program that a test starts sees the plain machine. Importing
# jax starts no backend, so that these still count.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of what tests cost, and what they check holds at any optimisation.
# The programs that tests start (tests/faults) are optimised as a user's are.
jax.config.update("jax_disable_most_optimizations", True)
