"""What measures Octavo beyond `octavo bench`. `python -m benchmarks --help` lists it.

What it measured, dated, is in docs/benchmarks/.
"""
