// The Fleet view, and the feed behind it: what `/fleet` says, remembered for some minutes.

import { get } from './api.js';
import { chart } from './chart.js';
import { $, h } from './dom.js';
import { age, count, explain, percent, plural, rate, seconds } from './words.js';

const SPAN_S = 300;
const OFTEN_MS = 1000;
const SELDOM_MS = 5000;
const HURRY_MS = 1500;

export class Feed {
  latest = null;
  error = null;
  #history = []; // [time in ms, what was said, or null where nothing was]
  #listeners = new Set();
  #timer = null;
  #often = false;
  #hurriedUntil = 0;

  start() {
    document.addEventListener('visibilitychange', () => this.#next(0));
    this.#next(0);
  }

  subscribe(listener) {
    this.#listeners.add(listener);
  }

  often(isOften) {
    this.#often = isOften;
    this.#next(0);
  }

  /** Somebody waits: look more often for a while. */
  hurry() {
    this.#hurriedUntil = Date.now() + 20_000;
    this.#next(HURRY_MS);
  }

  model(name) {
    return this.latest?.models.find((each) => each.model === name) ?? (this.latest?.models.length === 1 ? this.latest.models[0] : null);
  }

  /** `[seconds ago, value]` of the last minutes. */
  points(value, now = Date.now()) {
    return this.#history.map(([at, said]) => [(now - at) / 1000, said && value(said)]).filter(([ago]) => ago <= SPAN_S);
  }

  #next(ms) {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.#look(), ms);
  }

  async #look() {
    try {
      this.latest = await get('fleet', AbortSignal.timeout(10_000));
      this.error = null;
    } catch (error) {
      this.error = error.kind ? error : { kind: 'away', message: '' };
      if (this.error.kind !== 'limit') this.latest = null;
    }
    const now = Date.now();
    this.#history.push([now, this.latest]);
    while (this.#history.length && now - this.#history[0][0] > 1000 * SPAN_S + 10_000) this.#history.shift();
    for (const listener of this.#listeners) listener();
    this.#next(this.#often ? OFTEN_MS : now < this.#hurriedUntil ? HURRY_MS : SELDOM_MS);
  }
}

/** The line at the foot of the rail: how the server is, wherever one looks. */
export function statusLine(feed) {
  const { latest, error } = feed;
  if (error) return { state: error.kind === 'limit' ? 'busy' : 'bad', text: error.kind === 'key' ? 'Key needed' : error.kind === 'away' ? 'Cannot be reached; trying' : explain(error).heading };
  if (!latest) return { state: 'unknown', text: 'Connecting' };
  const ready = latest.models.reduce((sum, model) => sum + (model.states.ready ?? 0), 0);
  const missing = latest.models.filter((model) => !model.states.ready && model.target !== 0);
  if (missing.length) return { state: 'busy', text: `Loading ${missing.map((model) => model.model).join(', ')}` };
  return { state: 'good', text: `${plural(ready, 'engine')} ready` };
}

export class FleetView {
  #feed;
  #isShown = false;

  constructor({ feed }) {
    this.#feed = feed;
    feed.subscribe(() => this.#isShown && this.#draw());
  }

  show(isShown) {
    this.#isShown = isShown;
    this.#feed.often(isShown);
    if (isShown) this.#draw();
  }

  #draw() {
    const { latest, error } = this.#feed;
    const trouble = $('#fleet-trouble');
    trouble.hidden = !error;
    if (error) {
      const { heading, detail } = explain(error);
      trouble.replaceChildren(h('strong', {}, `${heading}.`), ` ${detail}`);
    }
    $('#fleet-body').classList.toggle('is-old', Boolean(error));
    if (!latest) return;
    $('#fleet-body').replaceChildren(...latest.models.map((model) => this.#model(model)));
    const others = latest.deployments.map(({ name, replicas }) => {
      const states = Object.entries(replicas).map(([state, n]) => `${count(n)} ${state}`);
      return h('li', {}, h('strong', {}, name), ` ${states.join(', ') || 'none'}`);
    });
    $('#fleet-others').replaceChildren(...others);
    $('#fleet-note').textContent =
      latest.serve === 'ok'
        ? 'Numbers of engines are the whole fleet’s, by their own heartbeats; tokens per second over 5 s, time to the first token and prefix hits over 60 s. What waits in front of the engines is counted by the Router that answered.'
        : 'Serve’s controller does not answer just now: replicas that start, drain or have died cannot be seen.';
  }

  #model(model) {
    const pick = (value) => (said) => {
      const there = said.models.find((each) => each.model === model.model);
      return there ? value(there) : null;
    };
    const waiting = (each) => each.waiting + each.this_router.waiting;
    const [low, high] = model.bounds ?? [];
    const wanted = model.target == null ? '' : `${count(model.target)} wanted${model.bounds ? `, ${low} to ${high} allowed` : ''}`;
    const numbers = [
      ['tokens/s', rate(model.tokens_per_s)],
      ['running', count(model.running)],
      ['waiting', count(waiting(model))],
      ['to first token', seconds(model.ttft_s)],
      ['KV cache', percent(model.kv_cache_usage)],
      ['prefix hits', percent(model.prefix_hit_rate)],
    ];
    const parts = { spanS: SPAN_S };
    const heading = h('header', {}, h('h2', {}, model.model), h('p', {}, statesText(model.states), wanted && h('span', { class: 'quiet' }, wanted)));
    const engines = this.#feed.points(pick((each) => each.replicas.length));
    if (!model.replicas.length && !engines.some(([, n]) => n)) {
      const words = model.bounds?.[0] === 0 ? 'No engine runs. The first request starts one.' : 'No engine yet.';
      return h('section', { class: 'model', 'aria-label': `Model ${model.model}` }, heading, h('p', { class: 'quiet' }, words));
    }
    return h(
      'section',
      { class: 'model', 'aria-label': `Model ${model.model}` },
      heading,
      h('dl', { class: 'figures' }, numbers.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value)))),
      h(
        'div',
        { class: 'charts' },
        chart({ ...parts, title: 'Tokens per second', points: this.#feed.points(pick((each) => each.tokens_per_s)), format: rate, atLeast: 10 }),
        chart({ ...parts, title: 'Requests, running and waiting', points: this.#feed.points(pick((each) => each.running + waiting(each))), format: count, steps: true, atLeast: 4 }),
        chart({ ...parts, title: 'Engines ready', points: this.#feed.points(pick((each) => each.states.ready ?? 0)), format: count, steps: true, atLeast: 2 }),
      ),
      table(model),
    );
  }
}

function statesText(states) {
  const order = ['ready', 'starting', 'draining', 'hung', 'lost', 'dead'];
  const there = order.filter((state) => states[state]);
  if (!there.length) return h('span', {}, 'no engine');
  return there.map((state) => h('span', { class: 'badge', 'data-state': state }, `${count(states[state])} ${state}`));
}

const COLUMNS = ['Replica', 'State', 'Running', 'Waiting', 'Tokens/s', 'First token', 'KV cache', 'Prefix hits', 'Age'];

function table(model) {
  const rows = model.replicas.map((each) =>
    h(
      'tr',
      { 'data-state': each.state },
      cell(0, h('code', {}, each.replica), each.node && h('small', {}, ` on ${each.node}`)),
      cell(1, h('span', { class: 'badge', 'data-state': each.state }, each.state)),
      cell(2, each.running == null ? '–' : count(each.running), each.max_running && h('small', {}, ` of ${count(each.max_running)}`)),
      cell(3, count(each.waiting)),
      cell(4, rate(each.tokens_per_s)),
      cell(5, seconds(each.ttft_s)),
      cell(6, each.kv_cache_usage == null ? '–' : [h('meter', { min: '0', max: '1', value: String(each.kv_cache_usage), 'aria-hidden': 'true' }), percent(each.kv_cache_usage)]),
      cell(7, percent(each.prefix_hit_rate)),
      cell(8, age(each.age_s)),
    ),
  );
  return h(
    'div',
    { class: 'scroller', tabIndex: 0, role: 'region', 'aria-label': `Replicas of ${model.model}` },
    h(
      'table',
      { class: 'replicas' },
      h('thead', {}, h('tr', {}, COLUMNS.map((name) => h('th', { scope: 'col' }, name)))),
      h('tbody', {}, rows.length ? rows : h('tr', {}, h('td', { colspan: String(COLUMNS.length) }, 'No replica.'))),
    ),
    model.replicas_left_out > 0 && h('p', { class: 'quiet' }, `and ${count(model.replicas_left_out)} more`),
  );
}

const cell = (column, ...content) => h('td', { 'data-label': COLUMNS[column] }, ...content);
