import errno
import json
import math
import os
import pathlib

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, loop, storage, trackers
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

INFO = checkpoint.CheckpointInfo(PRETRAIN_PRESETS['smoke'].model, Addition(1), FINETUNE_PRESETS['smoke'])


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  """Mounts a folder as the bucket `gs://bucket`."""
  root = tmp_path_factory.mktemp('buckets')
  (root / 'bucket').mkdir()
  with buckets.open_buckets(root):
    yield root / 'bucket'


# Paths.


def test_paths_of_this_machine(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  for text, wanted in (('~/x', tmp_path / 'x'), ('x/y', pathlib.Path('x/y')), ('C:x', pathlib.Path('C:x')),
                       ('file:///a/b%20c', pathlib.Path('/a/b c')), (tmp_path, tmp_path)):
    assert storage.to_path(text) == wanted
    assert isinstance(storage.to_path(text), pathlib.Path)
    assert not storage.is_remote(storage.to_path(text))


@pytest.mark.parametrize(('text', 'words'), [
    ('', 'expected a path, got an empty one'),
    ('foo://bucket/run', 'gs:// or s3://BUCKET/PATH'),
    ('foo:/bucket/run', 'gs:// or s3://BUCKET/PATH'),
    ('gs:/bucket/run', 'gs:// or s3://BUCKET/PATH'),
    ('gs://', 'gs:// or s3://BUCKET/PATH'),
    ('file://host/run', 'expected file:///PATH'),
    ('~nobody-of-this-name/x', 'no such user'),
])
def test_paths_that_lead_nowhere(text, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(storage.PathError) as caught:
    storage.to_path(text)
  assert words in str(caught.value)
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_a_bucket_whose_package_is_not_installed(monkeypatch):
  import fsspec

  def missing(scheme):
    raise ImportError(f'Install what reads {scheme}')

  monkeypatch.setattr(fsspec, 'get_filesystem_class', missing)
  with pytest.raises(storage.PathError, match='s3://bucket/run: Install what reads s3'):
    storage.to_path('s3://bucket/run')


def test_files_in_a_bucket(bucket):
  path = storage.to_path('gs://bucket/some/file.txt')
  assert isinstance(path, epath.Path)
  assert storage.resolve(path) == path
  storage.write_json('gs://bucket/file.json', {'x': float('nan')})
  assert json.loads((bucket / 'file.json').read_text()) == {'x': None}
  storage.write_text('gs://bucket/folder/a.txt', 'äb')
  assert storage.to_path('gs://bucket/folder/a.txt').read_bytes().decode() == 'äb'
  storage.remove('gs://bucket/folder')
  storage.remove('gs://bucket/file.json')
  storage.remove('gs://bucket/nothing')
  assert not (bucket / 'folder').exists()
  assert not (bucket / 'file.json').exists()


# Errors of writing.


def test_an_error_of_writing_names_the_file():
  with pytest.raises(PermissionError) as caught, storage.writing('some/file'):
    raise OSError(errno.EACCES, 'Permission denied')
  assert caught.value.filename == 'some/file'
  with pytest.raises(OSError, match='connection lost') as caught, storage.writing('some/file'):
    raise OSError('connection lost')  # as libraries for buckets do
  assert (caught.value.errno, caught.value.filename) == (errno.EIO, 'some/file')


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
  storage.write_text(tmp_path / 'a', 'old')

  def full(self, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  with pytest.raises(OSError, match='No space left on device') as caught:
    storage.write_text(tmp_path / 'a', 'new')
  assert caught.value.filename == str(tmp_path / 'a')
  assert (tmp_path / 'a').read_text() == 'old'


# The layout of JSON.


def test_json_has_a_line_for_each_inner_list_and_lines_full_of_scalars():
  row, curve = {'text': 'y' * 70, 'n': 1}, list(range(60))
  value = {'name': 'x', 'number': 3, 'curve': curve, 'fits': {'a': [0.5, 1.0], 'b': [{}, []]}, 'long': 'z' * 90,
           'short': True, 'next': None, 'not_a_number': math.nan, 'rows': [row, row]}
  row_text = f'{{"text": "{"y" * 70}", "n": 1}}'
  assert storage.to_json_text(value).splitlines() == [
      '{',
      ' "name": "x", "number": 3,',
      f' "curve": {curve},',  # however long it is
      ' "fits": {"a": [0.5, 1.0], "b": [{}, []]},',
      f' "long": "{"z" * 90}", "short": true,',
      ' "next": null, "not_a_number": null,',
      ' "rows": [',
      f'  {row_text},',
      f'  {row_text}',
      ' ]',
      '}']


@pytest.mark.parametrize('value', [
    1, 0.1, math.pi, 'ä"\n', None, True, [], {}, [[]], [{}], {'': {}}, ['x' * 200], [['x' * 200], 'y'],
    {'x' * 200: {'y' * 200: ['z' * 200, {}], 'a': 1}, 'b': 1e-300}, [1, [2, list(range(99)), 'w' * 130], 3, 4],
    [{'a': i, 'b': ['c'] * i, 'd': {'e' * i: i / 7}} for i in range(90)]])
def test_json_is_read_as_it_was_written(value, tmp_path):
  storage.write_json(tmp_path / 'file.json', value)
  text = (tmp_path / 'file.json').read_text()
  assert text == storage.to_json_text(value) + '\n'
  assert json.dumps(json.loads(text)) == json.dumps(value)  # types and order too


@pytest.mark.parametrize('columns', range(100, 125))
def test_lines_of_json_have_no_more_than_120_columns(columns):
  row = {'a': 'x' * (columns - 20), 'b': 1}
  for value in (row, [row, row], {'key': row}, {'key': row, 'other': 2}, {'key': {'inner': row, 'second': row}}):
    assert max(map(len, storage.to_json_text(value).splitlines())) <= 120


# A run in a bucket.


def start():
  return TrainState(params={'w': jnp.zeros(3)}, opt_state={'m': jnp.ones(3)}, step=jnp.int32(0))


@jax.jit
def advance(state):
  moved = {'w': state.params['w'] + state.step.astype(jnp.float32)}
  return state.replace(params=moved, step=state.step + 1), {'loss': moved['w'][0], 'num_tokens': jnp.float32(7)}


def run(workdir, num_steps):
  return loop.run(lambda state, _: advance(state), start(), num_steps, INFO, workdir, 2)


def test_a_run_in_a_bucket_goes_on_and_is_read(bucket, tmp_path, capfd):
  home = 'gs://bucket/run'
  assert not trackers.open_trackers(storage.to_path(home), 0)
  run(home, 4)
  state = run(home, 6)
  assert 'Resuming from step 4 of 6 in gs://bucket/run.' in capfd.readouterr().out
  np.testing.assert_array_equal(state.params['w'], run(tmp_path / 'here', 6).params['w'])
  assert checkpoint.steps_in(f'{home}/checkpoints') == [2, 4, 6]
  assert [row['step'] for row in loop.read_metrics(f'{home}/metrics.jsonl')] == [1, 2, 3, 4, 5, 6]
  assert (bucket / 'run' / 'metrics.jsonl').is_file()


def test_a_damaged_checkpoint_in_a_bucket_is_replaced(bucket, capfd):
  home = 'gs://bucket/damaged'
  wanted = run(home, 4)
  (bucket / 'damaged' / 'checkpoints' / '4' / 'config' / 'metadata').write_text('{')
  np.testing.assert_array_equal(run(home, 4).params['w'], wanted.params['w'])
  assert 'Resuming from step 2, the newest whole one.' in capfd.readouterr().out
  assert checkpoint.steps_in(f'{home}/checkpoints') == [2, 4]
  assert not [x for x in (bucket / 'damaged' / 'checkpoints').iterdir() if 'replaced' in x.name]


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_loaded(bucket):
  from checkpoints import finetuned_workdir

  from critkl_jax.analysis import reading

  finetuned_workdir(storage.to_path('gs://bucket/tuned'), steps=(2,))
  policy, reference = reading.load_pair('gs://bucket/tuned')
  assert policy.path == storage.to_path('gs://bucket/tuned/checkpoints/2')
  assert reference.path == storage.to_path('gs://bucket/tuned/reference/7')
  with pytest.raises(checkpoint.CheckpointError, match='gs://bucket/nothing: no such directory'):
    checkpoint.load_checkpoint('gs://bucket/nothing')
