"""Analyses checkpoints token by token: policy, reference, KL penalty and critical tokens.

    python -m experiments.analyze --workdir=runs/analysis --checkpoints=runs/finetune
    python -m experiments.analyze --workdir=runs/qwen --model=Qwen3-0.6B --task=questions --prompts=test.jsonl

Writes tokens.csv, summary.json, pictures, and report.html, a page for any browser. analysis.json records the settings
and the names of the files: the same command replaces them, another analysis needs another workdir.
"""

import csv
import io
import time
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from absl import flags

from critkl_jax.analysis import detectors as detectors_lib
from critkl_jax.analysis import reading
from critkl_jax.analysis.page import Run, write_page
from critkl_jax.analysis.summary import summarize
from critkl_jax.config import differences
from critkl_jax.rl.certainties import CERTAINTIES
from critkl_jax.runtime import checkpoint, hosts, storage
from critkl_jax.runtime.checkpoint import Checkpoint
from critkl_jax.runtime.samples import FILE, read_samples
from critkl_jax.tasks.addition import Addition
from critkl_jax.tasks.known_tasks import to_json_object
from critkl_jax.tasks.questions import TextFinetuning, question_sets, sizes_of_sets
from critkl_jax.tasks.rewards import RewardPool
from critkl_jax.tasks.stories import FACTS as FACTS_ALONE
from critkl_jax.tasks.stories import MOST_FACTS, Stories
from critkl_jax.tasks.task import check_vocabulary
from critkl_jax.training.config import MOST_PROBLEMS

from . import parsing, paths
from .analysis_record import check_workdir, claim_workdir, finish_workdir
from .exits import refuse
from .flags import define_imported, pool_of_flags, read_imported, run
from .reference import check_facts, check_length, check_rewards, imported, load_imported, refuse_text
from .tables import summary_tables, text_of
from .workdirs import claim

WORKDIR = flags.DEFINE_string('workdir', 'runs/analysis', 'Directory of the results.')
CHECKPOINTS = flags.DEFINE_list('checkpoints', [str(checkpoint.SHIPPED_REFERENCE)],
                                'Workdirs, checkpoint directories or step directories.')
REFERENCE = flags.DEFINE_string('reference', None, "Checkpoint of the reference; each run's own if not given.")
DIGITS = flags.DEFINE_list('digits', None, 'Digits of the longer operand; N and N+1 if not given.')
FACTS = flags.DEFINE_list('facts', None, 'Facts of the stories; N and N + k, or N + 4 of a pre-trained model, if not '
                          'given.')
PROBLEMS = flags.DEFINE_integer('problems', reading.PROBLEMS, 'Problems of each number of digits, or questions of each '
                                'set.', 1, MOST_PROBLEMS)
RESPONSES = flags.DEFINE_enum('responses', 'greedy', list(reading.RESPONSES), 'Responses to analyse.')
THRESHOLD = flags.DEFINE_float(
    'threshold', detectors_lib.THRESHOLD, 'Certainty below which a token is critical.', 0.0, 1.0)
QUANTILE = flags.DEFINE_float('quantile', detectors_lib.QUANTILE, 'Share of a response that is critical.', 0.0, 1.0)
COUNTERFACTUAL = flags.DEFINE_integer(
    'counterfactual', 0, 'Tokens of each response, besides the critical ones, that are replaced to measure their '
    'effect on the reward; takes long.', lower_bound=0)
SAMPLES = flags.DEFINE_integer('samples', detectors_lib.SAMPLES, 'Responses sampled after each replaced token.',
                               lower_bound=1)
STEPS = flags.DEFINE_integer('steps', reading.STEPS, 'Most checkpoints of a run to read over training; 0 for none.',
                             lower_bound=0)
SEED = parsing.define_seed()
OVERWRITE = flags.DEFINE_boolean('overwrite', False, 'Replace another analysis in the workdir: its files are deleted.')
define_imported()
UNITS = {'addition': 'digits', 'stories': 'facts'}
COLUMNS = ('log_prob', 'ref_log_prob', 'entropy', 'ref_entropy', *(f'certainty/{kind}' for kind in CERTAINTIES),
           'weight', 'kl', 'right_prob', 'ref_right_prob')


Pairs = dict[str, tuple[Checkpoint, Checkpoint]]  # name -> policy and reference


def check() -> tuple[storage.Path, dict[str, str], Pairs, list[Any], TextFinetuning | None]:
  """Checks the flags and returns the arguments of `main`, or exits with one line; reads no parameters."""
  given, text = parsing.read_digits(DIGITS), read_imported()
  if REFERENCE.value == '':
    refuse('--reference: expected a path, got an empty one.')
  for name in ('checkpoints', 'reference'):
    if text and flags.FLAGS[name].present:
      refuse(f'--{name}: give this or --model, not both: a model directory is analysed as its own reference.')
  names = short_names([text.model] if text else parsing.read_names(CHECKPOINTS))
  workdir = paths.read_workdir('workdir', WORKDIR.value)
  found = {name: (imported(text),) * 2 if text else
           reading.load_pair(path, REFERENCE.value, checkpoint.find_checkpoint) for name, path in names.items()}
  sets = check_sets(found, given)
  check_record(workdir, names, found, sets)
  return workdir, names, found, sets, text


def check_record(workdir: storage.Path, names: dict[str, str], pairs: Pairs, sets: list[Any]) -> bool:
  """Returns whether the workdir's analysis will be replaced; exits with one line if it may not be."""
  try:
    return check_workdir(workdir, settings_of(names, pairs, sets), files_of(pairs), OVERWRITE.value)
  except ValueError as error:
    refuse(f'--workdir: {error}')


def main(workdir: storage.Path, names: dict[str, str], found: Pairs, sets: list[Any], text: TextFinetuning | None
         ) -> None:
  """Reads every checkpoint, and writes tables, pictures and the page."""
  start = time.monotonic()
  claim(workdir, 'analyze')
  hosts.say(f'Loading {_counted(len(names), "checkpoint")} and the reference of each')
  pairs = {name: (load_imported(text),) * 2 if text else reading.load_pair(*(one.path for one in pair))
           for name, pair in found.items()}
  settings = settings_of(names, pairs, sets)
  if check_record(workdir, names, pairs, sets):
    hosts.say(f'The analysis that {workdir} holds will be replaced')
  with pool_of_flags() as pool:
    read = {name: read_one(name, *pair, sets, pool) for name, pair in pairs.items()}
    steps = {name: read_steps(name, *pair, sets, pool) for name, pair in pairs.items()}
  hosts.say('Comparing detectors, drawing pictures and writing the page (seconds)')
  summaries = {name: summarize(tokens) for name, tokens in read.items()}
  unit, (task, _) = unit_of(pairs), reading.sets_of(next(iter(pairs.values()))[0], sets=sets)
  tables = summary_tables(summaries, unit)
  claim_workdir(workdir, settings, files_of(pairs))
  write_tokens(workdir / 'tokens.csv', read, unit or 'set')
  runs = [draw_run(name, *pair, read[name], steps[name], workdir) for name, pair in pairs.items()]
  write_page(workdir / 'report.html', runs, task.tokenizer, describe_analysis(pairs, sets), tables, unit)
  for name, (policy, reference) in pairs.items():
    summaries[name] |= {'path': str(policy.path), 'step': policy.step, 'reference': str(reference.path)}
  storage.write_json(workdir / 'summary.json', summaries)
  finish_workdir(workdir, settings, files_of(pairs))
  print('', *(f'{run.name}: {run.origin}' for run in runs), text_of(tables), sep='\n')
  print(f'\n{time.monotonic() - start:.0f} s. {workdir} holds summary.json, tokens.csv and pictures. Open in a browser:'
        f'\n{workdir / "report.html"}')


def unit_of(pairs: Pairs) -> str:
  """Returns the word after the names of problem sets; may be empty."""
  return UNITS.get(_settings(pairs).name, '')


def _settings(pairs: Pairs) -> Any:
  """Returns the settings of the task, which all checkpoints share."""
  return next(policy.info.task for policy, _ in pairs.values())


def check_sets(pairs: Pairs, given: list[int] | None) -> list[Any]:
  """Returns the problem sets to analyse, or exits with one line if a checkpoint does not support them."""
  own = _settings(pairs)
  for name, flag in (('addition', 'digits'), ('stories', 'facts')):
    if own.name != name and flags.FLAGS[flag].present:
      refuse(f"--{flag}: has no effect on the task '{own.name}'; leave it out.")
  if isinstance(own, Addition):
    return check_digits(pairs, given)
  if isinstance(own, Stories):
    facts = parsing.read_digits(FACTS, MOST_FACTS)
    for policy, _ in pairs.values():
      if policy.info.task.name != own.name or policy.info.task.known_facts != own.known_facts:
        refuse('--checkpoints: their tasks differ; analyse those of one task and one number of known facts at a time.')
      facts = check_facts(policy, facts)
    return facts
  if RESPONSES.value == 'solution':
    refuse("--responses: 'solution' needs one right response, and 'questions' accept several ways to write an answer.")
  for policy, _ in pairs.values():
    if policy.info.task != _settings(pairs):
      refuse('--checkpoints: their tasks or their settings differ; analyse those of one task at a time.')
  with refuse_text():
    (task, _), found = question_sets(_settings(pairs)), list(sizes_of_sets(_settings(pairs)))
  check_rewards(task)
  check_length(task, next(iter(pairs.values()))[0].info.model)
  return found


def check_digits(pairs: Pairs, given: list[int] | None) -> list[int]:
  """Returns the numbers of digits to analyse, or exits with one line if a checkpoint does not support them."""
  known = {checkpoint.settings_of(policy, Addition).known_digits for policy, _ in pairs.values()}
  if len(known) > 1:
    refuse(f'--checkpoints: pre-trained on {sorted(known)} digits; analyse those of one number at a '
                     'time.')
  digits = given or [*known, *(n + 1 for n in known)]
  for policy, _ in pairs.values():
    (task, _), context = reading.sets_of(policy, sets=digits), policy.info.model.context_length
    if task.prompt_length + task.response_length > context:
      refuse(f'--digits: problems of {max(digits)} digits take {task.prompt_length + task.response_length} tokens, and '
             f'{policy.path} has a context of {context}.')
    try:
      check_vocabulary(task, policy.info.model.vocab_size)
    except ValueError as error:
      refuse(f'--checkpoints: {policy.path}: {error}')
  return digits


def short_names(paths: list[str]) -> dict[str, str]:
  """Returns a short name for each path: its part after the common prefix, or its last part."""
  if not paths or len(set(paths)) < len(paths):
    refuse(f'--checkpoints: expected one or more, none of them twice, got {paths}.')
  parts = [storage.resolve(path).parts for path in paths]
  shared = 0 if len(paths) == 1 else next(
      (i for i, level in enumerate(zip(*parts)) if len(set(level)) > 1), min(map(len, parts)))
  names = ['/'.join(own[shared:] if shared and own[shared:] else own[-1:]) for own in parts]
  return dict(zip(names if len(set(names)) == len(names) else paths, paths))


def settings_of(names: dict[str, str], pairs: Pairs, sets: list[Any]) -> dict[str, Any]:
  """Returns the settings that determine the results of an analysis, in JSON types."""
  task = _settings(pairs)
  own_task = {UNITS[task.name]: sets} if task.name in UNITS else {'task': to_json_object(task)}
  own = (PROBLEMS, RESPONSES, THRESHOLD, QUANTILE, COUNTERFACTUAL, SAMPLES, STEPS, SEED)
  return {'checkpoints': {name: _absolute(path) for name, path in names.items()},
          'reference': REFERENCE.value and _absolute(REFERENCE.value), **own_task,
          **{flag.name: flag.value for flag in own}}


def files_of(pairs: Pairs) -> list[str]:
  """Returns the names of all files that an analysis writes, without its record."""
  pictures = [picture_name(name, kind) for name, (policy, _) in pairs.items()
              for kind in ('certainty', 'positions', *(['steps'] if has_steps(policy) else []))]
  return ['report.html', 'tokens.csv', 'summary.json', *pictures]


def picture_name(name: str, kind: str) -> str:
  return f'{quote(name, safe="=")}-{kind}.png'


def has_steps(policy: Checkpoint) -> bool:
  """Returns whether the run of a checkpoint has several steps to analyse over training."""
  return STEPS.value > 0 and policy.info.kind != 'import' and len(checkpoint.steps_in(policy.path.parent)) > 1


def read_one(name: str, policy: Checkpoint, reference: Checkpoint, sets: list[Any], pool: RewardPool
             ) -> dict[str, np.ndarray]:
  """Analyses the tokens of one checkpoint."""
  hosts.say(f'Reading up to {len(sets) * PROBLEMS.value} responses of {name} (30 to 60 s on a CPU, with compilation)')
  (task, _), loss = reading.sets_of(policy, sets=sets), reading.loss_of(policy)
  detectors = reading.standard_detectors(task, loss, THRESHOLD.value, QUANTILE.value)
  if COUNTERFACTUAL.value:
    hosts.say(f'Replacing {COUNTERFACTUAL.value} tokens and the critical ones of each response, with {SAMPLES.value} '
              'samples each (minutes)')
    detectors['counterfactual'] = detectors_lib.counterfactual(
        reading.model_of(policy), policy.params, task, jax.random.key(SEED.value), num_samples=SAMPLES.value,
        num_positions=COUNTERFACTUAL.value, always=detectors.get('oracle'), temperature=loss.temperature,
        progress=True, pool=pool)
  return reading.read_tokens(policy, reference, sets=sets, num_problems=PROBLEMS.value, responses=RESPONSES.value,
                             detectors=detectors, seed=SEED.value, progress=True, pool=pool)


def read_steps(name: str, policy: Checkpoint, reference: Checkpoint, sets: list[Any], pool: RewardPool
               ) -> dict[str, Any] | None:
  """Analyses the steps of a checkpoint's run over training; returns None if there are not several."""
  if not has_steps(policy):
    return None
  number = min(STEPS.value, len(checkpoint.steps_in(policy.path.parent)))
  hosts.say(f'Reading {_counted(number, "checkpoint")} of {name} over training (20 s to compile on a CPU, then 5 to '
            '10 s each)')
  least_and_most = [min(sets), max(sets)] if policy.info.task.name in UNITS else sets
  return reading.read_steps(policy.path.parent, reference.path, most=STEPS.value, num_problems=PROBLEMS.value,
                            sets=least_and_most, seed=SEED.value, progress=True, pool=pool)


def draw_run(name: str, policy: Checkpoint, reference: Checkpoint, tokens, steps, workdir: storage.Path) -> Run:
  """Draws the pictures of one checkpoint, and returns its section of the page."""
  from critkl_jax.analysis import charts  # slow import, not needed to check flags

  pictures = {'certainty of the reference': workdir / picture_name(name, 'certainty'),
              'along the response': workdir / picture_name(name, 'positions')}
  charts.plot_certainty(tokens, pictures['certainty of the reference'], name)
  charts.plot_positions(tokens, pictures['along the response'], name)
  if steps:
    charts.plot_steps(steps, workdir / picture_name(name, 'steps'), name,
                      UNITS.get(policy.info.task.name, ''))
  own = policy.path == reference.path
  origin = (f'step {policy.step}; reference: {"itself" if own else f"{place_name(reference)}, step {reference.step}"}. '
            f'{describe_training(policy)}')
  penalty = '' if policy.info.kind != 'finetune' else reading.loss_of(policy).kl
  finetuned = policy.info.kind == 'finetune'
  samples = read_samples(storage.resolve(policy.path).parents[1] / FILE) if finetuned else []
  return Run(name=name, origin=origin, tokens=tokens, pictures=pictures, steps=steps, penalty=penalty, samples=samples)


def place_name(found: Checkpoint) -> str:
  """Describes where a checkpoint lies: the last two directories above its step, or the shipped reference."""
  directory = storage.resolve(found.path).parent
  if directory in [path.resolve() for path in checkpoint.SHIPPED_REFERENCES.values()]:
    return 'the one that comes with the package'
  return '/'.join(directory.parts[-2:])


def describe_training(policy: Checkpoint) -> str:
  """Describes the KL penalty of a checkpoint's training in a sentence."""
  training, loss, apart = policy.info.training, reading.loss_of(policy), ''
  if policy.info.kind != 'finetune':
    return f'Pre-trained only; weights are those of the default penalty, certainty^{loss.certainty_exponent:g}.'
  if loss.kl == 'none':
    return 'Fine-tuned without a KL penalty.'
  weight = f'certainty^{loss.certainty_exponent:g}' if loss.kl == 'prioritized' else '1 at all tokens'
  names = ('kl_estimator', 'kl_placement', 'certainty', 'certainty_intercept', 'certainty_temperature', 'kl_gate')
  changed = differences(training, type(training)())
  special = [f', {name}={changed[name]}' for name in names if name in changed]
  if training.certainty_ensemble:
    apart = (f' Weights below use the certainty of its own reference; training used the certainty of the mean of '
             f'{1 + len(training.ensemble_paths)} references.')
  elif training.kl_gate != 'none':
    apart = ' Weights below leave the gate out.'
  return (f'Fine-tuned with the {loss.kl} KL penalty: weight {weight}, coefficient {loss.kl_coefficient:g}'
          f'{"".join(special)}.{apart}')


def describe_analysis(pairs: Pairs, sets: list[Any]) -> str:
  """Describes the task, the responses and the detectors, for the page."""
  whose = {'greedy': 'the answers that the policy gives when it takes the most probable token each time',
           'sampled': 'answers of the policy, sampled as in training',
           'solution': 'right solutions, not answers of the policy'}[RESPONSES.value]
  settings = _settings(pairs)
  if isinstance(settings, Addition):
    task = ('The task: add two numbers and write the steps down, one character a token; pre-training showed numbers of '
            f'up to {settings.known_digits} digits. Below: {whose}, to {PROBLEMS.value} problems each whose longer '
            f'number has {" or ".join(map(str, sets))} digits.')
  elif isinstance(settings, Stories):
    wanted = ('write down the facts that show where a person or an object is' if settings.asks == FACTS_ALONE else
              'say where a person or an object is, after the facts that show it')
    task = (f'The task: read a story and {wanted}, a word or a phrase a token; pre-training showed stories of up to '
            f'{settings.known_facts} facts. Below: {whose}, to {PROBLEMS.value} stories each of '
            f'{" and of ".join(map(str, sets))} facts.')
  else:
    task = (f'The task: answer the questions of {settings.prompts}. Which tokens are critical is not known. Below: '
            f'{whose}, to up to {PROBLEMS.value} questions of each set ({", ".join(sets)}).')
  return (f'{task} Two detectors know the certainty only: threshold takes the tokens below {THRESHOLD.value:g}, '
          f'quantile the lowest {100 * QUANTILE.value:g}% of a response.')


def _absolute(path: str) -> str:
  return str(storage.resolve(path))


def _counted(number: int, noun: str) -> str:
  return f'{number} {noun}{"s" * (number != 1)}'


def write_tokens(path: storage.Path, read: dict[str, dict[str, np.ndarray]], unit: str) -> None:
  """Writes a CSV file with a row for each token; `unit` heads the column of problem sets."""
  first = next(iter(read.values()))
  detectors = [name for name in first if name.startswith(('critical/', 'score/'))]
  columns = [name for name in COLUMNS if name in first]  # without a right solution there is no right token
  with io.StringIO() as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['checkpoint', 'response', 'problem', unit, 'reward', 'position', 'text', 'token', 'right',
                     *columns, *detectors])
    for name, tokens in read.items():
      rows, positions = np.nonzero(tokens['mask'])
      right = (np.where(tokens['on_path'], np.where(tokens['right'], 'right', 'wrong'), 'after error')[rows, positions]
               if 'on_path' in tokens else [''] * len(rows))
      numbers = [np.char.mod('%.6g', tokens[column][rows, positions].astype(float)) for column in columns]
      for column in detectors:  # empty for tokens that the detector did not examine
        seen = tokens[f'looked_at/{column.split("/")[1]}'][rows, positions] > 0
        numbers.append(np.where(seen, np.char.mod('%.6g', tokens[column][rows, positions].astype(float)), ''))
      own = [tokens[field][rows] for field in ('problem', 'set')]
      reward = np.where(np.isnan(tokens['reward']), '', np.char.mod('%g', tokens['reward']))[rows]
      texts = [text.replace('\r', '\\r') for text in tokens['text'][rows, positions]]  # which `csv` does not quote
      writer.writerows(zip([name] * len(rows), rows, *own, reward, positions, texts, tokens['token'][rows, positions],
                           right, *numbers))
    storage.write_text(path, file.getvalue())


if __name__ == '__main__':
  run(main, check)
