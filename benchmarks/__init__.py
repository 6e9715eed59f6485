"""Benchmarks, to be run from the repository's root, for example `python -m benchmarks.train_step`."""
