"""Reward functions: those that come along, and how anybody's are called, checked and timed."""

import os
import signal
import time

import numpy as np
import pytest

from critkl_jax.tasks.rewards import RewardError, RewardPool, functions, worker

ROWS = [1, 1, 2, 2, 5]
PROMPTS = ['one', 'one', 'two', 'two', 'five']
COMPLETIONS = ['a', 'bb', 'ccc', 'dd', 'e']


def rewards(text, answer, name):
  return getattr(functions, name)(prompts=[''], completions=[text], answer=[answer])[0]


@pytest.mark.parametrize(('name', 'text', 'answer', 'wanted'), [
    ('exact_match', ' 42\n', '42', 1.0), ('exact_match', '42.', '42', 0.0),
    ('exact_match', 'Let me see. <answer> 42 </answer> ok', '42', 1.0),
    ('exact_match', 'so <answer>41</answer>, no: <answer>42</answer>', '42', 1.0),
    ('exact_match', r'thus \boxed{\frac{1}{2}}.', r'\frac{1}{2}', 1.0),
    ('exact_match', r'thus \boxed{1', '1', 0.0), ('exact_match', 'b', ['a', 'b'], 1.0),
    ('numeric_match', 'There are 1,234 of them', '1234', 1.0), ('numeric_match', '3 and then 42.0', '42', 1.0),
    ('numeric_match', '42 and then 3', '42', 0.0), ('numeric_match', 'no number', '42', 0.0),
    ('numeric_match', '-1.5e3', '-1500', 1.0), ('numeric_match', '<answer>7</answer> in 3 steps', '7', 1.0),
    ('numeric_match', 'x = 10.', '10', 1.0), ('numeric_match', '0', '0', 1.0), ('numeric_match', 'line2', '2', 0.0),
    ('numeric_match', '8-3', '3', 1.0), ('numeric_match', 'is .5', '0.5', 1.0), ('numeric_match', '-7', '-7', 1.0),
    ('numeric_match', 'case 1: Type3', '1', 1.0), ('f1', "don't", 'dont', 1.0), ('f1', 'U.S.', 'us', 1.0),
    ('f1', 'The cat sat.', 'a cat sat', 1.0), ('f1', 'cat', 'cat sat', 2 / 3), ('f1', 'dog', 'cat', 0.0),
    ('f1', '', 'cat', 0.0), ('f1', 'cat cat', 'cat', 2 / 3),
    ('answer_format', '<think>2</think><answer>4</answer>\n', None, 1.0), ('answer_format', '4', None, 0.0),
    ('answer_format', '<answer>4</answer> and more', None, 0.0),
    ('answer_format', '<answer>4</answer><answer>5</answer>', None, 0.0)])
def test_rewards_that_come_along(name, text, answer, wanted):
  assert rewards(text, answer, name) == pytest.approx(wanted)


def test_rouge_is_that_of_its_package():
  scorer = pytest.importorskip('rouge_score.rouge_scorer').RougeScorer(['rougeL'])
  said, right = 'the cat sat on a mat', 'the cat lay on the mat'
  assert rewards(said, right, 'rouge_l') == scorer.score(right, said)['rougeL'].fmeasure
  assert rewards(said, [right, said], 'rouge_l') == 1.0


def test_messages_are_read_as_their_text():
  message = [{'role': 'assistant', 'content': '42'}]
  assert functions.exact_match(prompts=[[]], completions=[message], answer=['42']) == [1.0]


def test_reasoning_gym_scores_its_own_datasets():
  gym = pytest.importorskip('reasoning_gym')
  entries = list(gym.create_dataset('leg_counting', size=3, seed=1))
  columns = {name: [entry[name] for entry in entries] for name in ('question', 'answer', 'metadata')}
  said = [f'<answer>{entries[0]["answer"]}</answer>', entries[1]['answer'], 'none']
  found = functions.reasoning_gym(prompts=columns['question'], completions=said, **columns)
  assert found[:2] == [1.0, 1.0]
  assert found[2] < 1.0


# Calls of a function; `module:function` is looked up in the current directory, as with `python -m`.


def length(prompts, completions, **columns):
  return [float(len(text)) for text in completions]


def call(function, columns=None, name='own'):
  return worker.call(function, name, PROMPTS, COMPLETIONS, columns or {}, ROWS)


def test_a_function_gets_lists_and_the_columns_that_it_names():
  seen = {}

  def named(completions, answer, prompts):
    seen.update(prompts=prompts, answer=answer)
    return np.arange(len(completions), dtype=np.float32)

  columns = {'answer': ['a', 'a', 'b', 'b', 'c'], 'other': [0] * 5}
  assert call(named, columns) == [0.0, 1.0, 2.0, 3.0, 4.0]
  assert seen == {'prompts': PROMPTS, 'answer': columns['answer']}
  assert call(lambda completions, **rest: [sorted(rest) == ['answer', 'other', 'prompts']] * 5, columns) == [1.0] * 5


@pytest.mark.parametrize(('function', 'message'), [
    (lambda completions, **_: [1 / (len(text) - 3) for text in completions],
     r"reward: own raised ZeroDivisionError: division by zero \(test_rewards.py:\d+\) at row 2 \(prompt: 'two'\)"),
    (lambda completions, **_: [0.0] * 4,
     r"own returned 4 values for 5 completions, at 5 completions together \(the first of row 1, prompt: 'one'\)"),
    (lambda completions, **_: 0.0, 'reward: own returned 0.0 instead of a list of 5 numbers, at 5 completions'),
    (lambda completions, **_: [0.0, 0.0, float('nan'), 0.0, 0.0],
     r"reward: own returned nan instead of a finite number, at row 2 \(prompt: 'two'\)"),
    (lambda completions, **_: [0.0] * 4 + [None], r"returned None instead of a finite number, at row 5"),
    (lambda completions, **_: ['1'] * 5, r"returned '1' instead of a finite number, at row 1"),
    (lambda completions, **_: [float('-inf')] * 5, r'returned -inf instead of a finite number, at row 1'),
    (lambda completions, **_: {}[len(completions) == 5], r'raised KeyError: .* at row 1'),
    (lambda wrong: [], r'raised TypeError'), (lambda **_: [10**400] * 5, 'returned 1000*.* instead of a finite number'),
    (lambda **_: (1 / 0 for _ in range(5)), 'raised ZeroDivisionError: .* at row 1'),
    (lambda **_: exit(3), 'raised SystemExit: 3 .* at row 1'), (lambda **_: None, 'returned None instead of a list')])
def test_a_faulty_function_is_named_with_row_and_prompt(function, message):
  with pytest.raises(RewardError, match=message):
    call(function)


@pytest.mark.parametrize('name', ['nowhere:f', 'rewards_of_test:g', 'no_such_reward', 'rewards_of_test:', ':', '',
                                  '_best', 'rewards_of_test:number'])
def test_what_is_no_function_is_refused(name, home):
  with pytest.raises(RewardError, match=f'reward: {name!r} (cannot be loaded|is no function)'):
    worker.load(name)


SOURCE = '''
import os, sys, time
number = 3
def length(prompts, completions, **columns):
  print('in the process', len(completions))
  return [float(len(text)) for text in completions]
def process(prompts, completions, **columns):
  time.sleep(0.5)
  return [float(os.getpid())] * len(completions)
def jax_is_loaded(prompts, completions, **columns):
  return [float('jax' in sys.modules)] * len(completions)
def slow(prompts, completions, **columns):
  time.sleep(60 if 'ccc' in completions else 0)
  return [0.0] * len(completions)
def dies(prompts, completions, **columns):
  os._exit(3)
def fails(prompts, completions, **columns):
  raise ValueError('no, thank you')
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
  (tmp_path / 'rewards_of_test.py').write_text(SOURCE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  return tmp_path


@pytest.fixture
def workers(home):
  made = RewardPool(workers=2, seconds=2.0)
  yield made
  made.close()


def named(*names):
  return {name: f'rewards_of_test:{name}' for name in names}


def asked(found, functions):
  return found(functions, PROMPTS, COMPLETIONS, {}, ROWS)


def test_processes_give_what_this_process_gives(workers, capfd):
  for some in (RewardPool(), workers):
    assert asked(some, named('length'))['length'].tolist() == [1, 2, 3, 2, 1]
  assert asked(workers, {'here': length})['here'].tolist() == [1, 2, 3, 2, 1]  # a function has no name to send
  processes = asked(workers, named('process'))['process']
  assert len({*processes}) == 2
  assert os.getpid() not in processes
  assert processes[0] == processes[1]  # the responses to a prompt stay together
  assert not asked(workers, named('jax_is_loaded'))['jax_is_loaded'].any()
  assert 'in the process' in capfd.readouterr().err  # what a function prints does not disturb the messages


def test_functions_that_come_along_run_without_jax_in_a_process(workers):
  functions_of_both = {'exact_match': 'exact_match'} | named('jax_is_loaded')
  found = workers(functions_of_both, ['p'] * 2, ['a', 'b'], {'answer': ['a', 'a']}, [1, 1])
  assert found['exact_match'].tolist() == [1.0, 0.0]
  assert asked(workers, named('jax_is_loaded'))['jax_is_loaded'].sum() == 0


def test_a_call_that_takes_too_long_or_dies_is_an_error_and_the_pool_goes_on(workers):
  start = time.monotonic()
  with pytest.raises(RewardError, match=r'rewards_of_test:slow took more than 2 s for \d completions together'):
    asked(workers, named('slow'))
  assert time.monotonic() - start < 30
  with pytest.raises(RewardError, match=r'the process of rewards_of_test:dies died \(exit code 3\) at \d completions'):
    asked(workers, named('dies'))
  with pytest.raises(RewardError, match=r'raised ValueError: no, thank you \(rewards_of_test.py:\d+\) at row 1'):
    asked(workers, named('fails'))
  assert asked(workers, named('length'))['length'].tolist() == [1, 2, 3, 2, 1]


def test_processes_end_with_their_pool(home):
  made = RewardPool(workers=1)
  process = int(asked(made, named('process'))['process'][0])
  os.kill(process, 0)
  made.close()
  with pytest.raises(ProcessLookupError):
    os.kill(process, 0)
  assert asked(made, named('length'))['length'].sum() == 9  # a closed pool starts again
  process = int(asked(made, named('process'))['process'][0])
  os.kill(process, signal.SIGKILL)
  time.sleep(0.2)
  with pytest.raises(RewardError, match='died'):
    asked(made, named('length'))
  made.close()


def test_columns_that_cannot_be_sent_are_an_error(workers):
  with pytest.raises(RewardError, match='rewards_of_test:length cannot be called in a process of its own'):
    workers(named('length'), PROMPTS, COMPLETIONS, {'function': [lambda: 0] * 5}, ROWS)


def test_a_function_that_needs_a_column_is_found_before_it_is_called():
  assert worker.missing(functions.exact_match, ['question']) == ['answer']
  assert worker.missing(functions.exact_match, ['answer']) == []
  assert worker.missing(length, []) == []


def test_an_empty_batch_needs_no_call():
  assert RewardPool()({'any': 'no:such'}, [], [], {}, [])['any'].shape == (0,)
