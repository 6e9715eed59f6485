"""Compares the weight of the KL penalty, as a function of the reference's entropy, at three sizes of the vocabulary.

The paper's exponent 150 means another entropy at each vocabulary; `exponent_for` gives exponents by which the weight is
1/2 at the same entropy everywhere. With a path it also draws both, as in docs/trainers.md.

    python examples/exponent_plot.py
    python examples/exponent_plot.py weight_over_entropy.png
"""

import sys

import numpy as np

from critkl_jax import exponent_for, half_weight_entropy, kl_weight

VOCABULARIES = {41: ('#1b9e77', 5), 32_000: ('#7570b3', 3), 151_936: ('#d95f02', 1)}  # color and width of each line
ENTROPY = 0.05  # nats


def main(path: str = '') -> None:
  """Prints exponents and entropies, and draws the weights if a path is given."""
  for vocab_size in VOCABULARIES:
    print(f'V {vocab_size}: with exponent 150 the weight is 1/2 at half_weight_entropy '
          f'{half_weight_entropy(150.0, vocab_size):.4f} nats; it is 1/2 at {ENTROPY} nats with exponent_for '
          f'{exponent_for(ENTROPY, vocab_size):.1f}')
  if path:
    draw(path)


def draw(path: str) -> None:
  """Draws the weights with exponent 150 and with fitting exponents, and writes the picture."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9.6, 3.4), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  entropy = np.geomspace(1e-3, 1.0, 400)
  for (vocab_size, (color, width)), y in zip(VOCABULARIES.items(), (0.93, 0.86, 0.79)):
    fitting = exponent_for(ENTROPY, vocab_size)
    for axis, exponent in zip(axes, (150.0, fitting)):
      weight = kl_weight(1 - entropy / np.log(vocab_size), exponent)
      axis.plot(entropy, weight, color=color, linewidth=width)
      axis.text(0.99, y, f'V = {vocab_size:,}: {exponent:.0f}, 1/2 at {half_weight_entropy(exponent, vocab_size):.3f}',
                color=color, transform=axis.transAxes, ha='right', fontsize=8.5)
  for axis, title in zip(axes, ('exponent 150 everywhere', f'exponent_for({ENTROPY}, V)')):
    axis.set(title=title, xlabel='entropy of the reference (nats)', xscale='log', ylim=(0, 1.02))
    axis.axhline(0.5, color='0.8', linewidth=1, zorder=0)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('weight of the KL penalty')
  figure.savefig(path, dpi=110)


if __name__ == '__main__':
  main(*sys.argv[1:])
