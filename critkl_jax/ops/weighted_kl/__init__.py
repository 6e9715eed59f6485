"""Exact, certainty-weighted KL of each token, fused with the other statistics that a policy loss needs."""

from critkl_jax.ops.weighted_kl.api import linear_weighted_kl, linear_weighted_kl_loss, pick_implementation, weighted_kl
from critkl_jax.ops.weighted_kl.meshes import replicated
from critkl_jax.ops.weighted_kl.reference import ReferenceStatistics, linear_reference_statistics, reference_statistics
from critkl_jax.ops.weighted_kl.statistics import LOG_PROB_FLOOR, TokenStatistics

__all__ = ('LOG_PROB_FLOOR', 'ReferenceStatistics', 'TokenStatistics', 'linear_reference_statistics',
           'linear_weighted_kl', 'linear_weighted_kl_loss', 'pick_implementation', 'reference_statistics', 'replicated',
           'weighted_kl')
