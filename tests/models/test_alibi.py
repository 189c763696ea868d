"""Slopes against the ALiBi paper's formula, and its rule for other head counts."""

import numpy as np
import pytest

from mpt_jax.models.alibi import slopes


@pytest.mark.parametrize("n", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("bias_max", [8, 16])
def test_powers_of_two_are_a_geometric_sequence(n, bias_max):
    ratio = 2 ** (-bias_max / n)
    expected = ratio ** np.arange(1, n + 1)
    np.testing.assert_allclose(slopes(n, bias_max=bias_max), expected, rtol=1e-6)


@pytest.mark.parametrize("n", [3, 6, 12, 20, 40, 56])
def test_other_counts_take_odd_then_even_slopes_of_the_next_power(n):
    """get_slopes of arXiv 2108.12409 takes the closest lower power and every other
    slope of twice that; MosaicML's order is odd first. The same set, another order."""
    lower = 2 ** int(np.log2(n))
    paper = np.concatenate([slopes(lower), slopes(2 * lower)[::2][: n - lower]])
    np.testing.assert_allclose(np.sort(slopes(n)), np.sort(paper), rtol=1e-6)


def test_twelve_heads():
    exponents = [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5]
    np.testing.assert_allclose(np.log2(slopes(12)), exponents, rtol=1e-6)
