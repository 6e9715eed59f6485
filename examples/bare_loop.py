"""A complete training loop in JAX alone, without Flax, Optax or a critic: sample, score, compute the loss, update.

The policy is a table: row i holds the logits of the token that follows token i. It starts as a copy of the reference,
which counts (i + 1 follows i) but draws the token after 0 at random. The reward is the share of right steps, so the
policy has to change after token 0 and nowhere else. The prioritized penalty is small there, because the reference is
uncertain; the standard penalty holds the policy back.

    python examples/bare_loop.py
"""

import functools

import jax
import jax.numpy as jnp

from critkl_jax import Batch, LossConfig, action_log_probs, exponent_for, group_relative, ppo_loss

B, G, T, V = 64, 8, 12, 12  # episodes, episodes of a prompt, tokens of a response, vocabulary


def rollout(params, prompt, key):
  """Samples T tokens after each prompt `[B]`; returns them and the token before each, int32 `[B, T]` both."""

  def step(token, key):
    action = jax.random.categorical(key, params[token])
    return action, (action, token)

  _, (actions, before) = jax.lax.scan(step, prompt, jax.random.split(key, T))
  return actions.T, before.T


@functools.partial(jax.jit, static_argnames='config')
def iteration(params, ref_params, key, config):
  prompt_key, action_key = jax.random.split(key)
  prompt = jnp.repeat(jax.random.randint(prompt_key, B // G, 0, V), G)
  actions, before = rollout(params, prompt, action_key)
  rewards = jnp.mean(actions == (before + 1) % V, axis=1)                     # share of right steps, [B]
  batch = Batch(actions=actions, mask=jnp.ones((B, T), bool), log_probs=action_log_probs(params[before], actions),
                advantages=group_relative(rewards, G),                        # [B]: one for all tokens of an episode
                critical=before == 0)                                         # only for metrics: where the KL arises

  def loss_fn(params):
    return ppo_loss(params[before], None, ref_params[before], batch, config)  # None: no critic

  grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
  return params - 20.0 * grads, metrics | {'reward': jnp.mean(rewards)}


def main():
  ref_params = 8.0 * jnp.roll(jnp.eye(V), 1, axis=1).at[0].set(0.0)
  exponent = exponent_for(half_weight_entropy=0.3, vocab_size=V)              # weight 1/2 at 0.3 nats of entropy
  for config in (LossConfig(kl='prioritized', certainty_exponent=exponent), LossConfig(kl='standard')):
    print(f'{config.kl} penalty')
    params = ref_params
    for i in range(61):
      params, metrics = iteration(params, ref_params, jax.random.key(i), config)
      if i % 20 == 0:
        print(f"  {i:2} reward {metrics['reward']:.3f}  KL {metrics['kl']:.3f} ({metrics['kl_at_critical']:.3f} of it "
              f'after token 0)  probability of 1 after 0: {jax.nn.softmax(params[0])[1]:.2f}')


if __name__ == '__main__':
  main()
