"""Teacher-forced passes over rollouts, and statistics of policy and reference at each token.

Only `make_scorer` decides whether the logits or the hidden states of whole episodes are held in memory.

Letters: B episodes, Q prompt tokens, T response tokens, V vocabulary, D model width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel, OutputHead, as_language_model, logits_of
from critkl_jax.ops.weighted_kl import TokenStatistics, linear_weighted_kl, pick_implementation, weighted_kl
from critkl_jax.records import Batch, Rollout, Solution, Tokens
from critkl_jax.rl.aggregation import episode_terms
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.rl.losses import Coefficients, linear_ppo_loss, op_options, ppo_loss


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Reads rollouts with a model and compares policy and reference at each token.

  The predictions of a pass are logits, float32 `[B, T, V]`, or hidden states `[B, T, D]`.

  Attributes:
    holds_logits: whether predictions are logits.
    read: (params, rollout) -> `(predictions, values [B, T])` at each action.
    head: params -> the `OutputHead` that turns hidden states into logits; None if predictions are logits.
    statistics: (predictions, head, ref_predictions, ref_head, actions, mask, LossConfig, Coefficients) ->
      `TokenStatistics`, float32 `[B, T]` each.
    loss: (predictions, head, values, ref_predictions, ref_head, batch, LossConfig, Coefficients) -> `(loss, metrics)`
      of `ppo_loss`.
  """

  holds_logits: bool
  read: Callable[[Any, Rollout], tuple[chex.Array, chex.Array]]
  head: Callable[[Any], OutputHead | None]
  statistics: Callable[..., TokenStatistics]
  loss: Callable[..., tuple[chex.Array, dict[str, chex.Array]]]


def make_scorer(model: LanguageModel) -> Scorer:
  """Makes the scorer of a model, which holds logits if the vocabulary is small, else hidden states."""
  few = pick_implementation(model.vocab_size, from_logits=False) == 'fused'
  return logits_scorer(model) if few else hidden_scorer(model)


def logits_scorer(model: LanguageModel) -> Scorer:
  """Makes a scorer that holds logits."""

  def statistics(logits, head, ref_logits, ref_head, actions, mask, config, coefficients):
    del head, ref_head
    return weighted_kl(logits, ref_logits, actions, mask=mask, **op_options(config, coefficients))

  def loss(logits, head, values, ref_logits, ref_head, batch, config, coefficients):
    del head, ref_head
    return ppo_loss(logits, values, ref_logits, batch, config, coefficients)

  return Scorer(holds_logits=True, read=lambda params, rollout: score(model, params, rollout), head=lambda params: None,
                statistics=statistics, loss=loss)


def hidden_scorer(model: LanguageModel) -> Scorer:
  """Makes a scorer that holds hidden states; each device of a mesh handles its own episodes."""

  def statistics(hidden, head, ref_hidden, ref_head, actions, mask, config: LossConfig, coefficients: Coefficients):
    def of_own(own, shared):
      (hidden, ref_hidden, actions, mask), (head, ref_head, coefficients) = own, shared
      return linear_weighted_kl(hidden, head.embedding, ref_hidden, ref_head.embedding, actions, mask=mask,
                                **_head_options(head, ref_head), **op_options(config, coefficients))

    return sharding.own_tokens(of_own, (hidden, ref_hidden, actions, mask), (head, ref_head, coefficients))

  def loss(hidden, head, values, ref_hidden, ref_head, batch: Batch, config: LossConfig, coefficients: Coefficients):
    def of_own(own, shared):
      (hidden, values, ref_hidden, batch), (head, ref_head, coefficients) = own, shared
      return linear_ppo_loss(hidden, head.embedding, values, ref_hidden, ref_head.embedding, batch, config,
                             coefficients, **_head_options(head, ref_head))

    return sharding.own_tokens_mean(of_own, (hidden, values, ref_hidden, batch), (head, ref_head, coefficients),
                                    episode_terms(batch.mask, config.aggregation))

  def head(params):
    return jax.tree.map(lambda x: x.astype(model.dtype), model.output_head(params))

  return Scorer(holds_logits=False, read=lambda params, rollout: read_hidden(model, params, rollout), head=head,
                statistics=statistics, loss=loss)


def _head_options(head, ref_head):
  return {'bias': head.bias, 'ref_bias': ref_head.bias, 'soft_cap': head.soft_cap}


def score(model: LanguageModel, params: Any, rollout: Rollout) -> tuple[chex.Array, chex.Array]:
  """Returns the logits and values of a model at each action of a rollout, from one teacher-forced pass.

  Args:
    model: the model.
    params: its parameters.
    rollout: prompts `[B, Q]` and actions `[B, T]`.

  Returns:
    `(logits, values)`, float32 `[B, T, V]` and `[B, T]`: `logits[b, t]` gives the distribution of `actions[b, t]`,
    before any temperature, and `values[b, t]` is the value of the state before this action.
  """
  model = as_language_model(model)
  output, first = _pass(model, params, rollout)
  return logits_of(output.hidden, model.output_head(params))[:, first:], output.values[:, first:]


def read_hidden(model: LanguageModel, params: Any, rollout: Rollout) -> tuple[chex.Array, chex.Array]:
  """Like `score`, but returns hidden states `[B, T, D]` in the dtype of the activations instead of logits."""
  output, first = _pass(model, params, rollout)
  return output.hidden[:, first:], output.values[:, first:]


def _pass(model, params, rollout):
  """Reads prompts and responses; returns the output, and the position of the first action's distribution."""
  tokens = jnp.concatenate([rollout.prompt, rollout.actions[:, :-1]], 1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask[:, :-1]], 1)
  return model.apply(params, tokens, mask), rollout.prompt.shape[1] - 1


def value_at_end(model: LanguageModel, params: Any, rollout: Rollout) -> chex.Array:
  """Returns the value of the state after the last position, float32 `[B]`.

  The value is meaningful only for responses that fill all T positions.
  """
  tokens = jnp.concatenate([rollout.prompt, rollout.actions], 1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], 1)
  return model.apply(params, tokens, mask).values[:, -1]


def as_rollout(prompt: Tokens, solution: Solution) -> Rollout:
  """Wraps prompts `[B, Q]` and their solutions `[B, T]` as a `Rollout`; log-probabilities and values are 0."""
  blank = jnp.zeros(solution.mask.shape, jnp.float32)
  return Rollout(prompt=prompt.tokens, prompt_mask=prompt.mask, actions=solution.tokens, mask=solution.mask,
                 log_probs=blank, values=blank)
