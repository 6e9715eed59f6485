"""Settings of all tests: strict types and ranks, several CPU devices, the PRNG that goldens are written for."""

import os
import shutil
import tempfile

from compilation import QUICK

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8 {QUICK}'

import jax
import pytest

from critkl_jax.models.gpt2 import GPT2, GPT2Config

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_prng_impl', 'threefry2x32')
jax.config.update('jax_threefry_partitionable', True)


def pytest_configure(config):
  """Gives all workers, and the binaries that tests start, one cache of compiled programs: many are compiled again."""
  if os.environ.get('WARNINGS_ARE_ERRORS'):
    config.getini('filterwarnings').insert(0, 'error')  # first, so that the exceptions after it hold
  if not hasattr(config, 'workerinput'):
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp()
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    config.add_cleanup(lambda: shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True))


def pytest_collection_modifyitems(config, items):
  """Leaves the long tests out unless the command asks for them by their marker."""
  if 'long' not in config.option.markexpr:
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker('long')])
    items[:] = [item for item in items if not item.get_closest_marker('long')]


@pytest.fixture
def standard_promotion():
  """For tests that run an optimizer or a bfloat16 layer norm: Optax and Flax rely on implicit type promotion."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='session')
def small_model():
  """A model of two blocks, and parameters whose value head is not the zeros it starts with."""
  model = GPT2(GPT2Config(vocab_size=11, context_length=32, num_layers=2, num_heads=2, width=16))
  params = model.init(jax.random.key(0), jax.numpy.zeros((1, 1), jax.numpy.int32))['params']
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys)]
  return model, jax.tree.unflatten(structure, noisy)


@pytest.fixture
def figures(monkeypatch):
  """The figures that a test draws, kept instead of written."""
  from matplotlib.figure import Figure

  found = []
  monkeypatch.setattr(Figure, 'savefig', lambda self, *_, **__: found.append(self))
  return found
