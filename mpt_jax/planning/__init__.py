"""What a run needs of machines that are not here: memory, time and traffic.

Read in order: chips.py (the table), topology.py (a slice or a cluster, by name),
compiled.py (the compiler's figures) over hlo.py (what it compiled), analytic.py (the
same figures by formula), report.py (verdict and table), search.py.
"""
