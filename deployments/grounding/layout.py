"""How passages are laid into a conversation. Pure: it knows neither retrieval nor any engine.

The small model in `models/groundling` was trained on exactly these bytes: to change them, other than the choice of
ids and what becomes of special tokens in documents, is to train it again.

A prompt that shares its beginning with another one shares its KV cache too. So what comes first never changes: first
the constant instructions, then the history as it was, and only in the last user message the passages, then the
question. Passages stand in the order of their documents, not of their scores, and each looks the same after the same
others.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]

REFUSAL = "I cannot find that in the passages."
"""What a model that follows the instructions answers when the passages hold no answer."""

INSTRUCTIONS = (
    "Answer the question from the passages, in their own words. "
    "After each statement, cite its passage: write the id in square brackets. "
    f"If the passages hold no answer, say: {REFUSAL}"
)
NO_PASSAGES = "There are no passages."

MARKER = re.compile(r"\[([a-z][0-9][a-z][0-9])\]")
"""A citation as the model writes it, `[k3f9]`; the group is the passage's id."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_ID_ALPHABETS = (_LETTERS, _DIGITS, _LETTERS, _DIGITS)  # one token a character where digits stand alone

_TAG = r"(?i:<(?=\s*/?\s*passage\b|\|))"
_FRAME = '<passage id="" source="">\n\n</passage>\n'
_WORDS_OR_BLANKS = re.compile(r"[\w\s]*")
_NOT_IN_A_SOURCE = re.compile(r'["<>\x00-\x1f\x7f\u0085\u2028\u2029]+')


@dataclass(frozen=True)
class Passage:
    """A chunk of a document as retrieved: `position` is its place in the file, a higher `score` is better."""

    file_id: str
    filename: str
    position: int
    text: str
    score: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A conversation with its passages laid in, and which passage each id in it means."""

    messages: list[dict[str, Any]]
    ids: Mapping[str, Passage]


def escaper(special_tokens: Iterable[str] = ()) -> Callable[[str], str]:
    """Return what breaks up the tags of a passage, and a model's special tokens, wherever a text has them.

    A tokenizer finds those in any text: a document could end the user's turn with one and speak as somebody else.
    What the layout is made of itself stays, for it means nothing without a tag, and so do words and blanks that were
    added to a vocabulary.
    """
    rests: dict[str, list[str]] = {}
    for token in sorted({token.strip() for token in special_tokens}):
        if len(token) > 1 and token not in _FRAME and not _WORDS_OR_BLANKS.fullmatch(token):
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
    alternatives = (f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
    begins = re.compile("|".join([_TAG, *alternatives]))
    return lambda text: begins.sub(lambda found: "&lt;" if found[0] == "<" else f"&#{ord(found[0])};", text)


escape_tags = escaper()


def lay_out(
    messages: Sequence[Message],
    passages: Sequence[Passage],
    budget_tokens: int,
    count_tokens: Callable[[str], int],
    escape: Callable[[str], str] = escape_tags,
) -> Layout:
    """Lay passages into a conversation.

    Args:
        messages: As in OpenAI's chat API. System messages at the beginning follow the instructions; all others stay
            as they are, but for the last one of the user.
        passages: Those found, in any order. The same chunk twice counts once, with its better score.
        budget_tokens: For the passages as rendered. Whole passages are left out: the best ones are taken as they fit.
        count_tokens: Counts the tokens of a text.
        escape: Breaks up what no document may say to this model; see `escaper`.

    Returns:
        New messages; `messages` itself is not changed.

    Raises:
        ValueError: No message is the user's.
    """
    question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if question is None:
        raise ValueError("a grounded conversation needs a message of the user")
    kept = _within_budget(
        passages, budget_tokens, lambda each: count_tokens(render_passage(passage_id(each), each, escape) + "\n")
    )
    ids = _ids(kept)
    block = "\n".join(render_passage(id_, passage, escape) for id_, passage in ids.items()) or NO_PASSAGES

    systems = 0
    while messages[systems]["role"] in ("system", "developer"):
        systems += 1
    instructions = "\n\n".join([INSTRUCTIONS, *(_text(message["content"]) for message in messages[:systems])])
    laid_out = [{"role": "system", "content": instructions}, *(dict(message) for message in messages[systems:])]
    asked = laid_out[question - systems + 1]
    asked["content"] = _prepend(f"{block}\n\n", asked["content"])
    return Layout(laid_out, ids)


def render_passage(id_: str, passage: Passage, escape: Callable[[str], str] = escape_tags) -> str:
    """Return the passage as the model sees it. Nothing in it can end it early or pass for another one."""
    source = escape(_NOT_IN_A_SOURCE.sub(" ", passage.filename).strip())
    text = escape(passage.text.strip())
    return f'<passage id="{id_}" source="{source}">\n{text}\n</passage>'


def passage_id(passage: Passage, attempt: int = 0) -> str:
    """Return a short id that follows from the passage alone: letter, digit, letter, digit.

    Args:
        passage: Its file, position and text count, its score does not.
        attempt: Gives another id where those before cannot be had.
    """
    content = "\0".join((passage.file_id, str(passage.position), passage.text, str(attempt)))
    number = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")
    characters = []
    for alphabet in _ID_ALPHABETS:
        number, index = divmod(number, len(alphabet))
        characters.append(alphabet[index])
    return "".join(characters)


def _within_budget(passages: Sequence[Passage], budget_tokens: int, cost_of: Callable[[Passage], int]) -> list[Passage]:
    """Return the passages that are taken, in the order of their documents."""
    best_first = sorted(passages, key=lambda passage: (-passage.score, _place(passage)))
    chosen: dict[tuple[str, int, str], Passage] = {}
    left = budget_tokens
    for passage in best_first:
        if _place(passage) in chosen:
            continue
        cost = cost_of(passage)
        if cost <= left:
            chosen[_place(passage)] = passage
            left -= cost
    return sorted(chosen.values(), key=_place)


def _place(passage: Passage) -> tuple[str, int, str]:
    return passage.file_id, passage.position, passage.text


def _ids(passages: Sequence[Passage]) -> dict[str, Passage]:
    """Name the passages. The first 26 ids begin with different letters: a small model copies them letter by letter.

    Only the passages before it have a say in an id, so prompts that begin with the same passages begin with the same
    bytes.
    """
    ids: dict[str, Passage] = {}
    free = set(_LETTERS)
    for passage in passages:
        tried = (passage_id(passage, attempt) for attempt in itertools.count())
        id_ = next(each for each in tried if each not in ids and (each[0] in free or not free))
        free.discard(id_[0])
        ids[id_] = passage
    return ids


def _text(content: object) -> str:
    """Return a message's text; parts are joined as vLLM joins them for templates that take strings."""
    if isinstance(content, str):
        return content
    assert isinstance(content, list)
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _prepend(text: str, content: object) -> str | list[dict[str, Any]]:
    if isinstance(content, list) and any(part.get("type") != "text" for part in content):
        return [{"type": "text", "text": text}, *content]
    return text + _text(content)
