"""The binaries that analyse checkpoints, as a user starts them."""

import csv
import json
import re

import pytest
from checkpoints import finetuned_workdir
from processes import refused, run

from critkl_jax.runtime import checkpoint

SMALL = ('--problems=2', '--steps=2')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  home = tmp_path_factory.mktemp('runs') / 'some'
  finetuned_workdir(home)
  return home


@pytest.mark.slow
def test_analyze_writes_tables_pictures_and_the_page(workdir, tmp_path):
  said = run('analyze', f'--checkpoints={workdir},{workdir}/checkpoints/2', f'--workdir={tmp_path}', *SMALL,
             '--responses=solution', '--counterfactual=2', '--samples=1')
  lines = said.splitlines()
  assert lines[0] == 'Loading 2 checkpoints and the reference of each'
  assert sum(line.startswith('Reading up to 4 responses of ') for line in lines) == 2
  assert sum(line.startswith('Reading 2 checkpoints of ') for line in lines) == 2
  assert lines[-1] == str(tmp_path / 'report.html')
  assert 'Detectors of critical tokens against oracle' in said
  assert re.search(r"^reference's probability of the right token +0?\.?\d+ +\S+$", said, re.M)
  assert not re.search(r'\b(ref_|right_prob|number\b)', said)
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert len(summary) == 2
  for found in summary.values():
    assert set(found['agreement']['oracle']) == {'threshold', 'quantile', 'counterfactual'}
    assert set(found['agreement']['counterfactual']) == {'threshold', 'quantile', 'oracle'}
    assert found['reference'].endswith('reference/7')
  with (tmp_path / 'tokens.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  own = [row for row in rows if row['checkpoint'] == rows[0]['checkpoint'] and row['response'] == '3']
  assert [int(row['position']) for row in own] == list(range(len(own)))
  text = ''.join(row['text'] for row in own)
  assert text.startswith('\n<scratch>\n')
  assert text.endswith('\n')
  assert {row['right'] for row in own} == {'right'}
  assert sum(float(row['critical/oracle']) for row in own) > 0
  looked = [row['score/counterfactual'] != '' for row in own]
  assert sum(looked) == 2 + sum(row['critical/oracle'] == '1' for row in own)
  assert sum(row['checkpoint'] == rows[0]['checkpoint'] for row in rows) == sum(
      place['number'] for place in next(iter(summary.values()))['places'].values())
  page = (tmp_path / 'report.html').read_text()
  assert all(name in page for name in summary)
  assert str(workdir.parent) not in page  # names, no absolute paths
  assert len(list(tmp_path.glob('*.png'))) == 6
  record = json.loads((tmp_path / 'analysis.json').read_text())
  assert sorted([*record['files'], 'analysis.json', 'run.lock']) == sorted(file.name for file in tmp_path.iterdir())
  assert 'holds another analysis (checkpoints, problems, responses, counterfactual, samples, steps differ)' in refused(
      'analyze', f'--checkpoints={workdir}', f'--workdir={tmp_path}')
  assert (tmp_path / 'report.html').read_text() == page


@pytest.mark.slow
def test_compare_checkpoints(workdir, tmp_path):
  said = run('compare_checkpoints', workdir / 'reference', workdir, '--problems=2', f'--workdir={tmp_path}')
  assert 'h_1/mlp' in said
  found = json.loads((tmp_path / 'comparison.json').read_text())
  assert found['kl']['mean'] > 0
  assert set(found['answers']) == {'1', '2'}
  assert (tmp_path / 'comparison.png').stat().st_size > 1000


def test_results_of_something_else_are_not_overwritten(workdir, tmp_path):
  (tmp_path / 'summary.json').write_text('of a run')
  assert 'summary.json exists and was not written by an analysis' in refused(
      'analyze', f'--checkpoints={workdir}', f'--workdir={tmp_path}', '--overwrite', *SMALL)
  assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [('summary.json', 'of a run')]


@pytest.mark.slow
def test_what_cannot_be_analysed_is_refused_in_one_line(workdir, tmp_path):
  tmp_path = tmp_path / 'new'
  assert 'expected FIRST SECOND and flags' in refused('compare_checkpoints', workdir)
  assert 'no such directory' in refused('analyze', '--checkpoints=/nowhere', f'--workdir={tmp_path}')
  mixed = refused('analyze', f'--checkpoints={workdir},{checkpoint.SHIPPED_REFERENCE}', f'--workdir={tmp_path}')
  assert 'pre-trained on [1, 5] digits' in mixed
  twice = refused('analyze', f'--checkpoints={workdir},{workdir}', f'--workdir={tmp_path}')
  assert 'none of them twice' in twice
  assert '--digits: problems of 9 digits take' in refused(
      'analyze', f'--checkpoints={workdir}', '--digits=9', f'--workdir={tmp_path}', *SMALL)
  assert not tmp_path.exists()
