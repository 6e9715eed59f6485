"""Loads, copies and tests the reference at the start of a fine-tuning run."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from critkl_jax.models.architectures import make_model
from critkl_jax.models.huggingface import PretrainedError
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.runtime import checkpoint, hosts, imports, storage
from critkl_jax.runtime.checksums import array_checksums
from critkl_jax.runtime.storage import WorkdirError
from critkl_jax.sampling.scoring import make_scorer
from critkl_jax.tasks import known_tasks
from critkl_jax.tasks.known_tasks import known_task_of, to_json_object
from critkl_jax.tasks.questions import TextFinetuning
from critkl_jax.tasks.rewards import RewardError, worker
from critkl_jax.tasks.stories import StoriesFinetuning, by_facts
from critkl_jax.tasks.task import Task, check_vocabulary
from critkl_jax.tasks.text_tokenizer import TokenizerError
from critkl_jax.training.config import FinetuneConfig

from .exits import refuse

# Fields of a model's config that an ensemble need not share: the critic, and how the same numbers are computed.
NOT_OF_THE_TRUNK = ('value_head', 'value_head_detached', 'dtype', 'attention', 'remat', 'scan_layers')
MARK = 'kept_by.json'  # file in a copy of the reference: names the workdir whose run made the copy and may replace it


def locate_reference(config: FinetuneConfig, workdir: storage.Path) -> checkpoint.Checkpoint:
  """Finds the reference that `load_reference` would read; reads no parameters and starts no device."""
  if config.text.model and not has_started(workdir):
    return imported(config.text)
  return checkpoint.find_checkpoint(
      workdir / 'reference' if has_started(workdir) else checkpoint.reference_of(config))


def imported(config: TextFinetuning) -> checkpoint.Checkpoint:
  """Describes the model directory of `--model` as a checkpoint, or exits with one line."""
  with refuse_text():
    return imports.find_imported(config)


def load_reference(config: FinetuneConfig, workdir: storage.Path, mesh: Mesh | None = None) -> checkpoint.Checkpoint:
  """Loads the reference: the workdir's copy if its run has saved a checkpoint, else the config's; writes nothing.

  Raises:
    CheckpointError: if the reference is missing or cannot be read.
    WorkdirError: if the workdir has another `reference/`, which was not made by a run of this workdir.
  """
  kept = workdir / 'reference'
  if hosts.broadcast_from_first(has_started(workdir)):
    return checkpoint.load_checkpoint(kept, mesh=mesh)
  reference = load_imported(config.text, mesh) if config.text.model else checkpoint.load_checkpoint(
      checkpoint.reference_of(config), mesh=mesh)

  def check():
    if not (_holds(kept, reference) or _is_own(kept)):
      raise WorkdirError(f'{kept} exists, and this run did not make it: it is kept. Give another --workdir, or '
                         f'--reference={kept} if that is the one to start from.')

  hosts.first_does(check, WorkdirError, OSError)
  return reference


def load_imported(config: TextFinetuning, mesh: Mesh | None = None) -> checkpoint.Checkpoint:
  """Loads the model directory of `--model`, or exits with one line."""
  with refuse_text():
    return imports.load_imported(config, mesh)


def keep_reference(workdir: storage.Path, reference: checkpoint.Checkpoint) -> None:
  """Copies the reference into the workdir, for resuming and for analysis, unless the copy exists.

  The copy of an earlier run that saved no checkpoint is replaced once the new copy is complete.
  """
  kept, unfinished, former = (workdir / name for name in ('reference', 'reference.unfinished', 'reference.replaced'))
  if hosts.broadcast_from_first(has_started(workdir) or _holds(kept, reference)):
    return

  def begin():
    for path in (unfinished, former):  # `replace_directory` removes the second one
      if not _is_own(path):
        raise WorkdirError(f'{path} exists, and no run wrote it; move it away.')
    for path in list(unfinished.iterdir()) if unfinished.exists() else ():
      if path.name != MARK:  # kept: if the process is killed here, a later run may still replace the copy
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
  """Returns whether the newest step of a directory has the parameters of the reference."""
  path = checkpoint.latest(kept)
  try:
    return path is not None and checkpoint.same_params(path, reference.path)
  except checkpoint.CheckpointError:  # a damaged copy is not the reference
    return False


def _is_own(directory):
  """Returns whether a run of this workdir may replace a directory.

  True if it is missing or empty, or holds only the mark of this workdir and a checkpoint.
  """
  if not directory.exists():
    return True
  names = [path.name for path in directory.iterdir()] if directory.is_dir() else ['a file']
  if MARK not in names:
    return names in ([], [f'{MARK}.unfinished'])  # the second after a full disk, or a kill while the mark was written
  mark = storage.read_json(directory / MARK, advice=f'move {directory} away')
  return mark.get('workdir') == str(storage.resolve(directory.parent)) and all(
      name == MARK or name[0].isdigit() for name in names)  # digits also begin the names of Orbax's unfinished steps


def check_ensemble(config: FinetuneConfig, reference: checkpoint.Checkpoint) -> None:
  """Exits with one line if a model of the ensemble has another kind, size or task than the reference."""
  for path in config.ensemble_paths:
    own = checkpoint.find_checkpoint(path).info
    pairs = {'architecture': (own.architecture, reference.info.architecture),
             **known_tasks.differing_settings(own.task, reference.info.task)}
    if own.architecture == reference.info.architecture:
      pairs |= {field.name: tuple(getattr(info.model, field.name) for info in (own, reference.info))
                for field in dataclasses.fields(own.model) if field.name not in NOT_OF_THE_TRUNK}
    for name, (one, two) in pairs.items():
      if one != two and name != 'known_digits':
        refuse(f'--certainty_ensemble: {path} has {name}={one}, and the reference {two}.')


def load_ensemble(config: FinetuneConfig, mesh: Mesh | None = None) -> tuple[Any, ...]:
  """Loads the parameters of an ensemble's further references."""
  return tuple(checkpoint.load_checkpoint(path, mesh=mesh).params for path in config.ensemble_paths)


@contextlib.contextmanager
def refuse_text() -> Iterator[None]:
  """Exits with one line where a model directory, its tokenizer or a file of prompts cannot be used."""
  try:
    yield
  except (TokenizerError, PretrainedError) as error:
    refuse(f'--model: {error}')
  except RuntimeError as error:  # the home of an unknown user
    refuse(f'--model, --prompts: {error}')
  except ValueError as error:
    refuse(f'--{error}')


def check_facts(found: checkpoint.Checkpoint, facts: list[int] | None) -> list[int]:
  """Returns the numbers of facts to test a checkpoint on, or exits with one line if they do not fit its context."""
  settings, context = found.info.task, found.info.model.context_length
  extra = settings.extra_facts or StoriesFinetuning.extra_facts
  numbers = facts or [settings.known_facts, settings.known_facts + extra]
  task, _ = by_facts(settings, numbers)
  check_rewards(task)
  if task.prompt_length + task.response_length > context:
    refuse(f'--facts: stories of {max(numbers)} take {task.prompt_length + task.response_length} tokens, and '
           f'{found.path} has a context of {context}.')
  return numbers


def check_rewards(task: Task) -> None:
  """Exits with one line if a reward function cannot be loaded."""
  for name in task.host.functions if task.host else ():
    try:
      needed = worker.missing(worker.load(name), task.host.columns)
    except RewardError as error:
      refuse(f'--{error}')
    if needed:
      refuse(f'--reward: {name!r} needs {" and ".join(map(repr, needed))}, and the columns of the prompts are '
             f'{", ".join(map(repr, task.host.columns)) or "none"}.')


def check_length(task: Task, model: Any) -> None:
  """Exits with one line if prompts and responses of the task `questions` do not fit into the model's context."""
  needed = task.prompt_length + task.response_length
  if needed > model.context_length:
    refuse(f'--response_length: prompts of {task.prompt_length} tokens and responses of {task.response_length} need a '
           f'context of {needed}, and the model has {model.context_length}.')


def task_settings(config: FinetuneConfig, reference: checkpoint.Checkpoint) -> Any:
  """Returns the settings of the task that a run trains on, or exits with one line if its reference has another one."""
  own = reference.info.task
  if own.name != config.task:
    other = {'questions': '--model=DIR, a Hugging Face model directory', 'stories': '--reference=DIR, which pretrain '
             '--preset=stories makes'}.get(config.task, 'another --reference')
    refuse(f'--task: {config.task!r} needs a reference for it, and the task of {reference.path} is {own.name!r}; give '
           f'{other}.')
  with refuse_text():
    return known_task_of(own).finetuned(own, config)


def model_and_task(config: FinetuneConfig, reference: checkpoint.Checkpoint) -> tuple[LanguageModel, Task]:
  """Returns the policy's model and its task, or exits with one line if the reference does not support them.

  Reads no parameters.
  """
  settings = task_settings(config, reference)
  with refuse_text():
    task = known_task_of(settings).make(settings)
    model = make_model(config.model_of(reference.info.model))
    check_vocabulary(task, model.vocab_size)
  if config.ensemble_paths and not make_scorer(model).holds_logits:
    refuse(f'--certainty_ensemble: needs the logits of whole episodes, which are not held at a vocabulary of '
           f'{model.vocab_size}.')
  check_rewards(task)
  if config.task == 'questions':
    check_length(task, model)
    return model, task
  needed = task.prompt_length + task.response_length
  if needed > model.context_length:
    flag, sum_of = ('extra_facts', f'{settings.known_facts} + {settings.extra_facts} facts') if (
        config.task == 'stories') else (
            'extra_digits', f'{settings.known_digits} + {settings.extra_digits} digits')
    refuse(f'--{flag}: {sum_of} need a context of {needed}, and the reference has {model.context_length}; take fewer.')
  return model, task


def tested_before(test: Callable, ref_params: Any, config: FinetuneConfig, settings: Any, workdir: storage.Path
                  ) -> dict[str, Any]:
  """Tests the reference, or reads the result of an earlier test from the workdir.

  Args:
    test: from `evaluation.make_test`.
    ref_params: the reference's parameters.
    config: the run's config.
    settings: the settings of its task.
    workdir: the run's workdir.
  """
  file = workdir / 'before.json'
  made_with = {'reference': sum(array_checksums(ref_params).values()) % 2**32,
               'eval_problems': config.eval_problems, 'task': to_json_object(settings),
               'sets': list(known_task_of(settings).named_sets(settings))}
  kept = _kept_test(file, made_with, has_started(workdir)) if hosts.is_first() else None
  if hosts.broadcast_from_first(kept is not None):
    return kept or {}  # the first host alone reports
  result, _ = test(ref_params)
  storage.write_json(file, {'made_with': made_with} | result)
  return result


def _kept_test(file, made_with, started):
  """Reads the result of the reference's test from a workdir.

  Returns None if it was made with another reference or setting or, after printing a note, if it cannot be read.
  """
  if not file.exists():
    return None
  try:
    found = storage.read_json(file, advice='the reference is tested again')
  except WorkdirError as error:
    hosts.say(str(error))
    return None
  same = found.pop('made_with', made_with if started else None) == made_with  # older versions did not write `made_with`
  whole = all(isinstance(found.get(name), float | int) for name in made_with['sets'])
  return found if same and (whole or not made_with['eval_problems']) else None
