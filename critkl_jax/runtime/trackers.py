"""Sends metrics to TensorBoard and Weights & Biases, under grouped names such as `kl/critical`."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from critkl_jax.runtime import storage

# Metric of metrics.jsonl -> its name in TensorBoard and W&B, where a slash makes a group.
GROUPED = {
    'accuracy': 'reward/accuracy',
    'reward': 'reward/mean',
    'critical_right': 'reward/critical_right',
    'format_errors': 'reward/format_errors',
    'kl': 'kl/mean',
    'kl_critical': 'kl/critical',
    'kl_penalty': 'kl/penalty',
    'weighted_kl': 'kl/weighted',
    'weight': 'kl/weight',
    'weight_q01': 'kl/weight_q01',
    'weight_q50': 'kl/weight_q50',
    'weight_q99': 'kl/weight_q99',
    'weight_critical': 'kl/weight_critical',
    'loss': 'loss/total',
    'policy_loss': 'loss/policy',
    'value_loss': 'loss/value',
    'entropy': 'policy/entropy',
    'clip_fraction': 'policy/clip_fraction',
    'grad_norm': 'optim/grad_norm',
    'skipped_updates': 'optim/skipped_updates',
    'response_length': 'rollout/response_length',
    'max_response_length': 'rollout/max_response_length',
    'truncated': 'rollout/truncated',
    'num_tokens': 'rollout/num_tokens',
    'seconds': 'time/seconds',
    'tokens_per_second': 'time/tokens_per_second',
}


class Tracker(Protocol):
  """Receives the metrics of each step."""

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Receives the metrics of a step, by their names in metrics.jsonl."""

  def close(self) -> None:
    """Flushes and closes the tracker."""


def grouped(metrics: dict[str, Any]) -> dict[str, Any]:
  """Renames metrics to their names in `GROUPED`; other metrics keep their names."""
  return {GROUPED.get(name, name): value for name, value in metrics.items()}


def open_trackers(workdir: os.PathLike, first_step: int) -> Sequence[Tracker]:
  """Opens TensorBoard if tensorboardX (the extra `tensorboard`) is installed.

  A workdir in a bucket gets none, because its files cannot be appended to.

  Args:
    workdir: directory of the run, for the event files.
    first_step: number of finished steps; purges later events, which an interrupted run left.
  """
  if storage.is_remote(workdir):
    return ()
  try:
    return (TensorBoard(workdir, first_step),)
  except ImportError:
    return ()


def with_wandb(project: str, config: dict[str, Any], open_others: Callable = open_trackers) -> Callable:
  """Returns a function like `open_trackers` that also opens a run of Weights & Biases.

  Args:
    project: project in W&B.
    config: flat values that describe the run.
    open_others: opens the other trackers.

  Raises:
    ImportError: if wandb, the extra `wandb`, is not installed.
  """
  import wandb  # an extra

  return lambda workdir, first_step: (
      *open_others(workdir, first_step), WeightsAndBiases(wandb, project, config, workdir))


class TensorBoard:
  """Writes TensorBoard event files into the workdir."""

  def __init__(self, workdir: os.PathLike, first_step: int):
    import tensorboardX  # an extra

    self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=first_step + 1)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Adds a scalar for each finite metric; tensorboardX would warn about others at every step."""
    for name, value in grouped(metrics).items():
      if math.isfinite(value):
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes the event file."""
    self._events.close()


class WeightsAndBiases:
  """Logs to a run of W&B; a run that resumes in the same workdir continues it."""

  def __init__(self, wandb: Any, project: str, config: dict[str, Any], workdir: os.PathLike):
    home = storage.to_path(workdir)
    home = home if storage.is_remote(home) else home.absolute()
    self._run = wandb.init(
        project=project, name=home.name, id=hashlib.sha256(str(home).encode()).hexdigest()[:16], resume='allow',
        dir=None if storage.is_remote(home) else str(home), config=config, reinit='create_new')

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Logs the metrics of a step."""
    self._run.log(grouped(metrics), step=step)

  def close(self) -> None:
    """Finishes the run."""
    self._run.finish()
