"""MPT (MosaicML Pretrained Transformer) in JAX. Importing this imports nothing else."""

__version__ = "0.1.0"
