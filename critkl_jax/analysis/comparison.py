"""Compares two checkpoints: drift of the parameters, KL between the models, changed answers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from critkl_jax import sharding
from critkl_jax.analysis.evaluation import accuracy_interval
from critkl_jax.analysis.intervals import difference_interval
from critkl_jax.analysis.reading import model_of, read_answers, read_tokens, sets_of
from critkl_jax.analysis.summary import set_names
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.runtime.checkpoint import Checkpoint
from critkl_jax.tasks.task import Task


def parameter_drift(one: Any, two: Any, layer_of: Callable = LanguageModel.layer_of) -> list[dict[str, Any]]:
  """Measures the drift of the parameters between two checkpoints, layer by layer.

  Args:
    one: parameters, a nested dict.
    two: parameters; arrays without a counterpart of the same name and shape in `one` are left out.
    layer_of: `LanguageModel.layer_of` of their model.

  Returns:
    A row for each layer or part of a layer, in the order of the layers: `layer` (`h_0/attn`, ...), `parameters` (their
    number), `distance` (Euclidean norm of the difference), `relative` (`distance` over the norm of `one`; None if it
    is 0).
  """
  flat = [{sharding.path_names(key): np.asarray(x, np.float64) for key, x in jax.tree_util.tree_leaves_with_path(tree)}
          for tree in (one, two)]
  layers: dict[tuple[int, str], list[tuple[str, ...]]] = {}
  for name in flat[0]:
    if name not in flat[1] or flat[0][name].shape != flat[1][name].shape:
      continue
    layers.setdefault(layer_of(name), []).append(name)
  rows = []
  for (_, layer), names in sorted(layers.items()):
    distance, size = (float(np.sqrt(sum(np.sum(f(name)**2) for name in names))) for f in (
        lambda name: flat[1][name] - flat[0][name], lambda name: flat[0][name]))
    rows.append({'layer': layer, 'parameters': sum(flat[0][name].size for name in names), 'distance': distance,
                 'relative': distance / size if size else None})
  return rows


def compare(one: Checkpoint, two: Checkpoint, num_problems: int = 128, sets: Sequence[Any] | None = None, seed: int = 0,
            progress: bool = False, task: Task | None = None) -> dict[str, Any]:
  """Compares two checkpoints of models for one task: parameters, greedy answers and KL.

  Two programs are compiled, for answers and for teacher-forced passes; a third if the models differ.

  Args:
    one: the first checkpoint, taken for the reference of the second.
    two: the second checkpoint.
    num_problems: problems of each set, the same for both.
    sets: as in `read_tokens`.
    seed: seed of the problems.
    progress: whether to show a progress bar.
    task: as in `read_tokens`.

  Returns:
    `drift`: rows of `parameter_drift`; `left_out`: names of the arrays that it leaves out. `answers`: for each problem
    set the greedy `accuracy` of both and its 95% `intervals`, `num_problems`, `difference` (mean, low, high, from
    `difference_interval`), and the numbers of answers `gained` (wrong, then right) and `lost`. `flipped`: the problems
    of those answers, with both responses. `kl`, if the task knows right solutions: KL(second || first) on them, nats
    per token at the temperature of the second's loss: `mean`, `critical`, `other`, and `by_position` `[T]` (NaN beyond
    the longest solution).

  Raises:
    CheckpointError: if the checkpoints have different vocabularies or pre-training tasks.
    ValueError: as `read_answers`.
  """
  own = {'task': task, 'sets': sets, 'num_problems': num_problems, 'seed': seed, 'progress': progress}
  first, second = read_answers((one, two), **own)
  answers = {}
  for name in set_names(first['set']):
    before, after = (x['success'][x['set'] == name] for x in (first, second))
    accuracy = [float(x.mean()) for x in (before, after)]
    gained, lost = (int(np.sum((x > 0) & (y == 0))) for x, y in ((after, before), (before, after)))
    answers[name] = {'accuracy': accuracy, 'intervals': [accuracy_interval(x, before.size) for x in accuracy],
                     'num_problems': before.size, 'difference': difference_interval(gained, lost, before.size),
                     'gained': gained, 'lost': lost}
  flipped = [{'problem': first['problem'][i], 'set': first['set'][i],
              'change': 'gained' if second['success'][i] else 'lost', 'first': first['response'][i],
              'second': second['response'][i]} for i in np.nonzero(first['success'] != second['success'])[0]]
  shapes = [{_name(key): x.shape for key, x in jax.tree_util.tree_leaves_with_path(c.params)} for c in (one, two)]
  left_out = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
  found = {'drift': parameter_drift(one.params, two.params, model_of(one).layer_of), 'left_out': left_out,
           'answers': answers, 'flipped': flipped}
  if sets_of(two, task, sets)[0].solution is None:
    return found
  return found | {'kl': _kl_of(read_tokens(two, one, responses='solution', **own))}


def _kl_of(solutions):
  """Averages the KL over the tokens of right solutions, overall and at each position."""
  mask = solutions['mask']
  critical = solutions.get('critical/oracle', np.zeros_like(mask))
  count = mask.sum(0)
  position = np.where(count > 0, np.where(mask, solutions['kl'], 0).sum(0) / np.maximum(count, 1), np.nan)
  means = {name: float(solutions['kl'][where].mean()) if where.any() else None
           for name, where in (('mean', mask), ('critical', critical), ('other', mask & ~critical))}
  return means | {'by_position': position}


def _name(key) -> str:
  return jax.tree_util.keystr(key, simple=True, separator='/')
