"""The vocabulary of a Hugging Face model directory: tokenizer.json, special tokens and chat template.

Needs the package `tokenizers`, and for chat templates `transformers`; never PyTorch.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Files of a model directory that say how its tokenizer works.
FILES = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'config.json', 'chat_template.jinja')


class TokenizerError(ValueError):
  """Raised for a tokenizer that is missing, incomplete or needs a package that is not installed."""


class TextTokenizer:
  """Maps text to token ids and back.

  Attributes:
    directory: the directory it was read from.
    vocab_size: number of token ids: the model's, where it is larger.
    pad_id: id that pads; any id will do, since padding is masked.
    end_ids: ids that end a response, of which models have one or several; the tokenizer's own first.
  """

  def __init__(self, directory: str | os.PathLike, vocab_size: int = 0):
    """Reads a tokenizer.

    Args:
      directory: has tokenizer.json; special tokens are read from tokenizer_config.json, generation_config.json and
        config.json beside it.
      vocab_size: number of token ids of the model; 0 for the tokenizer's own.

    Raises:
      TokenizerError: if the package `tokenizers` is not installed, a file is missing or damaged, the model has too few
        token ids, or no end-of-sequence token is named.
    """
    self.directory = pathlib.Path(directory).expanduser()
    self._own = _read(self.directory)
    size = self._own.get_vocab_size(with_added_tokens=True)
    if vocab_size and vocab_size < size:
      raise TokenizerError(f'{self.directory}: its tokenizer has {size} tokens, and the model only {vocab_size}.')
    self.vocab_size = vocab_size or size
    files = [_json(self.directory / f'{name}.json') for name in ('tokenizer_config', 'generation_config', 'config')]
    self.end_ids = tuple(dict.fromkeys(self._ids(files, 'eos')))
    if not self.end_ids:
      raise TokenizerError(f'{self.directory}: names no end-of-sequence token (eos_token in tokenizer_config.json, or '
                           'eos_token_id in generation_config.json or config.json), so no response would ever end.')
    self.pad_id = next(iter(self._ids(files, 'pad')), self.end_ids[0])
    anchor = self._own.encode('a', add_special_tokens=False).ids
    self._anchor, self._anchor_text = anchor, self._own.decode(anchor, skip_special_tokens=False)

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    """Encodes a text as int32 ids `[n]`; `special` adds the tokenizer's special tokens, such as the first one of texts.
    """
    return np.asarray(self._own.encode(text, add_special_tokens=special).ids, np.int32)

  def continuation(self, text: str, more: str, special: bool = False) -> list[int] | None:
    """Returns the ids of `more` where it follows `text`; None if the two share a token. `special` is as in `encode`."""
    before, both = (self._own.encode(x, add_special_tokens=special).ids for x in (text, text + more))
    return both[len(before):] if both[:len(before)] == before else None

  def decode(self, tokens: Iterable[int], mask: Iterable[bool] | None = None) -> str:
    """Decodes token ids `[T]`, or only the ids where `mask` `[T]` is true; special tokens are shown."""
    ids = np.asarray(tokens)
    if mask is not None:
      ids = ids[np.asarray(mask, bool)]
    return self._own.decode(ids.tolist(), skip_special_tokens=False)

  def decode_response(self, tokens: Sequence[int], end_ids: Iterable[int]) -> str:
    """Decodes a response `[n]` without special tokens, for reward functions; an end that is text is kept."""
    ids = np.asarray(tokens).tolist()
    if ids and ids[-1] in set(end_ids) & set(self.end_ids):
      ids = ids[:-1]
    return self._own.decode(ids, skip_special_tokens=True)

  def token_texts(self, tokens: Iterable[int]) -> list[str]:
    """Returns the text of each single token.

    A token that is only part of a character is shown by its name in the tokenizer, an id beyond the tokenizer as
    U+FFFD.
    """
    return [self._text_of(int(token)) for token in tokens]

  def _text_of(self, token: int) -> str:
    name = self._own.id_to_token(token)
    if name is None:  # beyond the tokenizer, where the model's vocabulary is larger
      return '\ufffd'
    both = self._own.decode([*self._anchor, token], skip_special_tokens=False)  # alone it may lose the blank before it
    text = both[len(self._anchor_text):] if both.startswith(self._anchor_text) else name
    return name if '\ufffd' in text or not text else text

  def containing(self, text: str) -> list[int]:
    """Returns the ids of all tokens whose text contains a text, such as a line break."""
    return [token for token in range(self._own.get_vocab_size(with_added_tokens=True)) if text in self._text_of(token)]

  def chat(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> str:
    """Wraps a prompt in the directory's chat template, up to where the answer begins.

    Args:
      prompt: what the user says, or messages with `role` and `content`.
      **options: variables of the template, such as Qwen3's `enable_thinking=False`.

    Raises:
      TokenizerError: if `transformers` is not installed, or the directory has no template.
    """
    messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else list(prompt)
    try:
      return self._templated.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except TokenizerError:
      raise
    except ImportError as error:
      raise TokenizerError(f"a chat template needs jinja2 ({error}): pip install 'critkl-jax[chat]'.") from error
    except Exception as error:  # a template may raise anything
      raise TokenizerError(f'{self.directory}: its chat template cannot be used: {_first_line(error)}') from error

  @functools.cached_property
  def _templated(self):
    try:
      import transformers  # slow import, for chat templates alone
    except ImportError as error:
      raise TokenizerError("a chat template needs transformers: pip install 'critkl-jax[chat]'.") from error
    try:
      return transformers.AutoTokenizer.from_pretrained(str(self.directory), local_files_only=True)
    except Exception as error:  # the package has no common type
      raise TokenizerError(f'{self.directory}: transformers cannot read its tokenizer: {_first_line(error)}') from error

  def _ids(self, files, kind):
    """Yields the ids of a special token by `kind`_token (text) and `kind`_token_id (a number, or several)."""
    for values in files:
      name = values.get(f'{kind}_token')
      name = name.get('content') if isinstance(name, dict) else name
      found = [] if not isinstance(name, str) else [self._own.token_to_id(name)]
      given = values.get(f'{kind}_token_id')
      found += given if isinstance(given, list) else [given]
      yield from (token for token in found if isinstance(token, int) and 0 <= token < self.vocab_size)


def _read(directory):
  try:
    import tokenizers  # not needed by the character vocabulary
  except ImportError as error:
    raise TokenizerError("a tokenizer.json needs the package tokenizers: pip install 'critkl-jax[text]'.") from error
  file = directory / 'tokenizer.json'
  if not file.is_file():
    raise TokenizerError(f'{directory}: has no tokenizer.json. transformers writes it: '
                         "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).")
  try:
    found = tokenizers.Tokenizer.from_file(str(file))
    found.no_truncation()  # which training scripts store in the file
    found.no_padding()
    return found
  except Exception as error:  # the package raises no other type
    raise TokenizerError(f'{file}: is no tokenizer ({error}).') from error


def _first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _json(file):
  if not file.is_file():
    return {}
  try:
    values = json.loads(file.read_text())
  except ValueError as error:
    raise TokenizerError(f'{file}: is no JSON ({error}).') from error
  return values if isinstance(values, dict) else {}
