"""MPT-7B as released.

1T tokens, 440 x A100-40GB for 9.5 days. The model is the checkpoint's, to the last
parameter (6,649,286,656). Published: Lion, 1,760 sequences of 2,048 tokens, 1T tokens,
FSDP only. Never published, so not claimed here: learning rate, betas, decay, warmup,
schedule (the values below are LLM Foundry's class defaults). ``data`` is the embedded
corpus until it is pointed at the real mixture.

    python -m mpt_jax.train --config configs/released/mpt_7b.py --dry_run
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config("mpt-7b")
    config.global_batch_size = 1760
    config.tokens = 1_000_000_000_000
    config.optim.name = "decoupled_lionw"
    config.optim.betas = (0.9, 0.99)
    config.optim.lr = 0.0001
    config.model.remat = "full"
    return config
