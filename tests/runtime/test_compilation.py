"""The compilation cache changes no number, and the time of compilation is measured."""

import os
import subprocess
import sys
import time

import jax
import pytest
from compilation import compiles_nothing

from critkl_jax.config import replace
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime import compilation
from critkl_jax.tasks.addition import plus_task
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS
from critkl_jax.training.train_step import make_train_step

COMPUTES = '''
import sys, jax, jax.numpy as jnp
from critkl_jax.runtime import compilation
compilation.keep_programs(sys.argv[1])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
x = jax.random.normal(jax.random.key(0), (64, 64))
print(float(jax.jit(lambda x: jnp.sum(jnp.tanh(x @ x)))(x)).hex())
'''


def compute(directory):
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  found = subprocess.run([sys.executable, '-c', COMPUTES, directory], env=environment, text=True, capture_output=True,
                         check=True)
  return found.stdout


def test_damaged_programs_are_compiled_anew(tmp_path):
  first = compute(tmp_path)
  files = [path for path in tmp_path.rglob('*') if path.is_file() and path.name.endswith('-cache')]
  assert files
  assert compute(tmp_path) == first
  for i, path in enumerate(files):
    whole = path.read_bytes()
    path.write_bytes((whole[:len(whole) // 2], b'', whole[:-9] + b'\0' * 9)[i % 3])
  assert compute(tmp_path) == first


def test_processors_do_not_share_programs(tmp_path):
  compute(tmp_path)
  (own,) = tmp_path.iterdir()
  assert own.name == compilation._processor()


def test_the_clock_counts_what_is_nested_once():
  clock = compilation._Clock()
  time.sleep(0.05)
  clock.add('/jax/core/compile/inner', 0.02)
  clock.add('/jax/core/compile/outer', 0.04)
  clock.add('/jax/other', 99.0)
  assert 0.03 < clock.seconds() < 0.05


@pytest.mark.slow
def test_a_train_step_in_a_loop_compiles_once():
  config = replace(FINETUNE_PRESETS['smoke'], extra_digits=0, rollout='cached')
  model = gpt2(config.model_of(PRETRAIN_PRESETS['smoke'].model))
  params = model.init(jax.random.key(0))
  state, step = init_finetuning(model, config, params), make_train_step(model, plus_task(1, 0), config)
  key, hyperparameters = finetuning_keys(config)[1], Hyperparameters.of(config)
  with jax.numpy_dtype_promotion('standard'):
    state, _ = step(state, key, hyperparameters)
    with compiles_nothing():
      step(state, key, hyperparameters)
