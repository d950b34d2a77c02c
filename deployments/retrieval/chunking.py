"""Text into chunks, by its structure, measured in tokens. Pure.

The text falls into atoms (lines and sentences, or parts of those that are too long by themselves). Chunks are runs of
atoms that end, where they can, before a heading, else between paragraphs, else between sentences. Each atom's tokens
are counted once: what tokenizers make of a whole is, but for rare merges across a seam, no more than of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from deployments.retrieval.records import Chunk, Chunking
from deployments.retrieval.tokens import CountTokens

_HEADING, _PARAGRAPH, _LINE, _SENTENCE, _WORD = 5, 4, 3, 2, 1

_LINES = re.compile(r"[^\n]*\n*")
_IS_HEADING = re.compile(r"#{1,6} \S")
_SENTENCES = re.compile(".+?(?:[.!?\u2026][\"'\u201d\u2019)\\]]*(?=\\s)|[\u3002\uff01\uff1f]|$)\\s*", re.DOTALL)
_WORDS = re.compile(r"\S{1,32}\s*|\s+")
_COUNTED_TOGETHER: Final = 4096
_MAX_BYTES_A_TOKEN: Final = 16


@dataclass(frozen=True, slots=True)
class _Atom:
    start: int
    end: int
    tokens: int
    strength: int
    """Of the boundary before it."""


def chunks(text: str, chunking: Chunking, count: CountTokens) -> Iterator[Chunk]:
    """Yield the chunks of `text` in order.

    Each has at most `max_tokens`; neighbours share up to `overlap_tokens`, in whole atoms. White space at the ends is
    left out, and so are chunks of nothing else.
    """
    atoms = _atoms(text, chunking.max_tokens, count)
    begin = 0
    while begin < len(atoms):
        end = _end(atoms, begin, chunking.max_tokens)
        if (chunk := _chunk(text, atoms[begin:end])) is not None:
            yield chunk
        if end == len(atoms):
            return
        begin = _next_begin(atoms, begin, end, chunking)


def _end(atoms: list[_Atom], begin: int, max_tokens: int) -> int:
    """Return where the chunk that starts at `begin` ends: at the strongest boundary of its second half."""
    size, end = 0, begin
    cuts: list[tuple[int, int]] = []
    while end < len(atoms) and (size + atoms[end].tokens <= max_tokens or end == begin):
        if size >= max_tokens / 2 and end > begin:
            cuts.append((atoms[end].strength, end))
        size += atoms[end].tokens
        end += 1
    if end == len(atoms):
        return end
    return max([*cuts, (atoms[end].strength, end)])[1]


def _next_begin(atoms: list[_Atom], begin: int, end: int, chunking: Chunking) -> int:
    """Return where the next chunk starts: before `end` by the overlap, but never before a heading's section."""
    room = min(chunking.overlap_tokens, chunking.max_tokens - atoms[end].tokens)
    start = end
    while start > begin + 1 and atoms[start].strength != _HEADING and atoms[start - 1].tokens <= room:
        start -= 1
        room -= atoms[start].tokens
    return start


def _chunk(text: str, atoms: list[_Atom]) -> Chunk | None:
    start, end = atoms[0].start, atoms[-1].end
    piece = text[start:end]
    if not (stripped := piece.strip()):
        return None
    start += len(piece) - len(piece.lstrip())
    return Chunk(stripped, start, start + len(stripped), sum(atom.tokens for atom in atoms))


def _atoms(text: str, max_tokens: int, count: CountTokens) -> list[_Atom]:
    found: list[_Atom] = []
    pending: list[tuple[int, int, int]] = []

    def settle() -> None:
        for (start, end, strength), tokens in zip(pending, count([text[s:e] for s, e, _ in pending]), strict=True):
            counted = _at_least(text[start:end], tokens)
            if counted <= max_tokens:
                found.append(_Atom(start, end, counted, strength))
            else:
                found.extend(_parts(text, start, end, strength, max_tokens, count))
        pending.clear()

    for span in _spans(text):
        pending.append(span)
        if len(pending) >= _COUNTED_TOGETHER:
            settle()
    settle()
    return found


def _spans(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and strength of each sentence, or line."""
    after_blank = True
    for line in _LINES.finditer(text):
        start, end = line.span()
        if start == end:
            continue
        strength = _HEADING if _IS_HEADING.match(text, start) else _PARAGRAPH if after_blank else _LINE
        after_blank = line.group().endswith("\n\n") or not line.group().strip()
        for sentence in _SENTENCES.finditer(text, start, end) if end - start > 80 else (line,):
            yield *sentence.span(), strength
            strength = _SENTENCE


def _at_least(text: str, tokens: int) -> int:
    """Return the tokens, or more if they say too little of the size: to some tokenizers any long word is one."""
    return max(tokens, len(text.encode()) // _MAX_BYTES_A_TOKEN)


def _parts(text: str, start: int, end: int, strength: int, max_tokens: int, count: CountTokens) -> Iterator[_Atom]:
    """Yield a sentence that is too long by itself as runs of words, each short enough."""
    words = (m.span() for m in _WORDS.finditer(text, start, end))
    while spans := list(islice(words, _COUNTED_TOGETHER)):  # a whole book may stand on one line
        counts = count([text[s:e] for s, e in spans])
        for (word_start, word_end), counted in zip(spans, counts, strict=True):
            tokens = _at_least(text[word_start:word_end], counted)
            if tokens <= max_tokens:
                yield _Atom(word_start, word_end, tokens, strength)
            else:  # 32 characters of more than `max_tokens`: only with a tiny limit or a strange tokenizer
                for i in range(word_start, word_end):
                    yield _Atom(i, i + 1, max(1, tokens // (word_end - word_start)), strength)
            strength = _WORD
