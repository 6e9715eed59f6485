"""The base class of records of arrays. It needs only JAX, so that the loss loads without Flax."""

import dataclasses
from typing import Any, Self, dataclass_transform

import jax


@dataclass_transform(frozen_default=True)
class PyTreeNode:
  """Makes each subclass a frozen dataclass and a PyTree, like `flax.struct.PyTreeNode`. All fields are its children.

  A subclass may take its fields by keyword only: `class Batch(PyTreeNode, kw_only=True)`.
  """

  def __init_subclass__(cls, kw_only: bool = False):
    dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)
    jax.tree_util.register_dataclass(cls, [field.name for field in dataclasses.fields(cls)], [])

  def replace(self, **fields: Any) -> Self:
    """Returns a copy with the given fields replaced."""
    return dataclasses.replace(self, **fields)
