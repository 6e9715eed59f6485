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
from critkl_jax.config import FinetuneConfig, GPT2Config, LossConfig, PretrainConfig
from critkl_jax.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

ALL = {**{f'pretrain {k}': v for k, v in PRETRAIN_PRESETS.items()},
       **{f'finetune {k}': v for k, v in FINETUNE_PRESETS.items()}}


@pytest.mark.parametrize('name', ALL)
def test_json_and_back(name):
  config = ALL[name]
  assert config_lib.from_json(type(config), config_lib.to_json(config)) == config


def test_presets_are_there():
  assert set(PRETRAIN_PRESETS) == {'smoke', 'tiny', 'small', 'paper', 'gpt2', 'gpt2_xl'}
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
  changed = FinetuneConfig(dtype='bfloat16', attention='cudnn', value_head='mlp', remat=True).model_of(reference)
  assert changed == GPT2Config(width=64, dtype='bfloat16', attention='cudnn', value_head='mlp', remat=True)


def test_flat_views_name_every_field_once():
  fields = config_lib.flat_fields(FinetuneConfig)
  expected = {f.name for c in (FinetuneConfig, LossConfig) for f in dataclasses.fields(c)} - {'loss'}
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
    (lambda: FinetuneConfig(gae_lambda=1.01), 'gae_lambda.*1.01'),
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
  assert 0.05 < sum(accepted) / len(accepted) < 0.95
