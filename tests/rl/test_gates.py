import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import TOKENIZER, letter_task

from critkl_jax import config as config_lib
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.ops.weighted_kl import api
from critkl_jax.records import Batch
from critkl_jax.rl import losses
from critkl_jax.rl.aggregation import masked_mean
from critkl_jax.rl.gates import GATES, READ_CERTAINTY, READ_FRACTION, kl_gate
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.train_step import make_train_step

KEY = jax.random.key(0)
MASK = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
TOKENS = {
    'certainty': jnp.array([[0.95, 0.2, 0.9, 0.99, 0.5], [1.0, 0.89, 0.91, 0.92, 0.0]]),
    'entropy': jnp.array([[0.1, 0.9, 0.2, 0.0, 0.5], [0.0, 0.3, 0.25, 0.05, 9.0]]),
    'log_probs': jnp.array([[-1.0, -1.0, -3.0, -1.0, -1.0], [-1.0, 0.0, -1.0, -1.0, 0.0]]),
    'advantages': jnp.array([[1.0, 1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0, 0.0]]),
    'critical': jnp.array([[0, 1, 0, 0, 1], [0, 1, 0, 0, 0]], bool)}


def gate(name, **changes):
  return np.asarray(kl_gate(name, MASK, key=KEY, **(TOKENS | changes)))


@pytest.mark.parametrize(('name', 'changes', 'wanted'), [
    ('none', {}, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    ('oracle', {}, [[1, 0, 1, 1, 0], [1, 0, 1, 1, 0]]),
    ('threshold', {}, [[1, 0, 1, 1, 0], [1, 0, 1, 1, 0]]),
    ('threshold', {'threshold': 0.5}, [[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]]),
    ('uncritical', {'threshold': 0.95}, [[1, 1, 0, 1, 1], [1, 1, 0, 0, 0]]),
    ('top_entropy', {'fraction': 1 / 3}, [[1, 0, 1, 1, 0], [1, 0, 1, 1, 0]]),  # 3 of 9
    ('response_entropy', {'fraction': 0.25}, [[1, 0, 1, 1, 1], [1, 0, 1, 1, 0]]),  # 1 of 5, 1 of 4
    ('negative_advantage', {}, [[0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]),
    ('kl_cov', {'fraction': 1 / 9}, [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),  # the four greatest tie: none is selected
    ('kl_cov', {'fraction': 4 / 9}, [[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]]),
    ('top_entropy', {'fraction': 0.0}, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    ('top_entropy', {'fraction': 1.0}, [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
])
def test_gates_by_hand(name, changes, wanted):
  np.testing.assert_array_equal(gate(name, **changes), wanted)


def test_the_covariance_of_single_tokens():
  advantages = jnp.array([[1.0, 2.0, 1.0, 1.5, 1.0], [-1.0, -1.0, -1.0, -1.2, 0.0]])
  mean = [float(jnp.sum(jnp.where(MASK, x, 0)) / 9) for x in (TOKENS['log_probs'], advantages)]
  covariance = np.where(MASK, (TOKENS['log_probs'] - mean[0]) * (advantages - mean[1]), -np.inf)
  order = np.argsort(-covariance.ravel())
  wanted = np.zeros(10)
  wanted[order[:2]] = 1
  np.testing.assert_array_equal(gate('kl_cov', advantages=advantages, fraction=2 / 9).ravel(), wanted)


def test_random_tokens_are_as_many_as_the_critical_ones():
  mask = jnp.arange(50)[None] < jnp.array([[50], [30], [10]])
  critical = mask & (jnp.arange(50)[None] % 9 == 2)
  some = {name: jnp.zeros(mask.shape) for name in ('certainty', 'entropy', 'log_probs', 'advantages')}
  off = [mask & (kl_gate('random', mask, critical=critical, key=jax.random.key(i), **some) == 0) for i in range(2)]
  for one in off:
    np.testing.assert_array_equal(one.sum(1), critical.sum(1))
  assert (off[0] != off[1]).any()


def test_unknown_gates():
  with pytest.raises(ValueError, match='kl_gate: expected one of'):
    gate('all')
  with pytest.raises(ValueError, match='kl_gate'):
    FinetuneConfig(kl_gate='all')
  with pytest.raises(ValueError, match="kl_gate: 'oracle' needs kl_placement='loss'"):
    FinetuneConfig(kl_gate='oracle', kl_placement='reward')
  for name in GATES:
    assert FinetuneConfig(kl_gate=name).kl_gate == name


def reads(name):
  """Returns the names, of threshold and fraction, that change the gate's mask."""
  usual = gate(name, threshold=0.6, fraction=0.4)
  changes = {'threshold': {'threshold': 0.95}, 'fraction': {'fraction': 0.9}}
  return {what for what, change in changes.items()
          if (gate(name, **{'threshold': 0.6, 'fraction': 0.4, **change}) != usual).any()}


@pytest.mark.parametrize('name', GATES)
def test_what_a_gate_reads_is_what_its_config_takes(name):
  assert reads(name) == {*(('threshold',) if name in READ_CERTAINTY else ()),
                         *(('fraction',) if name in READ_FRACTION else ())}


def test_the_penalty_is_taken_where_the_gate_is_on():
  logits, ref_logits = jax.random.normal(KEY, (2, 2, 5, 7))
  zeros = jnp.zeros((2, 5))
  batch = Batch(actions=jnp.ones((2, 5), jnp.int32), mask=MASK, log_probs=zeros, values=zeros, advantages=zeros,
                returns=zeros)
  config = LossConfig(certainty_exponent=2.0, kl_coefficient=3.0)
  gates = jnp.asarray(gate('oracle'))
  record = losses.weighted_kl(logits, ref_logits, batch.actions, mask=MASK, exponent=2.0)
  penalty, weight = losses.weighted_penalty(record, config)
  _, metrics = losses.ppo_loss(logits, zeros, ref_logits, batch.replace(weight=gates * weight), config)
  np.testing.assert_allclose(metrics['kl_penalty'], masked_mean(gates * penalty, MASK), rtol=1e-6)
  np.testing.assert_allclose(metrics['weight'], masked_mean(gates * weight, MASK), rtol=1e-6)
  np.testing.assert_allclose(metrics['kl'], masked_mean(record.kl, MASK), rtol=1e-6)
  off = losses.ppo_loss(logits, zeros, ref_logits, batch.replace(weight=0 * gates), config)[0]
  none = losses.ppo_loss(logits, zeros, ref_logits, batch, config_lib.replace(config, kl_coefficient=0.0))[0]
  np.testing.assert_allclose(off, none, atol=1e-6)


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize('name', ['oracle', 'random', 'kl_cov'])  # each compiles two steps
@pytest.mark.slow
def test_a_step_with_a_gate_from_logits_and_from_hidden_states(name, monkeypatch):
  model = gpt2(GPT2Config(vocab_size=TOKENIZER.vocab_size, context_length=8, num_layers=1, num_heads=2, width=16))
  fraction = {'gate_fraction': 0.3} if name in READ_FRACTION else {}
  config = config_lib.replace(FinetuneConfig(episodes=16, minibatches=2, learning_rate=1e-2), kl_gate=name,
                              kl_coefficient=1.0, certainty_exponent=1.0, **fraction)
  reference = model.init(jax.random.key(0))

  def advance():
    state, step = init_finetuning(model, config, reference), make_train_step(model, letter_task(), config)
    for _ in range(3):
      state, metrics = step(state, finetuning_keys(config)[1], Hyperparameters.of(config))
    return jax.device_get((state.params, metrics))

  params, metrics = advance()
  monkeypatch.setattr(api, 'SMALL_VOCABULARY', 0)
  again, others = advance()
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), params, again)
  for metric, value in metrics.items():
    np.testing.assert_allclose(value, others[metric], rtol=1e-3, atol=1e-4, err_msg=metric)
  assert metrics['kl'] > 0
