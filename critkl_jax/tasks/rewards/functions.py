"""Built-in rewards, by the convention of TRL: `reward(prompts, completions, **columns) -> list[float]`.

Each function takes the lists of one batch: prompts and completions, and the columns of the file of prompts, of which it
reads `answer`: a text, or several texts of which any is right. Completions are texts, or messages if the prompts are.

A completion may show its work: what counts is the text in its last `<answer>` tags, else in its last `\\boxed{}`, else
all of it.
"""

import collections
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

_NUMBER = re.compile(r'(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?')
_TAGGED = re.compile(r'<answer>(.*?)</answer>', re.S)
_ARTICLES = re.compile(r'\b(?:a|an|the)\b')
_SAME = 1e-6  # relative difference below which two numbers are the same


def exact_match(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
                ) -> list[float]:
  """Returns 1 where the answer of a completion is a right one, without blanks at both ends, else 0."""
  del prompts, columns
  return _best(completions, answer, lambda said, right: float(said.strip() == right.strip()))


def numeric_match(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
                  ) -> list[float]:
  """Returns 1 where the last number in the answer of a completion equals the last number of a right answer, else 0.

  Thousands may be separated by commas; numbers are equal up to a relative difference of 1e-6.
  """
  del prompts, columns

  def same(said, right):
    one, two = last_number(said), last_number(right)
    return float(one is not None and two is not None and abs(one - two) <= _SAME * abs(two))

  return _best(completions, answer, same)


def f1(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
  """Returns the F1 of the words of a completion's answer and of a right one, as SQuAD defines it (arXiv 1606.05250).

  Capitals, punctuation and articles do not count.
  """
  del prompts, columns

  def score(said, right):
    said, right = _words(said), _words(right)
    common = sum((collections.Counter(said) & collections.Counter(right)).values())
    return 2.0 * common / (len(said) + len(right)) if common else float(not said and not right)

  return _best(completions, answer, score)


def rouge_l(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
  """Returns the F-measure of ROUGE-L (Lin 2004) of a completion's answer and a right one; needs `rouge-score`."""
  del prompts, columns
  scorer = _rouge_scorer()
  return _best(completions, answer, lambda said, right: scorer.score(right, said)['rougeL'].fmeasure)


def answer_format(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
  """Returns 1 where a completion ends with its only pair of `<answer>` tags, else 0."""
  del prompts, columns
  return [float(well_formed_answer(text_of(one))) for one in completions]


def reasoning_gym(prompts: Sequence[Any], completions: Sequence[Any], metadata: Sequence[Any], **columns: Any
                  ) -> list[float]:
  """Returns the scores of reasoning-gym, by the dataset that each prompt comes from."""
  del prompts
  return [float(_gym_score(row['source_dataset'])(
      answer_of(text_of(said)).strip(), {'question': columns['question'][i], 'answer': columns['answer'][i],
                                         'metadata': row})) for i, (said, row) in enumerate(zip(completions, metadata))]


def answer_of(text: str) -> str:
  """Returns the text in the last `<answer>` tags, else in the last `\\boxed{}`, else the whole text."""
  tagged = _TAGGED.findall(text)
  return tagged[-1] if tagged else _boxed(text)


def last_number(text: str) -> float | None:
  """Returns the last number in a text; None if there is none."""
  found = _NUMBER.findall(text)
  return float(found[-1].replace(',', '')) if found else None


def well_formed_answer(text: str) -> bool:
  """Returns whether a text ends with its only pair of `<answer>` tags."""
  return (text.count('<answer>'), text.count('</answer>')) == (1, 1) and bool(
      re.search(r'<answer>.*</answer>\s*\Z', text, re.S))


def text_of(completion: Any) -> str:
  """Returns the text of a completion: itself, or the content of its last message."""
  return completion if isinstance(completion, str) else completion[-1]['content']


def _best(completions, answer, score: Callable[[str, str], float]) -> list[float]:
  """Scores the answer of each completion against each of its right answers; returns the best scores."""
  said = [answer_of(text_of(one)) for one in completions]
  return [max(score(one, text) for text in ([right] if isinstance(right, str) else right))
          for one, right in zip(said, answer, strict=True)]


def _boxed(text):
  start = text.rfind('\\boxed{')
  if start < 0:
    return text
  depth, first = 1, start + len('\\boxed{')
  for i in range(first, len(text)):
    depth += {'{': 1, '}': -1}.get(text[i], 0)
    if depth == 0:
      return text[first:i]
  return text  # the brace is never closed


def _words(text):
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return _ARTICLES.sub(' ', text).split()


@functools.cache
def _rouge_scorer():
  try:
    from rouge_score import rouge_scorer
  except ImportError as error:
    raise ImportError("rouge_l needs the package rouge-score: pip install 'critkl-jax[tasks]'.") from error
  return rouge_scorer.RougeScorer(['rougeL'])


@functools.cache
def _gym_score(name):
  import reasoning_gym as gym

  return gym.get_score_answer_fn(name)
