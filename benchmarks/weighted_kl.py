"""The fused weighted KL beside what people would use instead, forward and backward, alternating in one run.

    python -m benchmarks.weighted_kl --json=weighted_kl.json

The naive program holds all logits and leaves the gradient to JAX. Where they are installed (`pip install '.[bench]'`)
a PyTorch loss over chunks of tokens in the manner of Liger-Kernel (its k3 penalty) and tokamax's chunked cross-entropy
(the log-probabilities alone) run beside it: they compute less, and are there for scale.
"""

import functools
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.losses import ALPHA, EXPONENT, naive_linear_loss, naive_loss, token_loss
from critkl_jax.ops.weighted_kl import linear_weighted_kl, linear_weighted_kl_loss, pick_implementation, weighted_kl
from experiments.flags import run

SIZE = flags.DEFINE_list('size', ['2048', '256', '50257'], 'N, D and V of the operation on hidden states.')
SMALL = flags.DEFINE_list('small', ['40000', '40'], 'N and V of the operation on logits.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed rounds, after one to warm up.', lower_bound=1)
HELD = flags.DEFINE_integer('held', 128, 'Tokens that token mode holds at a time.', lower_bound=1)
JSON = flags.DEFINE_string('json', None, 'File that takes the figures.')


def linear_programs(num_tokens: int, width: int, vocab_size: int) -> tuple[dict[str, Callable], dict[str, int]]:
  """Returns compiled calls by name, and their temporary memory in bytes."""
  rng = np.random.default_rng(0)

  def make(*shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(width), jnp.float32)

  hidden, ref_hidden = make(num_tokens, width) * 3, make(num_tokens, width) * 3
  embedding, ref_embedding = make(vocab_size, width) * np.sqrt(width), make(vocab_size, width) * np.sqrt(width)
  actions = jnp.asarray(rng.integers(0, vocab_size, num_tokens))
  advantages = jnp.asarray(rng.normal(size=num_tokens), jnp.float32)
  fixed = ref_hidden, ref_embedding, actions, advantages

  def record(hidden, embedding, ref_hidden, ref_embedding, actions, advantages, **options):
    found = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=EXPONENT, **options)
    return jnp.sum(token_loss(found, advantages))

  def one_pass(*arrays, **options):
    return linear_weighted_kl_loss(token_loss, *arrays, exponent=EXPONENT, **options)[0]

  token = {'implementation': 'chunked', 'memory_budget': 8 * vocab_size * HELD.value}
  vocabulary = {'implementation': 'chunked', 'memory_budget': 8 * num_tokens * 256}
  losses = {
      'naive': naive_linear_loss,
      'reference': functools.partial(record, implementation='reference'),
      'token mode': functools.partial(one_pass, **token),
      'vocabulary mode': functools.partial(record, **vocabulary),
      'picked': one_pass,
  }
  return compiled(losses, (hidden, embedding), fixed)


def logit_programs(num_tokens: int, vocab_size: int) -> tuple[dict[str, Callable], dict[str, int]]:
  """Returns compiled calls by name, and their temporary memory in bytes."""
  rng = np.random.default_rng(0)
  logits, ref_logits = (jnp.asarray(3 * rng.normal(size=(num_tokens, vocab_size)), jnp.float32) for _ in range(2))
  actions = jnp.asarray(rng.integers(0, vocab_size, num_tokens))
  advantages = jnp.asarray(rng.normal(size=num_tokens), jnp.float32)

  def record(logits, ref_logits, actions, advantages, **options):
    return jnp.sum(token_loss(weighted_kl(logits, ref_logits, actions, exponent=EXPONENT, **options), advantages))

  losses = {'naive': naive_loss} | {
      name: functools.partial(record, implementation=name) for name in ('reference', 'fused')} | {'picked': record}
  return compiled(losses, (logits,), (ref_logits, actions, advantages))


def compiled(losses: dict[str, Callable], trained: tuple, fixed: tuple) -> tuple[dict[str, Callable], dict[str, int]]:
  """Compiles value and gradient of each loss, checks that they agree, and reads their temporary memory."""
  calls, memory, values = {}, {}, {}
  for name, loss in losses.items():
    program = jax.jit(jax.value_and_grad(loss, tuple(range(len(trained))))).lower(*trained, *fixed).compile()
    calls[name] = functools.partial(program, *trained, *fixed)
    memory[name] = program.memory_analysis().temp_size_in_bytes
    values[name] = jax.tree.map(np.asarray, calls[name]())
    for one, two in zip(jax.tree.leaves(values[name]), jax.tree.leaves(values['naive'])):
      np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3 * np.abs(two).max())
  return calls, memory


def other_programs(num_tokens: int, width: int, vocab_size: int) -> dict[str, Callable]:
  """Returns calls of other libraries, of those that are installed."""
  calls = {}
  if importlib.util.find_spec('torch'):
    calls['torch, token chunks (Liger, k3)'] = torch_call(num_tokens, width, vocab_size)
  if importlib.util.find_spec('tokamax'):
    calls['tokamax, cross-entropy only'] = tokamax_call(num_tokens, width, vocab_size)
  return calls


def torch_call(num_tokens: int, width: int, vocab_size: int, chunk: int = 128) -> Callable:
  """Returns a loss over chunks of tokens whose gradients are taken in the forward pass, as Liger-Kernel does."""
  import torch

  generator = torch.Generator().manual_seed(0)
  make = functools.partial(torch.randn, generator=generator)
  hidden, ref_hidden = make(num_tokens, width) * 0.2, make(num_tokens, width) * 0.2
  embedding, ref_embedding = make(vocab_size, width), make(vocab_size, width)
  actions, advantages = torch.randint(vocab_size, (num_tokens,), generator=generator), make(num_tokens)

  def call():
    grad_hidden, grad_embedding, total = torch.empty_like(hidden), torch.zeros_like(embedding), 0.0
    for start in range(0, num_tokens, chunk):
      part = slice(start, start + chunk)
      h, e = hidden[part].clone().requires_grad_(), embedding.detach().requires_grad_()
      pick = actions[part, None]
      log_prob = torch.log_softmax(h @ e.T, -1).gather(1, pick)[:, 0]
      with torch.no_grad():
        ref = torch.log_softmax(ref_hidden[part] @ ref_embedding.T, -1).gather(1, pick)[:, 0]
      k3 = torch.exp(ref - log_prob) - (ref - log_prob) - 1
      loss = torch.sum(-log_prob * advantages[part] + ALPHA * k3)
      grads = torch.autograd.grad(loss, (h, e))
      grad_hidden[part] = grads[0]
      grad_embedding += grads[1]
      total += loss.detach()
    return total

  return call


def tokamax_call(num_tokens: int, width: int, vocab_size: int) -> Callable:
  """Returns tokamax's linear cross-entropy, forward and backward, in its chunked form for any backend."""
  import tokamax

  rng = np.random.default_rng(0)
  hidden = jnp.asarray(0.2 * rng.normal(size=(num_tokens, width)), jnp.float32)
  embedding = jnp.asarray(rng.normal(size=(width, vocab_size)), jnp.float32)
  actions = jnp.asarray(rng.integers(0, vocab_size, num_tokens), jnp.int32)
  loss = functools.partial(
      tokamax.linear_softmax_cross_entropy_loss, reduction='sum', implementation='chunked_xla')
  program = jax.jit(jax.value_and_grad(lambda h, w: loss(h, actions, w), (0, 1)))
  return lambda: program(hidden, embedding)


def alternate(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
  """Returns the median seconds of each call; every round makes each of them once."""
  times = {name: [] for name in calls}
  for number in range(repeats + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if number:
        times[name].append(time.perf_counter() - start)
  return {name: statistics.median(found) for name, found in times.items()}


def report(title: str, seconds: dict[str, float], memory: dict[str, int]) -> dict[str, dict[str, float]]:
  """Prints a table and returns it; ratios are those of the naive program to the others."""
  print(title)
  print(f'{"":>34}{"s":>9}{"times faster":>14}{"temporary MiB":>15}{"times less":>12}')
  rows = {}
  for name, value in seconds.items():
    rows[name] = {'seconds': value, 'speedup': seconds['naive'] / value}
    line = f'{name:>34}{value:9.3f}{seconds["naive"] / value:14.2f}'
    if name in memory:
      rows[name] |= {'temporary_mib': memory[name] / 2**20, 'memory_ratio': memory['naive'] / max(memory[name], 1)}
      line += f'{memory[name] / 2**20:15.1f}{memory["naive"] / max(memory[name], 1):12.1f}'
    print(line)
  return rows


def main() -> None:
  """Times both operations and prints what is picked."""
  size, small = tuple(map(int, SIZE.value)), tuple(map(int, SMALL.value))
  calls, memory = linear_programs(*size)
  calls |= other_programs(*size)
  title = 'From hidden states, N={} D={} V={}, float32, {}'.format(*size, jax.devices()[0].device_kind)
  result = {'device': jax.devices()[0].device_kind, 'linear': report(title, alternate(calls, REPEATS.value), memory)}
  calls, memory = logit_programs(*small)
  title = 'From logits, N={} V={}, float32'.format(*small)
  result['logits'] = report(title, alternate(calls, 4 * REPEATS.value), memory)
  result['picked'] = {'linear': pick_implementation(size[2], from_logits=False),
                      'logits': pick_implementation(small[1], from_logits=True)}
  print('picked where none is named: {linear} (from hidden states), {logits} (from logits)'.format(**result['picked']))
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  run(main)
