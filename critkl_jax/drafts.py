"""Guesses of what an episode will say next, for speculative decoding; a wrong guess costs time and changes nothing."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

# (rows [B], actions [B, T], number of actions [B], K) -> int32 [B, K], -1 for no guess: what follows the first so many
# actions of the answers to the prompts `rows`
Draft = Callable[[chex.Array, chex.Array, chex.Array, int], chex.Array]

NUM_LOOKED_UP = 8  # how many last tokens are looked up


def prompt_lookup(prompt: chex.Array, prompt_mask: chex.Array) -> Draft:
  """Returns a draft that repeats what followed the last few tokens earlier in the episode, the prompt included.

  The longest agreement of up to 8 tokens counts, the latest one among equals (Saxena 2023, "Prompt lookup decoding").

  Args:
    prompt: int32 `[B, Q]`, padded on the left.
    prompt_mask: bool `[B, Q]`.

  Returns:
    The draft, for any task.
  """
  num_prompt = prompt.shape[1]
  before = jnp.where(prompt_mask, prompt, -1)

  def draft(rows, actions, num_actions, size):
    text = jnp.concatenate([before[rows], actions], 1)
    return jax.vmap(lambda t, n: _repeat(t, num_prompt + n, size))(text, num_actions)

  return draft


def agreement(tokens: chex.Array, last: chex.Array) -> chex.Array:
  """Returns, for each place before, between and after tokens `[N]`, how many tokens before it equal the `last` `[M]`
  ones, counted from the end; float32 `[N + 1]`."""
  num_places = tokens.size + 1
  padded = jnp.pad(tokens, (last.size, 0), constant_values=-2)
  agrees, total = jnp.ones(num_places, bool), jnp.zeros(num_places, jnp.float32)
  for k in range(1, last.size + 1):
    agrees &= (padded[last.size - k:last.size - k + num_places] == last[-k]) & (last[-k] >= 0)
    total += agrees.astype(jnp.float32)
  return total


def _repeat(text, length, size):
  """Returns the `size` tokens after the latest longest agreement with the end of `text[:length]`."""
  place = jnp.arange(text.size, dtype=jnp.int32)
  last = jax.lax.dynamic_slice(jnp.pad(text, (NUM_LOOKED_UP, 0), constant_values=-1), (length,), (NUM_LOOKED_UP,))
  found = agreement(text, last)[:-1] + place.astype(jnp.float32) / text.size  # less than one for being later
  start = jax.lax.argmax(jnp.where(place < length, found, -1.0), 0, jnp.int32)
  period = length - start  # a guess that reaches the end of the text goes on where it began
  return text[start + jnp.arange(size, dtype=jnp.int32) % period]
