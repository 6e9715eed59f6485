"""Questions from a file or from reasoning-gym, with known answers or reward functions, for Hugging Face models."""

from critkl_jax.tasks.questions.config import Questions, TextFinetuning
from critkl_jax.tasks.questions.questions_task import (
  Prompted,
  Question,
  prompted_task,
  question_sets,
  questions,
  settings_for,
  sizes_of_sets,
)

__all__ = ('Prompted', 'Question', 'Questions', 'TextFinetuning', 'prompted_task', 'question_sets', 'questions',
           'settings_for', 'sizes_of_sets')
