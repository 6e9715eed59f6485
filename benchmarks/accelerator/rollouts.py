"""Part 3, first process: tokens per second of rollouts, against a teacher-forced pass over the same tokens."""

from benchmarks import rollout, timing
from benchmarks.accelerator.child import Report

# Size of the model, dtype, and `scan_layers`: a loop over the blocks compiles as fast as one block.
MODELS = {'full': (('tiny', 'float32', False), ('paper', 'bfloat16', True)), 'smoke': (('tiny', 'float32', False),)}
EPISODES, REPEATS = {'full': (64, 512), 'smoke': (2, 4)}, {'full': 3, 'smoke': 1}


def measure(report: Report) -> None:
  """Reports tokens per second for each model, number of episodes and method."""
  for preset, dtype, scan_layers in MODELS[report.preset]:
    settings = {episodes: rollout.prepare(preset, episodes, dtype, scan_layers=scan_layers)
                for episodes in EPISODES[report.preset]}
    programs, seconds = timing.compile_together({
        (episodes, name): program for episodes, setting in settings.items()
        for name, program in setting.programs.items()})
    report.add(f'{preset} compilation', programs=len(programs), seconds=seconds, dtype=dtype, scan_layers=scan_layers)
    for episodes, setting in settings.items():
      own = {name: programs[episodes, name] for name in setting.programs}
      found = rollout.measure(setting, own, REPEATS[report.preset])
      for method in rollout.METHODS:
        report.add(f'{preset} {episodes} episodes {method}', tokens_per_second=found[method],
                   of_teacher_forced=found[method] / found['teacher_forced'],
                   sequential_steps=found['sequential_steps'][method])
      report.add(f'{preset} {episodes} episodes teacher_forced', tokens_per_second=found['teacher_forced'])
