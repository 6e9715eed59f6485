"""Compilation in tests: XLA flags for programs that take longer to compile than to run, and a check that none is."""

import contextlib
import importlib.metadata

# A flag that a jaxlib does not know ends its process. Up to 0.11 the second one halves what is left.
_KNOWS_FUSION_EMITTERS = tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 12)
QUICK = '--xla_backend_optimization_level=0' + _KNOWS_FUSION_EMITTERS * ' --xla_cpu_use_fusion_emitters=false'


@contextlib.contextmanager
def compiles_nothing():
  """Fails if a program is traced or compiled inside.

  A jitted function's `_cache_size` cannot tell: JAX may drop an entry at any time, and the number is 0 then.
  """
  from critkl_jax.runtime.compilation import compilation_seconds  # imports JAX, which the flags above must precede

  before = compilation_seconds()
  yield
  assert compilation_seconds() == before
