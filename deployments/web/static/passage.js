// The side panel: a passage in its document.

import { getBounded } from './api.js';
import { $, announce, h } from './dom.js';
import { around, joined, locate, quoted } from './locate.js';
import { explain } from './words.js';

const MOST_BYTES = 4_000_000;
const CONTEXT_CHARS = 3000;

/** Opens at one of several passages: `{fileId, filename, text, score, stores, said}`; gives the focus back when closed. */
export class PassagePanel {
  #panel = $('#passage');
  #opener = null;
  #passages = [];
  #at = 0;
  #loading = null;

  constructor() {
    $('#passage-close').addEventListener('click', () => this.close());
    $('#passage-before').addEventListener('click', () => this.#go(this.#at - 1));
    $('#passage-after').addEventListener('click', () => this.#go(this.#at + 1));
    document.addEventListener('keydown', (event) => {
      if (event.key === 'Escape' && !this.#panel.hidden && !document.querySelector('dialog[open]')) this.close();
    });
  }

  open(passages, at, opener) {
    if (!passages.length) return;
    this.#passages = passages;
    this.#opener = opener;
    this.#panel.hidden = false;
    document.body.classList.add('passage-open');
    this.#go(at);
    $('#passage-title').focus();
  }

  close() {
    if (this.#panel.hidden) return;
    this.#loading?.abort();
    this.#panel.hidden = true;
    document.body.classList.remove('passage-open');
    if (this.#opener?.isConnected) this.#opener.focus();
  }

  #go(at) {
    this.#at = Math.max(0, Math.min(at, this.#passages.length - 1));
    const passage = this.#passages[this.#at];
    $('#passage-title').textContent = passage.filename;
    $('#passage-place').textContent = this.#passages.length > 1 ? `${this.#at + 1} of ${this.#passages.length}` : '';
    $('#passage-before').hidden = $('#passage-after').hidden = this.#passages.length < 2;
    $('#passage-before').disabled = this.#at === 0;
    $('#passage-after').disabled = this.#at === this.#passages.length - 1;
    $('#passage-text').replaceChildren(marked(passage.text, passage));
    announce(`Passage from ${passage.filename}`);
    this.#load(passage);
  }

  async #load(passage) {
    this.#loading?.abort();
    const loading = (this.#loading = new AbortController());
    const note = $('#passage-note');
    note.textContent = 'Looking it up in its document…';
    try {
      const text = await contentOf(passage, loading.signal);
      if (loading.signal.aborted) return;
      const place = text === null ? null : locate(text, passage.text);
      if (!place) {
        note.textContent = text === null ? 'Its document cannot be shown whole. This is the passage.' : 'It is no longer in its document as it was cited. This is the passage.';
        return;
      }
      note.textContent = '';
      show(text, place, CONTEXT_CHARS, passage);
    } catch (error) {
      if (error.name !== 'AbortError') note.textContent = `${explain(error).heading}. This is the passage, as the answer had it.`;
    }
  }
}

/** A passage as it stands in its document, and in it what the answer quotes. */
function marked(text, { said }) {
  const [start, end] = (said && quoted(text, said)) || [0, 0];
  return h('mark', {}, text.slice(0, start), ...(end ? [h('strong', {}, text.slice(start, end))] : []), text.slice(end));
}

function show(text, [start, end], context, passage) {
  const [from, to] = around(text, [start, end], context);
  const mark = marked(text.slice(start, end), passage);
  const whole = (label) => {
    const button = h('button', { type: 'button', class: 'link' }, label);
    button.addEventListener('click', () => show(text, [start, end], Infinity, passage));
    return button;
  };
  $('#passage-text').replaceChildren(
    ...(from > 0 ? [whole('Show what stands before'), '\n'] : []),
    text.slice(from, start),
    mark,
    text.slice(end, to),
    ...(to < text.length ? ['\n', whole('Show what follows')] : []),
  );
  (mark.querySelector('strong') ?? mark).scrollIntoView({ block: 'center' });
}

/** The text of its document, from whichever of the stores has it; null where it is too long, or nowhere. */
async function contentOf(passage, signal) {
  for (const store of passage.stores) {
    try {
      const path = `v1/vector_stores/${encodeURIComponent(store)}/files/${encodeURIComponent(passage.fileId)}/content`;
      const text = await getBounded(path, MOST_BYTES, signal);
      return text === null ? null : joined(JSON.parse(text).data.map((part) => part.text));
    } catch (error) {
      if (error.status !== 404) throw error;
    }
  }
  return null;
}
