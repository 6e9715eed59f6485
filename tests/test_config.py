import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from critkl_jax import config as config_lib
from critkl_jax.models.gpt2 import GPT2Config
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.training.config import FinetuneConfig, MachineConfig, PretrainConfig, RLConfig, RunConfig
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

ALL = {**{f'pretrain {k}': v for k, v in PRETRAIN_PRESETS.items()},
       **{f'finetune {k}': v for k, v in FINETUNE_PRESETS.items()}}


@pytest.mark.parametrize('name', ALL)
def test_json_and_back(name):
  config = ALL[name]
  assert config_lib.from_json(type(config), config_lib.to_json(config)) == config


def test_presets_are_there():
  assert set(PRETRAIN_PRESETS) == {'smoke', 'tiny', 'stories', 'small', 'paper', 'gpt2', 'gpt2_xl'}
  assert PRETRAIN_PRESETS['gpt2'].model.vocab_size == 50257
  paper = PRETRAIN_PRESETS['paper'].model
  assert (paper.num_layers, paper.width) == (12, 768)
  assert (FINETUNE_PRESETS['paper'].loss.kl_coefficient, FINETUNE_PRESETS['paper'].learning_rate) == (5.0, 1e-6)


def test_replace_reaches_the_inner_config():
  config = config_lib.replace(FinetuneConfig(), kl_coefficient=2.0, episodes=48)
  assert (config.loss.kl_coefficient, config.episodes) == (2.0, 48)
  assert config.loss.kl_estimator == FinetuneConfig().loss.kl_estimator
  with pytest.raises(ValueError, match=r"no fields \['kl_cofficient'\]"):
    config_lib.replace(FinetuneConfig(), kl_cofficient=2.0)


def test_the_policy_is_the_reference_with_other_numerics():
  reference = GPT2Config(width=64)
  assert FinetuneConfig().model_of(reference) == reference
  changed = FinetuneConfig(dtype='bfloat16', attention='cudnn', advantage='gae', value_head='mlp', remat=True).model_of(
      reference)
  assert changed == GPT2Config(width=64, dtype='bfloat16', attention='cudnn', value_head='mlp', remat=True)


def test_flat_views_name_every_field_once():
  fields = config_lib.flat_fields(FinetuneConfig)
  expected = {f.name for c in config_lib.classes_of(FinetuneConfig) for f in dataclasses.fields(c)}
  expected -= {'loss', 'addition', 'stories', 'text'}
  assert set(fields) == expected == set(config_lib.flat_values(FinetuneConfig()))

  @dataclasses.dataclass(frozen=True)
  class Clash:
    loss: LossConfig
    temperature: float

  with pytest.raises(ValueError, match='temperature'):
    config_lib.flat_fields(Clash)


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: GPT2Config(num_heads=3), 'num_heads.*128.*3'),
    (lambda: GPT2Config(dtype='float16'), "dtype.*'float16'"),
    (lambda: GPT2Config(num_layers=0), 'num_layers.*0'),
    (lambda: PretrainConfig(optimizer='sgd'), "optimizer.*'sgd'"),
    (lambda: PretrainConfig(final_learning_rate=1.5), 'final_learning_rate.*1.5'),
    (lambda: LossConfig(temperature=0.0), 'temperature.*0'),
    (lambda: LossConfig(kl='weighted'), "kl: .*'weighted'"),
    (lambda: LossConfig(kl_coefficient=-1.0), 'kl_coefficient.*-1'),
    (lambda: LossConfig(kl_coefficient=float('nan')), 'kl_coefficient.*nan'),
    (lambda: LossConfig(certainty_intercept=1.5), 'certainty_intercept.*1.5'),
    (lambda: LossConfig(certainty_intercept=float('nan')), 'certainty_intercept.*nan'),
    (lambda: GPT2Config(attention='cudnn'), "attention: 'cudnn' needs dtype='bfloat16'"),
    (lambda: FinetuneConfig(whiten_advantages=True), "whiten_advantages.*'group_relative'"),
    (lambda: FinetuneConfig(critic_warmup=3), 'critic_warmup.*gae'),
    (lambda: FinetuneConfig(minibatches=5), 'minibatches.*96.*5'),
    (lambda: FinetuneConfig(episodes=1, minibatches=1), 'advantage.*episodes=1'),
    (lambda: FinetuneConfig(advantage='gae', gae_lambda=1.01), 'gae_lambda.*1.01'),
    (lambda: FinetuneConfig(loss=LossConfig(algorithm='a2c'), epochs=2), 'epochs.*a2c'),
])
def test_a_config_checks_itself(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_json_errors_name_the_field():
  values = json.loads(config_lib.to_json(FinetuneConfig()))
  for change, words in (
      ({'extra': 1}, r"unknown fields \['extra'\]"),
      ({'episodes': '96'}, "episodes: expected a whole number, got '96'"),
      ({'whiten_advantages': 1}, 'whiten_advantages: expected True or False, got 1'),
      ({'loss': 3}, 'LossConfig: expected a JSON object'),
      ({'minibatches': 7}, 'minibatches')):
    with pytest.raises(ValueError, match=words):
      config_lib.from_dict(FinetuneConfig, values | change)
  del values['loss']['kl_estimator']
  with pytest.raises(ValueError, match=r"LossConfig: missing fields \['kl_estimator'\]"):
    config_lib.from_dict(FinetuneConfig, values)
  with pytest.raises(ValueError, match='not JSON'):
    config_lib.from_json(FinetuneConfig, '{')


def test_configs_of_older_versions_are_read():
  values = json.loads(config_lib.to_json(config_lib.replace(FinetuneConfig(), seed=3)))
  for name in ('rollout', 'window', 'scan_layers'):
    del values[name]
  assert config_lib.from_dict(FinetuneConfig, values) == FinetuneConfig(seed=3)


def test_settings_of_the_task_stood_among_the_others_in_older_versions():
  values = json.loads(config_lib.to_json(FinetuneConfig()))
  for name in ('task', 'addition', 'text'):
    del values[name]
  config = config_lib.from_dict(FinetuneConfig, values | {'extra_digits': 2, 'wrong_reward': -1.0})
  assert config == config_lib.replace(FinetuneConfig(), extra_digits=2, wrong_reward=-1.0)
  assert config_lib.from_dict(FinetuneConfig, values | {'task': {'extra_digits': 2, 'wrong_reward': -1.0}}) == config
  values = json.loads(config_lib.to_json(PretrainConfig()))
  del values['addition']
  assert config_lib.from_dict(PretrainConfig, values | {'known_digits': 3}).addition.known_digits == 3
  with pytest.raises(ValueError, match='known_digits: expected 1 to 1000, got 0'):
    config_lib.from_dict(PretrainConfig, values | {'known_digits': 0})


def test_what_older_versions_did_is_read_where_the_default_is_another():
  values = json.loads(config_lib.to_json(PretrainConfig()))
  assert values.pop('hidden_only')
  assert not config_lib.from_dict(PretrainConfig, values).hidden_only


def test_whole_numbers_are_read_as_floats():
  values = json.loads(config_lib.to_json(LossConfig()))
  config = config_lib.from_dict(LossConfig, values | {'kl_coefficient': 5})
  assert config.kl_coefficient == 5.0
  assert isinstance(config.kl_coefficient, float)


@pytest.mark.parametrize(('name', 'given', 'expected'), [
    ('episodes', np.int64(48), 48), ('episodes', jnp.int32(48), 48), ('seed', np.uint32(2**32 - 1), 2**32 - 1),
    ('episodes', enum.IntEnum('Sizes', {'SMALL': 48}).SMALL, 48),
    ('learning_rate', np.float64(0.5), 0.5), ('learning_rate', np.float32(0.5), 0.5), ('learning_rate', 1, 1.0),
    ('learning_rate', jnp.bfloat16(0.5), 0.5), ('kl_coefficient', np.int8(2), 2.0),
    ('kl_coefficient', np.longdouble(2), 2.0), ('remat', np.bool_(True), True), ('remat', jnp.asarray(True), True),
    ('kl', np.str_('standard'), 'standard'), ('kl', enum.StrEnum('Kinds', ['standard']).standard, 'standard'),
    ('reference', pathlib.Path('runs/some'), 'runs/some')])
def test_scalars_of_other_libraries_become_pythons(name, given, expected):
  config = config_lib.replace(FinetuneConfig(), **{name: given})
  found = config_lib.flat_values(config)[name]
  assert found == expected
  assert type(found) is type(expected)
  assert config_lib.from_json(FinetuneConfig, config_lib.to_json(config)) == config


@pytest.mark.parametrize(('name', 'given', 'words'), [
    ('kl_coefficient', True, 'expected a real number, got True'),
    ('episodes', 96.0, 'expected a whole number, got 96.0'), ('num_iterations', 2.5, 'whole number, got 2.5'),
    ('episodes', True, 'whole number, got True'), ('episodes', '96', "whole number, got '96'"),
    ('episodes', None, 'whole number, got None'), ('episodes', np.array([96]), r'whole number, got array'),
    ('remat', 1, 'True or False, got 1'), ('remat', np.int8(1), 'True or False, got'), ('kl', None, 'text, got None'),
    ('loss', None, 'a LossConfig, got None'), ('loss', {}, 'a LossConfig, got {}'),
    ('learning_rate', float('inf'), 'a finite number'), ('certainty_intercept', -float('inf'), 'a finite number'),
    ('learning_rate', np.float32('nan'), 'a finite number'), ('learning_rate', '1', "real number, got '1'"),
    ('entropy_coefficient', 10**400, 'float32.*got a number of 1329 bits'), ('clip_ratio', 1e-320, 'float32'),
    ('temperature', 1e-30, '1e-06 to'), ('temperature', 1e30, '1e-06 to'), ('certainty_temperature', 1e-320, 'float32'),
    ('seed', 2**32, 'up to 4294967295, got 4294967296'), ('seed', 10**400, 'got a number of 1329 bits'),
    ('episodes', 2**31, 'up to 2147483647'), ('eval_problems', 2**40, 'up to'), ('eval_problems', 2**30, '1000000'),
    ('extra_digits', 10**9, '0 to 1000, got'), ('certainty_ensemble', ',,', "paths separated by commas, got ',,'"),
    ('kl', 'prioritised', "the nearest is 'prioritized'")])
def test_other_values_are_refused_by_the_name_of_the_field(name, given, words):
  with pytest.raises(ValueError, match=f'^{name}: .*{words}'):
    dataclasses.replace(FinetuneConfig(), loss=given) if name == 'loss' else config_lib.replace(
        FinetuneConfig(), **{name: given})


def set_by_hand(config_class, **values):
  """Makes a config of flat values as a constructor does, without `replace`."""
  nested = {f.name: f.type for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(f.type)}
  made = {}
  for name, kind in nested.items():
    own = {f.name for f in dataclasses.fields(kind)} & values.keys()
    made[name] = kind(**{field: values.pop(field) for field in own})
  return config_class(**made, **values)


SWITCHED_OFF = [  # the field, its value, what switches it off, what the message names
    ('kl_coefficient', 5.0, {'kl': 'none'},
     "kl='none', got 5.0; leave it out, or set kl='prioritized' or kl='standard'"),
    ('kl_estimator', 'k3', {'kl': 'none'}, "kl='none'"), ('kl_placement', 'reward', {'kl': 'none'}, "kl='none'"),
    ('kl_gate', 'oracle', {'kl': 'none'}, "kl='none'"), ('certainty_ensemble', 'one,two', {'kl': 'none'}, "kl='none'"),
    ('certainty', 'max_prob', {'kl': 'none'}, "kl='none'"),
    ('certainty', 'max_prob', {'kl': 'standard'}, "kl='standard' and kl_gate='none', got 'max_prob'"),
    ('certainty_temperature', 2.0, {'kl': 'standard', 'kl_gate': 'oracle'}, "kl='standard' and kl_gate='oracle'"),
    ('certainty_exponent', 500.0, {'kl': 'standard'}, "kl='standard'.*set kl='prioritized'"),
    ('certainty_intercept', 0.5, {'kl': 'standard'}, "kl='standard'"),
    ('certainty_ensemble', 'one', {'kl': 'standard'}, "kl='standard'"),
    ('clip_ratio', 0.1, {'algorithm': 'a2c'}, "algorithm='a2c', got 0.1; leave it out, or set algorithm='ppo'"),
    *((name, value, {'algorithm': 'a2c'}, "algorithm='a2c'.*set algorithm='ppo'")
      for name, value in (('clip_ratio_high', 0.3), ('dual_clip', 3.0), ('ratio', 'sequence'))),
    ('aggregation_length', 64, {}, "aggregation='tokens'.*set aggregation='fixed_length'"),
    *((name, value, {'advantage': 'leave_one_out'}, "advantage='leave_one_out'.*set advantage='gae'")
      for name, value in (('gae_lambda', 0.9), ('discount', 0.9), ('whiten_advantages', True),
                          ('bootstrap_truncated', True), ('critic_warmup', 2), ('value_coefficient', 1.0),
                          ('value_clip', 0.2), ('value_head', 'mlp'), ('value_head_detached', False))),
    ('gate_threshold', 0.5, {}, "kl_gate='none'.*set kl_gate='threshold' or kl_gate='uncritical'"),
    ('gate_threshold', 0.5, {'kl_gate': 'kl_cov'}, "kl_gate='kl_cov'"),
    ('gate_fraction', 0.5, {'kl_gate': 'threshold'}, "kl_gate='threshold'"),
    ('window', 8, {'rollout': 'cached'}, "rollout='cached'"),
    *((name, value, {}, "task='addition'.*set task='questions'")
      for name, value in (('model', 'there'), ('prompts', 'p.jsonl'), ('chat', True), ('chat_options', '{}'),
                          ('stop', 'x'), ('response_length', 9), ('held_out', 0.5), ('reward', 'f1'),
                          ('reward_weights', '1'), ('success', 0.5), ('dataset_options', '{}'),
                          ('reward_workers', 2), ('reward_seconds', 9.0))),
    *((name, value, {'task': 'questions', 'prompts': 'p.jsonl'}, "task='questions'.*set task='addition'")
      for name, value in (('extra_digits', 2), ('wrong_reward', -1.0))),
    *((name, value, {}, "task='addition'.*set task='stories'")
      for name, value in (('extra_facts', 2), ('asks', 'facts')))]


@pytest.mark.parametrize(('name', 'value', 'switch', 'words'), SWITCHED_OFF)
def test_a_field_that_another_one_switches_off_is_refused_when_set_by_hand(name, value, switch, words):
  match = f'^{name}: has no effect with .*{words}'
  for base in (FinetuneConfig(), FINETUNE_PRESETS['paper'], FINETUNE_PRESETS['released']):
    base = config_lib.replace(base, **switch)
    with pytest.raises(ValueError, match=match if base == FinetuneConfig() else f'^{name}: '):
      config_lib.replace(base, **{name: value})
    if name not in config_lib.counting_values(base):  # it has its default, which is refused when it is named
      default = config_lib.flat_values(base)[name]
      assert default == config_lib.flat_fields(FinetuneConfig)[name].default
      with pytest.raises(ValueError, match=f'^{name}: has no effect'):
        config_lib.replace(base, **switch, **{name: default})
  with pytest.raises(ValueError, match=f'^{name}: has no effect'):
    set_by_hand(FinetuneConfig, **switch, **{name: value})


def test_every_field_that_can_be_switched_off_is_tried_above():
  assert {name for name, *_ in SWITCHED_OFF} == set(config_lib.rules_of(FinetuneConfig))


def test_a_loss_alone_knows_neither_critic_nor_gates():
  LossConfig(value_coefficient=1.0, value_clip=0.2)
  LossConfig(kl='standard', certainty='max_prob', certainty_temperature=2.0)  # which a gate of the loop may read
  for values in ({'certainty_exponent': 10.0}, {'certainty_intercept': 0.1}):
    with pytest.raises(ValueError, match="has no effect with kl='standard'"):
      LossConfig(kl='standard', **values)
  with pytest.raises(TypeError, match='kl_placement'):
    LossConfig(kl_placement='reward')


def test_a_gate_reads_the_certainty_that_no_weight_reads():
  values = {'kl': 'standard', 'kl_gate': 'threshold', 'certainty': 'max_prob', 'gate_threshold': 0.5}
  config = config_lib.replace(FinetuneConfig(), **values)
  assert config_lib.differences(config, FinetuneConfig()) == values
  assert config_lib.from_json(FinetuneConfig, config_lib.to_json(config)) == config


def test_what_a_new_value_switches_off_goes_back_to_its_default():
  paper, usual = FINETUNE_PRESETS['paper'], LossConfig()
  none = config_lib.replace(paper, kl='none')
  assert (paper.loss.kl_coefficient, none.loss.kl_coefficient) == (5.0, usual.kl_coefficient)
  grouped = config_lib.replace(paper, advantage='group_relative')
  assert (grouped.gae_lambda, grouped.value_head) == (1.0, 'linear')
  gated = config_lib.replace(FinetuneConfig(), kl_gate='threshold', gate_threshold=0.5)
  assert config_lib.replace(gated, kl='none') == config_lib.replace(FinetuneConfig(), kl='none')
  assert config_lib.reset(gated, 'kl_gate', 'seed') == FinetuneConfig()
  assert 'gate_threshold' not in config_lib.counting_values(FinetuneConfig())


def test_a_wrong_value_is_named_before_the_fields_that_it_switches_off():
  with pytest.raises(ValueError, match=r'^kl: expected one of'):
    config_lib.replace(FinetuneConfig(), kl='prioritised', kl_coefficient=2.0)


OLD_FINETUNING = """\
{"loss": {"algorithm": "a2c", "clip_ratio": 0.1, "value_clip": 0.0, "value_coefficient": 0.2, "entropy_coefficient":
0.0, "temperature": 1.0, "kl": "standard", "kl_estimator": "k3", "kl_placement": "loss", "kl_coefficient": 2.0,
"certainty": "negentropy", "certainty_exponent": 10.0, "certainty_intercept": 0.0, "certainty_temperature": 4.0,
"kl_gate": "top_entropy", "gate_threshold": 0.7, "gate_fraction": 0.3}, "reference": "there", "certainty_ensemble":
"", "extra_digits": 2, "num_iterations": 30, "episodes": 48, "episodes_per_problem": 1, "epochs": 1, "minibatches": 2,
"learning_rate": 0.001, "max_grad_norm": 1.0, "max_skipped": 3, "wrong_reward": -1.0, "advantage": "leave_one_out",
"whiten_advantages": false, "discount": 0.9, "gae_lambda": 0.95, "bootstrap_truncated": false, "critic_warmup": 0,
"value_head": "mlp", "value_head_detached": true, "dtype": "bfloat16", "attention": "", "remat": true, "scan_layers":
false, "rollout": "cached", "window": 8, "seed": 3, "save_every": 4, "max_to_keep": 20, "eval_problems": 128}"""


def test_a_config_that_had_gates_in_its_loss_is_read():
  found = config_lib.from_json(FinetuneConfig, OLD_FINETUNING)
  assert config_lib.differences(found, FinetuneConfig()) == {
      'algorithm': 'a2c', 'kl': 'standard', 'kl_estimator': 'k3', 'kl_coefficient': 2.0, 'kl_gate': 'top_entropy',
      'gate_fraction': 0.3, 'reference': 'there', 'extra_digits': 2, 'num_iterations': 30, 'episodes': 48,
      'minibatches': 2, 'learning_rate': 0.001, 'wrong_reward': -1.0, 'advantage': 'leave_one_out', 'dtype': 'bfloat16',
      'remat': True, 'rollout': 'cached', 'seed': 3}
  values = config_lib.flat_values(found)  # what had no effect has its default
  for name in ('clip_ratio', 'certainty_exponent', 'certainty_temperature', 'gate_threshold', 'value_coefficient',
               'discount', 'gae_lambda', 'value_head', 'window'):
    assert values[name] == config_lib.flat_fields(FinetuneConfig)[name].default
  older = json.loads(OLD_FINETUNING)  # from before there were gates
  for name in ('kl_gate', 'gate_threshold', 'gate_fraction'):
    del older['loss'][name]
  assert config_lib.from_dict(FinetuneConfig, older) == config_lib.replace(found, kl_gate='none')


def test_a_run_of_addition_that_was_saved_with_settings_of_stories_is_read():
  saved = dataclasses.asdict(FinetuneConfig())
  saved['stories'] = {'extra_facts': 4}  # as saved before `asks` was added
  assert config_lib.from_dict(FinetuneConfig, saved) == FinetuneConfig()


def test_what_may_differ_when_a_run_is_resumed():
  machine = set(config_lib.flat_fields(MachineConfig))
  assert machine == {'dtype', 'attention', 'remat', 'scan_layers', 'rollout', 'window', 'save_every', 'max_to_keep',
                     'max_skipped', 'eval_problems', 'reward_workers', 'reward_seconds'}
  assert set(config_lib.flat_fields(FinetuneConfig)) - machine - set(config_lib.flat_fields(RLConfig)) == {
      'task', 'extra_digits', 'wrong_reward', 'model', 'prompts', 'chat', 'chat_options', 'stop', 'response_length',
      'held_out', 'reward', 'reward_weights', 'success', 'dataset_options', 'extra_facts', 'asks', 'seed',
      'num_iterations', 'reference', 'certainty_ensemble'}
  assert set(config_lib.flat_fields(RunConfig)) < set(config_lib.flat_fields(PretrainConfig))


_PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 300), st.floats(), st.floats(0, 1), st.text(max_size=5),
    st.sampled_from(['standard', 'none', 'a2c', 'gae', 'mlp', 'bfloat16', 'cudnn', 'exact', 'reward', 'oracle', 'a,b',
                     'speculative', 'adamw', 'leave_one_out', 'max_prob']))
_SCALARS = st.one_of(
    st.integers(0, 99).map(np.int16), st.integers(0, 99).map(jnp.int32), st.floats(width=32).map(np.float32),
    st.floats(0, 1, width=32).map(jnp.float32), st.booleans().map(np.bool_), st.just(np.str_('standard')),
    st.just(np.datetime64('2020-01-01')), st.just(np.zeros(1)), st.just(np.complex64(1)))
_OTHERS = st.sampled_from([b'none', [], {}, (1,), fractions.Fraction(1, 2), decimal.Decimal(1), 1j, datetime.date.min,
                           pathlib.Path('x'), float, object()])
VALUES = st.one_of(_PLAIN, _SCALARS, _OTHERS)


def changes_of(config_class):
  names = sorted(config_lib.flat_fields(config_class))
  return st.tuples(st.just(config_class), st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))


CHANGES = st.sampled_from([GPT2Config, LossConfig, PretrainConfig, FinetuneConfig]).flatmap(changes_of)


def is_read_back_or_refused_by_name(config_class, values):
  """Returns whether the values are accepted."""
  try:
    config = config_lib.replace(config_class(), **values)
  except ValueError as error:
    reason = str(error)
  else:
    reason = ''
  if reason:
    assert re.match(r'\w*', reason)[0] in config_lib.flat_fields(config_class), reason
    return False
  assert config_lib.from_json(config_class, config_lib.to_json(config)) == config
  assert all(type(config_lib.flat_values(config)[name]) is field.type
             for name, field in config_lib.flat_fields(config_class).items())
  return True


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(CHANGES)
def test_any_values_are_read_back_or_refused_by_name(changes):
  is_read_back_or_refused_by_name(*changes)


@pytest.mark.slow
def test_many_values_are_read_back_or_refused_by_name():
  accepted = []

  @settings(max_examples=2000, deadline=None, derandomize=True, database=None)
  @given(CHANGES)
  def check(changes):
    accepted.append(is_read_back_or_refused_by_name(*changes))

  check()
  assert len(accepted) >= 1000
  assert 50 < sum(accepted) < len(accepted) - 50  # both are tried
