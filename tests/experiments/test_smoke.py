"""Each binary runs once at its smallest settings, and writes its files with finite numbers."""

import json
import math

import pytest
from checkpoints import finetuned_workdir
from processes import metrics, run

from critkl_jax.models.huggingface import load_pretrained
from critkl_jax.runtime import checkpoint


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  home = tmp_path_factory.mktemp('runs') / 'some'
  finetuned_workdir(home, steps=(2,))
  return home


def read(*parts):
  return json.loads(parts[0].joinpath(*parts[1:]).read_text())


def test_pretrain(tmp_path):
  run('pretrain', '--preset=smoke', '--num_steps=1', '--eval_problems=0', f'--workdir={tmp_path}')
  (row,) = metrics(tmp_path)
  assert row['loss'] == pytest.approx(math.log(41), abs=0.5)  # of 41 characters, before anything is learned
  assert (tmp_path / 'reference').is_dir()


def test_finetune(workdir, tmp_path):
  run('finetune', '--preset=smoke', f'--reference={workdir / "reference"}', '--num_iterations=1', '--eval_problems=2',
      f'--workdir={tmp_path}')
  (row,) = metrics(tmp_path)
  assert row['kl'] == pytest.approx(0, abs=1e-6)  # the policy of the first iteration is the reference
  assert math.isfinite(row['loss'])
  accuracy = read(tmp_path, 'summary.json')['accuracy']
  assert {(when, digits) for when in accuracy for digits in accuracy[when]} == {
      (when, digits) for when in ('before', 'after') for digits in ('N', 'N+1')}


def test_evaluate(workdir, tmp_path):
  run('evaluate', f'--checkpoint={workdir}', '--digits=1', '--distribution=varying', '--num_problems=2',
      f'--json={tmp_path / "table.json"}')
  table = read(tmp_path, 'table.json')
  assert table['step'] == 2
  assert [(row['digits'], row['num_problems']) for row in table['accuracy']] == [(1, 2)]


def test_sweep(workdir, tmp_path):
  run('sweep', '--preset=smoke', f'--reference={workdir / "reference"}', '--num_iterations=1', '--eval_problems=0',
      '--seeds=1', '--certainty_exponents=0,150', '--extra_digits=0', '--rollout=cached', f'--workdir={tmp_path}')
  members = read(tmp_path, 'results.json')['members']
  assert len(members) == 2
  assert all([row['step'] for row in metrics(tmp_path / 'members' / one['name'])] == [1] for one in members)


@pytest.mark.slow
def test_stories(tmp_path):
  home = tmp_path / 'pretrained'
  run('pretrain', '--preset=stories', '--known_facts=2', '--num_steps=3', '--warmup_steps=1', '--batch_size=4',
      '--num_layers=1', '--width=16', '--num_heads=2', '--eval_problems=4', f'--workdir={home}')
  assert [row['set'] for row in read(home, 'summary.json')['accuracy']] == ['2', '4', '6']
  run('finetune', '--task=stories', f'--reference={home / "reference"}', '--extra_facts=1', '--num_iterations=1',
      '--episodes=4', '--minibatches=2', '--eval_problems=2', f'--workdir={tmp_path / "run"}')
  assert list(read(tmp_path, 'run', 'summary.json')['accuracy']['before']) == ['N', 'N+1']
  run('evaluate', f'--checkpoint={tmp_path / "run"}', '--facts=1,4', '--num_problems=2',
      f'--json={tmp_path / "table.json"}')
  assert [(row['set'], row['num_problems']) for row in read(tmp_path, 'table.json')['accuracy']] == [('1', 2), ('4', 2)]
  run('analyze', f'--checkpoints={tmp_path / "run"}', '--problems=2', f'--workdir={tmp_path / "analysis"}')
  page = (tmp_path / 'analysis' / 'report.html').read_text()
  assert 'stories each of 2 and of 3 facts' in page
  assert 'Where is' in page
  run('finetune', '--task=stories', '--asks=facts', f'--reference={home / "reference"}', '--extra_facts=1',
      '--num_iterations=1', '--episodes=4', '--minibatches=2', '--eval_problems=2', f'--workdir={tmp_path / "facts"}')
  (row,) = metrics(tmp_path / 'facts')
  assert row['reward/rouge_l'] == row['reward']
  sample = json.loads((tmp_path / 'facts' / 'samples.jsonl').read_text().splitlines()[0])
  assert 'Summarize: Where is' in sample['prompt']
  run('evaluate', f'--checkpoint={home}', '--asks=facts', '--facts=1', '--num_problems=2',
      f'--json={tmp_path / "asked.json"}')
  assert [row['set'] for row in read(tmp_path, 'asked.json')['accuracy']] == ['1']
  run('analyze', f'--checkpoints={tmp_path / "facts"}', '--problems=2', f'--workdir={tmp_path / "analysis_facts"}')
  assert 'write down the facts that show' in (tmp_path / 'analysis_facts' / 'report.html').read_text()


@pytest.mark.slow
def test_the_reference_of_stories_in_the_package_knows_them(tmp_path):
  run('evaluate', f'--checkpoint={checkpoint.SHIPPED_REFERENCES["stories"]}', '--facts=4', '--num_problems=64',
      f'--json={tmp_path / "table.json"}')
  assert read(tmp_path, 'table.json')['accuracy'][0]['accuracy'] > 0.9


def test_export(workdir, tmp_path):
  run('export', f'--checkpoint={workdir}', f'--directory={tmp_path / "model"}')
  assert load_pretrained(tmp_path / 'model').model.config.width == 32


def test_compare_checkpoints(workdir, tmp_path):
  run('compare_checkpoints', workdir / 'reference', workdir, '--problems=1', '--digits=1', f'--workdir={tmp_path}',
      quick=True)
  assert read(tmp_path, 'comparison.json')['kl']['mean'] > 0


def test_analyze(workdir, tmp_path):
  run('analyze', f'--checkpoints={workdir}', '--problems=1', '--digits=2', '--steps=0', '--responses=solution',
      f'--workdir={tmp_path}', quick=True)
  (found,) = read(tmp_path, 'summary.json').values()
  assert found['places']['critical']['number'] > 0
  assert found['places']['critical']['kl'] > 0
  assert (tmp_path / 'report.html').stat().st_size > 1000


def test_reproduce(tmp_path):
  run('reproduce', '--preset=smoke', '--study=certainty_gap', '--seeds=1', '--problems=2', f'--workdir={tmp_path}')
  assert (tmp_path / 'working' / 'references' / 'base' / 'reference').is_dir()
  assert read(tmp_path, 'studies', 'certainty_gap', 'results.json')
  assert 'certainty_gap' in (tmp_path / 'README.md').read_text()
