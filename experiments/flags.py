"""Defines command-line flags from config dataclasses, and runs binaries with shared flags and error handling."""

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

from critkl_jax import config as config_lib
from critkl_jax import sharding
from critkl_jax.models import attention
from critkl_jax.models.architectures import ModelConfig
from critkl_jax.runtime import compilation, hosts, interruption, storage, trackers
from critkl_jax.runtime.checkpoint import CheckpointError
from critkl_jax.runtime.storage import WorkdirError
from critkl_jax.tasks.questions import TextFinetuning
from critkl_jax.tasks.questions.sources import is_gym
from critkl_jax.tasks.rewards import RewardError, RewardPool
from critkl_jax.training.config import MachineConfig
from critkl_jax.training.finite import NonFinite

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

  A flag that is not given leaves the preset's value, so defaults exist only in the presets.
  """
  flags.DEFINE_enum('preset', default_preset, list(presets), 'Named settings; the other flags change single fields.')
  for name, field in config_lib.flat_fields(config_class).items():
    default = config_lib.flat_values(presets[default_preset])[name]
    help_text = f'{_attribute_help(config_class, name)} ({default_preset}: {default!r})'
    _DEFINE[field.type](name, None, help_text)


def keep_no_programs() -> None:
  """Makes an empty `--compilation_cache` the default, for binaries that measure compilation."""
  flags.FLAGS.set_default('compilation_cache', '')


def define_training() -> None:
  """Defines the flags of training: `--damaged`, `--debug_nans` and `--wandb`."""
  define_damaged()
  flags.DEFINE_boolean('debug_nans', False, 'Stop at the line that gives the first NaN (`jax_debug_nans`); slow.')
  flags.DEFINE_string('wandb', '', 'Project of Weights & Biases that takes the metrics (extra `wandb`); empty for '
                      'none. TensorBoard events are written into the workdir wherever tensorboardX is installed.')


def read_trackers(config: Any, values: flags.FlagValues = flags.FLAGS) -> Callable:
  """Returns the function that opens a run's trackers, or exits with one line if wandb is needed and missing."""
  if not values.wandb:
    return trackers.open_trackers
  try:
    return trackers.with_wandb(values.wandb, config_lib.flat_values(config))
  except ImportError:
    refuse("--wandb: wandb is not installed; pip install 'critkl-jax[wandb]'.")


def define_damaged() -> None:
  """Defines `--damaged`: whether a run skips damaged checkpoints or refuses to resume."""
  flags.DEFINE_enum('damaged', 'skip', ['skip', 'refuse'], 'If the newest checkpoint is damaged: skip it and resume '
                    'from the newest whole one, or refuse.')


def define_imported() -> None:
  """Defines the flags for a model directory that is not a checkpoint yet, and for the task that it is read with."""
  flags.DEFINE_string('task', None, 'Task to read --model with: questions, or reasoning_gym:NAME; a checkpoint names '
                      'its own.')
  for name, field in config_lib.flat_fields(TextFinetuning).items():
    _DEFINE[field.type](name, None, f'{_attribute_help(TextFinetuning, name)} ({field.default!r})')
  fields = config_lib.flat_fields(MachineConfig)
  for name, least in (('reward_workers', 0), ('reward_seconds', 1e-3)):
    _DEFINE[fields[name].type](name, fields[name].default, _attribute_help(MachineConfig, name), lower_bound=least)


def pool_of_flags(values: flags.FlagValues = flags.FLAGS) -> RewardPool:
  """Returns the pool of the flags of `define_imported`."""
  return RewardPool(values.reward_workers, values.reward_seconds)


def read_imported(values: flags.FlagValues = flags.FLAGS) -> TextFinetuning | None:
  """Returns the settings of the flags of `define_imported`, None without `--model`; exits with one line if they are
  wrong."""
  given = {name: values[name].value for name in ('task', *config_lib.flat_fields(TextFinetuning))}
  given = named_dataset({name: value for name, value in given.items() if value is not None})
  if not given:
    return None
  if given.get('model') == '':
    refuse('--model: expected a directory, got an empty name.')
  if 'model' not in given:
    refuse(f'--{next(iter(given))}: has no effect without --model: a checkpoint names its task.')
  if given.pop('task', None) != 'questions' or not given.get('prompts'):
    refuse('--model: needs --task=questions and --prompts=FILE: a model directory names no task.')
  try:
    return TextFinetuning(**given)
  except ValueError as error:
    refuse(f'--{error}')


def named_dataset(given: dict[str, Any]) -> dict[str, Any]:
  """Returns given values with `--task=reasoning_gym:NAME` as the task `questions` with these prompts."""
  if not is_gym(given.get('task') or ''):
    return given
  if given.get('prompts'):
    refuse(f'--prompts: has no effect with --task={given["task"]}; leave it out.')
  return given | {'task': 'questions', 'prompts': given['task']}


def define_devices() -> None:
  """Defines the flags for the devices of a binary, and for joining its hosts."""
  flags.DEFINE_string('mesh', '', 'Devices along the axes member, data and model, for example data:4,model:2; -1 '
                      'stands for all remaining devices. By default all devices are used: for members in a sweep, for '
                      'data otherwise.')
  flags.DEFINE_boolean('multi_host', False, 'Join the processes on other hosts, which SLURM, Open MPI, Cloud TPU or '
                       'Kubernetes defines.')
  flags.DEFINE_string('coordinator_address', None, 'Host and port of process 0, if the environment does not define it.')
  flags.DEFINE_integer('num_processes', None, 'Number of processes, with --coordinator_address.')
  flags.DEFINE_integer('process_id', None, 'Index of this process, from 0, with --coordinator_address.')
  flags.DEFINE_integer('host_timeout', 100, 'Seconds without a heartbeat after which a host counts as lost.',
                       lower_bound=1)


def read_mesh(num_episodes: int, values: flags.FlagValues = flags.FLAGS) -> Mesh | None:
  """Returns the mesh for updates of `num_episodes`, None for one device; exits with one line if the two do not fit."""
  try:
    sharding.mesh_sizes(values.mesh)  # parses the text before devices are started
    mesh = sharding.make_mesh(values.mesh or default_mesh(num_episodes))
    sharding.check_episodes(mesh, num_episodes)
    if mesh.shape['member'] > 1:
      raise ValueError(f'mesh: only a study has members, got member:{mesh.shape["member"]}.')
  except ValueError as error:
    refuse(f'--{error}')
  return mesh if mesh.size > 1 else None


def default_mesh(num_episodes: int) -> str:
  """Returns the default mesh: along data, the most devices that divide the episodes of an update evenly.

  Prints a note if devices are left over. On several hosts it returns an empty text, which means all devices.
  """
  total = jax.device_count()
  if jax.process_count() > 1:
    return ''
  number = max(n for n in range(1, total + 1) if num_episodes % n == 0)
  if number < total:
    print(f'{number} of {total} devices: no more of them divide the {num_episodes} episodes of an update evenly.',
          flush=True)
  return f'data:{number}'


def use_cores_as_devices(most: int) -> None:
  """Makes each CPU core a JAX device, up to `most`, so that members of a study run in parallel.

  Does not affect accelerators. Call it before anything asks for devices.
  """
  if 'device_count' not in os.environ.get('XLA_FLAGS', ''):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    jax.config.update('jax_num_cpu_devices', min(cores, most))


def join_hosts(values: flags.FlagValues = flags.FLAGS) -> Callable[[], None]:
  """Joins the other hosts if the flags ask for it; returns a function to call at an orderly end.

  Exits with one line if the flags are wrong.
  """
  if 'multi_host' not in values or not (values.multi_host or values.coordinator_address):
    return lambda: None
  try:
    hosts.initialize(values.coordinator_address, values.num_processes, values.process_id, values.host_timeout)
  except ValueError as error:
    refuse(f'--{error}')
  return hosts.last_words(
      f'error: another host was lost, or this process was killed. What was saved in {values.workdir} is whole, and the '
      'same command on all hosts resumes from there.')


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


def check_attention(model: ModelConfig) -> None:
  """Exits with one line if the devices here cannot run a model's attention."""
  try:
    attention.check_implementation(model.attention)
  except ValueError as error:
    refuse('--' + str(error).replace("take 'auto'", 'give --attention=auto'))


def read_config(presets: dict[str, ConfigT], values: flags.FlagValues = flags.FLAGS, without: Sequence[str] = ()
                ) -> ConfigT:
  """Returns the chosen preset, changed by the given flags; exits with one line if a value is not allowed.

  A warm-up must not be longer than the run.

  Args:
    presets: the presets by name.
    values: the flags.
    without: fields whose flags the binary reads itself.
  """
  preset = presets[values.preset]
  given = {name: getattr(values, name) for name in config_lib.flat_fields(type(preset)) if name not in without}
  try:
    config = config_lib.replace(preset, **named_dataset({k: v for k, v in given.items() if v is not None}))
  except ValueError as error:
    refuse(f'--{error}')
  found = config_lib.flat_values(config)
  for name, end in (('warmup_steps', 'num_steps'), ('critic_warmup', 'num_iterations')):
    if name in found and found[name] > found[end]:
      refuse(f'--{name}: expected at most {end}={found[end]}, got {found[name]}; give both.')
  return config


def run(main: Callable[..., None], check: Callable[..., Any], *arguments: str) -> None:
  """Runs a binary; errors that the user can fix end it with one line and an exit code of `exits`.

  Args:
    main: called with the results of `check`, once the other hosts have joined.
    check: called with the positional arguments; refuses wrong input, starts no device and writes nothing.
    *arguments: names of the positional arguments, which are all required.
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
      with interruption.watch(), held:  # again: JAX's distributed runtime replaces the handler of SIGTERM
        main(*checked)
    except interruption.Interrupted as reason:
      exits.end(exits.STOPPED, reason)
    except (CheckpointError, WorkdirError, storage.PathError) as error:
      refuse(error)
    except FloatingPointError as error:  # from --debug_nans
      exits.end(exits.FAILED, f'error: {error}{exits.place_of(error)}.')
    except OSError as error:
      ended()
      exits.end_now(sentence_of(error))
    except (hosts.LostHost, NonFinite) as error:
      exits.end(exits.FAILED, f'error: {error}')
    except RewardError as error:
      exits.end(exits.FAILED, '; '.join([f'error: {str(error).rstrip(".")}', *getattr(error, '__notes__', ())]) + '.')
    except (MemoryError, jax.errors.JaxRuntimeError, ValueError) as error:
      if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
        exits.end(exits.FAILED, f'error: out of memory ({(str(error).splitlines() or ["of the host"])[0][:200]}); take '
                  'fewer episodes or problems, or a smaller model.')
      if not hosts.may_be_lost(error):
        raise
      traceback.print_exc()
      os._exit(1)  # without waiting for the lost host; `hosts.last_words` prints how to resume
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
  """Formats an error of a file in one line: the reason, the file, and what to do."""
  reason = f'{error.strerror or error}{f": {error.filename}" if error.filename else ""}'
  space = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  advice = f'{"free some space" if space else "fix that"} and give the same command again'
  return '; '.join([f'error: {reason}', *getattr(error, '__notes__', ()), f'{advice}.'])


def _attribute_help(config_class: type, name: str) -> str:
  """Returns the description of a field, from the docstring of its config, of a base class or of a nested config."""
  for owner in config_lib.classes_of(config_class):
    # `getdoc` strips the indentation; from Python 3.13 on `__doc__` has none either.
    match = re.search(rf'^  {name}: (.*?)(?=\n  \w+: |\n\n|\Z)', inspect.getdoc(owner) or '', re.S | re.M)
    if match:
      return re.sub(r'\s+', ' ', match.group(1)).strip()
  raise ValueError(f'{config_class.__name__}: no docstring describes the field {name!r}.')
