"""Runs the jitted steps: the host loop, checkpoints, metrics, files, several hosts and signals."""
