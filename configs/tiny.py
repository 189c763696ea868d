"""A real MPT on real text in about two minutes on two CPU cores."""

from ml_collections import ConfigDict

from mpt_jax import presets


def get_config() -> ConfigDict:
    config = presets.config()
    config.model = ConfigDict(
        dict(
            d_model=192,
            n_heads=6,
            n_layers=4,
            max_seq_len=256,
            vocab_size=2048,
            no_bias=True,
            compute_dtype="float32",
            attn_config=dict(alibi=True, attn_uses_sequence_id=True),
        )
    )
    config.steps = 300
    config.global_batch_size = 8
    config.optim.lr = 2e-3
    config.optim.schedule.warmup_steps = 30
    config.eval.every_steps = 100
    config.checkpoint.every_steps = 100
    config.sample.prompt = "def main("
    config.sample.max_tokens = 120
    return config
