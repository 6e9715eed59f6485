import concurrent.futures
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax.config import flat_fields, flat_values, replace, rules_of
from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, failure_signatures, interruption, loop, pretraining, resuming, trackers
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

CONFIG = FINETUNE_PRESETS['smoke']
INFO = checkpoint.CheckpointInfo(model=PRETRAIN_PRESETS['smoke'].model, task=Addition(1), training=CONFIG)


@pytest.fixture(autouse=True)
def no_events(monkeypatch):
  monkeypatch.setattr(trackers, 'open_trackers', lambda *_: ())


def start():
  return TrainState(params={'w': jnp.zeros(3)}, opt_state={'m': jnp.ones(3)}, step=jnp.int32(0))


@jax.jit
def draw(state):
  noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state.step), (3,))
  moved = {'w': 0.9 * state.params['w'] + noise}
  return state.replace(params=moved, step=state.step + 1), {'loss': noise[0], 'num_tokens': jnp.float32(7)}


def run(workdir, num_steps, step=lambda state, _: draw(state), info=INFO, save_every=2):
  return loop.run(step, start(), num_steps, info, workdir, save_every)


def logged(workdir):
  return [(row['step'], row['loss']) for row in loop.read_metrics(workdir / 'metrics.jsonl')]


def test_one_line_a_step_and_checkpoints(tmp_path):
  state = run(tmp_path, 5)
  assert state.step == 5
  rows = loop.read_metrics(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5]
  assert all(row['tokens_per_second'] == pytest.approx(7 / row['seconds']) for row in rows)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [2, 4, 5]


def test_signatures_of_failure_are_metrics_and_warned_of_once(tmp_path, caplog):
  writer = loop.MetricsWriter(tmp_path, 0)
  for step, kl in enumerate([0.01, 0.9, 0.9, 0.02], start=1):
    writer.write(step, {'kl': kl, 'kl_critical': np.nan, 'loss': np.nan})
  rows = loop.read_metrics(tmp_path / 'metrics.jsonl')
  assert [row['signature/drift'] for row in rows] == [0, 1, 1, 0]
  assert all('kl_critical' not in row and np.isnan(row['loss']) for row in rows)
  assert [record.getMessage() for record in caplog.records if 'drift' in record.getMessage()] == [
      f'{tmp_path}, step 2: drift: {failure_signatures.MEANING["drift"]}.']


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
  whole = run(tmp_path / 'whole', 7)

  def dies(state, number):
    if number == 5:
      raise KeyboardInterrupt
    return draw(state)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'parts', 7, dies)
  assert checkpoint.steps_in(tmp_path / 'parts' / 'checkpoints') == [2, 4]
  resumed = run(tmp_path / 'parts', 7)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert logged(tmp_path / 'parts') == logged(tmp_path / 'whole')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(tmp_path, number):
  def signalled(state, done):
    if done == 2:
      os.kill(os.getpid(), number)
    return draw(state)

  before = signal.getsignal(number)
  with pytest.raises(interruption.Interrupted, match=f'{number.name} after step 3 of 9; step 3 is saved'):
    run(tmp_path, 9, signalled, save_every=100)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [3]
  assert signal.getsignal(number) == before
  jax.tree.map(np.testing.assert_array_equal, run(tmp_path, 9).params, run(tmp_path / 'whole', 9).params)


@pytest.mark.parametrize(('when', 'stopped'), [('in the last step', 3), ('in the last save', 3), ('in a save', 2)])
def test_a_signal_at_the_end_or_in_a_save_is_obeyed_at_once(tmp_path, monkeypatch, when, stopped):
  def signals(done):
    if done == (2 if when == 'in the last step' else 'saving'):
      os.kill(os.getpid(), signal.SIGTERM)

  def step(state, done):
    signals(done)
    return draw(state)

  save = checkpoint.save
  monkeypatch.setattr(checkpoint, 'save', lambda *args, **options: (save(*args, **options), signals('saving')))
  with pytest.raises(interruption.Interrupted, match=f'SIGTERM after step {stopped} of 3; step {stopped} is saved'):
    run(tmp_path, 3, step, save_every=2 if when == 'in a save' else 100)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [stopped]
  monkeypatch.undo()
  assert run(tmp_path, 3, lambda state, _: draw(state)).step == 3


def test_runs_in_threads_side_by_side_are_those_of_the_main_thread(tmp_path):
  handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  wanted = run(tmp_path / 'main', 5)
  both = threading.Barrier(2, timeout=60)

  def together(state, done):
    both.wait()
    return draw(state)

  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    found = [threads.submit(run, tmp_path / name, 5, together) for name in 'ab']
  for name, state in zip('ab', found):
    jax.tree.map(np.testing.assert_array_equal, state.result(), wanted)
    assert logged(tmp_path / name) == logged(tmp_path / 'main')
    assert checkpoint.steps_in(tmp_path / name / 'checkpoints') == [2, 4, 5]
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
def test_pretraining_in_a_thread(tmp_path):
  def pretrain():
    with jax.numpy_dtype_promotion('standard'):  # a setting of the thread
      return pretraining.pretrain(PRETRAIN_PRESETS['smoke'], tmp_path)

  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    state = thread.submit(pretrain).result()
  found = checkpoint.load_checkpoint(tmp_path / 'reference')
  jax.tree.map(np.testing.assert_array_equal, found.params, state.params)


def test_lines_after_the_checkpoint_are_dropped_and_an_unfinished_one_too(tmp_path):
  run(tmp_path, 2)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps({'step': 3, 'loss': 99.0}) + '\n{"step": 4, "lo')
  run(tmp_path, 4)
  assert logged(tmp_path) == logged_of_whole(tmp_path)


def logged_of_whole(tmp_path):
  run(tmp_path / 'whole', 4)
  return logged(tmp_path / 'whole')


def test_a_finished_run_does_nothing(tmp_path):
  run(tmp_path, 3)
  before = (tmp_path / 'metrics.jsonl').read_text()
  state = run(tmp_path, 3, step=None)
  assert state.step == 3
  assert (tmp_path / 'metrics.jsonl').read_text() == before


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
  run(tmp_path, 2)
  other = checkpoint.CheckpointInfo(INFO.model, Addition(1), replace(CONFIG, kl_coefficient=9.0))
  with pytest.raises(checkpoint.CheckpointError, match=r'kl_coefficient: 0\.5 then, 9\.0 now'):
    run(tmp_path, 4, info=other)
  longer = checkpoint.CheckpointInfo(INFO.model, Addition(1), replace(CONFIG, num_iterations=9, save_every=7))
  assert run(tmp_path, 4, info=longer).step == 4


def damage(path):
  (path / 'config' / 'metadata').write_text('{')


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(tmp_path, capsys):
  wanted = run(tmp_path, 7)
  damage(tmp_path / 'checkpoints' / '7')
  shutil.rmtree(tmp_path / 'checkpoints' / '6' / 'params')
  with pytest.raises(checkpoint.CheckpointError, match=r'7: its config .* Step 4 is whole; --damaged=skip resumes'):
    loop.run(None, start(), 7, INFO, tmp_path, 2, damaged='refuse')
  seen = []

  def step(state, number):
    seen.append(checkpoint.steps_in(tmp_path / 'checkpoints'))
    return draw(state)

  again = run(tmp_path, 9, step, save_every=5)
  said = [line for line in capsys.readouterr().out.splitlines() if 'damaged' in line or 'cannot be read' in line]
  assert len(said) == 1
  assert said[0].endswith('Resuming from step 4, the newest whole one.')
  assert seen[0] == [2, 4, 6, 7]  # nothing is removed before
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [2, 4, 5, 9]
  assert [step for step, _ in logged(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
  jax.tree.map(np.testing.assert_array_equal, run(tmp_path / 'whole', 9).params, again.params)
  assert wanted.step == 7


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path):
  run(tmp_path, 4)
  for step in (2, 4):
    damage(tmp_path / 'checkpoints' / str(step))
  with pytest.raises(checkpoint.CheckpointError, match=r'4: its config .* No other checkpoint is whole'):
    run(tmp_path, 4)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [2, 4]


def test_what_cannot_be_written_says_from_where_the_run_goes_on(tmp_path, monkeypatch):
  write = pathlib.Path.open

  def full(path, mode='r', *rest, **options):
    if mode == 'a' and checkpoint.steps_in(tmp_path / 'checkpoints') == [2]:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(path, mode, *rest, **options)

  monkeypatch.setattr(pathlib.Path, 'open', full)
  with pytest.raises(OSError, match='No space left on device') as caught:
    run(tmp_path, 5)
  assert caught.value.filename == str(tmp_path / 'metrics.jsonl')
  assert caught.value.__notes__ == [f'the last whole checkpoint in {tmp_path} is step 2']
  monkeypatch.undo()
  assert run(tmp_path, 5).step == 5


def test_the_host_looks_at_metrics_one_step_late(tmp_path, monkeypatch):
  order = []
  monkeypatch.setattr(loop.MetricsWriter, 'write', lambda self, step, metrics: order.append(f'log {step}'))

  def step(state, number):
    order.append(f'step {number + 1}')
    return draw(state)

  run(tmp_path, 3, step, save_every=100)
  assert order == ['step 1', 'step 2', 'log 1', 'step 3', 'log 2', 'log 3']


def test_the_bar_fits_80_columns(tmp_path, capsys):
  def step(state, number):
    state, metrics = draw(state)
    return state, metrics | {'accuracy': jnp.float32(0.5), 'kl': jnp.float32(0.0043)}

  loop.run(step, start(), 3, INFO, tmp_path, 2, show=('accuracy', 'kl'))
  bars = [line for line in capsys.readouterr().err.replace('\r', '\n').splitlines() if '|' in line]
  assert 'acc 0.50  kl .0043' in bars[-1]
  assert 'tok/s' in bars[-1]
  assert max(map(len, bars)) <= 80


def test_where_a_run_goes_on_is_said(tmp_path, capsys):
  run(tmp_path, 2)
  assert 'Resuming' not in capsys.readouterr().out
  run(tmp_path, 3)
  assert f'Resuming from step 2 of 3 in {tmp_path}.' in capsys.readouterr().out
  run(tmp_path, 3)
  assert 'there is nothing to train' in capsys.readouterr().out


def test_seconds_and_the_estimate_leave_compilation_out(tmp_path, monkeypatch, capsys):
  compiled = [0.0]
  monkeypatch.setattr(loop, 'compilation_seconds', lambda: compiled[0])

  def compiling(state, number):
    if number == 1:
      time.sleep(1.2)
      compiled[0] += 1.2
    return draw(state)

  loop.run(compiling, start(), 3, INFO, tmp_path, 5)
  rows = loop.read_metrics(tmp_path / 'metrics.jsonl')
  assert sum(row['seconds'] for row in rows) < 1.0
  assert '| 00:00<' in capsys.readouterr().err.replace('\r', '\n').splitlines()[-1]


def test_tensorboard_events_are_written_where_it_is_installed(tmp_path, monkeypatch):
  pytest.importorskip('tensorboardX')
  monkeypatch.undo()
  run(tmp_path, 2)
  assert list(tmp_path.glob('events.out.tfevents.*'))


OTHER = {int: lambda x: x + 1, float: lambda x: x / 2 + 0.2, bool: lambda x: not x}
OTHERS = {'task': 'questions', 'algorithm': 'a2c', 'kl': 'standard', 'kl_estimator': 'exact', 'kl_placement': 'reward',
          'certainty': 'max_prob', 'kl_gate': 'oracle', 'reference': 'elsewhere', 'certainty_ensemble': 'one,two',
          'advantage': 'leave_one_out', 'value_head': 'mlp', 'dtype': 'bfloat16', 'attention': 'xla',
          'rollout': 'cached', 'ratio': 'sequence', 'aggregation': 'sequences', 'dual_clip': 3.0, 'episodes': 8,
          'episodes_per_problem': 2, 'minibatches': 4, 'chat_options': '{"a": 1}',
          'model': 'elsewhere', 'prompts': 'other.jsonl', 'stop': 'x', 'reward': 'exact_match', 'reward_weights': '2',
          'dataset_options': '{"size": 3}', 'asks': 'facts'}
QUESTIONS = {'task': 'questions', 'prompts': 'p.jsonl'}
REWARDS = QUESTIONS | {'reward': 'f1', 'response_length': 5}
NEEDED = {'gate_threshold': {'kl_gate': 'threshold'}, 'gate_fraction': {'kl_gate': 'kl_cov'},
          'aggregation_length': {'aggregation': 'fixed_length'},
          **dict.fromkeys(('model', 'prompts', 'chat', 'stop', 'response_length', 'held_out', 'reward_workers',
                           'reward_seconds'), QUESTIONS),
          **dict.fromkeys(('reward', 'reward_weights', 'success'), REWARDS), 
          **{name: {'task': 'stories'} for name in ('extra_facts', 'asks')},
          'dataset_options': {'task': 'questions', 'prompts': 'reasoning_gym:x', 'response_length': 5},
          'chat_options': QUESTIONS | {'chat': True},
          **{name: {'advantage': 'gae'} for name, rule in rules_of(type(CONFIG)).items() if 'advantage' in rule}}


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  """Makes a workdir of one step for each config, by config."""
  found = {}
  for needed in ({}, *NEEDED.values()):
    config = replace(CONFIG, **needed)
    if config not in found:
      found[config] = tmp_path_factory.mktemp('workdir')
      info = dataclasses.replace(INFO, training=config)
      checkpoint.save_params(found[config] / 'checkpoints', start().params, info, 2)
  return found


@pytest.mark.parametrize('name', sorted(flat_fields(type(CONFIG))))
def test_a_run_goes_on_with_other_settings_exactly_where_they_change_no_update(workdirs, name):
  config = replace(CONFIG, **NEEDED.get(name, {}))
  info, workdir = dataclasses.replace(INFO, training=config), workdirs[config]
  value = flat_values(config)[name]
  beside = {'prompts': 'p.jsonl'} if name == 'task' else {}
  other = replace(config, **beside, **{name: OTHERS[name] if name in OTHERS else OTHER[type(value)](value)})
  if name in resuming.FREE_FIELDS | resuming.ROUNDING_FIELDS:
    assert resuming.check_workdir(workdir, dataclasses.replace(info, training=other)) == 2
  else:
    with pytest.raises(checkpoint.CheckpointError, match=f'{name}: |no such directory'):
      resuming.check_workdir(workdir, dataclasses.replace(info, training=other))


def test_settings_that_round_otherwise_are_said_once(tmp_path, capsys):
  run(tmp_path, 2)
  other = dataclasses.replace(INFO, model=dataclasses.replace(INFO.model, remat=True, dtype='bfloat16'),
                              training=replace(CONFIG, remat=True, dtype='bfloat16', window=3, eval_problems=9))
  run(tmp_path, 4, info=other)
  out = capsys.readouterr().out
  assert out.count('updates are the same up to rounding') == 1
  assert 'training/window: 0 then, 3 now' in out
  assert "training/dtype: '' then, 'bfloat16' now" in out
  assert 'eval_problems' not in out
  assert checkpoint.read_info(tmp_path / 'checkpoints' / '4').training.eval_problems == 9


def test_the_same_reference_may_be_given_by_another_path(tmp_path):
  params = {'w': np.ones(3, np.float32)}
  pretrained = dataclasses.replace(INFO, training=PRETRAIN_PRESETS['smoke'])
  for place in (tmp_path / 'run' / 'reference', tmp_path / 'moved'):
    checkpoint.save_params(place, params, pretrained, 4)
  checkpoint.save_params(tmp_path / 'other', {'w': np.zeros(3, np.float32)}, pretrained, 4)
  checkpoint.save_params(tmp_path / 'run' / 'checkpoints', start().params, INFO, 2)

  def check(place):
    training = replace(CONFIG, reference=tmp_path / place)
    return resuming.check_workdir(tmp_path / 'run', dataclasses.replace(INFO, training=training))

  assert check('moved') == 2
  with pytest.raises(checkpoint.CheckpointError, match="training/reference: '' then, "):
    check('other')
