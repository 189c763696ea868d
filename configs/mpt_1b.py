"""MPT-1B as LLM Foundry trains it: 1,315,950,592 parameters.

~26B tokens (24,800 x 512 x 2,048). Reproduces
llm-foundry@8c8dd48:scripts/train/yamls/pretrain/mpt-1b.yaml in model, optimizer,
schedule, batch and length: biases and learned positions, not the ALiBi of the released
checkpoints (those are in configs/released). The yaml trains on C4 with the GPT-NeoX-20B
tokenizer; ``data`` here is the embedded corpus, to try the shape with. Hardware: 8 x
A100 or more. No loss was published for this yaml, so none is promised.

    python -m mpt_jax.train --config configs/mpt_1b.py --workdir runs/mpt_1b
"""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config("mpt-1b")
    config.checkpoint.every_steps = 500
    return config
