"""Fused operations with kernels, one folder for each."""
