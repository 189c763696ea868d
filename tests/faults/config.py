"""Runs small enough to be broken many times; ``config.py:steady`` is one of them.

tiny     24 steps of 5 ms, 0.4 MB a checkpoint: starts in 3 s of CPU time
steady   36 steps of 50 ms: long enough to be hit between two of them
heavy    16 steps, 100 MB a checkpoint: a save lasts 1 s
text     24 such steps, on real text through SeqIO
stored   24 such steps, on prepared data; harness.Lab says where it is
"""

from ml_collections import ConfigDict

from mpt_jax import presets

# d_model, vocab_size, seq_len, global_batch_size, steps, checkpoint.every_steps
SIZES = {
    "tiny": (32, 64, 16, 8, 24, 6),
    "steady": (64, 256, 256, 16, 36, 12),
    "heavy": (256, 32768, 8, 4, 16, 4),
    "text": (64, 2048, 128, 16, 24, 12),
    "stored": (64, 257, 128, 16, 24, 12),
}


def get_config(name: str) -> ConfigDict:
    width, vocab_size, seq_len, batch_size, steps, every_steps = SIZES[name]
    config = presets.config()
    config.model = ConfigDict(
        dict(
            d_model=width,
            n_heads=2,
            n_layers=2,
            max_seq_len=seq_len,
            vocab_size=vocab_size,
            no_bias=True,
            compute_dtype="float32",
            attn_config=dict(alibi=True, attn_uses_sequence_id=True),
        )
    )
    config.steps = steps
    config.global_batch_size = batch_size
    config.data.source = {"text": "seqio", "stored": "prepared"}.get(name, "synthetic")
    if name == "stored":
        config.data.tasks = ("low", "high")
        config.data.tokenizer = "bytes"
    config.optim.schedule.warmup_steps = 4
    config.checkpoint.every_steps = every_steps
    config.eval.batches = 1
    config.log.every_steps = 1
    config.log.tensorboard = False
    config.log.plot = False
    return config
