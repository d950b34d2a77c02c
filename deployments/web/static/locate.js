// Where a passage stands in its document. Pure.

/** Start and end of `passage` in `text`, whatever white space lies between its words; null where it is not. */
export function locate(text, passage) {
  const wanted = passage.replace(/\s+/g, '');
  if (!wanted) return null;
  const places = [];
  let squeezed = '';
  for (let i = 0; i < text.length; i += 1) {
    if (!/\s/.test(text[i])) {
      places.push(i);
      squeezed += text[i];
    }
  }
  const at = squeezed.indexOf(wanted);
  return at < 0 ? null : [places[at], places[at + wanted.length - 1] + 1];
}

/** Start and end of what an answer quotes of a passage: all that it `said`, or its last sentence; null where it does not. */
export function quoted(passage, said) {
  const plain = said.replace(/[*_`]/g, '').trim();
  const last = plain.split(/(?<=[.!?])\s+|\n/).at(-1);
  for (const part of [plain, last]) {
    const place = part.length > 3 && locate(passage, part);
    if (place) return place;
  }
  return null;
}

/** A piece of `text` around a passage, cut at line ends where there are some near. */
export function around(text, [start, end], most) {
  const from = Math.max(0, start - most);
  const to = Math.min(text.length, end + most);
  const first = from && text.indexOf('\n', from) + 1;
  const last = to < text.length ? text.lastIndexOf('\n', to) : to;
  return [first > 0 && first <= start ? first : from, last >= end ? last : to];
}

/** The pieces of a document as one text: the white space between two of them is lost where they do not overlap. */
export function joined(pieces) {
  let text = '';
  for (const piece of pieces) text += text && /\S$/.test(text) && /^\S/.test(piece) ? `\n${piece}` : piece;
  return text;
}
