import dataclasses
import json

import pytest

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
      ({'episodes': '96'}, "episodes: expected int, got '96'"),
      ({'whiten_advantages': 1}, 'whiten_advantages: expected bool'),
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
