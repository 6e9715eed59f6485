"""Metrics reach the trackers in groups."""

import json
import sys
import types

from critkl_jax.config import flat_values
from critkl_jax.runtime import trackers
from critkl_jax.runtime.loop import MetricsWriter
from critkl_jax.training.presets import FINETUNE_PRESETS


class FakeRun:
  def __init__(self, **kwargs):
    self.kwargs, self.rows, self.finished = kwargs, [], False

  def log(self, metrics, step):
    self.rows.append((step, metrics))

  def finish(self):
    self.finished = True


def test_names_are_grouped_and_none_is_lost():
  assert len(set(trackers.GROUPED.values())) == len(trackers.GROUPED)
  assert all('/' in name for name in trackers.GROUPED.values())
  assert trackers.grouped({'kl_critical': 1.0, 'signature/drift': 0.0, 'mine': 2.0}) == {
      'kl/critical': 1.0, 'signature/drift': 0.0, 'mine': 2.0}


def test_wandb_gets_each_step_in_one_run_a_workdir(tmp_path, monkeypatch):
  runs = []
  fake = types.SimpleNamespace(init=lambda **kwargs: runs.append(FakeRun(**kwargs)) or runs[-1])
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  config = FINETUNE_PRESETS['smoke']
  track = trackers.with_wandb('critical', flat_values(config), open_others=lambda *_: ())
  for first in (0, 1):
    writer = MetricsWriter(tmp_path, first, track)
    writer.write(first + 1, {'accuracy': 0.5, 'num_tokens': 3})
    writer.close()
  logged = {'reward/accuracy': 0.5, 'rollout/num_tokens': 3.0}
  assert [run.rows for run in runs] == [[(1, logged)], [(2, logged)]]
  assert all(run.finished and run.kwargs['project'] == 'critical' for run in runs)
  assert runs[0].kwargs['id'] == runs[1].kwargs['id']
  assert runs[0].kwargs['config']['kl'] == 'prioritized'
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['accuracy'] for line in lines] == [0.5, 0.5]
