"""Finds and names numbers that are not finite, and skips the updates that contain them.

An update is skipped if its terms, gradient or new parameters are not finite. All hosts and devices decide alike,
because the decision is a function of sums over all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

# Terms of an update in the order of their computation, with their names in messages. The arrays of the gradient and of
# the new parameters follow them.
TERMS = {
    'learning_rate': 'the learning rate', 'log_probs': 'log-probabilities of the rollout', 'values': 'values of the '
    'rollout', 'reference': "the reference's output", 'rewards': 'rewards', 'advantages': 'advantages', 'returns':
    'returns', 'penalty_weight': 'weight of the penalty', 'policy_loss': 'policy loss', 'entropy': 'entropy',
    'kl': 'KL', 'kl_penalty': 'KL penalty', 'value_loss': 'value loss', 'loss': 'loss'}


IN_PLACE = 2**26  # parameters from which on updates happen in place


class NonFinite(RuntimeError):
  """Raised when a run cannot make any update, because a term is not finite."""


def guarded(before: tuple[Any, Any], update: Callable[[Any, Any], tuple[Any, Any]], terms: dict[str, Any], grads: Any
            ) -> tuple[Any, chex.Array]:
  """Makes an update if it is finite.

  With `IN_PLACE` parameters or more it is computed three times: for the check alone, in place for the parameters, and
  in place for the optimizer's state, which reads one number of each new parameter so that compilers keep this order.
  Computed once, the old and the new state are both held until the last new parameter is checked; for a small model that
  is cheaper than the time to compile three updates.

  Args:
    before: `(params, opt_state)` before the update.
    update: (before, grads) -> `(params, opt_state)` after the update. The new `opt_state` must not depend on the
      parameters: the last of the three calls gets the new ones.
    terms: arrays of any shape, by their names in `TERMS`.
    grads: the gradient, with the structure of the parameters.

  Returns:
    The state after the update if the terms, the squared norms of the gradient and the new parameters are finite, else
    `before`; and the number of the first term that is not finite, float32 `[]`, 0 if all are. `term_of` names the term.
  """
  after = update(before, grads)
  checks = [_all_finite(terms[name]) if name in terms else jnp.bool(True) for name in TERMS]
  checks += [jnp.isfinite(optax.tree.norm([x], squared=True)) for x in jax.tree.leaves(grads)]
  checks += [_all_finite(x) for x in jax.tree.leaves(after[0])]
  number = _first_false(jnp.stack(checks))

  def selected(new, old, finite):
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

  if sum(x.size for x in jax.tree.leaves(before[0])) < IN_PLACE:
    return selected(after, before, number == 0), number
  before, grads, number = jax.lax.optimization_barrier((before, grads, number))
  params = selected(update(before, grads)[0], before[0], number == 0)
  (_, opt_state), grads, params = jax.lax.optimization_barrier((before, grads, params))
  written = [jnp.isfinite(x[(0,) * x.ndim]) for x in jax.tree.leaves(params) if x.size]  # all true if number is 0
  opt_state = selected(update((params, opt_state), grads)[1], opt_state, (number == 0) & jnp.all(jnp.stack(written)))
  return (params, opt_state), number


def counted(numbers: chex.Array) -> dict[str, chex.Array]:
  """Returns the metrics of skipped updates in a step.

  Args:
    numbers: float32 `[num_updates]` second result of `guarded` for each update.

  Returns:
    `skipped_updates`, the number of updates that were skipped; and `not_finite`, the number of the first term that was
    not finite in the first of these updates, 0 if none was skipped.
  """
  skipped = numbers > 0
  return {'skipped_updates': jnp.sum(skipped, dtype=jnp.float32), 'not_finite': numbers[jnp.argmax(skipped)]}


def blamed(name: str, x: Any, number: chex.Array) -> chex.Array:
  """Blames an earlier term, which `guarded` did not see, for a skipped update.

  Returns the number of the term `name` if an update was skipped, `x` is not finite and the term comes earlier; else
  `number`.

  Args:
    name: a key of `TERMS`.
    x: the term's array.
    number: number of the first term that was not finite, as found so far; 0 if no update was skipped.
  """
  own = jnp.float32(1 + list(TERMS).index(name))
  return jnp.where((number > 0) & ~_all_finite(x), jnp.minimum(own, number), number)


def term_of(number: chex.Numeric, params: Any) -> str:
  """Names the term that a metric `not_finite` stands for; empty for 0.

  Args:
    number: the metric.
    params: parameters of the model, or their shapes.
  """
  if not number:  # the usual case must be fast: this is called for each member at each step
    return ''
  paths = [jax.tree_util.keystr(path, simple=True, separator='/')
           for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  names = ['', *TERMS.values(), *(f'gradient of {path}' for path in paths), *(f'parameter {path}' for path in paths)]
  return names[int(number)]


def ratio(total: chex.Array, count: chex.Array) -> chex.Array:
  """Returns `total / count`. Where count is 0 it is NaN, or infinity under `jax_debug_nans`, which stops at any NaN."""
  none = jnp.float32(jnp.inf if jax.config.jax_debug_nans else jnp.nan)
  return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), none)


def scan(fn: Callable, init: Any, xs: chex.Array) -> tuple[Any, Any]:
  """Like `jax.lax.scan`; under `jax_debug_nans` a Python loop, in which JAX finds the operation that gives NaN."""
  if not jax.config.jax_debug_nans:
    return jax.lax.scan(fn, init, xs)
  ys = []
  for x in xs:
    init, y = fn(init, x)
    ys.append(y)
  return init, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def not_finite_in(tree: Any) -> list[str]:
  """Returns the paths of arrays, NumPy's or JAX's, in a PyTree that are not finite."""

  def finite(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return bool(jax.jit(_all_finite, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x))
    return not jnp.issubdtype(x.dtype, jnp.inexact) or bool(np.all(np.isfinite(x)))

  return [jax.tree_util.keystr(path, simple=True, separator='/')
          for path, x in jax.tree_util.tree_leaves_with_path(tree) if not finite(x)]


class Watch:
  """Counts steps in a row without an update, for each member of a population, and warns of skipped updates.

  Attributes:
    idle: int `[]` or `[P]` number of the latest steps in a row without an update.
  """

  def __init__(self, params: Any, config: Any, names: Sequence[str] = ()):
    """Starts with all counts at zero.

    Args:
      params: parameters of the model, or their shapes.
      config: `num_updates` is the number of updates in a step, `max_skipped` the number of steps without an update
        after which a run stops.
      names: names of the members of a population.
    """
    self.idle, self._config, self._names, self._warned = np.int64(0), config, names, set()
    self._params = jax.eval_shape(lambda: params)
    self._since, self._term = 0, ''

  def take(self, number: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Counts the skipped updates of step `number` and returns its metrics without `not_finite`."""
    terms = [term_of(x, self._params) for x in np.ravel(metrics.get('not_finite', 0))]
    skipped = np.asarray(metrics.get('skipped_updates', 0))
    if self.steps == 0:
      self._since, self._term = number, next(filter(None, terms), '')
    self.idle = np.where(skipped < self._config.num_updates, 0, self.idle + 1)
    for name, term, count in zip(self._names or ('',), terms, np.ravel(skipped)):
      if term and (name, term) not in self._warned:
        logging.warning('%sstep %d: skipped %d of %d updates: %s not finite. The metric skipped_updates counts further '
                        'ones.', f'{name}, ' if name else '', number, count, self._config.num_updates, term)
        self._warned.add((name, term))
    return {name: value for name, value in metrics.items() if name != 'not_finite'}

  @property
  def steps(self) -> int:
    """Number of the latest steps in a row in which no member made an update."""
    return int(np.min(self.idle))

  def tripped(self, last: bool = False) -> bool:
    """Returns whether the run must stop: no update by any member for `max_skipped` steps, or in the last step."""
    return self.steps >= (1 if last else self._config.max_skipped)

  def reason(self, number: int, num_steps: int) -> str:
    """Explains in a sentence why the run stops after step `number`."""
    which = f'step {number}' if self.steps == 1 else f'steps {self._since} to {number}'
    return f'no update could be made in {which} of {num_steps} (first term not finite: {self._term})'


def _all_finite(x) -> chex.Array:
  x = jnp.asarray(x)
  return jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool(True)


def _first_false(flags) -> chex.Array:
  return jnp.where(jnp.all(flags), 0, 1 + jnp.argmin(flags)).astype(jnp.float32)
