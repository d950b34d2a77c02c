// The Documents view: stores, their files, and what is found in them.

import { get, list, post, remove, upload } from './api.js';
import { $, announce, confirmed, h } from './dom.js';
import { bytes, count, explain, isPassing, plural } from './words.js';

const AT_ONCE = 3;
const POLL_MS = 1000;
const MOST_TRIES = 6;
const MOST_FILES = 500;
const PIECE_CHARS = 280;

export class Documents {
  #stores = [];
  #store = null;
  #members = [];
  #files = new Map(); // what is known of them, by id
  #uploads = []; // of this page: files on their way, and those that failed
  #working = 0;
  #timer = null;
  #askForKey;
  #openPassage;
  #askFrom;
  #isShown = false;

  constructor({ askForKey, openPassage, askFrom }) {
    this.#askForKey = askForKey;
    this.#openPassage = openPassage;
    this.#askFrom = askFrom;
    this.#listen();
  }

  show(isShown) {
    this.#isShown = isShown;
    if (isShown) this.refresh();
    else clearTimeout(this.#timer);
  }

  async refresh() {
    try {
      this.#stores = await list('v1/vector_stores');
    } catch (error) {
      return this.#trouble(error);
    }
    $('#documents-trouble').hidden = true;
    $('#documents-body').hidden = false;
    this.#listStores();
    const still = this.#stores.find((store) => store.id === this.#store?.id);
    if (still) {
      this.#store = still;
      await this.#refreshFiles();
    } else this.#open(this.#stores[0] ?? null);
  }

  #trouble(error) {
    const there = $('#documents-trouble');
    const { heading, detail } = explain(error);
    const isNone = error.status === 404 && error.kind === 'refused';
    $('#documents-body').hidden = isNone || !this.#stores.length;
    there.hidden = false;
    there.replaceChildren(
      h('strong', {}, isNone ? 'This server has no document store.' : `${heading}.`),
      isNone ? ' Its configuration names one under documents.' : ` ${detail}`,
    );
    if (error.kind === 'key') this.#askForKey(error);
    else if (isPassing(error.kind)) this.#soon(3 * POLL_MS, () => this.refresh());
  }

  #soon(ms, what) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#isShown && what(), ms);
  }

  // Stores

  #listen() {
    $('#new-store').addEventListener('submit', async (event) => {
      event.preventDefault();
      const field = event.target.elements.namedItem('name');
      const name = field.value.trim();
      if (!name) return field.focus();
      const made = await this.#trying(() => post('v1/vector_stores', { name }));
      if (!made) return;
      field.value = '';
      this.#stores.unshift(made);
      this.#open(made);
      announce(`The store ${name} is there.`);
      $('#drop input').focus();
    });
    const drop = $('#drop');
    const input = $('input', drop);
    input.addEventListener('change', () => {
      this.#add([...input.files]);
      input.value = '';
    });
    for (const name of ['dragenter', 'dragover']) {
      drop.addEventListener(name, (event) => {
        event.preventDefault();
        drop.classList.add('is-over');
      });
    }
    for (const name of ['dragleave', 'drop']) drop.addEventListener(name, () => drop.classList.remove('is-over'));
    drop.addEventListener('drop', (event) => {
      event.preventDefault();
      this.#add([...event.dataTransfer.files]);
    });
    // A file dropped beside the field would otherwise take the page's place.
    for (const name of ['dragover', 'drop']) window.addEventListener(name, (event) => event.preventDefault());
    $('#search').addEventListener('submit', (event) => {
      event.preventDefault();
      this.#search(event.target.elements.namedItem('query').value);
    });
    $('#delete-store').addEventListener('click', () => this.#deleteStore());
    $('#ask-store').addEventListener('click', () => this.#askFrom(this.#store));
  }

  async #trying(what) {
    try {
      return await what();
    } catch (error) {
      this.#trouble(error);
      return null;
    }
  }

  #listStores() {
    $('#store-list').replaceChildren(
      ...this.#stores.map((store) => {
        const { completed, in_progress: busy, failed } = store.file_counts;
        const facts = [plural(completed + busy + failed, 'file')];
        if (busy) facts.push(`${count(busy)} on their way`);
        if (failed) facts.push(`${count(failed)} failed`);
        const open = h(
          'button',
          { type: 'button', class: 'open', 'aria-current': store.id === this.#store?.id ? 'true' : null },
          h('span', { class: 'title' }, store.name || 'unnamed store'),
          h('small', {}, facts.join(', ')),
        );
        open.addEventListener('click', () => this.#open(store));
        return h('li', {}, open);
      }),
    );
    $('#no-stores').hidden = this.#stores.length > 0;
  }

  #open(store) {
    const isOther = store?.id !== this.#store?.id;
    this.#store = store;
    this.#listStores();
    $('#store').hidden = !store;
    if (!store) return;
    if (isOther) {
      this.#members = [];
      $('#results').replaceChildren();
      $('#search').reset();
    }
    this.#drawStore();
    this.#drawFiles();
    this.#refreshFiles();
  }

  #drawStore() {
    $('#store-name').textContent = this.#store.name || 'unnamed store';
    $('#store-facts').textContent = `${plural(this.#store.file_counts.total, 'file')}, ${bytes(this.#store.usage_bytes)}`;
    $('#store-id').textContent = this.#store.id;
  }

  async #deleteStore() {
    const store = this.#store;
    const { yes, option } = await confirmed({
      title: `Delete ${store.name || 'this store'}?`,
      text: 'Nothing can be asked from it any more.',
      option: store.file_counts.total ? `Delete its ${plural(store.file_counts.total, 'file')} too, also from other stores` : null,
      action: 'Delete',
    });
    if (!yes) return;
    const files = option ? await this.#trying(() => list(`v1/vector_stores/${store.id}/files`, { most: 10_000 })) : [];
    if (!files) return;
    const gone = await this.#trying(async () => {
      await remove(`v1/vector_stores/${store.id}`);
      return true;
    });
    if (!gone) return;
    for (const file of files) await remove(`v1/files/${file.id}`).catch(() => {}); // gone from the store in any case
    this.#store = null;
    announce('The store is deleted.');
    await this.refresh();
  }

  // Files

  async #refreshFiles() {
    const store = this.#store;
    if (!store) return;
    try {
      const [members, fresh] = await Promise.all([
        list(`v1/vector_stores/${store.id}/files`, { most: MOST_FILES }),
        get(`v1/vector_stores/${store.id}`),
      ]);
      if (members.some((member) => !this.#files.has(member.id))) {
        for (const file of await list('v1/files', { limit: 10_000, most: 10_000 })) this.#files.set(file.id, file);
      }
      if (store.id !== this.#store?.id) return;
      this.#members = members;
      this.#store = fresh;
      this.#stores = this.#stores.map((each) => (each.id === fresh.id ? fresh : each));
      this.#uploads = this.#uploads.filter((each) => each.state !== 'reading' || !members.some((member) => member.id === each.fileId));
    } catch (error) {
      return this.#trouble(error);
    }
    $('#documents-trouble').hidden = true;
    this.#drawStore();
    this.#drawFiles();
    this.#listStores();
    if (this.#members.some((member) => member.status === 'in_progress')) this.#soon(POLL_MS, () => this.#refreshFiles());
  }

  #drawFiles() {
    if (!this.#store) return; // deleted while something of it was under way
    const mine = this.#uploads.filter((each) => each.store === this.#store.id);
    const rows = [...mine.map((each) => this.#uploadRow(each)), ...this.#members.map((member) => this.#fileRow(member))];
    const table = $('#files');
    const focused = document.activeElement?.closest('tr')?.dataset.id;
    table.replaceChildren(...rows);
    if (focused) table.querySelector(`[data-id="${CSS.escape(focused)}"] button`)?.focus();
    $('#files-table').hidden = rows.length === 0;
    const { total } = this.#store.file_counts;
    $('#files-more').hidden = total <= MOST_FILES;
    $('#files-more').textContent = `The latest ${count(MOST_FILES)} of ${count(total)} files.`;
  }

  #fileRow(member) {
    const file = this.#files.get(member.id);
    const name = file?.filename ?? member.id;
    const button = h('button', { type: 'button', class: 'link', 'aria-label': `Delete ${name}` }, 'Delete');
    button.addEventListener('click', async () => {
      if (!(await confirmed({ title: `Delete ${name}?`, text: 'It goes from every store it is in.', action: 'Delete' })).yes) return;
      const gone = await this.#trying(async () => {
        await remove(`v1/vector_stores/${member.vector_store_id}/files/${member.id}`);
        await remove(`v1/files/${member.id}`);
        return true;
      });
      if (gone) {
        announce(`${name} is deleted.`);
        this.#refreshFiles();
      }
    });
    const states = { completed: 'ready', in_progress: 'being read', failed: 'failed', cancelled: 'cancelled' };
    return h(
      'tr',
      { 'data-id': member.id },
      h('td', { class: 'name' }, name, member.last_error && h('p', { class: 'reason' }, member.last_error.message)),
      h('td', {}, badge(states[member.status], member.status)),
      h('td', { class: 'number' }, file ? bytes(file.bytes) : ''),
      h('td', { class: 'deed' }, button),
    );
  }

  #uploadRow(each) {
    const bar = h('progress', { max: '1', 'aria-label': `Upload of ${each.file.name}` });
    if (each.state === 'sending') bar.value = each.share;
    each.bar = bar;
    const isOver = each.state === 'failed';
    const button = h('button', { type: 'button', class: 'link', 'aria-label': `${isOver ? 'Dismiss' : 'Stop'} ${each.file.name}` }, isOver ? 'Dismiss' : 'Stop');
    button.addEventListener('click', () => {
      each.stop.abort();
      this.#uploads = this.#uploads.filter((other) => other !== each);
      this.#drawFiles();
    });
    return h(
      'tr',
      { 'data-id': each.id },
      h('td', { class: 'name' }, each.file.name, isOver ? h('p', { class: 'reason' }, each.reason) : bar),
      h('td', {}, badge({ queued: 'waits', sending: 'uploading', reading: 'being read', failed: 'failed' }[each.state], isOver ? 'failed' : 'in_progress')),
      h('td', { class: 'number' }, bytes(each.file.size)),
      h('td', { class: 'deed' }, button),
    );
  }

  #add(files) {
    for (const file of files) {
      this.#uploads.push({ id: `upload-${Math.random()}`, file, store: this.#store.id, state: 'queued', share: 0, stop: new AbortController() });
    }
    this.#drawFiles();
    announce(`${plural(files.length, 'file')} on their way.`);
    for (let i = 0; i < AT_ONCE; i += 1) this.#work();
  }

  async #work() {
    if (this.#working >= AT_ONCE) return;
    this.#working += 1;
    for (;;) {
      const each = this.#uploads.find((one) => one.state === 'queued');
      if (!each) break;
      try {
        await this.#send(each);
        if (this.#store?.id === each.store) await this.#refreshFiles();
      } catch (error) {
        this.#trouble(error);
      }
    }
    this.#working -= 1;
  }

  async #send(each) {
    each.state = 'sending';
    this.#drawFiles();
    const onProgress = (share) => {
      each.share = share;
      each.bar.value = share;
    };
    try {
      const file = await patiently(() => upload(each.file, { onProgress, signal: each.stop.signal }), each.stop.signal);
      each.fileId = file.id;
      this.#files.set(file.id, file);
      await patiently(() => post(`v1/vector_stores/${each.store}/files`, { file_id: file.id }, each.stop.signal), each.stop.signal);
      each.state = 'reading';
    } catch (error) {
      if (error.name === 'AbortError') return;
      const { heading, detail } = explain(error);
      each.state = 'failed';
      each.reason = error.kind === 'refused' ? detail : `${heading}. ${detail}`;
      announce(`${each.file.name} failed.`);
      this.#drawFiles();
    }
  }

  // Search

  async #search(query) {
    const results = $('#results');
    const store = this.#store;
    if (!query.trim()) return results.replaceChildren();
    let found;
    try {
      found = await post(`v1/vector_stores/${store.id}/search`, { query: query.slice(0, 4000), max_num_results: 20 });
    } catch (error) {
      const { heading, detail } = explain(error);
      return results.replaceChildren(h('li', { class: 'trouble' }, h('strong', {}, `${heading}. `), detail));
    }
    const passages = found.data.map((result) => ({
      fileId: result.file_id,
      filename: result.filename,
      score: result.score,
      text: result.content.map((part) => part.text).join('\n'),
      stores: [store.id],
    }));
    announce(passages.length ? `${plural(passages.length, 'passage')} found.` : 'Nothing was found.');
    results.replaceChildren(
      ...(passages.length
        ? passages.map((passage, i) => {
            const open = h(
              'button',
              { type: 'button', class: 'result' },
              h('span', { class: 'name' }, passage.filename),
              h('span', { class: 'score', title: 'Score of the search, 0 to 1' }, passage.score.toFixed(2)),
              h('span', { class: 'snippet' }, ...highlighted(passage.text, query)),
            );
            open.addEventListener('click', () => this.#openPassage(passages, i, open));
            return h('li', {}, open);
          })
        : [h('li', { class: 'quiet' }, 'Nothing was found.')]),
    );
  }
}

function badge(text, state) {
  return h('span', { class: 'badge', 'data-state': state }, text);
}

/** The piece of a text that has most of a query's words, with those marked. */
function highlighted(text, query) {
  const all = [...new Set(query.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [])].slice(0, 16);
  const long = all.filter((word) => word.length > 3); // short ones are everywhere
  const words = long.length ? long : all;
  const line = text.replace(/^#+ /gm, '').replace(/\s+/g, ' ').trim();
  if (!words.length) return [line.slice(0, PIECE_CHARS)];
  const pattern = new RegExp(`(?<![\\p{L}\\p{N}])(${words.join('|')})`, 'giu');
  let [most, first] = [0, 0];
  for (const { index } of line.matchAll(pattern)) {
    const from = Math.max(0, index - 60);
    const there = new Set(line.slice(from, from + PIECE_CHARS).toLowerCase().match(pattern)).size;
    if (there > most) [most, first] = [there, from];
  }
  const piece = `${first ? '…' : ''}${line.slice(first, first + PIECE_CHARS)}`;
  return piece.split(pattern).map((part, i) => (i % 2 ? h('mark', {}, part) : part));
}

/** Does it again, later, while what is wrong passes by itself. */
async function patiently(what, signal) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await what();
    } catch (error) {
      if (!isPassing(error.kind) || tries >= MOST_TRIES) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(30, error.retryAfterS ?? 2 ** tries / 2)));
      if (signal.aborted) throw new DOMException('stopped', 'AbortError');
    }
  }
}
