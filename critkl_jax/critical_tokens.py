"""Detectors of critical tokens: where a response is decided, and the reference is unsure.

A detector is a function `(problems, rollout, ref_logits) -> Detection` of B responses of T tokens and of what the
reference says at each of them. Vassoyan et al. (arXiv 2502.06533), section 4, call a token critical if the answer
depends on it and the pre-trained model is much less certain there than elsewhere.

Letters: B responses, T tokens, V vocabulary, K alternatives.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from critkl_jax.confidence import certainty
from critkl_jax.gpt2 import GPT2
from critkl_jax.records import Rollout
from critkl_jax.rollout import respond_from, score
from critkl_jax.tasks.task import Task

THRESHOLD, QUANTILE, SAMPLES = 0.9, 0.02, 8  # what detectors take where nothing is said

Detector = Callable[[Any, Rollout, chex.Array], 'Detection']


@struct.dataclass
class Detection:
  """What a detector found.

  Attributes:
    score: float32 `[B, T]` the greater, the more critical; 0 where the detector did not look.
    critical: bool `[B, T]` whether the token is called critical.
    weight: float32 `[B, T]` for how many tokens each stands that was looked at, 0 for the others: means and rates
      weighted by it are those over all tokens.
  """

  score: chex.Array
  critical: chex.Array
  weight: chex.Array


def on_path(task: Task, problems: Any, rollout: Rollout) -> chex.Array:
  """Returns bool `[B, T]`: whether all tokens before this one are those of the right solution, and this one exists."""
  solution = jax.vmap(task.solution)(problems)
  same = (rollout.actions == solution.tokens) & solution.mask
  before = jnp.cumprod(jnp.pad(same[:, :-1], ((0, 0), (1, 0)), constant_values=True), axis=1)
  return (before > 0) & rollout.mask & solution.mask


def oracle(task: Task) -> Detector:
  """Makes the detector that knows the task: the critical tokens of the right solution, as far as a response follows it.

  What comes after the first wrong token of a response is not looked at.
  """

  def detect(problems, rollout, ref_logits):
    del ref_logits
    here = on_path(task, problems, rollout)
    critical = here & jax.vmap(task.solution)(problems).critical
    return Detection(score=critical.astype(jnp.float32), critical=critical, weight=here.astype(jnp.float32))

  return detect


def low_certainty(threshold: float | None = None, quantile: float | None = None, kind: str = 'negentropy',
                  temperature: float = 1.0) -> Detector:
  """Makes the detector that calls a token critical where the reference is unsure; its score is 1 - certainty.

  Args:
    threshold: tokens of less certainty than this are critical.
    quantile: the share of a response's tokens, those of least certainty, that are critical, rounded to whole tokens; of
      tokens alike at the edge none counts.
    kind: as in `confidence.certainty`.
    temperature: as in `confidence.certainty`.

  Raises:
    ValueError: unless one of threshold and quantile is given, between 0 and 1.
  """
  given = [x for x in (threshold, quantile) if x is not None]
  if len(given) != 1 or not 0 <= given[0] <= 1:
    raise ValueError(f'threshold, quantile: expected one of them, between 0 and 1; got {threshold} and {quantile}.')

  def detect(problems, rollout, ref_logits):
    del problems
    value = certainty(ref_logits, kind, temperature)
    if threshold is not None:
      critical = value < threshold
    else:
      number = jnp.round(quantile * jnp.sum(rollout.mask, 1, keepdims=True, dtype=jnp.float32)).astype(jnp.int32)
      ascending = jnp.sort(jnp.where(rollout.mask, value, jnp.inf), 1)
      ascending = jnp.pad(ascending, ((0, 0), (0, 1)), constant_values=jnp.inf)
      critical = value < jnp.take_along_axis(ascending, number, 1)
    return Detection(score=jnp.where(rollout.mask, 1.0 - value, 0.0), critical=critical & rollout.mask,
                     weight=rollout.mask.astype(jnp.float32))

  return detect


def counterfactual(model: GPT2, params: Any, task: Task, key: chex.PRNGKey, *, num_alternatives: int = 2,
                   num_samples: int = SAMPLES, num_positions: int | None = None, always: Detector | None = None,
                   threshold: float = 0.5, batch_size: int = 64, temperature: float = 1.0, progress: bool = False
                   ) -> Detector:
  """Makes the detector that replaces a token and sees whether the chance of success changes.

  From the same first tokens responses are sampled with the token as it is and with each of the K tokens that the
  reference finds most probable beside it, and rewarded. The score is `|sum_a q_a (p - p_a)|`: p the chance of success
  with the token, p_a with alternative a, q_a the reference's probability of a among the K. All are sampled with the
  same noise, so that where a token changes nothing the chances hardly differ.

  Args:
    model: the network that goes on with the responses.
    params: its parameters.
    task: any task with a reward.
    key: PRNG key; with it and the prompts, the detector is the same at every call.
    num_alternatives: K, less than the vocabulary.
    num_samples: responses for each of them, whose mean reward is its chance of success. A difference of chances has a
      standard error of up to `0.7 / sqrt(num_samples)`, and less for the common noise.
    num_positions: tokens that are looked at in each response, drawn without replacement; all if None.
    always: a detector whose critical tokens are looked at in any case.
    threshold: tokens of at least this score are critical.
    batch_size: responses that are sampled at a time.
    temperature: of the samples.
    progress: whether to show it.

  Raises:
    ValueError: if a number is less than 1, or there are not so many alternatives.
  """
  numbers = {'num_alternatives': num_alternatives, 'num_samples': num_samples, 'batch_size': batch_size,
             'num_positions': 1 if num_positions is None else num_positions}
  for name, number in numbers.items():
    if number < 1:
      raise ValueError(f'{name}: expected 1 or more, got {number}.')
  if num_alternatives >= model.config.vocab_size:
    raise ValueError(f'num_alternatives: expected less than the vocabulary of {model.config.vocab_size}, got '
                     f'{num_alternatives}.')

  import tqdm  # whoever finds no counterfactuals needs no bar

  @jax.jit
  def success(params, problems, rollout, position, token, key):
    new = respond_from(model, params, task, problems, rollout, position, token, key, temperature=temperature)
    return jax.vmap(task.reward)(problems, new.actions, new.mask)

  def detect(problems, rollout, ref_logits):
    prompts = jnp.sum(rollout.prompt.astype(jnp.uint32) * jnp.arange(1, rollout.prompt.size + 1, dtype=jnp.uint32)
                      .reshape(rollout.prompt.shape), dtype=jnp.uint32)
    choice_key, sample_key = jax.random.split(jax.random.fold_in(key, prompts))  # other noise for other problems
    weight = np.asarray(_places(choice_key, rollout.mask, num_positions,
                                None if always is None else always(problems, rollout, ref_logits).critical))
    tokens, shares = _alternatives(rollout.actions, ref_logits, num_alternatives)
    rows, position = np.nonzero(weight)
    tokens, shares = np.asarray(tokens)[rows, position], np.asarray(shares)[rows, position]  # [places, 1 + K], [., K]
    places = np.repeat(np.arange(rows.size), num_samples)
    rewards = np.zeros((places.size, 1 + num_alternatives))
    for start in tqdm.trange(0, places.size, batch_size, desc='counterfactuals', disable=not progress):
      own = places[(start + np.arange(batch_size)) % places.size]
      some = jax.tree.map(lambda x, own=own: x[rows[own]], (problems, rollout))
      for i in range(1 + num_alternatives):
        reward = success(params, *some, position[own], tokens[own, i], jax.random.fold_in(sample_key, start))
        rewards[start:start + batch_size, i] = np.asarray(reward)[:places.size - start]
    chances = rewards.reshape(-1, num_samples, 1 + num_alternatives).mean(1)
    found = np.zeros(weight.shape, np.float32)
    found[rows, position] = np.abs(np.sum(shares * (chances[:, :1] - chances[:, 1:]), 1))
    return Detection(score=jnp.asarray(found), critical=jnp.asarray((found >= threshold) & (weight > 0)),
                     weight=jnp.asarray(weight))

  return detect


def detect_all(detectors: dict[str, Detector], problems: Any, rollout: Rollout, ref_logits: chex.Array
               ) -> dict[str, Detection]:
  """Returns what each of several detectors finds, by name."""
  return {name: detector(problems, rollout, ref_logits) for name, detector in detectors.items()}


def read_logits(model: GPT2, params: Any, rollout: Rollout) -> chex.Array:
  """Returns the logits float32 `[B, T, V]` that detectors look at, of the reference's parameters."""
  return score(model, params, rollout)[0]


def _places(key, mask, num_positions, always):
  """Returns float32 `[B, T]` for how many tokens each stands that is to be looked at: those of `always` for themselves,
  the drawn ones for the rest of their response."""
  always = jnp.zeros(mask.shape, bool) if always is None else always & mask
  if num_positions is None:
    return mask.astype(jnp.float32)
  rest = mask & ~always
  noise = jnp.where(rest, jax.random.uniform(key, mask.shape, jnp.float32), -1.0)
  order = jnp.argsort(jnp.argsort(-noise, axis=1), axis=1)
  drawn = rest & (order < num_positions)
  number, looked_at = (jnp.sum(some, 1, keepdims=True, dtype=jnp.float32) for some in (rest, drawn))
  stands_for = number / jnp.maximum(looked_at, 1.0)
  return jnp.where(always, 1.0, jnp.where(drawn, stands_for, 0.0)).astype(jnp.float32)


def _alternatives(actions, ref_logits, number):
  """Returns each token with the K most probable others, `[B, T, 1 + K]`, and the shares of those among them, `[B, T,
  K]`."""
  itself = jax.nn.one_hot(actions, ref_logits.shape[-1], dtype=bool)
  lowest = jnp.finfo(jnp.float32).min
  values, others = jax.lax.top_k(jnp.where(itself, lowest, jnp.maximum(ref_logits.astype(jnp.float32), lowest)), number)
  return jnp.concatenate([actions[..., None], others.astype(actions.dtype)], -1), jax.nn.softmax(values)
