"""Attention kernels: one public op, one file per backend.

Read ``attention.py`` (the op and its contract), then ``attention_xla.py`` (the plain
definition and the memory-efficient form that runs everywhere), ``blocks.py`` (padding
and sums), ``skip.py`` (which blocks need no visit), ``attention_tpu.py`` and
``attention_gpu.py`` (Pallas) with their ``tiles.py``, ``sharded.py`` (the op on a mesh,
``ring.py`` where it cuts the sequence), ``decode.py`` (a few queries against a cache)
and ``sharded_decode.py``.
"""
