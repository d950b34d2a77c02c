// What models and documents say is hostile: Markdown becomes HTML, and nothing of it is shown but what the sanitizer
// leaves. Citations are put in afterwards, as elements of our own.

import { Marked } from './vendor/marked.esm.js';
import DOMPurify from './vendor/purify.es.mjs';
import { h } from './dom.js';

const marked = new Marked({ gfm: true, breaks: false, async: false });
// Markup in a text is shown as the text it is, but for a few tags that models are fond of. The sanitizer stands behind.
const HARMLESS = /^<\/?(?:br|hr|p|b|i|u|em|strong|sup|sub|kbd)\s*\/?>$/i;
marked.use({ renderer: { html: ({ text }) => (HARMLESS.test(text.trim()) ? text : escaped(text)) } });

const ALLOWED = {
  ALLOWED_TAGS: [
    ...['p', 'br', 'hr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'strong', 'em', 'b', 'i', 'u', 'del', 'sup', 'sub', 'kbd', 'a', 'code', 'pre'],
    ...['ul', 'ol', 'li', 'blockquote', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'img'],
  ],
  ALLOWED_ATTR: ['href', 'start', 'align', 'class', 'alt', 'src'],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const OPEN = '\uE000';
const CLOSE = '\uE001';
// A text may bring both, as entities even: what it cannot bring is this page's own number.
const OURS = String(crypto.getRandomValues(new Uint32Array(1))[0]).padStart(10, '0');
const MARK = new RegExp(`${OPEN}${OURS}(\\d+)${CLOSE}`);

/**
 * A fragment for a text.
 *
 * `marks` are `{index, number, onopen}`: citations, at positions counted in code points.
 */
export function render(text, marks = []) {
  let fragment;
  try {
    fragment = DOMPurify.sanitize(marked.parse(withMarks(text, marks)), ALLOWED);
  } catch {
    fragment = document.createDocumentFragment(); // nested too deep for the renderer: as it is, then
    fragment.append(h('p', {}, withMarks(text, marks)));
  }
  for (const image of fragment.querySelectorAll('img')) image.replaceWith(linkTo(image.getAttribute('src'), image.alt));
  for (const link of fragment.querySelectorAll('a')) secure(link);
  for (const element of fragment.querySelectorAll('[class]')) {
    if (!/^language-[\w+-]+$/.test(element.className)) element.removeAttribute('class');
  }
  for (const table of fragment.querySelectorAll('table')) {
    const scroller = h('div', { class: 'scroller', tabIndex: 0, role: 'region', 'aria-label': 'Table' });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  for (const code of fragment.querySelectorAll('pre > code')) dress(code);
  replaceMarks(fragment, marks);
  return fragment;
}

const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

function withMarks(text, marks) {
  const points = Array.from(text.replace(/[\uE000\uE001]/g, '\uFFFD'));
  const placed = [...marks].map((mark, i) => ({ at: Math.min(mark.index, points.length), i }));
  placed.sort((a, b) => b.at - a.at || b.i - a.i);
  for (const { at, i } of placed) points.splice(at, 0, `${OPEN}${OURS}${i}${CLOSE}`);
  return points.join('');
}

function replaceMarks(fragment, marks) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (walker.currentNode.data.includes(OPEN)) texts.push(walker.currentNode);
  for (const node of texts) {
    const pieces = node.data.split(MARK);
    node.replaceWith(...pieces.map((piece, i) => (i % 2 ? mark(marks[Number(piece)]) : piece)));
  }
}

function mark({ number, label, onopen }) {
  return h(
    'button',
    { type: 'button', class: 'cite', 'aria-label': `Source ${number}: ${label}`, title: label, onclick: onopen },
    String(number),
  );
}

/** A picture from elsewhere would tell its server who reads: it becomes a link. */
function linkTo(address, text) {
  const link = h('a', {}, text || address || 'picture');
  if (address) link.setAttribute('href', address);
  return link;
}

function secure(link) {
  if (!/^(?:https?:|mailto:)/i.test(link.getAttribute('href') ?? '')) link.removeAttribute('href');
  link.setAttribute('target', '_blank');
  link.setAttribute('rel', 'noopener noreferrer nofollow');
}

function dress(code) {
  const language = /^language-(.+)$/.exec(code.className)?.[1] ?? '';
  const copy = h('button', { type: 'button', class: 'copy' }, 'Copy');
  copy.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = 'Copied';
    } catch {
      copy.textContent = 'Select and copy by hand';
    }
    setTimeout(() => (copy.textContent = 'Copy'), 1600);
  });
  const block = code.parentElement;
  block.tabIndex = 0;
  const frame = h('div', { class: 'code' }, h('div', { class: 'code-head' }, h('span', {}, language), copy));
  block.replaceWith(frame);
  frame.append(block);
}
