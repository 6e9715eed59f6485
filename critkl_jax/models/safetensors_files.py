"""Reads and writes the tensors of safetensors files: eight bytes of a header's length, a JSON header, raw bytes.

Tensors are read through a memory map, so that only the parts that are used are read.
"""

import json
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {'F32': np.dtype('float32'), 'F16': np.dtype('float16'), 'BF16': np.dtype(ml_dtypes.bfloat16),
          'F64': np.dtype('float64')}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # most bytes of one file


class PretrainedError(ValueError):
  """Raised for a directory that is no model directory, or of a model that is not supported."""


class Tensor(NamedTuple):
  """A tensor in a safetensors file: its dtype and shape, and the byte of the file at which it starts."""

  file: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  def read(self) -> np.ndarray:
    """Maps the tensor into memory; only what is used of it is read."""
    if not int(np.prod(self.shape)):
      return np.zeros(self.shape, self.dtype)
    return np.memmap(self.file, self.dtype, 'r', self.start, self.shape)


def tensors_in(directory: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
  """Yields the name and place of each tensor in the safetensors files of a directory.

  Raises:
    PretrainedError: if a file is missing or damaged, or a tensor has a type that is not in `DTYPES`.
  """
  index = directory / 'model.safetensors.index.json'
  files = sorted(set(read_json(index).get('weight_map', {}).values())) if index.is_file() else ['model.safetensors']
  for name in files:
    file = directory / name
    if not file.is_file():
      pickled = sorted(path.name for path in directory.glob('*.bin'))
      hint = f'; pickled weights ({pickled[0]}) are not read: convert them to safetensors' if pickled else ''
      raise PretrainedError(f'{directory}: has no {name}{hint}.')
    yield from _header(file)


def _header(file: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
  """Reads the header of a safetensors file: eight bytes of its length, then JSON; the data follow."""
  with file.open('rb') as opened:
    size = file.stat().st_size
    try:
      (length,) = struct.unpack('<Q', opened.read(8))
      if length > size:
        raise ValueError('its header is longer than the file')
      header = json.loads(opened.read(length))
    except (ValueError, struct.error) as error:
      raise PretrainedError(f'{file}: is no whole safetensors file ({error}).') from error
  header.pop('__metadata__', None)
  for name, entry in header.items():
    begin, end = entry['data_offsets']
    if entry['dtype'] not in DTYPES:
      raise PretrainedError(f'{file}: tensor {name!r} is of type {entry["dtype"]}; expected one of {tuple(DTYPES)}.')
    tensor = Tensor(file, DTYPES[entry['dtype']], tuple(entry['shape']), 8 + length + begin)
    if 8 + length + end > size or end - begin != tensor.dtype.itemsize * int(np.prod(tensor.shape)):
      raise PretrainedError(f'{file}: tensor {name!r} is cut off or has the wrong size.')
    yield name, tensor


def write_tensors(directory: pathlib.Path, tensors: Mapping[str, tuple[Any, bool]], dtype: np.dtype) -> None:
  """Writes tensors, one at a time, into one file, or into several with an index where they exceed 5 GB.

  Args:
    directory: exists.
    tensors: name -> (array, whether the file takes its transpose).
    dtype: type of the numbers in the file, one of `DTYPES`.
  """
  parts, size = [[]], 0
  for name, (x, _) in tensors.items():
    if size + x.size * dtype.itemsize > SHARD_BYTES and parts[-1]:
      parts.append([])
      size = 0
    parts[-1].append(name)
    size += x.size * dtype.itemsize
  files = ['model.safetensors'] if len(parts) == 1 else [
      f'model-{i + 1:05}-of-{len(parts):05}.safetensors' for i in range(len(parts))]
  for file, names in zip(files, parts):
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name in names:
      x, transposed = tensors[name]
      end = offset + x.size * dtype.itemsize
      header[name] = {'dtype': _NAMES[dtype], 'shape': list(x.shape[::-1] if transposed else x.shape),
                      'data_offsets': [offset, end]}
      offset = end
    text = json.dumps(header, separators=(',', ':'), allow_nan=False).encode()
    text += b' ' * (-len(text) % 8)
    with (directory / file).open('wb') as opened:
      opened.write(struct.pack('<Q', len(text)) + text)
      for name in names:
        x, transposed = tensors[name]
        array = np.asarray(x).astype(dtype)
        np.ascontiguousarray(array.T if transposed else array).tofile(opened)
  if len(files) > 1:
    places = {name: file for file, names in zip(files, parts) for name in names}
    total = sum(x.size * dtype.itemsize for x, _ in tensors.values())
    (directory / 'model.safetensors.index.json').write_text(
        json.dumps({'metadata': {'total_size': total}, 'weight_map': places}, indent=2, allow_nan=False) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises PretrainedError if the file holds none."""
  try:
    values = json.loads(path.read_text())
  except (ValueError, OSError) as error:
    raise PretrainedError(f'{path}: is no JSON ({error}).') from error
  if not isinstance(values, dict):
    raise PretrainedError(f'{path}: expected a JSON object, got {type(values).__name__}.')
  return values
