"""The synthetic task: prompts of one length, responses that never end early."""

import jax
import jax.numpy as jnp

from critkl_jax.models.llama import LlamaConfig, llama
from critkl_jax.sampling.generation import respond
from critkl_jax.tasks.fixed_lengths import fixed_lengths


def test_every_response_has_the_whole_length():
  model = llama(LlamaConfig(vocab_size=13, context_length=16, num_layers=1, num_heads=2, width=8))
  task = fixed_lengths(13, 5, 9)
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(0), 40))
  rollout = jax.jit(lambda params, key: respond(model, params, task, problems, key))(
      model.init(jax.random.key(1)), jax.random.key(2))
  assert rollout.prompt.shape == (40, 5)
  assert bool(jnp.all(rollout.prompt > 0))
  assert rollout.actions.shape == (40, 9)
  assert bool(jnp.all(rollout.mask))
  rewards = jax.vmap(task.reward)(problems, rollout.actions, rollout.mask)
  assert jnp.allclose(rewards, jnp.mean(rollout.actions < 6, axis=1))
