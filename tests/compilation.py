"""XLA flags for programs that take longer to compile than to run."""

QUICK = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'  # the second halves what is left
