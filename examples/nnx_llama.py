"""GRPO on a small Llama in Flax NNX: stored statistics of the reference, and microbatches that add up exactly.

The model is defined in this file: RMSNorm, rotary positions, grouped queries, SwiGLU, tied embeddings, a vocabulary of
4,000. A short pre-training makes the reference. It answers a prompt of 1 to 4 letters with a random mark, then the last
letter, once to four times depending on the letter, then END. The answer is rewarded if its mark is the one that belongs
to the letter. So the first token is the one to learn, and the reference is uncertain there and nowhere else.

An iteration has three parts, as in a large trainer:
1. `sample` draws a group of answers to each prompt with `critkl_jax.generate`, whose policy is a plain function. One
   pass of the reference follows; `linear_reference_statistics` keeps its log-probability and certainty of each token,
   and the reference is not needed again.
2. `gradients` sums the gradients of `ppo_loss_from_log_probs` over microbatches. Each loss is divided by the
   `loss_denominator` of the whole batch, so the sum is the gradient of the whole batch. The first iteration checks it.
3. `apply` takes a step of Adam.

    python examples/nnx_llama.py
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from critkl_jax import (
  Batch,
  LossConfig,
  Rollout,
  action_log_probs,
  exponent_for,
  generate,
  group_relative,
  kl_weight,
  linear_reference_statistics,
  loss_denominator,
  masked_mean,
  ppo_loss_from_log_probs,
  stop_after,
)

V, D, LAYERS, HEADS, KV_HEADS = 4000, 64, 2, 4, 2  # vocabulary, width, blocks, query heads, key-value heads
HEAD = D // HEADS                                  # width of a head
B, G, Q, T = 128, 8, 4, 6                          # episodes, episodes of a prompt, tokens of prompt and response
PAD, END, LETTERS, MARKS, KINDS = 0, 1, 10, 30, 4  # token ids: letters are 10..13, marks 30..33
CONFIG = LossConfig(kl='prioritized', kl_estimator='k3', kl_coefficient=0.3, aggregation='tokens',
                    certainty_exponent=exponent_for(half_weight_entropy=0.3, vocab_size=V))
optimizer = optax.adam(3e-3, b2=0.95)


# The model.


def rotated(x, positions):
  """Rotates the two halves of each head `[B, S, heads, HEAD]` by angles that grow with the positions `[B, S]`."""
  angles = positions[..., None, None] * 10000.0 ** (-jnp.arange(HEAD // 2) / (HEAD // 2))
  one, two = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([one * jnp.cos(angles) - two * jnp.sin(angles),
                          two * jnp.cos(angles) + one * jnp.sin(angles)], axis=-1)


class Block(nnx.Module):
  """Attention with grouped queries and a SwiGLU layer, each after an RMSNorm."""

  def __init__(self, rngs):
    linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
    self.attention_norm, self.mlp_norm = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
    self.query, self.key_value = linear(D, HEADS * HEAD), linear(D, 2 * KV_HEADS * HEAD)
    self.out = linear(HEADS * HEAD, D)
    self.gate, self.up, self.down = linear(D, 3 * D), linear(D, 3 * D), linear(3 * D, D)

  def __call__(self, x, positions, mask):
    y = self.attention_norm(x)
    query = rotated(self.query(y).reshape(*y.shape[:2], HEADS, HEAD), positions)
    key, value = jnp.split(self.key_value(y).reshape(*y.shape[:2], 2 * KV_HEADS, HEAD), 2, axis=2)
    attended = jax.nn.dot_product_attention(query, rotated(key, positions), value, mask=mask)
    x = x + self.out(attended.reshape(y.shape))
    y = self.mlp_norm(x)
    return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
  """Computes the last hidden states `[B, S, D]` of tokens `[B, S]`; where the mask is false there is padding."""

  def __init__(self, rngs):
    self.embedding = nnx.Param(0.1 * jax.random.normal(rngs.params(), (V, D)))
    self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
    self.norm = nnx.RMSNorm(D, rngs=rngs)

  def __call__(self, tokens, mask):
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # padding on the left moves no token
    causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    x = self.embedding[...][tokens]
    for block in self.blocks:
      x = block(x, positions, causal & mask[:, None, None, :])
    return self.norm(x)


GRAPH = nnx.split(Llama(nnx.Rngs(0)))[0]  # the model without its parameters


def hidden_states(params, prompt, prompt_mask, actions, mask):
  """Returns `[B, T, D]`: the hidden state at `[b, t]` gives the distribution of `actions[b, t]`."""
  tokens = jnp.concatenate([prompt, actions[:, :-1]], axis=1)
  return nnx.merge(GRAPH, params)(tokens, jnp.concatenate([prompt_mask, mask[:, :-1]], axis=1))[:, Q - 1:]


def log_probs_of(params, rollout):
  """Returns the log-probability of each action, `[B, T]`, from the logits `[B, T, V]` of a microbatch."""
  hidden = hidden_states(params, rollout.prompt, rollout.prompt_mask, rollout.actions, rollout.mask)
  return action_log_probs(hidden @ params['embedding'][...].T, rollout.actions, rollout.mask)


# The task, and the reference that knows half of it.


def prompts(key, number):
  """Draws prompts of 1 to Q letters, padded on the left; returns tokens and mask `[number, Q]`."""
  letter_key, length_key = jax.random.split(key)
  mask = jnp.arange(Q) >= Q - jax.random.randint(length_key, (number, 1), 1, Q + 1)
  letters = LETTERS + jax.random.randint(letter_key, (number, Q), 0, KINDS)
  return jnp.where(mask, letters, PAD), mask


def answer(prompt, marks):
  """Returns the answers that begin with the given marks `[B]`, and their mask, `[B, T]` each."""
  letter, place = prompt[:, -1:], jnp.arange(T)
  end = 2 + letter - LETTERS
  tokens = jnp.where(place == 0, marks[:, None], jnp.where(place < end, letter, END))
  return jnp.where(place <= end, tokens, PAD), place <= end


def reward(prompt, actions):
  """Returns 1 for the right answer, with the mark that belongs to the last letter, else 0: float32 `[B]`."""
  right, _ = answer(prompt, prompt[:, -1] - LETTERS + MARKS)
  return jnp.all(actions == right, axis=1).astype(jnp.float32)


@jax.jit
def pretrain_step(params, opt_state, key):
  prompt_key, mark_key = jax.random.split(key)
  prompt, prompt_mask = prompts(prompt_key, B)
  actions, mask = answer(prompt, MARKS + jax.random.randint(mark_key, (B,), 0, KINDS))
  rollout = Rollout(prompt=prompt, prompt_mask=prompt_mask, actions=actions, mask=mask, log_probs=None, values=None)
  loss, grads = jax.value_and_grad(lambda params: -masked_mean(log_probs_of(params, rollout), mask))(params)
  return *apply(params, opt_state, grads), loss


# The loop.


def policy_of(params):
  """Returns a policy for `generate` without a cache: it keeps all tokens and reads them again for each new one."""

  def policy(tokens, mask, state):
    seen, seen_mask, length = state
    seen = jax.lax.dynamic_update_slice_in_dim(seen, tokens, length, axis=1)
    seen_mask = jax.lax.dynamic_update_slice_in_dim(seen_mask, mask, length, axis=1)
    hidden = nnx.merge(GRAPH, params)(seen, seen_mask)
    hidden = jax.lax.dynamic_slice_in_dim(hidden, length, tokens.shape[1], axis=1)
    return hidden @ params['embedding'][...].T, jnp.zeros(tokens.shape), (seen, seen_mask, length + tokens.shape[1])

  return policy


@jax.jit
def sample(params, ref_params, key):
  """Samples answers; returns `(rollout, batch, stored)`, which the update reads, and the mean reward."""
  prompt_key, action_key = jax.random.split(key)
  prompt, prompt_mask = (jnp.repeat(x, G, axis=0) for x in prompts(prompt_key, B // G))
  state = jnp.zeros((B, Q + T), jnp.int32), jnp.zeros((B, Q + T), bool), 0
  rollout = generate(policy_of(params), state, prompt, prompt_mask, action_key, max_new_tokens=T,
                     stop=stop_after([[END]]), pad_id=PAD)
  ref_hidden = hidden_states(ref_params, prompt, prompt_mask, rollout.actions, rollout.mask)
  stored = linear_reference_statistics(ref_hidden, ref_params['embedding'][...], rollout.actions, mask=rollout.mask)
  rewards = reward(prompt, rollout.actions)
  batch = Batch(actions=rollout.actions, mask=rollout.mask, log_probs=rollout.log_probs,
                advantages=group_relative(rewards, G, scale='none'))
  return (rollout, batch, stored), jnp.mean(rewards)


@functools.partial(jax.jit, static_argnames='microbatches')
def gradients(params, experience, denominator, microbatches):
  """Sums the gradients of the loss over equal parts of the episodes, each divided by the denominator."""

  def loss_fn(params, rollout, batch, stored):
    return ppo_loss_from_log_probs(log_probs_of(params, rollout), batch, CONFIG, ref_log_probs=stored.log_prob,
                                   certainty=stored.certainty, denominator=denominator)[0]

  def add(total, part):
    return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(params, *part)), None

  parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), experience)
  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)[0]


@jax.jit
def apply(params, opt_state, grads):
  updates, opt_state = optimizer.update(grads, opt_state)
  return optax.apply_updates(params, updates), opt_state


def check_gradients(params, experience, denominator):
  """Prints how far the gradients from microbatches are from the gradient of the whole batch."""
  whole = gradients(params, experience, denominator, microbatches=1)
  summed = gradients(params, experience, denominator, microbatches=4)
  averaged = jax.tree.map(lambda x: x / 4, gradients(params, experience, None, microbatches=4))
  for name, grads in (('summed, with the denominator of the whole batch', summed),
                      ('averaged, each with its own denominator', averaged)):
    error = optax.tree.norm(jax.tree.map(jnp.subtract, grads, whole)) / optax.tree.norm(whole)
    print(f'4 microbatches {name}: {error:.1e} from the gradient of the whole batch')


def main():
  params = nnx.split(Llama(nnx.Rngs(0)))[1]
  opt_state = optimizer.init(params)
  for i in range(80):
    params, opt_state, loss = pretrain_step(params, opt_state, jax.random.key(i))
  print(f'reference pre-trained: cross entropy {loss:.2f} nats')
  print(f'V = {V}: the weight is 1/2 at 0.3 nats of entropy with exponent {CONFIG.certainty_exponent:.1f}')

  ref_params, opt_state, rewards = params, optimizer.init(params), []
  for i in range(40):
    experience, mean_reward = sample(params, ref_params, jax.random.key(1000 + i))
    mask, weight = experience[1].mask, kl_weight(experience[2].certainty, CONFIG.certainty_exponent)
    denominator = loss_denominator(mask, CONFIG)
    if i == 0:
      check_gradients(params, experience, denominator)
    grads = gradients(params, experience, denominator, microbatches=4)
    params, opt_state = apply(params, opt_state, grads)
    rewards.append(float(mean_reward))
    if i % 10 == 9:
      print(f'iterations {i - 9:2}..{i:2}: reward {sum(rewards[-10:]) / 10:.2f}  mean weight: first token '
            f'{jnp.mean(weight[:, 0]):.2f}, others {masked_mean(weight[:, 1:], mask[:, 1:]):.2f}')


if __name__ == '__main__':
  main()
