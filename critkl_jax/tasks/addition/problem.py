"""Addition problems: operands as arrays of digits, and distributions of their lengths.

Operands are digit arrays, least significant digit first, so that no number of digits overflows.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Problem:
  """One addition problem.

  Attributes:
    digits: int32 `[2, M]` digits of both operands, least significant first, zero past the operand's length.
    lengths: int32 `[2]` number of digits of each operand, 1..M.
  """

  digits: chex.Array
  lengths: chex.Array


def make_problem(a: int, b: int, max_digits: int) -> Problem:
  """Makes the problem `a + b`, in arrays for operands of up to `max_digits` digits.

  Raises:
    ValueError: if an operand is negative or has more digits.
  """
  for name, operand in (('a', a), ('b', b)):
    if operand < 0 or len(str(operand)) > max_digits:
      raise ValueError(f'{name}: expected an integer of 1..{max_digits} digits, got {operand}.')
  rows = [[int(c) for c in reversed(str(operand).zfill(max_digits))] for operand in (a, b)]
  return Problem(digits=jnp.array(rows, jnp.int32), lengths=jnp.array([len(str(a)), len(str(b))], jnp.int32))


def sample_operands(key: chex.PRNGKey, lengths: chex.Array, max_digits: int) -> Problem:
  """Draws both operands uniformly among the integers with the given numbers of digits.

  Args:
    key: PRNG key, consumed.
    lengths: int32 `[2]` numbers of digits, 1..max_digits. One-digit operands include 0.
    max_digits: M.

  Returns:
    A `Problem` with `[2, M]` digits.
  """
  place = jnp.arange(max_digits, dtype=jnp.int32)[None]
  leading = (place == lengths[:, None] - 1) & (lengths[:, None] > 1)
  digits = _draw(key, (2, max_digits), leading.astype(jnp.int32), 10)
  return Problem(digits=jnp.where(place < lengths[:, None], digits, 0), lengths=lengths.astype(jnp.int32))


def identical_lengths(key: chex.PRNGKey, num_digits: int) -> chex.Array:
  """Returns the lengths `[2]` of two operands of `num_digits` digits each; the key is not used."""
  del key
  return jnp.full((2,), num_digits, jnp.int32)


def varying_lengths(key: chex.PRNGKey, num_digits: int) -> chex.Array:
  """Draws lengths `[2]`: one operand, by a fair coin, has `num_digits` digits, the other uniformly 1..num_digits."""
  other, coin = jax.random.split(key)
  lengths = jnp.stack([jnp.int32(num_digits), _draw(other, (), 1, num_digits + 1)])
  return jnp.where(_coin(coin), lengths, lengths[::-1])


def pretraining_lengths(key: chex.PRNGKey, num_digits: int) -> chex.Array:
  """Draws lengths `[2]`, each uniform in 1..num_digits."""
  return _draw(key, (2,), 1, num_digits + 1)


def longest_lengths(key: chex.PRNGKey, num_digits: int) -> chex.Array:
  """Draws lengths `[2]` from `pretraining_lengths`, conditioned on the longer length being exactly `num_digits`."""
  index = _draw(key, (), 0, 2 * num_digits - 1)
  return jnp.where(index < num_digits, jnp.stack([jnp.int32(num_digits), index + 1]),
                   jnp.stack([index - num_digits + 1, jnp.int32(num_digits)]))


def plus_lengths(key: chex.PRNGKey, num_digits: int, extra_digits: int) -> chex.Array:
  """Draws lengths `[2]` of the paper's "plus k" problems with N = `num_digits`, k = `extra_digits`.

  One operand, by a fair coin, has exactly N + k digits; the other is uniform in 1..N with probability 1/2 and otherwise
  uniform in N+1..N+k. With k = 0 the other is uniform in 1..N.
  """
  if extra_digits == 0:
    return varying_lengths(key, num_digits)
  known, new, which, coin = jax.random.split(key, 4)
  longest = num_digits + extra_digits
  other = jnp.where(_coin(which), _draw(known, (), 1, num_digits + 1), _draw(new, (), num_digits + 1, longest + 1))
  lengths = jnp.stack([jnp.int32(longest), other])
  return jnp.where(_coin(coin), lengths, lengths[::-1])


# Types are explicit: the defaults of JAX depend on `jax_enable_x64`, and another type would draw other problems.


def _draw(key, shape, least, end):
  return jax.random.randint(key, shape, least, end, dtype=jnp.int32)


def _coin(key):
  return jax.random.bernoulli(key, jnp.float32(0.5))
