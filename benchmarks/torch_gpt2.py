"""A GPT-2 of this project in PyTorch, and its responses by Hugging Face `generate`; needs torch and transformers."""

from typing import Any

import jax
import numpy as np
import torch
import transformers

from critkl_jax.config import GPT2Config
from critkl_jax.tasks.task import Task


def torch_gpt2(config: GPT2Config, params: Any) -> transformers.GPT2LMHeadModel:
  """Returns the same model in PyTorch, float32 on the CPU."""
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.width, n_layer=config.num_layers,
      n_head=config.num_heads, activation_function='gelu_new', resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
      layer_norm_epsilon=1e-5, bos_token_id=0, eos_token_id=0, pad_token_id=0))
  names = {'embedding': 'weight', 'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}
  weights = {}
  for path, value in jax.tree_util.tree_leaves_with_path({k: v for k, v in params.items() if k != 'value_head'}):
    parts = [entry.key for entry in path]
    parts = (['h', parts[0].removeprefix('h_')] if parts[0].startswith('h_') else [parts[0]]) + parts[1:]
    weights['.'.join(['transformer', *parts[:-1], names[parts[-1]]])] = torch.tensor(np.array(value))
  weights['lm_head.weight'] = weights['transformer.wte.weight']
  model.load_state_dict(weights, strict=True)
  return model.eval()


class AnswerEnded(transformers.StoppingCriteria):
  """Ends each episode where the task does; called once a token."""

  def __init__(self, task: Task, num_prompt: int, device: torch.device | str = 'cpu'):
    self._stop = torch.tensor(np.array(task.stop), dtype=torch.long, device=device)
    self._num_prompt, self._state = num_prompt, None

  def __call__(self, input_ids, scores, **options):
    del scores, options
    if input_ids.shape[1] == self._num_prompt + 1:
      self._state = torch.zeros(input_ids.shape[0], dtype=torch.long, device=self._stop.device)
    final, columns = self._stop.shape
    after = self._stop[self._state.clamp(max=final - 1), input_ids[:, -1].clamp(max=columns - 1)]
    self._state = torch.where(self._state < final, after, self._state)
    return self._state >= final


def torch_generate(model: transformers.GPT2LMHeadModel, task: Task, tokens: torch.Tensor, mask: torch.Tensor,
                   max_new_tokens: int | None = None) -> int:
  """Samples responses, and returns how many tokens they have.

  Args:
    model: of `torch_gpt2`, on any device and of any type.
    task: ends the responses.
    tokens: int64 `[B, Q]` prompts, padded on the left, on the model's device.
    mask: int64 `[B, Q]`, 1 at the tokens of the prompts.
    max_new_tokens: at which a response is cut; where the task does if None.
  """
  with torch.inference_mode():
    text = model.generate(
        input_ids=tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=max_new_tokens or task.response_length, eos_token_id=None, pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([AnswerEnded(task, tokens.shape[1], tokens.device)]))
  return int((text[:, tokens.shape[1]:] != 0).sum())
