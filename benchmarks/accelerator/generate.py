"""Part 3, second process: the same weights and prompts in PyTorch, with Hugging Face `generate`.

JAX runs on the CPU here, so that two frameworks need not share the device: it reads the weights, makes the prompts, and
checks that both models have the same log-probabilities.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import models
from benchmarks.accelerator.child import Report
from benchmarks.accelerator.rollouts import EPISODES, MODELS
from benchmarks.torch_models import torch_generate, torch_model
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.models.language_model import LanguageModel, logits_of
from critkl_jax.tasks.addition import plus_task
from critkl_jax.tasks.task import Task

WARM_UP_TOKENS = 8
MOST_TOKENS = {'full': None, 'smoke': 32}  # longest response; None for the task's limit
FEW_EPISODES = 4  # on a CPU at full size


def measure(report: Report) -> None:
  """Reports tokens per second of sampling and of a forward pass, for each model and number of episodes."""
  transformers.logging.set_verbosity_error()
  device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
  name = torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'
  report.add('torch', version=torch.__version__, transformers=transformers.__version__, device=name)
  for preset, dtype, _ in MODELS[report.preset]:
    config, params, known_digits = models.load(preset)
    model, task = gpt2(config), plus_task(known_digits, 1, vocab_size=config.vocab_size)
    peer = torch_model(model, params)
    report.add(f'{preset} agreement', largest_difference_nats=difference(model, params, peer, task))
    peer = peer.to(device, getattr(torch, dtype))
    counts = EPISODES[report.preset] if device.type == 'cuda' else (min(FEW_EPISODES, *EPISODES[report.preset]),)
    for episodes in counts:
      found = speeds(peer, task, episodes, device, MOST_TOKENS[report.preset])
      report.add(f'{preset} {episodes} episodes', dtype=dtype, **found)


def texts(task: Task, episodes: int) -> tuple[np.ndarray, ...]:
  """Draws problems; returns tokens and mask of prompts, `[B, Q]`, and tokens of right responses, `[B, T]`."""

  @jax.jit
  def draw(keys):
    problems = jax.vmap(task.sample)(keys)
    prompt = jax.vmap(task.prompt)(problems)
    return prompt.tokens, prompt.mask, jax.vmap(task.solution)(problems).tokens

  return jax.device_get(draw(jax.random.split(jax.random.key(0), episodes)))


def difference(model: LanguageModel, params: Any, peer: transformers.PreTrainedModel, task: Task) -> float:
  """Returns the largest difference of the models' log-probabilities, in float32 on the CPU.

  Raises:
    AssertionError: if it is larger than 0.01.
  """
  _, _, tokens = texts(task, 1)
  tokens = tokens[:, :60]
  with torch.inference_mode():
    said = torch.log_softmax(peer(torch.tensor(tokens).long()).logits, -1).numpy()
  wanted = jax.jit(lambda params, tokens: jax.nn.log_softmax(
      logits_of(model.apply(params, tokens).hidden, model.output_head(params))))(
      params, jnp.asarray(tokens))
  np.testing.assert_allclose(said, wanted, atol=0.01)
  return float(np.max(np.abs(said - wanted)))


def speeds(peer: transformers.PreTrainedModel, task: Task, episodes: int, device: torch.device,
           most_tokens: int | None) -> dict[str, float]:
  """Times one call of `generate` and one forward pass, each after a call to warm up."""
  *prompt, solution = texts(task, episodes)
  tokens, mask = (torch.tensor(x).long().to(device) for x in prompt)
  text = torch.cat([tokens, torch.tensor(solution).long().to(device)], 1)
  torch_generate(peer, task, tokens, mask, WARM_UP_TOKENS)
  num_tokens, generate = result_and_seconds(lambda: torch_generate(peer, task, tokens, mask, most_tokens), device)
  with torch.inference_mode():
    result_and_seconds(lambda: peer(text).logits, device)
    _, forward = result_and_seconds(lambda: peer(text).logits, device)
  return {'tokens_per_second': num_tokens / generate, 'generate_seconds': generate,
          'forward_tokens_per_second': int((text != 0).sum()) / forward}


def result_and_seconds(call, device: torch.device) -> tuple[Any, float]:
  """Returns the finished result of a call, and its seconds."""
  start = time.perf_counter()
  result = call()
  if device.type == 'cuda':
    torch.cuda.synchronize()
  return result, time.perf_counter() - start
