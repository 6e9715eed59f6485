"""Writes the page of the study of certainty."""

from typing import Any

import numpy as np

from critkl_jax.analysis import charts
from critkl_jax.analysis.detectors import THRESHOLD
from critkl_jax.analysis.statistics import FEWEST_SEEDS
from critkl_jax.runtime import storage
from critkl_jax.studies.catalog import Study
from critkl_jax.studies.certainty_gap import PAPER_GAPS, certainty_results, generation_gaps, position_means
from critkl_jax.studies.files import interval_text, table, write_files
from critkl_jax.studies.plan import Plan


def write_certainty(study: Study, plan: Plan, tokens: dict[str, np.ndarray], known_digits: int,
                    about: dict[str, Any]) -> dict[str, Any]:
  """Writes the study of certainty under `WORKDIR/studies/NAME`, and returns its results.

  Args:
    study: the study.
    plan: plan with the workdir.
    tokens: as in `certainty_gap.certainty_results`.
    known_digits: N.
    about: `commit`, `device` and `seconds`.
  """
  home = plan.workdir / 'studies' / study.name
  home.mkdir(parents=True, exist_ok=True)
  results = {'study': study.name, 'question': study.question, 'counterpart': study.counterpart,
             'known_digits': known_digits, 'extra_digits': plan.base.addition.extra_digits,
             **certainty_results(tokens, len(plan.seeds(study))), **about}
  rows = [{'certainty': kind, **{name: x[0] if isinstance(x, tuple) else x for name, x in found.items()
                                 if not isinstance(x, dict)},
           **{f'{of}_{name}': found[of][name][0] for of in ('detector', 'of_errors')
              for name in ('auroc', 'average_precision') if found[of][name]}}
          for kind, found in results['kinds'].items()]
  write_files(home, results, rows)
  here, critical = tokens['on_path'], tokens['critical/oracle']
  charts.plot_certainty(tokens, home / 'certainty.png', _title(results))
  means = {'certainty': tokens['certainty'], 'entropy': tokens['ref_entropy'], 'error': 1 - tokens['ref_right_prob']}
  charts.plot_generations(
      generation_gaps(tokens['certainty'], critical & here, here & ~critical),
      {name: position_means(values, here) for name, values in means.items()},
      position_means(critical & here, here), home / 'generations.png', _title(results))
  storage.write_text(home / 'README.md', _certainty_page(results))
  return results


def certainty_verdicts(results: dict[str, Any]) -> list[str]:
  """Writes the study's verdicts as sentences; the last one is the failure signature `blind_detector`, if seen."""
  found, known = results['kinds']['negentropy'], results['known_digits']
  if found['gap'] is None:
    return ['No generation gets as far as a critical token: nothing can be said.']
  (_, low, high), detector = found['gap'], found['detector']
  said = 'less certain' if high < 0 else 'more certain' if low > 0 else 'not shown to be less certain'
  paper = f' (the paper, N = {known}: {PAPER_GAPS[known][0]:+.2f} +- {PAPER_GAPS[known][1]:.2f})' if (
      known in PAPER_GAPS) else ''
  auroc, precision = detector['auroc'], detector['average_precision']
  sentences = [
      f'The reference is **{said}** at critical tokens: {interval_text(found["gap"], "+.3f")}{paper}.',
      f'As a detector of critical tokens 1 - certainty has an AUROC of {auroc[0]:.3f} [{auroc[1]:.3f}, {auroc[2]:.3f}] '
      f'and an average precision of {precision[0]:.3f} [{precision[1]:.3f}, {precision[2]:.3f}], at a base rate of '
      f'{detector["base_rate"]:.4f}.',
      f'At {100 * results["certain_and_wrong"]:.1f} % of the critical tokens the reference is sure of a wrong one.']
  if results['first_wrong']:
    first, (errors, *_) = results['first_wrong'], found['of_errors']['auroc']
    shares = [interval_text(first[name], '.0f', 100) for name in ('critical', 'unsure')]
    sentences.append(
        f'Of the {first["generations"]} generations with a wrong token the first one is a critical token in '
        f'{shares[0]} % and one of a certainty below {THRESHOLD} in {shares[1]} %; as a detector of wrong tokens '
        f'1 - certainty has an AUROC of {errors:.3f}.')
  if auroc[1] <= 0.5:
    sentences.append('Signature of failure, `blind_detector`: the interval of the AUROC reaches chance, 0.5.')
  return sentences


def _certainty_page(results):
  def number(value):
    return 'none' if value is None else f'{value:.4f}'

  rows = [[kind, interval_text(found['gap']), number(found['gap_deviation']), number(found['lowest_other']),
           interval_text(found['detector']['auroc']), interval_text(found['detector']['average_precision']),
           interval_text(found['of_errors']['auroc']), interval_text(found['entropy_correlation']),
           interval_text(found['error_correlation']), interval_text(found['expected_error_correlation'])]
          for kind, found in results['kinds'].items()]
  heads = ['certainty', 'critical minus elsewhere', 'deviation between generations', 'lowest elsewhere',
           'AUROC, critical tokens', 'average precision', 'AUROC, wrong tokens', 'Spearman with entropy',
           'Spearman with wrong tokens', 'Spearman with their probability']
  return '\n'.join([
      f'# {results["study"]}', '', f'{results["question"]} Counterpart: {results["counterpart"]}.', '',
      f'{results["generations"]} generations in {results["sets"]} sets, sampled from the reference of N = '
      f'{results["known_digits"]} digits on {results["known_digits"] + results["extra_digits"]}; '
      f'{results["critical_tokens"]} critical tokens and {results["other_tokens"]} others that follow right ones. The '
      f'interval of the gap is over sets, if there are {FEWEST_SEEDS} of them, the others over generations (95 % '
      'bootstrap; exact ones of shares of generations). Correlations are across '
      'positions of the response, of means over generations; negentropy is a function of entropy, so that theirs is -1 '
      'by definition, and the probability of a wrong token is read from the same distributions, so that theirs is near '
      'it.', '', '## What it says', '', *(f'- {sentence}' for sentence in certainty_verdicts(results)), '',
      *table(heads, rows), '', '![generations](generations.png)', '', '![certainty](certainty.png)', '',
      '## How it was made', '',
      f'Commit {results["commit"]} (`+`: with changes not committed), {results["device"]}; {results["seconds"]:.0f} s.',
      ''])


def _title(results):
  """Writes the title of a picture: the question, the model and the problems."""
  return (f'{results["question"]}\nA reference of N = {results["known_digits"]} digits on N + '
          f'{results["extra_digits"]} digits, {results["generations"]} sampled generations')
