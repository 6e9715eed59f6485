"""Measurements of every run of a study on fixed problems: a probe in each iteration, and a test at the end.

Letters: B episodes, T response tokens, P members of a population, N greatest size of a problem in pre-training, k by
how much problems of training exceed it.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.records import Rollout, Solution
from critkl_jax.rl.kl import token_kl
from critkl_jax.rl.losses import action_log_probs
from critkl_jax.sampling.generation import respond
from critkl_jax.sampling.scoring import as_rollout, score
from critkl_jax.tasks.host_side import rewarded
from critkl_jax.tasks.known_tasks import known_task_of
from critkl_jax.tasks.task import Task, critical_tokens, successes
from critkl_jax.training import population

SEED = 1_000_003  # seed of the problems; a run trains on them only by chance
PROBE_PROBLEMS = 16  # whole solutions in the probe, for N and for N + k each
CRITICAL_PROBLEMS = 256  # further solutions in the probe, cut after the last critical token
READ_PROBLEMS = 128  # test problems whose sampled answers get a teacher-forced pass


def make_probe(model: LanguageModel, ref_params: Any, settings: Any, temperature: float = 1.0,
               num_problems: int = PROBE_PROBLEMS, num_critical: int = CRITICAL_PROBLEMS, seed: int = SEED
               ) -> Callable[[Any], dict[str, chex.Array]]:
  """Makes the probe `params -> metrics`, float32 `[]` each, from teacher-forced passes over right solutions.

  Args:
    model: the network of policy and reference.
    ref_params: the reference's parameters.
    settings: settings of a built-in task that knows right solutions; they give N and k.
    temperature: temperature of policy and reference.
    num_problems: problems of N and of N + k each, whose solutions are read whole.
    num_critical: problems of N + k whose solutions are read up to their last critical token.
    seed: seed of the problems.

  Returns:
    The probe. At the critical tokens of N + k: `critical/probability` of the right token, the same for each kind
    of critical token (`critical/first_comma`, ...; `KnownTask.critical_kinds`; figures 4 and 7 of arXiv 2502.06533),
    and `critical/kl`, exact KL(policy || reference) in nats per token. `probe_kl_other` and `probe_kl_known`: the KL at
    the other tokens of N + k, and at the tokens of N.
  """
  task, draw = _tests(settings)
  key = jax.random.key(seed)
  known, longer = draw(key, num_problems).values()
  problems = jax.tree.map(lambda *x: jnp.concatenate(x), longer, known)
  solutions = jax.tree.map(lambda x: x[:, :task.solution_length], jax.vmap(task.solution)(problems))
  rollout = as_rollout(jax.vmap(task.prompt)(problems), solutions)
  is_longer = (jnp.arange(2 * num_problems, dtype=jnp.int32) < num_problems)[:, None]
  places = {'other': solutions.mask & ~solutions.critical & is_longer, 'known': solutions.mask & ~is_longer}
  begun, begun_solutions = begin_solutions(task, list(draw(key, num_critical).values())[-1])
  kinds = jax.vmap(known_task_of(settings).critical_kinds)(begun_solutions)

  def logits_of(params, rollout):
    return score(model, params, rollout)[0] / temperature

  ref_logits, begun_ref_logits = (np.asarray(jax.jit(logits_of)(ref_params, some)) for some in (rollout, begun))

  def probe(params):
    kl = token_kl(logits_of(params, rollout), ref_logits)
    logits = logits_of(params, begun)
    right = jnp.exp(action_log_probs(logits, begun.actions))
    return {**{f'probe_kl_{name}': _mean(kl, where) for name, where in places.items()},
            'critical/kl': _mean(token_kl(logits, begun_ref_logits), begun_solutions.critical),
            'critical/probability': _mean(right, begun_solutions.critical),
            **{f'critical/{kind}': _mean(right, where) for kind, where in kinds.items()}}

  return probe


def _tests(settings: Any) -> tuple[Task, Callable[[chex.PRNGKey, int], dict[str, Any]]]:
  """Returns the task of tests on N and on N + k, and `(key, B) -> {name: problems}`, first `N` and then `N+k`."""
  known = known_task_of(settings)
  least, extra = known.sizes(settings)
  task, _ = known.tests(settings, [least, least + extra])
  return task, lambda key, number: known.before_and_after(key, settings, number)


def begin_solutions(task: Task, problems: Any) -> tuple[Rollout, Solution]:
  """Cuts the right solutions of problems `[B]` after the last critical token of any of them.

  Returns:
    The cut solutions as a `Rollout` and as a `Solution`, `[B, T]`; T is 1 if there is no critical token.
  """
  solutions = jax.vmap(task.solution)(problems)
  length = int(np.max(np.flatnonzero(np.asarray(solutions.critical).any(0)), initial=0)) + 1
  solutions = jax.tree.map(lambda x: x[:, :length], solutions)
  return as_rollout(jax.vmap(task.prompt)(problems), solutions), solutions


def make_members_test(model: LanguageModel, settings: Any, num_problems: int, mesh: Mesh, temperature: float = 1.0,
                      batch_size: int = 128, seed: int = SEED, progress: bool = False) -> Callable:
  """Makes the test of the members of a population, on fixed problems of N and of N + k.

  Args:
    model: the network of the policies and their reference.
    settings: as for `make_probe`.
    num_problems: B, problems of N and of N + k each.
    mesh: mesh of `population.init_population`, over members alone.
    temperature: temperature of sampled answers, and of policy and reference in teacher-forced passes.
    batch_size: problems in a batch.
    seed: seed of problems and samples.
    progress: whether to show a progress bar.

  Returns:
    `(params [P], ref_params) -> list` with a dict for each member; its keys `N` and `N+k` hold dicts with: `greedy` and
    `sampled`, NumPy bool `[B]`, whether the answer is right; `format_errors`, the share of sampled answers that are not
    well formed; `kl_critical` and `kl_other`, exact KL(policy || reference) in nats per token over the first
    `READ_PROBLEMS` sampled answers, at critical tokens up to the first error and at all others (NaN without tokens).
    With rewards in Python they also hold `reward`, the mean reward of the sampled answers. `N+k` also has
    `critical_probability`, float64: the mean probability of the right token at the critical tokens of the solution of
    each problem that has any.
  """
  task, draw = _tests(settings)
  answer = {greedy: population.map_members(_answer(model, task, temperature, greedy), mesh) for greedy in (True, False)}
  read = population.map_members(_answer(model, task, temperature, greedy=False, read=True), mesh)
  right = population.map_members(_right_probability(model, temperature), mesh)
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  problems = draw(problem_key, num_problems)
  names = list(problems)  # keeps their order: PyTrees sort the keys of a dict
  longer = names[-1]
  begun = begin_solutions(task, problems[longer])
  has_critical = np.asarray(begun[1].critical).any(1)
  problems, begun, answer_key = sharding.replicate((problems, begun, answer_key), mesh)
  batch_size = min(batch_size, num_problems)

  def answers(params, ref_params, drawn, greedy, bar):
    parts = []
    for start, batch in _batches(drawn, num_problems, batch_size):
      some = read if not greedy and start < READ_PROBLEMS else answer[greedy]
      found = jax.device_get(some(params, ref_params, batch, jax.random.fold_in(answer_key, start)))
      parts.append(_rewarded_on_host(task, batch, found) if task.host else found)
      bar.update()
    return {name: np.concatenate([part[name] for part in parts if name in part], 1)[:, :num_problems]
            for name in parts[0]}

  def probabilities(params, bar):
    parts = []
    for _, batch in _batches(begun, num_problems, batch_size):
      parts.append(jax.device_get(right(params, *batch)))
      bar.update()
    return np.concatenate(parts, 1)[:, :num_problems].astype(np.float64)

  def test(params: Any, ref_params: Any) -> list[dict[str, dict[str, Any]]]:
    members = [{} for _ in range(jax.tree.leaves(params)[0].shape[0])]
    ref_params = sharding.replicate(ref_params, mesh)
    passes = 2 * len(problems) + 1  # greedy and sampled answers of each, and right solutions
    with tqdm.tqdm(total=passes * len(range(0, num_problems, batch_size)), desc='tests', unit='batch',
                   disable=not progress) as bar:
      for name in names:
        drawn = problems[name]
        found = {kind: answers(params, ref_params, drawn, kind == 'greedy', bar) for kind in ('greedy', 'sampled')}
        for i, member in enumerate(members):
          member[name] = _of_member(*({key: value[i] for key, value in found[kind].items()}
                                      for kind in ('greedy', 'sampled')))
      for member, probability in zip(members, probabilities(params, bar)):
        member[longer]['critical_probability'] = probability[has_critical]
    return members

  return test


def _batches(drawn, number, size):
  """Yields `(start, batch)` for batches of equal size; the last batch is filled up with the first problems."""
  for start in range(0, number, size):
    own = (start + np.arange(size)) % number
    yield start, jax.tree.map(lambda x, own=own: x[own], drawn)


def _of_member(greedy, sampled):
  with np.errstate(invalid='ignore'):
    return {'greedy': greedy['right'] > 0, 'sampled': sampled['right'] > 0,
            'format_errors': float(1 - sampled['formed'].mean()),
            **({'reward': float(sampled['reward'].mean())} if 'reward' in sampled else {}),
            **{f'kl_{place}': float(np.divide(sampled[f'kl_{place}'].sum(), sampled[f'number_{place}'].sum()))
               for place in ('critical', 'other')}}


def _answer(model: LanguageModel, task: Task, temperature: float, greedy: bool, read: bool = False) -> Callable:
  """Makes `(params, ref_params, problems, key) -> dict` of arrays `[B]`; `read` adds sums of the KL over tokens."""

  def answer(params, ref_params, problems, key):
    rollout = respond(model, params, task, problems, key, temperature=temperature, greedy=greedy)
    found = {'formed': jax.vmap(task.well_formed)(problems, rollout.actions, rollout.mask)}
    if task.host:
      found |= {'actions': rollout.actions, 'mask': rollout.mask}
    else:
      found['right'] = successes(task, jax.vmap(task.reward)(problems, rollout.actions, rollout.mask))
    if not read:
      return found
    logits, ref_logits = (score(model, some, rollout)[0] / temperature for some in (params, ref_params))
    kl = token_kl(logits, ref_logits)
    critical = critical_tokens(task, problems, rollout)
    for name, where in (('critical', critical), ('other', rollout.mask & ~critical)):
      found[f'kl_{name}'] = jnp.sum(jnp.where(where, kl, 0.0), 1)
      found[f'number_{name}'] = jnp.sum(where, 1, dtype=jnp.int32)
    return found

  return answer


def _rewarded_on_host(task: Task, problems: Any, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Replaces `actions` and `mask` `[P, B, T]` by `reward` and `right` `[P, B]`."""
  rewards = np.stack([rewarded(task.host, jax.device_get(problems), actions, mask)[0]
                      for actions, mask in zip(found.pop('actions'), found.pop('mask'))])
  return found | {'reward': rewards, 'right': successes(task, rewards)}


def _right_probability(model: LanguageModel, temperature: float) -> Callable:
  """Makes `(params, rollout, solutions) -> [B]`: the mean probability of the right token at critical tokens."""

  def right(params, rollout, solutions):
    logits = score(model, params, rollout)[0] / temperature
    probability = jnp.exp(action_log_probs(logits, rollout.actions))
    return jax.vmap(_mean)(probability, solutions.critical)

  return right


def _mean(values, where):
  return jnp.sum(jnp.where(where, values, 0.0)) / jnp.sum(where, dtype=jnp.float32)
