"""Rewards in Python: built-in functions, and how functions of anybody are called, timed and checked."""

from critkl_jax.tasks.rewards.functions import answer_format, exact_match, f1, numeric_match, rouge_l
from critkl_jax.tasks.rewards.pool import RewardPool
from critkl_jax.tasks.rewards.worker import RewardError

__all__ = ('RewardError', 'RewardPool', 'answer_format', 'exact_match', 'f1', 'numeric_match', 'rouge_l')
