"""Command-line flags out of config dataclasses, and what all binaries share."""

import os
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags, logging

from critkl_jax import config as config_lib
from critkl_jax.checkpoint import CheckpointError
from critkl_jax.runner import Interrupted

ConfigT = TypeVar('ConfigT')

flags.disclaim_key_flags()  # the flags belong to the binary that calls `define_config`: its --help lists them
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_boolean, str: flags.DEFINE_string}


def define_config(config_class: type, presets: dict[str, Any], default_preset: str) -> None:
  """Defines `--preset` and a flag for each field of the config and of the configs in it.

  A flag that is not given leaves the preset's value, so each default stands in the presets alone.
  """
  flags.DEFINE_enum('preset', default_preset, list(presets), 'Named settings; the other flags change single fields.')
  for name, field in config_lib.flat_fields(config_class).items():
    default = config_lib.flat_values(presets[default_preset])[name]
    help_text = f'{_attribute_help(config_class, name)} ({default_preset}: {default!r})'
    _DEFINE[field.type](name, None, help_text)


def read_config(presets: dict[str, ConfigT], values: flags.FlagValues = flags.FLAGS) -> ConfigT:
  """Returns the chosen preset with the given flags in it; exits with one line if a value is not allowed."""
  preset = presets[values.preset]
  given = {name: getattr(values, name) for name in config_lib.flat_fields(type(preset))}
  try:
    return config_lib.replace(preset, **{name: value for name, value in given.items() if value is not None})
  except ValueError as error:
    sys.exit(f'error: --{error}')


def run(main: Callable[[], None]) -> None:
  """Runs a binary: what the user can mend is said in one line, without a traceback, and exits with status 1."""

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(f'error: arguments {argv[1:]} are not flags; flags start with --, see --help.')
    try:
      main()
    except Interrupted as reason:
      sys.exit(str(reason))
    except CheckpointError as error:
      sys.exit(f'error: {error}')

  logging.set_verbosity(logging.WARNING)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  app.run(guarded)


def _attribute_help(config_class: type, name: str) -> str:
  """Returns what the docstrings of a config, or of a config in it, say of a field."""
  for owner in config_lib.nested_classes(config_class):
    match = re.search(rf'^    {name}: (.*?)(?=\n    \w+: |\n\n|\Z)', owner.__doc__ or '', re.S | re.M)
    if match:
      return re.sub(r'\s+', ' ', match.group(1)).strip()
  raise ValueError(f'{config_class.__name__}: no docstring describes the field {name!r}.')
