"""Baselines with the same weights, prompts and reward: Hugging Face `generate`, forward pass, and a TRL GRPO step.

    pip install '.[bench]'
    python -m benchmarks.peers --json=peers.json
    python -m benchmarks.peers --task=text

Everything runs on the CPU in one process, in turns. Only response tokens up to the end of the answer count; `generate`
gets that end as a stopping criterion. A GRPO step and an iteration here are 96 responses, 8 to each of 12 problems, a
reward, a reference pass and one epoch of three updates. The size `qwen3` is a small Qwen3 with random weights, whose
responses all have the same length. `--task=text` times an iteration with a reward in Python alone: summaries of stories
of ten facts by the reference in the package, rewarded by ROUGE-L.
"""

import re
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import models, timing
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.models.language_model import LanguageModel, logits_of
from critkl_jax.models.llama import LlamaConfig, llama
from critkl_jax.runtime import checkpoint, storage
from critkl_jax.sampling.generation import respond
from critkl_jax.sampling.scoring import score
from critkl_jax.tasks.addition import plus_task
from critkl_jax.tasks.addition.text import END_OF_SCRATCHPAD
from critkl_jax.tasks.fixed_lengths import fixed_lengths
from critkl_jax.tasks.rewards import RewardPool
from critkl_jax.tasks.rewards.functions import rouge_l
from critkl_jax.tasks.stories import StoriesFinetuning, stories_of
from critkl_jax.tasks.stories.text import WORDS
from critkl_jax.tasks.task import Task
from critkl_jax.training import host_step, initial_state, slices, train_step
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.presets import PRETRAIN_PRESETS
from experiments import parsing, paths
from experiments.flags import run

try:
  import datasets
  import tokenizers
  import torch
  import transformers
  import trl

  from benchmarks.torch_models import AnswerEnded, torch_generate, torch_model
except ImportError as error:
  raise SystemExit(f"error: {error.name} is not installed: pip install '.[bench]'") from error

PRESETS = flags.DEFINE_list('presets', ['tiny', 'paper', 'qwen3'], 'Sizes of the model.')
EPISODES = flags.DEFINE_list('episodes', ['64', '16', '64'], 'Episodes in a rollout, for each of the sizes.')
REPEATS = flags.DEFINE_integer('repeats', 3, 'Timed turns after a warm-up; one at `paper`.', lower_bound=1)
TASK = flags.DEFINE_enum('task', 'addition', ['addition', 'text'], 'What is timed: see above.')
GRPO = flags.DEFINE_bool('grpo', True, 'Also time a whole iteration against TRL.')
JSON = flags.DEFINE_string('json', None, 'File for the results.')

RESPONSES, PER_PROBLEM, UPDATES = 96, 8, 3
QWEN3 = LlamaConfig(vocab_size=4096, context_length=512, num_layers=6, num_heads=8, num_kv_heads=4, width=256,
                    head_width=32, hidden_width=768, rope_base=1e6, qk_norm=True)
PAPER_SECONDS = 45.0  # one episode of the official code at the tiny size, measured on two CPU cores


def model_and_task(preset: str) -> tuple[LanguageModel, Any, Task]:
  """Returns the model of a size, its parameters and the task."""
  if preset == 'qwen3':
    model = llama(QWEN3)
    return model, model.init(jax.random.key(0)), fixed_lengths(QWEN3.vocab_size, 64, 192)
  config, params, known_digits = models.load(preset)
  return gpt2(config), params, plus_task(known_digits, 1, vocab_size=config.vocab_size)


def rollouts(preset: str, episodes: int, repeats: int) -> dict[str, Any]:
  """Times rollouts and teacher-forced passes of one size, here and in PyTorch."""
  model, params, task = model_and_task(preset)
  peer = torch_model(model, params)
  sample = jax.jit(lambda params, problems, key: respond(model, params, task, problems, key))
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(0), episodes))
  prompt = jax.vmap(task.prompt)(problems)
  tokens, mask = (torch.tensor(np.array(x)).long() for x in (prompt.tokens, prompt.mask))
  rollout = sample(params, problems, jax.random.key(0))
  text = np.concatenate([rollout.prompt, rollout.actions], 1)[:, :-1]
  with torch.inference_mode():
    said = torch.log_softmax(peer(torch.tensor(text[:1, -60:]).long()).logits, -1).numpy()
  hidden = model.apply(params, jnp.asarray(text[:1, -60:])).hidden
  wanted = jax.nn.log_softmax(logits_of(hidden, model.output_head(params)))
  np.testing.assert_allclose(said, wanted, atol=0.01)  # the same model

  size = slices.pick_size(episodes, text.shape[1])
  force = jax.jit(lambda params, rollout: jax.lax.map(
      lambda part: score(model, params, part)[0], slices.split(rollout, size)))
  speed = {name: [] for name in ('rollout', 'generate', 'teacher_forced', 'torch_forward')}
  for turn in range(repeats + 1):
    rollout, time = timing.result_and_seconds(sample, params, problems, jax.random.key(turn))
    speed['rollout'].append(int(rollout.mask.sum()) / time)
    num_tokens, time = timing.result_and_seconds(torch_generate, peer, task, tokens, mask)
    speed['generate'].append(num_tokens / time)
    _, time = timing.result_and_seconds(force, params, rollout)
    speed['teacher_forced'].append(text.size / time)
    with torch.inference_mode():
      _, time = timing.result_and_seconds(lambda: peer(torch.tensor(text).long()).logits[0, 0, 0].item())
    speed['torch_forward'].append(text.size / time)
    latest = ', '.join(f'{name} {values[-1]:.0f} tokens/s' for name, values in speed.items())
    print(f'{preset} {turn or "warm-up"}: {latest}', flush=True)
  found = {name: statistics.median(values[1:]) for name, values in speed.items()}
  return found | {'episodes': episodes, 'ratio': found['rollout'] / found['generate']}


def iterations(preset: str, repeats: int) -> dict[str, float]:
  """Times whole iterations of fine-tuning, here and in TRL."""
  model_config, params, known_digits = models.load(preset)
  task = plus_task(known_digits, 1, vocab_size=model_config.vocab_size)
  config = FinetuneConfig(episodes=RESPONSES, episodes_per_problem=PER_PROBLEM, minibatches=UPDATES, learning_rate=1e-6)
  model = gpt2(config.model_of(model_config))
  state = initial_state.init_finetuning(model, config, params)
  step = train_step.make_train_step(model, task, config)
  _, key = initial_state.finetuning_keys(config)
  numbers = initial_state.Hyperparameters.of(config)
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))  # as the first step returns it
  trainer = addition_trainer(model_config, params, task)
  found = _in_turns(preset, repeats, trainer, state, lambda state: step(state, key, numbers))
  return found | {'episodes_per_second_over_official': RESPONSES / found['iteration'] * PAPER_SECONDS}


def text_iterations(repeats: int) -> dict[str, float]:
  """Times whole iterations of fine-tuning on summaries of stories with a reward in Python, here and in TRL."""
  reference = checkpoint.load_checkpoint(checkpoint.SHIPPED_REFERENCES['stories'])
  config = FinetuneConfig(task='stories', stories=StoriesFinetuning(extra_facts=6, asks='facts'), episodes=RESPONSES,
                          episodes_per_problem=PER_PROBLEM, minibatches=UPDATES, learning_rate=1e-6)
  task = stories_of(reference.info.task.finetuned(config.stories))
  model = gpt2(config.model_of(reference.info.model))
  state = initial_state.init_finetuning(model, config, reference.params)
  _, key = initial_state.finetuning_keys(config)
  numbers = initial_state.Hyperparameters.of(config)
  problems = task.host.draw((0,), 0, RESPONSES // PER_PROBLEM)
  answers = task.host.read(problems, np.zeros((RESPONSES // PER_PROBLEM, 1), np.int32),
                           np.zeros((RESPONSES // PER_PROBLEM, 1), bool))
  seen = []

  def reward(prompts, completions, answer, **columns):
    found = rouge_l(prompts, completions, answer, **columns)
    seen.append(statistics.mean(found))
    return found

  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token='%'))
  longest_first = '|'.join(re.escape(word) for word in sorted(WORDS, key=len, reverse=True))
  words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(longest_first), 'removed', invert=True)
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=words, pad_token='%', eos_token='\n', padding_side='left')
  for prompt, tokens in zip(answers.prompts, tokenizer(answers.prompts)['input_ids']):
    np.testing.assert_array_equal(tokens, task.tokenizer.encode(prompt))
  trainer = grpo_trainer(_saved(torch_model(model, reference.params)), tokenizer, reward, task.response_length,
                         {'prompt': answers.prompts, **answers.columns})
  with RewardPool() as pool:
    step = host_step.make_host_step(model, task, config, None, pool)
    means = []

    def iteration(state):
      state, metrics = step(state, key, numbers)
      means.append(float(metrics['reward']))
      return state, metrics

    found = _in_turns('text', repeats, trainer, state, iteration)
  return found | {'reward': means[0], 'trl_reward': seen[0]}  # of the same prompts, before any update


def _in_turns(name: str, repeats: int, trainer: 'trl.GRPOTrainer', state: Any, step: Callable) -> dict[str, float]:
  """Times `step`, `state -> (state, metrics)`, and an iteration of the trainer, in turns."""
  seconds = {'iteration': [], 'trl': []}
  for turn in range(repeats + 1):
    (state, _), time = timing.result_and_seconds(step, state)
    seconds['iteration'].append(time)
    trainer.args.max_steps = UPDATES
    trainer.state = transformers.TrainerState()
    _, time = timing.result_and_seconds(trainer.train)
    seconds['trl'].append(time)
    print(f'{name} {turn or "warm-up"}: ' + ', '.join(f'{k} {v[-1]:.2f} s' for k, v in seconds.items()), flush=True)
  found = {name: statistics.median(values[1:]) for name, values in seconds.items()}
  return found | {'responses': RESPONSES, 'ratio': found['trl'] / found['iteration']}


def _saved(model: Any) -> str:
  """Saves a model of PyTorch in a new directory, from which the trainer also loads its reference."""
  directory = tempfile.mkdtemp()
  model.save_pretrained(directory)
  return directory


def addition_trainer(config: GPT2Config, params: Any, task: Task) -> 'trl.GRPOTrainer':
  """Makes a TRL trainer with the same model, prompts and reward."""
  alphabet = task.tokenizer.alphabet
  characters = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token='%'))
  characters.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  characters.decoder = tokenizers.decoders.Fuse()
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=characters, pad_token='%', eos_token='%', padding_side='left')
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(0), RESPONSES // PER_PROBLEM))
  prompts = [task.tokenizer.decode(t, m) for t, m in zip(*(np.asarray(x) for x in (lambda p: (p.tokens, p.mask))(
      jax.vmap(task.prompt)(problems))))]

  def reward(prompts, completions, **columns):
    del columns
    answers = []
    for prompt in prompts:
      a, b = prompt.split('\n')[1].split('+')
      answers.append(' '.join(str(int(a) + int(b))) + '\n')
    return [float(END_OF_SCRATCHPAD in text and text.split(END_OF_SCRATCHPAD, 1)[1] == answer)
            for text, answer in zip(completions, answers)]

  trainer = grpo_trainer(_saved(torch_model(gpt2(config), params)), tokenizer, reward, task.response_length,
                         {'prompt': prompts})
  generate = trainer.model.generate

  def generate_until_answered(input_ids, **options):
    stop = transformers.StoppingCriteriaList([AnswerEnded(task, input_ids.shape[1])])
    return generate(input_ids=input_ids, stopping_criteria=stop, **options)

  trainer.model.generate = generate_until_answered
  return trainer


def grpo_trainer(directory: str, tokenizer: Any, reward: Callable, response_length: int, columns: dict[str, list[Any]]
                 ) -> 'trl.GRPOTrainer':
  """Makes a TRL trainer of a saved GPT-2 for the rows of `columns`, of which `prompt` is one."""
  arguments = trl.GRPOConfig(
      output_dir=directory, use_cpu=True, bf16=False, report_to=[], save_strategy='no', logging_strategy='no',
      disable_tqdm=True, per_device_train_batch_size=RESPONSES // UPDATES, gradient_accumulation_steps=1,
      steps_per_generation=UPDATES, num_generations=PER_PROBLEM, max_completion_length=response_length,
      num_iterations=1, max_steps=UPDATES, learning_rate=1e-6, lr_scheduler_type='constant', temperature=1.0, top_k=0,
      beta=0.5, dataloader_pin_memory=False, disable_dropout=True)  # as here
  return trl.GRPOTrainer(model=transformers.GPT2LMHeadModel.from_pretrained(directory), reward_funcs=reward,
                         args=arguments, processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(columns))


def check() -> tuple[()]:
  """Exits with one line if the flags are invalid."""
  parsing.check_known('presets', parsing.read_names(PRESETS), [*PRETRAIN_PRESETS, 'qwen3'])
  parsing.read_sizes(EPISODES, len(PRESETS.value))
  paths.check_file('json', JSON.value)
  return ()


def main() -> None:
  """Measures in turns and prints a table."""
  transformers.logging.set_verbosity_error()
  results = {'device': jax.devices()[0].device_kind, 'torch': torch.__version__,
             'transformers': transformers.__version__, 'trl': trl.__version__}
  if TASK.value == 'text':
    found = results['text'] = text_iterations(REPEATS.value)
    print(f'text: iteration {found["iteration"]:.2f} s, TRL {found["trl"]:.2f} s: {found["ratio"]:.2f} times; mean '
          f'rewards of the first responses {found["reward"]:.3f} and {found["trl_reward"]:.3f}')
  for preset, episodes in zip(PRESETS.value, EPISODES.value, strict=True) if TASK.value == 'addition' else ():
    repeats = 1 if preset == 'paper' else REPEATS.value
    results[preset] = {'rollout': rollouts(preset, int(episodes), repeats)}
    if GRPO.value and preset == 'tiny':
      results[preset]['iteration'] = iterations(preset, repeats)
  for preset in (name for name in PRESETS.value if name in results):
    found = results[preset]['rollout']
    print(f'{preset:>8}: rollout {found["rollout"]:.0f} tokens/s, generate {found["generate"]:.0f}: '
          f'{found["ratio"]:.2f} times; forward {found["teacher_forced"]:.0f}, in PyTorch {found["torch_forward"]:.0f}')
    if 'iteration' in results[preset]:
      found = results[preset]['iteration']
      print(f'{preset:>8}: iteration {found["iteration"]:.2f} s, TRL {found["trl"]:.2f} s: {found["ratio"]:.2f} times; '
            f'{found["episodes_per_second_over_official"]:.0f} times the episodes per second of the official code')
  if JSON.value:
    storage.write_json(JSON.value, results)


if __name__ == '__main__':
  run(main, check)
