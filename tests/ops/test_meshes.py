"""The loss on meshes: tokens spread over `data`, the vocabulary over `model`, with Explicit and with Auto axes."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import slow_except

from critkl_jax import Batch, LossConfig, linear_ppo_loss, ppo_loss
from critkl_jax.ops.weighted_kl import (
  linear_reference_statistics,
  linear_weighted_kl,
  pick_implementation,
  reference_statistics,
  weighted_kl,
)
from critkl_jax.ops.weighted_kl.partitioned import pick_steps
from critkl_jax.rl.advantages import gae, group_relative, whiten
from critkl_jax.rl.losses import action_log_probs

B, T, V, D = 8, 6, 2048, 16
SPREAD = {'hidden': ('data',), 'embedding': ('model',), 'ref_hidden': ('data',), 'ref_embedding': ('model',),
          'actions': ('data',), 'mask': ('data',), 'log_probs': ('data',), 'advantages': ('data',),
          'logits': ('data', None, 'model'), 'ref_logits': ('data', None, 'model')}
CONFIG = LossConfig(certainty_exponent=3.0, entropy_coefficient=0.1)
MOVES = r'= \(?\w+\[([\d,]*)\][^=]*? (all-gather|all-to-all|collective-permute)(?:-start)?\('


@functools.cache
def arrays():
  keys = jax.random.split(jax.random.key(0), 7)
  x = {'hidden': jax.random.normal(keys[0], (B, T, D)), 'embedding': jax.random.normal(keys[1], (V, D)),
       'ref_hidden': jax.random.normal(keys[2], (B, T, D)), 'ref_embedding': jax.random.normal(keys[3], (V, D)),
       'actions': jax.random.randint(keys[4], (B, T), 0, V), 'log_probs': -jnp.abs(jax.random.normal(keys[5], (B, T))),
       'advantages': jax.random.normal(keys[6], (B,))}
  return x | {'logits': x['hidden'] @ x['embedding'].T, 'ref_logits': x['ref_hidden'] @ x['ref_embedding'].T,
              'mask': x['actions'] % 5 > 0}


def make_mesh(kind):
  return jax.make_mesh((4, 2), ('data', 'model'), axis_types=(kind,) * 2)


def spread(mesh, x=None, **others):
  return {name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*(SPREAD | others)[name])))
          for name, x in (arrays() if x is None else x).items()}


def batch_of(x):
  return Batch(**{name: x[name] for name in ('actions', 'mask', 'log_probs', 'advantages')})


def of_hidden(x, **options):
  def loss(hidden, embedding):
    return linear_ppo_loss(hidden, embedding, None, x['ref_hidden'], x['ref_embedding'], batch_of(x), CONFIG, **options)

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(x['hidden'], x['embedding'])


def of_logits(x, implementation=None):
  del implementation
  return jax.value_and_grad(lambda logits: ppo_loss(logits, None, x['ref_logits'], batch_of(x), CONFIG),
                            has_aux=True)(x['logits'])


def of_record(x, **options):
  return linear_weighted_kl(x['hidden'], x['embedding'], x['ref_hidden'], x['ref_embedding'], x['actions'],
                            exponent=3.0, mask=x['mask'], **options)


def of_reference(x, implementation=None, **options):
  if implementation == 'plain':
    return reference_statistics(x['ref_logits'], x['actions'], mask=x['mask'])
  return linear_reference_statistics(x['ref_hidden'], x['ref_embedding'], x['actions'], mask=x['mask'], **options)


def moved(text):
  """Returns the sizes of arrays that devices exchange other than by reductions."""
  return [int(np.prod([int(n) for n in shape.split(',') if n])) for shape, _ in re.findall(MOVES, text)]


@pytest.mark.parametrize('in_context', slow_except((True,), (True, False)))
@pytest.mark.parametrize('kind', [AxisType.Explicit, AxisType.Auto], ids=['explicit', 'auto'])
@pytest.mark.parametrize(('fn', 'options'), slow_except(
    ((of_hidden, {}), (of_logits, {}), (of_reference, {'memory_budget': 2**13})),
    ((of_hidden, {}), (of_hidden, {'memory_budget': 2**14}), (of_logits, {}), (of_record, {'memory_budget': 2**14}),
     (of_reference, {}), (of_reference, {'memory_budget': 2**13}))))
def test_results_and_shardings(fn, options, kind, in_context):
  expected = fn(arrays(), implementation='plain')
  mesh = make_mesh(kind)
  with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
    program = jax.jit(functools.partial(fn, **options)).lower(spread(mesh)).compile()
    found = program(spread(mesh))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), found, expected)
  assert max(moved(program.as_text()), default=0) <= B * T * D  # nothing of the vocabulary's size
  if fn is of_hidden:
    hidden, embedding = found[1]
    assert hidden.sharding.spec[0] == 'data'
    assert embedding.sharding.spec[0] == 'model'
  if fn is of_logits:
    assert found[1].sharding.spec == PartitionSpec('data', None, 'model')


@pytest.mark.parametrize('over', [{'embedding': (None,), 'ref_embedding': (None,)}, {'embedding': (('model', 'data'),),
    'ref_embedding': (('model', 'data'),), **dict.fromkeys(SPREAD, (None,))}, {
    **dict.fromkeys(SPREAD, (('data', 'model'),)), 'embedding': (None,), 'ref_embedding': (None,)}],
    ids=['whole vocabulary', 'vocabulary over all devices', 'tokens over all devices'])
def test_other_shardings_of_explicit_axes(over):
  over = {name: axes for name, axes in over.items() if 'logits' not in name}
  if 'actions' in over and over['actions'] == (None,):
    over |= {'embedding': (('model', 'data'),), 'ref_embedding': (('model', 'data'),)}
  x = {name: value for name, value in arrays().items() if 'logits' not in name}
  found = jax.jit(of_hidden)(spread(make_mesh(AxisType.Explicit), x, **over))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), found,
               of_hidden(arrays(), implementation='plain'))


def test_ratio_of_sequences_on_explicit_axes():
  config = LossConfig(ratio='sequence', certainty_exponent=3.0, aggregation='sequences')

  def loss(x, implementation=None):
    return jax.grad(lambda hidden: linear_ppo_loss(hidden, x['embedding'], None, x['ref_hidden'], x['ref_embedding'],
                                                   batch_of(x), config, implementation=implementation)[0])(x['hidden'])

  np.testing.assert_allclose(jax.jit(loss)(spread(make_mesh(AxisType.Explicit))), loss(arrays(), 'plain'), rtol=2e-5,
                             atol=1e-6)


def test_advantages_on_explicit_axes():
  x = spread(make_mesh(AxisType.Explicit))

  def found(x):
    rewards = jnp.where(x['mask'], x['log_probs'], 0.0)
    return gae(rewards, x['log_probs'], x['mask']), group_relative(x['advantages'], 2), whiten(rewards, x['mask'])

  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), jax.jit(found)(x), found(arrays()))


def test_log_probabilities_of_a_spread_vocabulary():
  x = spread(make_mesh(AxisType.Explicit))
  found = jax.jit(lambda x: action_log_probs(x['logits'], x['actions'], x['mask']))(x)
  np.testing.assert_allclose(found, action_log_probs(*(arrays()[n] for n in ('logits', 'actions', 'mask'))), rtol=1e-5)


def test_what_cannot_be_served_is_refused():
  mesh = make_mesh(AxisType.Explicit)
  with pytest.raises(ValueError, match=r'hidden: its axes after the first 2 must not be spread.*reshard'):
    jax.jit(of_hidden)(spread(mesh, hidden=('data', None, 'model')))
  with pytest.raises(ValueError, match=r'ref_embedding: is spread over \(None,\), but embedding over \(.model.,\)'):
    jax.jit(of_hidden)(spread(mesh, ref_embedding=(None,)))
  with pytest.raises(ValueError, match='axis_name: is for arrays inside shard_map'):
    jax.jit(functools.partial(of_hidden, axis_name='model'))(spread(mesh))
  with pytest.raises(ValueError, match="'plain' needs the whole vocabulary"):
    jax.jit(functools.partial(of_hidden, implementation='plain'))(spread(mesh))
  mesh = make_mesh(AxisType.Auto)
  with jax.set_mesh(mesh), pytest.raises(ValueError, match='axes of type Auto'):
    jax.jit(functools.partial(of_hidden, implementation='chunked'))(spread(mesh))


def test_steps_of_the_partitioned_implementation():
  assert pick_steps(8, 4, 100, 2**20) == 1
  devices = jax.device_count()
  assert pick_steps(48, 6, 2048, 2**14) == min(-(-48 * 2048 * 8 // (2**14 * devices)), 6)
  assert pick_steps(0, 0, 2048, 2**14) == 1
  x, want = arrays(), of_record(arrays(), implementation='plain')
  for budget in (2**10, 2**12, 2**13, 2**14, 2**26):  # from one token in a step to all, lengths that do not divide
    found = of_record(x, implementation='partitioned', memory_budget=budget)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), found, want)


def test_one_device_keeps_its_kernels():
  assert pick_implementation(50_000, from_logits=False, backend='tpu') == 'pallas_tpu'
  assert pick_implementation(50_000, from_logits=False, backend='cpu') == 'chunked'


def test_logits_need_no_gather_of_the_vocabulary():
  x = spread(make_mesh(AxisType.Auto))
  text = jax.jit(lambda x: weighted_kl(x['logits'], x['ref_logits'], x['actions'], exponent=3.0)).lower(x).compile()
  assert not moved(text.as_text())


def test_one_device_s_loop_would_gather_the_embedding():
  """Shows that the test of moved arrays can fail, and why `partitioned` is the default on several devices."""
  x = spread(make_mesh(AxisType.Auto))
  text = jax.jit(functools.partial(of_hidden, implementation='chunked')).lower(x).compile().as_text()
  assert max(moved(text)) >= V * D
