"""Runs that are killed and checkpoints that are damaged, many times: `python -m tests.soak --help`.

The figures of docs/reliability.md come from here.
"""
