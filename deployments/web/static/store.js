// Conversations in this browser: bounded, one entry each, so that a token costs no rewrite of all. Pure but for storage.

const PREFIX = 'groundswell.conversation.';
const MOST_CONVERSATIONS = 60;
const MOST_CHARS = 3_000_000;

export class Conversations {
  #storage;

  constructor(storage) {
    this.#storage = storage;
    this.isKept = true; // whether the browser stores what it is given
  }

  /** All of them, the one changed last first: id, title and time. */
  list() {
    const found = [];
    for (let i = 0; i < this.#storage.length; i += 1) {
      const name = this.#storage.key(i);
      if (!name?.startsWith(PREFIX)) continue;
      const conversation = parse(this.#storage.getItem(name));
      if (conversation) found.push({ id: conversation.id, title: titleOf(conversation), at: conversation.at });
    }
    return found.sort((a, b) => b.at - a.at);
  }

  get(id) {
    return parse(this.#storage.getItem(PREFIX + id));
  }

  /** Keeps it; the oldest ones make room. What the browser will not store lives as long as the page. */
  put(conversation) {
    const text = JSON.stringify(conversation);
    this.#makeRoom(conversation.id, text.length);
    for (;;) {
      try {
        this.#storage.setItem(PREFIX + conversation.id, text);
        this.isKept = true;
        return;
      } catch {
        if (!this.#dropOldest(conversation.id)) {
          this.isKept = false;
          return;
        }
      }
    }
  }

  remove(id) {
    this.#storage.removeItem(PREFIX + id);
  }

  #others(id) {
    const names = [];
    for (let i = 0; i < this.#storage.length; i += 1) {
      const name = this.#storage.key(i);
      if (name?.startsWith(PREFIX) && name !== PREFIX + id) names.push(name);
    }
    return names
      .map((name) => ({ name, size: this.#storage.getItem(name).length, at: parse(this.#storage.getItem(name))?.at ?? 0 }))
      .sort((a, b) => a.at - b.at);
  }

  #makeRoom(id, size) {
    const others = this.#others(id);
    let total = size + others.reduce((sum, other) => sum + other.size, 0);
    while (others.length && (others.length >= MOST_CONVERSATIONS || total > MOST_CHARS)) {
      const oldest = others.shift();
      total -= oldest.size;
      this.#storage.removeItem(oldest.name);
    }
  }

  #dropOldest(id) {
    const [oldest] = this.#others(id);
    if (oldest) this.#storage.removeItem(oldest.name);
    return Boolean(oldest);
  }
}

/** Stands in where the browser stores nothing. */
export class MemoryStorage {
  #items = new Map();
  get length() {
    return this.#items.size;
  }
  key(i) {
    return [...this.#items.keys()][i] ?? null;
  }
  getItem(name) {
    return this.#items.get(name) ?? null;
  }
  setItem(name, value) {
    this.#items.set(name, value);
  }
  removeItem(name) {
    this.#items.delete(name);
  }
}

function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === 'user')?.content ?? '';
  const line = first.trim().split('\n')[0];
  return line.length > 60 ? `${line.slice(0, 58)}…` : line || 'New conversation';
}

function parse(text) {
  try {
    const conversation = JSON.parse(text);
    return conversation && Array.isArray(conversation.messages) ? conversation : null;
  } catch {
    return null;
  }
}
