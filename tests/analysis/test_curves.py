from matplotlib import image
from matplotlib.figure import Figure

from critkl_jax.analysis.curves import plot_learning_curves, plot_study


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
  assert (tmp_path / 'empty.png').stat().st_size > 0


def test_groups_of_a_condition_have_panels_of_their_own_and_the_same_colours(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(Figure, 'savefig', lambda self, *_, **__: figures.append(self))
  runs = [[{'step': step, 'accuracy': 0.1 * step} for step in (1, 2, 3)] for _ in range(2)]
  groups = {'a, few': runs, 'b, few': runs, 'b, many': runs, 'other': runs}
  plot_study(groups, tmp_path / 'x.png', 'title', conditions={'a, few': 'few', 'b, few': 'few', 'b, many': 'many'})
  axes = figures[0].axes
  assert [axis.get_title() for axis in axes] == [
      'few\naccuracy of the rollouts', 'many\naccuracy of the rollouts', 'accuracy of the rollouts']
  colours = [[line.get_color() for line in axis.get_lines()] for axis in axes]
  assert colours == [['C0', 'C1'], ['C1'], ['C2']]
  assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ['a', 'b', 'other']
  plot_study(groups, tmp_path / 'x.png', 'title')
  assert len(figures[1].axes) == 1
  assert [text.get_text() for text in figures[1].legends[0].get_texts()] == list(groups)
