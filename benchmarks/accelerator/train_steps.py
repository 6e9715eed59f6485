"""Part 4: seconds of each part of an iteration, and the fraction of the FLOP/s of matrix products that it reaches."""

from benchmarks import timing, train_step
from benchmarks.accelerator.child import Report

DTYPE = 'bfloat16'
# Size of the model, episodes of an iteration, and `scan_layers`.
MODELS = {'full': (('tiny', 96, False), ('paper', 96, True)), 'smoke': (('tiny', 3, False),)}
REPEATS = {'full': 3, 'smoke': 1}


def measure(report: Report) -> None:
  """Reports for each part its seconds, share of the iteration, and fraction of the FLOP/s of matrix products."""
  rate = report.earlier.get('device', {}).get('matrix_product', {}).get(f'{DTYPE}_tera_flops')
  rate = 1e12 * rate if rate else timing.matmul_rate(DTYPE)
  report.add('rate', tera_flops=rate / 1e12)
  for preset, episodes, scan_layers in MODELS[report.preset]:
    names = (*train_step.PARTS, 'whole', 'pretrain')
    parts = train_step.take_apart(preset, episodes, names=names, dtype=DTYPE, scan_layers=scan_layers)
    report.add(f'{preset} compilation', seconds=parts.compile_seconds, episodes=episodes, dtype=DTYPE,
               scan_layers=scan_layers, tokens=parts.num_tokens)
    found = train_step.measure(parts, REPEATS[report.preset], rate)
    for name, seconds in found['seconds'].items():
      shown = {'share': found['share'].get(name), 'fraction': found['fraction'].get(name)}
      report.add(f'{preset} {name}', seconds=seconds, **{key: value for key, value in shown.items() if value})
