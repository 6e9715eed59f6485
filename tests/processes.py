"""Binaries as a user starts them, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys

from compilation import QUICK

ROOT = pathlib.Path(__file__).parents[1]


def start(binary, *flags, devices=1, quick=None, cwd=ROOT, command=()):
  command, flags_of_xla = command or ('-m', f'experiments.{binary}'), []
  if binary not in ('analyze', 'compare_checkpoints') if quick is None else quick:
    flags_of_xla.append(QUICK)
  if devices:
    flags_of_xla.append(f'--xla_force_host_platform_device_count={devices}')
  return subprocess.Popen(
      [sys.executable, *command, *map(str, flags)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(flags_of_xla)})


def catches(process, number):
  """Returns whether a process has a handler for a signal, as Linux knows; an ended one has none."""
  status = pathlib.Path(f'/proc/{process.pid}/status')
  caught = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith('SigCgt')), '0')
  return bool(int(caught, 16) >> (number - 1) & 1)


def finish(process):
  out, err = process.communicate(timeout=400)
  return process.returncode, out, err


def run(binary, *flags, devices=1, quick=None, cwd=ROOT):
  code, out, err = finish(start(binary, *flags, devices=devices, quick=quick, cwd=cwd))
  assert code == 0, err
  return out


def refused(binary, *flags, status=2, cwd=ROOT):
  """Returns the one line that a binary says before it ends with this status."""
  code, out, err = finish(start(binary, *flags, cwd=cwd))
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  assert code == status, (out, err)
  assert len(lines) == 1
  assert 'Traceback' not in err
  return lines[0]


def metrics(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in row.items() if name not in ('seconds', 'tokens_per_second')} for row in rows]
