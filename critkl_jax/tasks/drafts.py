"""Drafts guess an episode's next tokens, for speculative decoding; a wrong guess costs time and changes no result."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

# (rows [B], actions [B, T], num_actions [B], size) -> int32 [B, size]: guesses of the tokens after the first
# `num_actions` of each response to the prompts `rows`; -1 for no guess
Draft = Callable[[chex.Array, chex.Array, chex.Array, int], chex.Array]

NUM_LOOKED_UP = 8  # most tokens of the suffix that is looked up


def prompt_lookup(prompt: chex.Array, prompt_mask: chex.Array) -> Draft:
  """Makes a draft that finds an earlier occurrence of the last few tokens and repeats the tokens that followed it.

  It searches prompt and response for the longest suffix of up to 8 tokens and takes the latest match (Saxena 2023,
  "Prompt lookup decoding").

  Args:
    prompt: int32 `[B, Q]`, padded on the left.
    prompt_mask: bool `[B, Q]`.

  Returns:
    The draft, which works for any task.
  """
  num_prompt = prompt.shape[1]
  before = jnp.where(prompt_mask, prompt, -1)

  def draft(rows, actions, num_actions, size):
    text = jnp.concatenate([before[rows], actions], 1)
    return jax.vmap(lambda t, n: _repeat(t, num_prompt + n, size))(text, num_actions)

  return draft


def matching_suffixes(tokens: chex.Array, last: chex.Array) -> chex.Array:
  """Counts, for each position in `tokens`, how many of the tokens before it match the end of `last`.

  Args:
    tokens: int32 `[T]`.
    last: int32 `[num_last]` the suffix; negative entries never match.

  Returns:
    float32 `[T + 1]` lengths of the matches that end before each token, and at the end of `tokens`.
  """
  num_places = tokens.size + 1
  padded = jnp.pad(tokens, (last.size, 0), constant_values=-2)
  agrees, total = jnp.ones(num_places, bool), jnp.zeros(num_places, jnp.float32)
  for back in range(1, last.size + 1):
    first = last.size - back
    agrees &= (padded[first:first + num_places] == last[-back]) & (last[-back] >= 0)
    total += agrees.astype(jnp.float32)
  return total


def _repeat(text, length, size):
  """Returns the `size` tokens after the longest earlier match of the end of `text[:length]`, the latest if several."""
  place = jnp.arange(text.size, dtype=jnp.int32)
  last = jax.lax.dynamic_slice(jnp.pad(text, (NUM_LOOKED_UP, 0), constant_values=-1), (length,), (NUM_LOOKED_UP,))
  found = matching_suffixes(text, last)[:-1] + place.astype(jnp.float32) / text.size  # a later match wins a tie
  start = jax.lax.argmax(jnp.where(place < length, found, -1.0), 0, jnp.int32)
  period = length - start  # a guess that reaches the end of the text repeats itself
  return text[start + jnp.arange(size, dtype=jnp.int32) % period]
