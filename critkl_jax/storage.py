"""Files of a run: paths that a user gives, text and JSON that are written whole or not at all."""

import json
import math
import os
from typing import Any

from etils import epath

from critkl_jax import hosts


def to_path(path: str | os.PathLike) -> epath.Path:
  """Returns a path on this machine or of a bucket (`gs://bucket/run`), with `~` expanded."""
  return epath.Path(os.fspath(path)).expanduser()


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file whole or not at all, whenever the process ends; of several hosts only the first one writes."""
  if not hosts.is_first():
    return
  path = to_path(path)
  unfinished = path.with_name(f'{path.name}.unfinished')
  unfinished.write_text(text)
  unfinished.replace(path)


def to_json(value: Any, indent: int | None = None) -> str:
  """Formats nested values as JSON that strict parsers read: null stands for a number that is not finite."""
  return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
  """Writes nested values as `to_json` formats them, as `write_text` writes."""
  write_text(path, to_json(value, indent) + '\n')


def plain(value: Any) -> Any:
  """Converts nested values, NumPy and JAX arrays among them, to the types of JSON: None for a number that is not
  finite."""
  if isinstance(value, dict):
    return {str(name): plain(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [plain(x) for x in value]
  if hasattr(value, 'tolist'):
    return plain(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value
