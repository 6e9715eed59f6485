"""The command that repeats the paper's studies, on a reference of four steps."""

import json

import pytest
from processes import refused, run

from critkl_jax.runtime import checkpoint
from critkl_jax.studies.records import read_record
from critkl_jax.training.presets import FINETUNE_PRESETS


@pytest.mark.slow
def test_studies_are_made_in_pieces_share_runs_and_can_be_read(tmp_path):
  flags = ('--preset=smoke', '--seeds=1', '--problems=6', f'--workdir={tmp_path}')
  out = run('reproduce', *flags, '--study=drift,certainty_gap', '--minutes=0', devices=None)
  assert '3 runs are left; the same command makes them.' in out
  assert 'certainty_gap: Is the reference less certain' in out
  out = run('reproduce', *flags, '--study=drift,certainty_gap,pretraining_levels')
  assert 'certainty_gap: already made' in out
  assert '3 runs to make, 3 now: seed=0' in out
  records = {path.stem: read_record(path) for path in (tmp_path / 'runs').glob('*.json')}
  assert set(records) == {'seed=0', 'kl=standard-seed=0', 'kl=none-seed=0'}
  one = records['seed=0']
  assert one.config == FINETUNE_PRESETS['smoke']
  assert one.known == 1
  assert len(one.metrics) == one.config.num_iterations == 2
  assert {len(one.test[digits][kind]) for digits in ('N', 'N+1') for kind in ('greedy', 'sampled')} == {6}
  # The policy of the first iteration is the reference: KL 0, and the same probabilities in all runs.
  assert all(abs(record.column('probe_kl_other')[0]) < 1e-6 for record in records.values())
  assert len({float(record.column('critical/probability')[0]) for record in records.values()}) == 1
  policy = checkpoint.load_checkpoint(tmp_path / 'working' / 'runs' / 'seed=0')
  assert (policy.step, policy.info.task.known_digits, policy.info.training) == (2, 1, one.config)
  assert (tmp_path / 'working' / 'runs' / 'seed=0' / 'reference').resolve() == (
      tmp_path / 'working' / 'references' / 'base' / 'reference').resolve()
  page = (tmp_path / 'studies' / 'drift' / 'README.md').read_text()
  assert 'Not complete' not in page
  index = (tmp_path / 'README.md').read_text()
  assert '## [drift](studies/drift/README.md)' in index
  assert '## [certainty_gap](studies/certainty_gap/README.md)' in index
  assert '| arms | KL at critical tokens, N+1 | KL at other tokens, N+1 | ' in index
  assert '\n| prioritized minus standard | ' in index
  results = json.loads((tmp_path / 'studies' / 'drift' / 'results.json').read_text())
  assert results['num_missing'] == 0
  assert not list((tmp_path / 'working' / 'groups').iterdir())
  page = (tmp_path / 'studies' / 'pretraining_levels' / 'README.md').read_text()  # of the same runs
  assert 'Left out at preset smoke' in page
  assert '| base | 1 | 0.0 [0.0, 45.9] / 0.0 [0.0, 45.9] |' in page  # of six problems
  kept = json.loads((tmp_path / 'references' / 'base.certainty.json').read_text())
  assert (kept['known'], kept['sets'], kept['generations']) == (1, 1, 64)

  # Two further references and a run are missing, and are not made for a page of what is there.
  run('reproduce', *flags, '--study=overconfidence', '--minutes=0')
  assert {path.name for path in (tmp_path / 'working' / 'references').iterdir()} == {'base'}
  page = (tmp_path / 'studies' / 'overconfidence' / 'README.md').read_text()
  assert '| certainty of the reference | 1 |' in page
  assert 'certainty of three references |' not in page

  line = next(line for line in run('reproduce', *flags, '--list').splitlines() if line.startswith('ablation'))
  assert line.split()[1:3] == ['8', '6']  # of its runs, two are there
  assert "--problems: the records in" in refused('reproduce', *flags, '--problems=7')
  assert "--study: there is no 'drft'; the nearest is 'drift', of core, all, certainty_gap" in refused(
      'reproduce', *flags, '--study=drft')
