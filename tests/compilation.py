"""XLA flags for programs that take longer to compile than to run."""

import importlib.metadata

# A flag that a jaxlib does not know ends its process. Up to 0.11 the second one halves what is left.
_KNOWS_FUSION_EMITTERS = tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 12)
QUICK = '--xla_backend_optimization_level=0' + _KNOWS_FUSION_EMITTERS * ' --xla_cpu_use_fusion_emitters=false'
