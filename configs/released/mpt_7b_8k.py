"""MPT-7B-8k as released.

500B tokens at 8,192. The model is the checkpoint's, to the last parameter
(6,649,286,656). Published: Lion, 500B tokens at 8,192 on from MPT-7B's recipe. Never
published: batch size, learning rate, betas, decay, schedule. ``data`` is the embedded
corpus until it is pointed at the real mixture.

    python -m mpt_jax.train --config configs/released/mpt_7b_8k.py --dry_run
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config("mpt-7b-8k")
    config.global_batch_size = 512
    config.tokens = 500_000_000_000
    config.optim.name = "decoupled_lionw"
    config.optim.betas = (0.9, 0.99)
    config.optim.lr = 0.0001
    config.model.remat = "full"
    return config
