"""From checkpoints to arrays of tokens: what policy and reference say at each token of their responses.

    from critkl_jax.analysis.reading import read_tokens
    tokens = read_tokens('runs/finetune', num_problems=64)
    print(tokens['certainty'][tokens['critical/oracle']].mean(), tokens['certainty'][tokens['mask']].mean())

Letters: B responses, T tokens, V vocabulary.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from critkl_jax import checkpoint as checkpoint_lib
from critkl_jax.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from critkl_jax.confidence import certainty, entropy
from critkl_jax.config import FinetuneConfig, LossConfig
from critkl_jax.critical_tokens import Detector, low_certainty, on_path, oracle, read_logits
from critkl_jax.evaluate import draw_problems, make_answer
from critkl_jax.gpt2 import GPT2
from critkl_jax.losses import Coefficients, action_log_probs, op_options, weighted_penalty
from critkl_jax.ops.weighted_kl import weighted_kl
from critkl_jax.rollout import as_rollout, score
from critkl_jax.tasks.addition import plus_task
from critkl_jax.tasks.task import Task

CERTAINTIES = ('negentropy', 'min_entropy', 'max_prob')
TOP = 5  # alternatives that are kept of each distribution
RESPONSES = ('greedy', 'sampled', 'solution')


def read_tokens(path: str | pathlib.Path | Checkpoint = checkpoint_lib.SHIPPED_REFERENCE,
                reference: str | pathlib.Path | Checkpoint | None = None, *, digits: list[int] | None = None,
                num_problems: int = 64, responses: str = 'greedy', detectors: dict[str, Detector] | None = None,
                seed: int = 0, batch_size: int = 64, progress: bool = False) -> dict[str, np.ndarray]:
  """Reads what a policy answers, and what it and its reference say at each token.

  Args:
    path: checkpoint of the policy, or where it lies, as in `load_checkpoint`.
    reference: that of the reference; `find_reference` looks for it if None.
    digits: numbers of digits of the longer operand; N and N + 1 if None.
    num_problems: problems of each, always the same for the same seed.
    responses: whose tokens are read: `greedy` or `sampled` ones of the policy, or the right `solution`.
    detectors: of critical tokens, by name; `standard_detectors` if None.
    seed: of problems and samples.
    batch_size: responses read at a time.
    progress: whether to show it.

  Returns:
    NumPy arrays. `[B]`: `problem` (text), `digits`, `reward`, `response` (text). `[B, T]`: `mask`, true at tokens;
    `token` (id), `character`; `on_path`, whether all tokens before are those of the right solution, and `right`,
    whether this one is too; `log_prob`, `ref_log_prob`, `entropy`, `ref_entropy`, `kl` (exact, nats), `certainty/KIND`
    of each kind, `certainty`, `weight` and `penalty` as the policy was trained with, or would be by default;
    `right_prob` and `ref_right_prob` of the right token where `on_path`; `critical/NAME`, `score/NAME` and
    `looked_at/NAME` of each detector (see `Detection`). `[B, T, 5]`: `top`, `ref_top` (ids), `top_prob`,
    `ref_top_prob`.

  Raises:
    CheckpointError: if a checkpoint cannot be read or they do not belong together.
    ValueError: if the responses are of an unknown kind, or problems do not fit into the context.
  """
  if responses not in RESPONSES:
    raise ValueError(f'responses: expected one of {RESPONSES}, got {responses!r}.')
  policy, reference = load_pair(path, reference)
  known = policy.info.known_digits
  digits = digits or [known, known + 1]
  task = plus_task(min(known, max(digits)), max(max(digits) - known, 0))
  detectors = standard_detectors(task) if detectors is None else detectors
  model = GPT2(policy.info.model)
  answer = make_answer(model, task, greedy=responses == 'greedy')
  read = make_token_reader(policy, reference, task)
  key = jax.random.key(seed)
  parts, batches = [], [(n, start) for n in digits for start in range(0, num_problems, batch_size)]
  for number, start in tqdm.tqdm(batches, 'responses', unit='batch', disable=not progress):
    drawn = draw_problems(jax.random.fold_in(key, number), num_problems, 'plus', number, known, max(digits))
    problems = jax.tree.map(lambda x, start=start: x[start:start + batch_size], drawn)
    if responses == 'solution':
      rollout = as_rollout(jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems))
      rewards = jnp.ones(rollout.mask.shape[0])
    else:
      rollout, rewards = answer(policy.params, problems, jax.random.fold_in(jax.random.fold_in(key, number), start))
    found = read(policy.params, reference.params, problems, rollout)
    ref_logits = found.pop('ref_logits')
    for name, detector in detectors.items():
      one = detector(problems, rollout, ref_logits)
      found |= {f'score/{name}': one.score, f'critical/{name}': one.critical, f'looked_at/{name}': one.weight}
    found |= {'reward': rewards, 'digits': jnp.full(rewards.shape, number)}
    parts.append(jax.device_get(found) | _texts(task, problems, rollout))
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def standard_detectors(task: Task, threshold: float = 0.9, quantile: float = 0.02) -> dict[str, Detector]:
  """Returns the detectors that cost nothing beside the reference's logits: `oracle`, `threshold` and `quantile`."""
  return {'oracle': oracle(task), 'threshold': low_certainty(threshold=threshold),
          'quantile': low_certainty(quantile=quantile)}


def load_pair(path: str | pathlib.Path | Checkpoint, reference: str | pathlib.Path | Checkpoint | None = None
              ) -> tuple[Checkpoint, Checkpoint]:
  """Returns a policy's checkpoint and its reference's; arguments as in `read_tokens`.

  Raises:
    CheckpointError: if one cannot be read, or they have other vocabularies or were pre-trained on other numbers.
  """
  policy = path if isinstance(path, Checkpoint) else load_checkpoint(path)
  if not isinstance(reference, Checkpoint):
    found = find_reference(policy) if reference is None else reference
    reference = policy if found == policy.path else load_checkpoint(found)
  for name, one, two in (('vocab_size', policy.info.model.vocab_size, reference.info.model.vocab_size),
                         ('known_digits', policy.info.known_digits, reference.info.known_digits)):
    if one != two:
      raise CheckpointError(f'{policy.path}: {name} is {one}, but {two} in the reference {reference.path}; they do not '
                            'belong together.')
  return policy, reference


def find_reference(policy: Checkpoint) -> pathlib.Path:
  """Returns where the reference of a checkpoint lies: the copy in its workdir, or what its config names; a pre-trained
  model is its own."""
  if policy.info.kind == 'pretrain':
    return policy.path
  kept = policy.path.parent.parent / 'reference'
  named = policy.info.training.reference
  return kept if kept.is_dir() else pathlib.Path(named) if named else checkpoint_lib.SHIPPED_REFERENCE


def loss_of(policy: Checkpoint) -> LossConfig:
  """Returns the loss a policy was fine-tuned with, or the default one."""
  training = policy.info.training
  return training.loss if isinstance(training, FinetuneConfig) else LossConfig()


def make_token_reader(policy: Checkpoint, reference: Checkpoint, task: Task) -> Callable:
  """Makes `(params, ref_params, problems, rollout) -> dict`, jitted: arrays `[B, T]` and `[B, T, 5]` of `read_tokens`
  but for the detectors', and `ref_logits` `[B, T, V]`, which detectors look at."""
  config = loss_of(policy)
  model, ref_model = (GPT2(dataclasses.replace(c.info.model, remat=False)) for c in (policy, reference))

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
    return found | {'ref_logits': ref_logits}

  return jax.jit(read)


def read_steps(path: str | pathlib.Path, reference: str | pathlib.Path | None = None, *, most: int = 20,
               num_problems: int = 64, num_solutions: int = 6, seed: int = 0, progress: bool = False) -> dict[str, Any]:
  """Reads the checkpoints of a directory, one after another.

  Args:
    path: a workdir, or a directory of step directories.
    reference: as in `read_tokens`.
    most: checkpoints that are read, at most: the first, the last, and some evenly between.
    num_problems: problems for each accuracy, and right solutions that are read.
    num_solutions: solutions of which single tokens are kept.
    seed: of the problems.
    progress: whether to show it.

  Returns:
    `step`, `N` and `N+1` (greedy accuracy), `critical_prob` and `other_prob` (of the right token after right ones, at
    N + 1 digits), `critical_kl`, `other_kl` (nats), `[S]` each, for S steps; the reference stands first, as step 0, if
    no checkpoint has that step. `right_prob` `[S, num_solutions, T]`, and of these solutions `token`, `mask`,
    `critical` `[num_solutions, T]` and `problem` `[num_solutions]`.

  Raises:
    CheckpointError: as `read_tokens`.
  """
  last, reference = load_pair(path, reference)
  steps = checkpoint_lib.steps_in(last.path.parent)
  chosen = sorted({steps[i] for i in np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)})
  known = last.info.known_digits
  task = plus_task(known, 1)
  answer, read = make_answer(GPT2(last.info.model), task), make_token_reader(last, reference, task)
  key = jax.random.key(seed)
  problems = {n: draw_problems(jax.random.fold_in(key, n), num_problems, 'plus', n, known, known + 1)
              for n in (known, known + 1)}
  right = as_rollout(*(jax.vmap(f)(problems[known + 1]) for f in (task.prompt, task.solution)))
  critical = np.asarray(oracle(task)(problems[known + 1], right, None).critical)
  rows, kept = [], []
  states = [(step, None) for step in chosen] if 0 in chosen or last.info.kind == 'pretrain' else [
      (0, {**last.params, **{k: v for k, v in reference.params.items() if k != 'value_head'}}),
      *((step, None) for step in chosen)]
  for step, params in tqdm.tqdm(states, 'steps', unit='step', disable=not progress):
    params = load_checkpoint(last.path.parent, step).params if params is None else params
    found = jax.device_get(read(params, reference.params, problems[known + 1], right))
    row = {'step': step} | {name: float(np.mean(answer(params, problems[n], key)[1]))
                            for name, n in (('N', known), ('N+1', known + 1))}
    for name, where in (('critical', critical), ('other', found['mask'] & ~critical)):
      row |= {f'{name}_prob': float(found['right_prob'][where].mean()), f'{name}_kl': float(found['kl'][where].mean())}
    rows.append(row)
    kept.append(found['right_prob'][:num_solutions])
  own = jax.tree.map(lambda x: x[:num_solutions], (problems[known + 1], right))
  curves = {name: np.array([row[name] for row in rows]) for name in rows[0]}
  return curves | {'right_prob': np.stack(kept), 'token': np.asarray(own[1].actions), 'mask': np.asarray(own[1].mask),
                   'critical': critical[:num_solutions], **_texts(task, *own)}


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
