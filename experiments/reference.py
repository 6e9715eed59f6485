"""Reads, keeps and tests the reference at the start of a run, for all binaries that fine-tune."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from critkl_jax import checkpoint, hosts, storage
from critkl_jax.config import FinetuneConfig
from critkl_jax.gpt2 import GPT2
from critkl_jax.storage import WorkdirError
from critkl_jax.tasks import addition
from critkl_jax.tasks.task import Task

from .exits import refuse

MARK = 'kept_by.json'  # in a copy of the reference: names the workdir whose run made it and may replace it


def find_reference(config: FinetuneConfig, workdir: storage.Path) -> checkpoint.Checkpoint:
  """Finds the reference that `load_reference` would read, without its parameters; starts no device."""
  return checkpoint.find_checkpoint(
      workdir / 'reference' if has_started(workdir) else config.reference or checkpoint.SHIPPED_REFERENCE)


def load_reference(config: FinetuneConfig, workdir: storage.Path, mesh: Mesh | None = None) -> checkpoint.Checkpoint:
  """Reads the reference: the workdir's copy if its run has saved a checkpoint, else the config's. Writes nothing.

  Raises:
    CheckpointError: if the reference is missing or cannot be read.
    WorkdirError: if the workdir holds another `reference/` that no run of this workdir made.
  """
  kept = workdir / 'reference'
  if hosts.as_first_says(has_started(workdir)):
    return checkpoint.load_checkpoint(kept, mesh=mesh)
  reference = checkpoint.load_checkpoint(config.reference or checkpoint.SHIPPED_REFERENCE, mesh=mesh)

  def check():
    if not (_holds(kept, reference) or _is_own(kept)):
      raise WorkdirError(f'{kept} is there, and this run did not make it: it is kept. Give another --workdir, or '
                         f'--reference={kept} if that is the one to start from.')

  hosts.first_does(check, WorkdirError, OSError)
  return reference


def keep_reference(workdir: storage.Path, reference: checkpoint.Checkpoint) -> None:
  """Copies the reference into the workdir, for resuming and for analysis, unless the copy exists.

  The copy of an earlier run that saved no checkpoint is replaced once the new copy is whole.
  """
  kept, unfinished, former = (workdir / name for name in ('reference', 'reference.unfinished', 'reference.replaced'))
  if hosts.as_first_says(has_started(workdir) or _holds(kept, reference)):
    return

  def begin():
    for path in (unfinished, former):  # the latter is removed by `replace_directory`
      if not _is_own(path):
        raise WorkdirError(f'{path} is there, and no run left it; move it away.')
    for path in list(unfinished.iterdir()) if unfinished.exists() else ():
      if path.name != MARK:  # it stays: a process killed here would leave a copy that nobody may replace
        storage.remove(path)
    unfinished.mkdir(parents=True, exist_ok=True)
    storage.write_json(unfinished / MARK, {'workdir': str(storage.resolve(workdir)), 'copy_of': str(reference.path)})

  hosts.first_does(begin, WorkdirError, OSError)
  checkpoint.save_params(unfinished, reference.params, reference.info, reference.step)
  hosts.first_does(lambda: storage.replace_directory(unfinished, kept), OSError)


def has_started(workdir: storage.Path) -> bool:
  """Returns whether the run of a workdir, or one of its members, has saved a checkpoint."""
  return any(checkpoint.latest(path) is not None
             for path in (workdir / 'checkpoints', *workdir.glob('members/*/checkpoints')))


def _holds(kept, reference):
  """Returns whether the newest step of a directory is the reference."""
  path = checkpoint.latest(kept)
  try:
    return path is not None and checkpoint.same_params(path, reference.path)
  except checkpoint.CheckpointError:  # a damaged copy is not the reference
    return False


def _is_own(directory):
  """Returns whether a directory may be replaced.

  It may if it is missing or empty, or if it has the mark of this workdir and otherwise only a checkpoint.
  """
  if not directory.exists():
    return True
  names = [path.name for path in directory.iterdir()] if directory.is_dir() else ['a file']
  if MARK not in names:
    return names in ([], [f'{MARK}.unfinished'])  # the latter of a full disk, or of a process killed at its first file
  mark = storage.read_json(directory / MARK, advice=f'move {directory} away')
  return mark.get('workdir') == str(storage.resolve(directory.parent)) and all(
      name == MARK or name[0].isdigit() for name in names)  # unfinished steps of Orbax among them


def check_ensemble(config: FinetuneConfig, reference: checkpoint.Checkpoint) -> None:
  """Exits with one line if a reference of the ensemble has another model than the reference."""
  for path in config.ensemble_paths:
    own = checkpoint.find_checkpoint(path).info.model
    for name in ('vocab_size', 'num_layers', 'num_heads', 'width', 'context_length'):
      if getattr(own, name) != getattr(reference.info.model, name):
        refuse(f'--certainty_ensemble: {path} has {name}={getattr(own, name)}, and the reference '
               f'{getattr(reference.info.model, name)}.')


def load_ensemble(config: FinetuneConfig, mesh: Mesh | None = None) -> tuple[Any, ...]:
  """Reads the parameters of the further references of an ensemble."""
  return tuple(checkpoint.load_checkpoint(path, mesh=mesh).params for path in config.ensemble_paths)


def model_and_task(config: FinetuneConfig, reference: checkpoint.Checkpoint) -> tuple[GPT2, Task]:
  """Returns the policy's model and its task, or exits with one line if the reference does not fit them.

  Reads no parameters of the reference.
  """
  try:
    model = GPT2(config.model_of(reference.info.model))
    addition.check_vocabulary(model.config.vocab_size)
  except ValueError as error:
    refuse(f'--{error}')
  known = reference.info.known_digits
  task = addition.plus_task(known, config.extra_digits)
  needed = task.prompt_length + task.response_length
  if needed > model.config.context_length:
    refuse(f'--extra_digits: {known} + {config.extra_digits} digits need a context of {needed}, and the reference has '
           f'{model.config.context_length}; take fewer.')
  return model, task


def tested_before(test: Callable, ref_params: Any, config: FinetuneConfig, workdir: storage.Path) -> dict[str, Any]:
  """Tests the reference, or reads the result of the same test from the workdir of a resumed run."""
  file = workdir / 'before.json'
  made_with = {'reference': sum(checkpoint.checksums(ref_params).values()) % 2**32,
               'eval_problems': config.eval_problems, 'extra_digits': config.extra_digits}
  kept = _kept_test(file, made_with, has_started(workdir)) if hosts.is_first() else None
  if hosts.as_first_says(kept is not None):
    return kept or {}  # the first host alone reports
  result, _ = test(ref_params)
  storage.write_json(file, {'made_with': made_with} | result, indent=None)
  return result


def _kept_test(file, made_with, started):
  """Returns the test that a workdir holds; None if it is of another reference or setting, or, with a note, unreadable.
  """
  if not file.exists():
    return None
  try:
    found = storage.read_json(file, advice='the reference is tested again')
  except WorkdirError as error:
    hosts.say(str(error))
    return None
  same = found.pop('made_with', made_with if started else None) == made_with  # older versions did not write `made_with`
  whole = all(isinstance(found.get(name), float | int) for name in ('N', f'N+{made_with["extra_digits"]}'))
  return found if same and (whole or not made_with['eval_problems']) else None
