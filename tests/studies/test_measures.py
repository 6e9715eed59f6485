import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import logits

from critkl_jax import gpt2
from critkl_jax.models.gpt2 import GPT2Config
from critkl_jax.studies import measures
from critkl_jax.tasks.addition import Addition, plus_task
from critkl_jax.tasks.addition.problem_sets import draw_problems
from critkl_jax.tasks.addition.text import TOKENIZER
from critkl_jax.training import population

N = 2
MODEL = gpt2(GPT2Config(vocab_size=TOKENIZER.vocab_size, context_length=384, num_layers=1, num_heads=2, width=16))


def init(seed):
  return MODEL.init(jax.random.key(seed))


def right_probabilities(params, problems, task, temperature=1.0):
  """Returns the probability of each token of the right solutions, from a pass over whole solutions."""
  prompts, solutions = jax.jit(lambda x: (jax.vmap(task.prompt)(x), jax.vmap(task.solution)(x)))(problems)
  logits_of = jax.jit(lambda text: logits(MODEL, params, text[None])[0] / temperature)
  found = []
  for i in range(len(solutions.tokens)):
    text = np.concatenate([prompts.tokens[i][prompts.mask[i]], solutions.tokens[i][solutions.mask[i]]])
    said = logits_of(np.pad(text, (0, MODEL.config.context_length - len(text))))  # causal: padding is not seen
    of_next = jax.nn.softmax(said)[jnp.arange(len(text) - 1), text[1:]]
    own = np.full(solutions.tokens.shape[1], np.nan)
    own[np.asarray(solutions.mask[i])] = of_next[int(prompts.mask[i].sum()) - 1:]
    found.append(own)
  return np.array(found), solutions


@pytest.mark.slow
def test_the_test_reads_the_right_tokens_at_critical_ones():
  task, several = plus_task(N, 1), [init(seed) for seed in (0, 1)]
  test = measures.make_members_test(MODEL, Addition(N, 1), 6, population.members_mesh(1), temperature=2.0, batch_size=4)
  found = test(jax.tree.map(lambda *x: jnp.stack(x), *several), several[0])
  problem_key, _ = jax.random.split(jax.random.key(measures.SEED))
  problems = draw_problems(jax.random.fold_in(problem_key, N + 1), 6, 'plus', N + 1, N, N + 1)
  for params, own in zip(several, found):
    probabilities, solutions = right_probabilities(params, problems, task, temperature=2.0)
    expected = [row[critical].mean() for row, critical in zip(probabilities, np.asarray(solutions.critical))]
    np.testing.assert_allclose(own['N+1']['critical_probability'], expected, rtol=1e-4)
    assert 'critical_probability' not in own['N']


@pytest.mark.slow
def test_the_probe_tells_kinds_of_critical_tokens_apart():
  params, reference = init(1), init(0)
  probe = measures.make_probe(MODEL, reference, Addition(N, 1), temperature=0.1, num_problems=2, num_critical=12)
  found = {name: float(value) for name, value in jax.jit(probe)(params).items()}
  problems = draw_problems(jax.random.fold_in(jax.random.key(measures.SEED), N + 1), 12, 'plus', N + 1, N, N + 1)
  probabilities, solutions = right_probabilities(params, problems, plus_task(N, 1), temperature=0.1)
  critical = np.asarray(solutions.critical)
  assert found['critical/probability'] == pytest.approx(probabilities[critical].mean(), rel=1e-4)
  comma = critical & (np.asarray(solutions.tokens) == TOKENIZER.encode(',')[0])
  text = np.cumsum(np.asarray(solutions.tokens) == TOKENIZER.encode(']')[0], 1)
  assert found['critical/first_comma'] == pytest.approx(probabilities[comma & (text == 0)].mean(), rel=1e-4)
  assert found['critical/second_digit'] == pytest.approx(
      probabilities[critical & ~comma & (text == 1)].mean(), rel=1e-4)
  assert found['critical/kl'] > 0
  same = jax.jit(probe)(reference)
  assert all(abs(float(same[name])) < 1e-6 for name in ('critical/kl', 'probe_kl_other', 'probe_kl_known'))
