import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_except

from critkl_jax.models.attention import BLOCK, causal_attention
from critkl_jax.models.gpt2 import GPT2, GPT2Config


@pytest.fixture(params=slow_except((2 * BLOCK + 37,), (1, BLOCK - 1, BLOCK, 2 * BLOCK + 37)))
def operands(request):
  length = request.param
  keys = jax.random.split(jax.random.key(0), 4)
  query, key, value, weight = (jax.random.normal(k, (2, length, 3, 8)) for k in keys)
  mask = jnp.arange(length)[None] >= jnp.array([0, length // 3])[:, None]
  return (query, key, value), mask, jnp.where(mask[:, :, None, None], weight, 0.0)


def plain(query, key, value, mask):
  sees = mask[:, None, None] | jnp.eye(mask.shape[1], dtype=bool)[None, None]
  return jax.nn.dot_product_attention(query, key, value, mask=sees, is_causal=True, implementation='xla')


def test_blocks_give_what_the_whole_gives(operands):
  qkv, mask, weight = operands
  found, wanted = causal_attention(*qkv, mask), plain(*qkv, mask)
  np.testing.assert_allclose(found[mask], wanted[mask], atol=2e-6)
  loss = lambda attention: lambda qkv: jnp.sum(attention(*qkv, mask) * weight)
  found, wanted = (jax.grad(loss(attention))(qkv) for attention in (causal_attention, plain))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, wanted)


def test_keys_past_a_block_are_never_multiplied():
  shape = jax.ShapeDtypeStruct((1, 4 * BLOCK, 1, 8), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, 4 * BLOCK), jnp.bool_)
  jaxpr = jax.make_jaxpr(causal_attention)(shape, shape, shape, mask)
  scores = [eqn.outvars[0].aval.shape for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == 'dot_general']
  assert [s[-1] for s in scores[::2]] == [BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK]


def test_bfloat16_softmax_is_taken_in_float32():
  keys = jax.random.split(jax.random.key(1), 3)
  qkv = [jax.random.normal(k, (1, 200, 2, 16)) for k in keys]
  exact = causal_attention(*qkv, jnp.ones((1, 200), bool))
  low = causal_attention(*(x.astype(jnp.bfloat16) for x in qkv), jnp.ones((1, 200), bool))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.05)


def test_a_query_that_sees_nothing_gives_no_nan():
  qkv = [jax.random.normal(jax.random.key(2), (1, 5, 1, 4))] * 3
  assert jnp.all(jnp.isfinite(causal_attention(*qkv, jnp.zeros((1, 5), bool))))


def test_an_implementation_that_is_not_here_is_named():
  model = GPT2(GPT2Config(vocab_size=5, context_length=8, num_layers=1, num_heads=1, width=8, dtype='bfloat16',
                          attention='cudnn'))
  words = "attention: 'cudnn' needs an NVIDIA GPU, and the devices here are cpu; take 'auto'"
  with jax.numpy_dtype_promotion('standard'), pytest.raises(ValueError, match=words):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
