"""Rewards from an ordinary Python function of text, between a jitted rollout and a jitted update.

The reward function has the usual form, `reward(prompts, completions) -> list[float]`. It gets strings, so it may parse
them, run them, or ask a server. Here it looks a word up in a dictionary.

A short pre-training makes the reference, a small GPT-2 of characters. It answers "sky" with "is blue.", "is pink." or
"is gray.", at random. The reward is 1 for the right colour. The policy has to change at the first letter of the colour,
and the reference is uncertain there and nowhere else: the other letters follow from it.

    python examples/python_reward.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from critkl_jax import (
  Batch,
  CharTokenizer,
  GPT2Config,
  LossConfig,
  Rollout,
  action_log_probs,
  exponent_for,
  gpt2,
  group_relative,
  masked_mean,
  model_generate,
  ppo_loss,
  score,
  stop_after,
)

COLOURS = {'sky': 'blue', 'sea': 'blue', 'rose': 'pink', 'pig': 'pink', 'fog': 'gray', 'ash': 'gray'}
G, Q, T = 8, 4, 10  # episodes of a prompt, tokens of prompt and response
tokenizer = CharTokenizer('% .abcdefghijklmnopqrstuvwxyz')  # the first character is the padding
model = gpt2(GPT2Config(vocab_size=tokenizer.vocab_size, context_length=Q + T, num_layers=1, width=64))
config = LossConfig(kl_coefficient=0.3, certainty_exponent=exponent_for(0.3, tokenizer.vocab_size))
optimizer = optax.adam(2e-3, b2=0.95)


def reward(prompts: list[str], completions: list[str]) -> list[float]:
  """Returns 1 for each completion that names the colour of the thing in its prompt, else 0."""
  return [float(completion == f'is {COLOURS[prompt]}.') for prompt, completion in zip(prompts, completions)]


def encode(texts, length, left):
  """Encodes texts as tokens and mask `[B, length]`, padded on the left or on the right."""
  tokens = np.full((len(texts), length), tokenizer.pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, text in enumerate(texts):
    place = slice(length - len(text), None) if left else slice(len(text))
    tokens[i, place], mask[i, place] = tokenizer.encode(text), True
  return tokens, mask


def decode(tokens, mask):
  """Decodes tokens `[B, length]`; arrays come to the host once, not row by row."""
  return [tokenizer.decode(*row) for row in zip(*jax.device_get((tokens, mask)))]


def gradient_step(loss_fn, params, opt_state):
  (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  updates, opt_state = optimizer.update(grads, opt_state)
  return optax.apply_updates(params, updates), opt_state, metrics


@jax.jit
def pretrain_step(params, opt_state, texts):
  def loss_fn(params):
    logits, _ = score(model, params, texts)
    loss = -masked_mean(action_log_probs(logits, texts.actions, texts.mask), texts.mask)
    return loss, loss

  return gradient_step(loss_fn, params, opt_state)


@jax.jit
def sample(params, prompt, prompt_mask, key):
  return model_generate(model, params, prompt, prompt_mask, key, max_new_tokens=T, pad_id=tokenizer.pad_id,
                        stop=stop_after([tokenizer.encode('.')]))


@jax.jit
def update(params, ref_params, opt_state, rollout, rewards):
  ref_logits, _ = score(model, ref_params, rollout)
  batch = Batch(actions=rollout.actions, mask=rollout.mask, log_probs=rollout.log_probs,
                advantages=group_relative(rewards, G))
  return gradient_step(lambda params: ppo_loss(score(model, params, rollout)[0], None, ref_logits, batch, config),
                       params, opt_state)


def pretrained():
  """Returns parameters of a reference that has read every thing with every colour."""
  pairs = [(thing, f'is {colour}.') for thing in COLOURS for colour in sorted(set(COLOURS.values()))]
  prompts, answers = zip(*pairs)
  texts = Rollout(*encode(prompts, Q, left=True), *encode(answers, T, left=False), log_probs=None, values=None)
  params = model.init(jax.random.key(0))
  opt_state = optimizer.init(params)
  for _ in range(150):
    params, opt_state, loss = pretrain_step(params, opt_state, texts)
  print(f'reference: cross entropy {loss:.3f} nats a character')
  return params


def main():
  params = ref_params = pretrained()
  opt_state = optimizer.init(params)
  texts = np.repeat(list(COLOURS), G).tolist()
  prompt, prompt_mask = encode(texts, Q, left=True)
  for i in range(81):
    rollout = sample(params, prompt, prompt_mask, jax.random.key(i))
    completions = decode(rollout.actions, rollout.mask)
    rewards = reward(texts, completions)  # ordinary Python, on the host
    params, opt_state, metrics = update(params, ref_params, opt_state, rollout, jnp.array(rewards))
    if i % 20 == 0:
      print(f'{i:2} reward {np.mean(rewards):.2f}  KL {metrics["kl"]:.3f}  mean weight {metrics["weight"]:.2f}  '
            f'{texts[0]!r} -> {completions[0]!r}, {texts[-1]!r} -> {completions[-1]!r}')


if __name__ == '__main__':
  main()
