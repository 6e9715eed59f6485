"""Part 6: the paper at its own size, in the time that is left: pre-training, then fine-tuning under three penalties.

The programs of the test and of the fine-tuning are compiled in other threads, also while pre-training runs. Muon is
taken for pre-training, as at the smaller sizes, because it needs far fewer steps than the paper's AdamW; the numbers of
fine-tuning are those of the `tiny` preset but for a smaller learning rate. None of them was tuned at this size.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import timing
from benchmarks.accelerator.child import Report
from critkl_jax import evaluate, population, sharding
from critkl_jax.config import FinetuneConfig, PretrainConfig, replace
from critkl_jax.gpt2 import GPT2, forward_flops
from critkl_jax.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS
from critkl_jax.pretrain_step import init_pretraining, make_pretrain_step, pretraining_keys
from critkl_jax.records import TrainState
from critkl_jax.tasks.addition import addition, plus_task, pretraining_lengths, prompt_length, solution_length
from critkl_jax.tasks.task import Task

PENALTIES = ('prioritized', 'standard', 'none')
FINETUNING_SECONDS = 120.0  # kept for fine-tuning, or as large a share of a shorter time
FINETUNING_SHARE = 0.5
COMPILE_SECONDS = 40.0  # that the step of pre-training may take, a guess: the learning rate falls over the rest
TEST_EVERY = 10.0  # seconds of pre-training between tests, once almost all tokens are right
ALMOST_ALL_TOKENS, RIGHT = 0.995, 0.97
LOG_EVERY = 20  # steps of pre-training, after which the host waits for the device
USUAL_FRACTION = 0.25  # of the rate of matrix products, where part 4 has measured nothing


class Settings(NamedTuple):
  """What is trained.

  Attributes:
    pretrain: the model, and how it is pre-trained.
    finetune: how it is fine-tuned; all penalties share it.
    test_problems: problems of each accuracy.
    most_steps: of pre-training, at which it ends however much time is left; None for no limit.
  """

  pretrain: PretrainConfig
  finetune: FinetuneConfig
  test_problems: int
  most_steps: int | None


def settings_of(preset: str) -> Settings:
  """Returns the settings of a preset, `full` or `smoke`."""
  if preset == 'smoke':
    return Settings(PRETRAIN_PRESETS['smoke'], replace(FINETUNE_PRESETS['smoke'], scan_layers=True), 4, 6)
  model = dataclasses.replace(PRETRAIN_PRESETS['paper'].model, dtype='bfloat16', scan_layers=True)
  pretrain = replace(PRETRAIN_PRESETS['paper'], optimizer='muon', learning_rate=5e-3, warmup_steps=50, weight_decay=0.0)
  finetune = replace(FINETUNE_PRESETS['tiny'], num_iterations=40, learning_rate=2e-5, minibatches=6, scan_layers=True)
  return Settings(dataclasses.replace(pretrain, model=model), finetune, 128, None)


def measure(report: Report) -> None:
  """Pre-trains, tests, fine-tunes and tests again, and reports the learning curves."""
  settings = settings_of(report.preset)
  known = settings.pretrain.known_digits
  finetuning_seconds = min(FINETUNING_SECONDS, FINETUNING_SHARE * report.seconds_left())
  pretrain_seconds = max(report.seconds_left() - finetuning_seconds - COMPILE_SECONDS, 1.0)
  config = dataclasses.replace(settings.pretrain, num_steps=affordable_steps(report, settings, pretrain_seconds))
  report.add('plan', known_digits=known, pretraining_seconds=pretrain_seconds, steps=config.num_steps,
             finetuning_seconds=finetuning_seconds)
  task, mesh = plus_task(known, settings.finetune.extra_digits), sharding.make_mesh('data:1')
  model, policy = GPT2(config.model), GPT2(settings.finetune.model_of(config.model))
  members = population.product(settings.finetune, kl=PENALTIES)

  key = pretraining_keys(config)[1]
  state = jax.jit(functools.partial(init_pretraining, model, config))()
  step = jax.jit(make_pretrain_step(model, training_task(config), config), donate_argnums=0)
  start, lowered = time.monotonic(), step.lower(state, key)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = pool.submit(lowered.compile)
    test = pool.submit(make_test, model, task, known, settings, state.params)
    finetuning = pool.submit(seconds_of, population.compile_step, policy, task, members, mesh)
    pretrain_step = compiled.result()
    report.add('pretraining compilation', seconds=time.monotonic() - start,
               parameters=sum(x.size for x in jax.tree.leaves(state.params)))
    state = pretrain(report, state, lambda state: pretrain_step(state, key), config, settings, test,
                     report.seconds_left() - finetuning_seconds)
    step, memory, seconds = finetuning.result()
  report.add('finetuning compilation', seconds=seconds, mapping=memory.mapping, planned_mib=memory.total / 2**20)
  params = finetune(report, policy, members, mesh, step, state.params, settings)
  test_members(report, test.result()[0], params)


# Pre-training.


def training_task(config: PretrainConfig) -> Task:
  """Returns the task whose operands have any length up to N: one program for all steps, and a quarter more padding than
  programs for each length would have."""
  lengths = functools.partial(pretraining_lengths, num_digits=config.known_digits)
  return addition(config.known_digits, config.known_digits, lengths, length_margin=0)


def affordable_steps(report: Report, settings: Settings, seconds: float) -> int:
  """Returns how many steps the time allows: the learning rate falls over so many."""
  config, known = settings.pretrain, settings.pretrain.known_digits
  length = prompt_length(known) + solution_length(known)
  flops = 3 * forward_flops(config.model, [length] * config.batch_size)
  matrix_rate = report.earlier.get('device', {}).get('matrix_product', {}).get('bfloat16_tera_flops') or 0.1
  measured = report.earlier.get('train_step', {}).get('paper pretrain', {}).get('fraction')
  steps = seconds / (flops / (1e12 * matrix_rate * (measured or USUAL_FRACTION)))
  return int(np.clip(0.9 * steps, 2 * config.warmup_steps, settings.most_steps or config.num_steps))


def pretrain(report: Report, state: TrainState, step: Callable, config: PretrainConfig, settings: Settings,
             test: concurrent.futures.Future, seconds: float) -> TrainState:
  """Pre-trains until the time is over, or the model is right at N."""
  start = tested = time.monotonic()
  tokens, number, metrics = 0.0, 0, {'loss': np.nan, 'accuracy': 0.0}
  while time.monotonic() - start < seconds and number != settings.most_steps:
    state, metrics = step(state)
    number += 1
    if number % LOG_EVERY and number != settings.most_steps:
      continue
    metrics = {name: float(value) for name, value in metrics.items()}
    now = time.monotonic()
    tokens += LOG_EVERY * metrics['num_tokens']  # of the last of so many steps, which differ little
    print(f'step {number} of {config.num_steps}: loss {metrics["loss"]:.4f}, token accuracy {metrics["accuracy"]:.4f}, '
          f'{now - start:.1f} s', flush=True)
    if metrics['accuracy'] >= ALMOST_ALL_TOKENS and test.done() and now - tested > TEST_EVERY:
      tested, accuracy = now, test.result()[0](state.params)
      report.add('pretraining tests', **{f'step_{number}': accuracy})
      if accuracy['N'] >= RIGHT:
        break
  metrics = {name: float(value) for name, value in metrics.items()}  # waits for the last step
  seconds = time.monotonic() - start
  run, compile_seconds = test.result()
  report.add('test compilation', seconds=compile_seconds)
  report.add('pretraining', steps=number, seconds=seconds, million_tokens=tokens / 1e6,
             tokens_per_second=tokens / seconds, loss=metrics['loss'], token_accuracy=metrics['accuracy'])
  report.add('pretrained', **run(state.params))
  return state


# Tests.


def make_test(model: GPT2, task: Task, known: int, settings: Settings, params: Any) -> tuple[Callable, float]:
  """Returns `params -> {'N': accuracy, 'N+1': accuracy}`, greedy, its one program compiled, and the seconds it took."""
  longest = known + settings.finetune.extra_digits
  problem_key, answer_key = jax.random.split(jax.random.key(1_000_003))
  problems = {name: evaluate.draw_problems(jax.random.fold_in(problem_key, digits), settings.test_problems, 'plus',
                                           digits, known, longest)
              for name, digits in (('N', known), (f'N+{settings.finetune.extra_digits}', longest))}
  arguments = params, problems['N'], answer_key
  made, seconds = timing.compile_together({'answer': (evaluate.make_answer(model, task), arguments)})

  def test(params):
    return {name: float(evaluate.answer_all(made['answer'], params, some, answer_key, settings.test_problems).mean())
            for name, some in problems.items()}

  return test, seconds


def seconds_of(call: Callable, *arguments: Any) -> tuple[Any, ...]:
  """Times a call: its result, a tuple, and its seconds."""
  start = time.monotonic()
  return *call(*arguments), time.monotonic() - start


def test_members(report: Report, test: Callable, params: Any) -> None:
  """Reports the accuracies of each penalty's policy, as far as time allows."""
  seconds = 0.0
  for name, own in zip(PENALTIES, population.members_on_host(params)):
    if 1.5 * seconds > report.seconds_left():
      report.add(f'after {name}', not_tested=f'{report.seconds_left():.0f} s were left')
      continue
    start = time.monotonic()
    report.add(f'after {name}', **test(own))
    seconds = time.monotonic() - start


# Fine-tuning.


def finetune(report: Report, policy: GPT2, members: tuple[FinetuneConfig, ...], mesh: Any, step: Callable, params: Any,
             settings: Settings) -> Any:
  """Advances all members together until their iterations, or the time, are over; returns their parameters."""
  state = population.init_population(policy, members, params, mesh)
  numbers, curves, slowest = population.numbers_of(members, mesh), [], 0.0
  for iteration in range(1, settings.finetune.num_iterations + 1):
    if report.seconds_left() < 1.3 * slowest + 10.0 * (report.preset == 'full'):  # kept for the last tests
      break
    start = time.monotonic()
    state, metrics = step(state, *numbers)
    metrics = jax.device_get(metrics)
    slowest = max(slowest, time.monotonic() - start) if iteration > 1 else 0.0
    curves.append({name: metrics[name].tolist() for name in ('accuracy', 'kl', 'entropy', 'format_errors')})
    print(f'iteration {iteration}: ' + ', '.join(
        f'{name} accuracy {accuracy:.3f} KL {kl:.4f}' for name, accuracy, kl in zip(
            PENALTIES, metrics['accuracy'], metrics['kl'])) + f', {time.monotonic() - start:.1f} s', flush=True)
    report.add('finetuning', iterations=iteration, seconds_of_an_iteration=time.monotonic() - start,
               tokens_per_second=float(metrics['num_tokens'].sum()) / (time.monotonic() - start))
    report.add('curves', **{f'{metric}_{name}': [row[metric][i] for row in curves]
                            for metric in ('accuracy', 'kl') for i, name in enumerate(PENALTIES)})
  return state.params
