"""The task `stories`, against a plain Python reading of the same stories."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax.tasks.known_tasks import KNOWN_TASKS, from_json_object, to_json_object
from critkl_jax.tasks.stories import Stories, StoriesPretraining, WordTokenizer, by_facts, sample_story, stories
from critkl_jax.tasks.stories.text import NAMES, OBJECTS, PLACES, WORDS
from critkl_jax.training.config import FinetuneConfig

MOST = 9


@pytest.fixture(scope='module')
def task():
  return stories(1, MOST)


@pytest.fixture(scope='module')
def problems(task):
  return jax.jit(jax.vmap(task.sample))(jax.random.split(jax.random.key(0), 400))


@pytest.fixture(scope='module')
def texts(task, problems):
  prompt, solution = jax.jit(jax.vmap(task.prompt))(problems), jax.jit(jax.vmap(task.solution))(problems)
  return [tuple(task.tokenizer.decode(*some) for some in ((p, m), (s, n))) for p, m, s, n in zip(
      *map(np.asarray, (prompt.tokens, prompt.mask, solution.tokens, solution.mask)))]


def answered(prompt):
  """Reads a story sentence by sentence and returns its chain and answer, as a person would write them."""
  told, question = prompt.strip().rsplit('. ', 1) if '. ' in prompt else prompt.strip().split('. ')
  sentences = [f'{one}.' for one in f'{told}.'.replace('. ', '.|').rstrip('.').split('|')]
  sentences = [one.replace('..', '.') for one in sentences]
  moves, hands, holder = {}, collections.defaultdict(list), {}
  for sentence in sentences:
    words = sentence.rstrip('.').split()
    if words[1] == 'went':
      moves[words[0]] = sentence
    else:
      hands[words[3]].append(sentence)
      holder[words[3]] = words[0] if words[1] == 'took' else words[5]
  asked = question.rstrip('?').split()[-1]
  chain = [] if asked in NAMES else hands[asked]
  last = moves[asked if asked in NAMES else holder[asked]]
  return ' '.join([*chain, last, f'Answer: {last.rstrip(".").split()[-1]}']) + '\n', sentences


def test_solutions_are_what_a_reader_writes(texts):
  for prompt, solution in texts:
    assert solution == answered(prompt)[0], prompt


def test_stories_are_possible(texts):
  """Nobody goes where they are, takes what another has, or gives what they do not have."""
  for prompt, _ in texts:
    where, holder, people, things = {}, {}, set(), set()
    for sentence in answered(prompt)[1]:
      words = sentence.rstrip('.').split()
      people |= {word for word in words if word in NAMES}
      things |= {word for word in words if word in OBJECTS}
      if words[1] == 'went':
        assert where.get(words[0]) != words[4]
        where[words[0]] = words[4]
      elif words[1] == 'took':
        assert words[3] not in holder
        holder[words[3]] = words[0]
      else:
        assert holder[words[3]] == words[0] != words[5]
        holder[words[3]] = words[5]
    assert len(people) <= 3
    assert len(things) <= 2


def test_numbers_of_facts(texts, problems):
  lengths = [len(answered(prompt)[1]) for prompt, _ in texts]
  assert lengths == problems.length.tolist()
  assert set(lengths) == set(range(1, MOST + 1))
  kinds = collections.Counter(prompt.split('?')[0].split()[-1] in NAMES for prompt, _ in texts)
  assert 0.2 < kinds[True] / len(texts) < 0.6


def test_critical_tokens_are_the_verbs_at_which_a_chain_goes_on_or_ends(task, problems, texts):
  solution = jax.vmap(task.solution)(problems)
  for tokens, critical, (prompt, text) in zip(np.asarray(solution.tokens), np.asarray(solution.critical), texts):
    verbs = task.tokenizer.token_texts(tokens[critical])
    asked = prompt.split('?')[0].split()[-1]
    wanted = [f' {sentence.split()[1]}' for sentence in text.split('. ')[1:-1]] if asked in OBJECTS else []
    assert verbs == wanted
    assert not verbs or verbs == [' gave'] * (len(verbs) - 1) + [' went']


def padded(task, text):
  ids = task.tokenizer.encode(text)
  return jnp.pad(jnp.asarray(ids), (0, task.response_length - ids.size)), jnp.arange(task.response_length) < ids.size


def test_rewards(task, problems, texts):
  score = jax.jit(lambda problem, actions, mask: (task.reward(problem, actions, mask),
                                                  task.well_formed(problem, actions, mask)))
  for i in range(20):
    problem, (_, text) = jax.tree.map(lambda x, i=i: x[i], problems), texts[i]
    place = text.split('Answer: ')[1].strip()
    other = next(word for word in PLACES if word != place)
    for response, right, formed in (
        (text, 1, True), (f'Answer: {place}\n', 1, True), (text.replace(f': {place}', f': {other}'), 0, True),
        (text.strip(), 0, False), (f'{place}\n', 0, False), ('Answer: Anna\n', 0, False), ('\n', 0, False),
        (f'Answer: {other} {text}', 0, False), (f'{text.strip()} {place}\n', 0, False)):
      found = score(problem, *padded(task, response))
      assert (float(found[0]), bool(found[1])) == (right, formed), response
  assert not score(problem, *padded(task, ''))[1]


def test_prompts_end_at_the_right_and_lengths_are_the_longest(task, problems):
  prompt, solution = jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)
  assert bool(jnp.all(prompt.mask[:, -1]))
  assert bool(jnp.all(jnp.diff(prompt.mask.astype(int), axis=1) >= 0))
  assert int(prompt.mask.sum(1).max()) <= task.prompt_length
  assert int(solution.mask.sum(1).max()) <= task.solution_length < task.response_length


def test_more_facts_or_larger_arrays_change_no_earlier_fact():
  key = jax.random.key(5)
  short, long = sample_story(key, 3, 3), sample_story(key, 3, 8)
  for name in ('kinds', 'actors', 'things', 'receivers'):
    np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:3])
  assert (int(short.asked), bool(short.asks_object)) == (int(long.asked), bool(long.asks_object))


def test_the_tokenizer_writes_and_reads_texts(texts):
  tokenizer = WordTokenizer(vocab_size=64)
  for text in (text for pair in texts[:50] for text in pair):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode([64, 2]) == '\ufffd.'
  assert tokenizer.decode([8, 14, 13], [True, False, True]).split() == ['the', WORDS[13]]
  with pytest.raises(ValueError, match=r"words \['Zoe'\] are not in the vocabulary"):
    tokenizer.encode('Zoe went')
  with pytest.raises(ValueError, match='vocab_size: expected 34 or more'):
    WordTokenizer(vocab_size=33)


def test_settings_are_saved_and_checked():
  known, settings = KNOWN_TASKS['stories'], Stories(5, vocab_size=41)
  tuned = known.finetuned(settings, FinetuneConfig(task='stories'))
  assert tuned == Stories(5, 4, 41)
  assert from_json_object(to_json_object(tuned)) == tuned
  assert known.make(tuned).tokenizer.vocab_size == 41
  assert list(known.named_sets(tuned)) == list(known.before_and_after(jax.random.key(0), tuned, 3)) == ['N', 'N+4']
  task, draw = by_facts(tuned)
  drawn = draw(jax.random.key(0), 7)
  assert {name: set(one.length.tolist()) for name, one in drawn.items()} == {'5': {5}, '9': {9}}
  assert task.prompt(jax.tree.map(lambda x: x[0], drawn['5'])).tokens.shape == (task.prompt_length,)
  for wrong in (lambda: Stories(0), lambda: StoriesPretraining(101), lambda: stories(3, 2), lambda: Stories(1, -1)):
    with pytest.raises(ValueError, match='expected'):
      wrong()
