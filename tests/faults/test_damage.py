"""Damage to every file of a checkpoint is refused, or changes nothing that is read."""

import contextlib
import random
import shutil

import jax
import numpy as np
import pytest
from checkpoints import SMOKE

from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime import checkpoint
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.pretrain_step import init_pretraining

INFO = checkpoint.CheckpointInfo(SMOKE.model, Addition(SMOKE.addition.known_digits), SMOKE)
STEP = 3


@pytest.fixture(scope='module')
def state():
  """Parameters and optimizer state that nothing but the checkpoint holds: no zeros, which would not be stored."""
  shapes = jax.eval_shape(lambda: init_pretraining(gpt2(SMOKE.model), SMOKE))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes).replace(
      ref_params=None, step=np.int32(STEP))


@pytest.fixture
def saved(tmp_path, state):
  with contextlib.closing(checkpoint.open_manager(tmp_path)) as manager:
    checkpoint.save(manager, state, INFO)
  return tmp_path / str(STEP)


def files_of(path):
  return sorted(file for file in path.rglob('*') if file.is_file())


def truncated(data, rng):
  return data[:rng.randrange(1, len(data))]


def flipped(data, rng):
  place = rng.randrange(len(data))
  return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1:]


def emptied(data, rng):
  return b''


@contextlib.contextmanager
def damaged(file, damage, rng):
  """Damages a file, and mends it at the end."""
  data = file.read_bytes()
  file.unlink()
  if damage == 'directory':
    file.mkdir()
  elif damage != 'removed':
    file.write_bytes({'truncated': truncated, 'flipped': flipped, 'emptied': emptied}[damage](data, rng))
  try:
    yield
  finally:
    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    file.write_bytes(data)


def is_refused(path, state):
  """Returns whether the checkpoint is refused in one line that names it; what is read must be what was saved."""
  target = jax.tree.map(np.zeros_like, state)
  try:
    if checkpoint.latest(path.parent) is None:  # not complete, as those are that a killed process leaves
      return True
    info, found = checkpoint.read_info(path), checkpoint.restore(path, target)
  except checkpoint.CheckpointError as error:
    return str(path) in str(error) and '\n' not in str(error)
  assert info == INFO
  jax.tree.map(np.testing.assert_array_equal, found, state)
  return False


def try_all(saved, state, damages, files=None, seed=0):
  """Damages files in all ways, one at a time; returns how often, and how often it was refused."""
  rng, tried, refused = random.Random(seed), 0, 0
  for file in files or files_of(saved):
    for damage in damages:
      with damaged(file, damage, rng):
        tried += 1
        try:
          refused += is_refused(saved, state)
        except Exception as error:
          raise AssertionError(f'{file.relative_to(saved)} {damage}') from error
  assert not is_refused(saved, state)
  print(f'{tried} kinds of damage, {refused} refused, {tried - refused} changed nothing that is read')
  return tried, refused


def largest(saved, item):
  return max(files_of(saved / item), key=lambda file: file.stat().st_size)


def test_damage_to_arrays_and_config_is_refused(saved, state):
  tried, refused = try_all(saved, state, ['truncated', 'flipped', 'removed'],
                           [largest(saved, 'params'), saved / 'config' / 'metadata'])
  assert refused == tried == 6


def test_a_changed_digit_of_the_config_is_refused(saved, state):
  file = saved / 'config' / 'metadata'
  text = file.read_text()
  places = [i for i, character in enumerate(text) if character.isdigit()]
  for place in random.Random(0).sample(places, 40):
    file.write_text(f'{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1:]}')
    assert is_refused(saved, state), text[place - 30:place + 5]
  file.write_text(text)
  assert not is_refused(saved, state)


def test_a_config_without_its_format_is_damaged_and_of_no_other_version(saved):
  file = saved / 'config' / 'metadata'
  for old, new in (('"format"', '"formaT"'), ('"format": 1', '"format": 3')):
    text = file.read_text()
    file.write_text(text.replace(old, new))
    with pytest.raises(checkpoint.DamagedError, match='not what was saved'):  # a run goes on from the one before
      checkpoint.read_info(saved)
    file.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'emptied', 'removed', 'directory'])
def test_damage_to_any_file_gives_no_wrong_array(saved, state, damage):
  tried, refused = try_all(saved, state, 2 * [damage] if damage in ('truncated', 'flipped') else [damage])
  assert tried >= len(files_of(saved)) >= 20
  assert refused > tried / 4


@pytest.mark.long
def test_many_damages_to_any_file_give_no_wrong_array(saved, state):
  tried, refused = try_all(saved, state, 25 * ['flipped'] + 5 * ['truncated'], seed=1)
  assert tried >= 30 * len(files_of(saved)) >= 600
  assert refused > tried / 4
