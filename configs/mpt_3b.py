"""MPT-3B as LLM Foundry trains it: 2,651,837,440 parameters.

~54B tokens (51,500 x 512 x 2,048). Reproduces
llm-foundry@8c8dd48:scripts/train/yamls/pretrain/mpt-3b.yaml in model, optimizer,
schedule, batch and length: biases and learned positions, not the ALiBi of the released
checkpoints (those are in configs/released). The yaml trains on C4 with the GPT-NeoX-20B
tokenizer; ``data`` here is the embedded corpus, to try the shape with. Hardware: 16 x
A100 or more. No loss was published for this yaml, so none is promised.

    python -m mpt_jax.train --config configs/mpt_3b.py --workdir runs/mpt_3b
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config("mpt-3b")
    config.checkpoint.every_steps = 500
    return config
