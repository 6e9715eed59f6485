"""Checkpoints of small models, made without a trainer."""

import jax

from critkl_jax.config import replace
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime import checkpoint
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

SMOKE = PRETRAIN_PRESETS['smoke']


def noisy(params, scale, seed=0):
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noise = [scale * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)]
  return jax.tree.unflatten(structure, [x + own for x, own in zip(leaves, noise)])


def write(directory, params, step, training=SMOKE, model=SMOKE.model, known_digits=1):
  checkpoint.save_params(directory, params, checkpoint.CheckpointInfo(model, Addition(known_digits), training), step)


def finetuned_workdir(workdir, steps=(2, 4), **loss):
  """A workdir as a run of fine-tuning leaves it: its reference, and policies that move away from it."""
  reference = noisy(gpt2(SMOKE.model).init(jax.random.key(0)), 0.3)
  write(workdir / 'reference', reference, 7)
  for step in steps:
    write(workdir / 'checkpoints', noisy(reference, 0.02 * step, step), step,
          training=replace(FINETUNE_PRESETS['smoke'], **loss))
  return reference
