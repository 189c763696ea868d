"""Levenshtein distance: stands in for the compiled package of the same name.

seqio requires editdistance, which has no wheel for Python 3.13, so that installing it
needs a C++ compiler and Python's headers. seqio calls one function of it, to say "did you
mean" about a misspelt task name, and this is that function. `make` installs it.
"""

from collections.abc import Hashable, Sequence


def eval(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Counts the insertions, deletions and substitutions that turn a into b.

    >>> eval("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))  # distances from a's prefix to every prefix of b
    for i, item in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            substituted = diagonal + (item != other)
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]
