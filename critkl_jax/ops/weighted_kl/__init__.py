"""Exact, certainty-weighted KL of each token, fused with what else a policy loss needs of the logits."""

from critkl_jax.ops.weighted_kl.api import (
    linear_weighted_kl,
    linear_weighted_kl_loss,
    pick_implementation,
    weighted_kl,
)
from critkl_jax.ops.weighted_kl.statistics import LOG_PROB_FLOOR, WeightedKL

__all__ = ('LOG_PROB_FLOOR', 'WeightedKL', 'linear_weighted_kl', 'linear_weighted_kl_loss', 'pick_implementation',
           'weighted_kl')
