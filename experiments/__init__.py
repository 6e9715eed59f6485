"""Experiment binaries; run them from the repository's root, for example `python -m experiments.finetune`."""

import sys

if sys.argv[0] == '-m':  # a binary is about to be imported, which takes seconds; as a library nothing is watched
  from critkl_jax import interruption

  interruption.watch_process()
