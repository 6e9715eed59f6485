"""One self-contained page of what was read from checkpoints: a browser opens it without a network.

The page itself is `page.html`; here its data are packed: numbers of tokens as base64 of arrays, one after another for
all tokens of all responses, text as text.
"""

import base64
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_TEMPLATE = pathlib.Path(__file__).with_name('page.html')


class Table(NamedTuple):
  """A table of the page: a title, names of columns, and rows of text."""

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]


class Run(NamedTuple):
  """What the page shows of a checkpoint.

  Attributes:
    name: in the list of checkpoints.
    origin: a sentence of where it comes from.
    tokens: of `reading.read_tokens`.
    tables: shown first.
    pictures: title -> PNG file.
    steps: of `reading.read_steps`; None where there is nothing to show over steps.
  """

  name: str
  origin: str
  tokens: dict[str, np.ndarray]
  tables: Sequence[Table]
  pictures: dict[str, pathlib.Path]
  steps: dict[str, Any] | None = None


def write_page(path: str | pathlib.Path, runs: Sequence[Run], alphabet: str, about: str) -> None:
  """Writes the page.

  Args:
    path: of the HTML file.
    runs: checkpoints, read with the same detectors.
    alphabet: characters in the order of their token ids.
    about: a sentence below the title.

  Raises:
    ValueError: if there is no checkpoint, they were read with other detectors, or with more than 15.
  """
  detectors = [_detectors(run.tokens) for run in runs]
  if any(len(names) > 15 for names in detectors):
    raise ValueError(f'runs: expected at most 15 detectors, got {detectors[0]}.')
  if not runs or any(names != detectors[0] for names in detectors):
    raise ValueError(f'runs: expected one or more, read with the same detectors, got {detectors}.')
  data = {'about': about, 'alphabet': list(alphabet), 'detectors': detectors[0],
          'top': runs[0].tokens['top'].shape[-1], 'runs': [_packed_run(run) for run in runs]}
  text = json.dumps(data, separators=(',', ':'), allow_nan=False)
  for character in '<>&':  # no text among the data may end the script or begin a comment
    text = text.replace(character, f'\\u{ord(character):04x}')
  pathlib.Path(path).write_text(_TEMPLATE.read_text().replace('/*DATA*/', text))


def _detectors(tokens):
  return [name.removeprefix('critical/') for name in tokens if name.startswith('critical/')]


def _packed_run(run: Run) -> dict[str, Any]:
  tokens = run.tokens
  mask = tokens['mask']
  flags = tokens['on_path'] + 2 * tokens['right'].astype(int)
  for i, name in enumerate(_detectors(tokens)):
    flags = flags + (tokens[f'critical/{name}'].astype(int) << (2 + 2 * i))
    flags = flags + ((tokens[f'looked_at/{name}'] > 0).astype(int) << (3 + 2 * i))
  packed = {'flags': _pack(flags[mask].astype('<u4')), 'kl': _pack(tokens['kl'][mask].astype('<f4'))}
  packed |= {name: _pack(_share(tokens[field][mask])) for name, field in (
      ('certainty', 'certainty'), ('weight', 'weight'), ('right', 'right_prob'), ('ref_right', 'ref_right_prob'),
      ('top_prob', 'top_prob'), ('ref_top_prob', 'ref_top_prob'))}
  packed |= {name: _pack(tokens[name][mask].astype('<u2')) for name in ('top', 'ref_top')}
  steps = run.steps and {name: _plain(run.steps[name]) for name in (
      'digits', 'step', 'short', 'long', 'critical_prob', 'other_prob', 'critical_kl', 'other_kl')}
  if steps:
    own = run.steps['mask']
    packed['step_prob'] = _pack(np.rint(255 * np.nan_to_num(run.steps['right_prob'][:, own])).astype(np.uint8))
    steps |= {'texts': run.steps['response'].tolist(), 'problems': run.steps['problem'].tolist(),
              'critical': [c[m].astype(int).tolist() for c, m in zip(run.steps['critical'], own)]}
  responses = [{'problem': problem, 'digits': int(digits), 'reward': _plain(reward), 'text': text} for
               problem, digits, reward, text in zip(*(tokens[k] for k in ('problem', 'digits', 'reward', 'response')))]
  pictures = [{'title': title, 'source': 'data:image/png;base64,' + base64.b64encode(file.read_bytes()).decode()}
              for title, file in run.pictures.items()]
  return {'name': run.name, 'origin': run.origin, 'packed': packed, 'responses': responses, 'steps': steps,
          'tables': [table._asdict() for table in run.tables], 'pictures': pictures}


def _plain(x):
  """Numbers as JSON has them, None for those that are none."""
  return np.where(np.isnan(x), None, np.asarray(x)).tolist()


def _share(x):
  """Numbers between 0 and 1 as 16 bits, 0 for those that are none."""
  return np.rint(65535 * np.clip(np.nan_to_num(x), 0, 1)).astype('<u2')


def _pack(x):
  return [f'{x.dtype.kind}{x.dtype.itemsize}', base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()]
