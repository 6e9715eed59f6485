"""What is measured of every run of a study, always on the same problems: while it trains, and at its end.

Letters: B problems, T tokens, P members.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh

from critkl_jax import population, sharding
from critkl_jax.critical_tokens import on_path
from critkl_jax.evaluate import draw_problems
from critkl_jax.gpt2 import GPT2
from critkl_jax.losses import action_log_probs, token_kl
from critkl_jax.records import Rollout, Solution
from critkl_jax.rollout import as_rollout, respond, score
from critkl_jax.tasks.addition import addition, critical_kinds, plus_lengths, plus_task
from critkl_jax.tasks.task import Task

SEED = 1_000_003  # of the problems, which no run trains on but by chance
PROBE_PROBLEMS = 16  # of each number of digits
CRITICAL_PROBLEMS = 256  # of N + k digits, read as far as their last critical token: these are few, and seldom alike
READ_PROBLEMS = 128  # of those tested, whose sampled answers are read token by token


def make_probe(model: GPT2, ref_params: Any, known_digits: int, extra_digits: int, temperature: float = 1.0,
               num_problems: int = PROBE_PROBLEMS, num_critical: int = CRITICAL_PROBLEMS, seed: int = SEED
               ) -> Callable[[Any], dict[str, chex.Array]]:
  """Makes `params -> metrics`, float32 `[]` each, of what a policy says of right solutions.

  Args:
    model: the network of policy and reference.
    ref_params: the reference's parameters.
    known_digits: N.
    extra_digits: k.
    temperature: of the policy and of the reference.
    num_problems: of N and of N + k digits each, whose solutions are read whole.
    num_critical: of N + k digits, whose solutions are read as far as their last critical token.
    seed: of the problems.

  Returns:
    The probe. `critical/probability` is that of the right token at the critical tokens of N + k digits, and
    `critical/first_comma` and so on at each kind of them (`addition.critical_kinds`; figures 4 and 7 of arXiv
    2502.06533); `critical/kl` is exact KL(policy || reference) there, in nats a token. `probe_kl_other` and
    `probe_kl_known` are that KL at the other tokens, and at the tokens of N digits, none of which is critical.
  """
  longest = known_digits + extra_digits
  task = addition(known_digits, longest, lambda key: plus_lengths(key, known_digits, extra_digits), length_margin=0)
  key = jax.random.key(seed)
  problems = jax.tree.map(lambda *x: jnp.concatenate(x), *(
      draw_problems(jax.random.fold_in(key, n), num_problems, 'plus', n, known_digits, longest)
      for n in (longest, known_digits)))
  solutions = jax.vmap(task.solution)(problems)
  rollout = as_rollout(jax.vmap(task.prompt)(problems), solutions)
  longer = (jnp.arange(2 * num_problems, dtype=jnp.int32) < num_problems)[:, None]
  places = {'other': solutions.mask & ~solutions.critical & longer, 'known': solutions.mask & ~longer}
  begun, begun_solutions = begin_solutions(task, draw_problems(
      jax.random.fold_in(key, longest), num_critical, 'plus', longest, known_digits, longest))
  kinds = jax.vmap(critical_kinds)(begun_solutions)

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


def begin_solutions(task: Task, problems: Any) -> tuple[Rollout, Solution]:
  """Returns the right solutions of problems `[B]` as far as their last critical token, as a rollout and as they are,
  `[B, T]`; one token if there is no critical one."""
  solutions = jax.vmap(task.solution)(problems)
  length = int(np.max(np.flatnonzero(np.asarray(solutions.critical).any(0)), initial=0)) + 1
  solutions = jax.tree.map(lambda x: x[:, :length], solutions)
  return as_rollout(jax.vmap(task.prompt)(problems), solutions), solutions


def make_test(model: GPT2, known_digits: int, extra_digits: int, num_problems: int, mesh: Mesh,
              temperature: float = 1.0, batch_size: int = 128, seed: int = SEED, progress: bool = False) -> Callable:
  """Makes the test of the members of a population, on fixed problems of N and of N + k digits (`plus`).

  Args:
    model: the network of the policies and their reference.
    known_digits: N.
    extra_digits: k.
    num_problems: B, of each number of digits.
    mesh: of `population.init_population`, of members alone.
    temperature: of sampled answers, and of policy and reference where these are read.
    batch_size: problems answered at a time.
    seed: of problems and samples.
    progress: whether to show it, batch by batch.

  Returns:
    `(params [P], ref_params) -> list` of a dict for each member: for `N` and `N+k` another dict, of the rewards
    `greedy` and `sampled`, NumPy bool `[B]`, and of sampled answers `format_errors`, the share that is not well
    formed, and of the first 128 of them `kl_critical` and `kl_other`, exact KL(policy || reference) in nats a token, at
    critical tokens up to the first error and at all others; NaN where there are none. For `N+k` also
    `critical_probability`, float64 `[B]`: the mean probability of the right token at the critical tokens of each
    problem's solution.
  """
  task, longest = plus_task(known_digits, extra_digits), known_digits + extra_digits
  answer = {greedy: population.map_members(_answer(model, task, temperature, greedy), mesh) for greedy in (True, False)}
  read = population.map_members(_answer(model, task, temperature, greedy=False, read=True), mesh)
  right = population.map_members(_right_probability(model, temperature), mesh)
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  problems = {name: draw_problems(jax.random.fold_in(problem_key, n), num_problems, 'plus', n, known_digits, longest)
              for name, n in (('N', known_digits), (f'N+{extra_digits}', longest))}
  begun = begin_solutions(task, problems[f'N+{extra_digits}'])
  problems, begun, answer_key = sharding.replicate((problems, begun, answer_key), mesh)
  batch_size = min(batch_size, num_problems)

  def answers(params, ref_params, drawn, greedy, bar):
    parts = []
    for start, batch in _batches(drawn, num_problems, batch_size):
      some = read if not greedy and start < READ_PROBLEMS else answer[greedy]
      parts.append(jax.device_get(some(params, ref_params, batch, jax.random.fold_in(answer_key, start))))
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
      for name, drawn in problems.items():
        found = {kind: answers(params, ref_params, drawn, kind == 'greedy', bar) for kind in ('greedy', 'sampled')}
        for i, member in enumerate(members):
          member[name] = _of_member(*({key: value[i] for key, value in found[kind].items()}
                                      for kind in ('greedy', 'sampled')))
      for member, probability in zip(members, probabilities(params, bar)):
        member[f'N+{extra_digits}']['critical_probability'] = probability
    return members

  return test


def _batches(drawn, number, size):
  """Yields the first place and the rows of batches of one size, the last filled up from the start."""
  for start in range(0, number, size):
    own = (start + np.arange(size)) % number
    yield start, jax.tree.map(lambda x, own=own: x[own], drawn)


def _of_member(greedy, sampled):
  with np.errstate(invalid='ignore'):
    return {'greedy': greedy['reward'] > 0, 'sampled': sampled['reward'] > 0,
            'format_errors': float(1 - sampled['formed'].mean()),
            **{f'kl_{place}': float(np.divide(sampled[f'kl_{place}'].sum(), sampled[f'number_{place}'].sum()))
               for place in ('critical', 'other')}}


def _answer(model: GPT2, task: Task, temperature: float, greedy: bool, read: bool = False) -> Callable:
  """Makes `(params, ref_params, problems, key) -> dict` of arrays `[B]`; to `read` adds sums over tokens."""

  def answer(params, ref_params, problems, key):
    rollout = respond(model, params, task, problems, key, temperature=temperature, greedy=greedy)
    found = {'reward': jax.vmap(task.reward)(problems, rollout.actions, rollout.mask),
             'formed': jax.vmap(task.well_formed)(rollout.actions, rollout.mask)}
    if not read:
      return found
    logits, ref_logits = (score(model, some, rollout)[0] / temperature for some in (params, ref_params))
    kl = token_kl(logits, ref_logits)
    critical = on_path(task, problems, rollout) & jax.vmap(task.solution)(problems).critical
    for name, where in (('critical', critical), ('other', rollout.mask & ~critical)):
      found[f'kl_{name}'] = jnp.sum(jnp.where(where, kl, 0.0), 1)
      found[f'number_{name}'] = jnp.sum(where, 1, dtype=jnp.int32)
    return found

  return answer


def _right_probability(model: GPT2, temperature: float) -> Callable:
  """Makes `(params, rollout, solutions) -> [B]`: the mean probability of the right token at critical ones."""

  def right(params, rollout, solutions):
    logits = score(model, params, rollout)[0] / temperature
    probability = jnp.exp(action_log_probs(logits, rollout.actions))
    return jax.vmap(_mean)(probability, solutions.critical)

  return right


def _mean(values, where):
  return jnp.sum(jnp.where(where, values, 0.0)) / jnp.sum(where, dtype=jnp.float32)
