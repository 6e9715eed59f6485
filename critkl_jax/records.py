"""Records shared by tasks, sampling, the loss and training, with the shape of every field.

Letters: B episodes, Q prompt tokens, T response tokens, V vocabulary, D model width.
"""

from typing import Any

import chex

from critkl_jax.pytree import PyTreeNode


class Tokens(PyTreeNode):
  """A text as token ids, padded to a fixed length.

  Attributes:
    tokens: int32 `[length]` token ids; the padding id where `mask` is false.
    mask: bool `[length]` true at the tokens of the text.
  """

  tokens: chex.Array
  mask: chex.Array


class Solution(PyTreeNode):
  """A correct response to a problem.

  Attributes:
    tokens: int32 `[T]` token ids, padded at the end.
    mask: bool `[T]` true at the tokens of the text.
    critical: bool `[T]` true at the critical tokens, a subset of `mask`; None if they are unknown.
  """

  tokens: chex.Array
  mask: chex.Array
  critical: chex.Array | None = None


class Rollout(PyTreeNode):
  """Sampled responses with their prompts, log-probabilities and value estimates.

  Attributes:
    prompt: int32 `[B, Q]` prompt tokens, padded on the left.
    prompt_mask: bool `[B, Q]` true at the tokens of the prompt.
    actions: int32 `[B, T]` sampled tokens; the padding id after the end of the episode.
    mask: bool `[B, T]` true up to and including the last sampled token.
    log_probs: float32 `[B, T]` natural log-probability of each action under the policy at the sampling temperature;
      0 after the end.
    values: float32 `[B, T]` value estimate of the state in which each action was taken; 0 after the end.
    num_calls: int32 `[B]` calls of the policy, after the prompt, until the episode ended; the maximum is the number of
      sequential steps of the rollout. None if nothing was sampled.
    truncated: bool `[B]` whether the episode was cut at T tokens before it ended. None if nothing was sampled.
  """

  prompt: chex.Array
  prompt_mask: chex.Array
  actions: chex.Array
  mask: chex.Array
  log_probs: chex.Array
  values: chex.Array
  num_calls: chex.Array | None = None
  truncated: chex.Array | None = None


class Batch(PyTreeNode, kw_only=True):
  """Inputs of the loss other than the outputs of the models.

  Attributes:
    actions: int32 `[B, T]` sampled tokens, 0..V-1 where `mask` is true, anything elsewhere.
    mask: bool `[B, T]` true at the tokens that count.
    log_probs: float32 `[B, T]` log-probability of each action under the behaviour policy, at `LossConfig.temperature`.
      None if this is the policy itself, as in the first update after a rollout: all importance ratios are then 1.
    advantages: float32 `[B, T]` one for each action, or `[B]` one for each episode, shared by its actions.
    values: float32 `[B, T]` value estimates at the time of the rollout. May be None without a critic, or if
      `LossConfig.value_clip` is 0.
    returns: float32 `[B, T]` regression targets of the critic; None without a critic.
    weight: float32 `[B, T]` weight of each token's KL penalty, in place of the config's weight. No gradient flows into
      it. None: the config's weight.
    importance_weights: float32 `[B, T]` factors of the policy-gradient loss, for a sampler whose probabilities differ
      from the trainer's (`truncated_importance_weights`). No gradient flows into them. None: 1.
    critical: bool `[B, T]` true at the critical tokens; used for metrics only. None if they are unknown.
  """

  actions: chex.Array
  mask: chex.Array
  advantages: chex.Array
  log_probs: chex.Array | None = None
  values: chex.Array | None = None
  returns: chex.Array | None = None
  weight: chex.Array | None = None
  importance_weights: chex.Array | None = None
  critical: chex.Array | None = None


class Experience(PyTreeNode):
  """A rollout with everything an update needs.

  Attributes:
    rollout: B episodes of T tokens.
    reference: outputs of the reference at each action: logits float32 `[B, T, V]`, or hidden states `[B, T, D]`.
    batch: advantages, weights and critic targets, `[B, T]` each.
  """

  rollout: Rollout
  reference: chex.Array
  batch: Batch


class TrainState(PyTreeNode):
  """Training state: policy, optimizer and step, with the parameters of the frozen references.

  Attributes:
    params: the policy's parameters, float32.
    opt_state: the optimizer's state.
    step: int32 `[]` number of finished iterations.
    ref_params: parameters of the reference; None in pre-training.
    ensemble: parameters of further references; the certainty is then measured on the mean distribution of all
      references.
  """

  params: Any
  opt_state: Any
  step: chex.Array
  ref_params: Any = None
  ensemble: tuple[Any, ...] = ()
