"""Certainty-weighted KL penalties for reinforcement learning of language models, in JAX.

The names below are loaded when they are first asked for: whoever needs a loss does not wait for checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from critkl_jax.advantages import gae, group_relative, leave_one_out, whiten
  from critkl_jax.checkpoint import Checkpoint, CheckpointError, load_checkpoint
  from critkl_jax.confidence import certainty, kl_weight
  from critkl_jax.config import FinetuneConfig, GPT2Config, LossConfig, PretrainConfig
  from critkl_jax.critical_tokens import Detection, counterfactual, low_certainty, oracle
  from critkl_jax.gpt2 import GPT2
  from critkl_jax.initial_state import Hyperparameters, init_finetuning
  from critkl_jax.losses import Coefficients, linear_ppo_loss, masked_mean, ppo_loss, ppo_loss_jit, token_kl
  from critkl_jax.ops.weighted_kl import (
      WeightedKL,
      linear_weighted_kl,
      linear_weighted_kl_loss,
      pick_implementation,
      weighted_kl,
  )
  from critkl_jax.records import Batch, Problem, Rollout, Solution, Tokens, TrainState
  from critkl_jax.rollout import generate, gpt2_generate, score
  from critkl_jax.tasks.addition import plus_task
  from critkl_jax.tasks.task import Task, stop_after
  from critkl_jax.tokenizer import CharTokenizer
  from critkl_jax.train_step import make_train_step

__version__ = '0.1.0'

# Public name -> the module that defines it.
_HOMES = {
    'Batch': 'records',
    'CharTokenizer': 'tokenizer',
    'Checkpoint': 'checkpoint',
    'CheckpointError': 'checkpoint',
    'Coefficients': 'losses',
    'Detection': 'critical_tokens',
    'FinetuneConfig': 'config',
    'GPT2': 'gpt2',
    'GPT2Config': 'config',
    'Hyperparameters': 'initial_state',
    'LossConfig': 'config',
    'PretrainConfig': 'config',
    'Problem': 'records',
    'Rollout': 'records',
    'Solution': 'records',
    'Task': 'tasks.task',
    'Tokens': 'records',
    'TrainState': 'records',
    'WeightedKL': 'ops.weighted_kl',
    'certainty': 'confidence',
    'counterfactual': 'critical_tokens',
    'gae': 'advantages',
    'generate': 'rollout',
    'gpt2_generate': 'rollout',
    'group_relative': 'advantages',
    'init_finetuning': 'initial_state',
    'kl_weight': 'confidence',
    'leave_one_out': 'advantages',
    'linear_ppo_loss': 'losses',
    'linear_weighted_kl': 'ops.weighted_kl',
    'linear_weighted_kl_loss': 'ops.weighted_kl',
    'load_checkpoint': 'checkpoint',
    'low_certainty': 'critical_tokens',
    'make_train_step': 'train_step',
    'masked_mean': 'losses',
    'oracle': 'critical_tokens',
    'pick_implementation': 'ops.weighted_kl',
    'plus_task': 'tasks.addition',
    'ppo_loss': 'losses',
    'ppo_loss_jit': 'losses',
    'score': 'rollout',
    'stop_after': 'tasks.task',
    'token_kl': 'losses',
    'weighted_kl': 'ops.weighted_kl',
    'whiten': 'advantages',
}

__all__ = (
    'Batch',
    'CharTokenizer',
    'Checkpoint',
    'CheckpointError',
    'Coefficients',
    'Detection',
    'FinetuneConfig',
    'GPT2',
    'GPT2Config',
    'Hyperparameters',
    'LossConfig',
    'PretrainConfig',
    'Problem',
    'Rollout',
    'Solution',
    'Task',
    'Tokens',
    'TrainState',
    'WeightedKL',
    'certainty',
    'counterfactual',
    'gae',
    'generate',
    'gpt2_generate',
    'group_relative',
    'init_finetuning',
    'kl_weight',
    'leave_one_out',
    'linear_ppo_loss',
    'linear_weighted_kl',
    'linear_weighted_kl_loss',
    'load_checkpoint',
    'low_certainty',
    'make_train_step',
    'masked_mean',
    'oracle',
    'pick_implementation',
    'plus_task',
    'ppo_loss',
    'ppo_loss_jit',
    'score',
    'stop_after',
    'token_kl',
    'weighted_kl',
    'whiten',
)


def __getattr__(name: str) -> Any:
  """Loads a public name from its module, once."""
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
