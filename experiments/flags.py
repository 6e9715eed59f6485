"""Defines command-line flags from config dataclasses, and runs binaries with the flags and errors that all share."""

import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from absl import app, flags, logging
from jax.sharding import Mesh

from critkl_jax import attention, compilation, hosts, interruption, sharding, storage, trackers
from critkl_jax import config as config_lib
from critkl_jax.checkpoint import CheckpointError
from critkl_jax.finite import NonFinite
from critkl_jax.storage import WorkdirError

from . import exits, parsing, paths
from . import help as help_lib
from .exits import refuse
from .workdirs import held

ConfigT = TypeVar('ConfigT')

flags.disclaim_key_flags()  # the flags belong to the binary that calls `define_config`: its --help lists them
flags.DEFINE_string('compilation_cache', str(compilation.default_cache()), 'Directory in which compiled programs are '
                    'kept, so that the same command starts faster the next time; empty to keep none.')
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_boolean, str: flags.DEFINE_string}


def define_config(config_class: type, presets: dict[str, Any], default_preset: str) -> None:
  """Defines `--preset`, and a flag for each field of the config and of its nested configs.

  A flag that is not given leaves the preset's value, so each default stands in the presets alone.
  """
  flags.DEFINE_enum('preset', default_preset, list(presets), 'Named settings; the other flags change single fields.')
  for name, field in config_lib.flat_fields(config_class).items():
    default = config_lib.flat_values(presets[default_preset])[name]
    help_text = f'{_attribute_help(config_class, name)} ({default_preset}: {default!r})'
    _DEFINE[field.type](name, None, help_text)


def keep_no_programs() -> None:
  """Makes an empty `--compilation_cache` the default, for binaries that report how long compilation takes."""
  flags.FLAGS.set_default('compilation_cache', '')


def define_training() -> None:
  """Defines the flags of training: `--damaged`, `--debug_nans` and `--wandb`."""
  define_damaged()
  flags.DEFINE_boolean('debug_nans', False, 'Stop at the line that gives the first NaN (`jax_debug_nans`); slow.')
  flags.DEFINE_string('wandb', '', 'Project of Weights & Biases that takes the metrics (extra `wandb`); empty for '
                      'none. TensorBoard events are written into the workdir wherever tensorboardX is installed.')


def read_trackers(config: Any, values: flags.FlagValues = flags.FLAGS) -> Callable:
  """Picks the trackers of a run, for `runner.run`; exits with one line if wandb is not installed."""
  if not values.wandb:
    return trackers.open_trackers
  try:
    return trackers.with_wandb(values.wandb, config_lib.flat_values(config))
  except ImportError:
    refuse("--wandb: wandb is not installed; pip install 'critkl-jax[wandb]'.")


def define_damaged() -> None:
  """Defines `--damaged`: whether a run skips damaged checkpoints or is refused."""
  flags.DEFINE_enum('damaged', 'skip', ['skip', 'refuse'], 'If the newest checkpoint is damaged: skip it and resume '
                    'from the newest whole one, or refuse.')


def define_devices() -> None:
  """Defines the flags that say on which devices a binary runs, and how its hosts find each other."""
  flags.DEFINE_string('mesh', '', 'Devices along the axes member, data and model, for example data:4,model:2; -1 '
                      'stands for all that are left. By default all devices are used: for members in a study, for data '
                      'else.')
  flags.DEFINE_boolean('multi_host', False, 'Join the processes on other hosts that SLURM, Open MPI, Cloud TPU or '
                       'Kubernetes announces.')
  flags.DEFINE_string('coordinator_address', None, 'Host and port of process 0, where the environment does not say.')
  flags.DEFINE_integer('num_processes', None, 'Number of processes, with --coordinator_address.')
  flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0, with --coordinator_address.')
  flags.DEFINE_integer('host_timeout', 100, 'Seconds without a sign of life after which a host is taken for lost.',
                       lower_bound=1)


def read_mesh(num_episodes: int, values: flags.FlagValues = flags.FLAGS) -> Mesh | None:
  """Returns the mesh for updates of `num_episodes`, None for one device; exits with one line if they do not fit."""
  try:
    sharding.mesh_sizes(values.mesh)  # before it asks for devices
    mesh = sharding.make_mesh(values.mesh or most_devices(num_episodes))
    sharding.check_episodes(mesh, num_episodes)
    if mesh.shape['member'] > 1:
      raise ValueError(f'mesh: only a study has members, got member:{mesh.shape["member"]}.')
  except ValueError as error:
    refuse(f'--{error}')
  return mesh if mesh.size > 1 else None


def most_devices(num_episodes: int) -> str:
  """Returns the default mesh: the most devices along data among which the episodes of an update divide evenly.

  Prints a note if devices are left over. On several hosts it is empty, which stands for all devices.
  """
  total = jax.device_count()
  if jax.process_count() > 1:
    return ''
  number = max(n for n in range(1, total + 1) if num_episodes % n == 0)
  if number < total:
    print(f'{number} of {total} devices: no more of them divide the {num_episodes} episodes of an update evenly.',
          flush=True)
  return f'data:{number}'


def take_cores(most: int) -> None:
  """Makes each CPU core a device, up to `most`, for members of a study side by side; accelerators are not affected.

  Call it before anything asks for devices.
  """
  if 'device_count' not in os.environ.get('XLA_FLAGS', ''):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    jax.config.update('jax_num_cpu_devices', min(cores, most))


def join_hosts(values: flags.FlagValues = flags.FLAGS) -> Callable[[], None]:
  """Joins the other hosts if flags ask for it, or exits with one line; returns a function to call at an orderly end."""
  if 'multi_host' not in values or not (values.multi_host or values.coordinator_address):
    return lambda: None
  try:
    hosts.initialize(values.coordinator_address, values.num_processes, values.process_id, values.host_timeout)
  except ValueError as error:
    refuse(f'--{error}')
  return hosts.last_words(
      f'error: another host was lost, or this process was killed. What was saved in {values.workdir} is whole, and the '
      'same command on all hosts goes on from there.')


def check_devices(values: flags.FlagValues = flags.FLAGS) -> None:
  """Exits with one line if the flags of `define_devices` are invalid on any machine."""
  parsing.check_hosts(values)
  check_mesh(values.mesh)


def check_mesh(text: str) -> None:
  """Exits with one line if the text of a mesh cannot be parsed."""
  try:
    sharding.mesh_sizes(text)
  except ValueError as error:
    refuse(f'--{error}')


def check_attention(model: config_lib.GPT2Config) -> None:
  """Exits with one line if the devices here cannot run a model's attention, which its checkpoint may name."""
  try:
    attention.check_implementation(model.attention)
  except ValueError as error:
    refuse('--' + str(error).replace("take 'auto'", 'give --attention=auto'))


def read_config(presets: dict[str, ConfigT], values: flags.FlagValues = flags.FLAGS) -> ConfigT:
  """Returns the chosen preset with the given flags; exits with one line if a value is not allowed.

  A warm-up that is longer than the run is not allowed.
  """
  preset = presets[values.preset]
  given = {name: getattr(values, name) for name in config_lib.flat_fields(type(preset))}
  try:
    config = config_lib.replace(preset, **{name: value for name, value in given.items() if value is not None})
  except ValueError as error:
    refuse(f'--{error}')
  found = config_lib.flat_values(config)
  for name, end in (('warmup_steps', 'num_steps'), ('critic_warmup', 'num_iterations')):
    if name in found and found[name] > found[end]:
      refuse(f'--{name}: expected at most {end}={found[end]}, got {found[name]}; give both.')
  return config


def run(main: Callable[..., None], check: Callable[..., Any], *arguments: str) -> None:
  """Runs a binary; errors that the user can mend end in one line without a traceback (`exits` has the exit codes).

  Args:
    main: called with the results of `check`, once the other hosts have joined.
    check: called with the positional arguments; refuses wrong input, starts no device and writes nothing.
    *arguments: names of the positional arguments, all of them required.
  """

  def guarded(argv: list[str]) -> None:
    checked = checked_line(check, arguments, argv)

    def ended():
      pass

    if 'debug_nans' in flags.FLAGS and flags.FLAGS.debug_nans:
      jax.config.update('jax_debug_nans', True)
    try:
      if flags.FLAGS.compilation_cache:
        compilation.keep_programs(flags.FLAGS.compilation_cache)
      ended = join_hosts()
      with interruption.watch(), held:  # again, since the runtime of several hosts replaces the handler of SIGTERM
        main(*checked)
    except interruption.Interrupted as reason:
      exits.end(exits.STOPPED, reason)
    except (CheckpointError, WorkdirError, storage.PathError) as error:
      refuse(error)
    except FloatingPointError as error:  # of --debug_nans
      exits.end(exits.FAILED, f'error: {error}{exits.place_of(error)}.')
    except OSError as error:
      ended()
      exits.end_now(sentence_of(error))
    except (hosts.LostHost, NonFinite) as error:
      exits.end(exits.FAILED, f'error: {error}')
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
        exits.end(exits.FAILED, f'error: out of memory ({(str(error).splitlines() or ["of the host"])[0][:200]}); take '
                  'fewer episodes or problems, or a smaller model.')
      if not hosts.may_be_lost(error):
        raise
      traceback.print_exc()
      os._exit(1)  # without waiting for the lost host; the last words say how to resume
    finally:
      ended()

  logging.set_verbosity(logging.WARNING)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  if {'-h', '-help', '--help'} & set(sys.argv[1:]):
    exits.show(help_lib.text(sys.modules['__main__'].__doc__))
    return
  with interruption.watch():
    app.run(guarded, flags_parser=parsing.parse)


def checked_line(check: Callable[..., Any], arguments: Sequence[str], argv: Sequence[str]) -> tuple[Any, ...]:
  """Calls a binary's `check` for a parsed command line and returns its results, or exits with one line."""
  if len(argv) - 1 != len(arguments):
    refuse(f'expected {" ".join(arguments)} and flags, got {argv[1:]}; see --help.' if arguments else
           f'arguments {argv[1:]} are not flags; flags start with --, see --help.')
  if flags.FLAGS['compilation_cache'].present and flags.FLAGS.compilation_cache:
    paths.read_workdir('compilation_cache', flags.FLAGS.compilation_cache)
  try:
    return check(*argv[1:])
  except (CheckpointError, WorkdirError, storage.PathError) as error:
    refuse(error)
  except OSError as error:
    refuse(f'{error.filename} cannot be read: {error.strerror}.')


def sentence_of(error: OSError) -> str:
  """Describes in one line the file that could not be read or written, the reason, and what to do."""
  reason = f'{error.strerror or error}{f": {error.filename}" if error.filename else ""}'
  space = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  advice = f'{"free some space" if space else "mend that"} and give the same command again'
  return '; '.join([f'error: {reason}', *getattr(error, '__notes__', ()), f'{advice}.'])


def _attribute_help(config_class: type, name: str) -> str:
  """Returns the description of a field from the docstring of its config or nested config."""
  for owner in config_lib.nested_classes(config_class):
    # `getdoc` strips the indentation; from Python 3.13 on `__doc__` has none either.
    match = re.search(rf'^  {name}: (.*?)(?=\n  \w+: |\n\n|\Z)', inspect.getdoc(owner) or '', re.S | re.M)
    if match:
      return re.sub(r'\s+', ' ', match.group(1)).strip()
  raise ValueError(f'{config_class.__name__}: no docstring describes the field {name!r}.')
