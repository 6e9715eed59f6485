"""From checkpoints to arrays of tokens: what policy and reference say at each token of their responses.

    from critkl_jax.analysis.reading import read_tokens
    tokens = read_tokens('runs/finetune', num_problems=64)
    print(tokens['certainty'][tokens['critical/oracle']].mean(), tokens['certainty'][tokens['mask']].mean())

Letters: B responses, T tokens, V vocabulary.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from critkl_jax import checkpoint as checkpoint_lib
from critkl_jax import storage
from critkl_jax.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from critkl_jax.confidence import certainty, entropy
from critkl_jax.config import FinetuneConfig, GPT2Config, LossConfig
from critkl_jax.critical_tokens import (
    QUANTILE,
    THRESHOLD,
    Detector,
    detect_all,
    low_certainty,
    on_path,
    oracle,
    read_logits,
)
from critkl_jax.evaluate import answer_all, draw_problems, make_answer
from critkl_jax.gpt2 import GPT2, reference_config
from critkl_jax.losses import Coefficients, action_log_probs, op_options, weighted_penalty
from critkl_jax.ops.weighted_kl import weighted_kl
from critkl_jax.rollout import as_rollout, score
from critkl_jax.tasks.addition import plus_task
from critkl_jax.tasks.task import Task

CERTAINTIES = ('negentropy', 'min_entropy', 'max_prob')
TOP = 5  # alternatives that are kept of each distribution
PROBLEMS, STEPS = 64, 20  # of each number of digits; checkpoints of a directory; where nothing is said
_LOGITS = 2**27  # that are held of a batch, policy's and reference's each: 512 MiB
RESPONSES = ('greedy', 'sampled', 'solution')


def read_tokens(path: str | os.PathLike | Checkpoint = checkpoint_lib.SHIPPED_REFERENCE,
                reference: str | os.PathLike | Checkpoint | None = None, *, digits: list[int] | None = None,
                num_problems: int = PROBLEMS, responses: str = 'greedy', detectors: dict[str, Detector] | None = None,
                seed: int = 0, batch_size: int = 64, progress: bool = False) -> dict[str, np.ndarray]:
  """Reads what a policy answers, and what it and its reference say at each token.

  Args:
    path: checkpoint of the policy, or where it lies, as in `load_checkpoint`.
    reference: that of the reference; `find_reference` looks for it if None.
    digits: numbers of digits of the longer operand; N and N + 1 if None.
    num_problems: problems of each.
    responses: whose tokens are read: `greedy` ones of the policy, `sampled` ones at the temperature of its training, or
      the right `solution`.
    detectors: of critical tokens, by name; `standard_detectors` if None.
    seed: of problems and samples; the same seed gives the same problems.
    batch_size, progress: responses read at a time, fewer for a large vocabulary; whether to show a bar.

  Returns:
    NumPy arrays. `[B]`: `problem` (text), `digits`, `response` (text), `reward` (NaN for solutions). `[B, T]`: `mask`,
    true at tokens; `token` (id), `character`; `on_path`, whether all tokens before are those of the right solution, and
    `right`, whether this one is too; `log_prob`, `ref_log_prob`, `entropy`, `ref_entropy`, `kl` (exact, nats),
    `certainty`, `weight` and `penalty` as the policy was trained with, or would be by default, but for a gate of single
    tokens (`kl_gate`) and the certainty of an ensemble; `certainty/KIND` of each kind; `right_prob` and
    `ref_right_prob` of the right token where `on_path`; `critical/NAME`, `score/NAME` and `looked_at/NAME` of each
    detector (see `Detection`). `[B, T, 5]`: `top`, `ref_top` (ids), `top_prob`, `ref_top_prob`. All are 0 beyond the
    end of a response. Both models are read as in training, in the policy's types and at the temperature of its loss.

  Raises:
    CheckpointError: if a checkpoint cannot be read or they do not belong together.
    ValueError: if responses are of an unknown kind, there is no problem, or problems do not fit into the context.
  """
  if responses not in RESPONSES:
    raise ValueError(f'responses: expected one of {RESPONSES}, got {responses!r}.')
  if num_problems < 1:
    raise ValueError(f'num_problems: expected 1 or more, got {num_problems}.')
  policy, reference = load_pair(path, reference)
  known, loss = policy.info.known_digits, loss_of(policy)
  digits = digits or [known, known + 1]
  task = task_of(policy, digits)
  detectors = standard_detectors(task, loss) if detectors is None else detectors
  answer = make_answer(model_of(policy), task, greedy=responses == 'greedy', temperature=loss.temperature)
  read = make_token_reader(policy, reference, task)
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  batch_size = _batch_size(batch_size, policy, task)
  drawn = _problems(policy, digits, num_problems, problem_key)
  parts, batches = [], [(n, start) for n in digits for start in range(0, num_problems, batch_size)]
  for number, start in tqdm.tqdm(batches, 'responses', unit='batch', disable=not progress):
    problems = jax.tree.map(lambda x, start=start: x[start:start + batch_size], drawn[number])
    if responses == 'solution':
      rollout = as_rollout(jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems))
      rewards = jnp.full(rollout.mask.shape[0], jnp.nan, jnp.float32)
    else:
      key = jax.random.fold_in(jax.random.fold_in(answer_key, number), start)
      rollout, rewards = answer(policy.params, problems, key)
    found = read(policy.params, reference.params, problems, rollout)
    for name, one in detect_all(detectors, problems, rollout, found.pop('ref_logits')).items():
      found |= {f'score/{name}': one.score, f'critical/{name}': one.critical, f'looked_at/{name}': one.weight}
    found |= {'reward': rewards, 'digits': jnp.full(rewards.shape, number, jnp.int32)}
    parts.append(jax.device_get(found) | _texts(task, problems, rollout))
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_answers(policies: Sequence[Checkpoint], *, digits: list[int] | None = None, num_problems: int = PROBLEMS,
                 seed: int = 0, batch_size: int = 64, progress: bool = False) -> list[dict[str, np.ndarray]]:
  """Reads the greedy answers of several policies to the problems of `read_tokens`, and nothing of their tokens.

  Policies of one architecture share a compiled program.

  Args:
    policies: checkpoints of models that were pre-trained on the same number of digits.
    digits: numbers of digits of the longer operand; N and N + 1 if None.
    num_problems: problems of each.
    seed: of the problems.
    batch_size: problems answered at a time; fewer for a large vocabulary.
    progress: whether to show it.

  Returns:
    For each policy NumPy arrays `[B]`: `problem` (text), `digits`, `response` (text) and `reward`.

  Raises:
    CheckpointError: if the policies do not belong together.
    ValueError: if problems do not fit into the context.
  """
  first, known = policies[0], policies[0].info.known_digits
  for policy in policies[1:]:
    load_pair(policy, first)
  digits = digits or [known, known + 1]
  task = task_of(first, digits)
  answers = {model: make_answer(model, task) for model in map(model_of, policies)}
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  batch_size = _batch_size(batch_size, first, task)
  drawn = _problems(first, digits, num_problems, problem_key)
  parts = [[] for _ in policies]
  batches = list(itertools.product(range(len(policies)), digits, range(0, num_problems, batch_size)))
  for i, number, start in tqdm.tqdm(batches, 'answers', unit='batch', disable=not progress):
    problems = jax.tree.map(lambda x, start=start: x[start:start + batch_size], drawn[number])
    rollout, rewards = answers[model_of(policies[i])](policies[i].params, problems, answer_key)
    own = {name: text for name, text in _texts(task, problems, rollout).items() if name in ('problem', 'response')}
    parts[i].append(own | {'reward': np.asarray(rewards), 'digits': np.full(rewards.shape, number)})
  return [{name: np.concatenate([part[name] for part in own]) for name in own[0]} for own in parts]


def task_of(policy: Checkpoint, digits: list[int]) -> Task:
  """Returns the task of problems of so many digits, the longest of which sizes its arrays."""
  known, longest = policy.info.known_digits, max(digits)
  return plus_task(min(known, longest), max(longest - known, 0))


def standard_detectors(task: Task, loss: LossConfig = LossConfig(), threshold: float = THRESHOLD,
                       quantile: float = QUANTILE) -> dict[str, Detector]:
  """Returns the detectors that cost nothing beside the reference's logits: `oracle`, and `threshold` and `quantile` of
  the certainty that the loss takes."""
  own = {'kind': loss.certainty, 'temperature': loss.certainty_temperature}
  return {'oracle': oracle(task), 'threshold': low_certainty(threshold=threshold, **own),
          'quantile': low_certainty(quantile=quantile, **own)}


def load_pair(path: str | os.PathLike | Checkpoint, reference: str | os.PathLike | Checkpoint | None = None,
              load: Callable[..., Checkpoint] = load_checkpoint) -> tuple[Checkpoint, Checkpoint]:
  """Returns a policy's checkpoint and its reference's; arguments as in `read_tokens`, and what reads a checkpoint:
  `find_checkpoint` for all but the parameters.

  Raises:
    CheckpointError: if one cannot be read, or they have other vocabularies or were pre-trained on other numbers.
  """
  policy = path if isinstance(path, Checkpoint) else load(path)
  if not isinstance(reference, Checkpoint):
    found = find_reference(policy) if reference is None else reference
    reference = policy if found == policy.path else load(found)
  for name, one, two in (('vocab_size', policy.info.model.vocab_size, reference.info.model.vocab_size),
                         ('known_digits', policy.info.known_digits, reference.info.known_digits)):
    if one != two:
      raise CheckpointError(f'{policy.path}: {name} is {one}, but {two} in the reference {reference.path}; they do not '
                            'belong together.')
  return policy, reference


def find_reference(policy: Checkpoint) -> storage.Path:
  """Returns where the reference of a checkpoint lies: the copy in its workdir, or what its config names; a pre-trained
  model is its own."""
  if policy.info.kind == 'pretrain':
    return policy.path
  home = policy.path.parent.parent
  study = [home.parent.parent] if home.parent.name == 'members' else []  # of a sweep in a bucket, where no links are
  for kept in (checkpoint_lib.latest(place / 'reference') for place in [home, *study]):
    if kept is not None:
      return kept
  return checkpoint_lib.find_checkpoint(policy.info.training.reference or checkpoint_lib.SHIPPED_REFERENCE).path


def loss_of(policy: Checkpoint) -> LossConfig:
  """Returns the loss a policy was fine-tuned with, or the default one."""
  training = policy.info.training
  return training.loss if isinstance(training, FinetuneConfig) else LossConfig()


def model_of(policy: Checkpoint) -> GPT2:
  """Returns a policy's network as it was trained; but for `cudnn` attention, which is `auto` where there is no GPU."""
  return GPT2(_on_this_device(policy.info.model))


def reference_model_of(policy: Checkpoint, reference: Checkpoint) -> GPT2:
  """Returns a reference's network as it was read when the policy was trained (`gpt2.reference_config`)."""
  return GPT2(_on_this_device(reference_config(policy.info.model, reference.info.model)))


def _on_this_device(config: GPT2Config) -> GPT2Config:
  here = config.attention != 'cudnn' or jax.default_backend() == 'gpu'
  return dataclasses.replace(config, remat=False, attention=config.attention if here else 'auto')


def make_token_reader(policy: Checkpoint, reference: Checkpoint, task: Task) -> Callable:
  """Makes `(params, ref_params, problems, rollout) -> dict`, jitted: arrays `[B, T]` and `[B, T, 5]` of `read_tokens`
  but for the detectors', and `ref_logits` `[B, T, V]`, which detectors look at."""
  config, model, ref_model = loss_of(policy), model_of(policy), reference_model_of(policy, reference)

  def read(params, ref_params, problems, rollout):
    mask, ref_logits = rollout.mask, read_logits(ref_model, ref_params, rollout)
    logits, _ = score(model, params, rollout)
    record = weighted_kl(logits, ref_logits, rollout.actions, mask=mask, **op_options(config, Coefficients.of(config)))
    penalty, weight = weighted_penalty(record, config)
    solution, here = jax.vmap(task.solution)(problems), on_path(task, problems, rollout)
    logits, cooled = logits / config.temperature, ref_logits / config.temperature
    found = {'token': rollout.actions, 'mask': mask, 'on_path': here,
             'right': here & (rollout.actions == solution.tokens),
             'log_prob': record.log_prob, 'ref_log_prob': record.ref_log_prob, 'entropy': record.entropy,
             'ref_entropy': entropy(jax.nn.log_softmax(cooled)), 'kl': record.kl, 'certainty': record.certainty,
             'weight': weight, 'penalty': config.kl_coefficient * penalty}
    found |= {f'certainty/{kind}': certainty(ref_logits, kind, config.certainty_temperature) for kind in CERTAINTIES}
    for name, some in (('', logits), ('ref_', cooled)):
      probs, tokens = jax.lax.top_k(jax.nn.softmax(some), min(TOP, some.shape[-1]))
      right = jnp.exp(action_log_probs(some, solution.tokens))
      found |= {f'{name}top': tokens, f'{name}top_prob': probs, f'{name}right_prob': jnp.where(here, right, 0.0)}
    found = {name: jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))
             for name, x in found.items()}
    return found | {'ref_logits': ref_logits}

  return jax.jit(read)


def read_steps(path: str | os.PathLike, reference: str | os.PathLike | None = None, *, most: int = STEPS,
               digits: list[int] | None = None, num_problems: int = PROBLEMS, num_solutions: int = 6, seed: int = 0,
               batch_size: int = 64, progress: bool = False) -> dict[str, Any]:
  """Reads the checkpoints of a directory, one after another.

  Args:
    path: a workdir, or a directory of step directories.
    reference: as in `read_tokens`.
    most: checkpoints that are read, at most: the last, the first, and some evenly between.
    digits: the least and the greatest of them are read; N and N + 1 if None.
    num_problems: problems for each accuracy, and right solutions that are read.
    num_solutions: solutions of which single tokens are kept.
    seed: of the problems.
    batch_size: problems at a time; fewer for a large vocabulary.
    progress: whether to show it.

  Returns:
    `digits` `[2]`; `step`, `short` and `long` (greedy accuracy at each of these), `critical_prob` and `other_prob` (of
    the right token after right ones, in right solutions of the greater number), `critical_kl`, `other_kl` (nats), `[S]`
    each, for S steps. A fine-tuned policy's own reference stands first, as step 0. `right_prob` `[S, num_solutions,
    T]`, and of these solutions `token`, `mask`, `critical` `[num_solutions, T]`, `problem` and `response`.

  Raises:
    CheckpointError: as `read_tokens`.
    ValueError: as `read_tokens`.
  """
  if num_problems < 1:
    raise ValueError(f'num_problems: expected 1 or more, got {num_problems}.')
  last, reference = load_pair(path, reference)
  known = last.info.known_digits
  digits = [known, known + 1] if digits is None else [min(digits), max(digits)]
  task, longest = task_of(last, digits), digits[-1]
  batch_size = _batch_size(batch_size, last, task)
  answer, read = make_answer(model_of(last), task), make_token_reader(last, reference, task)
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  problems = _problems(last, digits, num_problems, problem_key)
  right = as_rollout(*(jax.vmap(f)(problems[longest]) for f in (task.prompt, task.solution)))
  critical = np.asarray(oracle(task)(problems[longest], right, None).critical)
  rows, kept = [], []
  for step, params in tqdm.tqdm(list(_states(last, reference, most)), 'steps', unit='step', disable=not progress):
    params = _whole(last.path.parent, step) if params is None else params
    if params is None:
      continue
    found = _in_batches(lambda some, p=params: {k: v for k, v in read(p, reference.params, *some).items()
                                                if k in ('mask', 'right_prob', 'kl')},
                        (problems[longest], right), batch_size)
    row = {'step': step} | {name: float(answer_all(answer, params, problems[n], answer_key, batch_size).mean())
                            for name, n in zip(('short', 'long'), digits)}
    for name, where in (('critical', critical), ('other', found['mask'] & ~critical)):
      row |= {f'{name}_{short}': float(found[field][where].mean()) if where.any() else np.nan
              for short, field in (('prob', 'right_prob'), ('kl', 'kl'))}
    rows.append(row)
    kept.append(found['right_prob'][:num_solutions])
  own = jax.tree.map(lambda x: x[:num_solutions], (problems[longest], right))
  curves = {name: np.array([row[name] for row in rows]) for name in rows[0]}
  return curves | {'digits': np.array(digits), 'right_prob': np.stack(kept), 'token': np.asarray(own[1].actions),
                   'mask': np.asarray(own[1].mask), 'critical': critical[:num_solutions], **_texts(task, *own)}


def _problems(policy, digits, num_problems, key):
  """Draws the problems of each number of digits, in arrays of one size."""
  return {n: draw_problems(jax.random.fold_in(key, n), num_problems, 'plus', n, policy.info.known_digits, max(digits))
          for n in digits}


def _states(last, reference, most):
  """Yields the steps to read, and the parameters of those that are no checkpoint beside the last one."""
  steps = checkpoint_lib.steps_in(last.path.parent)
  chosen = np.linspace(len(steps) - 1, 0, min(most, len(steps))).round().astype(int)
  if last.info.kind == 'finetune' and 0 not in steps and _is_own(last, reference):
    trunk = {name: x for name, x in reference.params.items() if name != 'value_head'}
    yield 0, {**last.params, **trunk}
  for i in sorted(set(chosen.tolist())):
    yield steps[i], None


def _whole(directory, step):
  """Returns the parameters of a step; None, with a warning, if a process was killed while it removed the step."""
  try:
    return load_checkpoint(directory, step).params
  except checkpoint_lib.DamagedError as error:
    logging.warning('%s Step %d is left out.', error, step)
    return None


def _is_own(policy, reference):
  try:
    return reference.path == storage.resolve(find_reference(policy))
  except CheckpointError:  # the one that it had is gone
    return False


def _in_batches(read, arrays, batch_size):
  size = jax.tree.leaves(arrays)[0].shape[0]
  parts = [jax.device_get(read(jax.tree.map(lambda x, i=i: x[i:i + batch_size], arrays)))
           for i in range(0, size, batch_size)]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batch_size(asked, policy, task):
  logits = (task.prompt_length + task.response_length) * policy.info.model.vocab_size
  return max(min(asked, _LOGITS // logits), 1)


def _texts(task, problems, rollout) -> dict[str, np.ndarray]:
  """Returns problems, responses and single tokens as text."""
  decode, tokens, mask = task.tokenizer.decode, np.asarray(rollout.actions), np.asarray(rollout.mask)
  prompt, prompt_mask = (np.asarray(x) for x in (rollout.prompt, rollout.prompt_mask))
  alphabet = np.array([*task.tokenizer.alphabet, '\ufffd'])
  return {'problem': np.array([_operands(decode(row, own)) for row, own in zip(prompt, prompt_mask)], object),
          'response': np.array([decode(row, own) for row, own in zip(tokens, mask)], object),
          'character': np.where(mask, alphabet[np.minimum(tokens, len(alphabet) - 1)], '')}


def _operands(prompt: str) -> str:
  lines = prompt.split('\n')
  return lines[1] if len(lines) > 1 else prompt
