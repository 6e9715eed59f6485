"""A small Hugging Face model directory with a byte-level tokenizer and a chat template, as Qwen3 has them."""

import json
import random

import jax

from critkl_jax.models.huggingface import save_pretrained
from critkl_jax.models.llama import LlamaConfig, llama

TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
CONFIG = LlamaConfig(vocab_size=416, context_length=64, num_layers=2, num_heads=4, num_kv_heads=2, width=64,
                     qk_norm=True, rope_base=1e6)


def write_tokenizer(directory):
  """Trains a tokenizer of 400 tokens on a few texts and writes its files."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  draw = random.Random(0)
  texts = [f'What is {draw.randint(0, 99)} plus {draw.randint(0, 99)}? Answer: {draw.randint(0, 200)}\n'
           for _ in range(500)]
  found = tokenizers.Tokenizer(models.BPE())
  found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.decoder = decoders.ByteLevel()
  found.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=400, special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  directory.mkdir(parents=True, exist_ok=True)
  found.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps({
      'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|im_end|>',
      'pad_token': {'__type': 'AddedToken', 'content': '<|endoftext|>', 'special': True, 'normalized': False,
                    'lstrip': False, 'rstrip': False, 'single_word': False}, 'chat_template': TEMPLATE}))
  (directory / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 0]}))
  return directory


def write_model(directory, params=None, seed=0):
  """Writes a model with its tokenizer; random parameters if none are given."""
  model = llama(CONFIG)
  save_pretrained(directory, model, model.init(jax.random.key(seed)) if params is None else params)
  return write_tokenizer(directory)


def write_questions(file, number=40, most=9):
  """Writes additions of small numbers in words, a line each; returns the file."""
  draw = random.Random(1)
  pairs = [(draw.randint(0, most), draw.randint(0, most)) for _ in range(number)]
  file.write_text(''.join(json.dumps({'prompt': f'What is {a} plus {b}? Answer:', 'answer': f' {a + b}'}) + '\n'
                          for a, b in pairs))
  return file
