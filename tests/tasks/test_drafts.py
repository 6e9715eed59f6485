import jax
import jax.numpy as jnp
import numpy as np

from critkl_jax.tasks.drafts import matching_suffixes, prompt_lookup


def lookup(prompt, actions, num, size, padding=0):
  prompt = jnp.array([[0] * padding + prompt])
  mask = jnp.arange(prompt.shape[1])[None] >= padding
  actions = jnp.array([actions + [7] * 4])
  return prompt_lookup(prompt, mask)(jnp.array([0]), actions, jnp.array([num]), size)[0].tolist()


def test_agreement_counts_equal_last_tokens():
  found = matching_suffixes(jnp.array([1, 2, 3, 1, 2]), jnp.array([9, 1, 2]))
  np.testing.assert_array_equal(found, [0, 0, 2, 0, 0, 2])


def test_what_followed_the_longest_agreement_is_repeated():
  assert lookup([5, 1, 2, 3, 4, 6, 2, 9], [1, 2], 2, 3) == [3, 4, 6]


def test_the_latest_of_equal_agreements_counts():
  assert lookup([1, 2, 1, 3, 6], [1], 1, 1) == [3]


def test_only_what_was_written_is_looked_at():
  assert lookup([1, 2], [4, 1], 2, 1) == lookup([1, 2], [4, 1, 9, 9], 2, 1) == [2]


def test_a_period_goes_on():
  assert lookup([1, 2, 3, 1, 2, 3], [1, 2, 3], 3, 5) == [1, 2, 3, 1, 2]


def test_padding_agrees_with_nothing():
  for padding in (1, 4):
    assert lookup([5, 6, 5], [6], 1, 2, padding) == lookup([5, 6, 5], [6], 1, 2)


def test_rows_choose_their_prompts():
  draft = prompt_lookup(jnp.array([[1, 2, 1], [1, 3, 1]]), jnp.ones((2, 3), bool))
  found = draft(jnp.array([1, 0, 1]), jnp.zeros((3, 4), jnp.int32), jnp.zeros(3, jnp.int32), 1)
  assert found[:, 0].tolist() == [3, 2, 3]


def test_under_jit_and_vmap():
  draft = jax.jit(lambda actions: prompt_lookup(jnp.array([[1, 2, 1]]), jnp.ones((1, 3), bool))(
      jnp.array([0]), actions, jnp.array([1]), 2))
  assert jax.vmap(draft)(jnp.array([[[2, 0]], [[1, 0]]])).shape == (2, 1, 2)
