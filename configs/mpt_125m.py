"""MPT-125M as LLM Foundry trains it: 125,311,488 parameters.

~2.5B tokens (4,800 x 256 x 2,048). Reproduces
llm-foundry@8c8dd48:scripts/train/yamls/pretrain/mpt-125m.yaml in model, optimizer,
schedule, batch and length: biases and learned positions, not the ALiBi of the released
checkpoints (those are in configs/released). The yaml trains on C4 with the GPT-NeoX-20B
tokenizer; ``data`` here is the embedded corpus, to try the shape with. Hardware: one
accelerator with 16 GB or more (with microbatches). No loss was published for this yaml,
so none is promised.

    python -m mpt_jax.train --config configs/mpt_125m.py --workdir runs/mpt_125m
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config("mpt-125m")
    config.checkpoint.every_steps = 500
    return config
