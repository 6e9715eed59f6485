"""Writes a self-contained HTML page of token statistics; a browser opens it without a network.

The page consists of `page.html`, `page.css` and `page.js`. This module packs its data: each statistic is a base64 array
over all tokens of all responses, in order; text stays text.
"""

import base64
import json
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from critkl_jax.analysis.summary import set_names
from critkl_jax.runtime import storage
from critkl_jax.tasks.tokenizers import Tokenizer

_PNG = b'\x89PNG\r\n\x1a\n'  # the first bytes of a PNG file


class Table(NamedTuple):
  """A table of text.

  Attributes:
    title: title of the table.
    columns: names of the columns.
    rows: rows with a cell for each column; the first cell names the row.
    note: explanation above the table; may be empty.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ''


class Run(NamedTuple):
  """A checkpoint as the page shows it.

  Attributes:
    name: name in lists of checkpoints and in columns of tables.
    origin: a sentence that says how the checkpoint was made.
    tokens: arrays of `reading.read_tokens`.
    pictures: title -> PNG file.
    steps: arrays of `reading.read_steps`; None unless the run has several checkpoints.
    penalty: `prioritized`, `standard` or `none`, which sets the colour; empty for a pre-trained model.
    samples: rows of `samples.read_samples`, responses during training.
  """

  name: str
  origin: str
  tokens: dict[str, np.ndarray]
  pictures: dict[str, storage.Path]
  steps: dict[str, Any] | None = None
  penalty: str = ''
  samples: Sequence[dict[str, Any]] = ()


def write_page(path: str | os.PathLike, runs: Sequence[Run], tokenizer: Tokenizer, about: str,
               tables: Sequence[Table] = (), unit: str = '') -> None:
  """Writes the HTML page of one or more checkpoints.

  Args:
    path: HTML file to write.
    runs: checkpoints, read with the same detectors. The first two are shown side by side.
    tokenizer: the vocabulary of the checkpoints.
    about: sentences below the definitions.
    tables: tables at the end of the page.
    unit: word after the names of problem sets, `digits` for example.

  Raises:
    ValueError: if there is no checkpoint, the detectors differ or are more than 15, or a picture is not a PNG file.
  """
  detectors = [_detectors(run.tokens) for run in runs]
  if any(len(names) > 15 for names in detectors):
    raise ValueError(f'runs: expected at most 15 detectors, got {detectors[0]}.')
  if not runs or any(names != detectors[0] for names in detectors):
    raise ValueError(f'runs: expected one or more, read with the same detectors, got {detectors}.')
  sets = set_names(np.concatenate([run.tokens['set'] for run in runs]))
  data = {'about': about, 'texts': _texts(runs, tokenizer), 'detectors': detectors[0],
          'top': runs[0].tokens['top'].shape[-1], 'tables': [table._asdict() for table in tables],
          'sets': [_label(name, unit) for name in sets], 'solutions': all('on_path' in run.tokens for run in runs),
          'runs': [_packed_run(run, sets, unit) for run in runs]}
  text = json.dumps(data, separators=(',', ':'), allow_nan=False)
  for character in '<>&':  # escaped, so that no text can end the script element or begin a comment
    text = text.replace(character, f'\\u{ord(character):04x}')
  page = _part('html').replace('/*STYLE*/', _part('css')).replace('/*SCRIPT*/', _part('js'))
  storage.write_text(path, page.replace('/*DATA*/', text))


def _part(kind):
  return pathlib.Path(__file__).with_name(f'page.{kind}').read_text(encoding='utf-8').strip()


def _detectors(tokens):
  return [name.removeprefix('critical/') for name in tokens if name.startswith('critical/')]


def _label(name, unit):
  return f'{name} {unit}'.strip()


def _packed_run(run: Run, sets: Sequence[str], unit: str) -> dict[str, Any]:
  mask = run.tokens['mask']
  unknown = dict.fromkeys(('on_path', 'right', 'right_prob', 'ref_right_prob'), np.zeros_like(mask))
  tokens = unknown | run.tokens  # without right solutions the page does not show these fields
  flags = tokens['on_path'] + 2 * tokens['right'].astype(int)
  for i, name in enumerate(_detectors(tokens)):
    flags = flags + (tokens[f'critical/{name}'].astype(int) << (2 + 2 * i))
    flags = flags + ((tokens[f'looked_at/{name}'] > 0).astype(int) << (3 + 2 * i))
  packed = {'flags': _pack(flags[mask].astype('<u4'))}
  packed |= {name: _pack(tokens[name][mask].astype('<f4')) for name in ('kl', 'certainty')}
  packed |= {name: _pack(_share(tokens[field][mask])) for name, field in (
      ('weight', 'weight'), ('right', 'right_prob'), ('ref_right', 'ref_right_prob'), ('top_prob', 'top_prob'),
      ('ref_top_prob', 'ref_top_prob'))}
  packed |= {name: _pack_ids(tokens[field][mask]) for name, field in (
      ('ids', 'token'), ('top', 'top'), ('ref_top', 'ref_top'))}
  steps = None
  if run.steps and 'right_prob' in run.steps:
    steps = {name: _plain(run.steps[name]) for name in (
        'step', 'critical_prob', 'other_prob', 'critical_kl', 'other_kl')}
    steps |= {'sets': [_label(name, unit) for name in run.steps['sets']], 'accuracy': _plain(run.steps['accuracy'].T)}
    own = run.steps['mask']
    packed['step_prob'] = _pack(np.rint(255 * np.nan_to_num(run.steps['right_prob'][:, own])).astype(np.uint8))
    packed['step_ids'] = _pack_ids(run.steps['token'][own])
    steps |= {'problems': run.steps['problem'].tolist(),
              'critical': [c[m].astype(int).tolist() for c, m in zip(run.steps['critical'], own)]}
  responses = [{'problem': problem, 'set': sets.index(name), 'success': _plain(success), 'length': int(length)} for
               problem, name, success, length in zip(*(tokens[k] for k in ('problem', 'set', 'success')), mask.sum(1))]
  pictures = [{'title': title} | _picture(file) for title, file in run.pictures.items()]
  return {'name': run.name, 'origin': run.origin, 'penalty': run.penalty, 'packed': packed, 'responses': responses,
          'steps': steps, 'pictures': pictures, 'samples': [_packed_sample(row) for row in run.samples]}


def _packed_sample(row):
  rewards = {name.removeprefix('reward/'): value for name, value in row.items() if name.startswith('reward')}
  return {'step': row['step'], 'rewards': rewards} | {name: _plain_text(row[name]) for name in ('prompt', 'completion')}


def _plain_text(text):
  """Returns a text, or the contents of messages one below the other."""
  return text if isinstance(text, str) else '\n'.join(f'{one["role"]}: {one["content"]}' for one in text)


def _picture(file):
  """Returns a PNG file as a data URL with its width and height in pixels, so that the browser can lay it out first."""
  content = file.read_bytes()
  if not content.startswith(_PNG):
    raise ValueError(f'pictures: expected PNG files, got {file}.')
  return {'source': 'data:image/png;base64,' + base64.b64encode(content).decode(),
          'size': struct.unpack('>II', content[16:24])}


def _plain(x):
  """Converts numbers to JSON values; None if not finite."""
  return np.where(np.isfinite(x), np.asarray(x), None).tolist()


def _share(x):
  """Quantises numbers between 0 and 1 to 16 bits; NaN becomes 0."""
  return np.rint(65535 * np.clip(np.nan_to_num(x), 0, 1)).astype('<u2')


def _texts(runs: Sequence[Run], tokenizer: Tokenizer) -> dict[int, str]:
  """Returns the text of each token that occurs, by its id."""
  found = [run.tokens[name][run.tokens['mask']] for run in runs for name in ('token', 'top', 'ref_top')]
  found += [run.steps['token'][run.steps['mask']] for run in runs if run.steps and 'token' in run.steps]
  ids = np.unique(np.concatenate([ids.ravel() for ids in found])).tolist()
  return dict(zip(ids, tokenizer.token_texts(ids)))


def _pack_ids(ids):
  most = ids.max(initial=0)
  return _pack(ids.astype('<u1' if most < 2**8 else '<u2' if most < 2**16 else '<u4'))


def _pack(x):
  return [f'{x.dtype.kind}{x.dtype.itemsize}', base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()]
