"""Records that travel between the parts; a shape stands on every field.

Letters: B episodes, Q prompt tokens, T response tokens, V vocabulary.
"""

from typing import Any

import chex
from flax import struct


@struct.dataclass
class Problem:
  """One addition problem.

  Attributes:
    digits: int32 `[2, M]` digits of both operands, least significant first, zero past the operand's length.
    lengths: int32 `[2]` number of digits of each operand, 1..M.
  """

  digits: chex.Array
  lengths: chex.Array


@struct.dataclass
class Tokens:
  """A text as tokens in an array of fixed length.

  Attributes:
    tokens: int32 `[T]` token ids; the padding id where `mask` is false.
    mask: bool `[T]` true at the tokens of the text.
  """

  tokens: chex.Array
  mask: chex.Array


@struct.dataclass
class Solution:
  """A right response.

  Attributes:
    tokens: int32 `[T]` token ids, padded at the end.
    mask: bool `[T]` true at the tokens of the text.
    critical: bool `[T]` true at the critical tokens, a subset of `mask`.
  """

  tokens: chex.Array
  mask: chex.Array
  critical: chex.Array


@struct.dataclass
class Rollout:
  """Sampled responses and what was known when they were sampled.

  Attributes:
    prompt: int32 `[B, Q]` prompt tokens, padded on the left.
    prompt_mask: bool `[B, Q]` true at the tokens of the prompt.
    actions: int32 `[B, T]` sampled tokens; the padding id after the end of the episode.
    mask: bool `[B, T]` true up to and including the last sampled token.
    log_probs: float32 `[B, T]` natural log-probability of each action under the policy at the sampling temperature;
      0 after the end.
    values: float32 `[B, T]` value estimate of the state in which each action was taken; 0 after the end.
    num_calls: int32 `[B]` calls of the policy, after the prompt, until the episode ended: its greatest entry is the
      number of sequential steps of the rollout. None where nothing was sampled.
    truncated: bool `[B]` whether the episode was cut at T tokens before it ended. None where nothing was sampled.
  """

  prompt: chex.Array
  prompt_mask: chex.Array
  actions: chex.Array
  mask: chex.Array
  log_probs: chex.Array
  values: chex.Array
  num_calls: chex.Array | None = None
  truncated: chex.Array | None = None


@struct.dataclass
class Batch:
  """What the loss needs beside the model's outputs.

  Attributes:
    actions: int32 `[B, T]` sampled tokens.
    mask: bool `[B, T]` true at the tokens that count.
    log_probs: float32 `[B, T]` log-probability of each action under the behaviour policy.
    values: float32 `[B, T]` value estimates at the time of the rollout.
    advantages: float32 `[B, T]` advantage of each action.
    returns: float32 `[B, T]` regression targets of the critic.
    gate: float32 `[B, T]` by what the KL penalty of each token is multiplied, beside its weight; None for 1.
    critical: bool `[B, T]` the critical tokens, where they are known; the loss only reports on them. None if not.
  """

  actions: chex.Array
  mask: chex.Array
  log_probs: chex.Array
  values: chex.Array
  advantages: chex.Array
  returns: chex.Array
  gate: chex.Array | None = None
  critical: chex.Array | None = None


@struct.dataclass
class TrainState:
  """All that changes while training, and the reference it is held near.

  Attributes:
    params: the policy's parameters, float32.
    opt_state: the optimizer's state.
    step: int32 `[]` number of finished iterations.
    ref_params: the reference's parameters; None in pre-training.
    ensemble: parameters of further references, whose mean distribution with the reference's says how certain it is.
  """

  params: Any
  opt_state: Any
  step: chex.Array
  ref_params: Any = None
  ensemble: tuple[Any, ...] = ()
