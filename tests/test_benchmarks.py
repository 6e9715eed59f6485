"""The benchmark of compilers as a user starts it, at a tiny size, with the compilers that are installed."""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from compilation import QUICK
from passes import logits

from critkl_jax import gpt2, load_checkpoint, plus_task

ROOT = pathlib.Path(__file__).parents[1]


def start(*flags):
  return subprocess.run([sys.executable, '-m', 'benchmarks.deviceless', *flags], cwd=ROOT, text=True,
                        capture_output=True, env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})


@pytest.fixture
def deviceless(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module('benchmarks.deviceless')


def test_tables_of_a_tpu(tmp_path):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip("the TPU compiler is not installed: pip install '.[tpu]'")
  path = tmp_path / 'tables.json'
  done = start('--target=v5e', '--program=naive', '--program=pallas_tpu', '--size=16,128,2048', '--tall=',
               f'--json={path}')
  assert done.returncode == 0, done.stderr
  (table,) = json.loads(path.read_text())
  rows = table['rows']['v5e']
  assert rows['naive']['whole_logits']
  assert rows['pallas_tpu']['tera_flops'] == pytest.approx(12e-12 * 16 * 128 * 2048)
  assert [line.split()[:2] for line in done.stdout.splitlines()[-2:]] == [['v5e', 'naive'], ['v5e', 'pallas_tpu']]


def test_kernels_of_an_h100(deviceless):
  if 'H100' in deviceless.missing_compilers():
    pytest.skip("the compiler for an H100 is not installed: pip install '.[h100]'")
  done = start('--target=H100', '--program=pallas_gpu', '--size=64,64,1000', '--tall=')
  assert done.returncode == 0, done.stderr
  for kernel in ('weighted_kl_forward', 'weighted_kl_backward'):
    assert f'{kernel}: ' in done.stdout
  assert done.stdout.count(' 0 bytes spilled') == 2


def test_a_compiler_that_is_not_there_is_named(deviceless):
  missing = deviceless.missing_compilers()
  if not missing:
    pytest.skip('all compilers are installed')
  target, extra = next(iter(missing.items()))
  done = start(f'--target={target}')
  assert done.returncode == 1
  assert f"{target}: skipped, the compiler is not installed: pip install '.[{extra}]'" in done.stdout
  assert 'error: no compiler' in done.stderr


def test_flops_count_a_loop_as_often_as_it_runs(deviceless):
  def loss(x, y):
    return jax.lax.fori_loop(0, 5, lambda _, x: x @ y, x)

  jaxpr = jax.jit(loss).trace(jnp.ones((2, 3)), jnp.ones((3, 3))).jaxpr
  assert deviceless.product_flops(jaxpr) == 5 * 2 * 2 * 3 * 3


@pytest.mark.parametrize(('message', 'expected'), [
    ('Error: RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (15.84G) exceeds (15.75G).',
     'out of memory: needs 15.84G of 15.75G'),
    ('Error: Ran out of memory in memory space hbm. Used 39.05G of 15.75G hbm. Exceeded hbm capacity by 23.30G.',
     'out of memory: needs 39.05G of 15.75G'),
    ('ValueError: a reason', 'ValueError: a reason'),
    ('', ''),
])
def test_reasons_in_one_line(deviceless, message, expected):
  assert deviceless.reason(f'some warning\n{message}\n') == expected


@pytest.fixture
def models(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module('benchmarks.models')


@pytest.mark.slow
def test_a_widened_model_writes_as_the_shipped_one(models):
  shipped = load_checkpoint()
  config, params, known_digits = models.load('small')
  assert known_digits == shipped.info.task.known_digits
  task = plus_task(known_digits, 0)
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(0), 2))
  prompt, solution = jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)
  tokens = jnp.concatenate([prompt.tokens, solution.tokens], 1)
  mask = jnp.concatenate([prompt.mask, solution.mask], 1)
  found, wanted = (jax.nn.log_softmax(logits(gpt2(c), p, tokens, mask))
                   for c, p in ((config, params), (shipped.info.model, shipped.params)))
  assert sum(x.size for x in jax.tree.leaves(params)) > 2.5e6
  assert jnp.max(jnp.abs(found - wanted)[mask]) < 0.05
  with pytest.raises(ValueError, match='large'):
    models.widen(params, config, shipped.info.model)


@pytest.mark.parametrize(('name', 'flags'), [
    ('rollout', ['--presets=tiny', '--episodes=2', '--repeats=1', '--window=8']),
    ('train_step', ['--presets=tiny', '--episodes=2', '--repeats=1'])])
@pytest.mark.slow
def test_timings_are_written(tmp_path, name, flags):
  path = tmp_path / 'found.json'
  done = subprocess.run([sys.executable, '-m', f'benchmarks.{name}', *flags, f'--json={path}'], cwd=ROOT, text=True,
                        capture_output=True, env=os.environ | {
                            'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': QUICK})
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())['tiny']
  if name == 'rollout':
    assert {'teacher_forced', 'cached', 'speculative', 'default'} <= found.keys()
    assert 0 < found['sequential_steps']['speculative'] < found['sequential_steps']['cached']
  else:
    assert {'rollout', 'reward', 'reference', 'advantages', 'update', 'pretrain', 'whole'} == found['seconds'].keys()
    assert 0 < found['fraction']['update'] < 1
