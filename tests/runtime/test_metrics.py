"""metrics.jsonl has the lines that the checkpoint holds, whatever happens to the file."""

import numpy as np
import pytest
from test_loop import INFO, draw, run, start

from critkl_jax.runtime import checkpoint, locks, metrics, trackers
from critkl_jax.runtime.storage import WorkdirError


@pytest.fixture(autouse=True)
def no_events(monkeypatch):
  monkeypatch.setattr(trackers, 'open_trackers', lambda *_: ())


GOOD = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'
# Damaged second line -> words of the error.
BROKEN = {
    b'\xff\xfe': 'line 2 has a byte that is not UTF-8',
    b'7': 'line 2: expected an object of JSON, got int',
    b'[1]': 'line 2: expected an object of JSON, got list',
    b'"text"': 'line 2: expected an object of JSON, got str',
    b'{"loss": 1.0}': 'line 2 has no step',
    b'{"step": "2"}': 'line 2 has no step',
    b'{"step": 2, "loss": "low"}': 'line 2: loss is not a number',
    b'{"step": 2, "lo': 'line 2 is not JSON',
    b'': 'line 2 is empty',
    b'[' * 100_000: 'line 2 is not JSON',
}


@pytest.mark.parametrize('line', BROKEN, ids=lambda line: line[:12].decode('latin-1'))
def test_a_broken_line_is_named(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
  with pytest.raises(WorkdirError) as error:
    metrics.read_metrics(path)
  assert f'{path} is damaged ({BROKEN[line]}' in str(error.value)
  assert 'remove that line' in str(error.value)


def test_only_a_last_line_that_is_unfinished_is_left_out(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert metrics.read_metrics(path) == []
  path.write_bytes(GOOD + b'{"step": 3, "lo')
  rows = metrics.read_metrics(path)
  assert [row['step'] for row in rows] == [1, 2]
  assert np.isnan(rows[1]['loss'])
  path.write_bytes(GOOD + b'{"step": 3}')
  assert [row['step'] for row in metrics.read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize('finished', [False, True])
@pytest.mark.parametrize('damage', ['', '7\n', None, '\xff', '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n'])
def test_a_checkpoint_restores_lines_that_were_lost_or_changed(tmp_path, capsys, damage, finished):
  run(tmp_path, 4)
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes()
  if damage is None:
    path.unlink()
  else:
    path.write_text(damage, encoding='latin-1')
  run(tmp_path, 4 if finished else 6)
  assert path.read_bytes().startswith(before)
  assert [row['step'] for row in metrics.read_metrics(path)] == list(range(1, 5 if finished else 7))
  said = f'{path}: lines were missing or had been changed; restored from the checkpoint of step 4.'
  assert said in capsys.readouterr().out
  run(tmp_path, 6)
  if not finished:
    assert 'restored' not in capsys.readouterr().out


def test_lines_of_later_steps_may_be_damaged(tmp_path, capsys):
  """Lines of later steps are dropped in any case."""
  run(tmp_path, 2)
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(b'\xff\n7\n')
  run(tmp_path, 4)
  assert 'restored' not in capsys.readouterr().out
  assert [row['step'] for row in metrics.read_metrics(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4]


def of_an_older_version(workdir):
  for step in checkpoint.steps_in(workdir / 'checkpoints'):
    (workdir / 'checkpoints' / str(step) / 'rows' / 'metadata').unlink()
  (workdir / locks.LOCK).unlink()


def test_a_run_of_an_older_version_goes_on_and_says_what_it_lacks(tmp_path, capsys):
  run(tmp_path, 4)
  of_an_older_version(tmp_path)
  path = tmp_path / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(lines[0] + lines[3])
  run(tmp_path, 4)
  assert 'has lines of 2 of the 4 finished steps only' in capsys.readouterr().out
  path.write_text(lines[0] + '7\n' + lines[3])
  with pytest.raises(WorkdirError, match=r'metrics.jsonl is damaged \(line 2'):
    run(tmp_path, 6)
  path.write_text(''.join(lines))
  run(tmp_path, 6)
  assert 'lacks' not in capsys.readouterr().out
  assert [row['step'] for row in metrics.read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_whose_metrics_are_damaged_does_no_harm(tmp_path, capsys):
  run(tmp_path, 2)
  before = (tmp_path / 'metrics.jsonl').read_text()
  for text in ('', '{}', '{"zlib_base85": "abc"}', '[]', '{"zlib_base85": 3}'):
    (tmp_path / 'checkpoints' / '2' / 'rows' / 'metadata').write_text(text)
    run(tmp_path, 2)
    assert 'metrics.jsonl is taken as it is' in capsys.readouterr().out
    assert (tmp_path / 'metrics.jsonl').read_text() == before


def test_a_file_that_no_run_wrote_is_kept(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(GOOD)
  with pytest.raises(WorkdirError, match='exists, and no run wrote it'):
    run(tmp_path, 2)
  assert path.read_bytes() == GOOD
  assert [file.name for file in tmp_path.iterdir()] == ['metrics.jsonl']


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(tmp_path):
  def dies(state, number):
    if number == 3:
      raise KeyboardInterrupt
    return draw(state)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, 5, dies, save_every=100)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == []
  run(tmp_path, 5)
  assert [row['step'] for row in metrics.read_metrics(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4, 5]


def test_two_runs_in_one_workdir_are_refused(tmp_path):
  def starts_another(state, number):
    with locks.hold(tmp_path):  # the same run may
      pass
    return draw(state)

  run(tmp_path, 1, starts_another)
  locks._held[tmp_path] = locks._Held(thread=0, known=True)  # as another thread does
  try:
    with pytest.raises(WorkdirError, match='another thread'):
      run(tmp_path, 3)
  finally:
    del locks._held[tmp_path]
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [1]


def test_the_lines_of_a_long_run_take_little_room(tmp_path):
  """Each checkpoint holds all lines so far."""
  writer = metrics.MetricsWriter(tmp_path, 0)
  numbers = np.random.default_rng(0)
  row = lambda: {f'metric_{i}': np.float32(numbers.normal()) for i in range(30)}
  for step in range(1, 401):
    writer.write(step, row())
  text = writer.text()
  assert text == (tmp_path / 'metrics.jsonl').read_text()
  with checkpoint.open_manager(tmp_path / 'checkpoints') as manager:
    checkpoint.save(manager, start(), INFO, rows=writer.packed())
  size = (tmp_path / 'checkpoints' / '0' / 'rows' / 'metadata').stat().st_size
  assert metrics.saved_lines(tmp_path / 'checkpoints' / '0') == text
  assert size < 0.7 * len(text)
