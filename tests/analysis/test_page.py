"""Tests the page in a headless browser."""

import html
import json
import re

import numpy as np
import pytest
from browser import BINARY, Browser
from matplotlib.figure import Figure

from critkl_jax.analysis.page import Run, Table, write_page
from critkl_jax.tasks.addition import TOKENIZER

NASTY = '</script><b>&amp; "quotes" \'single\' <!-- <scratch>'
needs_browser = pytest.mark.skipif(BINARY is None, reason="no chromium here: apt-get install chromium")


def tokens_of(num_responses, length=80, seed=0):
  """Makes random arrays in the format of `read_tokens`."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(1, TOKENIZER.vocab_size, (num_responses, length))
  lengths = rng.integers(length - 30, length + 1, num_responses)
  mask = np.arange(length)[None] < lengths[:, None]
  first_error = rng.integers(1, 20, num_responses)[:, None]
  on_path = mask & (np.arange(length)[None] <= first_error)
  share = lambda *shape: rng.random((num_responses, length, *shape)).astype(np.float32)
  tokens = {'problem': np.array([f'{i}+1' for i in range(num_responses)], object),
            'set': np.where(np.arange(num_responses) % 2, '6', '5').astype(object),
            'success': (np.arange(num_responses) % 3 == 0) * 1.0,
            'response': np.array([TOKENIZER.decode(row, own) for row, own in zip(ids, mask)], object), 'token': ids,
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
      'critical_prob', 'other_prob', 'critical_kl', 'other_kl')}
  return {'sets': np.array(['5', '6'], object), 'accuracy': np.linspace([0.1, 0.2], 0.9, num_steps),
          'step': np.arange(num_steps) * 4, **curves, 'mask': mask,
          'right_prob': rng.random((num_steps, 2, length)),
          'critical': mask & (rng.random(mask.shape) < 0.2),
          'token': np.where(mask, [[7], [8]], 0), 'problem': np.array(['1+2', '3+4'], object)}


class Nasty:
  """A vocabulary with one long token of any text; the others are characters."""

  ID = 2**16 + 1  # as large as in today's vocabularies

  def __init__(self, text):
    self.text = text

  def token_texts(self, tokens):
    return [self.text if token == self.ID else TOKENIZER.token_texts([token])[0] for token in tokens]


def page(tmp_path, num_responses, runs=1, nasty=''):
  Figure().savefig(tmp_path / 'picture.png')
  shown = []
  for i in range(runs):
    tokens = tokens_of(num_responses, seed=i)
    if nasty:
      tokens['token'][0, 0] = Nasty.ID
      tokens['problem'][0] = nasty
    shown.append(Run(f'run {i}{nasty}', f'from {nasty}', tokens, {f'picture {nasty}': tmp_path / 'picture.png'},
                     steps_of() if i == 0 else None, ('prioritized', 'standard', '')[i]))
  table = Table(f'T{nasty}', ('', 'a', 'b'), [(f'row {nasty}', nasty, '1' * 60)], f'note {nasty}')
  write_page(tmp_path / 'report.html', shown, Nasty(nasty) if nasty else TOKENIZER, 'about', [table], 'digits')
  return tmp_path / 'report.html'


def shown_order(tokens):
  """Returns the responses in the page's order: longest problems first, and wrong answers first among them."""
  return sorted(range(len(tokens['success'])), key=lambda i: (-int(tokens['set'][i]), tokens['success'][i]))


@pytest.fixture(scope='module')
def browser():
  with Browser() as found:
    yield found


@pytest.fixture
def opened(browser):
  """Opens a page with a state in its address, and returns its rendered HTML."""

  def opened(path, state='', **size):
    browser.open(f'{path.as_uri()}#{state}', **size)
    assert browser.run('document.querySelector("#error").hidden'), browser.run('document.body.innerText')
    return dom_of(browser)

  return opened


def dom_of(browser):
  return re.sub(r'<script.*?</script>', '', browser.run('document.documentElement.outerHTML'), flags=re.S)


def box_of(browser, selector):
  """Returns the box of an element in the window: left, top, right, bottom."""
  return browser.run(f'(b => [b.left, b.top, b.right, b.bottom])(document.querySelector({json.dumps(selector)})'
                     '.getBoundingClientRect())')


def middle(browser, number):
  """Scrolls a token into view, by its number among the shown tokens, and returns its centre."""
  browser.run(f'window.token = document.querySelectorAll("#responses span[data-k]")[{number}]; '
              'token.scrollIntoView({block: "center"})')
  return browser.run('(b => [b.left + b.width / 2, b.top + b.height / 2])(token.getBoundingClientRect())')


def spans(dom):
  """Returns the shown responses' tokens as (classes, background, text)."""
  box = dom[dom.index('<div id="responses">'):]
  return [(re.search(r'class="([^"]*)"', attributes), re.search(r'background: ([^;"]*)', attributes),
           html.unescape(text)) for attributes, text in re.findall(r'<span((?=[^>]*data-k)[^>]*)>([^<]*)</span>', box)]


@needs_browser
@pytest.mark.parametrize('num_responses', [1, 500])
def test_every_response_can_be_seen(opened, tmp_path, num_responses):
  path, tokens = page(tmp_path, num_responses), tokens_of(num_responses)
  assert path.stat().st_size < 20e6
  last = (num_responses - 1) // 20
  for number in {0, last}:
    dom = opened(path, f'page={number}')
    first, end = 20 * number, min(20 * number + 20, num_responses)
    some = shown_order(tokens)[first:end]
    assert f'{first + 1} to {end} of {num_responses}' in dom
    text = ''.join(text for _, _, text in spans(dom))
    assert text == ''.join(tokens['response'][i].replace('\n', '\u21b5\n') for i in some)


@needs_browser
def test_filters_and_colours(opened, tmp_path):
  path, tokens = page(tmp_path, 30), tokens_of(30)
  wrong = [i for i in shown_order(tokens) if not tokens['success'][i]]
  dom = opened(path, 'wrong=1&detector=1&critical=1')
  assert f'1 to {len(wrong)} of {len(wrong)}' in dom
  shown = spans(dom)
  called = np.concatenate([tokens['critical/threshold'][i][tokens['mask'][i]] for i in wrong])
  assert [bool(classes and 'critical' in classes[1].split()) for classes, _, _ in shown] == called.tolist()
  assert all(classes and ('critical' in classes[1]) != ('pale' in classes[1]) for classes, _, _ in shown)
  assert sum('error' in classes[1].split() for classes, _, _ in shown) == sum(
      (tokens['on_path'][i] & ~tokens['right'][i]).any() for i in wrong)
  assert ' of 15' in opened(path, 'set=2')
  colours = {state: [b and b[1] for _, b, _ in spans(opened(path, f'colour={state}'))]
             for state in ('certainty', 'weight', 'kl', 'right')}
  assert all(len(set(some)) > 3 for some in colours.values())
  assert len({tuple(some) for some in colours.values()}) == 4
  off_path = ~np.concatenate([tokens['on_path'][i][tokens['mask'][i]] for i in shown_order(tokens)[:20]])
  assert [b is None for b in colours['right']] == off_path.tolist()
  first = shown_order(tokens)[0]
  weight = tokens['weight'][first][tokens['mask'][first]]
  low, high = np.argmin(weight), np.argmax(weight)
  red, blue = ([int(n) for n in re.findall(r'\d+', colours['weight'][k])] for k in (low, high))
  assert red[0] > red[2]
  assert blue[2] > blue[0]


@needs_browser
def test_a_token_that_was_clicked_shows_its_alternatives(opened, tmp_path):
  path, tokens = page(tmp_path, 3), tokens_of(3)
  k = int(tokens['mask'][0].sum()) + 4  # of the second response
  assert_tip(opened(path, f'token={k}'), tokens, 1, 4)


@needs_browser
def test_a_token_that_is_pointed_at_shows_its_alternatives(browser, opened, tmp_path):
  path, tokens = page(tmp_path, 3), tokens_of(3)
  opened(path)
  browser.move(*middle(browser, 7))
  assert_tip(dom_of(browser), tokens, shown_order(tokens)[0], 7)
  browser.move(5, 5)
  assert browser.run('document.querySelector("#tip").hidden')


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
def test_what_is_no_number_breaks_nothing(opened, tmp_path):
  tokens, steps = tokens_of(2), steps_of()
  for name in ('kl', 'right_prob', 'top_prob'):
    tokens[name][:] = np.nan
  tokens['success'] = np.full(2, np.nan)
  steps['critical_kl'][1] = np.nan
  steps['right_prob'][1] = np.nan
  write_page(tmp_path / 'nan.html', [Run('nan', '', tokens, {}, steps)], TOKENIZER, '')
  dom = opened(tmp_path / 'nan.html', 'colour=kl&step=1&run=x&detector=9')
  assert all(background is None for _, background, _ in spans(dom))
  assert 'right solution' in dom


@needs_browser
def test_steps_can_be_gone_through(opened, tmp_path):
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
def test_text_is_text(opened, tmp_path):
  dom = opened(page(tmp_path, 5, nasty=NASTY), 'token=0')
  assert '<b>&amp;' not in dom.replace('&amp;amp;', '')
  assert NASTY in ''.join(text for _, _, text in spans(dom))
  assert html.unescape(dom).count(NASTY) >= 4


@needs_browser
def test_definitions_then_responses_then_pictures_then_tables(browser, opened, tmp_path):
  opened(page(tmp_path, 30))
  found = browser.run('[...document.querySelectorAll("dt, #responses, #charts, #pictures, #tables")]'
                      '.map(e => [e.id || e.textContent, e.getBoundingClientRect().top])')
  assert [name for name, _ in found] == ['Policy and reference', 'Certainty', 'Critical token', 'Weight', 'Oracle',
                                         'responses', 'charts', 'pictures', 'tables']
  tops = [top for _, top in found]
  assert tops == sorted(tops)
  assert tops[5] < 600  # responses begin in the first window
  lines = browser.run('[...document.querySelectorAll("dl > div")].map(e => e.getBoundingClientRect().height)')
  assert max(lines) < 30  # a line each


@needs_browser
def test_the_scale_is_logarithmic_and_of_what_occurs(browser, opened, tmp_path):
  tokens = tokens_of(4)
  tokens['certainty'] = 1 - 10 ** (-3.9 * tokens['certainty'])  # 0 to 0.9999
  write_page(tmp_path / 'log.html', [Run('a', '', tokens, {})], TOKENIZER, '')
  opened(tmp_path / 'log.html')
  ticks = browser.run('[...document.querySelectorAll("#scale span")]'
                      '.map(e => [e.textContent, parseFloat(e.style.left)])')
  assert ticks == [['0', 0], ['0.9', 25], ['0.99', 50], ['0.999', 75], ['0.9999', 100]]
  tokens['certainty'] = 1 - (1 - tokens['certainty']) / 100
  write_page(tmp_path / 'log.html', [Run('a', '', tokens, {})], TOKENIZER, '')
  opened(tmp_path / 'log.html')
  ticks = browser.run('[...document.querySelectorAll("#scale span")].map(e => e.textContent)')
  assert ticks == ['0.99', '0.999', '0.9999', '0.99999']  # the axis ends there
  assert len(set(browser.run('[...document.querySelectorAll("#responses span")].map(e => e.style.background)'))) > 30


@needs_browser
@pytest.mark.parametrize('size', [(1280, 900), (390, 800)])
def test_the_tip_of_a_pinned_token_is_at_its_token(browser, opened, tmp_path, size):
  path, tokens = page(tmp_path, 60, runs=2), tokens_of(60)
  last = shown_order(tokens)[19]
  k = int(tokens['mask'][:last].sum()) + 30
  opened(path, f'token={k}', width=size[0], height=size[1])
  token, tip = box_of(browser, '.pinned'), box_of(browser, '#tip')
  assert 0 <= token[1] < token[3] <= size[1]
  assert min(abs(tip[1] - token[3]), abs(tip[3] - token[1])) < 12  # below or above it
  assert tip[0] <= token[0] + 1 <= tip[2]
  assert 0 <= tip[0] < tip[2] <= size[0]
  browser.run('new Promise(done => { scrollBy(0, -100); setTimeout(done, 200); })')
  moved = box_of(browser, '.pinned')
  assert moved[1] == pytest.approx(token[1] + 100)
  tip = box_of(browser, '#tip')
  assert min(abs(tip[1] - moved[3]), abs(tip[3] - moved[1])) < 12


@needs_browser
@pytest.mark.parametrize('runs', [1, 2])
def test_a_telephone_shows_all(browser, opened, tmp_path, runs):
  opened(page(tmp_path, 30, runs=runs, nasty='/a/long/path' * 4), 'token=3', width=390, height=800)
  assert browser.run('document.documentElement.scrollWidth') == 390
  wide = browser.run("""[...document.querySelectorAll("body *")].filter(e => !e.parentNode.closest(".scroll, svg"))
    .filter(e => e.getBoundingClientRect().right > 390.5 || e.scrollWidth > e.clientWidth + 1 && e.clientWidth
            && !e.matches(".scroll, .scale, select")).map(e => e.outerHTML.slice(0, 80))""")
  assert wide == []
  assert browser.run('document.querySelectorAll(".scroll table, .scroll img").length') > 1


@needs_browser
def test_a_tap_opens_and_closes(browser, opened, tmp_path):
  path, tokens = page(tmp_path, 3), tokens_of(3)
  opened(path, width=390, height=800)
  browser.tap(*middle(browser, 7))
  assert_tip(dom_of(browser), tokens, shown_order(tokens)[0], 7)
  assert f'token={int(tokens["mask"][0].sum()) + 7}&' in browser.run('location.hash')
  browser.tap(3, 3)
  assert browser.run('document.querySelector("#tip").hidden')
  assert 'token=&' in browser.run('location.hash')


@needs_browser
def test_the_keyboard_reaches_every_token(browser, opened, tmp_path):
  path, tokens = page(tmp_path, 3), tokens_of(3)
  opened(path)
  first = shown_order(tokens)[0]
  browser.run('document.querySelector("#critical").focus()')
  for _ in range(20):
    browser.press('Tab')
    if browser.run('Boolean(document.activeElement.dataset.k)'):
      break
  assert_tip(dom_of(browser), tokens, first, 0)
  for _ in range(5):
    browser.press('ArrowRight')
  browser.press('ArrowLeft')
  assert_tip(dom_of(browser), tokens, first, 4)
  role, described, label = (browser.run(f'document.activeElement.getAttribute("{name}")')
                            for name in ('role', 'aria-describedby', 'aria-label'))
  assert (role, described) == ('button', 'tip')
  assert label.startswith('token 4: ')
  browser.press('Enter')
  browser.move(*middle(browser, 20))
  assert_tip(dom_of(browser), tokens, first, 4)  # kept
  browser.press('Escape')
  assert browser.run('document.querySelector("#tip").hidden')
  browser.press('End')
  assert_tip(dom_of(browser), tokens, first, int(tokens['mask'][first].sum()) - 1)
  browser.press('Tab')  # the next response
  assert_tip(dom_of(browser), tokens, shown_order(tokens)[1], 0)


@needs_browser
def test_arrow_keys_go_from_line_to_line(browser, opened, tmp_path):
  opened(page(tmp_path, 3), width=390, height=800)
  browser.run('document.querySelector("#responses span[data-k]").focus()')
  place = '(b => [b.left, b.top + scrollY])(document.activeElement.getBoundingClientRect())'
  for key, lines in (('ArrowDown', 1), ('ArrowUp', -1)):
    before = browser.run(place)
    browser.press(key)
    after = browser.run(place)
    assert after[0] == pytest.approx(before[0], abs=5)
    assert 15 < lines * (after[1] - before[1]) < 40
  browser.press('Home')
  assert browser.run('document.activeElement === document.querySelector("#responses span[data-k]")')


@needs_browser
def test_the_same_problem_of_two_runs_stands_side_by_side(browser, opened, tmp_path):
  path, left, right = page(tmp_path, 30, runs=2), tokens_of(30, seed=0), tokens_of(30, seed=1)
  opened(path, 'token=3&side=1')
  rows = browser.run("""[...document.querySelectorAll(".problem")].filter(e => e.querySelector(".answers"))
    .map(e => [e.querySelector("b").textContent, ...[...e.querySelectorAll("pre")].flatMap(
      p => [p.textContent, p.getBoundingClientRect().top, p.getBoundingClientRect().left])])""")
  for (problem, one, top, start, two, other_top, other_start), i in zip(rows, shown_order(left), strict=False):
    assert problem == left['problem'][i]
    assert one.replace('\u21b5', '') == left['response'][i]
    assert two.replace('\u21b5', '') == right['response'][i]
    assert top == other_top
    assert other_start > start + 300
  assert len(rows) == 20
  alone = opened(path, 'run=1&beside=-1')
  assert alone.count('role="group"') == 20


@needs_browser
def test_critical_tokens_keep_their_glyphs(browser, opened, tmp_path):
  opened(page(tmp_path, 3))
  shadow, outline = browser.run('(s => [s.boxShadow, s.outlineStyle])(getComputedStyle('
                                'document.querySelector("#responses .critical")))')
  assert outline == 'none'
  assert 'inset' not in shadow
  assert all(float(offset) == 0 for offset in re.findall(r'\) ([-\d.]+)px', shadow))  # nothing left or right of it


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
  one, two = (Run('a', '', tokens_of(1), {}) for _ in range(2))
  del two.tokens['critical/threshold']
  with pytest.raises(ValueError, match='read with the same detectors'):
    write_page(tmp_path / 'x.html', [one, two], TOKENIZER, '')
