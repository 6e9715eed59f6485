"""Binaries as a user starts them, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys

from compilation import QUICK

ROOT = pathlib.Path(__file__).parents[1]


def start(binary, *flags, devices=1, quick=None):
  flags_of_xla = []
  if binary not in ('analyze', 'compare_checkpoints') if quick is None else quick:
    flags_of_xla.append(QUICK)
  if devices:
    flags_of_xla.append(f'--xla_force_host_platform_device_count={devices}')
  return subprocess.Popen(
      [sys.executable, '-m', f'experiments.{binary}', *map(str, flags)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(flags_of_xla)})


def finish(process):
  out, err = process.communicate(timeout=400)
  return process.returncode, out, err


def run(binary, *flags, devices=1, quick=None):
  code, out, err = finish(start(binary, *flags, devices=devices, quick=quick))
  assert code == 0, err
  return out


def refused(binary, *flags):
  """Returns the one line that a binary says before it ends with status 2."""
  code, out, err = finish(start(binary, *flags))
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  assert code == 2, (out, err)
  assert len(lines) == 1
  assert 'Traceback' not in err
  return lines[0]


def metrics(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in row.items() if name not in ('seconds', 'tokens_per_second')} for row in rows]
