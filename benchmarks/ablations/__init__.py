"""The parts of `benchmarks/claims.py`: what is compared, how a run gets its share of time, rows and tables.

They may import `openvision`; nothing there imports them.
"""
