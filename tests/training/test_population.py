import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import TOKENIZER, letter_task
from tiers import slow_except

from critkl_jax import config as config_lib
from critkl_jax import sharding
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.runtime import checkpoint, loop, resuming, trackers
from critkl_jax.runtime.storage import WorkdirError
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.memory import available_memory
from critkl_jax.training.train_step import make_train_step

pytestmark = pytest.mark.usefixtures('standard_promotion')
# Adam turns a rounding error of a gradient near 0 into a step of up to the learning rate: 1e-3 keeps it under 1e-5.
BASE = FinetuneConfig(episodes=8, minibatches=2, learning_rate=1e-3, num_iterations=4, save_every=2)
MODEL = gpt2(GPT2Config(vocab_size=TOKENIZER.vocab_size, context_length=8, num_layers=1, num_heads=2, width=16))


@pytest.fixture(scope='module')
def reference():
  return MODEL.init(jax.random.key(0))


def mixed():
  """Makes members that differ in every number a study may vary, and in the penalty."""
  replace = config_lib.replace
  return (replace(BASE, kl_coefficient=1.0), replace(BASE, seed=1, certainty_exponent=5.0, learning_rate=2e-3),
          replace(BASE, kl='standard', temperature=1.5), replace(BASE, kl='none', entropy_coefficient=0.1))


def advance_alone(config, reference, num_steps=3):
  step, state = make_train_step(MODEL, letter_task(), config), init_finetuning(MODEL, config, reference)
  for _ in range(num_steps):
    state, metrics = step(state, finetuning_keys(config)[1], Hyperparameters.of(config))
  return state, metrics


def mesh_of(configs, mapping='auto'):
  return sharding.make_mesh('data:1') if mapping in ('vmap', 'scan') else population.members_mesh(len(configs))


def advance_together(configs, reference, mapping, num_steps=3):
  mesh = mesh_of(configs, mapping)
  step = population.make_population_step(MODEL, letter_task(), configs, mesh, mapping)
  state = population.init_population(MODEL, configs, reference, mesh)
  numbers = population.numbers_of(configs, mesh)
  for _ in range(num_steps):
    state, metrics = step(state, *numbers)
  return jax.device_get((state, metrics))


@pytest.mark.parametrize('mapping', slow_except(('scan',), population.MAPPINGS))
def test_members_are_single_runs(reference, mapping):
  configs = mixed()
  together, metrics = advance_together(configs, reference, mapping)
  assert together.step == 3
  for i, config in enumerate(configs):
    state, single = advance_alone(config, reference)
    for got, wanted in ((population.member(together, i).params, state.params),
                        (population.member(together, i).opt_state, state.opt_state)):
      jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, wanted)
    own = jax.tree.map(lambda x, i=i: x[i], metrics)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), own, single)


def test_a_fresh_critic_is_that_of_the_members_seed(reference):
  model = gpt2(config_lib.replace(MODEL.config, value_head='mlp'))
  configs = population.product(config_lib.replace(BASE, advantage='gae', value_head='mlp'), seed=(0, 1))
  together = population.init_population(model, configs, reference, mesh_of(configs))
  for i, config in enumerate(configs):
    alone = init_finetuning(model, config, reference)
    jax.tree.map(np.testing.assert_array_equal, population.member(together, i).params, alone.params)


def test_shard_takes_as_many_devices_as_divide_the_members():
  four = jax.devices()[:4]
  assert [population.members_mesh(n, four).size for n in (1, 2, 3, 4, 6, 7)] == [1, 2, 3, 4, 3, 1]
  assert population.pick_mapping(population.members_mesh(4, four)) == 'shard'
  assert population.pick_mapping(population.members_mesh(7, four)) == 'scan'


@pytest.mark.slow
def test_members_share_an_ensemble(reference, tmp_path, monkeypatch):
  monkeypatch.setattr(trackers, 'open_trackers', lambda *_: ())
  config = config_lib.replace(BASE, certainty_ensemble='another', certainty_exponent=3.0, kl_coefficient=1.0)
  configs, mesh = population.product(config, seed=(0, 1)), population.members_mesh(2)
  other = jax.tree.map(lambda x: 2.0 * x, reference)
  step, _ = population.compile_step(MODEL, letter_task(), configs, mesh)
  numbers = population.numbers_of(configs, mesh)
  infos = {name: checkpoint.CheckpointInfo(MODEL.config, Addition(1), one)
           for name, one in zip(population.names(configs), configs)}
  for num_steps in (2, 3):  # the second resumes where the first stopped
    state = population.init_population(MODEL, configs, reference, mesh, (other,))
    state = loop.run_population(lambda state, _: step(state, *numbers), state, num_steps, infos, tmp_path, 1)
  assert state.ensemble[0]['wte']['embedding'].shape == reference['wte']['embedding'].shape
  for i, one in enumerate(configs):
    alone = init_finetuning(MODEL, one, reference, ensemble=(other,))
    for _ in range(3):
      alone, _ = make_train_step(MODEL, letter_task(), one)(alone, finetuning_keys(one)[1], Hyperparameters.of(one))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
                 jax.tree.map(lambda x, i=i: x[i], jax.device_get(state.params)), alone.params)


def test_members_are_mapped_where_they_lie(reference):
  mesh = sharding.make_mesh('member:2')
  params = population.init_population(MODEL, (BASE,) * 4, reference, mesh).params
  params = jax.tree.map(lambda x: x * jnp.arange(1.0, 5.0).reshape(-1, *(1,) * (x.ndim - 1)), params)
  found = population.map_members(lambda own, factor: {'sum': factor * jnp.sum(own['wte']['embedding'])}, mesh)(
      params, jnp.float32(2.0))
  total = float(jnp.sum(reference['wte']['embedding']))
  np.testing.assert_allclose(found['sum'], 2 * total * np.arange(1, 5), rtol=1e-5)
  with pytest.raises(ValueError, match='an axis of members alone'):
    population.map_members(lambda own: own, sharding.make_mesh('member:2,data:2'))


def test_product_is_every_combination_once():
  configs = population.product(BASE, kl=('standard', 'prioritized'), certainty_exponent=(10.0, 150.0), seed=(0, 1))
  assert population.names(configs) == (
      'kl=standard-seed=0', 'kl=standard-seed=1', 'kl=prioritized-certainty_exponent=10.0-seed=0',
      'kl=prioritized-certainty_exponent=10.0-seed=1', 'kl=prioritized-certainty_exponent=150.0-seed=0',
      'kl=prioritized-certainty_exponent=150.0-seed=1')
  assert population.names(population.product(BASE)) == ('member',)


def test_members_differ_in_fields_that_count():
  base = config_lib.replace(BASE, kl_coefficient=5.0, kl_estimator='exact', certainty='min_entropy')
  configs = population.product(base, kl=('prioritized', 'standard', 'none'), kl_coefficient=(1.0, 5.0))
  assert population.names(configs) == (
      'kl=prioritized-kl_coefficient=1.0', 'kl=prioritized-kl_coefficient=5.0', 'kl=standard-kl_coefficient=1.0',
      'kl=standard-kl_coefficient=5.0', 'kl=none')
  for some in (configs, configs[::-1], configs[3:]):  # mixed penalties are one prioritized program
    shared = config_lib.flat_values(population.shared_config(some))
    assert [shared[name] for name in ('kl', 'kl_estimator')] == ['prioritized', 'exact']
    assert shared['certainty'] == ('negentropy' if some == configs[3:] else 'min_entropy')
  assert population.shared_config(configs[4:]).loss.kl == 'none'
  with pytest.raises(ValueError, match=r"certainty_exponent: has no effect with kl='(standard|none)'"):
    population.product(base, kl=('standard', 'none'), certainty_exponent=(1.0, 2.0))


def test_what_cannot_vary_is_refused():
  with pytest.raises(ValueError, match='episodes: members of one program may differ in'):
    population.product(BASE, episodes=(8, 16))
  with pytest.raises(ValueError, match='kl_estimator: members of one program'):
    population.shared_config((BASE, config_lib.replace(BASE, kl_estimator='k3')))
  with pytest.raises(ValueError, match='got none'):
    population.shared_config(())
  def make(num_members, mesh, mapping):
    mesh = sharding.make_mesh(mesh)
    return population.make_population_step(MODEL, letter_task(), (BASE,) * num_members, mesh, mapping)

  with pytest.raises(ValueError, match="population_map: expected 'auto' or one of"):
    make(1, 'data:1', 'pmap')
  with pytest.raises(ValueError, match="'scan' keeps members together, and the mesh has member:2"):
    make(2, 'member:2', 'scan')
  with pytest.raises(ValueError, match='member:2 does not divide 3 members'):
    make(3, 'member:2', 'shard')


def run(workdir, configs, reference, num_steps, dies_at=None):
  infos = {name: checkpoint.CheckpointInfo(MODEL.config, Addition(1), config)
           for name, config in zip(population.names(configs), configs)}
  mesh = mesh_of(configs)
  step = population.make_population_step(MODEL, letter_task(), configs, mesh)
  numbers = population.numbers_of(configs, mesh)

  def dying(state, number):
    if number == dies_at:
      raise KeyboardInterrupt
    return step(state, *numbers)

  return jax.device_get(loop.run_population(
      dying, population.init_population(MODEL, configs, reference, mesh), num_steps, infos, workdir, 2))


@pytest.mark.slow
def test_a_study_goes_on_bit_for_bit_from_the_step_that_all_have(reference, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(trackers, 'open_trackers', lambda *_: ())
  configs = mixed()[:2]
  whole = run(tmp_path / 'whole', configs, reference, 5)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'parts', configs, reference, 5, dies_at=4)
  first, second = (tmp_path / 'parts' / 'members' / name for name in population.names(configs))
  assert checkpoint.steps_in(first / 'checkpoints') == [2, 4]
  (second / 'checkpoints' / '4' / 'params').rename(tmp_path / 'lost')  # as if killed while it was written
  (second / 'checkpoints' / '4').rename(second / 'checkpoints' / '4.orbax-checkpoint-tmp')
  parts = run(tmp_path / 'parts', configs, reference, 5)
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  for name in population.names(configs):
    logs = [loop.read_metrics(tmp_path / part / 'members' / name / 'metrics.jsonl') for part in ('whole', 'parts')]
    assert [row['step'] for row in logs[1]] == [1, 2, 3, 4, 5]
    for row, other in zip(*logs):
      assert all(row[key] == other[key] for key in row if key not in ('seconds', 'tokens_per_second'))
  (first / 'checkpoints' / '5' / 'config' / 'metadata').write_text('{')
  jax.tree.map(np.testing.assert_array_equal, run(tmp_path / 'parts', configs, reference, 5), whole)
  assert f'{first}/checkpoints/5: its config cannot be read' in capsys.readouterr().out
  for home in (first, second):
    assert sorted(path.name for path in (home / 'checkpoints').iterdir()) == ['2', '4', '5']
    assert checkpoint.load_checkpoint(home).step == 5


@pytest.mark.slow
def test_a_members_checkpoint_is_like_any_other(reference, tmp_path):
  configs = mixed()[1:]
  state = run(tmp_path, configs, reference, 2)
  for i, (name, config) in enumerate(zip(population.names(configs), configs)):
    found = checkpoint.load_checkpoint(tmp_path / 'members' / name)
    assert found.info.training == config
    jax.tree.map(np.testing.assert_array_equal, found.params, population.member(state, i).params)
    single = resuming.resume(init_finetuning(MODEL, config, reference), found.info, tmp_path / 'members' / name)
    jax.tree.map(np.testing.assert_array_equal, single, population.member(state, i))


def test_another_list_of_members_is_refused(reference, tmp_path):
  run(tmp_path, mixed()[:2], reference, 2)
  with pytest.raises(checkpoint.CheckpointError, match='made with other members'):
    run(tmp_path, mixed()[:3], reference, 2)


def test_a_members_checkpoints_that_others_removed_cost_no_other_member_its_own(reference, tmp_path):
  configs = mixed()[:2]
  run(tmp_path, configs, reference, 5)
  first, second = (tmp_path / 'members' / name / 'checkpoints' for name in population.names(configs))
  second.rename(tmp_path / 'away')
  with pytest.raises(WorkdirError, match=rf'{second.parent.name}/checkpoints lacks step 5, which other members have'):
    run(tmp_path, configs, reference, 6)
  (tmp_path / 'away').rename(second)
  for step in (4, 5):
    (second / str(step)).rename(tmp_path / str(step))
  with pytest.raises(WorkdirError, match='lacks step 5'):
    run(tmp_path, configs, reference, 6)
  assert checkpoint.steps_in(first) == [2, 4, 5]
  for text in ('', '{}', '["a"', '\xff'):
    (tmp_path / 'members.json').write_text(text, encoding='latin-1')
    with pytest.raises(WorkdirError, match=r'members.json is damaged \(line 1.*restore it, or remove it'):
      run(tmp_path, configs, reference, 6)


@pytest.mark.parametrize('mapping', ['vmap', 'shard'])
@pytest.mark.slow
def test_as_many_members_fit_as_is_said(mapping):
  def memory_of(num_members):
    configs = population.product(BASE, seed=range(num_members))
    mesh = sharding.make_mesh('member:2' if mapping == 'shard' else 'data:1')
    return population.compile_step(MODEL, letter_task(), configs, mesh, mapping)[1]

  some = memory_of(4)
  limit = 3 * some.total
  parts = 2 if mapping == 'shard' else 1
  fitting = some.fitting(limit) * parts
  assert fitting > 8
  assert some.of(some.fitting(limit)).total <= limit < some.of(some.fitting(limit) + 2).total
  assert memory_of(fitting).total <= 1.02 * limit
  assert memory_of(2 * fitting).total > limit


def test_available_memory_is_that_of_the_machine_shared_by_its_devices():
  one, four = (available_memory(sharding.make_mesh(f'member:{n}')) for n in (1, 4))
  assert 2**28 < one < 2**45
  assert four == pytest.approx(one / 4, rel=0.2)
