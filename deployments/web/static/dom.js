// Elements without markup: text stays text.

/** An element. Properties that begin with `on` are listeners; `class`, `aria-…` and `data-…` are attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value == null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.includes('-') && typeof value !== 'string') element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

const SVG = 'http://www.w3.org/2000/svg';

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const $ = (selector, within = document) => within.querySelector(selector);

/** Says something to those who listen rather than look. */
export function announce(text) {
  $('#announcements').textContent = text;
}

/** Asks before something is lost. Resolves to whether to go on, and to the state of an optional checkbox. */
export function confirmed({ title, text, action, option }) {
  const box = option ? h('input', { type: 'checkbox', id: 'confirm-option' }) : null;
  const dialog = h(
    'dialog',
    { class: 'dialog', 'aria-labelledby': 'confirm-title' },
    h(
      'form',
      { method: 'dialog' },
      h('h2', { id: 'confirm-title' }, title),
      h('p', {}, text),
      box && h('label', { class: 'check', for: 'confirm-option' }, box, option),
      h(
        'div',
        { class: 'actions' },
        h('button', { value: 'no', class: 'quiet' }, 'Keep'),
        h('button', { value: 'yes', class: 'danger' }, action),
      ),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener('close', () => {
      resolve({ yes: dialog.returnValue === 'yes', option: box?.checked ?? false });
      dialog.remove();
    });
  });
}
