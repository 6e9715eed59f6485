"""Short stories in English: who is where and who has what, answered with a written chain of facts."""

from critkl_jax.tasks.stories.config import FACTS, MOST_FACTS, PLACE, Stories, StoriesFinetuning, StoriesPretraining
from critkl_jax.tasks.stories.stories_task import (
  before_and_after,
  by_facts,
  curriculum,
  draw_stories,
  stories,
  stories_of,
  summaries,
)
from critkl_jax.tasks.stories.story import Story, chain_of, sample_story
from critkl_jax.tasks.stories.text import WordTokenizer, render_prompt, render_solution, reward, well_formed

__all__ = ('FACTS', 'MOST_FACTS', 'PLACE', 'Stories', 'StoriesFinetuning', 'StoriesPretraining', 'Story',
           'WordTokenizer', 'before_and_after', 'by_facts', 'chain_of', 'curriculum', 'draw_stories', 'render_prompt',
           'render_solution', 'reward', 'sample_story', 'stories', 'stories_of',
           'summaries', 'well_formed')
