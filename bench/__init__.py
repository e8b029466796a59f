"""Benchmarks of paramdelta against its peers and against the disk: `python -m bench.run`."""
