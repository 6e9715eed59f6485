"""A workdir with results of another binary is refused, and nothing in it changes."""

import pytest
from checkpoints import SMOKE, finetuned_workdir, write
from processes import refused

from critkl_jax.config import replace
from critkl_jax.runtime import checkpoint, locks, loop
from critkl_jax.runtime.pretraining import pretrain
from critkl_jax.runtime.storage import WorkdirError
from critkl_jax.training.presets import FINETUNE_PRESETS
from experiments import paths, workdirs


@pytest.fixture(scope='module')
def finetuned(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finetuned')
  finetuned_workdir(workdir)
  return workdir


def contents(workdir):
  return {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


@pytest.mark.parametrize('binary', ['pretrain', 'sweep', 'reproduce'])
@pytest.mark.slow
def test_the_workdir_of_a_fine_tuning_run_is_refused(finetuned, binary):
  before = contents(finetuned)
  line = refused(binary, '--preset=smoke', f'--workdir={finetuned}')
  assert 'holds a fine-tuning run (experiments.finetune); give another directory.' in line
  assert contents(finetuned) == before


@pytest.mark.slow
def test_a_comparison_of_others_is_not_written_over(finetuned, tmp_path):
  for mark, words in (('studies.json', 'holds studies'), ('members.json', 'holds a sweep')):
    (tmp_path / mark).write_text('{}')
    assert words in refused('compare_checkpoints', finetuned / 'reference', finetuned, f'--workdir={tmp_path}')
    (tmp_path / mark).unlink()
  (tmp_path / 'comparison.json').write_text('{"first": "elsewhere", "problems": 3}')
  line = refused('compare_checkpoints', finetuned / 'reference', finetuned, f'--workdir={tmp_path}', '--problems=3')
  assert "first: 'elsewhere' then, " in line
  assert 'problems' not in line
  assert (tmp_path / 'comparison.json').read_text() == '{"first": "elsewhere", "problems": 3}'


def test_fewer_iterations_than_a_sweep_has_made_are_refused(finetuned, tmp_path):
  config = FINETUNE_PRESETS['smoke']
  names = [f'certainty_exponent={x}' for x in ('0.0', '150.0')]
  params = checkpoint.load_checkpoint(finetuned).params
  for name, exponent in zip(names, (0.0, 150.0)):
    write(tmp_path / 'members' / name / 'checkpoints', params, 2, training=replace(
        config, certainty_exponent=exponent, reference=str(finetuned / 'reference')))
  line = refused('sweep', '--preset=smoke', '--seeds=1', '--num_iterations=1',
                 f'--reference={finetuned / "reference"}', f'--workdir={tmp_path}')
  assert line.startswith('error: --num_iterations: ')
  assert 'holds step 2, which is beyond 1' in line


def test_the_reference_of_another_pretraining_is_refused(finetuned, tmp_path):
  params = checkpoint.load_checkpoint(finetuned / 'reference').params
  write(tmp_path / 'reference', params, 4)
  with pytest.raises(checkpoint.CheckpointError, match=r'learning_rate: 0\.\d+ then, 0\.5 now'):
    pretrain(replace(SMOKE, learning_rate=0.5), tmp_path)
  assert not (tmp_path / 'metrics.jsonl').exists()
  assert loop.read_metrics(tmp_path / 'metrics.jsonl') == []


def test_a_pretraining_does_not_go_on_from_a_fine_tuning(finetuned):
  with pytest.raises(checkpoint.CheckpointError, match='made with other settings'):
    pretrain(SMOKE, finetuned)


def claim(workdir, binary):
  with workdirs.held:
    workdirs.claim(workdir, binary)


MARKS = {'members.json', 'studies.json', 'comparison.json'}  # they identify runs of older versions
WRITTEN = [(binary, name) for binary, names in workdirs._WRITES.items() for name in names if name not in MARKS]


@pytest.mark.parametrize(('binary', 'name'), WRITTEN)
def test_a_file_that_a_run_would_write_over_is_refused_by_name(tmp_path, binary, name):
  mine = tmp_path / name if '.' in name else tmp_path / name / 'mine'
  mine.parent.mkdir(exist_ok=True)
  mine.write_text('mine')
  with pytest.raises(WorkdirError, match=f'{tmp_path / name} exists, and no run wrote it; move it away'):
    claim(tmp_path, binary)
  assert contents(tmp_path) == {mine: b'mine'}
  (tmp_path / locks.LOCK).touch()  # a run has been here
  claim(tmp_path, binary)


@pytest.mark.parametrize('binary', workdirs._WRITES)
def test_other_files_are_in_no_ones_way(tmp_path, binary):
  (tmp_path / 'notes.txt').touch()
  (tmp_path / 'checkpoints').mkdir()
  claim(tmp_path, binary)
  claim(tmp_path / 'new', binary)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['checkpoints', 'notes.txt']


def test_a_workdir_of_an_older_version_is_known_by_its_checkpoints(finetuned):
  before = contents(finetuned)
  (finetuned / 'summary.json').touch()
  claim(finetuned, 'finetune')
  (finetuned / 'summary.json').unlink()
  with pytest.raises(WorkdirError, match='holds a fine-tuning run'):
    claim(finetuned, 'sweep')
  assert contents(finetuned) == before


@pytest.mark.parametrize('text', ['mine', '', '[]', '{"step": 1}', '\xff'])
def test_a_table_is_not_written_over_a_file_of_others(tmp_path, capsys, text):
  file = tmp_path / 'table.json'
  workdirs.refuse_other_file(str(file), ('checkpoint', 'step'), 'json')
  file.write_text(text, encoding='latin-1')
  with pytest.raises(SystemExit) as end:
    workdirs.refuse_other_file(str(file), ('checkpoint', 'step'), 'json')
  assert end.value.code == 2
  assert f'--json: {file} exists, and this command did not write it' in capsys.readouterr().err
  file.write_text('{"checkpoint": "x", "step": 3}')
  workdirs.refuse_other_file(str(file), ('checkpoint', 'step'), 'json')


def test_a_url_of_this_machine_is_checked_as_its_path_is(capsys):
  with pytest.raises(SystemExit):
    paths.read_workdir('workdir', 'file:///proc/none')
  assert 'file:///proc/none cannot be written' in capsys.readouterr().err
