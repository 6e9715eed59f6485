"""Certainty-weighted KL penalties for reinforcement learning of language models, in JAX."""

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
