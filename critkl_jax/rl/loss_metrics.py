"""Metrics of the loss, computed from its per-token terms. Letters: B episodes, T response tokens."""

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl import replicated
from critkl_jax.records import Batch
from critkl_jax.rl.aggregation import aggregate, masked_mean
from critkl_jax.rl.loss_config import LossConfig

_OF_THE_LOSS = ('loss', 'policy_loss', 'kl_penalty')


def metrics_of(terms: dict[str, chex.Array], batch: Batch, config: LossConfig, denominator: chex.Numeric | None
               ) -> dict[str, chex.Array]:
  """Computes the metrics of a batch from per-token terms.

  Terms of the loss are aggregated like the loss, all others are means over tokens. Quantiles of the weight are added.

  Args:
    terms: name -> float32 `[B, T]`, such as `loss`, `kl_penalty` and `kl`; `weight` must be among them.
    batch: its `mask` is used, and `critical` if it is given.
    config: its `aggregation` and `aggregation_length` are used.
    denominator: as in `ppo_loss`.

  Returns:
    name -> float32 `[]`, as `ppo_loss` describes them.
  """
  metrics = {name: aggregated(x, batch, config, denominator) if name in _OF_THE_LOSS else masked_mean(x, batch.mask)
             for name, x in terms.items()}
  metrics |= weight_quantiles(terms['weight'], batch.mask)
  if batch.critical is not None:
    metrics |= {f'{name}_at_critical': masked_mean(jnp.where(batch.critical, terms[name], 0.0), batch.mask)
                for name in ('kl', 'weight') if name in terms}
    metrics['critical'] = masked_mean(batch.critical.astype(jnp.float32), batch.mask)
  return metrics


def aggregated(x: chex.Array, batch: Batch, config: LossConfig, denominator: chex.Numeric | None) -> chex.Array:
  """Computes the mean `[]` of `x` `[B, T]` over a batch, as the config's `aggregation` defines it."""
  return aggregate(x, batch.mask, config.aggregation, config.aggregation_length, denominator)


def weight_quantiles(weight: chex.Array, mask: chex.Array) -> dict[str, chex.Array]:
  """Computes quantiles of the penalty's weight. They are almost equal if the exponent weights all tokens alike.

  Args:
    weight: float `[...]` weight of each token's penalty.
    mask: bool `[...]` true at the tokens that count.

  Returns:
    `weight_q01`, `weight_q50` and `weight_q99`: 1 %, 50 % and 99 % of the tokens have at most this weight, float32
    `[]` without gradient; 0 if there are no tokens.
  """
  mask = replicated(mask.astype(bool)).reshape(-1)
  ordered = jnp.sort(jnp.where(mask, replicated(jax.lax.stop_gradient(weight)).reshape(-1), jnp.inf))
  count = jnp.sum(mask, dtype=jnp.float32)

  def quantile(share):
    place = jnp.clip(jnp.ceil(share * count) - 1, 0, mask.size - 1).astype(jnp.int32)
    return jnp.where(count > 0, ordered[place], 0.0)

  return {f'weight_q{percent:02}': quantile(percent / 100) for percent in (1, 50, 99)}
