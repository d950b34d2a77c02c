// The public API, over fetch. Knows the key; knows nothing of what is shown.

import { EventReader } from './sse.js';
import { kindOf, retryAfter } from './words.js';

const KEY = 'groundswell.key';

export class ApiError extends Error {
  constructor(kind, message, { status = 0, code = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, code, retryAfterS });
  }
}

/** The key of this browser. It goes nowhere but into requests to this server. */
export const key = {
  get: () => read(() => sessionStorage) ?? read(() => localStorage),
  set(value, { remember }) {
    this.forget();
    try {
      (remember ? localStorage : sessionStorage).setItem(KEY, value);
    } catch {
      held = value;
    }
  },
  forget() {
    held = null;
    for (const storage of [() => localStorage, () => sessionStorage]) {
      try {
        storage().removeItem(KEY);
      } catch {
        // a browser that stores nothing has nothing to forget
      }
    }
  },
};

let held = null;

function read(storage) {
  try {
    return storage().getItem(KEY) ?? held;
  } catch {
    return held;
  }
}

function headers(more) {
  const value = key.get();
  return value ? { ...more, authorization: `Bearer ${value}` } : { ...more };
}

const address = (path) => new URL(path, document.baseURI).href;

/** Sends a request. Throws ApiError, or an AbortError when `signal` says so. */
async function send(path, { method = 'GET', body, signal } = {}) {
  const given = body === undefined ? {} : { 'content-type': 'application/json' };
  let response;
  try {
    response = await fetch(address(path), {
      method,
      signal,
      headers: headers(given),
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: 'no-store',
      credentials: 'omit',
      referrerPolicy: 'no-referrer',
    });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError('away', 'The server cannot be reached.');
  }
  if (!response.ok) throw await refusal(response.status, response.headers.get('retry-after'), await response.text());
  return response;
}

function refusal(status, header, text) {
  let said = null;
  try {
    said = JSON.parse(text).error;
  } catch {
    // not one of ours
  }
  const message = typeof said?.message === 'string' ? said.message : `The server answered ${status}.`;
  return new ApiError(kindOf(status, said != null), message, {
    status,
    code: said?.code ?? null,
    retryAfterS: retryAfter(header),
  });
}

export async function get(path, signal) {
  const response = await send(path, { signal });
  return await response.json();
}

export async function post(path, body, signal) {
  const response = await send(path, { method: 'POST', body, signal });
  return await response.json();
}

export async function remove(path) {
  await send(path, { method: 'DELETE' });
}

/** All items of one of OpenAI's lists, up to `most`. */
export async function list(path, { most = 1000, limit = 100, signal } = {}) {
  const items = [];
  let after = null;
  do {
    const page = await get(`${path}?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ''}`, signal);
    items.push(...page.data);
    after = page.has_more ? page.last_id : null;
  } while (after && items.length < most);
  return items;
}

/** Text of an answer that may be long; null once it has more than `most` bytes. */
export async function getBounded(path, most, signal) {
  const stop = new AbortController();
  const response = await send(path, { signal: signal ? AbortSignal.any([signal, stop.signal]) : stop.signal });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = '';
  let size = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return text + decoder.decode();
    size += value.length;
    if (size > most) {
      stop.abort();
      return null;
    }
    text += decoder.decode(value, { stream: true });
  }
}

/** Chunks of a streamed chat completion, as they arrive. */
export async function* streamChat(body, signal) {
  const response = await send('v1/chat/completions', { method: 'POST', body, signal });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const events = new EventReader();
  let isComplete = false;
  let isRead = false;
  try {
    while (!isRead) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === 'AbortError') throw error;
        throw new ApiError('broken', 'The connection broke off.');
      }
      isRead = part.done;
      for (const { event, data } of events.feed(part.done ? '\n\n' : decoder.decode(part.value, { stream: true }))) {
        if (data === '[DONE]') {
          isComplete = true; // and read on to the end, or the server would hear a client that hangs up
          continue;
        }
        const chunk = JSON.parse(data);
        if (chunk.error || event === 'error') throw new ApiError('stream', (chunk.error ?? chunk).message ?? '');
        yield chunk;
      }
    }
    if (!isComplete) throw new ApiError('broken', 'The connection broke off.');
  } finally {
    if (!isRead) reader.cancel().catch(() => {}); // hangs up: the engine is free at once
  }
}

/** Uploads a file. `onProgress` gets a share, 0 to 1. fetch cannot tell how far it is, so this is XMLHttpRequest. */
export function upload(file, { onProgress, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const form = new FormData();
    form.append('purpose', 'assistants');
    form.append('file', file, file.name);
    request.open('POST', address('v1/files'));
    for (const [name, value] of Object.entries(headers({}))) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onerror = () => reject(new ApiError('away', 'The server cannot be reached.'));
    request.onabort = () => reject(new DOMException('stopped', 'AbortError'));
    request.onload = () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(refusal(request.status, request.getResponseHeader('retry-after'), request.responseText));
    };
    signal?.addEventListener('abort', () => request.abort());
    request.send(form);
  });
}
