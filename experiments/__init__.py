"""Experiment binaries, run from the repository's root: for example, `python -m experiments.finetune`."""

import sys

if sys.argv[0] == '-m':  # a binary, whose imports take seconds; a library must not change signal handlers
  from critkl_jax.runtime import interruption

  interruption.watch_process()
