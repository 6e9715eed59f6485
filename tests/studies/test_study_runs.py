"""Runs of a study on stories: on the device, and with rewards in Python."""

import functools

import jax
import numpy as np
import pytest

from critkl_jax.config import replace
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.runtime import checkpoint
from critkl_jax.runtime.checkpoint import CheckpointInfo
from critkl_jax.studies import study_runs
from critkl_jax.studies.records import run_name
from critkl_jax.tasks.stories import Stories
from critkl_jax.tasks.stories.text import WORDS
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

BASE = replace(FINETUNE_PRESETS['stories'], num_iterations=2, episodes=8, minibatches=2, extra_facts=1, save_every=1)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  config = GPT2Config(vocab_size=len(WORDS), context_length=64, num_layers=1, num_heads=2, width=16)
  home = tmp_path_factory.mktemp('reference')
  info = CheckpointInfo(config, Stories(2, vocab_size=len(WORDS)), PRETRAIN_PRESETS['stories'])
  checkpoint.save_params(home, gpt2(config).init(jax.random.key(0)), info, 1)
  return checkpoint.load_checkpoint(home)


def test_a_run_with_rewards_in_python_has_the_record_of_any_other(standard_promotion, reference, tmp_path):
  asked = [replace(BASE, asks=asks, seed=3) for asks in ('place', 'facts')]
  answers, summaries = (study_runs.run_members([config], BASE, reference, tmp_path, 6)[0] for config in asked)
  assert (answers.name, summaries.name) == ('seed=3', 'asks=facts-seed=3')
  assert answers.known == summaries.known == 2
  assert answers.metrics[0].keys() | {'reward/rouge_l'} == summaries.metrics[0].keys()
  assert len(summaries.metrics) == 2
  assert [row['reward'] == row['reward/rouge_l'] for row in summaries.metrics] == [True, True]
  for record, graded in ((answers, False), (summaries, True)):
    assert list(record.test) == ['N', 'N+1']
    assert ('reward' in record.longer) is graded
    assert record.longer['greedy'].shape == (6,)
    assert 0 < record.longer['critical_probability'].size <= 6
    assert np.isfinite(record.longer['critical_probability']).all()
    assert study_runs.record_path(tmp_path, record.name).is_file()
  assert summaries.metrics[0]['probe_kl_known'] == pytest.approx(0, abs=1e-6)  # before the first update
  assert summaries.metrics[1]['probe_kl_known'] > 0
  assert study_runs.settings_of(reference, asked[1]).asks == 'facts'


def test_a_run_with_rewards_in_python_is_a_group_of_its_own(tmp_path):
  configs = [replace(BASE, asks=asks, seed=seed) for asks in ('place', 'facts') for seed in (0, 1)]
  groups = []
  while configs:
    groups.append(study_runs.next_group(configs, BASE, tmp_path, 8, 1))
    configs = [config for config in configs if config not in groups[-1]]
  assert [[run_name(one, BASE) for one in group] for group in groups] == [
      ['seed=0', 'seed=1'], ['asks=facts-seed=0'], ['asks=facts-seed=1']]


def test_levels_of_stories_are_by_the_number_of_facts(reference, tmp_path):
  config = replace(BASE, asks='facts')
  measure = functools.partial(study_runs.accuracy_by_size, lambda: reference, config, tmp_path, 4, 'x')
  rows = measure()
  assert [row['facts'] for row in rows] == [2, 3]
  assert measure() == rows  # read
