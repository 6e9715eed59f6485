"""Writes a checkpoint as a Hugging Face model directory, for `transformers` and everything that reads its format.

    python -m experiments.export --checkpoint=runs/questions --directory=runs/model --dtype=bfloat16

The critic is left out. Files of the tokenizer are copied from the model directory that the run started from.
"""

import pathlib
import shutil
import tempfile

import jax
from absl import flags

from critkl_jax import sharding
from critkl_jax.analysis.reading import model_of
from critkl_jax.models import huggingface
from critkl_jax.runtime import checkpoint, hosts, storage
from critkl_jax.tasks.questions import Questions

from . import paths
from .exits import refuse
from .flags import run

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', str(checkpoint.SHIPPED_REFERENCE), 'Workdir, checkpoint directory or step directory.')
STEP = flags.DEFINE_integer('step', None, 'Step of a run; the latest if not given.')
DIRECTORY = flags.DEFINE_string('directory', 'runs/model', 'Directory to write; it must not exist, or be empty.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Type of the numbers in the file.')
# Files of a tokenizer, of which a model directory has some.
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json',
                   'chat_template.jinja', 'vocab.json', 'merges.txt', 'added_tokens.json', 'tokenizer.model')


def check() -> tuple[checkpoint.Checkpoint, pathlib.Path]:
  """Checks the flags and returns the arguments of `main`, or exits with one line; reads no parameters."""
  if not CHECKPOINT.value:
    refuse('--checkpoint: expected a path, got an empty one.')
  directory = paths.read_workdir('directory', DIRECTORY.value)
  if storage.is_remote(directory):
    refuse(f'--directory: {directory}: a model is written on this machine; give a directory here, and copy it.')
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    refuse(f'--directory: {directory} exists, and is kept; give another one.')
  found = checkpoint.find_checkpoint(CHECKPOINT.value, STEP.value)
  checkpoint.model_of(found.path, found.info, None)  # an unknown architecture is refused
  return found, directory


def main(found: checkpoint.Checkpoint, directory: pathlib.Path) -> None:
  """Reads the checkpoint and writes the directory, which appears once it is complete."""
  loaded = checkpoint.load_checkpoint(found.path)
  model, task, directory = model_of(loaded), loaded.info.task, directory.absolute()
  home = pathlib.Path(task.tokenizer) if isinstance(task, Questions) else None
  copied = [name for name in TOKENIZER_FILES if home and (home / name).is_file()]
  directory.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f'.{directory.name}-', dir=directory.parent) as scratch:
    unfinished = pathlib.Path(scratch) / 'model'
    huggingface.save_pretrained(unfinished, model, loaded.params, dtype=DTYPE.value)
    for name in copied:
      shutil.copyfile(home / name, unfinished / name)
    if home:
      name_special_tokens(unfinished / 'config.json', home / 'config.json')
    if directory.exists():
      directory.rmdir()  # it is empty
    unfinished.rename(directory)
  number = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(loaded.params)
               if not model.is_critic(sharding.path_names(path)))
  hosts.say(f'{directory}: {model.name}, step {loaded.step} of {loaded.path.parent}, {number:,} parameters without the '
            f'critic, {DTYPE.value}.')
  if isinstance(task, Questions) and 'tokenizer.json' not in copied:
    hosts.say(f'{task.tokenizer} has no tokenizer.json any more: copy the files of the tokenizer yourself.')
  elif not home:
    hosts.say('The model has a vocabulary of characters; no file of a tokenizer was written.')


def name_special_tokens(file: pathlib.Path, original: pathlib.Path) -> None:
  """Copies the ids of special tokens from the original config.json, if it is there."""
  values = storage.read_json(original, advice='restore it') if original.is_file() else {}
  named = {name: values[name] for name in ('bos_token_id', 'eos_token_id', 'pad_token_id') if name in values}
  storage.write_json(file, storage.read_json(file) | named)


if __name__ == '__main__':
  run(main, check)
