import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tiers import slow_except

from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.sampling.generation import generate, model_generate
from critkl_jax.sampling.scoring import score
from critkl_jax.tasks.task import stop_after

STOP = stop_after([[3]])
NEVER = stop_after([[99]])


@pytest.fixture(scope='module')
def prompts():
  mask = jnp.arange(6)[None] >= jnp.array([0, 2, 5, 3])[:, None]
  return jnp.where(mask, jax.random.randint(jax.random.key(2), (4, 6), 4, 11), 0), mask


def sample(small_model, prompts, seed=0, params=None, **options):
  model, own = small_model
  options = {'max_new_tokens': 20, 'stop': STOP} | options
  return model_generate(model, own if params is None else params, *prompts, jax.random.key(seed), **options)


def test_nothing_is_written_after_the_end(small_model, prompts):
  for seed in range(5):
    rollout = sample(small_model, prompts, seed)
    lengths = rollout.mask.sum(1)
    for b, length in enumerate(lengths.tolist()):
      assert rollout.mask[b, :length].all()
      assert not (rollout.actions[b, :length - 1] == 3).any()
      assert length == 20 or rollout.actions[b, length - 1] == 3
      for field in ('actions', 'log_probs', 'values'):
        assert not getattr(rollout, field)[b, length:].any()
    assert rollout.log_probs.max() <= 0
  assert len(set(lengths.tolist())) > 1


def test_prompts_that_are_not_padded_on_the_left(small_model, prompts):
  """Elsewhere the last column would be padding, from which a plausible response would be generated."""
  tokens, mask = prompts
  for wrong in (mask.at[1].set(mask[1, ::-1]), mask.at[0, 3].set(False), mask.at[2].set(False)):
    with pytest.raises(ValueError, match='prompt_mask: prompts must be padded on the left, and 1 of 4 are not'):
      sample(small_model, (tokens, wrong))
    rollout = jax.jit(lambda mask: sample(small_model, (tokens, mask), max_new_tokens=3))(wrong)
    kept = jnp.all(wrong == mask, 1)
    sampled = rollout.mask & ~kept[:, None]
    assert jnp.any(sampled)
    assert jnp.all(jnp.isnan(rollout.log_probs[sampled]) & jnp.isnan(rollout.values[sampled]))
    assert jnp.all(jnp.isfinite(rollout.log_probs[kept]))


def test_same_key_same_tokens_other_key_other_tokens(small_model, prompts):
  one, two, other = (sample(small_model, prompts, seed) for seed in (7, 7, 8))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert jnp.any(one.actions != other.actions)


def test_an_episode_does_not_depend_on_the_length_of_the_others(small_model, prompts):
  alone = sample(small_model, jax.tree.map(lambda x: x[:1], prompts), stop=STOP)
  together = sample(small_model, prompts, stop=STOP)
  np.testing.assert_array_equal(alone.actions[0], together.actions[0])


@pytest.mark.parametrize('temperature', [0.7, 1.0, 2.0])
def test_recorded_log_probabilities_and_values_are_the_rescored_ones(small_model, prompts, temperature):
  model, params = small_model
  rollout = sample(small_model, prompts, temperature=temperature)
  logits, values = score(model, params, rollout)
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), rollout.actions[..., None], -1)[..., 0]
  np.testing.assert_allclose(rollout.log_probs, jnp.where(rollout.mask, log_probs, 0), atol=1e-5)
  np.testing.assert_allclose(rollout.values, jnp.where(rollout.mask, values, 0), atol=1e-5)


def test_greedy_takes_the_most_probable_token(small_model, prompts):
  model, params = small_model
  rollout = sample(small_model, prompts, greedy=True)
  logits, _ = score(model, params, rollout)
  assert jnp.all((jnp.argmax(logits, -1) == rollout.actions) | ~rollout.mask)


def table_policy(logits):
  """Makes a policy without memory: it predicts the same at every step."""

  def policy(tokens, mask, state):
    del mask
    shape = (*tokens.shape, logits.size)
    return jnp.broadcast_to(logits[None, None], shape), jnp.full(tokens.shape, 0.5), state + 1

  return policy


# Four tokens of a small vocabulary, and of one so large that a token is drawn in two steps: two of them in one block.
FOUR_TOKENS = pytest.mark.parametrize('four', [[0, 1, 2, 3], [7, 193, 194, 2999]], ids=['small', 'large'])


def four_of_a_vocabulary(four):
  return jnp.full(four[-1] + 1, -jnp.inf).at[jnp.array(four)].set(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])))


@FOUR_TOKENS
def test_samples_follow_the_distribution_of_any_policy(four):
  logits = four_of_a_vocabulary(four)
  prompt = jnp.ones((64, 1), jnp.int32)
  for temperature in (1.0, 2.0):
    rollout = generate(table_policy(logits), jnp.int32(0), prompt, prompt > 0, jax.random.key(0), max_new_tokens=200,
                       stop=NEVER, temperature=temperature)
    found = np.bincount(rollout.actions.reshape(-1), minlength=logits.size) / rollout.actions.size
    np.testing.assert_allclose(found, jax.nn.softmax(logits / temperature), atol=0.015)
    assert jnp.all(rollout.values == 0.5)


@FOUR_TOKENS
def test_top_p_keeps_the_smallest_sufficient_set(four):
  logits = four_of_a_vocabulary(four)
  prompt = jnp.ones((32, 1), jnp.int32)
  for top_p, kept in ((0.3, {3}), (0.39, {3}), (0.45, {2, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
    rollout = generate(table_policy(logits), jnp.int32(0), prompt, prompt > 0, jax.random.key(0), max_new_tokens=40,
                       stop=NEVER, top_p=top_p)
    assert set(np.unique(rollout.actions).tolist()) == {four[i] for i in kept}
    np.testing.assert_allclose(rollout.log_probs, logits[rollout.actions], rtol=1e-6)


def test_a_large_vocabulary_is_sampled_evenly():
  logits = jnp.zeros(1500)  # the last block is not full
  prompt = jnp.ones((256, 1), jnp.int32)
  rollout = generate(table_policy(logits), jnp.int32(0), prompt, prompt > 0, jax.random.key(0), max_new_tokens=300,
                     stop=stop_after([[1500]]))
  counts = np.bincount(rollout.actions.reshape(-1), minlength=1500)
  assert counts.size == 1500
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_drafts_change_no_token_of_a_large_vocabulary():
  logits = jax.random.normal(jax.random.key(1), (1500,))
  prompt = jnp.ones((8, 1), jnp.int32)
  sampled = lambda **options: generate(table_policy(logits), jnp.int32(0), prompt, prompt > 0, jax.random.key(0),
                                       max_new_tokens=40, stop=NEVER, **options).actions
  plain = sampled()
  speculative = sampled(window=4, draft=guess(plain, 0), rewind=lambda state, num: state)
  np.testing.assert_array_equal(plain, speculative)


def test_the_loop_ends_when_all_episodes_have_ended():
  calls = []

  def policy(tokens, mask, state):
    del mask
    jax.debug.callback(lambda: calls.append(1))
    logits = jnp.where(jnp.arange(4) == 3, 0.0, -jnp.inf)  # always the token that ends the episode
    return jnp.broadcast_to(logits[None, None], (*tokens.shape, 4)), jnp.zeros(tokens.shape), state

  prompt = jnp.ones((2, 3), jnp.int32)
  rollout = generate(policy, (), prompt, prompt > 0, jax.random.key(0), max_new_tokens=1000, stop=STOP)
  jax.block_until_ready(rollout)
  jax.effects_barrier()
  assert rollout.mask.sum() == 2
  assert len(calls) == 2  # the prompt without its last token, then that token
  np.testing.assert_array_equal(rollout.num_calls, [1, 1])


def test_one_token(small_model, prompts):
  rollout = sample(small_model, prompts, max_new_tokens=1)
  assert rollout.actions.shape == (4, 1)
  assert rollout.mask.all()


@pytest.mark.slow
def test_under_vmap_over_keys_and_parameters(small_model, prompts):
  _, params = small_model
  members = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)
  keys = jax.random.split(jax.random.key(0), 2)
  run = lambda params, key: model_generate(small_model[0], params, *prompts, key, max_new_tokens=20, stop=STOP)
  both = jax.vmap(run)(members, keys)
  for i in range(2):
    single = run(jax.tree.map(lambda x, i=i: x[i], members), keys[i])
    np.testing.assert_array_equal(both.actions[i], single.actions)
    np.testing.assert_allclose(both.log_probs[i], single.log_probs, atol=1e-5)


DRAFTS = ('right', 'wrong', 'empty', 'random')


def guess(right, kind):
  """Makes a draft of one of four kinds: right tokens, wrong tokens, no guess, or any ids; `kind` may be traced."""

  def draft(rows, actions, num, size):
    del actions
    padded = jnp.pad(right, ((0, 0), (0, size)), constant_values=-1)
    next_ones = jax.vmap(lambda row, n: jax.lax.dynamic_slice(padded[row], (n,), (size,)))(rows, num)
    keys = jax.vmap(lambda row, n: jax.random.fold_in(jax.random.fold_in(jax.random.key(3), row), n))(rows, num)
    anything = jax.vmap(lambda key: jax.random.randint(key, (size,), -1, 11))(keys)
    return jnp.stack([next_ones, (next_ones + 1) % 11, jnp.full_like(anything, -1), anything])[kind]

  return draft


@pytest.fixture(scope='module')
def many_prompts():
  """Makes enough episodes that the last ones continue in smaller arrays."""
  mask = jnp.arange(6)[None] >= (jnp.arange(17) % 6)[:, None]
  return jnp.where(mask, jax.random.randint(jax.random.key(2), (17, 6), 4, 11), 0), mask


@pytest.mark.parametrize('greedy', [True, False])
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(small_model, many_prompts, greedy):
  plain_fn = jax.jit(lambda temperature: sample(
      small_model, many_prompts, method='cached', greedy=greedy, temperature=temperature))
  fn = jax.jit(lambda temperature, right, kind: sample(
      small_model, many_prompts, method='speculative', window=5, draft=guess(right, kind), greedy=greedy,
      temperature=temperature))
  for temperature in (0.7, 1.0, 2.0):
    plain = plain_fn(temperature)
    lengths = plain.mask.sum(1)
    np.testing.assert_array_equal(plain.num_calls, lengths)
    assert len(set(lengths.tolist())) > (1 if greedy else 5)
    for kind, name in enumerate(DRAFTS):
      rollout = fn(temperature, plain.actions, kind)
      _assert_same(rollout, plain)
      if name == 'right':
        np.testing.assert_array_equal(rollout.num_calls, -(-lengths // 5))
      elif name in ('wrong', 'empty'):
        np.testing.assert_array_equal(rollout.num_calls, lengths)


@pytest.mark.slow
def test_prompt_lookup_and_top_p_change_no_token(small_model, many_prompts):
  for options in ({'top_p': 0.8}, {'greedy': True, 'stop': NEVER}):
    plain = sample(small_model, many_prompts, method='cached', **options)
    rollout = sample(small_model, many_prompts, method='speculative', window=8, **options)
    _assert_same(rollout, plain)
    assert rollout.num_calls.sum() < plain.num_calls.sum()


def _assert_same(rollout, plain):
  np.testing.assert_array_equal(rollout.actions, plain.actions)
  np.testing.assert_array_equal(rollout.mask, plain.mask)
  np.testing.assert_allclose(rollout.log_probs, plain.log_probs, atol=2e-5)
  np.testing.assert_allclose(rollout.values, plain.values, atol=2e-5)


@pytest.mark.slow
def test_a_draft_sees_its_own_prompt_and_what_was_sampled(small_model, many_prompts):
  plain = sample(small_model, many_prompts, method='cached')
  seen = []

  def draft(rows, actions, num, size):
    jax.debug.callback(lambda *x: seen.append(jax.tree.map(np.array, x)), rows, actions, num)
    return jnp.full((rows.size, size), -1)

  jax.block_until_ready(sample(small_model, many_prompts, method='speculative', window=4, draft=draft))
  jax.effects_barrier()
  assert {len(rows) for rows, _, _ in seen} == {17, 2}  # the last two in arrays of their own
  for rows, actions, num in seen:
    for row, own, n in zip(rows, actions, num):
      np.testing.assert_array_equal(own[:n], plain.actions[row, :n])


def test_any_policy_that_can_forget_is_sampled_in_windows():
  logits = jax.random.normal(jax.random.key(5), (5, 5)) * 2

  def policy(tokens, mask, state):  # a Markov chain that checks that it has read what it was told to read
    del mask
    text, length = state
    text = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(text, tokens, length, 0)
    shape = tokens.shape
    return logits[tokens], jnp.broadcast_to(length[:, None], shape).astype(jnp.float32), (text, length + shape[1])

  def rewind(state, num):
    return state[0], state[1] - num

  prompt = jnp.ones((6, 2), jnp.int32)
  state = (jnp.zeros((6, 60), jnp.int32), jnp.zeros(6, jnp.int32))
  run = lambda **options: generate(policy, state, prompt, prompt > 0, jax.random.key(1), max_new_tokens=40, stop=STOP,
                                   **options)
  plain = run()
  rollout = run(window=5, rewind=rewind, draft=guess(plain.actions, 3))
  np.testing.assert_array_equal(rollout.actions, plain.actions)
  with pytest.raises(ValueError, match='window'):
    run(window=5)


@pytest.mark.parametrize(('prompt', 'tokens', 'usual', 'windows'), slow_except([(1, 1, 0, (1, 2, 500))], [
    (6, 100, 4, (99, 500)), (6, 100, 0, (63, 64, 65, 100, 101)), (6, 122, 30, (32, 33, 90, 121, 122)),
    (1, 1, 0, (1, 2, 500)), (6, 3, 0, (2, 3, 4, 500)), (2, 126, 1, (125, 126, 127))]))
def test_a_window_of_any_size_gives_the_tokens_of_plain_decoding(many_prompts, prompt, tokens, usual, windows):
  model = gpt2(GPT2Config(vocab_size=11, context_length=128, num_layers=1, num_heads=2, width=16))
  own = model, model.init(jax.random.key(3))
  prompts = [x[:, -prompt:] for x in many_prompts]
  options = {'max_new_tokens': tokens, 'usual_length': usual}
  plain = sample(own, prompts, method='cached', **options)
  for window in windows:
    _assert_same(sample(own, prompts, method='speculative', window=window, **options), plain)


@pytest.mark.slow
def test_episodes_that_are_cut_are_known(small_model, many_prompts):
  for method in ('cached', 'speculative'):
    rollout = sample(small_model, many_prompts, method=method, max_new_tokens=8)
    ended = jnp.any((rollout.actions == 3) & rollout.mask, 1)
    np.testing.assert_array_equal(rollout.truncated, ~ended)
    assert 0 < rollout.truncated.sum() < 17
  rollout = sample(small_model, many_prompts, max_new_tokens=1, stop=stop_after([[99]], range(11)))
  assert not rollout.truncated.any()  # the last token that fits ends the episode


@pytest.mark.parametrize('method', slow_except(('speculative',), ('cached', 'speculative')))
def test_a_response_may_fill_the_context(small_model, prompts, method):
  rollout = sample(small_model, prompts, stop=NEVER, max_new_tokens=26, method=method, window=8)
  assert rollout.mask.all()
  logits, _ = score(*small_model, rollout)
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), rollout.actions[..., None], -1)[..., 0]
  np.testing.assert_allclose(rollout.log_probs, log_probs, atol=1e-5)


def _loops(jaxpr):
  """Yields the loops of a program over a cache, those inside of conditions too."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'while' and any(v.aval.ndim >= 4 for v in eqn.outvars):
      yield eqn
    for branch in eqn.params.get('branches', ()):
      yield from _loops(branch.jaxpr)


def test_members_under_vmap_do_not_copy_the_cache(small_model, many_prompts):
  """If the loop's end differed between members, it would select between old and new cache in every step."""
  _, params = small_model
  members = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)
  for method in ('cached', 'speculative'):
    program = jax.make_jaxpr(jax.vmap(lambda params, m=method: sample(
        small_model, many_prompts, params=params, method=m)))(members)
    loops = list(_loops(program.jaxpr))
    assert len(loops) >= 2
    for loop in loops:
      assert loop.params['cond_jaxpr'].out_avals[0].shape == ()
      selected = [eqn.outvars[0].aval for eqn in loop.params['body_jaxpr'].eqns if eqn.primitive.name == 'select_n']
      assert not any(aval.ndim >= 4 and aval.dtype == jnp.float32 for aval in selected)


@pytest.fixture(scope='module')
def long_model():
  model = gpt2(GPT2Config(vocab_size=11, context_length=256, num_layers=1, num_heads=1, width=8))
  params = model.init(jax.random.key(0))
  return model, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)


@pytest.mark.parametrize('outlived', [1, 8])
@pytest.mark.slow
def test_a_cache_that_grows_changes_no_token(long_model, many_prompts, outlived):
  """Some episodes exceed the usual length; a few of them continue in smaller arrays, many with all others."""
  options = {'max_new_tokens': 150, 'stop': stop_after([[3], [3]]), 'temperature': 4.0}
  plain = jax.jit(lambda key: sample(long_model, many_prompts, key, method='cached', **options))(0)
  lengths = np.sort(plain.mask.sum(1))
  usual = int(lengths[-1 - outlived])
  assert usual + 64 < 150  # the cache has to grow beyond it
  for method in ('cached', 'speculative'):
    rollout = jax.jit(lambda key, m=method: sample(
        long_model, many_prompts, key, method=m, window=5, usual_length=usual, **options))(0)
    _assert_same(rollout, plain)
  logits, _ = score(*long_model, plain)
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits / 4), plain.actions[..., None], -1)[..., 0]
  np.testing.assert_allclose(plain.log_probs, jnp.where(plain.mask, log_probs, 0.0), atol=2e-5)


@pytest.mark.parametrize('impl', ['rbg', 'unsafe_rbg', 'raw'])
@pytest.mark.slow
def test_keys_of_any_generator_give_equal_tokens(small_model, many_prompts, impl):
  key = jax.random.PRNGKey(3) if impl == 'raw' else jax.random.key(3, impl=impl)
  options = {'max_new_tokens': 20, 'stop': STOP}
  plain, rollout, alone = (
      model_generate(*small_model, *prompts, key, method=method, window=4, **options) for method, prompts in (
          ('cached', many_prompts), ('speculative', many_prompts),
          ('cached', jax.tree.map(lambda x: x[:1], many_prompts))))
  _assert_same(rollout, plain)
  np.testing.assert_array_equal(alone.actions[0], plain.actions[0])


@pytest.mark.slow
def test_guesses_that_are_no_tokens_change_nothing(small_model, many_prompts):
  plain = sample(small_model, many_prompts, method='cached')
  draft = lambda rows, actions, num, size: jnp.full((rows.size, size), 40)
  _assert_same(sample(small_model, many_prompts, method='speculative', window=4, draft=draft), plain)


def test_a_window_is_no_longer_than_the_response(small_model, prompts):
  rollout = sample(small_model, prompts, method='speculative', window=30, max_new_tokens=3)
  _assert_same(rollout, sample(small_model, prompts, method='cached', max_new_tokens=3))


def test_errors(small_model, prompts):
  with pytest.raises(ValueError, match='method'):
    sample(small_model, prompts, method='fast')
  with pytest.raises(ValueError, match='usual_length'):
    sample(small_model, prompts, usual_length=-1)
  with pytest.raises(ValueError, match='top_p'):
    sample(small_model, prompts, top_p=0.0)
  with pytest.raises(ValueError, match='max_new_tokens'):
    sample(small_model, prompts, max_new_tokens=0)
  with pytest.raises(ValueError, match='context of 32'):
    sample(small_model, prompts, max_new_tokens=27)
