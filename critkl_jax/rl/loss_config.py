"""The config of the loss."""

import dataclasses
from typing import ClassVar

from critkl_jax.config import at_least, between, convert_fields, one_of, positive, refuse_switched_off
from critkl_jax.rl.aggregation import AGGREGATIONS
from critkl_jax.rl.certainties import CERTAINTIES
from critkl_jax.rl.kl import ESTIMATORS, PENALTIES
from critkl_jax.rl.policy_gradients import ALGORITHMS, RATIOS

WITH_PENALTY = tuple(name for name in PENALTIES if name != 'none')
TEMPERATURES = 1e-6, 1e6  # smallest and largest; below the first, logits / temperature may overflow float32


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Settings of the loss: policy gradient, critic, entropy bonus and weighted KL penalty.

  `LossConfig(...)` raises `ValueError` if a value is wrong, or if a field is set that another field switches off.

  Attributes:
    algorithm: The policy gradient: `ppo`, with clipped importance ratios, or `a2c`, without ratios.
    clip_ratio: PPO's epsilon: importance ratios are clipped to 1 - epsilon .. 1 + epsilon.
    clip_ratio_high: A separate epsilon for the upper bound 1 + epsilon, as in DAPO; 0 takes `clip_ratio`.
    dual_clip: The largest importance ratio that counts where the advantage is negative, greater than 1; 0: no bound.
    ratio: Whether each `token` has its own importance ratio, or all tokens of a `sequence` share one, as in GSPO.
    aggregation: The mean of the loss over a batch: `tokens` is the mean over all tokens, `sequences` the mean of the
      sequences' means, `fixed_length` the sum over tokens divided by the number of sequences times a length, as in Dr.
      GRPO.
    aggregation_length: The fixed length in tokens; 0 takes the length to which responses are padded.
    value_clip: Largest distance of the clipped value from the rollout's value in the critic's loss; 0 does not clip.
    value_coefficient: Weight of the critic's loss.
    entropy_coefficient: Weight of the entropy bonus.
    temperature: The temperature by which logits of policy and reference are divided.
    kl: The KL penalty: `prioritized` (weighted by certainty), `standard` (weight 1) or `none`.
    kl_estimator: The estimator of the KL: `exact`, `k1`, `k2` or `k3`. In the loss, k1 has zero expected gradient.
    kl_coefficient: The KL coefficient alpha, which multiplies the penalty.
    certainty: The measure of the reference's certainty J: `negentropy` (paper), `min_entropy` (released code) or
      `max_prob`.
    certainty_exponent: The certainty exponent beta: a token's penalty is multiplied by J^beta; 0 gives the standard
      penalty.
    certainty_intercept: The intercept c of the weight (1 - c) J^beta + c, at most 1; 0 in the paper.
    certainty_temperature: Temperature at which the reference's certainty is measured.
  """

  algorithm: str = 'ppo'
  clip_ratio: float = 0.2
  clip_ratio_high: float = 0.0
  dual_clip: float = 0.0
  ratio: str = 'token'
  aggregation: str = 'tokens'
  aggregation_length: int = 0
  value_clip: float = 0.0
  value_coefficient: float = 0.1
  entropy_coefficient: float = 0.0
  temperature: float = 1.0
  kl: str = 'prioritized'
  kl_estimator: str = 'k2'
  kl_coefficient: float = 0.5
  certainty: str = 'negentropy'
  certainty_exponent: float = 150.0
  certainty_intercept: float = 0.0
  certainty_temperature: float = 1.0

  # Gates and detectors read the certainty even if the weight is 1, so its settings count with `standard` too.
  COUNTS_WITH: ClassVar = {
      **{name: {'algorithm': ('ppo',)} for name in ('clip_ratio', 'clip_ratio_high', 'dual_clip', 'ratio')},
      'aggregation_length': {'aggregation': ('fixed_length',)},
      'kl_estimator': {'kl': WITH_PENALTY},
      'kl_coefficient': {'kl': WITH_PENALTY},
      'certainty': {'kl': WITH_PENALTY},
      'certainty_temperature': {'kl': WITH_PENALTY},
      'certainty_exponent': {'kl': ('prioritized',)},
      'certainty_intercept': {'kl': ('prioritized',)},
  }

  def __post_init__(self):
    convert_fields(self)
    one_of(self, 'algorithm', *ALGORITHMS)
    one_of(self, 'kl', *PENALTIES)
    one_of(self, 'kl_estimator', *ESTIMATORS)
    one_of(self, 'certainty', *CERTAINTIES)
    one_of(self, 'ratio', *RATIOS)
    one_of(self, 'aggregation', *AGGREGATIONS)
    positive(self, 'clip_ratio')
    between(self, *TEMPERATURES, 'temperature', 'certainty_temperature')
    at_least(self, 0, 'value_clip', 'value_coefficient', 'entropy_coefficient', 'kl_coefficient',
             'certainty_exponent', 'clip_ratio_high', 'aggregation_length')
    if self.dual_clip and not self.dual_clip > 1:
      raise ValueError(f'dual_clip: expected a number greater than 1, or 0 for none, got {self.dual_clip}.')
    if not self.certainty_intercept <= 1:
      raise ValueError(f'certainty_intercept: expected at most 1, got {self.certainty_intercept}.')
    refuse_switched_off(self)
