// A small chart of the last minutes, drawn by hand.

import { h, svg } from './dom.js';

const WIDTH = 300;
const HEIGHT = 56;

/**
 * A line over time.
 *
 * `points` are `[seconds ago, value]`, oldest first; null values leave a gap. `steps` draws whole things as steps.
 */
export function chart({ title, points, spanS, format, steps = false, atLeast = 1 }) {
  const known = points.filter(([, value]) => value != null);
  const top = Math.max(atLeast, ...known.map(([, value]) => value)) * 1.1;
  const x = (ago) => (WIDTH * (spanS - ago)) / spanS;
  const y = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 6);
  const runs = [];
  let run = null;
  for (const [ago, value] of points) {
    if (value == null) run = null;
    else if (run) run.push([x(ago), y(value)]);
    else runs.push((run = [[x(ago), y(value)]]));
  }
  const now = known.at(-1)?.[1];
  const most = known.length ? Math.max(...known.map(([, value]) => value)) : null;
  const picture = svg(
    'svg',
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': `${title}: ${format(now)} now, ${format(most)} at most in the last ${Math.round(spanS / 60)} minutes` },
    svg('line', { class: 'base', x1: 0, x2: WIDTH, y1: HEIGHT - 1.5, y2: HEIGHT - 1.5 }),
  );
  for (const each of runs) {
    const line = each.map(([px, py], i) => `${i ? (steps ? `H${px.toFixed(1)}V${py.toFixed(1)}` : `L${px.toFixed(1)} ${py.toFixed(1)}`) : `M${px.toFixed(1)} ${py.toFixed(1)}`}`).join('');
    const [first, last] = [each[0][0], each.at(-1)[0]];
    picture.append(
      svg('path', { class: 'area', d: `${line}L${last.toFixed(1)} ${HEIGHT - 2}L${first.toFixed(1)} ${HEIGHT - 2}Z` }),
      svg('path', { class: 'line', d: line }),
    );
  }
  return h(
    'figure',
    { class: 'chart' },
    h('figcaption', {}, h('span', {}, title), h('span', { class: 'most' }, most == null ? '' : `at most ${format(most)}`)),
    picture,
  );
}
