"""Records the settings and files of an analysis in its workdir, so that files of two analyses are never mixed.

`analysis.json` holds `settings` and the names of the `files` beside it.
"""

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
  """Records an analysis before its files are written, and deletes nothing; arguments as in `check_workdir`."""
  workdir.mkdir(parents=True, exist_ok=True)
  storage.write_json(workdir / RECORD, {'settings': settings, 'files': list(dict.fromkeys(files + _read(workdir)[1]))})


def finish_workdir(workdir: pathlib.Path, settings: dict[str, Any], files: list[str]) -> None:
  """Deletes what an earlier analysis left beside the files of this one, now that these are written; arguments as in
  `check_workdir`."""
  names = {pathlib.Path(name).name for name in _read(workdir)[1]} - set(files)
  for name in names:
    (workdir / name).unlink(missing_ok=True)
  storage.write_json(workdir / RECORD, {'settings': settings, 'files': files})


def _read(workdir):
  """Returns settings and files of the analysis in a workdir; empty ones if there is none."""
  path = workdir / RECORD
  if not path.exists():
    return {}, []
  advice = 'it does not record an analysis; remove it with the files of the analysis, or give another --workdir'
  record = storage.read_json(path, advice=advice)
  try:
    return dict(record['settings']), list(map(str, record['files']))
  except (ValueError, KeyError, TypeError) as error:
    raise storage.WorkdirError(f'{path} is damaged; {advice}.') from error
