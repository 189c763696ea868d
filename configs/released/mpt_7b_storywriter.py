"""MPT-7B-StoryWriter-65k+ as released.

2,500 steps of 65,536-token excerpts, 8 x A100-80GB for about 2 days. The model is the
checkpoint's, to the last parameter (6,649,286,656). Published: Lion, 2,500 steps,
microbatches of one. Never published: batch size, learning rate, betas, decay, schedule.
Starts from MPT-7B's parameters (checkpoint.init_from). ``data`` is the embedded corpus
until it is pointed at the real mixture.

    python -m mpt_jax.train --config configs/released/mpt_7b_storywriter.py --dry_run
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config("mpt-7b-storywriter")
    config.steps = 2500
    config.global_batch_size = 8
    config.optim.name = "decoupled_lionw"
    config.optim.betas = (0.9, 0.99)
    config.optim.lr = 0.0001
    config.model.remat = "full"
    return config
