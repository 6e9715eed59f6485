"""Tests the content and colours of studies' pictures on made-up results."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from critkl_jax.analysis.charts import plot_generations
from critkl_jax.analysis.style import CRITICAL, PENALTIES, REFERENCE
from critkl_jax.studies import catalog, ladder_page, page, references, references_page
from critkl_jax.studies.results import FIGURES

BLUE, ORANGE, GREY = PENALTIES['prioritized'], PENALTIES['standard'], PENALTIES['none']


def made_up(study, compares=True):
  """Makes results in which every metric of arm number i is i / 10."""
  arms = {arm.label: {'reference': '', 'compares_with_reference': compares, 'figures': {
      name: {'iqm': (i / 10, i / 10 - 0.05, i / 10 + 0.05)} for name in FIGURES}} for i, arm in enumerate(study.arms)}
  runs = [{'arm': label, **{name: own['figures'][name]['iqm'][0] for name in FIGURES}} for label, own in arms.items()]
  known = {'known': 5, **dict.fromkeys(('greedy', 'greedy_known', 'critical_probability'), (0.5, 0.4, 0.6))}
  return {'question': study.question, 'primary_metrics': study.primary_metrics, 'unit': 'digits', 'extra': 1,
          'arms': arms, 'runs': runs, 'references': {'': known}}


def titles(figure):
  return [axis.get_title().replace('\n', ' ') for axis in figure.axes]


def test_arms_show_what_the_study_judges_by(figures, tmp_path):
  for name in ('drift', 'exponent', 'large_steps'):
    study = catalog.STUDIES[name]
    page.plot_arms(made_up(study), tmp_path / 'arms.png', page.arm_colours(study))
  assert titles(figures[0]) == [
      'KL at critical tokens, N+1, nats per token', 'KL at other tokens, N+1, nats per token',
      'KL at tokens of N, nats per token', 'greedy accuracy, N']
  assert titles(figures[1]) == ['greedy accuracy, N+1', 'area under the learning curve', 'greedy accuracy, N',
                                'probability of the right critical token']
  assert titles(figures[2])[:3] == ['greedy accuracy, N+1', 'greedy accuracy, N',
                                    'KL at other tokens, N+1, nats per token']
  assert 'over seeds, with its 95 % interval' in figures[0].get_suptitle().replace('\n', ' ')
  kl, accuracy = figures[0].axes[0], figures[0].axes[3]
  assert kl.xaxis.get_major_formatter()(0.1, 0) == '0.1'
  assert accuracy.xaxis.get_major_formatter()(0.1, 0) == '10 %'


def test_an_arm_is_its_dots_interval_and_reference_in_its_penaltys_colour(figures, tmp_path):
  study = catalog.STUDIES['prioritized_vs_standard']
  for compares in (True, False):
    page.plot_arms(made_up(study, compares), tmp_path / 'arms.png', page.arm_colours(study))
  axes = figures[0].axes
  assert [line.get_color() for line in axes[0].get_lines()][::4] == [BLUE, ORANGE, GREY]
  runs, interval, mean, reference = axes[0].get_lines()[4:8]
  assert (list(runs.get_xdata()), list(mean.get_xdata())) == ([0.1], [0.1])
  assert list(interval.get_xdata()) == [0.05, pytest.approx(0.15)]
  assert (list(reference.get_xdata()), reference.get_color()) == ([0.5], REFERENCE)
  strokes = [[sum(line.get_color() == REFERENCE for line in axis.get_lines()) for axis in figure.axes]
             for figure in figures]
  assert strokes == [[3, 0, 3, 3], [3, 0, 3, 0]]  # only greedy answers are comparable there


def test_every_study_has_the_penalties_colours():
  for name, study in catalog.STUDIES.items():
    found = page.arm_colours(references.with_numbers(study, 'tiny'))
    for label, colour in found.items():
      wanted = {'standard': ORANGE, 'no penalty': GREY, 'prioritized': BLUE}
      parts = [wanted[part] for part in label.split(', ') if part in wanted]
      assert [colour] == parts if parts else colour not in (ORANGE, GREY), (name, label)
  assert page.arm_colours(catalog.STUDIES['overconfidence'])['certainty of the reference'] == BLUE


@pytest.mark.parametrize(('preset', 'condition', 'width'), [('tiny', 'N = 5', 'width 128'),
                                                            ('small', 'N = 6', 'width 192')])
def test_labels_say_the_presets_numbers(preset, condition, width):
  levels, sizes = (references.with_numbers(references.suited(catalog.STUDIES[name], preset), preset)
                   for name in ('pretraining_levels', 'sizes'))
  for study, own in ((levels, condition), (sizes, width)):
    labels = [arm.label for arm in study.arms if not arm.pretraining]
    assert labels == [f'{name}, {own}' for name in ('prioritized', 'standard', 'no penalty')]
    assert len({arm.label for arm in study.arms}) == len(study.arms)
    assert {label for pair in study.contrasts for label in pair} == {arm.label for arm in study.arms}


def test_climbs_have_a_column_for_each_penalty(figures, tmp_path):
  runs = [{'digits': 2, 'accuracy': 0.9, 'accuracy_known': 1.0}, {'digits': 3, 'accuracy': 0.2, 'accuracy_known': 0.9},
          {'digits': 3, 'accuracy': 0.4, 'accuracy_known': 0.8}]
  arms = {label: {'climbs': {0: runs, 1: runs[:1]}} for label in ('no penalty', 'prioritized')}
  ladder_page._plot_climbs({'arms': arms, 'question': 'How far?', 'extra_digits': 1}, tmp_path / 'climbs.png')
  assert titles(figures[0]) == [f'{label}: greedy accuracy on {what}' for what in (
      'the digits trained on', 'one digit fewer') for label in arms]
  first, second = (axis.get_lines() for axis in figures[0].axes[:2])
  assert [line.get_color() for line in (first[0], second[0])] == [GREY, BLUE]
  assert np.allclose(first[0].get_xydata(), [[2, 0.9], [3, 0.2], [3.12, 0.4]])


def test_references_of_more_digits_are_darker(figures, tmp_path):
  levels = {str(n): [{'digits': n + k, 'distribution': lengths, 'accuracy': 0.5, 'low': 0.4, 'high': 0.7}
                     for k in (0, 1) for lengths in ('identical', 'varying')] for n in (6, 3, 5)}
  references_page.plot_levels(levels, tmp_path / 'levels.png')
  legend = figures[0].legends[0]
  assert [text.get_text() for text in legend.get_texts()] == ['N = 3', 'N = 5', 'N = 6']
  colours = [container.lines[0].get_color() for container in figures[0].axes[0].containers]
  assert len({*colours, BLUE, ORANGE, GREY}) == 6
  (_, _, (bars,)) = figures[0].axes[0].containers[0].lines
  assert np.allclose(bars.get_segments()[0], [[0, 40], [0, 70]])


def test_positions_with_critical_tokens_have_their_colour(figures, tmp_path):
  means = {name: np.array([0.5, 0.01]) for name in ('certainty', 'entropy', 'error')}
  plot_generations(np.array([-0.1, -0.3]), means, np.array([0.0, 0.5]), tmp_path / 'x.png', 'title')
  dots = figures[0].axes[1].collections[0]
  figures[0].draw_without_rendering()
  assert to_hex(dots.get_facecolor()[1]) == CRITICAL
  assert figures[0].axes[0].texts[0].get_text() == 'mean -0.200'
