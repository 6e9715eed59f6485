import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from critkl_jax import sharding
from critkl_jax.config import replace
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.runtime.footprint import Collective, collectives, compile_footprint, num_parameters, state_shapes
from critkl_jax.tasks.addition import plus_task
from critkl_jax.training import population
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

CONFIG = replace(FINETUNE_PRESETS['smoke'], episodes=8, minibatches=1, rollout='cached')
MODEL = gpt2(CONFIG.model_of(GPT2Config(context_length=384, num_layers=1, num_heads=2, width=64)))


def compiled_text(fn, *arrays):
  mesh = sharding.make_mesh('data:8')
  place = jax.sharding.NamedSharding(mesh, PartitionSpec('data'))
  return jax.jit(sharding.on_mesh(mesh, fn)).lower(*(jax.device_put(x, place) for x in arrays)).compile().as_text()


def summed(x):
  """Sums over devices once outside and five times inside a loop."""

  def add(_, y):
    return jax.lax.pcast(jax.lax.psum(y, 'data'), 'data', to='varying') * y

  def local(x):
    return jax.lax.fori_loop(0, 5, add, x) + jax.lax.psum(x, 'data')

  return jax.shard_map(local, in_specs=PartitionSpec('data'), out_specs=PartitionSpec('data'))(x)


def test_collectives_are_counted_in_and_out_of_loops():
  found = collectives(compiled_text(summed, jnp.ones((8, 3))))
  assert found == [Collective('all-reduce', False, 1, 12), Collective('all-reduce', True, 1, 12)]


def test_a_program_of_one_device_has_none():
  assert collectives(jax.jit(jnp.sum).lower(jnp.ones(3)).compile().as_text()) == []


@pytest.mark.parametrize(('line', 'expected'), [
    ('  %a = f32[4,8]{1,0} all-gather(%x), dimensions={0}', Collective('all-gather', False, 1, 128)),
    ('  %a = (bf16[4]{0}, f32[2]{0}) all-reduce(%x, %y), to_apply=%add', Collective('all-reduce', False, 1, 16)),
    ('  %a = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}', Collective('all-gather', False, 1, 32)),
    ('  %a = (f32[4]{0}, f32[2]{0}) all-reduce-start(%x, %y), to_apply=%add', Collective('all-reduce', False, 1, 24)),
    ('  %a = ((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0}), u32[]) reduce-scatter-start(%x, %y), to_apply=%add',
     Collective('reduce-scatter', False, 1, 12)),
    ('  ROOT %a = bf16[2,2]{1,0:T(8)} reduce-scatter(%x), to_apply=%add', Collective('reduce-scatter', False, 1, 8)),
])
def test_sizes_are_those_of_results(line, expected):
  assert collectives(f'ENTRY %main (x: f32[4]) -> f32[4] {{\n{line}\n}}\n') == [expected]


def test_what_a_loop_calls_is_in_the_loop():
  text = """
%inner (x: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%x), to_apply=%add
}
%wide.body.1 (x: f32[4]) -> f32[4] {
  %c = f32[4]{0} conditional(%p, %x, %x), branch_computations={%inner, %other}
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%x), condition=%until, body=%wide.body.1
}
"""
  assert collectives(text) == [Collective('all-reduce', True, 1, 16)]


@pytest.mark.slow
def test_memory_is_shared_out_and_collectives_are_counted(standard_promotion):
  one, eight = (compile_footprint(MODEL, plus_task(1, 0), (CONFIG,), sharding.make_mesh(text))
                for text in ('data:1', 'data:4,model:2'))
  assert not one.collectives
  kinds = {(row.kind, row.in_loop) for row in eight.collectives}
  assert ('all-gather', False) in kinds  # of parameters
  assert ('all-reduce', True) in kinds  # of heads and hidden units, in each step of decoding
  for kind in ('policy', 'optimizer', 'reference'):
    assert eight.memory[kind] < 1.3 * one.memory[kind] / 8
  assert one.memory['policy'] == 4 * num_parameters(MODEL)
  assert one.memory['optimizer'] == pytest.approx(8 * num_parameters(MODEL), rel=1e-3)
  for found in (one, eight):
    known = sum(found.memory[kind] for kind in ('policy', 'optimizer', 'reference', 'temporary', 'program'))
    assert found.memory['total'] == pytest.approx(known, rel=0.1)


@pytest.mark.slow
def test_members_take_a_state_each_and_share_the_reference(standard_promotion):
  configs = population.product(CONFIG, seed=range(4))
  found = compile_footprint(MODEL, plus_task(1, 0), configs, sharding.make_mesh('member:2'))
  size = num_parameters(MODEL)
  assert found.memory['policy'] == 2 * 4 * size
  assert found.memory['reference'] == 4 * size
  assert not any(row.in_loop for row in found.collectives)  # devices do not wait for each other


def test_parameters_are_those_of_the_published_models():
  for name, published in {'gpt2': 124_439_808, 'gpt2_xl': 1_557_611_200}.items():
    model = gpt2(PRETRAIN_PRESETS[name].model)
    assert num_parameters(model) == published + model.config.width + 1  # the value head


def test_shapes_are_those_of_the_state():
  mesh = sharding.make_mesh('data:4,model:2')
  kernel = state_shapes(MODEL, CONFIG, mesh).params['h_0']['mlp']['c_fc']['kernel']
  assert kernel.shape == (64, 256)
  assert kernel.sharding.shard_shape(kernel.shape) == (16, 128)
