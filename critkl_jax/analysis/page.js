'use strict';
const $ = id => document.getElementById(id);
window.onerror = (message, source, line) => { $('error').hidden = false; $('error').textContent = `${message} (line ${line})`; };
const data = JSON.parse($('data').textContent);
const PAGE = 20, ON_PATH = 1, RIGHT = 2, critical = i => 1 << 2 + 2 * i, lookedAt = i => 1 << 3 + 2 * i;
const PENALTY = {prioritized: '#2a6f97', standard: '#d9480f', none: '#6c757d'}, CRITICAL = '#7a3e9d', OTHER = '#2b8a6e';

// The page's state is kept in its address. `token` is the token whose tip stays open, in column `side`; `beside` is the
// second run, -1 for none.
const options = new URLSearchParams(location.hash.slice(1));
const state = {run: 0, beside: -2, colour: 'certainty', detector: 0, wrong: 0, critical: 0, set: 0, page: 0, step: -1, token: '', side: 0};
for (const name in state) if (options.has(name)) {
  const given = options.get(name);
  state[name] = typeof state[name] === 'number' ? Math.trunc(Number(given)) || 0 : given;
}
const remember = () => history.replaceState(null, '', '#' + new URLSearchParams(Object.entries(state).map(([k, v]) => [k, String(v)])));
const run = () => data.runs[state.run];
const shownRuns = () => state.beside < 0 ? [run()] : [run(), data.runs[state.beside]];

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function scrolled(label, child) {  // wider than a telephone: it scrolls by itself
  const made = element('div', {className: 'scroll', tabIndex: 0}, child);
  made.setAttribute('role', 'region');
  made.setAttribute('aria-label', label);
  return made;
}

function nameOf(run) {
  const name = element('b', {textContent: run.name});
  if (PENALTY[run.penalty]) name.prepend(element('span', {className: 'dot', style: `background: ${PENALTY[run.penalty]}`}));
  return name;
}

// Arrays travel as base64 of little-endian numbers.
const kinds = {u1: Uint8Array, u2: Uint16Array, f4: Float32Array, u4: Uint32Array};
function unpack([kind, text]) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new kinds[kind](bytes.buffer);
}
function unpacked(run) {
  if (run.arrays) return run.arrays;
  run.arrays = Object.fromEntries(Object.entries(run.packed).map(([name, packed]) => [name, unpack(packed)]));
  run.starts = [0];
  for (const r of run.responses) run.starts.push(run.starts.at(-1) + r.length);
  return run.arrays;
}

// Formats a number with three digits, or near 1 with as many as distinguish it from 1.
function number(x) {
  if (x === null || x === undefined || isNaN(x)) return 'none';
  if (x > .9 && x < 1 - 5e-8) return x.toFixed(Math.max(3, -Math.floor(Math.log10(1 - x))));
  return String(Number(Number(x).toPrecision(3)));
}
const shown = text => text.replaceAll('\n', '\u21b5').replaceAll(' ', '\u2423');
const textOf = id => data.texts[id] ?? '\ufffd';

// Maps 0..1 to a colour from red over yellow and green to blue, light enough for dark text.
function mix(share) {
  const stops = [[246, 138, 110], [253, 219, 140], [205, 232, 180], [190, 221, 246]];
  const at = Math.min(Math.max(share, 0), 1) * 3, low = Math.min(Math.floor(at), 2), rest = at - low;
  return `rgb(${stops[low].map((x, i) => Math.round(x + rest * (stops[low + 1][i] - x))).join(',')})`;
}

// A scale: `of` maps a token to its axis (null: no value); `range` of the axis (default: that of all tokens); `text` of a
// tick; `reversed`: blue is low. Values near 1 are shown as -log10(1 - x), the number of nines, up to five.
const nines = x => -Math.log10(Math.max(1 - x, 1e-5));
const nineText = v => v === 0 ? '0' : '0.' + '9'.repeat(v);
const scales = {
  certainty: {of: (a, i) => nines(a.certainty[i]), text: nineText},
  weight: {of: (a, i) => a.weight[i] / 65535, range: [0, 1], text: String},
  kl: {of: (a, i) => isNaN(a.kl[i]) ? null : Math.log10(Math.max(a.kl[i], 1e-4)), text: v => number(10 ** v), reversed: true},
  right: {of: (a, i) => a.flags[i] & ON_PATH ? Math.min(nines(a.right[i] / 65535), 4) : null, text: nineText},
};

function rangeOf(scale) {  // whole numbers around all tokens of all runs, so that a colour means the same in each run
  if (scale.range) return scale.range;
  let least = Infinity, most = -Infinity;
  for (const run of data.runs) {
    const a = unpacked(run);
    for (let i = 0; i < a.flags.length; i++) {
      const value = scale.of(a, i);
      if (value !== null) { least = Math.min(least, value); most = Math.max(most, value); }
    }
  }
  const low = Number.isFinite(least) ? Math.floor(least) : 0;
  return scale.range = [low, Math.max(Math.ceil(most - 1e-6), low + 1)];
}

function painter(scale) {
  const [low, high] = rangeOf(scale);
  return (a, i) => {
    const value = scale.of(a, i), share = (value - low) / (high - low);
    return value === null ? null : scale.reversed ? 1 - share : share;
  };
}

function drawScale(box, scale) {
  const [low, high] = rangeOf(scale), whole = high - low > 1 || scale.text === nineText, ticks = [];
  const apart = whole ? Math.ceil((high - low) / 6) : .25;
  for (let v = low; v <= high; v += apart) ticks.push(v);
  const colours = Array.from({length: 13}, (_, i) => mix(scale.reversed ? 1 - i / 12 : i / 12));
  box.style.background = `linear-gradient(to right, ${colours.join(', ')})`;
  box.replaceChildren(...ticks.map(v => element('span', {textContent: scale.text(v), style: `left: ${100 * (v - low) / (high - low)}%`})));
}

function tokens(box, ids, first, paint, extra) {
  ids.forEach((id, j) => {
    const span = element('span', {textContent: textOf(id).replaceAll('\n', '\u21b5\n')});
    const share = paint(first + j);
    if (share !== null) span.style.background = mix(share);
    extra(span, first + j);
    box.append(span);
  });
}

// A row holds the responses of all shown runs to one problem. The last problem set comes first, and within a set the
// problems with wrong answers.
function chosenRows() {
  const rows = new Map();
  shownRuns().forEach((run, side) => {
    const seen = new Map();
    run.responses.forEach((r, i) => {
      const problem = `${r.set} ${r.problem}`, times = seen.get(problem) ?? 0, key = `${times} ${problem}`;
      seen.set(problem, times + 1);
      if (!rows.has(key)) rows.set(key, {problem: r.problem, set: r.set, places: [], wrong: 0});
      rows.get(key).places.push([side, i]);
      if (r.success === 0) rows.get(key).wrong += 2 - side;
    });
  });
  return [...rows.values()].filter(r => (!state.wrong || r.wrong) && (!state.set || r.set === state.set - 1))
    .sort((x, y) => y.set - x.set || y.wrong - x.wrong);
}

function showResponses() {
  closeTip();
  const all = chosenRows(), last = Math.max(Math.ceil(all.length / PAGE) - 1, 0);
  state.page = Math.min(Math.max(state.page, 0), last);
  const some = all.slice(state.page * PAGE, (state.page + 1) * PAGE);
  $('where').textContent = all.length ? `${state.page * PAGE + 1} to ${state.page * PAGE + some.length} of ${all.length}` : 'none';
  $('back').disabled = state.page === 0; $('forth').disabled = state.page === last;
  $('scalename').textContent = $('colour').selectedOptions[0].textContent;
  drawScale($('scale'), scales[state.colour]);
  $('reading').classList.toggle('beside', state.beside >= 0);
  $('responses').replaceChildren(...some.map(row => {
    const answers = element('div', {className: 'answers'}, ...row.places.map(([side, i]) => answer(side, i)));
    return element('div', {className: 'problem'}, element('b', {textContent: row.problem}),
      element('span', {className: 'soft', textContent: ` ${data.sets[row.set]}`}), answers);
  }));
}

function answer(side, i) {
  const run = shownRuns()[side], a = unpacked(run), r = run.responses[i], bit = critical(state.detector);
  const box = element('pre', {className: 'text'}), paint = painter(scales[state.colour]);
  let wrong = false;
  tokens(box, a.ids.subarray(run.starts[i], run.starts[i + 1]), run.starts[i], k => paint(a, k), (span, k) => {
    span.dataset.k = k;
    if (a.flags[k] & bit) span.classList.add('critical'); else if (state.critical) span.classList.add('pale');
    if (!wrong && a.flags[k] & ON_PATH && !(a.flags[k] & RIGHT)) { wrong = true; span.classList.add('error'); }
  });
  box.dataset.side = side;
  box.setAttribute('role', 'group');
  box.setAttribute('aria-label', `tokens of the response of ${run.name} to ${r.problem}; arrow keys go from one to the next`);
  if (box.firstChild) makeReachable(box.firstChild);
  const verdict = r.success === null ? 'right solution' : r.success === 0 ? 'wrong' : 'right';
  const line = element('div', {}, element('span', {className: `verdict ${verdict === 'wrong' ? 'wrong' : 'right'}`, textContent: verdict}));
  if (data.runs.length > 1) line.prepend(nameOf(run), ' ');
  return element('div', {}, line, box);
}

// One token of each response is reachable with Tab; the arrow keys move to its neighbours.
function makeReachable(span) {
  for (const old of span.parentNode.querySelectorAll('[tabindex]')) for (const name of ['tabindex', 'role', 'aria-describedby', 'aria-label'])
    old.removeAttribute(name);
  const i = [...span.parentNode.children].indexOf(span);
  span.tabIndex = 0;
  span.setAttribute('role', 'button');
  span.setAttribute('aria-describedby', 'tip');
  span.setAttribute('aria-label', `token ${i}: ${span.textContent.trim() || 'blank'}`);
}

function neighbour(span, key) {
  const text = span.parentNode, next = {ArrowLeft: span.previousElementSibling, ArrowRight: span.nextElementSibling,
    Home: text.firstElementChild, End: text.lastElementChild};
  if (key in next) return next[key];
  if (key !== 'ArrowUp' && key !== 'ArrowDown') return null;
  const way = key === 'ArrowUp' ? 'previousElementSibling' : 'nextElementSibling', place = s => s.getClientRects()[0];
  const own = place(span), apart = (s, y) => Math.abs(place(s).top - y) > 4, off = s => Math.abs(place(s).left - own.left);
  let found = span[way];
  while (found && !apart(found, own.top)) found = found[way];
  if (!found) return null;
  for (let s = found, line = place(found).top; s && !apart(s, line); s = s[way]) if (off(s) < off(found)) found = s;
  return found;
}

const sideOf = span => Number(span.parentNode.dataset.side);
const spanOf = (side, k) => document.querySelector(`#responses pre[data-side="${side}"] span[data-k="${k}"]`);
let tipped = null;  // the token whose tip is open

function alternatives(name, top, probs, k) {
  const rows = [];
  for (let j = 0; j < data.top; j++) rows.push(element('tr', {}, element('td', {}, element('code', {textContent: shown(
    textOf(top[k * data.top + j]))})), element('td', {textContent: number(probs[k * data.top + j] / 65535)})));
  return element('table', {}, element('tr', {}, element('th', {colSpan: 2, textContent: name})), ...rows);
}

function openTip(span) {
  const run = shownRuns()[sideOf(span)], a = unpacked(run), k = Number(span.dataset.k);
  const i = run.starts.findIndex((s, j) => s <= k && k < run.starts[j + 1]);
  const called = data.detectors.filter((d, j) => a.flags[k] & critical(j));
  const unseen = data.detectors.filter((d, j) => !(a.flags[k] & lookedAt(j)));
  $('tip').replaceChildren(
    element('div', {}, element('code', {textContent: shown(textOf(a.ids[k]))}), ` token ${k - run.starts[i]}; critical by: ${called.join(', ') || 'none'}`
      + (unseen.length ? `; not looked at by: ${unseen.join(', ')}` : '')),
    element('div', {textContent: `certainty ${number(a.certainty[k])}, weight ${number(a.weight[k] / 65535)}, KL ${number(a.kl[k])} nats`}),
    ...(data.solutions ? [element('div', {textContent: a.flags[k] & ON_PATH ? `right token: policy ${number(a.right[k] / 65535)}, reference ${number(a.ref_right[k] / 65535)}`
      : 'after the first wrong token'})] : []),
    element('div', {className: 'alternatives'}, alternatives('reference', a.ref_top, a.ref_top_prob, k), alternatives('policy', a.top, a.top_prob, k)));
  tipped = span;
  placeTip();
}

function placeTip() {  // below its token, or above it where there is no room; gone while the token is out of sight
  const tip = $('tip');
  tip.hidden = !tipped;
  if (!tipped) return;
  const at = tipped.getClientRects()[0], box = tip.getBoundingClientRect();
  tip.style.visibility = at.bottom < 0 || at.top > innerHeight ? 'hidden' : 'visible';
  tip.style.left = `${Math.max(Math.min(at.left, innerWidth - box.width - 6), 6)}px`;
  tip.style.top = `${Math.max(at.bottom + 8 + box.height > innerHeight ? at.top - box.height - 8 : at.bottom + 8, 4)}px`;
}

function closeTip() { tipped = null; placeTip(); }

function pin(span) {  // null: none
  document.querySelectorAll('.pinned').forEach(old => old.classList.remove('pinned'));
  state.token = span ? span.dataset.k : '';
  state.side = span ? sideOf(span) : 0;
  if (span) { span.classList.add('pinned'); openTip(span); } else closeTip();
}

function showTables() {
  $('pictures').replaceChildren(...shownRuns().flatMap(run => run.pictures.map(p => element('figure', {},
    element('figcaption', {}, nameOf(run), `: ${p.title}`),
    scrolled(p.title, element('img', {src: p.source, alt: `${run.name}: ${p.title}`, width: p.size[0], height: p.size[1]}))))));
  $('origins').replaceChildren(...data.runs.map(run => element('p', {}, nameOf(run), ' ', element('span', {className: 'soft', textContent: run.origin}))));
  $('tables').replaceChildren(...data.tables.map(t => element('div', {}, element('h3', {textContent: t.title}),
    element('p', {className: 'soft', textContent: t.note}), scrolled(t.title, element('table', {},
      element('tr', {}, ...t.columns.map(c => element('th', {textContent: c, scope: 'col'}))),
      ...t.rows.map(row => element('tr', {}, ...row.map((cell, i) => i ? element('td', {textContent: cell})
        : element('th', {textContent: cell, scope: 'row'})))))))));
}

const svg = (name, attributes, text = '') => {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  made.textContent = text;
  return made;
};

function chart(title, steps, lines) {
  const width = 340, height = 210, left = 44, bottom = 26, top = 38;
  const box = svg('svg', {width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `${title} against the step`});
  const most = Math.max(...lines.flatMap(l => l.values.filter(v => v !== null)), 1e-9), high = most <= 1 && most > .3 ? 1 : most;
  const x = s => left + (s - steps[0]) / Math.max(steps.at(-1) - steps[0], 1) * (width - left - 12);
  const y = v => height - bottom - v / high * (height - bottom - top);
  box.append(svg('text', {x: left, y: 14, 'font-size': 13, fill: '#1d2733'}, title));
  for (const v of [0, high / 2, high]) box.append(
    svg('line', {x1: left, x2: width - 12, y1: y(v), y2: y(v), stroke: '#d9e0e7'}),
    svg('text', {x: left - 6, y: y(v) + 4, 'font-size': 11, 'text-anchor': 'end', fill: '#5c6b7a'}, Number(v.toPrecision(2))));
  for (const s of [steps[0], steps.at(-1)]) box.append(
    svg('text', {x: x(s), y: height - 8, 'font-size': 11, 'text-anchor': 'middle', fill: '#5c6b7a'}, s));
  lines.forEach((l, j) => {
    const colour = [CRITICAL, OTHER][j];
    box.append(svg('polyline', {points: l.values.flatMap((v, i) => v === null ? [] : `${x(steps[i])},${y(v)}`).join(' '), fill: 'none', stroke: colour, 'stroke-width': 2}),
      svg('text', {x: left + 130 * j, y: 30, 'font-size': 12, fill: colour}, l.name));
  });
  const marker = svg('line', {class: 'marker', y1: top, y2: height - bottom, stroke: '#1d2733', 'stroke-dasharray': '3 3'});
  marker.move = i => { marker.setAttribute('x1', x(steps[i])); marker.setAttribute('x2', x(steps[i])); };
  box.append(marker);
  return box;
}

function showCurves() {
  const s = run().steps;
  $('stepsection').hidden = !s;
  if (!s) return;
  $('steprun').textContent = run().name;
  drawScale($('stepscale'), {range: [0, 1], text: String});
  $('charts').replaceChildren(
    chart('accuracy of greedy responses', s.step, s.sets.map((name, j) => ({name, values: s.accuracy[j]})).reverse()),
    chart('probability of the right token', s.step, [{name: 'critical tokens', values: s.critical_prob}, {name: 'other tokens', values: s.other_prob}]),
    chart('KL from the reference, nats a token', s.step, [{name: 'critical tokens', values: s.critical_kl}, {name: 'other tokens', values: s.other_kl}]));
  $('slider').max = s.step.length - 1;
  if (state.step < 0 || state.step >= s.step.length) state.step = s.step.length - 1;
  $('slider').value = state.step;
  showStep();
}

function showStep() {
  const s = run().steps, i = state.step, a = unpacked(run()), probs = a.step_prob, all = a.step_ids.length;
  document.querySelectorAll('.marker').forEach(m => m.move(i));
  $('stepnumber').textContent = s.step[i];
  $('stepmetrics').textContent = `accuracy ${s.sets.map((name, j) => `${number(s.accuracy[j][i])} at ${name}`).join(', ')}; probability of the `
    + `right critical token ${number(s.critical_prob[i])}; KL ${number(s.critical_kl[i])} nats at critical tokens, ${number(s.other_kl[i])} at others`;
  let first = 0;
  $('solutions').replaceChildren(...s.problems.map((problem, j) => {
    const box = element('pre', {className: 'text'}), last = first + s.critical[j].length;
    tokens(box, a.step_ids.subarray(first, last), first, k => probs[i * all + k] / 255, (span, k) => { if (s.critical[j][k - first]) span.classList.add('critical'); });
    first = last;
    return element('div', {className: 'problem'}, element('b', {textContent: problem}), box);
  }));
}

function showSamples() {
  const steps = [...new Set(run().samples.map(s => s.step))].reverse();
  $('samplesection').hidden = !steps.length;
  $('samplerun').textContent = run().name;
  $('samples').replaceChildren(...steps.map((step, i) => element('details', {open: i === 0}, element('summary', {textContent: `step ${step}`}),
    ...run().samples.filter(s => s.step === step).map(s => element('div', {className: 'problem'},
      element('b', {textContent: s.prompt}), element('pre', {className: 'text', textContent: s.completion}),
      element('p', {className: 'soft', textContent: Object.entries(s.rewards).map(([name, value]) => `${name} ${number(value)}`).join(', ')}))))));
}

function fill(id, choices) {
  $(id).replaceChildren(...choices.map(([value, textContent]) => element('option', {value, textContent})));
  $(id).value = state[id];
}

function showRun() {
  const names = data.runs.map((r, i) => [i, r.name]);
  if (state.beside === -2 || state.beside >= names.length) state.beside = names.length > 1 ? (state.run === 0 ? 1 : 0) : -1;
  if (state.beside === state.run) state.beside = -1;
  fill('beside', [[-1, 'none'], ...names.filter(([i]) => i !== state.run)]);
  $('beside').parentNode.hidden = names.length < 2;
  const sets = [...new Set(run().responses.map(r => r.set))];
  if (!sets.includes(state.set - 1)) state.set = 0;
  fill('set', [[0, 'all'], ...sets.map(n => [n + 1, data.sets[n]])]);
  showTables(); showCurves(); showSamples(); showResponses();
}

function listen() {
  const on = (id, event, change, show) => $(id).addEventListener(event, e => { pin(null); change(e.target); show(); remember(); });
  on('run', 'change', t => {
    if (state.beside === Number(t.value)) state.beside = state.run;
    state.run = Number(t.value); state.page = 0; state.step = -1;
  }, showRun);
  on('beside', 'change', t => { state.beside = Number(t.value); state.page = 0; }, showRun);
  on('colour', 'change', t => { state.colour = t.value; }, showResponses);
  on('detector', 'change', t => { state.detector = Number(t.value); }, showResponses);
  on('set', 'change', t => { state.set = Number(t.value); state.page = 0; }, showResponses);
  on('wrong', 'change', t => { state.wrong = Number(t.checked); state.page = 0; }, showResponses);
  on('critical', 'change', t => { state.critical = Number(t.checked); }, showResponses);
  on('back', 'click', () => { state.page--; }, showResponses);
  on('forth', 'click', () => { state.page++; }, showResponses);
  on('slider', 'input', t => { state.step = Number(t.value); }, showStep);
  const box = $('responses'), token = e => e.target.dataset?.k !== undefined && e.target;
  box.addEventListener('mousemove', e => { if (token(e) && !state.token && tipped !== e.target) openTip(e.target); });
  box.addEventListener('mouseleave', () => { if (!state.token) closeTip(); });
  box.addEventListener('focusin', e => {
    if (!token(e)) return;
    if (state.token) { pin(e.target); remember(); } else openTip(e.target);
  });
  box.addEventListener('focusout', () => { if (!state.token) closeTip(); });
  box.addEventListener('keydown', e => {
    const next = token(e) && neighbour(e.target, e.key);
    if (next) { makeReachable(next); next.focus(); }
    else if (token(e) && (e.key === 'Enter' || e.key === ' ')) toggle(e.target);
    else return;
    e.preventDefault();
  });
  const toggle = span => { pin(span.classList.contains('pinned') ? null : span); remember(); };
  document.addEventListener('click', e => {
    if (!token(e) || !box.contains(e.target)) { if (state.token && !e.target.closest('.bar, .legend')) { pin(null); remember(); } return; }
    const span = e.target, open = span.classList.contains('pinned');
    makeReachable(span);
    span.focus({preventScroll: true});
    pin(open ? null : span);
    remember();
  });
  document.addEventListener('keydown', e => { if (e.key === 'Escape') { pin(null); remember(); } });
  for (const event of ['scroll', 'resize', 'load']) window.addEventListener(event, placeTip, {passive: true});
  window.addEventListener('hashchange', () => location.reload());
}

function setUp() {
  $('about').textContent = data.about;
  state.run = Math.min(Math.max(state.run, 0), data.runs.length - 1);
  state.detector = Math.min(Math.max(state.detector, 0), data.detectors.length - 1);
  if (!(state.colour in scales)) state.colour = 'certainty';
  fill('run', data.runs.map((r, i) => [i, r.name]));
  fill('detector', data.detectors.map((d, i) => [i, d]));
  $('colour').value = state.colour;
  for (const name of ['wrong', 'critical']) $(name).checked = Boolean(state[name]);
  listen();
  const {token, side} = state;
  showRun();
  const pinned = token && spanOf(side, Math.trunc(Number(token)));  // null if it is not among the responses that are shown
  if (pinned) pinned.scrollIntoView({block: 'center'});
  pin(pinned || null);
}
setUp();
