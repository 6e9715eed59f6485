"""Certainty-weighted KL penalties for reinforcement learning of language models, in JAX.

The names below are loaded when they are first asked for: whoever needs a loss does not wait for checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from critkl_jax.analysis.detectors import Detection, counterfactual, low_certainty, oracle
  from critkl_jax.models.gpt2 import GPT2, GPT2Config, gpt2
  from critkl_jax.models.huggingface import load_pretrained, save_pretrained
  from critkl_jax.models.language_model import LanguageModel, ModelOutput, OutputHead, logits_of
  from critkl_jax.models.llama import LlamaConfig, llama
  from critkl_jax.ops.weighted_kl import (
      ReferenceStatistics,
      TokenStatistics,
      linear_reference_statistics,
      linear_weighted_kl,
      linear_weighted_kl_loss,
      pick_implementation,
      reference_statistics,
      weighted_kl,
  )
  from critkl_jax.ops.weighted_kl import TokenStatistics as WeightedKL
  from critkl_jax.records import Batch, Rollout, Solution, Tokens, TrainState
  from critkl_jax.rl.advantages import gae, group_relative, leave_one_out, whiten
  from critkl_jax.rl.aggregation import aggregate, loss_denominator, masked_mean
  from critkl_jax.rl.certainties import certainty, certainty_from_entropy, exponent_for, half_weight_entropy, kl_weight
  from critkl_jax.rl.checks import check_batch
  from critkl_jax.rl.kl import kl_shaped_rewards, token_kl, token_kl_from_log_probs
  from critkl_jax.rl.loss_config import LossConfig
  from critkl_jax.rl.losses import (
      Coefficients,
      action_log_probs,
      linear_ppo_loss,
      ppo_loss,
      ppo_loss_from_log_probs,
      ppo_loss_jit,
  )
  from critkl_jax.rl.policy_gradients import truncated_importance_weights
  from critkl_jax.runtime.checkpoint import Checkpoint, CheckpointError, load_checkpoint
  from critkl_jax.sampling.generation import generate, model_generate
  from critkl_jax.sampling.generation import model_generate as gpt2_generate
  from critkl_jax.sampling.scoring import score
  from critkl_jax.tasks.addition import plus_task
  from critkl_jax.tasks.addition.problem import Problem
  from critkl_jax.tasks.questions import prompted_task
  from critkl_jax.tasks.rewards import RewardError, RewardPool
  from critkl_jax.tasks.task import Task, stop_after
  from critkl_jax.tasks.text_tokenizer import TextTokenizer
  from critkl_jax.tasks.tokenizers import CharTokenizer
  from critkl_jax.training.config import FinetuneConfig, PretrainConfig
  from critkl_jax.training.host_step import make_host_step
  from critkl_jax.training.initial_state import Hyperparameters, init_finetuning
  from critkl_jax.training.train_step import make_train_step

__version__ = '0.1.0'

# Public name -> the module that defines it.
_HOMES = {
    'Batch': 'records',
    'CharTokenizer': 'tasks.tokenizers',
    'Checkpoint': 'runtime.checkpoint',
    'CheckpointError': 'runtime.checkpoint',
    'Coefficients': 'rl.losses',
    'Detection': 'analysis.detectors',
    'FinetuneConfig': 'training.config',
    'GPT2': 'models.gpt2',
    'GPT2Config': 'models.gpt2',
    'Hyperparameters': 'training.initial_state',
    'LanguageModel': 'models.language_model',
    'LlamaConfig': 'models.llama',
    'LossConfig': 'rl.loss_config',
    'ModelOutput': 'models.language_model',
    'OutputHead': 'models.language_model',
    'PretrainConfig': 'training.config',
    'Problem': 'tasks.addition.problem',
    'ReferenceStatistics': 'ops.weighted_kl',
    'RewardError': 'tasks.rewards',
    'RewardPool': 'tasks.rewards',
    'Rollout': 'records',
    'Solution': 'records',
    'Task': 'tasks.task',
    'TextTokenizer': 'tasks.text_tokenizer',
    'TokenStatistics': 'ops.weighted_kl',
    'Tokens': 'records',
    'TrainState': 'records',
    'WeightedKL': 'ops.weighted_kl',
    'action_log_probs': 'rl.losses',
    'aggregate': 'rl.aggregation',
    'certainty': 'rl.certainties',
    'certainty_from_entropy': 'rl.certainties',
    'check_batch': 'rl.checks',
    'counterfactual': 'analysis.detectors',
    'exponent_for': 'rl.certainties',
    'gae': 'rl.advantages',
    'generate': 'sampling.generation',
    'gpt2': 'models.gpt2',
    'gpt2_generate': 'sampling.generation',
    'group_relative': 'rl.advantages',
    'half_weight_entropy': 'rl.certainties',
    'init_finetuning': 'training.initial_state',
    'kl_shaped_rewards': 'rl.kl',
    'kl_weight': 'rl.certainties',
    'leave_one_out': 'rl.advantages',
    'linear_ppo_loss': 'rl.losses',
    'linear_reference_statistics': 'ops.weighted_kl',
    'linear_weighted_kl': 'ops.weighted_kl',
    'linear_weighted_kl_loss': 'ops.weighted_kl',
    'llama': 'models.llama',
    'load_checkpoint': 'runtime.checkpoint',
    'load_pretrained': 'models.huggingface',
    'logits_of': 'models.language_model',
    'loss_denominator': 'rl.aggregation',
    'low_certainty': 'analysis.detectors',
    'make_host_step': 'training.host_step',
    'make_train_step': 'training.train_step',
    'masked_mean': 'rl.aggregation',
    'model_generate': 'sampling.generation',
    'oracle': 'analysis.detectors',
    'pick_implementation': 'ops.weighted_kl',
    'plus_task': 'tasks.addition',
    'ppo_loss': 'rl.losses',
    'ppo_loss_from_log_probs': 'rl.losses',
    'ppo_loss_jit': 'rl.losses',
    'prompted_task': 'tasks.questions',
    'reference_statistics': 'ops.weighted_kl',
    'save_pretrained': 'models.huggingface',
    'score': 'sampling.scoring',
    'stop_after': 'tasks.task',
    'token_kl': 'rl.kl',
    'token_kl_from_log_probs': 'rl.kl',
    'truncated_importance_weights': 'rl.policy_gradients',
    'weighted_kl': 'ops.weighted_kl',
    'whiten': 'rl.advantages',
}
# Public name of older versions -> its name now.
_NOW = {
    'WeightedKL': 'TokenStatistics',
    'gpt2_generate': 'model_generate',
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
    'LanguageModel',
    'LlamaConfig',
    'LossConfig',
    'ModelOutput',
    'OutputHead',
    'PretrainConfig',
    'Problem',
    'ReferenceStatistics',
    'RewardError',
    'RewardPool',
    'Rollout',
    'Solution',
    'Task',
    'TextTokenizer',
    'TokenStatistics',
    'Tokens',
    'TrainState',
    'WeightedKL',
    'action_log_probs',
    'aggregate',
    'certainty',
    'certainty_from_entropy',
    'check_batch',
    'counterfactual',
    'exponent_for',
    'gae',
    'generate',
    'gpt2',
    'gpt2_generate',
    'group_relative',
    'half_weight_entropy',
    'init_finetuning',
    'kl_shaped_rewards',
    'kl_weight',
    'leave_one_out',
    'linear_ppo_loss',
    'linear_reference_statistics',
    'linear_weighted_kl',
    'linear_weighted_kl_loss',
    'llama',
    'load_checkpoint',
    'load_pretrained',
    'logits_of',
    'loss_denominator',
    'low_certainty',
    'make_host_step',
    'make_train_step',
    'masked_mean',
    'model_generate',
    'oracle',
    'pick_implementation',
    'plus_task',
    'ppo_loss',
    'ppo_loss_from_log_probs',
    'ppo_loss_jit',
    'prompted_task',
    'reference_statistics',
    'save_pretrained',
    'score',
    'stop_after',
    'token_kl',
    'token_kl_from_log_probs',
    'truncated_importance_weights',
    'weighted_kl',
    'whiten',
)


def __getattr__(name: str) -> Any:
  """Loads a public name from its module, once."""
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), _NOW.get(name, name))
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
