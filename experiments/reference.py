"""The reference at the start of a run: read, kept, tested; for all binaries that fine-tune."""

import json
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from critkl_jax import checkpoint, hosts, storage
from critkl_jax.config import FinetuneConfig
from critkl_jax.gpt2 import GPT2
from critkl_jax.tasks.addition import plus_task
from critkl_jax.tasks.task import Task

from .exits import refuse


def keep_reference(config: FinetuneConfig, workdir: storage.Path, mesh: Mesh | None = None) -> checkpoint.Checkpoint:
  """Reads the reference, and keeps a copy under the workdir, from which the run goes on and is analysed later."""
  kept = workdir / 'reference'
  started = checkpoint.latest(workdir / 'checkpoints') or any(workdir.glob('members/*/checkpoints/*'))
  if hosts.as_first_says(bool(started)):
    return checkpoint.load_checkpoint(kept, mesh=mesh)
  if hosts.is_first():  # what a run left that was stopped before it saved anything
    storage.remove(kept)
    before_file(workdir).unlink(missing_ok=True)
  hosts.wait_for_all('reference')
  reference = checkpoint.load_checkpoint(config.reference or checkpoint.SHIPPED_REFERENCE, mesh=mesh)
  checkpoint.save_params(kept, reference.params, reference.info, reference.step)
  return reference


def load_ensemble(config: FinetuneConfig, reference: checkpoint.Checkpoint, mesh: Mesh | None = None
                  ) -> tuple[Any, ...]:
  """Returns the parameters of a config's further references, or exits with one line if their model is another."""
  loaded = [checkpoint.load_checkpoint(path, mesh=mesh) for path in config.ensemble_paths]
  for path, other in zip(config.ensemble_paths, loaded):
    for name in ('vocab_size', 'num_layers', 'num_heads', 'width', 'context_length'):
      own, wanted = (getattr(one.info.model, name) for one in (other, reference))
      if own != wanted:
        refuse(f'--certainty_ensemble: {path} has {name}={own}, and the reference {wanted}.')
  return tuple(one.params for one in loaded)


def model_and_task(config: FinetuneConfig, reference: checkpoint.Checkpoint) -> tuple[GPT2, Task]:
  """Returns the policy and its problems, or exits with one line if the reference does not allow them."""
  try:
    model = GPT2(config.model_of(reference.info.model))
  except ValueError as error:
    refuse(f'--{error}')
  known = reference.info.known_digits
  task = plus_task(known, config.extra_digits)
  needed = task.prompt_length + task.response_length
  if needed > model.config.context_length:
    refuse(f'--extra_digits: {known} + {config.extra_digits} digits need a context of {needed}, and '
                     f'the reference has {model.config.context_length}; take fewer.')
  return model, task


def tested_before(test: Callable, ref_params: Any, workdir: storage.Path) -> dict[str, Any]:
  """Returns the reference's test; a continued run reads it from the workdir instead of testing again."""
  file = before_file(workdir)
  if hosts.as_first_says(file.is_file()):
    return json.loads(file.read_text())
  result, _ = test(ref_params)
  storage.write_json(file, result, indent=None)
  return result


def before_file(workdir: storage.Path) -> storage.Path:
  """Returns where the reference's test is kept."""
  return workdir / 'before.json'
