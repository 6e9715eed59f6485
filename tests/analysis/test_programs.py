import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from critkl_jax import sharding
from critkl_jax.analysis.programs import Collective, collectives


def compiled_text(fn, *arrays):
  mesh = sharding.make_mesh('data:8')
  place = jax.sharding.NamedSharding(mesh, PartitionSpec('data'))
  return jax.jit(sharding.on_mesh(mesh, fn)).lower(*(jax.device_put(x, place) for x in arrays)).compile().as_text()


def summed(x):
  """Sums over devices once, and five times in a loop."""

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
    ('  ROOT %a = bf16[2,2]{1,0:T(8,128)} reduce-scatter(%x), to_apply=%add', Collective('reduce-scatter', False, 1, 8)),
])
def test_sizes_are_those_of_results(line, expected):
  assert collectives(f'ENTRY %main (x: f32[4]) -> f32[4] {{\n{line}\n}}\n') == [expected]


def test_what_a_loop_calls_is_in_the_loop():
  text = """
%inner (x: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%x), to_apply=%add
}
%body (x: f32[4]) -> f32[4] {
  %c = f32[4]{0} conditional(%p, %x, %x), branch_computations={%inner, %other}
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%x), condition=%condition, body=%body
}
"""
  assert collectives(text) == [Collective('all-reduce', True, 1, 16)]
