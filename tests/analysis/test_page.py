"""The page in a real browser, without a window."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.figure import Figure

from critkl_jax.analysis.page import Run, Table, write_page
from critkl_jax.tasks.addition import TOKENIZER

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser')
NASTY = '</script><b>&amp; "quotes" \'single\' <!-- <scratch>'
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")


def tokens_of(num_responses, length=80, seed=0):
  """Arrays like those of `read_tokens`, of random numbers."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(1, TOKENIZER.vocab_size, (num_responses, length))
  lengths = rng.integers(length - 30, length + 1, num_responses)
  mask = np.arange(length)[None] < lengths[:, None]
  first_error = rng.integers(1, 20, num_responses)[:, None]
  on_path = mask & (np.arange(length)[None] <= first_error)
  share = lambda *shape: rng.random((num_responses, length, *shape)).astype(np.float32)
  tokens = {'problem': np.array([f'{i}+1' for i in range(num_responses)], object),
            'digits': np.where(np.arange(num_responses) % 2, 6, 5), 'reward': (np.arange(num_responses) % 3 == 0) * 1.0,
            'response': np.array([TOKENIZER.decode(row, own) for row, own in zip(ids, mask)], object),
            'mask': mask, 'on_path': on_path, 'right': on_path & (np.arange(length)[None] < first_error)}
  tokens |= {name: share() for name in ('certainty', 'weight', 'kl', 'right_prob', 'ref_right_prob')}
  tokens |= {name: share(5) for name in ('top_prob', 'ref_top_prob')}
  tokens |= {name: rng.integers(0, TOKENIZER.vocab_size, (num_responses, length, 5)) for name in ('top', 'ref_top')}
  tokens |= {f'critical/{name}': mask & (share() < 0.1) for name in ('oracle', 'threshold')}
  return tokens | {'looked_at/oracle': on_path * 1.0, 'looked_at/threshold': mask * 1.0}


def steps_of(num_steps=3, length=30):
  rng = np.random.default_rng(1)
  mask = np.arange(length)[None] < np.array([[20], [30]])
  curves = {name: np.linspace(0.1, 0.9, num_steps) for name in (
      'short', 'long', 'critical_prob', 'other_prob', 'critical_kl', 'other_kl')}
  return {'digits': np.array([5, 6]), 'step': np.arange(num_steps) * 4, **curves, 'mask': mask,
          'right_prob': rng.random((num_steps, 2, length)),
          'critical': mask & (rng.random(mask.shape) < 0.2),
          'response': np.array(['x' * 20, 'y' * 30], object), 'problem': np.array(['1+2', '3+4'], object)}


def page(tmp_path, num_responses, runs=1, nasty=''):
  Figure().savefig(tmp_path / 'picture.png')
  shown = []
  for i in range(runs):
    tokens = tokens_of(num_responses, seed=i)
    if nasty:
      tokens['response'][0] = nasty + 'a' * (int(tokens['mask'][0].sum()) - len(nasty))
      tokens['problem'][0] = nasty
    shown.append(Run(f'run {i}{nasty}', f'from {nasty}', tokens, [Table(f'T{nasty}', ('a', 'b'), [(nasty, '1')])],
                     {f'picture {nasty}': tmp_path / 'picture.png'}, steps_of() if i == 0 else None))
  write_page(tmp_path / 'report.html', shown, TOKENIZER.alphabet, 'about')
  return tmp_path / 'report.html'


def opened(path, state=''):
  """Returns the page as the browser has it after its script."""
  found = subprocess.run(
      [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=10000', '--dump-dom',
       f'{path.as_uri()}#{state}'], capture_output=True, text=True, timeout=120, check=True).stdout
  error = re.search(r'<div id="error"([^>]*)>([^<]*)<', found)
  assert 'hidden' in error[1], error[2]
  return re.sub(r'<script.*?</script>', '', found, flags=re.S)


def spans(dom):
  """Returns the tokens of the responses that are shown: (classes, background, text)."""
  box = dom[dom.index('<div id="responses">'):]
  return [(re.search(r'class="([^"]*)"', attributes), re.search(r'background: ([^;"]*)', attributes),
           html.unescape(text)) for attributes, text in re.findall(r'<span((?=[^>]*data-k)[^>]*)>([^<]*)</span>', box)]


@needs_browser
@pytest.mark.parametrize('num_responses', [1, 500])
def test_every_response_can_be_seen(tmp_path, num_responses):
  path, tokens = page(tmp_path, num_responses), tokens_of(num_responses)
  assert path.stat().st_size < 20e6
  last = (num_responses - 1) // 20
  for number in {0, last}:
    dom = opened(path, f'page={number}')
    some = range(20 * number, min(20 * number + 20, num_responses))
    assert f'{some[0] + 1} to {some[-1] + 1} of {num_responses}' in dom
    text = ''.join(text for _, _, text in spans(dom))
    assert text == ''.join(tokens['response'][i].replace('\n', '\u21b5\n') for i in some)


@needs_browser
def test_filters_and_colours(tmp_path):
  path, tokens = page(tmp_path, 30), tokens_of(30)
  wrong = [i for i in range(30) if not tokens['reward'][i]]
  dom = opened(path, 'wrong=1&detector=1&critical=1')
  assert f'1 to {len(wrong)} of {len(wrong)}' in dom
  shown = spans(dom)
  called = np.concatenate([tokens['critical/threshold'][i][tokens['mask'][i]] for i in wrong])
  assert [bool(classes and 'critical' in classes[1].split()) for classes, _, _ in shown] == called.tolist()
  assert all(classes and ('critical' in classes[1]) != ('pale' in classes[1]) for classes, _, _ in shown)
  assert sum('error' in classes[1].split() for classes, _, _ in shown) == sum(
      (tokens['on_path'][i] & ~tokens['right'][i]).any() for i in wrong)
  assert ' of 15' in opened(path, 'digits=6')
  colours = {state: [b and b[1] for _, b, _ in spans(opened(path, f'colour={state}'))]
             for state in ('certainty', 'weight', 'kl', 'right')}
  assert all(len(set(some)) > 3 for some in colours.values())
  assert len({tuple(some) for some in colours.values()}) == 4
  off_path = ~np.concatenate([tokens['on_path'][i][tokens['mask'][i]] for i in range(20)])
  assert [b is None for b in colours['right']] == off_path.tolist()
  low, high = (np.argmin(tokens['weight'][0][tokens['mask'][0]]), np.argmax(tokens['weight'][0][tokens['mask'][0]]))
  red, blue = ([int(n) for n in re.findall(r'\d+', colours['weight'][k])] for k in (low, high))
  assert red[0] > red[2]
  assert blue[2] > blue[0]


@needs_browser
def test_a_token_that_was_clicked_shows_its_alternatives(tmp_path):
  path, tokens = page(tmp_path, 3), tokens_of(3)
  k = int(tokens['mask'][0].sum()) + 4  # of the second response
  assert_tip(opened(path, f'token={k}'), tokens, 1, 4)


@needs_browser
def test_a_token_that_is_pointed_at_shows_its_alternatives(tmp_path):
  path, tokens = page(tmp_path, 3), tokens_of(3)
  script = ('document.querySelectorAll("#responses span[data-k]")[7].dispatchEvent('
            'new MouseEvent("mousemove", {bubbles: true, clientX: 50, clientY: 60}));')
  path.write_text(path.read_text().replace('setUp();\n</script>', f'setUp();\n{script}\n</script>'))
  assert_tip(opened(path), tokens, 0, 7)


def assert_tip(dom, tokens, i, t):
  tip = dom.split('id="tip"')[1]
  assert 'hidden' not in tip.split('>')[0]
  first, reference, policy = tip.split('<table>')
  assert f'certainty {tokens["certainty"][i, t]:.3g}'[:14] in first
  assert ('after the first wrong token' in first) != tokens['on_path'][i, t]
  assert ('not looked at by: oracle' in first) != tokens['on_path'][i, t]
  for table, name in ((reference, 'ref_top'), (policy, 'top')):
    rows = re.findall(r'<code>([^<]*)</code></td><td>([^<]*)<', table)
    shown = {'\n': '\u21b5', ' ': '\u2423'}
    characters = [TOKENIZER.decode([token]) for token in tokens[name][i, t]]
    assert [html.unescape(c) for c, _ in rows] == [shown.get(c, c) for c in characters]
    np.testing.assert_allclose([float(p) for _, p in rows], tokens[f'{name}_prob'][i, t], rtol=0.01, atol=1e-4)


@needs_browser
def test_what_is_no_number_breaks_nothing(tmp_path):
  tokens, steps = tokens_of(2), steps_of()
  for name in ('kl', 'right_prob', 'top_prob'):
    tokens[name][:] = np.nan
  tokens['reward'] = np.full(2, np.nan)
  steps['critical_kl'][1] = np.nan
  steps['right_prob'][1] = np.nan
  write_page(tmp_path / 'nan.html', [Run('nan', '', tokens, [], {}, steps)], TOKENIZER.alphabet, '')
  dom = opened(tmp_path / 'nan.html', 'colour=kl&step=1&run=x&detector=9')
  assert all(background is None for _, background, _ in spans(dom))
  assert 'right solution' in dom


@needs_browser
def test_steps_can_be_gone_through(tmp_path):
  path = page(tmp_path, 2, runs=2)
  first, last = opened(path, 'step=0'), opened(path)
  assert 'id="stepnumber">0<' in first
  assert 'id="stepnumber">8<' in last
  assert first.count('<polyline') == 6
  solutions = [re.findall(r'background: (rgb[^;"]*)', dom.split('id="solutions"')[1].split('id="pictures"')[0])
               for dom in (first, last)]
  assert len(solutions[0]) == len(solutions[1]) == 50
  assert solutions[0] != solutions[1]
  assert re.search(r'id="stepsection" hidden', opened(path, 'run=1'))


@needs_browser
def test_text_is_text(tmp_path):
  dom = opened(page(tmp_path, 5, nasty=NASTY), 'token=0')
  assert '<b>&amp;' not in dom.replace('&amp;amp;', '')
  assert NASTY in ''.join(text for _, _, text in spans(dom))
  assert html.unescape(dom).count(NASTY) >= 4


def test_the_page_needs_no_network_and_no_other_file(tmp_path):
  text = page(tmp_path, 2).read_text()
  outside = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>)]+)', text)
  assert all(link.startswith('data:') for link in outside)
  assert 'http' not in text.replace('http://www.w3.org/2000/svg', '')


def test_data_cannot_end_the_script(tmp_path):
  text = page(tmp_path, 2, nasty=NASTY).read_text()
  data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
  assert json.loads(data)['runs'][0]['responses'][0]['problem'] == NASTY
  assert text.count('</script>') == 2


def test_runs_must_have_been_read_alike(tmp_path):
  one, two = (Run('a', '', tokens_of(1), [], {}) for _ in range(2))
  del two.tokens['critical/threshold']
  with pytest.raises(ValueError, match='read with the same detectors'):
    write_page(tmp_path / 'x.html', [one, two], TOKENIZER.alphabet, '')
