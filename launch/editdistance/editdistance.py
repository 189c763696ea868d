"""Levenshtein distance: stands in for the compiled package of the same name.

seqio requires editdistance, which has no wheel for Python 3.13: installing it there
takes a C++ compiler and Python's headers. seqio calls one function of it, to suggest a
name for a misspelt task. This is that function, and `make` installs it instead.
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
