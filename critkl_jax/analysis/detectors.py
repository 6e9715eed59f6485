"""Detectors of critical tokens.

A detector is a function `(problems, rollout, ref_logits) -> Detection`. Vassoyan et al. (arXiv 2502.06533), section 4,
call a token critical if the answer depends on it and the pre-trained model is much less certain there than elsewhere.

Letters: B episodes, T response tokens, V vocabulary, A alternatives.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from critkl_jax.models.language_model import LanguageModel, as_language_model
from critkl_jax.records import Rollout
from critkl_jax.rl.certainties import certainty
from critkl_jax.sampling.generation import respond_from
from critkl_jax.sampling.scoring import score
from critkl_jax.tasks.host_side import rewarded
from critkl_jax.tasks.rewards import RewardPool
from critkl_jax.tasks.task import Task, critical_tokens, on_path, successes

THRESHOLD, QUANTILE, SAMPLES = 0.9, 0.02, 8  # defaults of the detectors

Detector = Callable[[Any, Rollout, chex.Array], 'Detection']


@struct.dataclass
class Detection:
  """The result of a detector.

  Attributes:
    score: float32 `[B, T]` greater for more critical tokens; 0 where the token was not examined.
    critical: bool `[B, T]` whether the token is called critical.
    weight: float32 `[B, T]` sampling weight: how many tokens this examined token represents, 0 if it was not examined.
      Means weighted by it estimate means over all tokens.
  """

  score: chex.Array
  critical: chex.Array
  weight: chex.Array


def oracle(task: Task) -> Detector:
  """Makes the detector that takes the critical tokens from the task's right solution.

  Tokens after the first wrong one of a response are not examined.

  Raises:
    ValueError: if the task knows no right solutions.
  """
  if task.solution is None:
    raise ValueError('task: the oracle needs right solutions, and this task has none; take other detectors.')

  def detect(problems, rollout, ref_logits):
    del ref_logits
    here, critical = on_path(task, problems, rollout), critical_tokens(task, problems, rollout)
    if critical is None:
      raise ValueError('task: the oracle needs critical tokens, and the solutions of this task do not mark them.')
    return Detection(score=critical.astype(jnp.float32), critical=critical, weight=here.astype(jnp.float32))

  return detect


def low_certainty(threshold: float | None = None, quantile: float | None = None, kind: str = 'negentropy',
                  temperature: float = 1.0) -> Detector:
  """Makes the detector that calls a token critical where the reference's certainty is low; its score is 1 - certainty.

  Args:
    threshold: tokens whose certainty is below it are critical.
    quantile: share of a response's tokens, the least certain ones, that are critical, rounded to whole tokens. Tokens
      that tie with the first token outside this share are not critical.
    kind: as in `certainties.certainty`.
    temperature: as in `certainties.certainty`.

  Raises:
    ValueError: unless exactly one of threshold and quantile is given, between 0 and 1.
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


def counterfactual(model: LanguageModel, params: Any, task: Task, key: chex.PRNGKey, *, num_alternatives: int = 2,
                   num_samples: int = SAMPLES, num_positions: int | None = None, always: Detector | None = None,
                   threshold: float = 0.5, batch_size: int = 64, temperature: float = 1.0, progress: bool = False,
                   pool: RewardPool | None = None) -> Detector:
  """Makes the detector that replaces a token and measures the change of the success probability.

  For each examined token, continuations are sampled after the token itself and after each of the A other tokens that
  the reference finds most probable there. The score is `|sum_a q_a (p - p_a)|`: p is the success probability with the
  token, p_a with alternative a, q_a the reference's probability of a, normalised over the A. All continuations share
  their noise, which reduces the variance of the differences.

  Args:
    model: the network that samples the continuations.
    params: its parameters.
    task: any task with a reward.
    key: PRNG key; the same key and prompts give the same result at every call.
    num_alternatives: A, less than the vocabulary.
    num_samples: continuations for the token and for each alternative; their success rate estimates its success
      probability. The standard error of a difference is at most `0.7 / sqrt(num_samples)`; common noise lowers it.
    num_positions: tokens examined in each response, drawn without replacement; all if None.
    always: a detector whose critical tokens are always examined.
    threshold: tokens of at least this score are critical.
    batch_size: continuations sampled at a time.
    temperature: sampling temperature.
    progress: whether to show a progress bar.
    pool: calls reward functions in Python; None to call them in this process.

  Raises:
    ValueError: if a number is less than 1, or `num_alternatives` is not below the size of the vocabulary.
  """
  model = as_language_model(model)
  _check_numbers(model.vocab_size, num_alternatives=num_alternatives, num_samples=num_samples, batch_size=batch_size,
                 num_positions=1 if num_positions is None else num_positions)
  import tqdm  # only this detector needs it

  @jax.jit
  def continued(params, problems, rollout, position, token, key):
    new = respond_from(model, params, task, problems, rollout, position, token, key, temperature=temperature)
    return new.actions, new.mask, None if task.host else jax.vmap(task.reward)(problems, new.actions, new.mask)

  def success(params, problems, *arguments):
    actions, mask, rewards = continued(params, problems, *arguments)
    return successes(task, rewarded(task.host, problems, actions, mask, pool)[0] if task.host else rewards)

  def detect(problems, rollout, ref_logits):
    prompts = jnp.sum(rollout.prompt.astype(jnp.uint32) * jnp.arange(1, rollout.prompt.size + 1, dtype=jnp.uint32)
                      .reshape(rollout.prompt.shape), dtype=jnp.uint32)
    choice_key, sample_key = jax.random.split(jax.random.fold_in(key, prompts))  # the noise depends on the prompts
    weight = np.asarray(_places(choice_key, rollout.mask, num_positions,
                                None if always is None else always(problems, rollout, ref_logits).critical))
    tokens, shares = _alternatives(rollout.actions, ref_logits, num_alternatives)
    rows, position = np.nonzero(weight)
    # [num_examined, 1 + A] and [num_examined, A]:
    tokens, shares = np.asarray(tokens)[rows, position], np.asarray(shares)[rows, position]
    samples = np.repeat(np.arange(rows.size), num_samples)  # the examined token of each sample
    rewards = np.zeros((samples.size, 1 + num_alternatives))
    for start in tqdm.trange(0, samples.size, batch_size, desc='counterfactuals', disable=not progress):
      own = samples[(start + np.arange(batch_size)) % samples.size]
      some = jax.tree.map(lambda x, own=own: x[rows[own]], (problems, rollout))
      for i in range(1 + num_alternatives):
        reward = success(params, *some, position[own], tokens[own, i], jax.random.fold_in(sample_key, start))
        rewards[start:start + batch_size, i] = np.asarray(reward)[:samples.size - start]
    chances = rewards.reshape(-1, num_samples, 1 + num_alternatives).mean(1)
    found = np.zeros(weight.shape, np.float32)
    found[rows, position] = np.abs(np.sum(shares * (chances[:, :1] - chances[:, 1:]), 1))
    return Detection(score=jnp.asarray(found), critical=jnp.asarray((found >= threshold) & (weight > 0)),
                     weight=jnp.asarray(weight))

  return detect


def _check_numbers(vocab_size, num_alternatives, **numbers):
  """Raises a ValueError if a number is less than 1, or `num_alternatives` is not below the vocabulary's size."""
  for name, number in {'num_alternatives': num_alternatives, **numbers}.items():
    if number < 1:
      raise ValueError(f'{name}: expected 1 or more, got {number}.')
  if num_alternatives >= vocab_size:
    raise ValueError(f'num_alternatives: expected less than the vocabulary of {vocab_size}, got {num_alternatives}.')


def detect_all(detectors: dict[str, Detector], problems: Any, rollout: Rollout, ref_logits: chex.Array
               ) -> dict[str, Detection]:
  """Runs several detectors and returns their detections by name."""
  return {name: detector(problems, rollout, ref_logits) for name, detector in detectors.items()}


def read_logits(model: LanguageModel, params: Any, rollout: Rollout) -> chex.Array:
  """Returns the reference's logits, float32 `[B, T, V]`, from a teacher-forced pass over the rollout."""
  return score(model, params, rollout)[0]


def _places(key, mask, num_positions, always):
  """Draws the tokens to examine and returns their sampling weights, float32 `[B, T]`.

  Tokens of `always` have weight 1. Each drawn token has as weight the number of the response's other tokens divided by
  the number of drawn ones. If `num_positions` is None, all tokens have weight 1.
  """
  always = jnp.zeros(mask.shape, bool) if always is None else always & mask
  if num_positions is None:
    return mask.astype(jnp.float32)
  rest = mask & ~always
  noise = jnp.where(rest, jax.random.uniform(key, mask.shape, jnp.float32), -1.0)
  order = jnp.argsort(jnp.argsort(-noise, axis=1), axis=1)
  drawn = rest & (order < num_positions)
  num_rest, num_drawn = (jnp.sum(x, 1, keepdims=True, dtype=jnp.float32) for x in (rest, drawn))
  represented = num_rest / jnp.maximum(num_drawn, 1.0)
  return jnp.where(always, 1.0, jnp.where(drawn, represented, 0.0)).astype(jnp.float32)


def _alternatives(actions, ref_logits, number):
  """Returns each token and its A most probable alternatives, `[B, T, 1 + A]`, and the alternatives' normalised
  probabilities, `[B, T, A]`."""
  itself = jax.nn.one_hot(actions, ref_logits.shape[-1], dtype=bool)
  lowest = jnp.finfo(jnp.float32).min
  values, others = jax.lax.top_k(jnp.where(itself, lowest, jnp.maximum(ref_logits.astype(jnp.float32), lowest)), number)
  return jnp.concatenate([actions[..., None], others.astype(actions.dtype)], -1), jax.nn.softmax(values)
