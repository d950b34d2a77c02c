// Numbers, times and errors in plain words. Pure.

const thin = '\u2009';

export function count(n) {
  if (n == null || !Number.isFinite(n)) return '–';
  return Math.round(n).toString().replace(/\B(?=(\d{3})+$)/g, thin);
}

export function rate(perSecond) {
  if (perSecond == null || !Number.isFinite(perSecond)) return '–';
  return perSecond > 0 && perSecond < 10 ? perSecond.toFixed(1) : count(perSecond);
}

export function percent(share) {
  return share == null || !Number.isFinite(share) ? '–' : `${Math.round(share * 100)}${thin}%`;
}

export function seconds(s) {
  if (s == null || !Number.isFinite(s)) return '–';
  if (s < 1) return `${Math.round(s * 1000)}${thin}ms`;
  if (s < 10) return `${s.toFixed(1)}${thin}s`;
  if (s < 60) return `${Math.round(s)}${thin}s`;
  return age(s);
}

export function age(s) {
  if (s == null || !Number.isFinite(s)) return '–';
  if (s < 60) return `${Math.round(s)}${thin}s`;
  if (s < 3600) return `${Math.floor(s / 60)}${thin}min`;
  if (s < 86400) return `${Math.floor(s / 3600)}${thin}h ${Math.floor((s % 3600) / 60)}${thin}min`;
  return `${Math.floor(s / 86400)}${thin}d`;
}

export function bytes(n) {
  if (n == null) return '–';
  const units = ['bytes', 'kB', 'MB', 'GB'];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) {
    n /= 1000;
    i += 1;
  }
  return `${i && n < 10 ? n.toFixed(1) : Math.round(n)}${thin}${units[i]}`;
}

export function plural(n, one, many = `${one}s`) {
  return `${count(n)} ${n === 1 ? one : many}`;
}

/** Seconds that a `Retry-After` header asks for; null where it says nothing of use. */
export function retryAfter(header, now = Date.now()) {
  if (!header) return null;
  const number = Number(header);
  if (Number.isFinite(number)) return Math.max(0, number);
  const at = Date.parse(header);
  return Number.isNaN(at) ? null : Math.max(0, (at - now) / 1000);
}

/** What kind of trouble an answer of this status is: what to say, and whether asking again may help. */
export function kindOf(status, isOurs) {
  if (status === 401 || status === 403) return 'key';
  if (status === 429) return 'limit';
  if (status >= 500 && !isOurs) return 'away'; // a proxy's words: what it should have asked is not there
  if (status === 503) return 'unavailable';
  if (status === 408) return 'late';
  if (status >= 500 && status !== 501) return 'server';
  return 'refused';
}

/** Whether asking again, by itself, makes sense. */
export function isPassing(kind) {
  return kind === 'limit' || kind === 'unavailable' || kind === 'away';
}

const headings = {
  key: 'This server needs an API key',
  limit: 'Too much is asked of it just now',
  unavailable: 'It cannot answer just now',
  away: 'The server cannot be reached',
  late: 'This took too long',
  server: 'Something went wrong in the server',
  refused: 'The server does not take this request',
  broken: 'The connection broke off',
  stream: 'The answer ended in an error',
};

/** A heading and a sentence for an error. */
export function explain(error) {
  const heading = headings[error.kind] ?? 'Something went wrong';
  if (error.kind === 'away') {
    return { heading, detail: 'It is starting, restarting, or the network is down. Nothing you wrote is lost.' };
  }
  if (error.kind === 'broken') return { heading, detail: 'What had arrived is kept. Ask again for all of it.' };
  return { heading, detail: error.message || '' };
}

/** What a wait for the first token may be about, from `/fleet`'s entry of the model; null where it is just slow. */
export function waitingFor(model, name) {
  if (!model) return null;
  const { ready = 0, starting = 0 } = model.states;
  if (!ready && starting) return `${plural(starting, 'engine')} of ${name} ${starting === 1 ? 'is' : 'are'} loading. The answer begins when one is ready.`;
  if (!ready) return `No engine of ${name} is there yet. The answer begins when one is.`;
  const waiting = model.waiting + model.this_router.waiting;
  if (waiting > 1) return `All engines are busy: ${plural(waiting, 'request')} wait, yours among them.`;
  return null;
}
