"""Reads checkpoints into NumPy arrays: statistics of policy and reference at each token of the responses.

    from critkl_jax.analysis.reading import read_tokens
    tokens = read_tokens('runs/finetune', num_problems=64)
    print(tokens['certainty'][tokens['critical/oracle']].mean(), tokens['certainty'][tokens['mask']].mean())

Letters: B episodes, T response tokens, V vocabulary.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from critkl_jax.analysis.detectors import QUANTILE, THRESHOLD, Detector, detect_all, low_certainty, oracle, read_logits
from critkl_jax.analysis.evaluation import answer_all, make_answer
from critkl_jax.analysis.pairs import load_pair as load_pair
from critkl_jax.analysis.pairs import loss_of as loss_of
from critkl_jax.analysis.pairs import model_of as model_of
from critkl_jax.analysis.pairs import reference_model_of as reference_model_of
from critkl_jax.analysis.pairs import reference_path as reference_path
from critkl_jax.analysis.pairs import vocab_size_of
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.ops.weighted_kl import weighted_kl
from critkl_jax.rl.certainties import CERTAINTIES, certainty, entropy
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.rl.losses import Coefficients, action_log_probs, op_options, weighted_penalty
from critkl_jax.runtime import checkpoint as checkpoint_lib
from critkl_jax.runtime import storage
from critkl_jax.runtime.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from critkl_jax.sampling.scoring import as_rollout, score
from critkl_jax.tasks.known_tasks import KNOWN_TASKS
from critkl_jax.tasks.rewards import RewardPool
from critkl_jax.tasks.task import (
  Task,
  check_vocabulary,
  knows_critical_tokens,
  on_path,
  right_solutions,
  successes,
)
from critkl_jax.training.initial_state import with_critic

TOP = 5  # most probable tokens kept of each distribution
PROBLEMS, STEPS = 64, 20  # defaults: problems of each set, checkpoints of a directory
_LOGITS = 2**27  # most logits held for a batch, of policy and of reference each: 512 MiB
RESPONSES = ('greedy', 'sampled', 'solution')


def read_tokens(path: str | os.PathLike | Checkpoint = checkpoint_lib.SHIPPED_REFERENCE,
                reference: str | os.PathLike | Checkpoint | None = None, *, task: Task | None = None,
                sets: Sequence[Any] | None = None, num_problems: int = PROBLEMS, responses: str = 'greedy',
                detectors: dict[str, Detector] | None = None, seed: int = 0, batch_size: int = 64,
                progress: bool = False, model: LanguageModel | None = None, pool: RewardPool | None = None
                ) -> dict[str, np.ndarray]:
  """Reads a policy's responses to test problems, with statistics of policy and reference at each token.

  Both models are read as in training: in the policy's dtypes and at the temperature of its loss.

  Args:
    path: checkpoint of the policy, or its path as in `load_checkpoint`.
    reference: checkpoint of the reference, or its path; found by `reference_path` if None.
    task: the task of the problems. If None, the checkpoint's, which must be in `known_tasks.KNOWN_TASKS`.
    sets: problem sets of the checkpoint's task; for addition, numbers of digits of the longer operand, N and N + 1 if
      None. A task given as `task` has a single set, `all`.
    num_problems: problems of each set.
    responses: `greedy` responses of the policy, `sampled` ones at the temperature of its training, or the right
      `solution`.
    detectors: name -> detector of critical tokens; `standard_detectors` if None.
    seed: seed of problems and samples; the same seed gives the same problems.
    batch_size: responses read at a time; fewer for a large vocabulary.
    progress: whether to show a progress bar.
    model: the model of both checkpoints, if their architecture is not known here.
    pool: calls reward functions in Python; None to call them in this process.

  Returns:
    NumPy arrays, 0 beyond the end of a response.
    `[B]`: `problem` (text), `set` (name of its problem set), `response` (text), `reward`, and `success`, 1 where the
    reward reaches the task's `success` and 0 elsewhere (both NaN for solutions).
    `[B, T]`: `mask`, true at tokens; `token` (id), its `text`; `log_prob`, `ref_log_prob`, `entropy`, `ref_entropy`,
    `kl` (exact, nats); `certainty`, `weight` and `penalty` of the loss that the policy was trained with (the default
    loss for a pre-trained model), without its `kl_gate` and its ensemble; `certainty/KIND` of each kind;
    `critical/NAME`, `score/NAME` and `looked_at/NAME` (the sampling weight) of each detector, see `Detection`.
    If the task knows right solutions also: `on_path`, whether all tokens before are right; `right`, whether this token
    is too; `right_prob` and `ref_right_prob`, the probability of the right token where `on_path`.
    `[B, T, 5]`, or V instead of 5 if it is less: `top`, `ref_top` (ids), `top_prob`, `ref_top_prob`.

  Raises:
    CheckpointError: if a checkpoint cannot be read, or policy and reference do not belong together.
    ValueError: if `responses` is unknown, or `solution` for a task without right solutions; if there is no problem, or
      problems do not fit into the context; if the task is not known or has another vocabulary.
  """
  if responses not in RESPONSES:
    raise ValueError(f'responses: expected one of {RESPONSES}, got {responses!r}.')
  if num_problems < 1:
    raise ValueError(f'num_problems: expected 1 or more, got {num_problems}.')
  policy, reference = load_pair(path, reference, model=model)
  loss = loss_of(policy)
  task, draw = sets_of(policy, task, sets)
  if responses == 'solution' and task.solution is None:
    raise ValueError("responses: 'solution' needs right solutions, and this task has none.")
  detectors = standard_detectors(task, loss) if detectors is None else detectors
  answer = make_answer(model_of(policy), task, greedy=responses == 'greedy', temperature=loss.temperature,
                       pool=pool)
  read = make_token_reader(policy, reference, task)
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  batch_size = _batch_size(batch_size, policy, task)
  drawn = draw(problem_key, num_problems)
  parts, batches = [], _batches_of(drawn, batch_size)
  for name, start in tqdm.tqdm(batches, 'responses', unit='batch', disable=not progress):
    problems = jax.tree.map(lambda x, start=start: x[start:start + batch_size], drawn[name])
    if responses == 'solution':
      rollout = as_rollout(jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems))
      rewards = right = jnp.full(rollout.mask.shape[0], jnp.nan, jnp.float32)
    else:
      key = jax.random.fold_in(jax.random.fold_in(answer_key, _number_of(name)), start)
      rollout, rewards = answer(policy.params, problems, key)
      right = successes(task, rewards)
    found = read(policy.params, reference.params, problems, rollout)
    for kind, one in detect_all(detectors, problems, rollout, found.pop('ref_logits')).items():
      found |= {f'score/{kind}': one.score, f'critical/{kind}': one.critical, f'looked_at/{kind}': one.weight}
    found |= {'reward': rewards, 'success': right}
    parts.append(jax.device_get(found) | _texts(task, rollout, name))
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_answers(policies: Sequence[Checkpoint], *, task: Task | None = None, sets: Sequence[Any] | None = None,
                 num_problems: int = PROBLEMS, seed: int = 0, batch_size: int = 64, progress: bool = False,
                 pool: RewardPool | None = None) -> list[dict[str, np.ndarray]]:
  """Reads the greedy answers of several policies to the problems of `read_tokens`, without token statistics.

  Policies of one architecture share a compiled program.

  Args:
    policies: checkpoints of models for one task.
    task, sets: as in `read_tokens`.
    num_problems: problems of each set.
    seed: seed of the problems.
    batch_size: problems answered at a time; fewer for a large vocabulary.
    progress: whether to show a progress bar.
    pool: as in `read_tokens`.

  Returns:
    For each policy NumPy arrays `[B]`: `problem`, `set`, `response` (text), `reward` and `success`.

  Raises:
    CheckpointError: if the policies do not belong together.
    ValueError: if problems do not fit into the context, or the task is not known or has another vocabulary.
  """
  first = policies[0]
  for policy in policies[1:]:
    load_pair(policy, first)
  task, draw = sets_of(first, task, sets)
  answers = {model: make_answer(model, task, pool=pool) for model in map(model_of, policies)}
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  batch_size = _batch_size(batch_size, first, task)
  drawn = draw(problem_key, num_problems)
  parts = [[] for _ in policies]
  batches = [(i, *batch) for i in range(len(policies)) for batch in _batches_of(drawn, batch_size)]
  for i, name, start in tqdm.tqdm(batches, 'answers', unit='batch', disable=not progress):
    problems = jax.tree.map(lambda x, start=start: x[start:start + batch_size], drawn[name])
    rollout, rewards = answers[model_of(policies[i])](policies[i].params, problems, answer_key)
    own = {kind: text for kind, text in _texts(task, rollout, name).items() if kind in ('problem', 'set', 'response')}
    rewards = np.asarray(rewards)
    parts[i].append(own | {'reward': rewards, 'success': successes(task, rewards)})
  return [{name: np.concatenate([part[name] for part in own]) for name in own[0]} for own in parts]


def sets_of(policy: Checkpoint, task: Task | None = None, sets: Sequence[Any] | None = None
             ) -> tuple[Task, Callable[..., dict[str, Any]]]:
  """Returns the task and the test problems of a checkpoint.

  Args:
    policy: the checkpoint; its parameters are not used.
    task, sets: as in `read_tokens`.

  Returns:
    The `Task`, and a function `(key, B) -> {name: problems [B]}`.

  Raises:
    ValueError: if both `task` and `sets` are given, if the checkpoint's task is unknown and no task is given, or if the
      vocabularies differ.
  """
  own = policy.info.task
  if task is not None:
    if sets is not None:
      raise ValueError(f'sets: expected None with task=, whose only set is "all"; got {sets}.')
    own_task = task

    def draw(key, number):
      if own_task.host:
        return {'all': own_task.host.draw(np.asarray(jax.random.key_data(key)).tolist(), 0, number)}
      return {'all': jax.jit(jax.vmap(own_task.sample))(jax.random.split(key, number))}

    tests = task, draw
  elif own.name in KNOWN_TASKS:
    tests = KNOWN_TASKS[own.name].tests(own, sets)
  else:
    raise ValueError(f'task: {policy.path} has the task {own.name!r}, which is none of {tuple(KNOWN_TASKS)}; give it '
                     'as task=.')
  check_vocabulary(tests[0], vocab_size_of(policy))
  return tests


def standard_detectors(task: Task, loss: LossConfig = LossConfig(), threshold: float = THRESHOLD,
                       quantile: float = QUANTILE) -> dict[str, Detector]:
  """Returns the detectors that need the reference's logits alone.

  They are `threshold` and `quantile` of the loss's certainty and, if the task knows critical tokens, `oracle`.
  """
  own = {'kind': loss.certainty, 'temperature': loss.certainty_temperature}
  known = {'oracle': oracle(task)} if knows_critical_tokens(task) else {}
  return known | {'threshold': low_certainty(threshold=threshold, **own),
                  'quantile': low_certainty(quantile=quantile, **own)}


def make_token_reader(policy: Checkpoint, reference: Checkpoint, task: Task) -> Callable:
  """Makes `(params, ref_params, problems, rollout) -> dict`, jitted: the token statistics of `read_tokens`.

  The dict holds the arrays `[B, T]` and `[B, T, 5]` of `read_tokens`, except `text` and those of the detectors. It
  adds `ref_logits` `[B, T, V]`, the input of the detectors.
  """
  config, model, ref_model = loss_of(policy), model_of(policy), reference_model_of(policy, reference)

  def read(params, ref_params, problems, rollout):
    mask, ref_logits = rollout.mask, read_logits(ref_model, ref_params, rollout)
    logits, _ = score(model, params, rollout)
    record = weighted_kl(logits, ref_logits, rollout.actions, mask=mask, **op_options(config, Coefficients.of(config)))
    penalty, weight = weighted_penalty(record, config)
    solution = right_solutions(task, problems)
    logits, cooled = logits / config.temperature, ref_logits / config.temperature
    found = {'token': rollout.actions, 'mask': mask,
             'log_prob': record.log_prob, 'ref_log_prob': record.ref_log_prob, 'entropy': record.entropy,
             'ref_entropy': entropy(jax.nn.log_softmax(cooled)), 'kl': record.kl, 'certainty': record.certainty,
             'weight': weight, 'penalty': config.kl_coefficient * penalty}
    found |= {f'certainty/{kind}': certainty(ref_logits, kind, config.certainty_temperature) for kind in CERTAINTIES}
    for name, some in (('', logits), ('ref_', cooled)):
      probs, tokens = jax.lax.top_k(jax.nn.softmax(some), min(TOP, some.shape[-1]))
      found |= {f'{name}top': tokens, f'{name}top_prob': probs}
    if solution is not None:
      here = on_path(task, problems, rollout)
      found |= {'on_path': here, 'right': here & (rollout.actions == solution.tokens)}
      for name, some in (('', logits), ('ref_', cooled)):
        right = jnp.exp(action_log_probs(some, solution.tokens))
        found[f'{name}right_prob'] = jnp.where(here, right, 0.0)
    found = {name: jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))
             for name, x in found.items()}
    return found | {'ref_logits': ref_logits}

  return jax.jit(read)


def read_steps(path: str | os.PathLike, reference: str | os.PathLike | None = None, *, most: int = STEPS,
               task: Task | None = None, sets: Sequence[Any] | None = None, num_problems: int = PROBLEMS,
               num_solutions: int = 6, seed: int = 0, batch_size: int = 64, progress: bool = False,
               model: LanguageModel | None = None, pool: RewardPool | None = None) -> dict[str, Any]:
  """Reads accuracy and token statistics of the checkpoints of a directory, one after another.

  Args:
    path: a workdir, or a directory of step directories.
    reference: as in `read_tokens`.
    most: most checkpoints to read: the last, the first, and others evenly between.
    task, sets: as in `read_tokens`.
    num_problems: problems of each set, and right solutions of the last set.
    num_solutions: solutions whose single tokens are kept.
    seed: seed of the problems.
    batch_size: problems in a batch; fewer for a large vocabulary.
    progress: whether to show a progress bar.
    model: as in `read_tokens`.
    pool: as in `read_tokens`.

  Returns:
    `sets`, names of the problem sets; `step` `[num_steps]` and greedy `accuracy` `[num_steps, num_sets]`. Step 0 is a
    fine-tuned policy's own reference. If the task knows right solutions, means over the tokens of the last set's
    solutions, `[num_steps]` each: `critical_prob` and `other_prob` of the right token, `critical_kl` and `other_kl`
    (nats); `right_prob` `[num_steps, num_solutions, T]`; and of the kept solutions `token`, `mask`, `critical`
    `[num_solutions, T]`, `problem` and `response`.

  Raises:
    CheckpointError: as `read_tokens`.
    ValueError: as `read_tokens`.
  """
  if num_problems < 1:
    raise ValueError(f'num_problems: expected 1 or more, got {num_problems}.')
  last, reference = load_pair(path, reference, model=model)
  task, draw = sets_of(last, task, sets)
  batch_size = _batch_size(batch_size, last, task)
  answer = make_answer(model_of(last), task, pool=pool)
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  problems = draw(problem_key, num_problems)
  *_, last_set = problems.values()
  read = _make_solution_reader(last, reference, task, last_set, batch_size) if task.solution else None
  rows, kept = [], []
  for step, params in tqdm.tqdm(list(_states(last, reference, most)), 'steps', unit='step', disable=not progress):
    params = _whole(last, step) if params is None else params
    if params is None:
      continue
    accuracy = [successes(task, answer_all(answer, params, own, answer_key, batch_size)).mean()
                for own in problems.values()]
    means, right_prob = read(params) if read else ({}, None)
    rows.append({'step': step, 'accuracy': np.asarray(accuracy, np.float64), **means})
    kept.append(right_prob if right_prob is None else right_prob[:num_solutions])
  curves = {name: np.array([row[name] for row in rows]) for name in rows[0]} | {'sets': np.array([*problems], object)}
  if read is None:
    return curves
  own = jax.tree.map(lambda x: x[:num_solutions], last_set)
  solutions = jax.vmap(task.solution)(own)
  rollout = as_rollout(jax.vmap(task.prompt)(own), solutions)
  return curves | {'right_prob': np.stack(kept), 'token': np.asarray(rollout.actions), 'mask': np.asarray(rollout.mask),
                   'critical': _critical_of(solutions), **_texts(task, rollout, [*problems][-1])}


def _make_solution_reader(last, reference, task, problems, batch_size) -> Callable:
  """Makes `params -> (means over tokens, right_prob [B, T])` over right solutions, for the rows of `read_steps`."""
  read = make_token_reader(last, reference, task)
  solutions = jax.vmap(task.solution)(problems)
  right, critical = as_rollout(jax.vmap(task.prompt)(problems), solutions), _critical_of(solutions)

  def means_of(params):
    found = _in_batches(lambda some: {k: v for k, v in read(params, reference.params, *some).items()
                                      if k in ('mask', 'right_prob', 'kl')}, (problems, right), batch_size)
    means = {f'{name}_{short}': float(found[field][where].mean()) if where.any() else np.nan
             for name, where in (('critical', critical), ('other', found['mask'] & ~critical))
             for short, field in (('prob', 'right_prob'), ('kl', 'kl'))}
    return means, found['right_prob']

  return means_of


def _critical_of(solutions) -> np.ndarray:
  """Returns the mask of the solutions' critical tokens; false everywhere if they are unknown."""
  return np.asarray(solutions.mask & (False if solutions.critical is None else solutions.critical))


def _number_of(name: str) -> int:
  """Returns the number folded into the key of a problem set's samples: its name if decimal, else a checksum of it."""
  return int(name) if name.isdecimal() else zlib.crc32(name.encode())


def _states(last, reference, most):
  """Yields `(step, params)` of the steps to read; params is None if the step is a checkpoint still to be loaded."""
  steps = checkpoint_lib.steps_in(last.path.parent)
  chosen = np.linspace(len(steps) - 1, 0, min(most, len(steps))).round().astype(int)
  if last.info.kind == 'finetune' and 0 not in steps and _is_own(last, reference):
    yield 0, with_critic(model_of(last), (reference.params,), last.params)[0]
  for i in sorted(set(chosen.tolist())):
    yield steps[i], None


def _whole(last, step):
  """Loads the parameters of a step; returns None, with a warning, if the checkpoint is damaged (partly removed)."""
  try:
    return load_checkpoint(last.path.parent, step, model=last.model).params
  except checkpoint_lib.DamagedError as error:
    logging.warning('%s Step %d is left out.', error, step)
    return None


def _is_own(policy, reference):
  try:
    return reference.path == storage.resolve(reference_path(policy))
  except CheckpointError:  # the policy's own reference is gone
    return False


def _in_batches(read, arrays, batch_size):
  size = jax.tree.leaves(arrays)[0].shape[0]
  parts = [jax.device_get(read(jax.tree.map(lambda x, i=i: x[i:i + batch_size], arrays)))
           for i in range(0, size, batch_size)]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batch_size(asked, policy, task):
  logits = (task.prompt_length + task.response_length) * vocab_size_of(policy)
  return max(min(asked, _LOGITS // logits), 1)


def _batches_of(drawn, size):
  """Returns the name and the first problem of each batch; a set may have fewer problems than were asked for."""
  numbers = {name: jax.tree.leaves(problems)[0].shape[0] for name, problems in drawn.items()}
  return [(name, start) for name, number in numbers.items() for start in range(0, number, size)]


def _texts(task, rollout, name) -> dict[str, np.ndarray]:
  """Decodes problems, responses and single tokens to text, with the name of the problem set."""
  decode, tokens, mask = task.tokenizer.decode, np.asarray(rollout.actions), np.asarray(rollout.mask)
  prompt, prompt_mask = (np.asarray(x) for x in (rollout.prompt, rollout.prompt_mask))
  shown = np.zeros(tokens.shape, object)
  shown[:] = ''
  shown[mask] = np.array(task.tokenizer.token_texts(tokens[mask].tolist()), object)
  return {'problem': np.array([task.shown(decode(row, own)) for row, own in zip(prompt, prompt_mask)], object),
          'set': np.full(len(tokens), name, object),
          'response': np.array([decode(row, own) for row, own in zip(tokens, mask)], object),
          'text': shown}
