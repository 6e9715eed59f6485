"""Which values of a parametrised test the fast tier runs."""

import pytest


def slow_except(fast, values):
  """Returns all values for `pytest.mark.parametrize`, those that are not in `fast` marked slow."""
  values = list(values)
  assert fast
  assert all(value in values for value in fast), 'a fast value is none of the values'
  return [value if value in fast else pytest.param(
      *(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values]
