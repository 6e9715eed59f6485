"""Addition with a scratchpad, the task of the paper: problems, texts, rewards, drafts and test sets."""

from critkl_jax.tasks.addition.addition_task import (
    LENGTH_MARGIN,
    addition,
    curriculum,
    plus_task,
    plus_task_of,
    pretraining_task,
)
from critkl_jax.tasks.addition.config import MOST_DIGITS, Addition, AdditionFinetuning, AdditionPretraining
from critkl_jax.tasks.addition.problem import (
    Problem,
    identical_lengths,
    longest_lengths,
    make_problem,
    plus_lengths,
    pretraining_lengths,
    sample_operands,
    varying_lengths,
)
from critkl_jax.tasks.addition.problem_sets import (
    DISTRIBUTIONS,
    before_and_after,
    by_digits,
    by_digits_and_distribution,
    draw_problems,
    task_of_digits,
)
from critkl_jax.tasks.addition.rewards import reward, well_formed
from critkl_jax.tasks.addition.solution import (
    CRITICAL_KINDS,
    NUM_CRITICAL_LINES,
    add,
    critical_kinds,
    prompt_length,
    render_prompt,
    render_result,
    render_solution,
    solution_length,
)
from critkl_jax.tasks.addition.text import TOKENIZER

__all__ = (
    'CRITICAL_KINDS',
    'DISTRIBUTIONS',
    'LENGTH_MARGIN',
    'MOST_DIGITS',
    'NUM_CRITICAL_LINES',
    'TOKENIZER',
    'Addition',
    'AdditionFinetuning',
    'AdditionPretraining',
    'Problem',
    'add',
    'addition',
    'before_and_after',
    'by_digits',
    'by_digits_and_distribution',
    'critical_kinds',
    'curriculum',
    'draw_problems',
    'identical_lengths',
    'longest_lengths',
    'make_problem',
    'plus_lengths',
    'plus_task',
    'plus_task_of',
    'prompt_length',
    'pretraining_lengths',
    'pretraining_task',
    'render_prompt',
    'render_result',
    'render_solution',
    'reward',
    'sample_operands',
    'solution_length',
    'task_of_digits',
    'varying_lengths',
    'well_formed',
)
