"""Attention kernels: one public op, one file per backend.

Read ``attention.py`` (the op and its contract), then ``attention_xla.py`` (the plain
definition and the memory-efficient form that runs everywhere).
"""
