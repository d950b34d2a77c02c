// The Chat view: conversations, the composer, and answers as they arrive.

import { ApiError, get, list, streamChat } from './api.js';
import { $, announce, confirmed, h } from './dom.js';
import { render } from './markdown.js';
import { age, count, explain, isPassing, plural, rate, seconds, waitingFor } from './words.js';

const MOST_TRIES = 12;
const LONGEST_WAIT_S = 60;
const SHORTEST_PACE_MS = 20; // what arrives at once has no pace
const DEFAULTS = 'groundswell.defaults';
const MOST_PASSAGE_CHARS = 8000;
const RUNNING = new Set(['waiting', 'streaming', 'retrying', 'key']);

export class Chat {
  #conversations;
  #feed;
  #askForKey;
  #openPassage;
  #models = [];
  #stores = [];
  #conversation = null;
  #running = new Map(); // by conversation: what is being answered, and how to stop it
  #views = new Map(); // by message of the conversation on screen
  #saved = 0;
  #isLeaving = false;

  constructor({ conversations, feed, askForKey, openPassage }) {
    this.#conversations = conversations;
    this.#feed = feed;
    this.#askForKey = askForKey;
    this.#openPassage = openPassage;
    this.#listen();
    const [latest] = conversations.list();
    this.#show((latest && conversations.get(latest.id)) ?? this.#fresh());
    feed.subscribe(() => this.#running.forEach(({ message }) => message.state === 'waiting' && this.#update(message)));
  }

  // What can be chosen

  async refresh() {
    const listed = await list('v1/models').catch((error) => {
      if (error.kind === 'key') this.#askForKey(error);
      return null;
    });
    if (listed) this.#models = listed;
    const stores = await list('v1/vector_stores', { most: 200 }).catch(() => null);
    if (stores) this.#stores = stores;
    this.#choices();
  }

  #choices() {
    const conversation = this.#conversation;
    const names = this.#models.map((model) => model.id);
    if (names.length && !names.includes(conversation.model)) conversation.model = names[0];
    const select = $('#model');
    select.replaceChildren(...names.map((name) => h('option', { value: name, selected: name === conversation.model }, name)));
    select.disabled = names.length < 2;
    const unknown = conversation.stores.filter((id) => !this.#stores.some((store) => store.id === id));
    const choices = [...this.#stores.map(({ id }) => id), ...unknown].map((id) => this.#storeChoice(id));
    const hint = h('p', { class: 'hint' }, 'There is no store yet. ', h('a', { href: '#documents' }, 'Make one'), '.');
    $('#stores-list').replaceChildren(...(choices.length ? choices : [hint]));
    this.#nameChosen();
  }

  /** The list of stores gives names and no more: it may be late, cut short, or fail, and what is chosen stays so. */
  #nameChosen() {
    $('#stores-chosen').textContent = this.#conversation.stores.map((id) => this.#nameOf(id)).join(', ') || 'no documents';
  }

  #nameOf(id) {
    const store = this.#stores.find((each) => each.id === id);
    return store ? store.name || 'unnamed store' : 'unknown store';
  }

  #storeChoice(id) {
    const box = h('input', { type: 'checkbox', checked: this.#conversation.stores.includes(id) });
    box.addEventListener('change', () => {
      const stores = new Set(this.#conversation.stores);
      if (box.checked) stores.add(id);
      else stores.delete(id);
      this.#conversation.stores = [...stores].slice(0, 16);
      this.#remember();
      this.#nameChosen();
    });
    const store = this.#stores.find((each) => each.id === id);
    return h('label', { class: 'check' }, box, h('span', {}, this.#nameOf(id)), h('small', {}, store ? plural(store.file_counts.completed, 'file') : id));
  }

  /** Of the stores that were asked for, those are no longer chosen of which the server, until `signal`, says that they are not there. */
  async #dropGone(conversation, message, signal) {
    const gone = new Set();
    for (const id of message.stores) {
      const error = await get(`v1/vector_stores/${encodeURIComponent(id)}`, signal).catch((failure) => failure);
      if (error.status === 404) gone.add(id);
    }
    if (!gone.size) return;
    conversation.stores = conversation.stores.filter((id) => !gone.has(id));
    message.error.message += ` ${gone.size > 1 ? 'They are' : 'It is'} no longer chosen.`;
    if (this.#conversation !== conversation) return;
    this.#remember();
    this.#choices();
  }

  /** Answers from this store next: what the Documents view offers. */
  askFrom(store) {
    if (this.#conversation.messages.length) this.#show(this.#fresh());
    this.#conversation.stores = [store.id];
    this.#remember();
    this.refresh();
    $('#question').focus();
  }

  // Conversations

  #fresh() {
    let defaults = {};
    try {
      defaults = JSON.parse(localStorage.getItem(DEFAULTS)) ?? {};
    } catch {
      // a first visit, or a browser that stores nothing
    }
    return {
      id: newId(),
      at: Date.now(),
      model: defaults.model ?? '',
      system: '',
      settings: defaults.settings ?? {},
      stores: defaults.stores ?? [],
      messages: [],
    };
  }

  #remember() {
    const { model, settings, stores } = this.#conversation;
    try {
      localStorage.setItem(DEFAULTS, JSON.stringify({ model, settings, stores }));
    } catch {
      // then the next conversation begins as the first did
    }
    if (this.#conversation.messages.length) this.#save(this.#conversation);
  }

  #save(conversation) {
    this.#conversations.put(conversation);
    $('#not-kept').hidden = this.#conversations.isKept;
  }

  #show(conversation) {
    this.#conversation = conversation;
    for (const message of conversation.messages) {
      if (RUNNING.has(message.state) && this.#running.get(conversation.id)?.message !== message) message.state = 'interrupted';
    }
    const running = this.#running.get(conversation.id);
    if (running) this.#conversation = running.conversation;
    this.#views.clear();
    $('#thread').replaceChildren(...this.#conversation.messages.map((message) => this.#view(message)));
    this.#arrange();
    this.#choices();
    this.#listConversations();
    toEnd(true);
  }

  #listConversations() {
    const items = this.#conversations.list().map(({ id, title, at }) => {
      const isShown = id === this.#conversation.id;
      const open = h(
        'button',
        { type: 'button', class: 'open', 'aria-current': isShown ? 'true' : null },
        h('span', { class: 'title' }, title),
        h('small', {}, this.#running.has(id) ? 'answering' : `${age((Date.now() - at) / 1000)} ago`),
      );
      open.addEventListener('click', () => {
        const found = this.#conversations.get(id);
        if (found) this.#show(found);
        document.body.classList.remove('rail-open');
        $('#question').focus();
      });
      const remove = h('button', { type: 'button', class: 'icon', 'aria-label': `Delete “${title}”` }, '×');
      remove.addEventListener('click', async () => {
        if (!(await confirmed({ title: 'Delete this conversation?', text: `“${title}” is kept in this browser only.`, action: 'Delete' })).yes) return;
        this.#running.get(id)?.controller.abort();
        this.#conversations.remove(id);
        if (isShown) this.#show(this.#fresh());
        else this.#listConversations();
      });
      return h('li', {}, open, remove);
    });
    $('#conversations').replaceChildren(...items);
  }

  startNew() {
    this.#show(this.#fresh());
    document.body.classList.remove('rail-open');
    $('#question').focus();
  }

  /** The page is about to go, or is there again. What has arrived stays. */
  leave(isLeaving) {
    this.#isLeaving = isLeaving;
    if (!isLeaving) return;
    for (const { conversation } of this.#running.values()) this.#save(conversation);
  }

  // Asking

  #listen() {
    const question = $('#question');
    $('#composer').addEventListener('submit', (event) => {
      event.preventDefault();
      const running = this.#running.get(this.#conversation.id);
      if (running) running.controller.abort();
      else this.#ask(question.value);
    });
    question.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.#running.has(this.#conversation.id)) this.#ask(question.value);
      } else if (event.key === 'Escape') this.#running.get(this.#conversation.id)?.controller.abort();
    });
    question.addEventListener('input', () => {
      grow(question);
      this.#arrange();
    });
    $('#model').addEventListener('change', (event) => {
      this.#conversation.model = event.target.value;
      this.#remember();
    });
    $('#new-conversation').addEventListener('click', () => this.startNew());
    $('#open-settings').addEventListener('click', () => this.#openSettings());
  }

  #openSettings() {
    const dialog = $('#settings');
    const form = $('form', dialog);
    const { settings, system } = this.#conversation;
    form.system.value = system;
    for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) form[name].value = settings[name] ?? '';
    dialog.returnValue = '';
    dialog.showModal();
    dialog.onclose = () => {
      if (dialog.returnValue !== 'save') return;
      const given = {};
      for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) {
        if (form[name].value !== '') given[name] = Number(form[name].value);
      }
      this.#conversation.system = form.system.value;
      this.#conversation.settings = given;
      this.#remember();
      this.#arrange();
    };
  }

  #ask(text) {
    if (!text.trim()) return;
    const conversation = this.#conversation;
    const question = { role: 'user', content: text };
    const answer = emptyAnswer(conversation);
    conversation.messages.push(question, answer);
    const field = $('#question');
    field.value = '';
    grow(field);
    $('#thread').append(this.#view(question), this.#view(answer));
    this.#answer(conversation, answer);
    toEnd(true);
  }

  #retry(message) {
    const conversation = this.#conversation;
    if (conversation.messages.at(-1) !== message || this.#running.has(conversation.id)) return;
    Object.assign(message, emptyAnswer(conversation));
    this.#update(message);
    this.#answer(conversation, message);
  }

  #edit(message) {
    const { messages } = this.#conversation;
    if (this.#running.has(this.#conversation.id)) return;
    const field = $('#question');
    field.value = message.content;
    messages.splice(messages.indexOf(message));
    this.#save(this.#conversation);
    this.#show(this.#conversation);
    grow(field);
    this.#arrange();
    field.focus();
  }

  async #answer(conversation, message) {
    const controller = new AbortController();
    this.#running.set(conversation.id, { conversation, message, controller });
    conversation.at = Date.now();
    this.#save(conversation);
    this.#arrange();
    this.#listConversations();
    announce('Asked. Waiting for the answer.');
    try {
      await this.#untilAnswered(conversation, message, controller.signal);
      message.state = 'done';
      announce(`The answer is complete: ${plural(message.stats.tokens ?? 0, 'token')}.`);
    } catch (error) {
      if (error.name === 'AbortError') {
        message.state = 'stopped';
        announce('Stopped.');
      } else if (this.#isLeaving) message.state = 'interrupted';
      else {
        if (!(error instanceof ApiError)) console.error(error);
        message.error = { kind: error.kind ?? 'page', message: error.message };
        if (error.status === 404) await this.#dropGone(conversation, message, controller.signal);
        message.state = 'failed';
        announce(explain(message.error).heading);
      }
    }
    message.wait = null;
    this.#running.delete(conversation.id);
    if (this.#conversations.get(conversation.id)) this.#save(conversation);
    const stays = isAtEnd();
    this.#update(message, true);
    this.#arrange();
    this.#listConversations();
    if (stays) toEnd();
  }

  /** Asks until there is an answer. What passes by itself is waited for; what has begun to arrive is never thrown away. */
  async #untilAnswered(conversation, message, signal) {
    for (let tries = 1; ; tries += 1) {
      message.state = 'waiting';
      this.#update(message);
      try {
        return await this.#stream(conversation, message, signal);
      } catch (error) {
        if (error.name === 'AbortError' || hasBegun(message)) throw error;
        if (error.kind === 'key') {
          message.state = 'key';
          this.#update(message);
          await this.#askForKey(error, signal);
        } else if (isPassing(error.kind) && tries < MOST_TRIES) {
          const waitS = Math.min(LONGEST_WAIT_S, error.retryAfterS ?? Math.min(15, 2 ** tries / 2));
          await this.#countDown(message, error, waitS, signal);
        } else throw error;
      }
    }
  }

  async #countDown(message, error, waitS, signal) {
    const until = Date.now() + 1000 * waitS;
    message.state = 'retrying';
    let now;
    const hurried = new Promise((resolve) => (now = resolve));
    window.addEventListener('online', now);
    announce(explain(error).heading);
    try {
      while (Date.now() < until) {
        const leftS = Math.max(1, Math.ceil((until - Date.now()) / 1000));
        message.wait = { error: { kind: error.kind, message: error.message }, leftS, now };
        this.#update(message);
        const passed = pause(Math.min(1000, until - Date.now()), signal);
        if ((await Promise.race([hurried.then(() => 'now'), passed])) === 'now') break;
      }
    } finally {
      window.removeEventListener('online', now);
      message.wait = null;
    }
  }

  async #stream(conversation, message, signal) {
    const begin = performance.now();
    let first = null;
    let last = null;
    const stats = (message.stats = {});
    message.asked = conversation.model;
    this.#feed.hurry();
    for await (const chunk of streamChat(this.#body(conversation, message), signal)) {
      if (chunk.usage) {
        stats.tokens = chunk.usage.completion_tokens;
        stats.promptTokens = chunk.usage.prompt_tokens;
        stats.cachedTokens = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
      }
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const delta = choice.delta ?? {};
      const thought = delta.reasoning ?? delta.reasoning_content;
      if (delta.content || thought || delta.tool_calls?.length) {
        last = performance.now();
        first ??= last;
        stats.ttftS = (first - begin) / 1000;
        message.state = 'streaming';
      }
      if (delta.content) message.content += delta.content;
      if (thought) message.reasoning += thought;
      for (const call of delta.tool_calls ?? []) addCall(message.calls, call);
      if (delta.annotations) message.citations = delta.annotations;
      const fields = delta.provider_specific_fields;
      if (fields?.search_results) {
        message.found = fields.search_results.flatMap((result) => result.data).map(passage);
        message.searched = fields.file_search_status ?? 'completed';
      }
      if (choice.finish_reason) message.finish = choice.finish_reason;
      this.#update(message);
      if (performance.now() - this.#saved > 1000) {
        this.#saved = performance.now();
        this.#save(conversation);
      }
    }
    if (first !== null && stats.tokens > 1 && last - first > SHORTEST_PACE_MS) stats.tokensPerS = (stats.tokens - 1) / ((last - first) / 1000);
  }

  #body(conversation, message) {
    const messages = conversation.system.trim() ? [{ role: 'system', content: conversation.system }] : [];
    for (const each of conversation.messages) {
      if (each === message) break;
      if (each.content) messages.push({ role: each.role, content: each.content });
    }
    message.stores = [...conversation.stores];
    const tools = message.stores.length ? { tools: [{ type: 'file_search', vector_store_ids: message.stores }] } : {};
    return {
      model: conversation.model || undefined,
      messages,
      stream: true,
      stream_options: { include_usage: true },
      ...conversation.settings,
      ...tools,
    };
  }

  // What is seen

  #arrange() {
    const conversation = this.#conversation;
    const isRunning = this.#running.has(conversation.id);
    document.body.classList.toggle('is-empty', conversation.messages.length === 0);
    const send = $('#send');
    send.classList.toggle('stop', isRunning);
    send.textContent = isRunning ? 'Stop' : 'Ask';
    send.disabled = !isRunning && !$('#question').value.trim();
    $('#open-settings').classList.toggle('is-set', Boolean(conversation.system.trim() || Object.keys(conversation.settings).length));
    for (const [message, view] of this.#views) view.setLast(message === conversation.messages.at(-1), isRunning, conversation);
  }

  #view(message) {
    const view =
      message.role === 'user'
        ? new QuestionView(message, { onedit: () => this.#edit(message) })
        : new AnswerView(message, {
            onretry: () => this.#retry(message),
            oncite: (number, opener) => this.#openPassage(message, number, opener),
            reason: () => waitingFor(this.#feed.model(message.asked), message.asked),
          });
    this.#views.set(message, view);
    return view.element;
  }

  #update(message, isFinal = false) {
    this.#views.get(message)?.update(isFinal);
  }
}

class QuestionView {
  constructor(message, { onedit }) {
    this.edit = h('button', { type: 'button', class: 'link', onclick: onedit, hidden: true }, 'Edit');
    this.element = h('li', { class: 'question' }, h('span', { class: 'visually-hidden' }, 'You asked: '), h('p', {}, message.content), this.edit);
  }

  setLast(_isLast, isRunning, conversation) {
    const lastQuestion = conversation.messages.findLast((message) => message.role === 'user');
    this.edit.hidden = isRunning || !this.element.isConnected || this.element !== lastViewOf(this.element) || !lastQuestion;
  }

  update() {}
}

const lastViewOf = (element) => [...element.parentElement.querySelectorAll('.question')].at(-1);

class AnswerView {
  #message;
  #on;
  #drawn = 0;
  #timer = null;

  constructor(message, on) {
    this.#message = message;
    this.#on = on;
    this.thinking = h('details', { class: 'thinking', hidden: true }, h('summary', {}, 'Reasoning'), h('div'));
    this.calls = h('div', { class: 'calls' });
    this.text = h('div', { class: 'text' });
    this.notice = h('div', { class: 'notice', hidden: true });
    this.sources = h('ol', { class: 'sources', 'aria-label': 'Sources', hidden: true });
    this.numbers = h('p', { class: 'numbers' });
    this.retry = h('button', { type: 'button', class: 'link', onclick: on.onretry }, 'Retry');
    this.copy = h('button', { type: 'button', class: 'link' }, 'Copy');
    this.copy.addEventListener('click', async () => {
      await navigator.clipboard?.writeText(message.content).catch(() => {});
      this.copy.textContent = 'Copied';
      setTimeout(() => (this.copy.textContent = 'Copy'), 1600);
    });
    this.foot = h('div', { class: 'foot' }, this.numbers, h('span', { class: 'deeds' }, this.copy, this.retry));
    this.element = h(
      'li',
      { class: 'answer' },
      h('span', { class: 'visually-hidden' }, 'Answer: '),
      this.thinking,
      this.calls,
      this.text,
      this.notice,
      this.sources,
      this.foot,
    );
    this.#draw();
  }

  setLast(isLast, isRunning) {
    this.retry.hidden = !isLast || isRunning;
  }

  /** Draws soon: long answers less often, since all of one is rendered anew. */
  update(isFinal) {
    if (isFinal) {
      clearTimeout(this.#timer);
      this.#timer = null;
      return this.#draw();
    }
    const every = Math.min(1000, 60 + this.#message.content.length / 60);
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      this.#draw();
    }, Math.max(0, every - (performance.now() - this.#drawn)));
  }

  #draw() {
    this.#drawn = performance.now();
    const message = this.#message;
    const stays = isAtEnd();
    const sources = sourcesOf(message);
    this.element.dataset.state = message.state;
    this.thinking.hidden = !message.reasoning;
    if (message.reasoning) {
      this.thinking.querySelector('div').replaceChildren(render(message.reasoning));
      if (message.state === 'streaming' && !message.content) this.thinking.open = true;
      else if (message.content && this.thinking.dataset.closed !== 'yes') {
        this.thinking.open = false;
        this.thinking.dataset.closed = 'yes';
      }
    }
    this.calls.replaceChildren(...message.calls.map(callView));
    const marks = message.citations.map((citation) => {
      const source = sources.find((each) => each.has(citation));
      return {
        index: citation.index,
        number: source.number,
        label: citation.filename,
        onopen: (event) => this.#on.oncite(source.number, event.currentTarget),
      };
    });
    this.text.replaceChildren(render(message.content, marks));
    this.#drawNotice();
    this.#drawSources(sources);
    this.#drawNumbers();
    if (stays) toEnd();
  }

  #drawNotice() {
    const { state, error, wait } = this.#message;
    const parts = [];
    if (state === 'waiting') parts.push(h('p', { class: 'quiet' }, this.#on.reason() ?? 'Waiting for the first token'));
    if (state === 'key') parts.push(h('p', {}, h('strong', {}, 'This server needs an API key.'), ' Your question is asked as soon as there is one.'));
    if (state === 'retrying' && wait) {
      const { heading, detail } = explain(wait.error);
      parts.push(h('p', {}, h('strong', {}, `${heading}.`), ` ${detail} `, h('span', { class: 'count-down' }, `Asking again in ${wait.leftS} s.`)));
      parts.push(h('button', { type: 'button', class: 'link', onclick: wait.now }, 'Ask now'));
    }
    if (state === 'stopped') parts.push(h('p', { class: 'quiet' }, 'You stopped it here.'));
    if (state === 'interrupted') parts.push(h('p', { class: 'quiet' }, 'The page was left while this was arriving.'));
    if (state === 'failed') {
      const { heading, detail } = explain(error);
      parts.push(h('p', {}, h('strong', {}, `${heading}.`), ` ${detail}`));
    }
    if (state === 'done') {
      if (this.#message.finish === 'length') parts.push(h('p', { class: 'quiet' }, 'It reached the longest answer allowed.'));
      if (!this.#message.content && !this.#message.calls.length) parts.push(h('p', { class: 'quiet' }, 'The model said nothing.'));
      if (this.#message.searched === 'failed') parts.push(h('p', {}, 'The documents could not be searched: this answer does without them.'));
    }
    this.notice.classList.toggle('is-bad', state === 'failed');
    this.notice.classList.toggle('is-wait', state === 'retrying' || state === 'key');
    this.notice.hidden = parts.length === 0;
    this.notice.replaceChildren(...parts);
  }

  #drawSources(sources) {
    const { found, state } = this.#message;
    this.sources.hidden = sources.length === 0;
    this.sources.replaceChildren(
      ...sources.map((source) => {
        const open = h('button', { type: 'button', class: 'source' }, h('span', { class: 'cite' }, String(source.number)), h('span', { class: 'name' }, source.filename), h('span', { class: 'snippet' }, source.text.replace(/^#+ /gm, '').trim().slice(0, 140)));
        open.addEventListener('click', () => this.#on.oncite(source.number, open));
        return h('li', {}, open);
      }),
    );
    this.element.querySelector('.uncited')?.remove();
    if (found.length && !sources.length && state === 'done') {
      const open = h('button', { type: 'button', class: 'link' }, 'Show what was found');
      open.addEventListener('click', () => this.#on.oncite(0, open));
      this.sources.after(h('p', { class: 'uncited' }, `The model cites none of the ${plural(found.length, 'passage')} it was given. `, open));
    }
  }

  #drawNumbers() {
    const { stats, state } = this.#message;
    const parts = [];
    if (stats.ttftS != null) parts.push(['TTFT', `${seconds(stats.ttftS)} to first token`]);
    if (stats.tokensPerS != null) parts.push(['rate', `${rate(stats.tokensPerS)} tokens/s`]);
    if (stats.tokens != null) parts.push(['tokens', plural(stats.tokens, 'token')]);
    if (stats.promptTokens) parts.push(['prompt', `prompt ${count(stats.promptTokens)}${stats.cachedTokens ? `, ${count(stats.cachedTokens)} cached` : ''}`]);
    this.numbers.replaceChildren(...parts.map(([name, text]) => h('span', { 'data-what': name }, text)));
    this.foot.hidden = RUNNING.has(state) && !parts.length;
    this.copy.hidden = !this.#message.content;
  }
}

// Answers

function emptyAnswer({ model }) {
  return { role: 'assistant', asked: model, content: '', reasoning: '', calls: [], citations: [], found: [], stores: [], stats: {}, state: 'waiting', error: null, wait: null, finish: null, searched: null };
}

const hasBegun = (message) => Boolean(message.content || message.reasoning || message.calls.length);

function passage(result) {
  const text = result.content.map((part) => part.text).join('\n');
  return { fileId: result.file_id, filename: result.filename, score: result.score, text: text.slice(0, MOST_PASSAGE_CHARS) };
}

/** The passages an answer cites, numbered in the order it cites them. Without a place among the results, by file. */
export function sourcesOf(message) {
  const sources = [];
  if (!message.citations.length) return sources;
  const points = [...message.content];
  for (const citation of message.citations) {
    if (sources.some((source) => source.has(citation))) continue;
    const before = Math.max(0, ...message.citations.map((each) => each.index).filter((index) => index < citation.index));
    const found = message.found[citation.result_index] ?? message.found.find((each) => each.fileId === citation.file_id);
    sources.push({
      number: sources.length + 1,
      fileId: citation.file_id,
      filename: citation.filename,
      text: found?.text ?? '',
      said: points.slice(before, citation.index).join(''),
      score: found?.score ?? null,
      has: (other) => other.file_id === citation.file_id && other.result_index === citation.result_index,
    });
  }
  return sources;
}

function addCall(calls, { index, id, function: called }) {
  const call = (calls[index ?? calls.length] ??= { id, name: '', arguments: '' });
  call.name += called?.name ?? '';
  call.arguments += called?.arguments ?? '';
}

function callView(call) {
  return h('details', { class: 'call' }, h('summary', {}, 'Tool call: ', h('code', {}, call.name)), h('pre', { tabIndex: 0 }, call.arguments));
}

// Small things

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException('stopped', 'AbortError'));
    };
    const timer = setTimeout(() => {
      signal.removeEventListener('abort', stop);
      resolve();
    }, ms);
    if (signal.aborted) stop();
    signal.addEventListener('abort', stop, { once: true });
  });
}

function newId() {
  const words = crypto.getRandomValues(new Uint32Array(3)); // randomUUID is not there without TLS
  return [...words].map((word) => word.toString(36)).join('');
}

function grow(field) {
  field.style.height = 'auto';
  field.style.height = `${Math.min(field.scrollHeight, window.innerHeight * 0.4)}px`;
}

const scroller = () => $('#scroll');

function isAtEnd() {
  const box = scroller();
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function toEnd(now = false) {
  const box = scroller();
  box.scrollTo({ top: box.scrollHeight, behavior: now ? 'instant' : 'auto' });
}

