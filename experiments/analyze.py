"""Looks inside checkpoints: what policy and reference say at each token, and what happened at the critical ones.

    python -m experiments.analyze --workdir=runs/analysis --checkpoints=runs/finetune

Writes tokens.csv, summary.json, pictures, and report.html, a page that any browser opens.
"""

import csv
import dataclasses
import json
import pathlib
import time
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from absl import flags

from critkl_jax import checkpoint, critical_tokens
from critkl_jax.analysis import charts, reading
from critkl_jax.analysis.page import Run, write_page
from critkl_jax.analysis.summary import summarize
from critkl_jax.checkpoint import Checkpoint
from critkl_jax.gpt2 import GPT2
from critkl_jax.tasks.addition import TOKENIZER

from .flags import run
from .tables import summary_tables, text_of

WORKDIR = flags.DEFINE_string('workdir', 'runs/analysis', 'Directory that takes what is found.')
CHECKPOINTS = flags.DEFINE_list('checkpoints', [str(checkpoint.SHIPPED_REFERENCE)],
                                'Workdirs, checkpoint directories or step directories.')
REFERENCE = flags.DEFINE_string('reference', None, "Checkpoint of the reference; each one's own if not given.")
DIGITS = flags.DEFINE_list('digits', None, 'Digits of the longer operand; N and N+1 if not given.')
PROBLEMS = flags.DEFINE_integer('problems', reading.PROBLEMS, 'Problems of each number of digits.', lower_bound=1)
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
SEED = flags.DEFINE_integer('seed', 0, 'Seed of problems and samples.')
COLUMNS = ('log_prob', 'ref_log_prob', 'entropy', 'ref_entropy', *(f'certainty/{kind}' for kind in reading.CERTAINTIES),
           'weight', 'kl', 'right_prob', 'ref_right_prob')


def main() -> None:
  """Reads every checkpoint, and writes tables, pictures and the page."""
  start, workdir = time.monotonic(), pathlib.Path(WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  pairs = {name: reading.load_pair(path, REFERENCE.value) for name, path in names_of(CHECKPOINTS.value).items()}
  known = {policy.info.known_digits for policy, _ in pairs.values()}
  if len(known) > 1:
    raise SystemExit(f'error: --checkpoints: pre-trained on {sorted(known)} digits; analyse those of one number at a '
                     'time.')
  try:
    digits = [int(n) for n in DIGITS.value] if DIGITS.value else [*known, *(n + 1 for n in known)]
    read = {name: read_one(name, *pair, digits) for name, pair in pairs.items()}
    steps = {name: read_steps(name, *pair, digits) for name, pair in pairs.items()}
  except checkpoint.CheckpointError:
    raise
  except ValueError as error:
    raise SystemExit(f'error: --digits: {error}') from error
  summaries = {name: summarize(tokens) for name, tokens in read.items()}
  write_tokens(workdir / 'tokens.csv', read)
  runs = [as_run(name, *pair, read[name], steps[name], summaries[name], workdir) for name, pair in pairs.items()]
  write_page(workdir / 'report.html', runs, TOKENIZER.alphabet, about(digits))
  for name, (policy, reference) in pairs.items():
    summaries[name] |= {'path': str(policy.path), 'step': policy.step, 'reference': str(reference.path)}
    print(f'\n{name}: {policy.path}, step {policy.step}{text_of(summary_tables(summaries[name]))}')
  (workdir / 'summary.json').write_text(json.dumps(summaries, indent=2) + '\n')
  print(f'\n{time.monotonic() - start:.0f} s. In {workdir}: report.html, tokens.csv, summary.json and pictures.')


def names_of(paths: list[str]) -> dict[str, str]:
  """Returns a short name for each path: what it does not share with the others, or its last part."""
  if not paths or len(set(paths)) < len(paths):
    raise SystemExit(f'error: --checkpoints: expected one or more, none of them twice, got {paths}.')
  parts = [pathlib.Path(path).resolve().parts for path in paths]
  shared = 0 if len(paths) == 1 else next(
      (i for i, some in enumerate(zip(*parts)) if len(set(some)) > 1), min(map(len, parts)))
  names = ['/'.join(own[shared:] if shared and own[shared:] else own[-1:]) for own in parts]
  return dict(zip(names if len(set(names)) == len(names) else paths, paths))


def read_one(name: str, policy: Checkpoint, reference: Checkpoint, digits: list[int]) -> dict[str, np.ndarray]:
  """Reads the tokens of one checkpoint."""
  print(f'{name}:', flush=True)
  task, loss = reading.task_of(policy, digits), reading.loss_of(policy)
  detectors = reading.standard_detectors(task, loss, THRESHOLD.value, QUANTILE.value)
  if COUNTERFACTUAL.value:
    detectors['counterfactual'] = critical_tokens.counterfactual(
        GPT2(policy.info.model), policy.params, task, jax.random.key(SEED.value), num_samples=SAMPLES.value,
        num_positions=COUNTERFACTUAL.value, always=critical_tokens.oracle(task), temperature=loss.temperature,
        progress=True)
  return reading.read_tokens(policy, reference, digits=digits, num_problems=PROBLEMS.value, responses=RESPONSES.value,
                             detectors=detectors, seed=SEED.value, progress=True)


def read_steps(name: str, policy: Checkpoint, reference: Checkpoint, digits: list[int]) -> dict[str, Any] | None:
  """Reads the steps of the directory that a checkpoint lies in, if there are several."""
  if not STEPS.value or len(checkpoint.steps_in(policy.path.parent)) < 2:
    return None
  print(f'{name}, step by step:', flush=True)
  return reading.read_steps(policy.path.parent, reference.path, most=STEPS.value, num_problems=PROBLEMS.value,
                            digits=[min(digits), max(digits)], seed=SEED.value, progress=True)


def as_run(name: str, policy: Checkpoint, reference: Checkpoint, tokens, steps, summary, workdir: pathlib.Path) -> Run:
  """Draws the pictures of one checkpoint, and returns what the page shows of it."""
  prefix = quote(name, safe='=')
  pictures = {'certainty of the reference': workdir / f'{prefix}-certainty.png',
              'along the response': workdir / f'{prefix}-positions.png'}
  charts.plot_certainty(tokens, pictures['certainty of the reference'], name)
  charts.plot_positions(tokens, pictures['along the response'], name)
  if steps:
    charts.plot_steps(steps, workdir / f'{prefix}-steps.png', name)
  penalty = {name: value for name, value in dataclasses.asdict(reading.loss_of(policy)).items()
             if name.startswith(('kl', 'certainty'))}
  origin = f'{policy.path}, step {policy.step}; reference: {reference.path}. '
  origin += ('Pre-trained; the weight is that of the default penalty.' if policy.info.kind == 'pretrain' else
             f'Penalty: {", ".join(f"{name}={value}" for name, value in penalty.items())}.')
  return Run(name=name, origin=origin, tokens=tokens, tables=summary_tables(summary), pictures=pictures, steps=steps)


def about(digits: list[int]) -> str:
  """Returns the sentence below the title of the page."""
  whose = {'greedy': 'Greedy responses', 'sampled': 'Sampled responses', 'solution': 'Right solutions'}[RESPONSES.value]
  return (f'{whose} to {PROBLEMS.value} problems each of {", ".join(map(str, digits))} digits; certainty below '
          f'{THRESHOLD.value:g} (threshold), the lowest {100 * QUANTILE.value:g}% of a response (quantile), and the '
          'critical tokens of the task up to the first wrong token (oracle).')


def write_tokens(path: pathlib.Path, read: dict[str, dict[str, np.ndarray]]) -> None:
  """Writes a row for each token."""
  detectors = [name for name in next(iter(read.values())) if name.startswith(('critical/', 'score/'))]
  with path.open('w', newline='') as file:
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


if __name__ == '__main__':
  run(main)
