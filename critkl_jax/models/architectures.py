"""Table of the architectures that a checkpoint may name."""

import dataclasses
from typing import Any

from critkl_jax.config import from_dict
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.models.llama import LlamaConfig, llama

# Name in a checkpoint -> (config class, function from a config to a model).
ARCHITECTURES = {'gpt2': (GPT2Config, gpt2), 'llama': (LlamaConfig, llama)}
ModelConfig = GPT2Config  # sizes and numerics of the models that this project pre-trains
OLDEST = 'gpt2'  # architecture of older checkpoints, which name none

_NUMERICS = ('dtype', 'attention', 'remat', 'scan_layers')


def make_model(config: Any) -> LanguageModel:
  """Makes the model that a config describes.

  Raises:
    TypeError: if the config belongs to no architecture in `ARCHITECTURES`.
  """
  for config_class, make in ARCHITECTURES.values():
    if isinstance(config, config_class):
      return make(config)
  raise TypeError(f'config: expected the config of one of {tuple(ARCHITECTURES)}, got {type(config).__name__}; for '
                  'another architecture pass the LanguageModel itself.')


def with_sizes(name: str, sizes: ModelConfig) -> Any:
  """Returns the config of an architecture with the sizes, critic and numerics of a GPT-2.

  A Llama of these sizes has about as many parameters: its feed-forward network has three matrices of 8/3 of the width
  where GPT-2 has two of 4 times the width.

  Args:
    name: one of `ARCHITECTURES`.
    sizes: the sizes.
  """
  config_class = ARCHITECTURES[name][0]
  return config_class(**{field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)})


def config_of(name: str, values: dict[str, Any]) -> Any:
  """Makes an architecture's config from its JSON fields; returns the fields themselves for an unknown architecture.

  Raises:
    ValueError: if the fields do not fit the architecture.
  """
  return from_dict(ARCHITECTURES[name][0], values) if name in ARCHITECTURES else dict(values)


def reference_config(policy: Any, reference: Any) -> Any:
  """Returns the reference's config with the policy's dtype, attention, remat and scan_layers.

  Training runs both models with the same numerics. A comparison of policy and reference must do so too; otherwise it
  also measures differences of rounding.

  Args:
    policy: the policy's config.
    reference: the reference's config.
  """
  fields = {field.name for field in dataclasses.fields(reference)}
  return dataclasses.replace(reference, **{
      name: getattr(policy, name) for name in _NUMERICS if name in fields and hasattr(policy, name)})
