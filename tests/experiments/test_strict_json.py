"""Strict JSON parsers, and our own readers, can read every file of a run whose numbers are not finite."""

import importlib
import json
import math

import numpy as np
import pytest
from absl import flags

from critkl_jax.config import replace
from critkl_jax.runtime import loop, trackers
from critkl_jax.studies import files
from critkl_jax.studies.records import Record, read_record, run_name, write_record
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training import population
from critkl_jax.training.memory import Memory
from critkl_jax.training.presets import FINETUNE_PRESETS
from experiments import reference

CONFIG = replace(FINETUNE_PRESETS['smoke'], eval_problems=4)


@pytest.fixture(autouse=True)
def no_events(monkeypatch):
  monkeypatch.setattr(trackers, 'open_trackers', lambda *_: ())


def read(path):
  """Reads JSON, or lines of JSON, as strict parsers do."""
  lines = path.read_text().splitlines() if path.suffix == '.jsonl' else [path.read_text()]
  return [json.loads(line, parse_constant=lambda name: pytest.fail(f'{path.name} holds {name}')) for line in lines]


def binary(name):
  """Imports a binary and removes its flags, so that another binary can define them in the same process."""
  module = importlib.import_module(f'experiments.{name}')
  for flag in list(flags.FLAGS):
    if flags.FLAGS.find_module_defining_flag(flag) == module.__name__:
      delattr(flags.FLAGS, flag)
  return module


def write_metrics(workdir):
  workdir.mkdir(parents=True, exist_ok=True)
  writer = loop.MetricsWriter(workdir, 0)
  for step in (1, 2):
    writer.write(step, {'loss': np.nan, 'grad_norm': np.float32(np.inf), 'kl': 0.5, 'accuracy': np.nan, 'seconds': 1.0,
                        'num_tokens': 8.0})
  return read(workdir / 'metrics.jsonl')


def test_a_run_of_nothing_but_nan(tmp_path, capsys):
  (first, _) = write_metrics(tmp_path)
  assert (first['loss'], first['grad_norm'], first['kl']) == (None, None, 0.5)
  tested = {'N': math.nan, 'N+1': 0.5, 'tokens': {'critical_probability': math.nan, 'critical_certainty': None}}
  for _ in range(2):  # the second time it is read from the workdir
    before = reference.tested_before(lambda params: (tested, {}), {}, CONFIG, Addition(1, 1), tmp_path)
    binary('finetune').report(CONFIG, Addition(1, 1), before, tested, tmp_path, 3.0)
    (summary,), (kept,) = read(tmp_path / 'summary.json'), read(tmp_path / 'before.json')
    assert kept['N'] is summary['accuracy']['before']['N'] is summary['accuracy']['after']['N'] is None
    assert summary['last_iteration']['loss'] is None
    assert 'none' in capsys.readouterr().out


def test_a_sweep_of_nothing_but_nan(tmp_path, capsys):
  configs = tuple(replace(CONFIG, seed=seed) for seed in range(2))
  for name in population.names(configs):
    write_metrics(tmp_path / 'members' / name)
  tested = {'N': math.nan, 'N+1': 0.5, 'tokens': {'critical_probability': math.nan}}
  tests = [(tested, {name: np.full(4, np.nan) for name in ('N', 'N+1')})] * 2
  memory = Memory(0, 0, 0, 2, 'vmap')
  binary('sweep').report(CONFIG, configs, Addition(1, 1), {'N': None, 'N+1': 0.5}, tests, memory, tmp_path, 3.0)
  (result,) = read(tmp_path / 'results.json')
  assert result['members'][0]['N'] is result['members'][0]['last_iteration']['loss'] is None
  assert result['comparison']['N'][0]['accuracy'] is None
  assert 'right answers of the reference: none' in capsys.readouterr().out


def test_a_comparison_and_files_of_studies(tmp_path):
  drift = [{'layer': 'wte', 'parameters': 3, 'distance': np.nan, 'relative': np.nan}]
  kl = {'mean': np.nan, 'by_position': np.array([0.5, np.nan])}
  binary('compare_checkpoints').write({'drift': drift, 'kl': kl}, tmp_path)
  (found,) = read(tmp_path / 'comparison.json')
  assert found['kl'] == {'mean': None, 'by_position': [0.5, None]}
  record = Record(run_name(CONFIG, CONFIG), CONFIG, 1, [{'loss': np.nan}],
                  {'N': {'kl_critical': math.inf}, 'N+1': {'kl_critical': math.nan}}, {'seconds': math.nan})
  write_record(tmp_path / 'runs' / 'one.json', record)
  (found,) = read(tmp_path / 'runs' / 'one.json')
  assert found['metrics']['loss'] == [None]
  assert np.isnan(read_record(tmp_path / 'runs' / 'one.json').column('loss')).all()
  files.write_files(tmp_path, {'figures': {'greedy': (np.nan, 0.5, math.inf)}}, [{'a': np.nan}])
  (found,) = read(tmp_path / 'results.json')
  assert found == {'figures': {'greedy': [None, 0.5, None]}}
  assert files.interval_text(found['figures']['greedy']) == 'none'
  assert files.interval_text([0.5, None, None]) == files.interval_text((0.5, math.nan, math.nan)) == '0.500'
