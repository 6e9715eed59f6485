"""The common style of all pictures: a fixed colour for each penalty, and sizes that are legible on the pages."""

import io
import os
import re
import textwrap
from collections.abc import Iterable, Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.runtime import storage

SMALL_UNIFORM = 'small uniform'  # label of a uniform penalty with a smaller coefficient than the standard one
PENALTIES = {'prioritized': '#2a6f97', 'standard': '#d9480f', 'none': '#6c757d'}
OTHERS = ('#2b8a3e', '#7b2cbf', '#d9a400', '#d6409f', '#0fa3b1', '#7f4f24', '#9bc53d', '#343a40')
CRITICAL, OTHER_TOKENS = OTHERS[1], OTHERS[0]  # critical tokens and all others
POLICY, REFERENCE = OTHERS[0], '#1c2733'
PALE = '#9aa7b4'  # background elements
BEHIND_TEXT = {'facecolor': 'white', 'alpha': 0.7, 'pad': 0.5, 'linewidth': 0}
WIDTH = 9.0  # inches, of a picture as wide as a page's column; a font of 9 points is shown with 12 pixels
DPI = 130
_LETTERS_PER_INCH = 13.0  # in titles


def split_label(label: str) -> tuple[str, str]:
  """Splits the label of a group of runs into two parts: the one that sets the colour, and the condition.

  `standard, N = 3` is `('standard', 'N = 3')`; `kl=standard learning_rate=1e-05` is `('kl=standard',
  'learning_rate=1e-05')`. A label of another form has an empty condition.
  """
  parts = label.split(', ')
  for i in (0, -1):
    if len(parts) > 1 and (penalty_of(parts[i]) or parts[i] == SMALL_UNIFORM):
      return parts[i], ', '.join(parts[1:] if i == 0 else parts[:-1])
  fields = dict(part.split('=', 1) for part in label.split(' ')) if re.fullmatch(r'\S+=\S+( \S+=\S+)*', label) else {}
  if len(fields) < 2:
    return label, ''
  if 'certainty_exponent' in fields:  # implies a prioritized penalty
    fields.pop('kl', None)
  own = next((name for name in ('certainty_exponent', 'kl') if name in fields), next(iter(fields)))
  return f'{own}={fields.pop(own)}', ' '.join(f'{name}={value}' for name, value in fields.items())


def penalty_of(label: str) -> str | None:
  """Returns the key of `PENALTIES` that a label names, or None.

  An exponent of 0 is the standard penalty, the default exponent the prioritized one.
  """
  name = {'no penalty': 'none'}.get(label, label.removeprefix('kl='))
  if name in PENALTIES:
    return name
  stem, value = _number_in(label)
  return {0.0: 'standard', LossConfig().certainty_exponent: 'prioritized'}.get(value) if 'exponent' in stem else None


def colours_of(labels: Iterable[str], penalties: Mapping[str, str] | None = None) -> dict[str, str]:
  """Chooses a colour for each label: penalties have fixed colours, numbers a sequential map, others a fixed order.

  Args:
    labels: labels of groups of runs; their conditions (`split_label`) do not matter.
    penalties: label -> key of `PENALTIES`, for labels that do not name their penalty.

  Returns:
    label -> colour as `#rrggbb`.
  """
  labels = list(labels)
  penalties = {split_label(label)[0]: penalty for label, penalty in (penalties or {}).items()}
  own = {label: split_label(label)[0] for label in labels}
  found = {name: PENALTIES.get(penalties.get(name) or penalty_of(name)) for name in own.values()}
  found |= _sequential([name for name, colour in found.items() if colour is None])
  rest = [name for name, colour in found.items() if colour is None]
  found |= {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}
  return {label: found[name] for label, name in own.items()}


def _sequential(names):
  """Chooses colours for names that end in a number, from light to dark by rank among names that differ only there.

  The map leaves a gap for the prioritized penalty's colour, at the rank of its exponent.
  """
  found, stems = {}, {}
  for name in names:
    stem, value = _number_in(name)
    if stem:
      stems.setdefault(stem, []).append((value, name))
  for stem, some in stems.items():
    lighter = sum(value < LossConfig().certainty_exponent for value, _ in some) if 'exponent' in stem else (
        (len(some) + 1) // 2)
    for i, (_, name) in enumerate(sorted(some)):
      j, number, (start, stop) = (i, lighter, (0.82, 0.5)) if i < lighter else (
          i - lighter, len(some) - lighter, (0.27, 0.0))
      found[name] = to_hex(matplotlib.colormaps['viridis'](start + (stop - start) * j / max(number - 1, 1)))
  return found


def _number_in(label):
  """Splits a label into text and the number at its end; empty text and NaN if there is no number."""
  match = re.fullmatch(r'(\D.*?)[ =]+([-+]?\d[\d.]*(?:e[-+]?\d+)?)', label)
  return (match[1], float(match[2])) if match else ('', float('nan'))


def panel_title(axis: Axes, text: str, inches: float) -> None:
  """Sets the title of a panel and wraps it to the panel's width in inches."""
  axis.set_title(_wrap(text, max(int((inches - 0.5) * _LETTERS_PER_INCH), 12)))  # ticks take half an inch


def _wrap(text, letters):
  """Wraps text to the fewest lines of at most `letters` letters, and balances their lengths."""
  lines = len(textwrap.wrap(text, letters))
  while letters > 1 and len(textwrap.wrap(text, letters - 1)) == lines:
    letters -= 1
  return textwrap.fill(text, letters)


def in_percent(axis: Axis) -> None:
  """Formats the tick labels of an axis in percent."""
  axis.set_major_formatter(lambda x, _: f'{100 * x:.6g} %')


def level_line(axis: Axes, level: float, text: str, height: float | None = None) -> None:
  """Draws a dashed line across a panel, with text at its right end, below the line or at `height`."""
  axis.axhline(level, color=REFERENCE, linestyle=(0, (4, 3)), linewidth=1)
  axis.annotate(text, (1, level if height is None else height), (-2, -2), ha='right', va='top', fontsize=8,
                xycoords=('axes fraction', 'data'), textcoords='offset points', color=REFERENCE, bbox=BEHIND_TEXT)


def save(figure: Figure, path: str | os.PathLike, title: str, note: str = '') -> None:
  """Applies the common style to all panels of a figure, sets its title, and writes it as a PNG.

  Args:
    figure: figure whose panels are drawn.
    path: file to write.
    title: title of the figure; may have several lines; `$` is shown as it is (no mathematics).
    note: line below the title that says how to read the figure.
  """
  for axis in figure.axes:
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.title.set_size(9.5)
    for label in (axis.xaxis.label, axis.yaxis.label):
      label.set_size(9)
    for side in ('top', 'right'):
      axis.spines[side].set_visible(False)
  letters = int(figure.get_size_inches()[0] * _LETTERS_PER_INCH)
  lines = [_wrap(line, letters) for line in f'{title}\n{note}'.strip().split('\n')]
  figure.suptitle('\n'.join(lines).replace('$', r'\$'), fontsize=10.5)
  picture = io.BytesIO()
  figure.savefig(picture, format='png', dpi=DPI)
  storage.write_bytes(path, picture.getvalue())
