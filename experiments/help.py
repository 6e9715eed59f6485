"""Formats the text of `--help`: a binary's flags in groups, the most used ones first."""

import re
import sys
import textwrap
from typing import Any

from absl import flags

# Group -> its flags; a flag in no group is specific to the binary, and comes first.
GROUPS = {
    'Task': ('task', 'extra_digits', 'known_digits', 'wrong_reward', 'pad_vocabulary', 'extra_facts', 'known_facts',
             'asks', 'model', 'prompts', 'chat', 'chat_options', 'stop', 'response_length', 'held_out', 'reward',
             'reward_weights', 'reward_workers', 'reward_seconds', 'success', 'dataset_options', 'eval_problems'),
    'KL penalty': ('kl', 'kl_coefficient', 'kl_estimator', 'kl_placement', 'certainty', 'certainty_exponent',
                   'certainty_intercept', 'certainty_temperature', 'certainty_ensemble', 'kl_gate', 'gate_threshold',
                   'gate_fraction'),
    'Algorithm': ('algorithm', 'learning_rate', 'advantage', 'clip_ratio', 'clip_ratio_high', 'dual_clip', 'ratio',
                  'aggregation', 'aggregation_length', 'entropy_coefficient', 'temperature', 'max_grad_norm',
                  'optimizer', 'warmup_steps', 'final_learning_rate', 'weight_decay', 'hidden_only',
                  'value_coefficient', 'value_clip', 'value_head', 'value_head_detached', 'critic_warmup',
                  'whiten_advantages', 'discount', 'gae_lambda', 'bootstrap_truncated'),
    'Sizes': ('num_iterations', 'episodes', 'episodes_per_problem', 'epochs', 'minibatches', 'num_steps', 'batch_size',
              'architecture', 'vocab_size', 'context_length', 'num_layers', 'num_heads', 'width'),
    'Devices': ('mesh', 'dtype', 'attention', 'remat', 'scan_layers', 'rollout', 'window', 'population_map',
                'multi_host', 'coordinator_address', 'num_processes', 'process_id', 'host_timeout'),
    'Run': ('reference', 'seed', 'save_every', 'max_to_keep', 'damaged', 'max_skipped', 'debug_nans',
            'compilation_cache', 'wandb'),
}
_WIDTH = 100


def text(description: str, values: flags.FlagValues = flags.FLAGS) -> str:
  """Returns the help of the running binary.

  Args:
    description: the binary's docstring.
    values: the flags, of which the binary's key flags are shown.
  """
  own = {flag.name: flag for flag in values.get_key_flags_for_module(sys.argv[0])}
  own['compilation_cache'] = values['compilation_cache']
  grouped = {name for names in GROUPS.values() for name in names}
  groups = {'This command': [name for name in own if name not in grouped]} | GROUPS
  parts = [description.strip()]
  for title, names in groups.items():
    shown = [_flag(own[name]) for name in names if name in own]
    if shown:
      parts.append('\n'.join([f'{title}:', *shown]))
  return '\n\n'.join(parts) + '\n\nFlags of logging and of the parser: --helpfull.'


def _flag(flag: Any) -> str:
  """Formats one flag: a line with its name and values, then its description."""
  kind = '|'.join(flag.parser.enum_values) if hasattr(flag.parser, 'enum_values') else {
      'bool': '', 'int': 'N', 'float': 'X', 'string': 'TEXT', 'comma separated list of strings': 'A,B,...',
      'multi string enum': 'NAME'}.get(flag.flag_type(), 'TEXT')
  name = f'  --[no]{flag.name}' if flag.boolean else f'  --{flag.name}={kind}'
  default = '' if flag.default in (None, '', False) else f' (default: {flag.default_as_str.strip(chr(39))})'
  sentence = re.sub(r'\s+', ' ', re.sub(r'^<.*?>: ', '', f'{flag.help}{default}'))
  return '\n'.join([name, *textwrap.wrap(sentence, _WIDTH, initial_indent=' ' * 6, subsequent_indent=' ' * 6)])
