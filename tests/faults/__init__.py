"""Faults of every kind at every step of a merge, and what is left afterwards.

`python -m tests.faults` does all of it, some minutes long, and writes `docs/faults.md`; `tests/test_faults.py` does a
part. Every case runs in a fork of a process in which the kernels are loaded. After each:

- where the index (or the single model file) is in place, everything that it names is complete and right;
- the same merge, repeated, gives the same files, byte for byte, as one that nothing disturbed;
- inputs and files of the user's are untouched.
"""
