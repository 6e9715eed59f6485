"""The static part of an iteration of fine-tuning."""

import dataclasses
from typing import Any

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel, as_language_model
from critkl_jax.records import Rollout, TrainState
from critkl_jax.rl.gates import READ_CRITICAL
from critkl_jax.sampling.scoring import Scorer, make_scorer
from critkl_jax.tasks.task import Task, check_vocabulary, knows_critical_tokens
from critkl_jax.training import slices
from critkl_jax.training.config import FinetuneConfig

# With rewards on the host responses have any length: passes are also compiled at these parts of the longest solution's,
# or of the longest response's where no solution is known.
_PARTS = (4, 2)


@dataclasses.dataclass(frozen=True)
class Setup:
  """The static part of an iteration: model, task, config and scorer.

  Attributes:
    model: the model of policy and reference.
    task: gives problems and rewards.
    config: gives structure and estimators; numbers come from `Hyperparameters`.
    scorer: reads rollouts and compares policy and reference.
    lengths: ascending lengths below T for which passes over a rollout are compiled, besides T.
  """

  model: LanguageModel
  task: Task
  config: FinetuneConfig
  scorer: Scorer
  lengths: tuple[int, ...] = ()

  @classmethod
  def of(cls, model: LanguageModel, task: Task, config: FinetuneConfig) -> 'Setup':
    """Makes the setup of a model, a task and a config.

    Raises:
      ValueError: as `make_train_step`.
    """
    model, gate = as_language_model(model), config.kl_gate
    check_vocabulary(task, model.vocab_size)
    if gate in READ_CRITICAL and not knows_critical_tokens(task):
      raise ValueError(f'kl_gate: {gate!r} needs critical tokens, which this task does not know; take another gate.')
    usual = task.solution_length or task.response_length
    parts = [usual // n for n in _PARTS] if task.host else []
    shorter = tuple(n for n in (*parts, usual) if 0 < n < task.response_length)
    return cls(model, task, config, make_scorer(model), shorter)


def episodes_at_a_time(setup: Setup, rollout: Rollout) -> int:
  """Returns the size of a microbatch in passes without gradient: at most a minibatch."""
  return slices.pick_size(setup.config.episodes // setup.config.minibatches,
                          rollout.prompt.shape[1] + rollout.actions.shape[1])


def ref_head(setup: Setup, state: TrainState) -> Any:
  """Returns the reference's output head, gathered on all devices."""
  return sharding.gathered(setup.scorer.head(state.ref_params))
