"""The built-in tasks, which a checkpoint restores by name and settings, and `OwnTask`, which names any other task."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex

from critkl_jax.config import from_dict
from critkl_jax.records import Solution
from critkl_jax.tasks import addition, questions, stories
from critkl_jax.tasks.addition import wording as addition_wording
from critkl_jax.tasks.questions import wording as questions_wording
from critkl_jax.tasks.stories import wording as stories_wording
from critkl_jax.tasks.task import NamedSet, Task


class KnownTask(NamedTuple):
  """A built-in task.

  Attributes:
    settings: frozen dataclass of the task's settings; its class attribute `name` is the task's name.
    make: settings -> the `Task` for training.
    tests: (settings, a choice of problem sets, or None for the default) -> the `Task` for tests, and a function
      `(key, B) -> {name: problems [B]}` that draws the problem sets.
    shared: settings that must be equal for a policy and its reference.
    finetuned: (settings of a reference, a `FinetuneConfig`) -> settings for fine-tuning it.
    before_and_after: (key, settings, B) -> {name: problems}, the test sets of a fine-tuning run, at most B problems
      each; the last set is like the problems that are trained on.
    named_sets: settings -> {name: description of the set of `before_and_after`}.
    about: settings -> what the reference knows and what is trained, in two sentences.
    title: settings -> the problems that are trained on, in a few words.
    unit: what the size of a problem counts, in a word; empty if problems have no size.
    sizes: settings -> (N, k): the greatest size known from pre-training, and by how much training exceeds it.
    critical_kinds: the right `Solution` `[T]` of a problem -> {kind of critical token: bool `[T]`}.
    pretrained: a `PretrainConfig` -> settings for pre-training; None if models are not pre-trained on the task.
    curriculum: settings -> the tasks of pre-training, and a function `(seed, step) -> index` of the task of a step.
  """

  settings: type
  make: Callable[[Any], Task]
  tests: Callable[[Any, Any], tuple[Task, Callable[..., dict[str, Any]]]]
  shared: tuple[str, ...]
  finetuned: Callable[[Any, Any], Any]
  before_and_after: Callable[[Any, Any, int], dict[str, Any]]
  named_sets: Callable[[Any], dict[str, NamedSet]]
  about: Callable[[Any], str]
  title: Callable[[Any], str]
  unit: str = ''
  sizes: Callable[[Any], tuple[int, int]] | None = None
  critical_kinds: Callable[[Solution], dict[str, chex.Array]] = lambda solution: {}
  pretrained: Callable[[Any], Any] | None = None
  curriculum: Callable[[Any], tuple[list[Task], Callable[[int, int], int]]] | None = None


def _questions_before_and_after(key, settings, number):
  return questions.question_sets(settings)[1](key, number) if number else {}


KNOWN_TASKS = {
    addition.Addition.name: KnownTask(
        settings=addition.Addition, make=addition.plus_task_of, tests=addition.by_digits, shared=('known_digits',),
        finetuned=lambda settings, config: settings.finetuned(config.addition),
        before_and_after=addition.before_and_after, named_sets=addition_wording.named_sets,
        about=addition_wording.about, title=addition_wording.title, unit='digits',
        sizes=lambda settings: (settings.known_digits, settings.extra_digits), critical_kinds=addition.critical_kinds,
        pretrained=lambda config: addition.Addition.of_pretraining(config.addition, config.model.vocab_size),
        curriculum=addition.curriculum),
    questions.Questions.name: KnownTask(
        settings=questions.Questions, make=questions.questions, tests=questions.question_sets,
        shared=('tokenizer', 'tokenizer_checksum', 'vocab_size'),
        finetuned=lambda settings, config: questions.settings_for(
            config.text, settings.tokenizer, settings.vocab_size),
        before_and_after=_questions_before_and_after, named_sets=questions_wording.named_sets,
        about=questions_wording.about, title=questions_wording.title),
    stories.Stories.name: KnownTask(
        settings=stories.Stories, make=stories.stories_of, tests=stories.by_facts, shared=('known_facts',),
        finetuned=lambda settings, config: settings.finetuned(config.stories),
        before_and_after=stories.before_and_after, named_sets=stories_wording.named_sets,
        about=stories_wording.about, title=stories_wording.title, unit='facts',
        sizes=lambda settings: (settings.known_facts, settings.extra_facts),
        pretrained=lambda config: stories.Stories(config.stories.known_facts, vocab_size=config.model.vocab_size),
        curriculum=stories.curriculum),
}


def known_task_of(settings: Any) -> KnownTask:
  """Returns the built-in task of these settings.

  Raises:
    ValueError: if they belong to no built-in task.
  """
  if settings.name not in KNOWN_TASKS:
    raise ValueError(f'task: expected one of {tuple(KNOWN_TASKS)}, got {settings.name!r}.')
  return KNOWN_TASKS[settings.name]


@dataclasses.dataclass(frozen=True)
class OwnTask:
  """Identifies a task that is not built in, in its checkpoints; to analyse them, pass the `Task` itself.

  Attributes:
    name: the task's name.
    settings: anything worth saving with it, as JSON values.

  Raises:
    ValueError: if the name is empty or a built-in task's, or a setting is called `name`.
  """

  name: str
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not self.name or self.name in KNOWN_TASKS:
      raise ValueError(f'name: expected a name other than those of the built-in tasks, {tuple(KNOWN_TASKS)}; got '
                       f'{self.name!r}.')
    if 'name' in self.settings:
      raise ValueError("settings: 'name' is the task's name; call the setting otherwise.")


def to_json_object(settings: Any) -> dict[str, Any]:
  """Converts the settings of a built-in task, or an `OwnTask`, to `{name, ...settings}`."""
  own = dict(settings.settings) if isinstance(settings, OwnTask) else dataclasses.asdict(settings)
  return {'name': settings.name, **own}


def from_json_object(values: Mapping[str, Any]) -> Any:
  """Inverts `to_json_object`: restores the settings of a built-in task, or an `OwnTask` of any other name.

  Raises:
    KeyError: if `name` is missing.
    ValueError: if the name is empty, or a setting of a built-in task is unknown, missing or not allowed.
  """
  own = {name: value for name, value in values.items() if name != 'name'}
  known = KNOWN_TASKS.get(values['name'])
  return OwnTask(values['name'], own) if known is None else from_dict(known.settings, own)


def differing_settings(one: Any, two: Any) -> dict[str, tuple[Any, Any]]:
  """Finds the settings that a policy and its reference must share but do not; returns name -> both values."""
  if one.name != two.name:
    return {'task': (one.name, two.name)}
  shared = KNOWN_TASKS[one.name].shared if one.name in KNOWN_TASKS else ()
  pairs = {name: (getattr(one, name), getattr(two, name)) for name in shared}
  return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
