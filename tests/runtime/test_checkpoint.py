import dataclasses
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from passes import logits

from critkl_jax.config import replace, to_json
from critkl_jax.models import attention
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime import checkpoint, checksums, managers
from critkl_jax.runtime.checkpoint import CheckpointError, load_checkpoint
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.tasks.known_tasks import to_json_object
from critkl_jax.training.initial_state import init_finetuning
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

MODEL = PRETRAIN_PRESETS['smoke'].model
INFO = checkpoint.CheckpointInfo(model=MODEL, task=Addition(1), training=FINETUNE_PRESETS['smoke'])


@pytest.fixture(scope='module')
def state():
  params = gpt2(MODEL).init(jax.random.key(3))
  return init_finetuning(gpt2(MODEL), FINETUNE_PRESETS['smoke'], params)


@pytest.fixture
def saved(tmp_path, state):
  with checkpoint.open_manager(tmp_path / 'run' / 'checkpoints') as manager:
    for step in (2, 10):
      checkpoint.save(manager, state.replace(step=jnp.int32(step)), INFO)
  return tmp_path / 'run' / 'checkpoints'


def assert_trees_equal(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_what_is_loaded_is_what_was_saved(saved, state):
  for path, step in ((saved, None), (saved.parent, None), (saved / '10', None), (saved, 2)):
    loaded = load_checkpoint(path, step)
    assert_trees_equal(loaded.params, state.params)
    assert loaded.info == INFO
    assert loaded.info.kind == 'finetune'
    assert loaded.step == (step or 10)
  assert checkpoint.steps_in(saved) == [2, 10]


def test_restore_gives_the_whole_state_back(saved, state):
  blank = jax.tree.map(jnp.zeros_like, state)
  restored = checkpoint.restore(checkpoint.latest(saved), blank)
  assert restored.step == 10
  assert_trees_equal(restored.params, state.params)
  assert_trees_equal(restored.opt_state, state.opt_state)


def test_saved_on_four_devices_loaded_on_one(tmp_path, state):
  mesh = jax.make_mesh((4,), ('data',))

  def spread(x):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec('data' if x.shape[0] % 4 == 0 else None)))

  sharded = jax.tree.map(spread, state.params)
  assert len(sharded['h_0']['attn']['c_attn']['kernel'].sharding.device_set) == 4
  with checkpoint.open_manager(tmp_path) as manager:
    checkpoint.save(manager, state.replace(params=sharded), INFO, with_optimizer=False)
  loaded = load_checkpoint(tmp_path)
  assert_trees_equal(loaded.params, state.params)
  assert len(loaded.params['wte']['embedding'].sharding.device_set) == 1


def test_the_shipped_reference_loads():
  loaded = load_checkpoint()
  assert loaded.info.kind == 'pretrain'
  size = sum(file.stat().st_size for file in checkpoint.SHIPPED_REFERENCE.rglob('*') if file.is_file())
  assert size <= 8e6
  model = gpt2(loaded.info.model)
  assert logits(model, loaded.params, jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 41)


# Checkpoints that are kept, replaced, and skipped as damaged.


def test_what_is_kept():
  assert managers.spread([4, 8, 12], 20) == [4, 8, 12]
  assert managers.spread([4, 8, 12], 2) == [8, 12]
  assert managers.spread([1, 2, 3, 4, 5, 6, 7, 9], 4) == [1, 5, 7, 9]
  kept = []
  for step in range(4, 2001, 4):  # as a run saves
    kept = managers.spread([*kept, step], 20)
    assert kept[-2:] == [step - 4, step][-len(kept):]
  assert len(kept) == 20
  assert kept[0] == 4
  assert max(after - before for before, after in itertools.pairwise(kept)) <= 400


def test_no_more_are_kept_than_asked_for(tmp_path, state):
  with managers.opened(tmp_path, max_to_keep=3) as manager:
    for step in range(1, 7):
      checkpoint.save(manager, state.replace(step=jnp.int32(step)), INFO, with_optimizer=False)
  assert checkpoint.steps_in(tmp_path) == [1, 5, 6]


def test_a_step_that_is_saved_again_is_replaced_and_what_was_left_behind_goes(saved, state):
  moved = jax.tree.map(lambda x: x + 1, state.params)
  with managers.opened(saved) as manager:
    checkpoint.save(manager, state.replace(params=moved, step=jnp.int32(2)), INFO)
    assert checkpoint.steps_in(saved) == [2, 10]
    assert_trees_equal(load_checkpoint(saved, 2).params, moved)
    checkpoint.save(manager, state.replace(step=jnp.int32(4)), INFO, after=2)
  assert sorted(path.name for path in saved.iterdir()) == ['2', '4']


def test_nothing_is_removed_before_its_replacement_is_whole(saved, state, monkeypatch):
  def full(*_, **__):
    raise ValueError('RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code=28]')

  with managers.opened(saved) as manager:
    monkeypatch.setattr(manager, 'save', full)
    with pytest.raises(OSError, match='No space left on device') as caught:
      checkpoint.save(manager, state.replace(step=jnp.int32(10)), INFO)
  assert caught.value.filename == str(saved / '10')
  assert sorted(path.name for path in saved.iterdir()) == ['10.replaced-0', '2']
  (saved / '10.replaced-0').rename(saved / '10')
  assert_trees_equal(load_checkpoint(saved).params, state.params)


# Errors: one line each, with the reason.


def error_of(path, step=None):
  with pytest.raises(CheckpointError) as caught:
    load_checkpoint(path, step)
  message = str(caught.value)
  assert '\n' not in message
  assert str(path).split('/')[-1] in message
  return message


def test_no_such_directory(tmp_path):
  assert 'no such directory' in error_of(tmp_path / 'nowhere')


def test_empty_directory(tmp_path):
  assert 'no complete checkpoint' in error_of(tmp_path)


def test_no_such_step(saved):
  assert 'no step 3 in it; it holds steps [2, 10]' in error_of(saved, 3)


def test_half_written_directories_are_not_taken_for_checkpoints(saved):
  shutil.copytree(saved / '10', saved / '11.orbax-checkpoint-tmp')
  assert load_checkpoint(saved).step == 10


def test_a_half_written_directory_itself(saved):
  (saved / '10').rename(saved / '10.orbax-checkpoint-tmp')
  assert 'half-written' in error_of(saved / '10.orbax-checkpoint-tmp')


def test_a_step_of_a_step_directory(saved):
  assert 'no step 2 in it' in error_of(saved / '10', 2)


def test_other_directories_are_no_steps(saved, tmp_path):
  (tmp_path / 'runs' / 'seed_1').mkdir(parents=True)
  assert 'no complete checkpoint' in error_of(tmp_path / 'runs')


@pytest.mark.parametrize('item', ['params', 'config'])
def test_a_missing_item(saved, item):
  shutil.rmtree(saved / '10' / item)
  assert f'no {item} in it' in error_of(saved / '10')


def test_truncated_files(saved):
  for file in (saved / '10' / 'params').rglob('*'):
    if file.is_file() and file.stat().st_size > 500:
      file.write_bytes(file.read_bytes()[:100])
  assert 'damaged or half written' in error_of(saved / '10')


@pytest.mark.parametrize('cut', [True, False])
def test_a_damaged_file_of_arrays(saved, cut):
  """TensorStore has no checksum of its own for the arrays' data."""
  file = max((x for x in (saved / '10' / 'params').rglob('*') if x.is_file()), key=lambda x: x.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data[:len(data) // 2] if cut else data)
  message = error_of(saved / '10')
  assert 'is damaged' in message
  assert f'The newest whole checkpoint before it is {saved / "2"}.' in message
  assert 'remove' not in message
  assert re.search(r'(h_\d|wte|wpe|ln_f|value_head)[./]', message)  # the array, which is what lies in the file
  assert load_checkpoint(saved / '2').step == 2


def test_checksums_are_the_same_wherever_arrays_lie(state):
  x = state.params['h_0']['mlp']['c_fc']['kernel']
  wanted = checksums.array_checksums({'x': x})['x']
  spread = jax.device_put(x, NamedSharding(jax.make_mesh((8,), ('data',)), PartitionSpec(None, 'data')))
  assert jax.jit(checksums._spread_checksum)(spread) == wanted
  assert checksums.array_checksums({'x': np.asarray(x)})['x'] == wanted
  assert checksums.array_checksums({'x': x.at[3, 5].add(1e-7)})['x'] != wanted
  assert checksums.array_checksums({'x': x[::-1]})['x'] != wanted
  assert jax.jit(checksums._spread_checksum)(jnp.int32(7)) == checksums.array_checksums({'n': jnp.int32(7)})['n'] == 7


def test_checkpoints_without_checksums_are_read(saved, state):
  change_config(saved / '10', lambda values: values.pop('checksums'))
  assert_trees_equal(load_checkpoint(saved / '10').params, state.params)


def test_the_shipped_reference_has_checksums(tmp_path):
  copy = tmp_path / 'copy' / checkpoint.latest(checkpoint.SHIPPED_REFERENCE).name
  shutil.copytree(checkpoint.latest(checkpoint.SHIPPED_REFERENCE), copy)
  change_config(copy, lambda values: values['checksums']['params'].update({'wte/embedding': 1}))
  assert 'wte/embedding is not what was saved' in error_of(copy)


def test_missing_files(saved):
  shutil.rmtree(saved / '10' / 'params' / 'd')
  shutil.rmtree(saved / '10' / 'params' / 'ocdbt.process_0')
  assert 'damaged or half written' in error_of(saved / '10')


def change_config(path, change):
  file = path / 'config' / 'metadata'
  values = json.loads(file.read_text())
  change(values)
  values.get('checksums', {}).pop('config', None)  # as in older versions
  file.write_text(json.dumps(values))


def test_arrays_of_another_shape(saved):
  change_config(saved / '10', lambda values: values['model'].update(width=64))
  message = error_of(saved / '10')
  assert 'of another shape' in message
  assert 'h_0/attn/c_attn/bias has (96,), expected (192,)' in message


@pytest.mark.parametrize(('change', 'words'), [
    (lambda values: values['model'].update(colour='red'), "unknown fields ['colour']"),
    (lambda values: values['training']['loss'].pop('kl'), "missing fields ['kl']"),
    (lambda values: values.pop('task'), 'known_digits'),
    (lambda values: values.update(kind='distil'), 'distil'),
    (lambda values: values.update(format=99), 'format 99'),
])
def test_configs_of_other_versions(saved, change, words):
  change_config(saved / '10', change)
  assert words in error_of(saved / '10')


def as_of_an_older_version(values):
  """Rewrites a config as it was saved before checkpoints named their task."""
  task = values.pop('task')
  values['known_digits'] = task['known_digits']
  values['training'].pop('task', None)
  own = values['training'].pop('addition')
  values['training'].update({name: own[name] for name in own if name != 'pad_vocabulary'})


@pytest.mark.parametrize(('training', 'vocab_size', 'task'), [
    (replace(FINETUNE_PRESETS['smoke'], extra_digits=2, wrong_reward=-1.0), 41, Addition(3, 2, -1.0)),
    (replace(PRETRAIN_PRESETS['smoke'], known_digits=3), 41, Addition(3)),
    (replace(PRETRAIN_PRESETS['smoke'], known_digits=3, vocab_size=50257, pad_vocabulary=True), 50257,
     Addition(3, vocab_size=50257)),
    (replace(FINETUNE_PRESETS['smoke'], extra_digits=2), 60, Addition(3, 2, vocab_size=60)),
])
def test_tasks_of_older_checkpoints_are_read(saved, training, vocab_size, task):
  model = dataclasses.replace(MODEL, vocab_size=vocab_size)
  info = checkpoint.CheckpointInfo(model, task, training)

  def change(values):
    values.update(kind=info.kind, model=dataclasses.asdict(model), task=to_json_object(task),
                  training=json.loads(to_json(training)))
    as_of_an_older_version(values)

  change_config(saved / '10', change)
  assert checkpoint.read_info(saved / '10') == info


def test_a_config_that_is_not_json(saved):
  (saved / '10' / 'config' / 'metadata').write_text('{')
  assert 'cannot be read' in error_of(saved / '10')


def test_without_the_optimizer_there_is_nothing_to_go_on_from(tmp_path, state):
  checkpoint.save_params(tmp_path, state.params, INFO, 0)
  with pytest.raises(CheckpointError, match='no opt_state in it'):
    checkpoint.restore(tmp_path / '0', state)


def test_info_knows_its_kind():
  assert dataclasses.replace(INFO, training=PRETRAIN_PRESETS['smoke']).kind == 'pretrain'


def test_parameters_that_are_there_are_kept_and_never_in_silence(tmp_path, state, capsys):
  params, other = state.params, jax.tree.map(lambda x: x + 1, state.params)
  checkpoint.save_params(tmp_path, params, INFO, 3)
  checkpoint.save_params(tmp_path, params, INFO, 3)
  assert capsys.readouterr().out == ''
  slower = dataclasses.replace(INFO, training=dataclasses.replace(INFO.training, save_every=9))
  checkpoint.save_params(tmp_path, params, slower, 3)
  assert 'already exists with the same arrays; it keeps the settings' in capsys.readouterr().out
  other_digits = dataclasses.replace(INFO, task=Addition(2))
  for new, info, named in ((other, INFO, 'parameters'), (params, other_digits, 'known_digits')):
    with pytest.raises(CheckpointError, match=rf'holds something else \({named} differ\); it is kept'):
      checkpoint.save_params(tmp_path, new, info, 3)
  assert_trees_equal(load_checkpoint(tmp_path).params, params)


def test_the_same_parameters_are_known_without_reading_them(saved, state, tmp_path):
  checkpoint.save_params(tmp_path / 'same', state.params, INFO, 10)
  checkpoint.save_params(tmp_path / 'other', jax.tree.map(lambda x: x + 1, state.params), INFO, 10)
  assert checkpoint.same_params(saved / '10', tmp_path / 'same' / '10')
  assert not checkpoint.same_params(saved / '10', tmp_path / 'other' / '10')
  assert not checkpoint.same_params(saved / '10', saved / '2')


@pytest.mark.usefixtures('standard_promotion')
def test_a_model_trained_with_an_attention_that_is_not_here_is_read(tmp_path, state):
  model = dataclasses.replace(MODEL, dtype='bfloat16', attention='cudnn')
  info = dataclasses.replace(INFO, model=model)
  checkpoint.save_params(tmp_path, state.params, info, 3)
  loaded = load_checkpoint(tmp_path)
  assert loaded.info.model.attention == 'cudnn'
  assert checksums.array_checksums(loaded.params) == checksums.array_checksums(state.params)
  with pytest.raises(ValueError, match="attention: 'cudnn' needs an NVIDIA GPU, and the devices here are cpu"):
    attention.check_implementation(loaded.info.model.attention)


def test_a_checkpoint_is_found_without_its_parameters(saved):
  found, loaded = checkpoint.find_checkpoint(saved), load_checkpoint(saved)
  assert (found.params, found.info, found.step, found.path) == (None, loaded.info, loaded.step, loaded.path)
  with pytest.raises(CheckpointError, match='cannot be read'):
    checkpoint.find_checkpoint('x' * 300)
