"""Questions with known answers from a JSON-lines file, for Hugging Face models."""

from critkl_jax.tasks.questions.config import Questions, TextFinetuning
from critkl_jax.tasks.questions.questions_task import Question, question_sets, questions, settings_for, sizes_of_sets

__all__ = ('Question', 'Questions', 'TextFinetuning', 'question_sets', 'questions', 'settings_for', 'sizes_of_sets')
