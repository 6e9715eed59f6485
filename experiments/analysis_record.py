"""Records the settings and files of an analysis in its workdir, so that files of two analyses are never mixed.

`analysis.json` holds the `settings` and the names of the `files` of the analysis.
"""

import pathlib
from typing import Any

from critkl_jax.runtime import storage

RECORD = 'analysis.json'


def check_workdir(workdir: pathlib.Path, settings: dict[str, Any], files: list[str], overwrite: bool) -> bool:
  """Checks that an analysis may be written, and returns whether it will replace an existing one; writes nothing.

  Args:
    workdir: directory of the analysis; it need not exist.
    settings: settings of the analysis, in JSON types.
    files: names of the files that the analysis will write.
    overwrite: whether an analysis with other settings may be replaced.

  Raises:
    ValueError: if the workdir holds an analysis with other settings and `overwrite` is false, or a file that no
      analysis wrote and that would be overwritten.
  """
  earlier_settings, earlier_files = _read(workdir)
  foreign = [name for name in files if name not in earlier_files and (workdir / name).exists()]
  if foreign:
    raise ValueError(f'{workdir / foreign[0]} exists and was not written by an analysis; give another --workdir.')
  different = [name for name, value in settings.items() if earlier_settings.get(name) != value]
  if earlier_files and different and not overwrite:
    raise ValueError(f'{workdir} holds another analysis ({", ".join(different)} differ); give another --workdir, or '
                     '--overwrite to replace it.')
  return bool(earlier_files)


def claim_workdir(workdir: pathlib.Path, settings: dict[str, Any], files: list[str]) -> None:
  """Records an analysis before its files are written; takes the arguments of `check_workdir` and deletes nothing."""
  workdir.mkdir(parents=True, exist_ok=True)
  storage.write_json(workdir / RECORD, {'settings': settings, 'files': list(dict.fromkeys(files + _read(workdir)[1]))})


def finish_workdir(workdir: pathlib.Path, settings: dict[str, Any], files: list[str]) -> None:
  """Deletes leftover files of an earlier analysis after those of the new one are written; see `check_workdir`."""
  names = {pathlib.Path(name).name for name in _read(workdir)[1]} - set(files)
  for name in names:
    (workdir / name).unlink(missing_ok=True)
  storage.write_json(workdir / RECORD, {'settings': settings, 'files': files})


def _read(workdir):
  """Returns the settings and files of the analysis in a workdir; both are empty if there is none."""
  path = workdir / RECORD
  if not path.exists():
    return {}, []
  advice = 'it does not record an analysis; remove it with the files of the analysis, or give another --workdir'
  record = storage.read_json(path, advice=advice)
  try:
    return dict(record['settings']), list(map(str, record['files']))
  except (ValueError, KeyError, TypeError) as error:
    raise storage.WorkdirError(f'{path} is damaged; {advice}.') from error
