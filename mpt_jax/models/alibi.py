"""ALiBi slopes (Press et al. 2022, arXiv 2108.12409)."""

from __future__ import annotations

import math

import numpy as np


def slopes(n_heads: int, *, bias_max: float = 8) -> np.ndarray:
    """The slope of each head: the bias of key j for query i is ``-slope * |i - j|``.

    With n the next power of two, m_h = 2^(-(h + 1) * bias_max / n). Other head counts
    take the odd-indexed slopes first, then the even ones, cut to n_heads.

    >>> slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> np.log2(slopes(3)).tolist()
    [-4.0, -8.0, -2.0]

    Returns: (n_heads,) float32.
    Source: llm-foundry@8c8dd48:llmfoundry/models/layers/attention.py:gen_slopes.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    m = 2.0 ** (-np.arange(1, power + 1, dtype=np.float64) * bias_max / power)
    if power != n_heads:
        m = np.concatenate([m[1::2], m[::2]])[:n_heads]
    return m.astype(np.float32)
