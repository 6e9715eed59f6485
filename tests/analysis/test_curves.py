from matplotlib import image
from matplotlib.colors import to_hex

from critkl_jax.analysis.curves import MOST_BANDS, plot_learning_curves, plot_study
from critkl_jax.analysis.statistics import FEWEST_SEEDS
from critkl_jax.analysis.style import OTHERS, PENALTIES, REFERENCE

BLUE, ORANGE, GREY = PENALTIES['prioritized'], PENALTIES['standard'], PENALTIES['none']



def runs(number=FEWEST_SEEDS, **metrics):
  return [[{'step': step, 'accuracy': 0.1 * step + 0.01 * i, **metrics} for step in (1, 2, 3)] for i in range(number)]


def curves(axis):
  """Returns the colours of the mean curves of a panel."""
  return [line.get_color() for line in axis.get_lines() if line.get_linestyle() == '-' and line.get_linewidth() > 1]


def bands(axis):
  return [to_hex(band.get_facecolor()[0]) for band in axis.collections]


def test_a_panel_for_each_metric_that_is_there(tmp_path):
  rows = [{'step': i, 'accuracy': i / 10, 'kl': 0.1, 'other': 1.0} for i in range(5)]
  plot_learning_curves(rows, tmp_path / 'two.png', 'two panels')
  plot_learning_curves([row | {'weight': 0.5} for row in rows], tmp_path / 'three.png', 'three panels')
  two, three = (image.imread(tmp_path / name) for name in ('two.png', 'three.png'))
  assert two.shape[0] == three.shape[0]
  assert three.shape[1] > 1.3 * two.shape[1]
  assert two[..., :3].std() > 0.05


def test_no_metrics_make_an_empty_picture(tmp_path):
  plot_learning_curves([], tmp_path / 'empty.png', 'nothing yet')
  plot_study({}, tmp_path / 'none.png', 'no runs yet')
  assert (tmp_path / 'empty.png').stat().st_size > 0
  assert (tmp_path / 'none.png').stat().st_size > 0


def test_a_run_has_its_penaltys_colour_and_its_references_accuracy(tmp_path, figures):
  rows = [{'step': i, 'accuracy': i / 10, 'kl': 0.1} for i in range(5)]
  plot_learning_curves(rows, tmp_path / 'x.png', 'title', reference=0.25, penalty='standard')
  accuracy, kl = figures[0].axes
  assert curves(accuracy) == curves(kl) == [ORANGE]
  (line,) = (line for line in accuracy.get_lines() if line.get_color() == REFERENCE)
  assert list(line.get_ydata()) == [0.25, 0.25]
  assert [text.get_text() for text in accuracy.texts] == ['reference, greedy: 25 %']
  assert not kl.texts
  assert accuracy.yaxis.get_major_formatter()(0.5, 0) == '50 %'
  plot_learning_curves(rows, tmp_path / 'x.png', 'title')
  assert not figures[1].axes[0].texts


def test_groups_of_a_condition_have_panels_of_their_own_and_the_same_colours(tmp_path, figures):
  groups = {'a, few': runs(), 'b, few': runs(), 'b, many': runs(), 'other': runs()}
  plot_study(groups, tmp_path / 'x.png', 'title', conditions={'a, few': 'few', 'b, few': 'few', 'b, many': 'many'},
             colours={'a, few': 'C0', 'b, few': 'C1', 'b, many': 'C1', 'other': 'C2'})
  axes = figures[0].axes
  assert [axis.get_title().replace('\n', ' ') for axis in axes] == [
      f'{condition}: accuracy of sampled answers' for condition in ('few', 'many', 'all else')]
  assert [curves(axis) for axis in axes] == [['C0', 'C1'], ['C1'], ['C2']]
  assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ['a', 'b', 'other']
  plot_study(groups, tmp_path / 'x.png', 'title')
  assert len(figures[1].axes) == 1
  assert [text.get_text() for text in figures[1].legends[0].get_texts()] == list(groups)


def test_penalties_have_one_colour_each_whatever_their_order_and_condition(tmp_path, figures):
  for labels in (['prioritized', 'standard', 'no penalty'], ['none', 'standard', 'mask', 'prioritized']):
    plot_study({label: runs() for label in labels}, tmp_path / 'x.png', 'title')
  assert curves(figures[0].axes[0]) == [BLUE, ORANGE, GREY]
  assert curves(figures[1].axes[0]) == [GREY, ORANGE, OTHERS[0], BLUE]
  plot_study({f'{name}, {rest}': runs() for rest in ('N = 4', 'N = 5') for name in ('standard', 'prioritized')},
             tmp_path / 'x.png', 'title', reference={'standard, N = 4': 0.3, 'prioritized, N = 4': 0.3})
  assert [curves(axis) for axis in figures[2].axes] == [[ORANGE, BLUE]] * 2
  assert [[text.get_text() for text in axis.texts] for axis in figures[2].axes] == [['reference, greedy: 30 %'], []]


def test_many_groups_share_a_panel_without_their_bands(tmp_path, figures):
  few, many = ['standard', *'abc'], ['standard', *'abcdefg', 'prioritized']
  assert len(few) <= MOST_BANDS < len(many)
  for labels in (few, many, many[1:8]):
    plot_study({label: runs() for label in labels}, tmp_path / 'x.png', 'title')
  assert bands(figures[0].axes[0]) == curves(figures[0].axes[0])
  assert bands(figures[1].axes[0]) == [ORANGE, BLUE]
  assert len(curves(figures[1].axes[0])) == len(many)
  assert bands(figures[2].axes[0]) == []
  titles = [' '.join(figure.get_suptitle().split()) for figure in figures]
  assert titles[0] == f'title Lines: mean over {FEWEST_SEEDS} seeds; bands: 95 % interval of the mean over seeds.'
  assert titles[1].endswith('bands (of standard, prioritized): 95 % interval of the mean over seeds.')
  assert 'band' not in titles[2]


def test_few_seeds_have_thin_lines_instead_of_an_interval(tmp_path, figures):
  plot_study({'prioritized': runs(FEWEST_SEEDS - 1)}, tmp_path / 'x.png', 'title')
  (axis,) = figures[0].axes
  assert not axis.collections
  assert len(axis.get_lines()) == 1 + FEWEST_SEEDS - 1
  assert figures[0].get_suptitle().endswith('single seeds.')


def test_a_panel_shows_all_of_its_curves(tmp_path, figures):
  groups = {'standard, slow': runs(kl=0.01), 'standard, fast': runs(kl=1.0)}
  plot_study(groups, tmp_path / 'x.png', 'title')
  for axis in figures[0].axes:
    low, high = axis.get_ylim()
    assert all(low <= y <= high for line in axis.get_lines() for y in line.get_ydata()), axis.get_title()
