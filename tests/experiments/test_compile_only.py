"""What is said of a program before it is run, from programs for CPU devices: their compiler is always there."""

import importlib
import importlib.util
import json
import pathlib

import jax
import pytest
from processes import refused, run

from critkl_jax import sharding
from critkl_jax.config import FINETUNE_PRESETS, PRETRAIN_PRESETS, GPT2Config, replace
from critkl_jax.gpt2 import GPT2
from critkl_jax.tasks.addition import plus_task

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = replace(FINETUNE_PRESETS['smoke'], episodes=8, minibatches=1, rollout='cached')


@pytest.fixture
def compile_only(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module('experiments.compile_only')


def test_memory_is_shared_out_and_collectives_are_counted(compile_only, standard_promotion):
  model = GPT2(CONFIG.model_of(GPT2Config(context_length=384, num_layers=1, num_heads=2, width=64)))
  task = plus_task(1, 0)
  one, eight = (compile_only.compile_step(model, task, CONFIG, sharding.make_mesh(text))
                for text in ('data:1', 'data:4,model:2'))
  assert not one['collectives']
  kinds = {(row['kind'], row['in_loop']) for row in eight['collectives']}
  assert ('all-gather', False) in kinds  # parameters
  assert ('all-reduce', True) in kinds  # of heads and hidden units, in each step of decoding
  for kind in ('policy', 'optimizer', 'reference'):
    assert eight['memory'][kind] < 1.3 * one['memory'][kind] / 8
  shapes = compile_only.state_shapes(model, CONFIG, sharding.make_mesh())
  parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
  assert one['memory']['policy'] == 4 * parameters
  assert one['memory']['optimizer'] == pytest.approx(8 * parameters, rel=1e-3)
  for found in (one, eight):
    known = sum(found['memory'][kind] for kind in ('policy', 'optimizer', 'reference', 'temporary'))
    assert found['memory']['total'] == pytest.approx(known, rel=0.1)


def test_parameters_are_those_of_the_published_models(compile_only):
  published = {'gpt2': 124_439_808, 'gpt2_xl': 1_557_611_200}
  for name, expected in published.items():
    model = GPT2(PRETRAIN_PRESETS[name].model)
    found = compile_only.describe(model, plus_task(1, 1), CONFIG, sharding.make_mesh('data:1'))
    assert found['parameters'] == expected + model.config.width + 1  # the value head


def test_what_cannot_be_is_said_in_one_line():
  assert 'topology: expected one of' in refused('compile_only', '--topology=v99:2x2')
  if importlib.util.find_spec('libtpu') is None:
    assert "pip install '.[tpu]'" in refused('compile_only', '--topology=v5e:2x2')
  assert "the preset 'released' names no sizes" in refused('compile_only', '--preset=released')


def test_a_program_for_a_tpu(tmp_path):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip("the TPU compiler is not installed: pip install '.[tpu]'")
  path = tmp_path / 'found.json'
  out = run('compile_only', '--preset=smoke', '--topology=v5e:2x2', '--mesh=data:2,model:2', f'--json={path}')
  assert 'fits: ' in out
  found = json.loads(path.read_text())
  assert found['fits']
  assert found['memory']['total'] < 2**30
