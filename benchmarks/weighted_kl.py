"""Times the fused weighted KL against baselines, forward and backward, alternating in one run.

    pip install '.[bench]'
    python -m benchmarks.weighted_kl --json=weighted_kl.json

The naive program holds all logits and is differentiated by JAX. If PyTorch and tokamax are installed, there are further
baselines: the same loss in PyTorch over chunks of tokens, with a hand-written gradient; a loss over such chunks as in
Liger-Kernel, with the k3 penalty, which needs log-probabilities alone; and tokamax's cross-entropy, which has no
reference. The last two compute less and are there for scale. A third table times the statistics of the reference alone,
and the loss from stored log-probabilities, against the matrix product of hidden states and embedding.

Letters: R rows (tokens), D width, V vocabulary.
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.losses import ALPHA, BONUS, EXPONENT, naive_linear_loss, naive_loss, token_loss
from critkl_jax.ops.weighted_kl import (
    linear_reference_statistics,
    linear_weighted_kl,
    linear_weighted_kl_loss,
    pick_implementation,
    weighted_kl,
)
from critkl_jax.ops.weighted_kl.chunked import pick_held
from critkl_jax.ops.weighted_kl.operands import dot
from critkl_jax.records import Batch
from critkl_jax.rl.certainties import kl_weight
from critkl_jax.rl.losses import ppo_loss_from_log_probs
from critkl_jax.runtime import storage
from experiments import parsing, paths
from experiments.flags import run

SIZE = flags.DEFINE_list('size', ['2048', '256', '50257'], 'Tokens, width and vocabulary of the operation on hidden '
                         'states.')
SMALL = flags.DEFINE_list('small', ['40000', '40'], 'Tokens and vocabulary of the operation on logits.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed rounds, after one to warm up.', lower_bound=1)
HELD = flags.DEFINE_integer('held', 128, 'Tokens in a chunk of token mode; on GPUs and TPUs >= 256.', lower_bound=32)
JSON = flags.DEFINE_string('json', None, 'File for the results.')


def linear_arrays(num_tokens: int, width: int, vocab_size: int) -> tuple[np.ndarray, ...]:
  """Draws hidden states and embedding of policy and reference, actions and advantages."""
  rng = np.random.default_rng(0)

  def make(*shape):
    return rng.standard_normal(shape, np.float32)

  scale = np.float32(3 / np.sqrt(width))
  actions = rng.integers(0, vocab_size, num_tokens, np.int32)
  return (scale * make(num_tokens, width), make(vocab_size, width), scale * make(num_tokens, width),
          make(vocab_size, width), actions, make(num_tokens))


def linear_programs(arrays: tuple[np.ndarray, ...]) -> tuple[dict[str, Callable], dict[str, int]]:
  """Compiles the programs from hidden states; returns calls and temporary bytes by name."""
  num_tokens, vocab_size = len(arrays[0]), len(arrays[1])

  def record(hidden, embedding, ref_hidden, ref_embedding, actions, advantages, **options):
    found = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=EXPONENT, **options)
    return jnp.sum(token_loss(found, advantages))

  def one_pass(*arrays, **options):
    return linear_weighted_kl_loss(token_loss, *arrays, exponent=EXPONENT, **options)[0]

  token = {'implementation': 'chunked', 'memory_budget': 8 * vocab_size * HELD.value}
  if pick_held(num_tokens, vocab_size, token['memory_budget']) is None:
    sys.exit(f'error: --held={HELD.value}: on this backend token mode needs more tokens at a time.')
  vocabulary = {'implementation': 'chunked', 'memory_budget': 8 * num_tokens * 256}
  losses = {
      'naive': naive_linear_loss,
      'plain': functools.partial(record, implementation='plain'),
      'token mode': functools.partial(one_pass, **token),
      'vocabulary mode': functools.partial(record, **vocabulary),
      'picked': one_pass,
  }
  arrays = tuple(map(jnp.asarray, arrays))
  return compiled(losses, arrays[:2], arrays[2:])


def stored_programs(arrays: tuple[np.ndarray, ...]) -> dict[str, Callable]:
  """Compiles what a trainer calls that stores the reference's statistics; returns calls by name."""
  hidden, embedding, ref_hidden, ref_embedding, actions, advantages = map(jnp.asarray, arrays)
  episodes = (-1, int(np.gcd(len(actions), 64)))  # episodes of up to 64 tokens
  mask, by_episode = jnp.ones(actions.shape, bool).reshape(episodes), actions.reshape(episodes)

  def both(hidden, embedding, ref_hidden, ref_embedding, actions):
    return linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=EXPONENT)

  def loss(log_probs, old, advantages, stored):
    batch = Batch(actions=by_episode, mask=mask, log_probs=old, advantages=advantages)
    weight = kl_weight(stored.certainty, EXPONENT)
    return ppo_loss_from_log_probs(log_probs, batch, ref_log_probs=stored.log_prob, weight=weight)

  programs = {'matrix product': (jax.jit(lambda h, e: dot(h, e, (1, 1))), (ref_hidden, ref_embedding)),
              'both models, forward': (jax.jit(both), (hidden, embedding, ref_hidden, ref_embedding, actions)),
              'reference alone': (jax.jit(linear_reference_statistics), (ref_hidden, ref_embedding, actions))}
  stored = jax.tree.map(lambda x: x.reshape(episodes), programs['reference alone'][0](*programs['reference alone'][1]))
  together = jax.jit(both)(hidden, embedding, ref_hidden, ref_embedding, actions)
  check_close((stored.log_prob.ravel(), stored.certainty.ravel()), (together.ref_log_prob, together.certainty))
  programs['loss from stored arrays, with gradient'] = (
      jax.jit(jax.value_and_grad(loss, has_aux=True)),
      (stored.log_prob, stored.log_prob, advantages.reshape(episodes), stored))
  return {name: functools.partial(program, *given) for name, (program, given) in programs.items()}


def report_stored(size: tuple[int, ...], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
  """Prints a table of seconds as multiples of the matrix product and of the pass of both models, and returns it."""
  product, both = seconds['matrix product'], seconds['both models, forward']
  print('Stored statistics, R={} D={} V={}, float32'.format(*size))
  print(f'{"":>40}{"s":>9}{"of the product":>16}{"of both models":>16}')
  for name, value in seconds.items():
    print(f'{name:>40}{value:9.4f}{value / product:16.3f}{value / both:16.3f}')
  return {name: {'seconds': value, 'of_product': value / product, 'of_both': value / both}
          for name, value in seconds.items()}


def logit_programs(num_tokens: int, vocab_size: int) -> tuple[dict[str, Callable], dict[str, int]]:
  """Compiles the programs from logits; returns calls and temporary bytes by name."""
  rng = np.random.default_rng(0)
  logits, ref_logits = (jnp.asarray(3 * rng.normal(size=(num_tokens, vocab_size)), jnp.float32) for _ in range(2))
  actions = jnp.asarray(rng.integers(0, vocab_size, num_tokens))
  advantages = jnp.asarray(rng.normal(size=num_tokens), jnp.float32)

  def record(logits, ref_logits, actions, advantages, **options):
    return jnp.sum(token_loss(weighted_kl(logits, ref_logits, actions, exponent=EXPONENT, **options), advantages))

  losses = {'naive': naive_loss} | {
      name: functools.partial(record, implementation=name) for name in ('plain', 'fused')} | {'picked': record}
  return compiled(losses, (logits,), (ref_logits, actions, advantages))


def compiled(losses: dict[str, Callable], trained: tuple, fixed: tuple) -> tuple[dict[str, Callable], dict[str, int]]:
  """Compiles value and gradient of each loss, checks that they agree, and reads their temporary memory."""
  calls, memory, naive = {}, {}, None
  for name, loss in losses.items():
    program = jax.jit(jax.value_and_grad(loss, tuple(range(len(trained))))).lower(*trained, *fixed).compile()
    calls[name] = functools.partial(program, *trained, *fixed)
    memory[name] = program.memory_analysis().temp_size_in_bytes
    found = calls[name]()
    naive = found if name == 'naive' else naive
    check_close(found, naive)
  return calls, memory


def check_close(value_and_grads: Any, expected: Any) -> None:
  """Raises an AssertionError if the loss or a gradient differs from the expected one."""
  for one, two in zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (value_and_grads, expected)), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3 * np.abs(two).max())


def other_programs(arrays: tuple[np.ndarray, ...]) -> dict[str, Callable]:
  """Returns the calls of other libraries by name, and prints which libraries are missing."""
  calls = {}
  for library, programs in (('torch', torch_programs), ('tokamax', tokamax_programs)):
    try:
      calls |= programs(arrays)
    except ImportError as error:
      print(f"{library}: left out, {error}: pip install '.[bench]'")
  return calls


def torch_programs(arrays: tuple[np.ndarray, ...]) -> dict[str, Callable]:
  """Makes PyTorch losses over chunks of tokens that compute their gradients in the forward pass, as in Liger-Kernel.

  Unlike Liger-Kernel, a chunk adds to the embedding's gradient in place, without a temporary of the embedding's size.
  """
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  hidden, embedding, ref_hidden, ref_embedding, actions, advantages = map(torch.from_numpy, arrays)
  actions = actions.long()[:, None]

  def call(of_chunk):
    grad_hidden, grad_embedding, total = torch.empty_like(hidden), torch.zeros_like(embedding), torch.zeros(())
    for part in map(slice, range(0, len(hidden), HELD.value), range(HELD.value, len(hidden) + HELD.value, HELD.value)):
      log_probs, ref_log_probs = (torch.log_softmax(h[part] @ e.T, -1) for h, e in (
          (hidden, embedding), (ref_hidden, ref_embedding)))
      loss, gradient = of_chunk(log_probs, ref_log_probs, actions[part], advantages[part, None])
      torch.mm(gradient, embedding, out=grad_hidden[part])
      grad_embedding.addmm_(gradient.T, hidden[part])
      total += loss
    return total, (grad_hidden, grad_embedding)

  names = {'torch, token chunks': torch_exact, 'torch, token chunks, k3 (as Liger)': torch_k3}
  return {name: functools.partial(torch.no_grad()(call), of_chunk) for name, of_chunk in names.items()}


def torch_exact(log_probs, ref_log_probs, actions, advantages):
  """Returns the loss of all benchmarks for a chunk and the gradient of its logits; overwrites log-probabilities."""
  import torch

  def row_sums(x, y):
    return torch.einsum('rv,rv->r', x, y)[:, None]

  scratch = torch.exp(ref_log_probs)
  sure = 1 + row_sums(scratch, ref_log_probs) / np.log(log_probs.shape[1])
  weight = ALPHA * sure.clamp(0, 1) ** EXPONENT
  probs, log_prob = torch.exp(log_probs, out=scratch), log_probs.gather(1, actions)
  ratios = torch.sub(log_probs, ref_log_probs, out=ref_log_probs)
  kl, entropy = row_sums(probs, ratios), -row_sums(probs, log_probs)
  gradient = ratios.mul_(weight).add_(log_probs, alpha=BONUS).add_(advantages - weight * kl + BONUS * entropy)
  gradient.mul_(probs).scatter_add_(1, actions, -advantages)
  return torch.sum(-log_prob * advantages + weight * kl - BONUS * entropy), gradient


def torch_k3(log_probs, ref_log_probs, actions, advantages):
  """Returns the loss with the k3 penalty, without weight and entropy, and the gradient of its logits."""
  import torch

  log_prob = log_probs.gather(1, actions)
  log_ratio = ref_log_probs.gather(1, actions) - log_prob
  loss = torch.sum(-log_prob * advantages + ALPHA * (torch.expm1(log_ratio) - log_ratio))
  slope = advantages + ALPHA * torch.expm1(log_ratio)  # minus the derivative of the loss by log_prob
  gradient = log_probs.exp_().mul_(slope).scatter_add_(1, actions, -slope)
  return loss, gradient


def tokamax_programs(arrays: tuple[np.ndarray, ...]) -> dict[str, Callable]:
  """Makes a call of tokamax's linear cross-entropy: the chunked implementation if this version has it, else XLA's."""
  import tokamax

  hidden, embedding, *_, actions, _ = map(jnp.asarray, arrays)
  embedding = embedding.T.copy()
  for implementation in ('chunked_xla', 'xla'):  # xla holds all logits
    loss = functools.partial(
        tokamax.linear_softmax_cross_entropy_loss, reduction='sum', implementation=implementation)
    try:
      jax.eval_shape(loss, hidden, actions, embedding)
    except ValueError as error:
      print(f'tokamax {tokamax.__version__} {implementation}: left out, {error}')
      continue
    program = jax.jit(jax.value_and_grad(lambda h, w, loss=loss: loss(h, actions, w), (0, 1)))
    return {f'tokamax {implementation}, no reference': functools.partial(program, hidden, embedding)}
  return {}


def alternate(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
  """Returns the median seconds of each call; every round makes each call once."""
  times = {name: [] for name in calls}
  for number in range(repeats + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if number:
        times[name].append(time.perf_counter() - start)
  return {name: statistics.median(found) for name, found in times.items()}


def report(title: str, seconds: dict[str, float], memory: dict[str, int]) -> dict[str, dict[str, float]]:
  """Prints a table and returns it; ratios are the naive program's numbers over the others'."""
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


def check() -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the sizes of both operations, or exits with one line."""
  paths.check_file('json', JSON.value)
  return parsing.read_sizes(SIZE, 3), parsing.read_sizes(SMALL, 2)


def main(size: tuple[int, ...], small: tuple[int, ...]) -> None:
  """Times both operations and prints the default implementations."""
  arrays = linear_arrays(*size)
  calls, memory = linear_programs(arrays)
  calls |= other_programs(arrays)
  if 'torch, token chunks' in calls:
    check_close(calls['torch, token chunks'](), calls['naive']())
  title = 'From hidden states, R={} D={} V={}, float32, {}'.format(*size, jax.devices()[0].device_kind)
  result = {'device': jax.devices()[0].device_kind, 'linear': report(title, alternate(calls, REPEATS.value), memory)}
  calls, memory = logit_programs(*small)
  title = 'From logits, R={} V={}, float32'.format(*small)
  result['logits'] = report(title, alternate(calls, 4 * REPEATS.value), memory)
  result['stored'] = report_stored(size, alternate(stored_programs(arrays), 2 * REPEATS.value))
  result['picked'] = {'linear': pick_implementation(size[2], from_logits=False),
                      'logits': pick_implementation(small[1], from_logits=True)}
  print('default implementation: {linear} (from hidden states), {logits} (from logits)'.format(**result['picked']))
  if JSON.value:
    storage.write_json(JSON.value, result)


if __name__ == '__main__':
  run(main, check)
