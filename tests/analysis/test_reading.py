import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SMOKE, finetuned_workdir, noisy, write
from matplotlib.figure import Figure
from passes import logits

from critkl_jax.analysis.charts import plot_certainty, plot_positions, plot_steps, reliability
from critkl_jax.analysis.comparison import compare, parameter_drift
from critkl_jax.analysis.reading import load_pair, model_of, read_steps, read_tokens, reference_model_of, reference_path
from critkl_jax.analysis.summary import summarize
from critkl_jax.config import replace
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.rl.certainties import certainty, kl_weight
from critkl_jax.runtime import checkpoint
from critkl_jax.runtime.checkpoint import CheckpointError, load_checkpoint
from critkl_jax.tasks.addition import TOKENIZER
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.presets import FINETUNE_PRESETS


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  home = tmp_path_factory.mktemp('run')
  finetuned_workdir(home, certainty_exponent=10.0, kl_coefficient=2.0)
  return home


@pytest.fixture(params=[
    pytest.param({}, marks=pytest.mark.slow),
    {'scan_layers': True, 'attention': 'xla', 'advantage': 'gae', 'value_head': 'mlp'}])
def workdir_of_equals(request, tmp_path, standard_promotion):
  """Makes a run in bfloat16 whose parameters equal those of its float32 reference."""
  reference = noisy(gpt2(SMOKE.model).init(jax.random.key(0)), 0.3)
  write(tmp_path / 'reference', reference, 7)
  training = replace(FINETUNE_PRESETS['smoke'], dtype='bfloat16', kl='standard', **request.param)
  model = training.model_of(SMOKE.model)
  params = {**reference, 'value_head': gpt2(model).init(jax.random.key(1))['value_head']}
  write(tmp_path / 'checkpoints', params, 4, training, model)
  return tmp_path


@pytest.fixture(scope='module')
def greedy(workdir):
  return read_tokens(workdir, num_problems=3, batch_size=2)


@pytest.fixture(scope='module')
def solutions(workdir):
  return read_tokens(workdir, num_problems=3, responses='solution')


def test_what_is_read_is_what_the_models_say(workdir, solutions):
  """Recomputes each statistic from the logits of a plain pass over one text."""
  policy, reference = load_checkpoint(workdir), load_checkpoint(workdir / 'reference')
  i, text = 4, solutions['response'][4]
  prompt = f'Input:\n{solutions["problem"][i]}\nTarget:'
  tokens = jnp.asarray(TOKENIZER.encode(prompt + text))[None]
  log_pi, log_ref = (np.asarray(jax.nn.log_softmax(logits(gpt2(c.info.model), c.params, tokens)))[
      0, len(prompt) - 1:-1] for c in (policy, reference))
  n, actions = len(text), np.asarray(tokens[0, len(prompt):])
  assert solutions['mask'][i].sum() == n
  own = {name: solutions[name][i, :n] for name in solutions if solutions[name].ndim >= 2}
  at = np.arange(n), actions
  expected = {
      'token': actions, 'log_prob': log_pi[at], 'ref_log_prob': log_ref[at],
      'entropy': -(np.exp(log_pi) * log_pi).sum(1), 'ref_entropy': -(np.exp(log_ref) * log_ref).sum(1),
      'kl': (np.exp(log_pi) * (log_pi - log_ref)).sum(1), 'right_prob': np.exp(log_pi[at]),
      'ref_right_prob': np.exp(log_ref[at]),
      'certainty/min_entropy': certainty(jnp.asarray(log_ref), 'min_entropy'), 'certainty': certainty(log_ref),
      'weight': kl_weight(certainty(log_ref), 10.0),
      'penalty': 2.0 * kl_weight(certainty(log_ref), 10.0) * 0.5 * (log_pi[at] - log_ref[at])**2}
  for name, wanted in expected.items():
    np.testing.assert_allclose(own[name], wanted, rtol=2e-4, atol=2e-6, err_msg=name)
  np.testing.assert_array_equal(own['top'], np.argsort(-log_pi, 1, kind='stable')[:, :5])
  np.testing.assert_allclose(own['ref_top_prob'], -np.sort(-np.exp(log_ref), 1)[:, :5], rtol=1e-4)
  assert ''.join(own['text']) == text
  assert own['right'].all()
  assert own['on_path'].all()


@pytest.mark.parametrize(('attention', 'here'), [('xla', 'xla'), ('auto', 'auto'), ('cudnn', 'auto')])
def test_reference_and_policy_are_read_by_one_network_that_runs_here(attention, here):
  training = replace(FINETUNE_PRESETS['smoke'], dtype='bfloat16', attention=attention, remat=True, scan_layers=True)
  policy, reference = (
      checkpoint.Checkpoint(None, checkpoint.CheckpointInfo(model, Addition(1), config), 0, pathlib.Path())
      for model, config in ((training.model_of(SMOKE.model), training), (SMOKE.model, SMOKE)))
  found = reference_model_of(policy, reference)
  assert found == model_of(policy)
  assert (found.config.dtype, found.config.attention, found.config.scan_layers) == ('bfloat16', here, True)
  assert model_of(reference).config == SMOKE.model  # without a policy it is read as in pre-training


@pytest.mark.slow
def test_a_policy_that_equals_its_reference_has_no_divergence(workdir_of_equals):
  """Read in its own float32, the reference would differ by 0.01 nats at single tokens of a bfloat16 policy."""
  found = read_tokens(workdir_of_equals, num_problems=2, responses='solution')
  assert found['mask'].sum() > 100
  for name in ('kl', 'penalty'):
    np.testing.assert_array_equal(found[name], 0)
  np.testing.assert_array_equal(found['log_prob'], found['ref_log_prob'])
  steps = read_steps(workdir_of_equals, num_problems=2)
  np.testing.assert_array_equal([steps['critical_kl'], steps['other_kl']], 0)
  one, two = load_checkpoint(workdir_of_equals / 'reference'), load_checkpoint(workdir_of_equals)
  assert compare(one, two, num_problems=2)['kl']['mean'] == 0


@pytest.mark.slow
def test_responses_of_the_policy(greedy):
  num, length = greedy['mask'].shape
  assert num == 6
  assert greedy['set'].tolist() == ['1', '1', '1', '2', '2', '2']
  for name, x in greedy.items():
    assert x.shape[0] == num, name
    assert x.ndim == 1 or x.shape[1] == length, name
  rows = np.arange(num)
  first_wrong = np.argmax(~greedy['right'], 1)
  assert greedy['on_path'][rows, first_wrong].all()
  assert not greedy['on_path'][rows, first_wrong + 1].any()
  best = greedy['top'][..., 0]
  assert (best == greedy['token'])[greedy['mask']].mean() > 0.999  # greedy, except for ties


@pytest.mark.slow
def test_the_same_seed_reads_the_same(workdir, greedy):
  again = read_tokens(workdir, num_problems=3, batch_size=2)
  for name, x in greedy.items():
    np.testing.assert_array_equal(again[name], x)
  sampled = read_tokens(workdir, num_problems=3, batch_size=2, responses='sampled')
  np.testing.assert_array_equal(sampled['problem'], greedy['problem'])
  assert (sampled['response'] != greedy['response']).all()


@pytest.mark.slow
def test_references_are_found(workdir, tmp_path):
  policy, reference = load_pair(workdir)
  assert reference.path == (workdir / 'reference' / '7').resolve()
  assert reference_path(reference) == reference.path
  elsewhere = tmp_path / 'copied'
  write(elsewhere / '4', policy.params, 4, training=policy.info.training)
  assert reference_path(load_checkpoint(elsewhere / '4')) == load_checkpoint().path
  with pytest.raises(CheckpointError, match='known_digits is 1, but 5 in the reference'):
    load_pair(elsewhere / '4')
  lost = tmp_path / 'lost'
  for step in (1, 2, 4):
    write(lost, policy.params, step, training=replace(policy.info.training, reference='/gone'))
  with pytest.raises(CheckpointError, match='/gone: no such directory'):
    load_pair(lost)
  shutil.rmtree(lost / '1' / 'params' / 'd')  # as left by a process killed while removing the step
  assert read_steps(lost, workdir / 'reference', num_problems=1)['step'].tolist() == [2, 4]
  assert load_pair(elsewhere / '4', workdir / 'reference')[1].step == 7
  with pytest.raises(ValueError, match='responses: expected one of'):
    read_tokens(workdir, responses='best')
  with pytest.raises(ValueError, match='num_problems: expected 1 or more'):
    read_tokens(workdir, num_problems=0)


@pytest.mark.slow
def test_another_temperature_is_that_of_samples_policy_and_reference(tmp_path):
  finetuned_workdir(tmp_path, steps=(2,), temperature=2.0, certainty='max_prob', certainty_temperature=4.0)
  one = read_tokens(tmp_path, num_problems=2, sets=[1], responses='sampled')
  policy = load_checkpoint(tmp_path)
  i, n = 0, int(one['mask'][0].sum())
  text = f'Input:\n{one["problem"][i]}\nTarget:' + one['response'][i]
  tokens = jnp.asarray(TOKENIZER.encode(text))[None]
  said = logits(gpt2(policy.info.model), policy.params, tokens)[0, -n - 1:-1]
  wanted = jnp.take_along_axis(jax.nn.log_softmax(said / 2), tokens[0, -n:, None], 1)[:, 0]
  np.testing.assert_allclose(one['log_prob'][i, :n], wanted, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(one['certainty'], one['certainty/max_prob'], rtol=1e-5)
  np.testing.assert_array_equal(one['critical/threshold'], one['mask'] & (one['certainty'] < 0.9))


@pytest.mark.slow
def test_summary(greedy, solutions):
  found = summarize(solutions)
  here, critical = solutions['on_path'], solutions['critical/oracle']
  assert found['places']['critical']['number'] == critical.sum() > 0
  assert found['places']['other']['kl'] == pytest.approx(solutions['kl'][here & ~critical].mean())
  assert found['places']['after_error']['number'] == 0
  gaps = [solutions['certainty'][i][critical[i]].mean() - solutions['certainty'][i][here[i] & ~critical[i]].mean()
          for i in range(6) if critical[i].any()]
  assert found['certainty_gap'][0] == pytest.approx(np.mean(gaps), rel=1e-5)
  assert found['accuracy'] == {}  # solutions are not answers
  assert set(found['agreement']) == {'oracle'}
  assert set(found['agreement']['oracle']) == {'threshold', 'quantile'}
  own = summarize(greedy)
  assert own['accuracy']['2']['accuracy'] == 0
  assert own['places']['after_error']['right_prob'] is None
  assert own['certainty_gap'] is None  # no response reaches a critical token


def test_reliability_of_a_reference(solutions):
  said, rate, count = reliability(solutions)
  assert count.sum() == solutions['on_path'].sum()
  right = solutions['ref_top'][..., 0] == solutions['token']
  assert rate @ count == pytest.approx(right[solutions['on_path']].sum())
  assert ((said >= 0) & (said <= 1)).all()


@pytest.mark.slow
def test_steps(workdir, tmp_path):
  steps = read_steps(workdir, num_problems=2, num_solutions=2)
  assert steps['step'].tolist() == [0, 2, 4]  # the reference, and the saved steps
  assert steps['critical_kl'][0] == pytest.approx(0, abs=1e-6)
  assert steps['critical_kl'][0] < steps['critical_kl'][1] < steps['critical_kl'][2]
  assert steps['right_prob'].shape == (3, *steps['mask'].shape)
  assert read_steps(workdir, num_problems=2, most=1)['step'].tolist() == [0, 4]
  in_parts = read_steps(workdir, num_problems=2, num_solutions=2, batch_size=1)
  for name in ('critical_prob', 'other_kl', 'right_prob'):
    np.testing.assert_allclose(in_parts[name], steps[name], rtol=1e-4, atol=1e-6)
  assert read_steps(workdir, workdir / 'checkpoints' / '2', num_problems=2)['step'].tolist() == [2, 4]  # not its own
  plot_steps(steps, tmp_path / 'steps.png', 'steps')
  assert (tmp_path / 'steps.png').stat().st_size > 1000


@pytest.mark.slow
def test_pictures(greedy, solutions, tmp_path):
  for name, tokens in (('greedy', greedy), ('solutions', solutions)):
    plot_certainty(tokens, tmp_path / f'{name}1.png', name)
    plot_positions(tokens, tmp_path / f'{name}2.png', name)
  assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
def test_positions_say_how_many_responses_reach_them(greedy, tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(Figure, 'savefig', lambda self, *_, **__: figures.append(self))
  plot_positions(greedy, tmp_path / 'x.png', 'title')
  reach = figures[0].axes[-1]
  length = int(greedy['mask'].any(0).sum())
  assert reach.get_title() == 'number of responses that reach the position'
  filled = reach.collections[0].get_paths()[0].vertices
  reached = {int(x): y for x, y in filled if y > 0}
  assert [reached[i] for i in range(length)] == greedy['mask'].sum(0)[:length].tolist()
  assert reach.get_lines()[0].get_ydata().tolist() == greedy['on_path'].sum(0)[:length].tolist()


@pytest.mark.slow
def test_a_checkpoint_against_itself(workdir):
  one = load_checkpoint(workdir)
  found = compare(one, one, num_problems=2)
  assert all(row['distance'] == 0 for row in found['drift'])
  assert sum(row['parameters'] for row in found['drift']) == sum(x.size for x in jax.tree.leaves(one.params))
  assert found['flipped'] == []
  assert found['kl']['mean'] == pytest.approx(0, abs=1e-7)
  mean, low, high = found['answers']['1']['difference']
  assert mean == 0
  assert low == -high < -0.5  # two problems with equal answers


@pytest.mark.slow
def test_a_checkpoint_against_another(workdir):
  one, two = load_checkpoint(workdir / 'reference'), load_checkpoint(workdir)
  found = compare(one, two, num_problems=2)
  blocks = [f'h_{i}/{part}' for i in (0, 1) for part in ('attn', 'ln_1', 'ln_2', 'mlp')]
  assert [row['layer'] for row in found['drift']] == ['wpe', 'wte', *blocks, 'ln_f', 'value_head']
  row = found['drift'][1]
  moved = np.linalg.norm(np.asarray(two.params['wte']['embedding'] - one.params['wte']['embedding']))
  assert row['distance'] == pytest.approx(moved, rel=1e-5)
  assert found['kl']['mean'] > 0
  position = found['kl']['by_position']
  assert np.isfinite(position[:50]).all()
  assert np.isnan(position[-1])


@pytest.mark.slow
def test_models_of_other_sizes_are_compared_by_what_they_say(workdir):
  wide = gpt2(SMOKE.model.__class__(context_length=384, num_layers=1, num_heads=2, width=16))
  one = load_checkpoint(workdir)
  info = checkpoint.CheckpointInfo(wide.config, Addition(1), SMOKE)
  two = checkpoint.Checkpoint(wide.init(jax.random.key(0)), info, 0, one.path.parent)
  found = compare(one, two, num_problems=2)
  assert [row['layer'] for row in found['drift']] == ['value_head']
  assert 'wte/embedding' in found['left_out']
  assert 'h_1/attn/c_attn/kernel' in found['left_out']
  assert compare(one, one, num_problems=2)['left_out'] == []


def test_noise_is_drift():
  params = {'wte': {'embedding': jnp.ones((3, 4))}}
  (row,) = parameter_drift(params, noisy(params, 0.0))
  assert row == {'layer': 'wte', 'parameters': 12, 'distance': 0.0, 'relative': 0.0}
