"""Benchmarks that anyone can rerun: ``python -m mpt_jax.bench.train``."""
