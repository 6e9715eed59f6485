"""Looks inside checkpoints: what policy and reference say at each token, and what happened at the critical ones.

    python -m experiments.analyze --workdir=runs/analysis --checkpoints=runs/finetune

Writes tokens.csv, summary.json, pictures, and report.html, a page that any browser opens. analysis.json records the
settings and the names of the files: the same command replaces them, another analysis needs another workdir.
"""

import csv
import io
import time
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from absl import flags

from critkl_jax import checkpoint, critical_tokens, hosts, storage
from critkl_jax.analysis import reading
from critkl_jax.analysis.page import Run, write_page
from critkl_jax.analysis.summary import summarize
from critkl_jax.checkpoint import Checkpoint
from critkl_jax.config import MOST_PROBLEMS, LossConfig
from critkl_jax.tasks.addition import TOKENIZER, check_vocabulary

from . import parsing, paths
from .analysis_record import check_workdir, claim_workdir, finish_workdir
from .exits import refuse
from .flags import run
from .tables import summary_tables, text_of
from .workdirs import claim

WORKDIR = flags.DEFINE_string('workdir', 'runs/analysis', 'Directory that takes what is found.')
CHECKPOINTS = flags.DEFINE_list('checkpoints', [str(checkpoint.SHIPPED_REFERENCE)],
                                'Workdirs, checkpoint directories or step directories.')
REFERENCE = flags.DEFINE_string('reference', None, "Checkpoint of the reference; each one's own if not given.")
DIGITS = flags.DEFINE_list('digits', None, 'Digits of the longer operand; N and N+1 if not given.')
PROBLEMS = flags.DEFINE_integer('problems', reading.PROBLEMS, 'Problems of each number of digits.', 1,
                                MOST_PROBLEMS)
RESPONSES = flags.DEFINE_enum('responses', 'greedy', list(reading.RESPONSES), 'Whose tokens are read.')
THRESHOLD = flags.DEFINE_float(
    'threshold', critical_tokens.THRESHOLD, 'Certainty below which a token is critical.', 0.0, 1.0)
QUANTILE = flags.DEFINE_float('quantile', critical_tokens.QUANTILE, 'Share of a response that is critical.', 0.0, 1.0)
COUNTERFACTUAL = flags.DEFINE_integer(
    'counterfactual', 0, 'Tokens of each response that are replaced to see what comes of it, beside the critical ones; '
    'takes long.', lower_bound=0)
SAMPLES = flags.DEFINE_integer('samples', critical_tokens.SAMPLES, 'Responses sampled after each replaced token.',
                               lower_bound=1)
STEPS = flags.DEFINE_integer('steps', reading.STEPS, 'Checkpoints of a directory that are read, at most; 0 for none.',
                             lower_bound=0)
SEED = parsing.define_seed()
OVERWRITE = flags.DEFINE_boolean('overwrite', False, 'Replace another analysis in the workdir: its files are deleted.')
COLUMNS = ('log_prob', 'ref_log_prob', 'entropy', 'ref_entropy', *(f'certainty/{kind}' for kind in reading.CERTAINTIES),
           'weight', 'kl', 'right_prob', 'ref_right_prob')


def check() -> tuple[storage.Path, dict[str, str], dict[str, tuple[Checkpoint, Checkpoint]], list[int]]:
  """Returns the workdir, the checkpoints by name, found without their parameters, and the numbers of digits, or exits
  with one line."""
  names, given = names_of(parsing.read_names(CHECKPOINTS)), parsing.read_digits(DIGITS)
  if REFERENCE.value == '':
    refuse('--reference: expected a path, got an empty one.')
  workdir = paths.read_workdir('workdir', WORKDIR.value)
  found = {name: reading.load_pair(path, REFERENCE.value, checkpoint.find_checkpoint) for name, path in names.items()}
  digits = digits_of(found, given)
  check_record(workdir, names, found, digits)
  return workdir, names, found, digits


def check_record(workdir: storage.Path, names: dict[str, str], pairs: dict[str, tuple[Checkpoint, Checkpoint]],
                 digits: list[int]) -> bool:
  """Returns whether the workdir holds an analysis that will be replaced; exits with one line if it holds another."""
  try:
    return check_workdir(workdir, settings_of(names, digits), files_of(pairs), OVERWRITE.value)
  except ValueError as error:
    refuse(f'--workdir: {error}')


def main(workdir: storage.Path, names: dict[str, str], found: dict[str, tuple[Checkpoint, Checkpoint]],
         digits: list[int]) -> None:
  """Reads every checkpoint, and writes tables, pictures and the page."""
  start = time.monotonic()
  claim(workdir, 'analyze')
  hosts.say(f'Loading {_several(len(names), "checkpoint")} and the reference of each')
  pairs = {name: reading.load_pair(*(one.path for one in pair)) for name, pair in found.items()}
  settings = settings_of(names, digits)
  if check_record(workdir, names, pairs, digits):
    hosts.say(f'The analysis that {workdir} holds will be replaced')
  read = {name: read_one(name, *pair, digits) for name, pair in pairs.items()}
  steps = {name: read_steps(name, *pair, digits) for name, pair in pairs.items()}
  hosts.say('Comparing detectors, drawing pictures and writing the page (seconds)')
  summaries = {name: summarize(tokens) for name, tokens in read.items()}
  tables = summary_tables(summaries)
  claim_workdir(workdir, settings, files_of(pairs))
  write_tokens(workdir / 'tokens.csv', read)
  runs = [as_run(name, *pair, read[name], steps[name], workdir) for name, pair in pairs.items()]
  write_page(workdir / 'report.html', runs, TOKENIZER.alphabet, about(pairs, digits), tables)
  for name, (policy, reference) in pairs.items():
    summaries[name] |= {'path': str(policy.path), 'step': policy.step, 'reference': str(reference.path)}
  storage.write_json(workdir / 'summary.json', summaries)
  finish_workdir(workdir, settings, files_of(pairs))
  print('', *(f'{run.name}: {run.origin}' for run in runs), text_of(tables), sep='\n')
  print(f'\n{time.monotonic() - start:.0f} s. {workdir} holds summary.json, tokens.csv and pictures. Open in a browser:'
        f'\n{workdir / "report.html"}')


def digits_of(pairs: dict[str, tuple[Checkpoint, Checkpoint]], given: list[int] | None) -> list[int]:
  """Returns the numbers of digits to read, or exits with one line if the checkpoints cannot be read with them."""
  known = {policy.info.known_digits for policy, _ in pairs.values()}
  if len(known) > 1:
    refuse(f'--checkpoints: pre-trained on {sorted(known)} digits; analyse those of one number at a '
                     'time.')
  digits = given or [*known, *(n + 1 for n in known)]
  for policy, _ in pairs.values():
    task, context = reading.task_of(policy, digits), policy.info.model.context_length
    if task.prompt_length + task.response_length > context:
      refuse(f'--digits: problems of {max(digits)} digits take {task.prompt_length + task.response_length} tokens, and '
             f'{policy.path} has a context of {context}.')
    try:
      check_vocabulary(policy.info.model.vocab_size)
    except ValueError as error:
      refuse(f'--checkpoints: {policy.path}: {error}')
  return digits


def names_of(paths: list[str]) -> dict[str, str]:
  """Returns a short name for each path: what it does not share with the others, or its last part."""
  if not paths or len(set(paths)) < len(paths):
    refuse(f'--checkpoints: expected one or more, none of them twice, got {paths}.')
  parts = [storage.resolve(path).parts for path in paths]
  shared = 0 if len(paths) == 1 else next(
      (i for i, some in enumerate(zip(*parts)) if len(set(some)) > 1), min(map(len, parts)))
  names = ['/'.join(own[shared:] if shared and own[shared:] else own[-1:]) for own in parts]
  return dict(zip(names if len(set(names)) == len(names) else paths, paths))


def settings_of(names: dict[str, str], digits: list[int]) -> dict[str, Any]:
  """Returns all that decides what an analysis finds, as JSON has it."""
  own = (PROBLEMS, RESPONSES, THRESHOLD, QUANTILE, COUNTERFACTUAL, SAMPLES, STEPS, SEED)
  return {'checkpoints': {name: _absolute(path) for name, path in names.items()},
          'reference': REFERENCE.value and _absolute(REFERENCE.value), 'digits': digits,
          **{flag.name: flag.value for flag in own}}


def files_of(pairs: dict[str, tuple[Checkpoint, Checkpoint]]) -> list[str]:
  """Returns the names of all files that an analysis writes beside its record."""
  pictures = [picture_of(name, kind) for name, (policy, _) in pairs.items()
              for kind in ('certainty', 'positions', *(['steps'] if has_steps(policy) else []))]
  return ['report.html', 'tokens.csv', 'summary.json', *pictures]


def picture_of(name: str, kind: str) -> str:
  return f'{quote(name, safe="=")}-{kind}.png'


def has_steps(policy: Checkpoint) -> bool:
  """Returns whether several steps of the directory that a checkpoint lies in are to be read."""
  return STEPS.value > 0 and len(checkpoint.steps_in(policy.path.parent)) > 1


def read_one(name: str, policy: Checkpoint, reference: Checkpoint, digits: list[int]) -> dict[str, np.ndarray]:
  """Reads the tokens of one checkpoint."""
  hosts.say(f'Reading {len(digits) * PROBLEMS.value} responses of {name} (30 to 60 s on a CPU, compilation included)')
  task, loss = reading.task_of(policy, digits), reading.loss_of(policy)
  detectors = reading.standard_detectors(task, loss, THRESHOLD.value, QUANTILE.value)
  if COUNTERFACTUAL.value:
    hosts.say(f'Replacing {COUNTERFACTUAL.value} tokens and the critical ones of each response, with {SAMPLES.value} '
              'samples each (minutes)')
    detectors['counterfactual'] = critical_tokens.counterfactual(
        reading.model_of(policy), policy.params, task, jax.random.key(SEED.value), num_samples=SAMPLES.value,
        num_positions=COUNTERFACTUAL.value, always=critical_tokens.oracle(task), temperature=loss.temperature,
        progress=True)
  return reading.read_tokens(policy, reference, digits=digits, num_problems=PROBLEMS.value, responses=RESPONSES.value,
                             detectors=detectors, seed=SEED.value, progress=True)


def read_steps(name: str, policy: Checkpoint, reference: Checkpoint, digits: list[int]) -> dict[str, Any] | None:
  """Reads the steps of the directory that a checkpoint lies in, if there are several."""
  if not has_steps(policy):
    return None
  number = min(STEPS.value, len(checkpoint.steps_in(policy.path.parent)))
  hosts.say(f'Reading {_several(number, "checkpoint")} of {name} over training (20 s to compile on a CPU, then 5 to '
            '10 s each)')
  return reading.read_steps(policy.path.parent, reference.path, most=STEPS.value, num_problems=PROBLEMS.value,
                            digits=[min(digits), max(digits)], seed=SEED.value, progress=True)


def as_run(name: str, policy: Checkpoint, reference: Checkpoint, tokens, steps, workdir: storage.Path) -> Run:
  """Draws the pictures of one checkpoint, and returns what the page shows of it."""
  from critkl_jax.analysis import charts  # draws, for which no wrong flag should wait

  pictures = {'certainty of the reference': workdir / picture_of(name, 'certainty'),
              'along the response': workdir / picture_of(name, 'positions')}
  charts.plot_certainty(tokens, pictures['certainty of the reference'], name)
  charts.plot_positions(tokens, pictures['along the response'], name)
  if steps:
    charts.plot_steps(steps, workdir / picture_of(name, 'steps'), name)
  own = policy.path == reference.path
  origin = (f'step {policy.step}; reference: {"itself" if own else f"{place_of(reference)}, step {reference.step}"}. '
            f'{training_of(policy)}')
  penalty = '' if policy.info.kind == 'pretrain' else reading.loss_of(policy).kl
  return Run(name=name, origin=origin, tokens=tokens, pictures=pictures, steps=steps, penalty=penalty)


def place_of(found: Checkpoint) -> str:
  """Returns a short name of where a checkpoint lies: the last two directories above its step, or the shipped one."""
  directory = storage.resolve(found.path).parent
  if directory == checkpoint.SHIPPED_REFERENCE.resolve():
    return 'the one that comes with the package'
  return '/'.join(directory.parts[-2:])


def training_of(policy: Checkpoint) -> str:
  """Returns a sentence that says how the KL penalty of a checkpoint was weighted."""
  loss, plain = reading.loss_of(policy), LossConfig()
  if policy.info.kind == 'pretrain':
    return f'Pre-trained only; weights are those of the default penalty, certainty^{plain.certainty_exponent:g}.'
  if loss.kl == 'none':
    return 'Fine-tuned without a KL penalty.'
  weight = f'certainty^{loss.certainty_exponent:g}' if loss.kl == 'prioritized' else '1 at all tokens'
  names = ('kl_estimator', 'kl_placement', 'certainty', 'certainty_intercept', 'certainty_temperature', 'kl_gate')
  special = [f', {name}={getattr(loss, name)}' for name in names if getattr(loss, name) != getattr(plain, name)]
  training, apart = policy.info.training, ''
  if training.certainty_ensemble:
    apart = (f' Weights below take the certainty of its own reference; in training it was that of the mean of '
             f'{1 + len(training.ensemble_paths)} references.')
  elif loss.kl_gate != 'none':
    apart = ' Weights below leave the gate out.'
  return (f'Fine-tuned with the {loss.kl} KL penalty: weight {weight}, coefficient {loss.kl_coefficient:g}'
          f'{"".join(special)}.{apart}')


def about(pairs: dict[str, tuple[Checkpoint, Checkpoint]], digits: list[int]) -> str:
  """Returns the sentences below the definitions of the page."""
  whose = {'greedy': 'the answers that the policy gives when it takes the most probable token each time',
           'sampled': 'answers of the policy, sampled as in training',
           'solution': 'right solutions, not answers of the policy'}[RESPONSES.value]
  known = next(policy.info.known_digits for policy, _ in pairs.values())
  lengths = ' or '.join(map(str, digits))
  return (f'The task: add two numbers and write the steps down, one character a token; pre-training showed numbers of '
          f'up to {known} digits. Below: {whose}, to {PROBLEMS.value} problems each whose longer number has {lengths} '
          f'digits. Two detectors know the certainty only: threshold takes the tokens below {THRESHOLD.value:g}, '
          f'quantile the lowest {100 * QUANTILE.value:g}% of a response.')


def _absolute(path: str) -> str:
  return str(storage.resolve(path))


def _several(number: int, noun: str) -> str:
  return f'{number} {noun}{"s" * (number != 1)}'


def write_tokens(path: storage.Path, read: dict[str, dict[str, np.ndarray]]) -> None:
  """Writes a row for each token."""
  detectors = [name for name in next(iter(read.values())) if name.startswith(('critical/', 'score/'))]
  with io.StringIO() as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['checkpoint', 'response', 'problem', 'digits', 'reward', 'position', 'text', 'token', 'right',
                     *COLUMNS, *detectors])
    for name, tokens in read.items():
      rows, positions = np.nonzero(tokens['mask'])
      right = np.where(tokens['on_path'], np.where(tokens['right'], 'right', 'wrong'), 'after error')[rows, positions]
      numbers = [np.char.mod('%.6g', tokens[column][rows, positions].astype(float)) for column in COLUMNS]
      for column in detectors:  # empty where the detector did not look
        seen = tokens[f'looked_at/{column.split("/")[1]}'][rows, positions] > 0
        numbers.append(np.where(seen, np.char.mod('%.6g', tokens[column][rows, positions].astype(float)), ''))
      own = [tokens[field][rows] for field in ('problem', 'digits')]
      reward = np.where(np.isnan(tokens['reward']), '', np.char.mod('%g', tokens['reward']))[rows]
      writer.writerows(zip([name] * len(rows), rows, *own, reward, positions,
                           tokens['character'][rows, positions], tokens['token'][rows, positions], right, *numbers))
    storage.write_text(path, file.getvalue())


if __name__ == '__main__':
  run(main, check)
