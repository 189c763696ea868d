"""Everything around one training step: checkpoints, metrics, stability, supervision."""
