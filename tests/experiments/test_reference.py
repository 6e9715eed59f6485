"""A run keeps its reference in its workdir, and never removes files of others."""

import json
import shutil

import jax
import pytest
from checkpoints import SMOKE, noisy, write

from critkl_jax.config import replace
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime import checkpoint, storage
from critkl_jax.runtime.storage import WorkdirError
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.presets import FINETUNE_PRESETS
from experiments import reference
from experiments.reference import keep_reference, load_reference


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Makes two checkpoints of the same step to start from."""
  params = gpt2(SMOKE.model).init(jax.random.key(0))
  paths = [tmp_path_factory.mktemp('sources') / name for name in ('one', 'two')]
  for seed, path in enumerate(paths):
    write(path, noisy(params, 0.1, seed), 7)
  return paths


def config(source):
  return replace(FINETUNE_PRESETS['smoke'], reference=str(source))


def begin(source, workdir):
  found = load_reference(config(source), workdir)
  keep_reference(workdir, found)
  return found


def contents(directory):
  return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob('*') if path.is_file()}


def same(source, workdir):
  return checkpoint.same_params(checkpoint.latest(source), checkpoint.latest(workdir / 'reference'))


def test_reading_changes_nothing_and_keeping_marks_the_copy(sources, tmp_path):
  workdir = tmp_path / 'run'
  found = load_reference(config(sources[0]), workdir)
  assert not workdir.exists()
  keep_reference(workdir, found)
  assert same(sources[0], workdir)
  mark = json.loads((workdir / 'reference' / reference.MARK).read_text())
  assert mark == {'workdir': str(workdir), 'copy_of': str(found.path)}
  assert sorted(path.name for path in workdir.iterdir()) == ['reference']


def test_the_users_only_copy_is_used_where_it_is(sources, tmp_path):
  kept = tmp_path / 'reference'
  shutil.copytree(sources[0], kept)
  before = contents(tmp_path)
  for source in (kept, checkpoint.latest(kept), sources[0]):  # the last one has the same parameters
    begin(source, tmp_path)
    assert contents(tmp_path) == before


def test_another_reference_of_the_user_is_refused_by_name_and_kept(sources, tmp_path):
  shutil.copytree(sources[0], tmp_path / 'reference')
  before = contents(tmp_path)
  with pytest.raises(WorkdirError, match='reference exists, and this run did not make it: it is kept'):
    begin(sources[1], tmp_path)
  assert contents(tmp_path) == before


@pytest.mark.parametrize('marked', [False, True])
def test_notes_are_kept(sources, tmp_path, marked):
  if marked:
    begin(sources[0], tmp_path)
  (tmp_path / 'reference').mkdir(exist_ok=True)
  (tmp_path / 'reference' / 'notes.txt').write_text('mine')
  before = contents(tmp_path)
  with pytest.raises(WorkdirError, match='it is kept'):
    begin(sources[1], tmp_path)
  assert contents(tmp_path) == before


def test_a_file_of_that_name_is_kept(sources, tmp_path):
  (tmp_path / 'reference').write_text('mine')
  with pytest.raises(WorkdirError, match='it is kept'):
    begin(sources[0], tmp_path)


def test_a_copy_made_for_another_workdir_is_the_users(sources, tmp_path):
  begin(sources[0], tmp_path / 'one')
  shutil.copytree(tmp_path / 'one' / 'reference', tmp_path / 'two' / 'reference')
  with pytest.raises(WorkdirError, match='it is kept'):
    begin(sources[1], tmp_path / 'two')


def test_an_own_copy_of_a_run_that_saved_nothing_is_replaced(sources, tmp_path):
  begin(sources[0], tmp_path)
  begin(sources[1], tmp_path)
  assert same(sources[1], tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['reference']


@pytest.mark.parametrize('where', ['save', 'swap'])
def test_a_process_that_ends_while_it_keeps_loses_nothing(sources, tmp_path, monkeypatch, where):
  begin(sources[0], tmp_path)

  def dies(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(*((checkpoint, 'save_params') if where == 'save' else (reference.storage, 'replace_directory')), dies)
    with pytest.raises(KeyboardInterrupt):
      begin(sources[1], tmp_path)
  assert same(sources[0], tmp_path)
  begin(sources[1], tmp_path)
  assert same(sources[1], tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['reference']


@pytest.mark.parametrize('name', ['reference.unfinished', 'reference.replaced'])
def test_a_folder_of_the_user_with_a_name_of_ours_is_kept(sources, tmp_path, name):
  (tmp_path / name).mkdir()
  (tmp_path / name / 'novel.txt').write_text('mine')
  with pytest.raises(WorkdirError, match='no run wrote it; move it away'):
    begin(sources[0], tmp_path)
  assert (tmp_path / name / 'novel.txt').read_text() == 'mine'


def test_a_run_of_an_older_version_goes_on(sources, tmp_path):
  """Runs of older versions have checkpoints, and a reference without a mark."""
  shutil.copytree(sources[0], tmp_path / 'reference')
  write(tmp_path / 'checkpoints', checkpoint.load_checkpoint(sources[0]).params, 2, config(sources[0]))
  before = contents(tmp_path)
  found = begin(sources[1], tmp_path)  # the runner refuses that the config is another
  assert found.path == checkpoint.latest(tmp_path / 'reference')
  assert contents(tmp_path) == before


def test_the_references_test_is_read_again_where_it_was_made_alike(sources, tmp_path, capsys):
  found, asked = load_reference(config(sources[0]), tmp_path), []
  result = {'N': 0.5, 'N+1': 0.25, 'tokens': {'kl': 0.0}}

  def test(params):
    asked.append(1)
    return dict(result), {}

  usual = config(sources[0])

  def times(expected, of=usual, params=found.params):
    asked.clear()
    assert reference.tested_before(test, params, of, Addition(1, 1), tmp_path) == result
    assert len(asked) == expected

  times(1)
  times(0)
  times(1, replace(usual, eval_problems=3))
  times(1)
  times(1, params=noisy(found.params, 0.1))
  times(1)
  file = tmp_path / 'before.json'
  for text, said in (('', 'is damaged (line 1 is empty); the reference is tested again'), ('7', 'got int'),
                     ('{"N"', 'line 1 is not JSON'), ('{"N": 0.5}', ''), ('{}', '')):
    file.write_text(text)
    times(1)
    assert said in capsys.readouterr().out
    times(0)
  file.write_text(json.dumps(result))  # of an older version
  times(1)
  write(tmp_path / 'checkpoints', found.params, 2, config(sources[0]))
  file.write_text(json.dumps(result))
  times(0)


def test_a_copy_is_made_where_the_disk_was_full_at_its_first_file(sources, tmp_path, monkeypatch):
  found = load_reference(config(sources[0]), tmp_path)

  def full(path, *_):
    path.with_name(f'{path.name}.unfinished').touch()
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(storage, 'write_bytes', full)
    with pytest.raises(OSError, match='No space'):
      keep_reference(tmp_path, found)
  begin(sources[1], tmp_path)
  assert same(sources[1], tmp_path)
