import matplotlib.colors
import pytest
from matplotlib.figure import Figure

from critkl_jax.analysis import style
from critkl_jax.analysis.style import OTHERS, PENALTIES, colours_of, split_label

BLUE, ORANGE, GREY = PENALTIES['prioritized'], PENALTIES['standard'], PENALTIES['none']


@pytest.mark.parametrize(('label', 'own', 'condition'), [
    ('standard', 'standard', ''), ('no penalty, N = 3', 'no penalty', 'N = 3'),
    ("the paper's, prioritized", 'prioritized', "the paper's"), ('PPO, group-relative', 'PPO, group-relative', ''),
    ('uniform, of equal mean weight', 'uniform, of equal mean weight', ''), ('all', 'all', ''),
    ('certainty_exponent=10.0', 'certainty_exponent=10.0', ''),
    ('kl=standard learning_rate=1e-05', 'kl=standard', 'learning_rate=1e-05'),
    ('kl=prioritized certainty_exponent=10.0 temperature=1.0', 'certainty_exponent=10.0', 'temperature=1.0'),
    ('learning_rate=1e-05 temperature=1.0', 'learning_rate=1e-05', 'temperature=1.0')])
def test_labels_are_split(label, own, condition):
  assert split_label(label) == (own, condition)


def test_the_three_penalties():
  assert (BLUE, ORANGE, GREY) == ('#2a6f97', '#d9480f', '#6c757d')
  assert colours_of(['standard', 'none', 'no penalty', 'prioritized']) == {
      'standard': ORANGE, 'none': GREY, 'no penalty': GREY, 'prioritized': BLUE}
  assert set(colours_of(['kl=standard', 'standard, N = 3', "the paper's, standard", 'certainty_exponent=0.0',
                         'kl=standard learning_rate=1e-05']).values()) == {ORANGE}
  assert colours_of(['own name', 'other'], {'own name': 'prioritized'}) == {'own name': BLUE, 'other': OTHERS[0]}


def test_exponents_go_from_light_to_dark_with_the_prioritized_one_at_its_place():
  exponents = [f'exponent {n}' for n in (1, 10, 50, 500, 1000, 10000)]
  found = colours_of(['standard', *reversed(exponents), 'prioritized', 'no penalty'])
  assert (found['standard'], found['prioritized'], found['no penalty']) == (ORANGE, BLUE, GREY)
  order = [found[name] for name in (*exponents[:3], 'prioritized', *exponents[3:])]
  light = [sum(a * b for a, b in zip(matplotlib.colors.to_rgb(colour), (0.21, 0.72, 0.07))) for colour in order]
  assert light == sorted(light, reverse=True)
  assert len(set(order)) == len(order)
  values = colours_of(f'learning_rate={rate}' for rate in ('1e-05', '2e-05', '0.0001'))
  assert len(set(values.values())) == 3
  assert not set(values.values()) & {*PENALTIES.values(), *OTHERS}


def test_other_labels_have_a_fixed_order_far_from_the_penalties():
  assert list(colours_of('ab').values()) == list(OTHERS[:2])
  assert len(set(OTHERS)) == len(OTHERS) >= 8
  for colour in OTHERS:
    for penalty in PENALTIES.values():
      one, two = map(matplotlib.colors.to_rgb, (colour, penalty))
      assert sum((a - b)**2 for a, b in zip(one, two)) > 0.04, (colour, penalty)


def test_titles_show_dollars_and_break_into_lines_that_fit(tmp_path):
  figure = Figure(figsize=(4, 2))
  style.panel_title(figure.add_subplot(1, 2, 1), 'a title of very many words for such a panel', 2.0)
  style.save(figure, tmp_path / 'x.png', 'a $path$\nand ' + 20 * 'word ', 'How to read it.')
  lines = figure.get_suptitle().split('\n')
  assert lines[0] == r'a \$path\$'
  assert lines[-1] == 'How to read it.'
  assert max(map(len, lines)) <= 4 * 13
  assert len(figure.axes[0].get_title().split('\n')) == 3
