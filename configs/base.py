"""Every knob at its default: the file to copy for a config of your own.

    python -m mpt_jax.train --config configs/base.py --config.steps=100 --print_config

prints them all with their values; ``--help`` says what each means. Reproduces nothing.
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    return presets.config()
