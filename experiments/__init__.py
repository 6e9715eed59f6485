"""Experiment binaries; run them from the repository's root, for example `python -m experiments.finetune`."""
