"""The task `stories`, against a plain Python reading of the same stories."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax.tasks.host_side import rewarded
from critkl_jax.tasks.known_tasks import KNOWN_TASKS, from_json_object, to_json_object
from critkl_jax.tasks.stories import (
  Stories,
  StoriesFinetuning,
  StoriesPretraining,
  WordTokenizer,
  by_facts,
  sample_story,
  stories,
  summaries,
)
from critkl_jax.tasks.stories.text import NAMES, OBJECTS, PLACES, WORDS
from critkl_jax.tasks.task import knows_critical_tokens
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
  return texts_of(task, problems)


def texts_of(task, problems):
  prompt, solution = jax.jit(jax.vmap(task.prompt))(problems), jax.jit(jax.vmap(task.solution))(problems)
  return [tuple(task.tokenizer.decode(*some) for some in ((p, m), (s, n))) for p, m, s, n in zip(
      *map(np.asarray, (prompt.tokens, prompt.mask, solution.tokens, solution.mask)))]


def answered(prompt):
  """Reads a story sentence by sentence and returns its chain and answer, as a person would write them."""
  prompt = prompt.replace('Summarize: ', '')
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
    wanted = [sentence.split()[1] for sentence in text.split('. ')[1:-1]] if asked in OBJECTS else []
    assert [verb.split()[0] for verb in verbs] == wanted
    assert not verbs or wanted == ['gave'] * (len(verbs) - 1) + ['went']


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
  tokenizer = WordTokenizer(vocab_size=80)
  for text in (text for pair in texts[:50] for text in pair):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode([80, 2]) == '\ufffd?'
  assert tokenizer.decode([8, 14, 13], [True, False, True]).split() == [WORDS[8], WORDS[13]]
  assert tokenizer.encode('Where is the cup?\n').tolist() == [WORDS.index(one) for one in (
      'Where is the', 'cup', '?', '\n')]
  with pytest.raises(ValueError, match=r"words \['Zoe', 'went'\] are not in the vocabulary"):
    tokenizer.encode('Zoe went')
  with pytest.raises(ValueError, match=f'vocab_size: expected {len(WORDS)} or more'):
    WordTokenizer(vocab_size=len(WORDS) - 1)


def test_settings_are_saved_and_checked():
  known, settings = KNOWN_TASKS['stories'], Stories(5, vocab_size=61)
  tuned = known.finetuned(settings, FinetuneConfig(task='stories'))
  assert tuned == Stories(5, 4, 61)
  assert from_json_object(to_json_object(tuned)) == tuned
  assert known.make(tuned).tokenizer.vocab_size == 61
  assert list(known.named_sets(tuned)) == list(known.before_and_after(jax.random.key(0), tuned, 3)) == ['N', 'N+4']
  task, draw = by_facts(tuned)
  drawn = draw(jax.random.key(0), 7)
  assert {name: set(one.length.tolist()) for name, one in drawn.items()} == {'5': {5}, '9': {9}}
  assert task.prompt(jax.tree.map(lambda x: x[0], drawn['5'])).tokens.shape == (task.prompt_length,)
  for wrong in (lambda: Stories(0), lambda: StoriesPretraining(101), lambda: stories(3, 2), lambda: Stories(1, -1),
                lambda: StoriesFinetuning(asks='all')):
    with pytest.raises(ValueError, match='expected'):
      wrong()


def test_summaries_are_the_facts_alone_and_rouge_rewards_a_part_of_them():
  task = summaries(MOST, MOST)
  first, again, later = (task.host.draw((3, 1), *where) for where in ((0, 30), (0, 30), (10, 20)))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  jax.tree.map(lambda one, two: np.testing.assert_array_equal(one[10:], two), first, later)
  assert not np.array_equal(first.asked, task.host.draw((3, 2), 0, 30).asked)
  written = texts_of(task, first)
  for prompt, solution in written:
    assert prompt.split('. ')[-1].startswith('Summarize: Where is ')
    assert solution == answered(prompt)[0].split(' Answer:')[0] + '\n'

  def rewards(texts):
    responses = [padded(task, text) for text in texts]
    answers = task.host.read(first, *(np.stack([one[i] for one in responses]) for i in (0, 1)))
    assert answers.prompts == [prompt for prompt, _ in written]
    assert answers.columns == {'answer': [solution for _, solution in written]}
    return rewarded(task.host, first, *(np.stack([one[i] for one in responses]) for i in (0, 1)))[0]

  assert rewards([solution for _, solution in written]).tolist() == [1.0] * 30
  partial = rewards([solution.split('. ')[-1] for _, solution in written])
  several = np.array(['. ' in solution for _, solution in written])
  assert several.any()
  assert np.all((partial[several] > 0.2) & (partial[several] < 1))
  assert rewards(['Answer: garden\n'] * 30).max() < 0.3
  formed = jax.jit(jax.vmap(task.well_formed))
  for text, wanted in ((written[0][1], True), ('Answer: garden\n', False), ('Anna gave the cup to\n', False),
                       ('Anna took the cup.', False), ('Anna gave the cup to Ben.\n', True)):
    actions, mask = padded(task, text)
    assert bool(formed(jax.tree.map(lambda x: x[:1], first), actions[None], mask[None])[0]) is wanted, text


def test_pre_training_asks_for_both_and_fine_tuning_for_one():
  tasks, _ = KNOWN_TASKS['stories'].curriculum(Stories(2))
  drawn = jax.vmap(tasks[1].sample)(jax.random.split(jax.random.key(0), 200))
  assert 0.3 < float(drawn.wants_facts.mean()) < 0.7
  known, config = KNOWN_TASKS['stories'], FinetuneConfig(task='stories', stories=StoriesFinetuning(1, 'facts'))
  settings = known.finetuned(Stories(2), config)
  assert (settings, config.rewards_in_python) == (Stories(2, 1, asks='facts'), True)
  assert known.make(settings).host is not None
  assert knows_critical_tokens(known.make(settings))
  assert all(np.all(one.wants_facts) for one in known.before_and_after(jax.random.key(0), settings, 5).values())
  assert known.make(known.finetuned(Stories(2), FinetuneConfig(task='stories'))).host is None
