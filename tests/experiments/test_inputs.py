"""Every binary refuses wrong input in one line that names the flag, before anything is started or written."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
from processes import ROOT, finish, start

from experiments.__main__ import programs

SHIPPED = str(ROOT / 'critkl_jax' / 'checkpoints' / 'addition_n5')
BINARIES = sorted(programs())
TRAINING = ('finetune', 'sweep')
ARGUMENTS = {'compare_checkpoints': [SHIPPED, SHIPPED]}

# Invalid flags -> words of the error. FOLDER holds a file, a broken link, and a folder of broken files.
WORKDIRS = {
    '--workdir=': 'expected a directory, got an empty name',
    '--workdir=FOLDER/file': 'not a directory',
    '--workdir=FOLDER/file/under': 'not a directory',
    '--workdir=FOLDER/link': 'not a directory',
    f'--workdir=FOLDER/{"x" * 300}': 'file name too long',
    f'--workdir=FOLDER/none/{"x" * 300}': 'file name too long',
    '--workdir=FOLDER' + '/x' * 2000: 'file name too long',
    '--workdir=/proc/none': 'cannot be written',
}
FILES = {
    '--json=': 'expected a file, got an empty name',
    '--json=FOLDER': 'expected a file, got the directory',
    '--json=FOLDER/none/table.json': 'there is no directory',
    '--json=FOLDER/file/table.json': 'not a directory',
    f'--json=FOLDER/{"x" * 250}': 'file name too long',
    '--json=/proc/table.json': 'cannot be written',
    '--json=FOLDER/file': 'this command did not write it',
}
TRAINED = {
    '--compilation_cache=FOLDER/file': '--compilation_cache: FOLDER/file cannot be written',
    '--seed=-1': '--seed: expected 0 or more', '--seed=4294967296': '--seed: expected a whole number up to 4294967295',
    f'--seed={2**70}': '--seed: expected a whole number up to', '--eval_problems=1099511627776': '--eval_problems',
    '--eval_problems=2000000': '0 to 1000000', f'--eval_problems={"9" * 5000}': 'expected a whole number',
    '--learning_rate=1e400': '--learning_rate: expected a finite number', '--learning_rate=nan': 'finite number',
    '--max_grad_norm=inf': 'finite number', '--learning_rate=1e-320': 'float32',
    '--attention=cudnn': "needs dtype='bfloat16'", '--mesh=data:²': '--mesh: expected sizes of',
    '--mesh=,': '--mesh: expected sizes of', '--mesh=data:2,': '--mesh: expected sizes of',
    '--mesh=date:2': '--mesh: expected sizes of', '--coordinator_address=here': 'expected a host and its port',
    '--coordinator_address=here:0': 'expected a host and its port', '--coordinator_address=': 'a host and its port',
    '--coordinator_address=a b:80': 'a host and its port', '--process_id=1': 'means nothing without',
    '--lr=1': 'the nearest is --learning_rate', '--preset=smal': 'the nearest is small',
    '--save_every=0': '1 or more', '--dtype=float16': "'float16'", '--remat=maybe': 'expected true or false',
    '--noremat=1': 'does not take an argument',
}
FINETUNED = TRAINED | {
    f'--{name}={value}': f'--{name}: expected a finite number'
    for name in ('temperature', 'certainty_intercept', 'certainty_exponent', 'kl_coefficient', 'wrong_reward',
                 'entropy_coefficient', 'clip_ratio', 'value_clip', 'gate_fraction') for value in ('inf', '-inf', 'nan')
} | {
    '--temperature=1e-320': 'float32', '--temperature=1e-9': '1e-06 to', '--certainty_temperature=1e-320': 'float32',
    '--extra_digits=1000000000': '--extra_digits: expected 0 to 1000', '--extra_digits=900': 'need a context of',
    '--critic_warmup=13': "--critic_warmup: has no effect with advantage='group_relative', got 13; leave it out, or "
                          "set advantage='gae'.", '--certainty_ensemble=,,,': 'separated by commas',
    '--kl=none --kl_coefficient=5': "--kl_coefficient: has no effect with kl='none', got 5.0",
    '--kl=none --kl_coefficient=0.5': "--kl_coefficient: has no effect with kl='none', got 0.5",
    '--kl=standard --certainty_exponent=500': "--certainty_exponent: has no effect with kl='standard'",
    '--algorithm=a2c --clip_ratio=.1': "--clip_ratio: has no effect with algorithm='a2c'",
    '--gae_lambda=.9': "--gae_lambda: has no effect with advantage='group_relative'",
    '--preset=paper --advantage=leave_one_out --gae_lambda=.95': '--gae_lambda: has no effect',
    '--value_coefficient=1': '--value_coefficient: has no effect', '--value_head=mlp': '--value_head: has no effect',
    '--gate_threshold=.5': "--gate_threshold: has no effect with kl_gate='none'",
    '--rollout=cached --window=8': '--window: has no effect',
    '--reference=FOLDER/none': 'no such directory', '--reference=FOLDER': 'no complete checkpoint',
    '--reference=FOLDER/file': 'no such directory', f'--reference={"x" * 300}': 'cannot be read',
    '--model=FOLDER': "--model: has no effect with task='addition'", '--task=question': "the nearest is 'questions'",
    '--task=questions': "--prompts: the task 'questions' needs a file", '--stop=x': '--stop: has no effect',
    '--task=questions --prompts=FOLDER/file': "'questions' needs a reference for it", '--chat': '--chat: has no effect',
    '--task=questions --prompts=FOLDER/file --model=FOLDER': '--model: FOLDER: has no config.json',
    '--task=questions --prompts=p --extra_digits=2': "--extra_digits: has no effect with task='questions'",
    '--task=questions --prompts=p --model=m --reference=r': '--model: its weights are the reference',
    '--task=questions --prompts=p --chat_options=[] --chat': '--chat_options: expected a JSON object',
    '--kl=standart': "the nearest is 'standard'", '--beta=1': 'the nearest is --certainty_exponent',
}
BAD = {
    'finetune': WORKDIRS | FINETUNED,
    'sweep': WORKDIRS | FINETUNED | {
        '--certainty_exponents=1,1.0,1e0': '--certainty_exponents: 1 appears twice',
        '--penalties=standard,standard': '--penalties: expected none twice',
        '--penalties=standard,nome': "--penalties: expected one of ('prioritized', 'standard', 'none'), got 'nome'",
        '--penalties=standard,none --certainty_exponents=1,2': '--certainty_exponents: has no effect with kl=',
        '--penalties=standard,none --certainty_exponent=10': '--certainty_exponent: has no effect on any member',
        '--certainty_exponents=': 'numbers separated by commas', '--kl_coefficients=1,,2': 'separated by commas',
        '--temperatures=a': '--temperatures: expected numbers', '--temperatures=1,inf': '--temperatures: expected numb',
        '--learning_rates=-1': '--learning_rates: expected a positive', '--penalties=': '--penalties: expected names',
        '--seeds=1000000000': 'are more than a study takes', '--seeds=0': '--seeds=0',
        '--population_map=vmapp': 'the nearest is vmap'},
    'pretrain': WORKDIRS | TRAINED | {
        '--vocab_size=5': '--vocab_size: the task has 41 tokens, got a model of 5',
        '--vocab_size=50257': 'the task has 41 tokens, got a model of 50257; ',
        '--known_digits=1000000000': '1 to 1000', '--known_facts=3': "has no effect with task='addition'",
        '--preset=stories --known_facts=30': '--context_length: N+4 = 34 facts', '--task=story': "nearest is 'stories'",
        '--known_digits=900': '--context_length: N+2 = 902', '--warmup_steps=2401': 'expected at most num_steps=2400',
        '--num_layers=1000000000': '1 to 10000', '--weight_decay=inf': 'finite number'},
    'evaluate': FILES | {
        '--temperature=nan': '--temperature', '--temperature=inf': '--temperature', '--temperature=1e-320': 'range',
        '--digits=a': '--digits: expected whole numbers', '--digits=': '--digits', '--digits=0': '1 to 1000',
        '--facts=6': "--facts: has no effect on the task 'addition'", '--reward=f1': 'without --model',
        '--digits=5,5': '5 appears twice', '--digits=1000000000': '1 to 1000', '--digits=300': 'need a context',
        f'--digits={"9" * 5000}': '--digits', f'--seed={2**64}': '--seed', f'--num_problems={2**40}': '--num_problems',
        '--checkpoint=': 'expected a path', '--checkpoint=FOLDER/none': 'no such directory', '--step=3': 'no step 3',
        '--model=FOLDER': '--model: needs --task=questions and --prompts=FILE', '--task=questions': 'without --model',
        '--model=FOLDER --task=questions --prompts=FOLDER/file': '--model: FOLDER: has no config.json',
        '--distribution=vary': 'the nearest is varying', f'--checkpoint={"x" * 300}': 'cannot be read'},
    'analyze': WORKDIRS | {
        '--model=FOLDER --task=questions --prompts=FOLDER/file': '--model: FOLDER: has no config.json',
        '--model=FOLDER': 'needs --task=questions', '--workdir=FOLDER/broken': 'analysis.json',
        '--digits=a': '--digits: expected whole numbers', '--digits=1000000000': '1 to 1000', '--digits=400': 'context',
        '--checkpoints=': '--checkpoints: expected names', '--checkpoints=a,,b': '--checkpoints: expected names',
        '--checkpoints=FOLDER/none': 'no such directory', '--reference=': '--reference: expected a path',
        '--reference=FOLDER': 'no complete checkpoint', '--threshold=nan': '--threshold', '--quantile=inf': 'quantile',
        f'--problems={2**40}': '--problems', '--responses=greed': 'the nearest is greedy', f'--seed={2**64}': '--seed'},
    'compare_checkpoints': WORKDIRS | {
        '--workdir=FOLDER/broken': 'comparison.json',
        '--digits=a': '--digits: expected whole numbers', '--digits=1000000000': '1 to 1000', '--digits=400': 'context',
        f'--problems={2**40}': '--problems', f'--seed={2**64}': '--seed', '--problem=1': 'the nearest is --problems'},
    'compile_only': FILES | {
        '--topology=v5:2x2': "the nearest is 'v5", '--topology=': '--topology: expected one of',
        '--topology=v5e:twoxtwo': '--topology', '--mesh=data:²': '--mesh', '--mesh=,': '--mesh',
        '--extra_digits=900': 'need a context', '--members=1000000000': '--members', '--preset=released': 'no sizes',
        '--model=qwen': 'The nearest of the names', '--response_length=9': '--response_length: has no effect on',
        '--model=qwen3_0_6b --response_length=50000': 'need a context of'},
    'export': {
        f'--directory{flag.removeprefix("--workdir")}': words for flag, words in WORKDIRS.items()} | {
        '--directory=FOLDER': 'exists, and is kept',
        '--directory=FOLDER/new --checkpoint=': 'expected a path', '--checkpoint=FOLDER': 'no complete checkpoint',
        '--directory=FOLDER/new --checkpoint=FOLDER/none': 'no such directory',
        '--directory=FOLDER/new --step=3': 'no step 3', '--directory=FOLDER/new --dtype=int8': 'the nearest is',
        '--folder=FOLDER/new': 'the nearest is'},
    'reproduce': WORKDIRS | {
        '--workdir=FOLDER/broken': 'studies.json',
        '--study=': '--study: expected names', '--study=drif': "the nearest is 'drift'", '--study=drift,,': '--study',
        '--study=natural_language': 'give --preset=stories', '--study=drift --preset=stories': 'give --preset=tiny',
        '--minutes=nan': '--minutes', '--minutes=-1': '--minutes', '--seeds=0': '--seeds',
        f'--problems={2**40}': '--problems', '--preset=tini': 'the nearest is tiny'},
}


def checked(binary, lines, examples=0):
  """Checks command lines in one process and returns their outcomes; see command_lines.py."""
  done = subprocess.run(
      [sys.executable, ROOT / 'tests' / 'experiments' / 'command_lines.py', binary, str(examples)],
      input=json.dumps(lines), text=True, capture_output=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def children_seconds():
  """Returns CPU seconds of child processes, which depend less on the load of the machine than wall-clock time."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def assert_passed_or_refused(found):
  assert not found['raised'], found
  assert not found['left'], found
  assert not found['devices'], found
  assert found['code'] in (0, 2), found
  if found['code']:
    assert found['said'].startswith('error: '), found
    assert found['said'].count('\n') == 1, found


@pytest.mark.parametrize('binary', [
    binary if binary == 'finetune' else pytest.param(binary, marks=pytest.mark.slow) for binary in BINARIES])
def test_what_cannot_be_is_refused_by_the_name_of_its_flag(binary):
  lines = [[*re.split(' (?=--)', line), *ARGUMENTS.get(binary, [])] for line in BAD[binary]]
  found = checked(binary, [[*ARGUMENTS.get(binary, [])], *lines])
  if binary != 'compile_only':  # its compiler is seldom installed
    assert found[0]['code'] == 0, found[0]
  for one, words in zip(found[1:], BAD[binary].values(), strict=True):
    assert_passed_or_refused(one)
    assert one['code'] == 2, one
    assert words in one['said'].replace(one['folder'], 'FOLDER'), (words, one)
    assert one['seconds'] < 1, one


def test_every_binary_has_wrong_command_lines():
  assert sorted(BAD) == BINARIES
  assert all(len(lines) > 12 for lines in BAD.values())


@pytest.mark.slow
@pytest.mark.parametrize('binary', BINARIES)
def test_any_command_line_passes_or_is_refused_in_one_line(binary):
  found = checked(binary, [], examples=150)
  assert len(found) >= 100
  for one in found:
    assert_passed_or_refused(one)
  assert sum(one['code'] == 2 for one in found) > 50


@pytest.mark.slow
@pytest.mark.parametrize('binary', BINARIES)
def test_a_process_refuses_in_time_with_status_2_and_leaves_nothing(binary, tmp_path):
  (tmp_path / 'file').touch()
  lines = [['--lr=1'], [next(flag for flag in BAD[binary] if 'FOLDER/file' in flag).replace('FOLDER', str(tmp_path))],
           [next(flag for flag in BAD[binary] if '=FOLDER' not in flag and '=/' not in flag)]]
  for line in lines:
    before = children_seconds()
    code, out, err = finish(start(binary, *line, *ARGUMENTS.get(binary, []), cwd=tmp_path))
    assert (code, out) == (2, ''), (line, out, err)
    assert err.startswith('error: '), err
    assert err.count('\n') == 1, err
    assert children_seconds() - before < 6  # on one core: 2 to 3 on an idle machine
    assert [path.name for path in tmp_path.iterdir()] == ['file']
