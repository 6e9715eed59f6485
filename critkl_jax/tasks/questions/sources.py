"""Where the rows of prompts come from: a JSON-lines file, or a dataset of reasoning-gym."""

import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

GYM = 'reasoning_gym:'  # before the name of a dataset
_GYM_OPTIONS = {'size': 1000, 'seed': 0}


def is_gym(prompts: str) -> bool:
  """Returns whether prompts come from reasoning-gym."""
  return prompts.startswith(GYM)


def place_of(prompts: str) -> str:
  """Returns the name under which a source is saved: the absolute path of a file, or the dataset."""
  return prompts if is_gym(prompts) else str(pathlib.Path(prompts).expanduser().absolute())


def read(prompts: str, options: dict[str, Any]) -> tuple[int, list[tuple[int, dict[str, Any]]]]:
  """Reads all rows.

  Args:
    prompts: the place of the source.
    options: settings of a dataset of reasoning-gym; they override a size of 1000 and seed 0.

  Returns:
    A checksum, and the number of each row from 1 with its values, among them `prompt`.

  Raises:
    ValueError: if the file or the dataset cannot be read, or a line is no JSON object; the message names the line.
  """
  if is_gym(prompts):
    return _read_gym(prompts.removeprefix(GYM), options)
  data = _bytes(pathlib.Path(prompts))
  return zlib.crc32(data), list(_rows(prompts, data))


def _bytes(path):
  try:
    return path.read_bytes()
  except OSError as error:
    raise ValueError(f'prompts: {path} cannot be read: {error.strerror}.') from error


def _rows(path, data) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the lines that are not empty."""
  for i, line in enumerate(data.splitlines(), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(f'prompts: line {i} of {path} is no JSON ({error}).') from error
    if not isinstance(row, dict) or 'prompt' not in row:
      raise ValueError(f"prompts: line {i} of {path} needs a 'prompt'.")
    yield i, row


def _read_gym(name, options):
  try:
    import reasoning_gym as gym
  except ImportError as error:
    raise ValueError("task: reasoning_gym is not installed: pip install 'critkl-jax[tasks]'.") from error
  try:
    found = [dict(entry) for entry in gym.create_dataset(name, **(_GYM_OPTIONS | options))]
  except Exception as error:  # the package raises assertions and errors of many types
    raise ValueError(f'task: reasoning_gym has no dataset {name!r} with the options {options} '
                     f'({type(error).__name__}: {error}).') from error
  rows = [(i, {'prompt': row['question'], 'question': row['question'], 'answer': row['answer'],
               'metadata': {'source_dataset': name, **row['metadata']}}) for i, row in enumerate(found, 1)]
  # Not of the metadata, in which some datasets put today's date.
  texts = [f'{row["question"]}\0{row["answer"]}' for _, row in rows]
  return zlib.crc32('\0'.join(texts).encode()), rows
