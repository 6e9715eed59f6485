"""This project's models in PyTorch, sampled with Hugging Face `generate`; needs torch and transformers."""

import tempfile
from typing import Any

import numpy as np
import torch
import transformers

from critkl_jax.models.huggingface import save_pretrained
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.tasks.task import Task


def torch_model(model: LanguageModel, params: Any) -> transformers.PreTrainedModel:
  """Returns a model with the same weights in `transformers`, float32 on the CPU."""
  with tempfile.TemporaryDirectory() as directory:
    save_pretrained(f'{directory}/model', model, params)
    return transformers.AutoModelForCausalLM.from_pretrained(f'{directory}/model', dtype=torch.float32).eval()


class AnswerEnded(transformers.StoppingCriteria):
  """Stopping criterion of the task's automaton, called once for each token."""

  def __init__(self, task: Task, num_prompt: int, device: torch.device | str = 'cpu'):
    self._stop = torch.tensor(np.array(task.stop), dtype=torch.long, device=device)
    self._num_prompt, self._state = num_prompt, None

  def __call__(self, input_ids, scores, **options):
    del scores, options
    if input_ids.shape[1] == self._num_prompt + 1:
      self._state = torch.zeros(input_ids.shape[0], dtype=torch.long, device=self._stop.device)
    final, num_columns = self._stop.shape  # [num_states, num_columns]; the final state has no row
    after = self._stop[self._state.clamp(max=final - 1), input_ids[:, -1].clamp(max=num_columns - 1)]
    self._state = torch.where(self._state < final, after, self._state)
    return self._state >= final


def torch_generate(model: transformers.PreTrainedModel, task: Task, tokens: torch.Tensor, mask: torch.Tensor,
                   max_new_tokens: int | None = None) -> int:
  """Samples responses, and returns their number of tokens.

  Args:
    model: model made by `torch_model`, on any device and of any dtype.
    task: task whose automaton ends the responses.
    tokens: int64 `[B, Q]` prompts, padded on the left, on the model's device.
    mask: int64 `[B, Q]`, 1 at the tokens of the prompts.
    max_new_tokens: most tokens of a response; the task's `response_length` if None.
  """
  with torch.inference_mode():
    text = model.generate(
        input_ids=tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=max_new_tokens or task.response_length, eos_token_id=None, pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([AnswerEnded(task, tokens.shape[1], tokens.device)]))
  return int((text[:, tokens.shape[1]:] != 0).sum())
