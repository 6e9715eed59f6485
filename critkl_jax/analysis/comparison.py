"""Two checkpoints side by side: how far parameters moved, where their predictions differ, whose answers changed."""

from typing import Any

import jax
import numpy as np

from critkl_jax.analysis.reading import read_answers, read_tokens
from critkl_jax.checkpoint import Checkpoint
from critkl_jax.evaluate import accuracy_interval
from critkl_jax.intervals import difference_interval


def parameter_drift(one: Any, two: Any) -> list[dict[str, Any]]:
  """Returns how far parameters moved from one checkpoint to the other.

  Args:
    one: parameters, a nested dict.
    two: parameters; those whose names or shapes are not the first's are left out.

  Returns:
    A row for each part of each layer, in the order of the layers: `layer` (`wte`, `h_0/attn`, ...), `parameters`,
    `distance`, the Euclidean norm of the difference, and `relative`, that over the norm of the first, None if it is 0.
  """
  flat = [{_name(key): np.asarray(x, np.float64) for key, x in jax.tree_util.tree_leaves_with_path(tree)}
          for tree in (one, two)]
  layers: dict[str, list[str]] = {}
  for name in flat[0]:
    if name not in flat[1] or flat[0][name].shape != flat[1][name].shape:
      continue
    parts = name.split('/')
    layers.setdefault('/'.join(parts[:2]) if parts[0].startswith('h_') else parts[0], []).append(name)
  rows = []
  for layer in sorted(layers, key=_place):
    names = layers[layer]
    distance, size = (float(np.sqrt(sum(np.sum(f(name)**2) for name in names))) for f in (
        lambda name: flat[1][name] - flat[0][name], lambda name: flat[0][name]))
    rows.append({'layer': layer, 'parameters': sum(flat[0][name].size for name in names), 'distance': distance,
                 'relative': distance / size if size else None})
  return rows


def compare(one: Checkpoint, two: Checkpoint, num_problems: int = 128, digits: list[int] | None = None, seed: int = 0,
            progress: bool = False) -> dict[str, Any]:
  """Compares two checkpoints of models for one task.

  Args:
    one: the first, taken for the reference of the second.
    two: the second.
    num_problems: of each number of digits, the same for both.
    digits: of the longer operand; N and N + 1 if None.
    seed: of the problems.
    progress: whether to show it.

  Two programs are compiled, one that answers and one that reads; a third if the models differ.

  Returns:
    `drift`: of `parameter_drift`, of the arrays that both have in one shape, and `left_out`, names of the others.
    `answers`: of each number of digits the greedy `accuracy` of both and its 95% `intervals`, `num_problems`,
    `difference` (mean, low, high; of `difference_interval`), and numbers `gained` and `lost`. `flipped`: the problems
    whose answer changed from right to wrong or back, with both responses. `kl`: KL(second || first) on the right
    solutions, nats a token at the temperature of the second's loss: `mean`, `critical`, `other`, and `by_position`
    `[T]` (NaN where no solution is so long).

  Raises:
    CheckpointError: if they do not belong together.
  """
  own = {'digits': digits, 'num_problems': num_problems, 'seed': seed, 'progress': progress}
  first, second = read_answers((one, two), **own)
  solutions = read_tokens(two, one, responses='solution', **own)
  answers = {}
  for number in np.unique(first['digits']):
    before, after = (x['reward'][x['digits'] == number] for x in (first, second))
    accuracy = [float(x.mean()) for x in (before, after)]
    gained, lost = (int(np.sum((x > 0) & (y == 0))) for x, y in ((after, before), (before, after)))
    answers[str(number)] = {'accuracy': accuracy, 'intervals': [accuracy_interval(x, before.size) for x in accuracy],
                            'num_problems': before.size,
                            'difference': difference_interval(gained, lost, before.size),
                            'gained': gained, 'lost': lost}
  flipped = [{'problem': first['problem'][i], 'digits': int(first['digits'][i]),
              'change': 'gained' if second['reward'][i] else 'lost', 'first': first['response'][i],
              'second': second['response'][i]} for i in np.nonzero(first['reward'] != second['reward'])[0]]
  mask, critical = solutions['mask'], solutions['critical/oracle']
  count = mask.sum(0)
  position = np.where(count > 0, np.where(mask, solutions['kl'], 0).sum(0) / np.maximum(count, 1), np.nan)
  kl = {name: float(solutions['kl'][where].mean()) if where.any() else None
        for name, where in (('mean', mask), ('critical', critical), ('other', mask & ~critical))}
  shapes = [{_name(key): x.shape for key, x in jax.tree_util.tree_leaves_with_path(c.params)} for c in (one, two)]
  left_out = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
  return {'drift': parameter_drift(one.params, two.params), 'left_out': left_out, 'answers': answers,
          'flipped': flipped, 'kl': kl | {'by_position': position}}


def _name(key) -> str:
  return jax.tree_util.keystr(key, simple=True, separator='/')


def _place(layer: str) -> tuple[int, int, str]:
  """Orders layers as data pass them."""
  if layer.startswith('h_'):
    return 1, int(layer[2:].split('/')[0]), layer
  return {'wte': 0, 'wpe': 0}.get(layer, 2), 0, layer
