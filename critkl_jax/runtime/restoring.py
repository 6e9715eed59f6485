"""Restores the arrays of a checkpoint; if they are damaged, every host raises the error."""

import contextlib
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from critkl_jax.runtime import hosts, storage
from critkl_jax.runtime.checksums import array_checksums
from critkl_jax.training import finite


class CheckpointError(ValueError):
  """A checkpoint cannot be used; the message is one line with the reason and what to do."""


class DamagedError(CheckpointError):
  """A part of a checkpoint is missing or differs from what was saved."""


def newest_whole(steps: Sequence[int], read: Callable[[int], Any]) -> tuple[Any, list[DamagedError]]:
  """Reads the newest checkpoint that is whole; all hosts call it.

  Args:
    steps: steps of the checkpoints, in ascending order.
    read: reads the checkpoint of a step.

  Returns:
    `(result, errors)`: the result of `read` (None if no checkpoint is whole), and the errors of the newer, damaged
    checkpoints, newest first.

  Raises:
    CheckpointError: any error of `read` that is not a `DamagedError`.
  """
  damages = []
  for step in reversed(steps):
    try:
      return read(step), damages
    except DamagedError as error:
      damages.append(error)
  return None, damages


def read_arrays(path: storage.Path, item: str, target: Any, sums: dict[str, int] | None) -> Any:
  """Restores an item into arrays like `target`.

  All hosts call it, and all raise if one of them finds damage, so that none waits for another in a later collective.

  Args:
    path: the step directory.
    item: `params` or `opt_state`.
    target: arrays, or their shapes and shardings.
    sums: saved checksum of each array, by its path; None for checkpoints of older versions.

  Raises:
    CheckpointError: if the stored shapes differ from those of the target; a `DamagedError` if the item is missing,
      damaged or not finite.
  """
  directory, restored, error = epath.Path(storage.resolve(path) / item), None, None
  abstract = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else ocp.utils.to_shape_dtype_struct(x), target)
  try:
    restored = _restore(path, item, directory, abstract)
  except CheckpointError as found:
    error = found
  raise_together(path, error)
  # All hosts compute both errors, because each computation is a collective.
  errors = _compare_sums(path, item, restored, sums), _not_finite(path, item, restored)
  raise_together(path, errors[0] or errors[1])
  return restored


def raise_together(path: storage.Path, error: CheckpointError | None) -> None:
  """Raises the error of this host, or a `DamagedError` if another host has an error; all hosts call it."""
  if error is None and not hosts.least(1):
    error = DamagedError(f'{path}: another host found it damaged.')
  elif error is not None:
    hosts.least(0)
  if error is not None:
    raise error


def _restore(path, item, directory, abstract):
  if not directory.is_dir():
    raise DamagedError(f'{path}: no {item} in it; it is half written, or was saved without.')
  with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
    try:
      _check_shapes(path, item, handler.metadata(directory).tree, abstract)
      return handler.restore(directory, args=ocp.args.StandardRestore(abstract))
    except (CheckpointError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # Orbax and TensorStore raise many kinds of errors for damaged files.
      logging.debug('restoring %s', directory, exc_info=True)
      raise DamagedError(f'{path}: {item} is damaged or half written ({_reason(path, error)}).') from error


def _compare_sums(path, item, restored, wanted):
  """Returns an error if the checksums of arrays differ from the saved ones, else None."""
  if wanted is None:
    return None
  found = array_checksums(restored)
  damaged = sorted(name for name in wanted if found.get(name) != wanted[name])
  names = ', '.join(damaged[:3]) + (', ...' if damaged[3:] else '')
  return DamagedError(f'{path}: {item} is damaged: {names} is not what was saved.') if damaged else None


def _not_finite(path, item, restored):
  """Returns an error if an array contains a number that is not finite, else None."""
  broken = finite.not_finite_in(restored)
  names = ', '.join(broken[:3]) + (', ...' if broken[3:] else '')
  return DamagedError(f'{path}: {item} is not finite: {names}; it was saved by an older version, or by another '
                      'program.') if broken else None


def _reason(path, error):
  """Returns the damaged file and a short reason from an error; TensorStore names the file last, after its arrays."""
  chain = [error]
  while chain[-1].__cause__ is not None:
    chain.append(chain[-1].__cause__)
  text = ' '.join(' '.join(map(str, chain[::-1])).split()) or type(error).__name__
  files = [name for name in re.findall(r'local file "([^"]+)"', text) if not name.endswith('/')]
  what = re.match(r'[A-Z_]+(?=: )', text)
  if not files:
    return text[:200]
  return f'{pathlib.Path(files[-1]).relative_to(path) if files[-1].startswith(str(path)) else files[-1]}: ' + (
      what[0] if what else text.rpartition('": ')[2][:100])


def _check_shapes(path, item, stored, target):
  stored, wanted = ({jax.tree_util.keystr(key, simple=True, separator='/'): tuple(leaf.shape)
                     for key, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (stored, target))
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise CheckpointError(
          f'{path}: {item} is of another shape: {name} has {stored.get(name, "nothing")}, expected '
          f'{wanted.get(name, "nothing")}; it does not belong to this config.')
