"""Checks of a batch's values that work inside `jax.jit`, where Python cannot read them."""

import jax.numpy as jnp
from jax.experimental import checkify

from critkl_jax.records import Batch


def check_batch(batch: Batch, vocab_size: int | None = None) -> None:
  """Checks the values of a batch with `jax.experimental.checkify`.

  In a function transformed by `checkify.checkify`, the first failed check is in the error that the function returns.
  Outside of `jax.jit`, it is raised at once. Tokens where the mask is false are not checked.

  Args:
    batch: arrays to check.
    vocab_size: V; None leaves out the check that actions are in 0..V-1.

  Raises:
    checkify.JaxRuntimeError: outside of `jax.jit`, if an unmasked token has an action outside 0..V-1, a log-probability
      above 0 (by more than 1e-3, for rounding), a negative weight or importance weight, or a log-probability,
      advantage, value, return, weight or importance weight that is not finite.
    ValueError: inside `jax.jit` without `checkify.checkify`.
  """
  mask = batch.mask.astype(bool)
  if vocab_size is not None:
    outside = mask & ((batch.actions < 0) | (batch.actions >= vocab_size))
    checkify.check(~jnp.any(outside), 'batch.actions: {count} unmasked tokens have ids outside 0..{most}; other '
                   'trainers mark padding with -100: set the mask to false there.', count=jnp.sum(outside),
                   most=jnp.int32(vocab_size - 1))
  if batch.log_probs is not None:
    positive = mask & ~(batch.log_probs <= 1e-3)
    checkify.check(~jnp.any(positive), 'batch.log_probs: {count} unmasked tokens have a log-probability above 0, or '
                   'NaN.', count=jnp.sum(positive))
  for name in ('log_probs', 'advantages', 'values', 'returns', 'weight', 'importance_weights'):
    x = getattr(batch, name)
    if x is None:
      continue
    counts = mask if x.ndim == mask.ndim else jnp.any(mask, -1)
    bad = counts & ~jnp.isfinite(x)
    checkify.check(~jnp.any(bad), f'batch.{name}: {{count}} unmasked entries are not finite.', count=jnp.sum(bad))
    if name in ('weight', 'importance_weights'):
      checkify.check(~jnp.any(counts & (x < 0)), f'batch.{name}: {{count}} unmasked entries are negative.',
                     count=jnp.sum(counts & (x < 0)))
