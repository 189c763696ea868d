"""MPT-30B as released.

1T tokens at 2,048, then 50B at 8,192; 440 x A100-40GB and more. The model is the
checkpoint's, to the last parameter (29,957,200,896). Published: Lion; stage one is
1,760 sequences of 2,048 tokens. Never published: learning rate, betas, decay, schedule.
The final clip_qkv is unverified (presets.py). ``data`` is the embedded corpus until it
is pointed at the real mixture.

    python -m mpt_jax.train --config configs/released/mpt_30b.py --dry_run
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config("mpt-30b")
    config.global_batch_size = 1760
    config.tokens = 1_000_000_000_000
    config.optim.name = "decoupled_lionw"
    config.data.seq_len = 2048
    config.optim.betas = (0.9, 0.99)
    config.optim.lr = 0.0001
    config.model.remat = "full"
    return config
