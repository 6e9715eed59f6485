"""Records the settings and files of an analysis in its workdir, so that files of two analyses are never mixed.

`analysis.json` holds `settings` and the names of the `files` beside it.
"""

import json
import pathlib
from typing import Any

from critkl_jax import storage

RECORD = 'analysis.json'


def check_workdir(workdir: pathlib.Path, settings: dict[str, Any], files: list[str], overwrite: bool) -> bool:
  """Returns whether the workdir holds an analysis that will be replaced; changes nothing.

  Args:
    workdir: where an analysis is to be written; need not exist.
    settings: its settings, as JSON has them.
    files: names of the files that it will write.
    overwrite: whether an analysis with other settings may be replaced.

  Raises:
    ValueError: if the workdir holds an analysis with other settings and `overwrite` is false, or a file of anything
      else that would be overwritten.
  """
  earlier_settings, earlier_files = _read(workdir)
  foreign = [name for name in files if name not in earlier_files and (workdir / name).exists()]
  if foreign:
    raise ValueError(f'{workdir / foreign[0]} exists and is not of an analysis; give another --workdir.')
  different = [name for name, value in settings.items() if earlier_settings.get(name) != value]
  if earlier_files and different and not overwrite:
    raise ValueError(f'{workdir} holds another analysis ({", ".join(different)} differ); give another --workdir, or '
                     '--overwrite to replace it.')
  return bool(earlier_files)


def claim_workdir(workdir: pathlib.Path, settings: dict[str, Any], files: list[str]) -> None:
  """Deletes the files of the analysis that a workdir holds, and records another one; arguments as in
  `check_workdir`."""
  for name in _read(workdir)[1]:
    (workdir / pathlib.Path(name).name).unlink(missing_ok=True)
  storage.write_json(workdir / RECORD, {'settings': settings, 'files': files})


def _read(workdir):
  """Returns settings and files of the analysis in a workdir; empty ones if there is none."""
  path = workdir / RECORD
  if not path.exists():
    return {}, []
  try:
    record = json.loads(path.read_text())
    return dict(record['settings']), list(record['files'])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} does not record an analysis; give another --workdir.') from error
