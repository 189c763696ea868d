"""MPT-1B-RedPajama-200B as released.

200B tokens at 2,048, batch 2,200. The model is the checkpoint's, to the last parameter
(1,311,442,944). Published: 200B RedPajama tokens, batches of 2,200 sequences, qk
LayerNorm. Never published: optimizer and schedule. ``data`` is the embedded corpus
until it is pointed at the real mixture.

    python -m mpt_jax.train --config configs/released/mpt_1b_redpajama.py --dry_run
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config("mpt-1b-redpajama-200b")
    config.global_batch_size = 2200
    config.tokens = 200_000_000_000
    config.model.remat = "full"
    return config
