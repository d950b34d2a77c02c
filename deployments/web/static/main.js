// Puts the page together: views, the key, and how the server is.

import { get, key } from './api.js';
import { Chat, sourcesOf } from './chat.js';
import { Documents } from './documents.js';
import { $, announce } from './dom.js';
import { Feed, FleetView, statusLine } from './fleet.js';
import { PassagePanel } from './passage.js';
import { Conversations, MemoryStorage } from './store.js';

const VIEWS = ['chat', 'documents', 'fleet'];

function storage() {
  try {
    localStorage.getItem('groundswell');
    return localStorage;
  } catch {
    return new MemoryStorage();
  }
}

// The key

let waiting = []; // for a key

/** Asks for a key, once however many need it. Resolves when there is one to try; rejects only by `signal`. */
function askForKey(error, signal) {
  const given = new Promise((resolve, reject) => {
    waiting.push(resolve);
    signal?.addEventListener('abort', () => reject(new DOMException('stopped', 'AbortError')), { once: true });
  });
  if (!$('#key').open) openKeyDialog(error);
  return given;
}

function openKeyDialog(error) {
  const dialog = $('#key');
  const form = $('form', dialog);
  const problem = $('#key-problem');
  const unknown = 'The server does not know this key.';
  problem.textContent = !error ? '' : key.get() ? unknown : 'This server answers only with a key. Ask whoever runs it for one.';
  form.key.value = '';
  $('#key-forget').hidden = !key.get();
  const finish = () => {
    dialog.close();
    const those = waiting;
    waiting = [];
    for (const resolve of those) resolve();
    showView();
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
    const given = form.key.value.trim();
    if (!given) return form.key.focus();
    key.set(given, { remember: form.remember.checked });
    try {
      await get('v1/models');
      announce('The key is good.');
      finish();
    } catch (failure) {
      if (failure.kind !== 'key') return finish(); // what is wrong is something else: it may be good
      key.forget();
      problem.textContent = unknown;
      form.key.select();
    }
  };
  $('#key-forget').onclick = () => {
    key.forget();
    dialog.close();
    showView();
  };
  dialog.showModal();
}

// Views

const feed = new Feed();
const panel = new PassagePanel();
const openFound = (passages, at, opener) => panel.open(passages, at, opener);

function openCited(message, number, opener) {
  const cited = sourcesOf(message);
  const passages = (cited.length ? cited : message.found).map((each) => ({ ...each, stores: message.stores }));
  panel.open(passages, Math.max(0, number - 1), opener);
}

const chat = new Chat({ conversations: new Conversations(storage()), feed, askForKey, openPassage: openCited });
const documents = new Documents({
  askForKey,
  openPassage: openFound,
  askFrom: (store) => {
    location.hash = 'chat';
    showView(); // now, as what is hidden takes no focus
    chat.askFrom(store);
  },
});
const fleet = new FleetView({ feed });
const views = { chat: { show: (isShown) => isShown && chat.refresh() }, documents, fleet };

function showView() {
  const name = VIEWS.find((each) => `#${each}` === location.hash) ?? 'chat';
  document.body.dataset.view = name;
  document.body.classList.remove('rail-open');
  panel.close();
  for (const each of VIEWS) {
    $(`#view-${each}`).hidden = each !== name;
    const link = $(`nav a[href="#${each}"]`);
    if (each === name) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
    views[each].show(each === name);
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · Groundswell`;
}

let wasBad = false;
feed.subscribe(() => {
  const { state, text } = statusLine(feed);
  for (const line of document.querySelectorAll('.status')) {
    line.dataset.state = state;
    line.querySelector('span').textContent = text;
  }
  if (wasBad && state !== 'bad') views[document.body.dataset.view].show(true); // it is back: so is what was missing
  wasBad = state === 'bad' && feed.error?.kind !== 'key';
});

window.addEventListener('hashchange', showView);
window.addEventListener('pagehide', () => chat.leave(true));
window.addEventListener('pageshow', () => chat.leave(false));
$('#open-key').addEventListener('click', () => askForKey(null));
$('#settings-cancel').addEventListener('click', () => $('#settings').close());
$('.skip').addEventListener('click', (event) => {
  event.preventDefault(); // the address names a view
  $('#main').focus();
});
$('#key-cancel').addEventListener('click', () => $('#key').close());
for (const toggle of document.querySelectorAll('.toggle-rail')) toggle.addEventListener('click', () => document.body.classList.toggle('rail-open'));
document.addEventListener('click', (event) => {
  for (const menu of document.querySelectorAll('details.menu[open]')) if (!menu.contains(event.target)) menu.open = false;
});
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape') return;
  for (const menu of document.querySelectorAll('details.menu[open]')) {
    menu.open = false;
    $('summary', menu).focus();
  }
  document.body.classList.remove('rail-open');
});

document.body.classList.remove('is-loading');
showView();
feed.start();
