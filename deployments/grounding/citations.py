"""Takes citation markers out of a text as it comes, and says where they stood. Pure.

Cut anywhere, a text gives the same result as whole: what may still become a marker is held back until it is one, or
is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_MOST_IDS: Final = 8
"""In one marker: models told to cite `[k3f9]` write `[k3f9, b2c1]` too. Bounds what is held back."""


@dataclass(frozen=True)
class Citation:
    """A marker that was taken out.

    Attributes:
        index: Position in the text without markers, in characters (code points).
        id: The passage's id.
    """

    index: int
    id: str


class CitationReader:
    """Reads one text.

    Args:
        ids: The passages that may be cited. Markers that name others are text like any other.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = frozenset(ids)
        known = f"(?:{'|'.join(map(re.escape, sorted(self._ids)))})"
        # The space goes too: it stood between the statement and the marker.
        self._marker = re.compile(rf" ?\[({known}(?:, ?{known}){{0,{_MOST_IDS - 1}}})\]") if self._ids else None
        self._held = ""
        self._length = 0

    def feed(self, delta: str) -> tuple[str, list[Citation]]:
        """Return what of the text is certain now, and the citations up to there."""
        if self._marker is None:
            return delta, []
        text = self._held + delta
        pieces: list[str] = []
        citations: list[Citation] = []
        position = 0
        for match in self._marker.finditer(text):
            self._append(pieces, text[position : match.start()])
            citations += [Citation(self._length, id_) for id_ in match.group(1).replace(" ", "").split(",")]
            position = match.end()
        rest = text[position:]
        held = self._may_begin_a_marker(rest)
        self._append(pieces, rest[: len(rest) - held])
        self._held = rest[len(rest) - held :]
        return "".join(pieces), citations

    def end(self) -> str:
        """Return what was held back: the text is over, so it is no marker."""
        rest, self._held = self._held, ""
        self._length += len(rest)
        return rest

    def _append(self, pieces: list[str], piece: str) -> None:
        pieces.append(piece)
        self._length += len(piece)

    def _may_begin_a_marker(self, text: str) -> int:
        """Return the length of the suffix that may be the beginning of a marker."""
        start = text.rfind("[")
        if start < 0 or not self._is_beginning(text[start + 1 :]):
            return 1 if text.endswith(" ") else 0
        if start > 0 and text[start - 1] == " ":
            start -= 1
        return len(text) - start

    def _is_beginning(self, inner: str) -> bool:
        *whole, last = inner.split(",")
        if len(whole) >= _MOST_IDS:
            return False
        if whole:
            last = last.removeprefix(" ")
            whole = [whole[0], *(part.removeprefix(" ") for part in whole[1:])]
        return all(part in self._ids for part in whole) and any(id_.startswith(last) for id_ in self._ids)


def read(text: str, ids: Iterable[str]) -> tuple[str, list[Citation]]:
    """Return a whole text without its markers, and where they stood."""
    reader = CitationReader(ids)
    clean, citations = reader.feed(text)
    return clean + reader.end(), citations
