"""Writes one self-contained page of what was read from checkpoints; a browser opens it without a network.

The page itself is `page.html` with `page.css` and `page.js`. Its data are packed here: numbers of tokens as base64 of
arrays, one after another for all tokens of all responses, text as text.
"""

import base64
import json
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from critkl_jax import storage

_PNG = b'\x89PNG\r\n\x1a\n'  # the first bytes of a PNG file


class Table(NamedTuple):
  """A table of text.

  Attributes:
    title: what it shows.
    columns: names of the columns.
    rows: each with a cell for each column; the first cell names the row.
    note: what a reader has to know to understand it; empty if nothing.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ''


class Run(NamedTuple):
  """A checkpoint as the page shows it.

  Attributes:
    name: name in lists of checkpoints and in columns of tables.
    origin: where it comes from, in a sentence.
    tokens: arrays of `reading.read_tokens`.
    pictures: title -> PNG file.
    steps: arrays of `reading.read_steps`; None without several checkpoints of the run.
    penalty: `prioritized`, `standard` or `none`, each of which has a colour; empty if the run has no KL penalty of its
      own.
  """

  name: str
  origin: str
  tokens: dict[str, np.ndarray]
  pictures: dict[str, storage.Path]
  steps: dict[str, Any] | None = None
  penalty: str = ''


def write_page(path: str | os.PathLike, runs: Sequence[Run], alphabet: str, about: str,
               tables: Sequence[Table] = ()) -> None:
  """Writes the page.

  Args:
    path: HTML file to write.
    runs: checkpoints, read with the same detectors. The first two are shown side by side.
    alphabet: characters in the order of their token ids.
    about: sentences below the definitions.
    tables: shown last.

  Raises:
    ValueError: if there is no checkpoint, they were read with different detectors or with more than 15, or a picture is
      no PNG file.
  """
  detectors = [_detectors(run.tokens) for run in runs]
  if any(len(names) > 15 for names in detectors):
    raise ValueError(f'runs: expected at most 15 detectors, got {detectors[0]}.')
  if not runs or any(names != detectors[0] for names in detectors):
    raise ValueError(f'runs: expected one or more, read with the same detectors, got {detectors}.')
  data = {'about': about, 'alphabet': list(alphabet), 'detectors': detectors[0],
          'top': runs[0].tokens['top'].shape[-1], 'tables': [table._asdict() for table in tables],
          'runs': [_packed_run(run) for run in runs]}
  text = json.dumps(data, separators=(',', ':'), allow_nan=False)
  for character in '<>&':  # no text among the data may end the script or begin a comment
    text = text.replace(character, f'\\u{ord(character):04x}')
  page = _part('html').replace('/*STYLE*/', _part('css')).replace('/*SCRIPT*/', _part('js'))
  storage.write_text(path, page.replace('/*DATA*/', text))


def _part(kind):
  return pathlib.Path(__file__).with_name(f'page.{kind}').read_text(encoding='utf-8').strip()


def _detectors(tokens):
  return [name.removeprefix('critical/') for name in tokens if name.startswith('critical/')]


def _packed_run(run: Run) -> dict[str, Any]:
  tokens = run.tokens
  mask = tokens['mask']
  flags = tokens['on_path'] + 2 * tokens['right'].astype(int)
  for i, name in enumerate(_detectors(tokens)):
    flags = flags + (tokens[f'critical/{name}'].astype(int) << (2 + 2 * i))
    flags = flags + ((tokens[f'looked_at/{name}'] > 0).astype(int) << (3 + 2 * i))
  packed = {'flags': _pack(flags[mask].astype('<u4'))}
  packed |= {name: _pack(tokens[name][mask].astype('<f4')) for name in ('kl', 'certainty')}
  packed |= {name: _pack(_share(tokens[field][mask])) for name, field in (
      ('weight', 'weight'), ('right', 'right_prob'), ('ref_right', 'ref_right_prob'), ('top_prob', 'top_prob'),
      ('ref_top_prob', 'ref_top_prob'))}
  packed |= {name: _pack(ids.astype('<u1' if ids.max(initial=0) < 256 else '<u2'))
             for name, ids in (('top', tokens['top'][mask]), ('ref_top', tokens['ref_top'][mask]))}
  steps = run.steps and {name: _plain(run.steps[name]) for name in (
      'digits', 'step', 'short', 'long', 'critical_prob', 'other_prob', 'critical_kl', 'other_kl')}
  if steps:
    own = run.steps['mask']
    packed['step_prob'] = _pack(np.rint(255 * np.nan_to_num(run.steps['right_prob'][:, own])).astype(np.uint8))
    steps |= {'texts': run.steps['response'].tolist(), 'problems': run.steps['problem'].tolist(),
              'critical': [c[m].astype(int).tolist() for c, m in zip(run.steps['critical'], own)]}
  responses = [{'problem': problem, 'digits': int(digits), 'reward': _plain(reward), 'text': text} for
               problem, digits, reward, text in zip(*(tokens[k] for k in ('problem', 'digits', 'reward', 'response')))]
  pictures = [{'title': title} | _picture(file) for title, file in run.pictures.items()]
  return {'name': run.name, 'origin': run.origin, 'penalty': run.penalty, 'packed': packed, 'responses': responses,
          'steps': steps, 'pictures': pictures}


def _picture(file):
  """Returns a PNG file as a data URL, with its width and height in pixels: a browser then keeps its place free."""
  content = file.read_bytes()
  if not content.startswith(_PNG):
    raise ValueError(f'pictures: expected PNG files, got {file}.')
  return {'source': 'data:image/png;base64,' + base64.b64encode(content).decode(),
          'size': struct.unpack('>II', content[16:24])}


def _plain(x):
  """Returns numbers as JSON has them, None for those that are not finite."""
  return np.where(np.isfinite(x), np.asarray(x), None).tolist()


def _share(x):
  """Returns numbers between 0 and 1 in 16 bits, 0 for NaN."""
  return np.rint(65535 * np.clip(np.nan_to_num(x), 0, 1)).astype('<u2')


def _pack(x):
  return [f'{x.dtype.kind}{x.dtype.itemsize}', base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()]
