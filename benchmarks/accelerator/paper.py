"""Part 6: pre-training at the paper's size, then fine-tuning under three penalties, in the remaining time.

The programs of test and fine-tuning are compiled in other threads while pre-training runs. Pre-training uses Muon, as
at the smaller sizes, because it needs far fewer steps than the paper's AdamW. Fine-tuning has the hyper-parameters of
the preset `tiny` with a smaller learning rate. Nothing was tuned at this size.
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
from critkl_jax import sharding
from critkl_jax.analysis import evaluation
from critkl_jax.config import replace
from critkl_jax.models.gpt2 import forward_flops, gpt2
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.records import TrainState
from critkl_jax.tasks.addition import (
    Addition,
    addition,
    before_and_after,
    plus_task,
    pretraining_lengths,
    prompt_length,
    solution_length,
)
from critkl_jax.tasks.task import Task
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig, PretrainConfig
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS
from critkl_jax.training.pretrain_step import init_pretraining, make_pretrain_step, pretraining_keys

PENALTIES = ('prioritized', 'standard', 'none')
FINETUNING_SECONDS = 120.0  # kept for fine-tuning, but at most `FINETUNING_SHARE` of the time
FINETUNING_SHARE = 0.5
COMPILE_SECONDS = 40.0  # a guess for the pre-training step; the learning rate decays over the remaining time
TEST_EVERY = 10.0  # seconds of pre-training between tests, once almost all tokens are right
ALMOST_ALL_TOKENS, RIGHT = 0.995, 0.97
LOG_EVERY = 20  # steps of pre-training between waits of the host for the device
USUAL_FRACTION = 0.25  # of the FLOP/s of matrix products, if part 4 has measured nothing


class Settings(NamedTuple):
  """The configs of pre-training, fine-tuning and tests.

  Attributes:
    pretrain: config of the model and its pre-training.
    finetune: config of fine-tuning, shared by all penalties.
    test_problems: problems of each accuracy.
    most_steps: most steps of pre-training; None for no limit but time.
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
  known = settings.pretrain.addition.known_digits
  finetuning_seconds = min(FINETUNING_SECONDS, FINETUNING_SHARE * report.seconds_left())
  pretrain_seconds = max(report.seconds_left() - finetuning_seconds - COMPILE_SECONDS, 1.0)
  config = dataclasses.replace(settings.pretrain, num_steps=affordable_steps(report, settings, pretrain_seconds))
  report.add('plan', known_digits=known, pretraining_seconds=pretrain_seconds, steps=config.num_steps,
             finetuning_seconds=finetuning_seconds)
  task, mesh = plus_task(known, settings.finetune.addition.extra_digits), sharding.make_mesh('data:1')
  model, policy = gpt2(config.model), gpt2(settings.finetune.model_of(config.model))
  members = population.product(settings.finetune, kl=PENALTIES)

  key = pretraining_keys(config)[1]
  state = jax.jit(functools.partial(init_pretraining, model, config))()
  step = jax.jit(make_pretrain_step(model, training_task(config), config), donate_argnums=0)
  start, lowered = time.monotonic(), step.lower(state, key)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = pool.submit(lowered.compile)
    test = pool.submit(make_paper_test, model, task, known, settings, state.params)
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
  """Makes the pre-training task with operands of any length up to N.

  It needs one program for all steps, with a quarter more padding than one program for each length.
  """
  lengths = functools.partial(pretraining_lengths, num_digits=config.addition.known_digits)
  return addition(config.addition.known_digits, config.addition.known_digits, lengths, length_margin=0)


def affordable_steps(report: Report, settings: Settings, seconds: float) -> int:
  """Estimates the number of steps that the time allows, over which the learning rate decays."""
  config, known = settings.pretrain, settings.pretrain.addition.known_digits
  length = prompt_length(known) + solution_length(known)
  flops = 3 * forward_flops(config.model, [length] * config.batch_size)
  matrix_rate = report.earlier.get('device', {}).get('matrix_product', {}).get('bfloat16_tera_flops') or 0.1
  measured = report.earlier.get('train_step', {}).get('paper pretrain', {}).get('fraction')
  steps = seconds / (flops / (1e12 * matrix_rate * (measured or USUAL_FRACTION)))
  return int(np.clip(0.9 * steps, 2 * config.warmup_steps, settings.most_steps or config.num_steps))


def pretrain(report: Report, state: TrainState, step: Callable, config: PretrainConfig, settings: Settings,
             test: concurrent.futures.Future, seconds: float) -> TrainState:
  """Pre-trains until the time is over or the accuracy at N reaches `RIGHT`."""
  start = tested = time.monotonic()
  tokens, number, metrics = 0.0, 0, {'loss': np.nan, 'accuracy': 0.0}
  while time.monotonic() - start < seconds and number != settings.most_steps:
    state, metrics = step(state)
    number += 1
    if number % LOG_EVERY and number != settings.most_steps:
      continue
    metrics = {name: float(value) for name, value in metrics.items()}
    now = time.monotonic()
    tokens += LOG_EVERY * metrics['num_tokens']  # the last step's number for all, since they differ little
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


def make_paper_test(model: LanguageModel, task: Task, known: int, settings: Settings, params: Any
                    ) -> tuple[Callable, float]:
  """Compiles the greedy test `params -> {'N': accuracy, 'N+1': accuracy}`; returns it and the seconds to compile."""
  problem_key, answer_key = jax.random.split(jax.random.key(evaluation.SEED))
  task_settings = Addition(known, settings.finetune.addition.extra_digits)
  problems = before_and_after(problem_key, task_settings, settings.test_problems)
  arguments = params, problems['N'], answer_key
  made, seconds = timing.compile_together({'answer': (evaluation.make_answer(model, task), arguments)})

  def test(params):
    return {name: float(evaluation.answer_all(made['answer'], params, some, answer_key, settings.test_problems).mean())
            for name, some in problems.items()}

  return test, seconds


def seconds_of(call: Callable, *arguments: Any) -> tuple[Any, ...]:
  """Calls a function that returns a tuple, and appends the seconds to the tuple."""
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


def finetune(report: Report, policy: LanguageModel, members: tuple[FinetuneConfig, ...], mesh: Any, step: Callable,
             params: Any, settings: Settings) -> Any:
  """Trains all members as one population until iterations or time are over; returns their parameters."""
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
