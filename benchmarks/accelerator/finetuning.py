"""Part 5: the default fine-tuning command, in its own process; this process uses no device."""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks.accelerator.child import Report

FLAGS = {'full': (), 'smoke': ('--preset=smoke',)}


def measure(report: Report) -> None:
  """Reports the seconds of `experiments.finetune`, from start to end, and its accuracies.

  Raises:
    CalledProcessError: if the command fails.
    TimeoutExpired: shortly before this part is stopped; the last metrics are reported.
  """
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / 'finetune'
    command = [sys.executable, '-m', 'experiments.finetune', f'--workdir={workdir}', *FLAGS[report.preset]]
    start = time.monotonic()
    try:
      subprocess.run(command, check=True, timeout=max(report.seconds_left() - 2, 1))
    except subprocess.TimeoutExpired:
      report.add('so_far', **last_metrics(workdir))
      raise
    wall_seconds, summary = time.monotonic() - start, json.loads((workdir / 'summary.json').read_text())
    report.add('finetune', wall_seconds=wall_seconds, iterations_seconds=summary['seconds']['all_iterations'],
               compilation_seconds=summary['seconds']['compilation_in_this_command'],
               tokens_sampled=summary['tokens_sampled'], device=summary['device'])
    report.add('accuracy', **summary['accuracy'])
    report.add('last_iteration', **last_metrics(workdir))


def last_metrics(workdir: pathlib.Path) -> dict[str, float]:
  """Returns the main metrics of the last iteration, with its `step`."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.is_file() else []
  row = json.loads(lines[-1]) if lines else {'step': 0}
  return {name: row[name] for name in ('step', 'accuracy', 'kl', 'entropy', 'seconds', 'tokens_per_second')
          if name in row}
