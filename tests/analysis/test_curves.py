from matplotlib import image

from critkl_jax.analysis.curves import plot_learning_curves


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
