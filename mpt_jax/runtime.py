"""How XLA compiles the training step, per platform, as data with reasons."""

from __future__ import annotations

from jax.sharding import Mesh

# XLA options of the training step by platform of its mesh; others take the defaults.
COMPILER_OPTIONS: dict[str, dict[str, bool]] = {
    # Sees that a donated buffer's last reader comes before its writer, so parameters
    # and moments are updated in place: 0.45 instead of 0.75 s, 0.3 GiB less, for 125M.
    "cpu": {"xla_cpu_copy_insertion_use_region_analysis": True},
}


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """The options for programs on ``mesh``, whose devices need not be attached."""
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})
