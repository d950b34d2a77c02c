"""Conversations to learn from, in the exact layout of grounded prompts.

The one skill: find the sentence that answers, quote it, cite its passage; say so when there is none.
"""

from __future__ import annotations

import itertools
import random
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.grounding.layout import REFUSAL, Passage, lay_out
from models.groundling_maker.facts import FactWriter
from models.groundling_maker.tokenizer import ASSISTANT, END, SYSTEM, USER
from models.groundling_maker.words import ADJECTIVES, THINGS, Words

GREETING = (
    "Hello! I am Groundling, a very small model. Give me passages and a question, "
    "and I quote the sentence that answers it."
)
NEEDS_PASSAGES = "I only answer from passages, and there are none in this conversation."

GREETINGS = """Hello!|Hello|Hi|Hi!|hi there|Hey|hello|Good morning!|Good evening|Hi, how are you?|How are you?|
Who are you?|What are you?|What can you do?|Hello, who are you?|Introduce yourself.|Say hello.|Hello there|Hey!|
What is your name?|Thanks!|Thank you|Bye|Good night|Welcome!|hello world|Hello, world!|
Hi Groundling""".replace("\n", "").split("|")
DEMANDS = """Tell me a joke.|Write a poem about the sea.|Count to ten.|Explain what a cache is.|
Summarise the news.|What is the weather like?|Write a function that sorts a list.|Translate this into French.|
Tell me a story.|How do I cook rice?|What is two plus two?|Give me some advice.|Why is the sky blue?|
Write a long story about a storm.|Name three colours.|Continue the text.|Help me with my homework.|
What day is it?""".replace("\n", "").split("|")
SYSTEM_PROMPTS = """You are a helpful assistant.|Be brief.|Answer in English.|You help the customers of a shop.|
You are a careful librarian. Be polite.|Use plain words and keep to the facts.""".replace("\n", "").split("|")

_WORD = re.compile(r"[A-Za-z][A-Za-z_'-]*[A-Za-z]|\d+")
_COMMON = set(
    """the a an of to in is are be it its and or for with on by as at from this that these those if when which who what
    was were will can may not no has have had do does but than then there their they you your we our one all any each
    into only also such so how where about used use using must should would could other same more most some""".split()
)
_ASKING = """What does it say about {k}?|What about {k}?|{k}?|{k}|Tell me about {k}.|Explain {k}.|What is {k}?|
What are {k}?|How does {k} work?|What is said about {k}?|When does {k} happen?|Where is {k}?|
Is there anything on {k}?|Why {k}?|How do I {k}?|What happens with {k}?|Which {k}?|How {k}?|What {k}?|Who {k}?|
Where {k}?|When {k}?|Does {k}?|Can {k}?""".replace("\n", "").split("|")
_UNSEEN_ASKING = "What is known about {k}?|I want to know about {k}.|Find {k}.".split("|")


@dataclass(frozen=True)
class Level:
    """How hard conversations are: ranges are inclusive."""

    passages: tuple[int, int]
    sentences: tuple[int, int]
    questions: tuple[int, int] = (1, 1)
    unanswerable: float = 0.2
    prose: float = 0.35
    nonsense: float = 0.1


@dataclass(frozen=True)
class Turn:
    """A question, the sentence that answers it and where that stands; neither when nothing does."""

    question: str
    sentence: str | None = None
    passage: int | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages as laid out, ending with the user's, and the answer; then more turns over the same passages."""

    messages: list[dict[str, Any]]
    answer: str
    more: list[tuple[str, str]] = field(default_factory=list)
    value: str | None = None
    kind: str = ""


class Writer:
    """Writes conversations. `unseen` uses the names, kinds of values, wordings and documents kept for evaluation."""

    def __init__(self, rng: random.Random, documents: Sequence[list[str]], *, unseen: bool = False) -> None:
        self.rng = rng
        self.unseen = unseen
        self.words = Words(rng, unseen=unseen)
        self.facts = FactWriter(rng, self._filler, unseen=unseen)
        self.documents = [document for i, document in enumerate(documents) if (i % 20 == 0) == unseen]

    def write(self, level: Level) -> Conversation:
        """Return a conversation about passages."""
        rng = self.rng
        draw = rng.random()
        count = rng.randint(*level.passages)
        lengths = [rng.randint(*level.sentences) for _ in range(count)]
        asked = rng.randint(*level.questions)
        if draw < level.prose:
            passages, turns = self._prose(lengths, asked, level)
        elif draw < level.prose + level.nonsense:
            passages, turns = self._nonsense(lengths, asked, level)
        else:
            passages, turns = self._about_facts(lengths, asked, level)
        return self._laid_out(passages, turns)

    def small_talk(self) -> Conversation:
        """Return a conversation without passages, and the one honest answer to it."""
        rng = self.rng
        draw = rng.random()
        system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.3 else []
        if draw < 0.4:
            return Conversation([*system, {"role": "user", "content": rng.choice(GREETINGS)}], GREETING)
        question = rng.choice(DEMANDS) if rng.random() < 0.4 else self._any_question()
        if draw < 0.7:
            return Conversation([*system, {"role": "user", "content": question}], NEEDS_PASSAGES)
        layout = lay_out([*system, {"role": "user", "content": question}], [], 0, len)
        return Conversation(layout.messages, REFUSAL)

    def _about_facts(self, lengths: list[int], asked: int, level: Level) -> tuple[list[list[str]], list[Turn]]:
        rng = self.rng
        slots = [(p, s) for p, length in enumerate(lengths) for s in range(length)]
        rng.shuffle(slots)
        share = rng.choice((1.0, 0.7, 0.4))
        count = max(asked, min(len(slots), round(share * len(slots))), 1)
        count = min(count, len(slots))
        facts, unanswered = self.facts.world(count)
        passages = [[""] * length for length in lengths]
        for (p, s), fact in zip(slots, facts, strict=False):
            passages[p][s] = fact.sentence
        for p, s in slots[count:]:
            passages[p][s] = self._filler()
        turns = []
        targets = [(p, s, fact) for (p, s), fact in zip(slots, facts, strict=False)]
        rng.shuffle(targets)
        for p, _, fact in itertools.islice(itertools.cycle(targets), asked):
            if rng.random() < level.unanswerable:
                questions = rng.choice(unanswered) if rng.random() < 0.8 else (self._any_question(),)
                turns.append(Turn(rng.choice(questions)))
            else:
                turns.append(Turn(rng.choice(fact.questions), fact.sentence, p))
        return passages, turns

    def _prose(self, lengths: list[int], asked: int, level: Level) -> tuple[list[list[str]], list[Turn]]:
        rng = self.rng
        same = rng.choice(self.documents) if rng.random() < 0.5 else None
        passages = []
        for length in lengths:
            document = same or rng.choice(self.documents)
            start = rng.randrange(max(1, len(document) - length))
            passages.append(document[start : start + length])
        seen: dict[str, None] = {}
        passages = [[s for s in passage if not (s in seen or seen.update({s: None}))] for passage in passages]
        passages = [passage for passage in passages if passage] or [[self._filler()]]
        return passages, self._keyword_turns(passages, asked, level)

    def _nonsense(self, lengths: list[int], asked: int, level: Level) -> tuple[list[list[str]], list[Turn]]:
        rng = self.rng
        words = [self.words.name().lower() for _ in range(12)] + rng.sample(THINGS, 8) + rng.sample(ADJECTIVES, 8)

        def sentence() -> str:
            return " ".join(rng.sample(words, rng.randint(4, 8))).capitalize() + "."

        passages = [[sentence() for _ in range(length)] for length in lengths]
        return passages, self._keyword_turns(passages, asked, level)

    def _keyword_turns(self, passages: list[list[str]], asked: int, level: Level) -> list[Turn]:
        """Ask for sentences by words that no other sentence here has together."""
        rng = self.rng
        everything = [(p, sentence) for p, passage in enumerate(passages) for sentence in passage]
        bags = [_bag(sentence) for _, sentence in everything]
        here = set().union(*bags)
        turns: list[Turn] = []
        for _ in range(asked * 8):
            if len(turns) == asked:
                break
            if rng.random() < level.unanswerable:
                keywords = self._keywords(self._filler())
                missing = [w for w in _bag(keywords) - _COMMON if w not in here]
                if keywords and len(missing) >= max(1, len(_bag(keywords) - _COMMON) * 0.6):
                    turns.append(Turn(self._asking(keywords)))
                continue
            p, sentence = rng.choice(everything)
            keywords = self._keywords(sentence)
            wanted = _bag(keywords) - _COMMON
            if (
                wanted
                and sum(wanted <= bag for bag in bags) == 1
                and (len(turns) >= len(everything) or all(t.sentence != sentence for t in turns))
            ):
                turns.append(Turn(self._asking(keywords), sentence, p))
        return turns or [Turn(self._any_question())]

    def _keywords(self, sentence: str) -> str:
        """Return words of the sentence: a phrase, or what is left when some are dropped."""
        rng = self.rng
        words = [match.group() for match in _WORD.finditer(sentence)]
        if len(words) < 2:
            return ""
        if rng.random() < 0.5:
            size = rng.randint(2, 6)
            start = rng.randrange(max(1, len(words) - size + 1))
            chosen = words[start : start + size]
        else:
            content = [word for word in words if word.lower() not in _COMMON]
            keep = set(rng.sample(range(len(content)), min(len(content), rng.randint(1, 4))))
            chosen = [word for i, word in enumerate(content) if i in keep]
            if rng.random() < 0.2:
                rng.shuffle(chosen)
        if chosen and chosen[0] == words[0] and rng.random() < 0.7:
            chosen[0] = chosen[0].lower()
        return " ".join(chosen)

    def _asking(self, keywords: str) -> str:
        rng = self.rng
        words = keywords.split()
        if rng.random() < 0.15:  # people inflect words
            i = rng.randrange(len(words))
            words[i] = words[i][:-1] if words[i].endswith("s") else words[i] + "s"
        template = rng.choice(_UNSEEN_ASKING if self.unseen else _ASKING)
        text = template.format(k=" ".join(words))
        return text[0].upper() + text[1:] if rng.random() < 0.8 else text

    def _any_question(self) -> str:
        if self.rng.random() < 0.5:
            return self.rng.choice(self.facts.world(1)[0][0].questions)
        return self._asking(self._keywords(self._filler()) or "this")

    def _filler(self) -> str:
        return self.rng.choice(self.rng.choice(self.documents))

    def _laid_out(self, sentences: list[list[str]], turns: list[Turn]) -> Conversation:
        rng = self.rng
        files = [f"file-{rng.getrandbits(32):08x}" for _ in range(rng.randint(1, len(sentences)))]
        names = {file: self._file_name() for file in files}
        passages = []
        for position, passage in enumerate(sentences):
            file = rng.choice(files)
            passages.append(Passage(file, names[file], position, self._join(passage)))
        system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.1 else []
        history = []
        while rng.random() < 0.08:
            fact = self.facts.world(1)[0][0]
            history += [
                {"role": "user", "content": rng.choice(fact.questions)},
                {"role": "assistant", "content": rng.choice((fact.sentence, REFUSAL))},
            ]
        first = turns[0].question
        layout = lay_out([*system, *history, {"role": "user", "content": first}], passages, 1 << 30, len)
        ids = {id(passage): marker for marker, passage in layout.ids.items()}

        def answer(turn: Turn) -> str:
            if turn.sentence is None or turn.passage is None:
                return REFUSAL
            passage = passages[turn.passage]
            quoted = re.search(r"\s+".join(map(re.escape, turn.sentence.split())), passage.text)
            assert quoted, (turn.sentence, passage.text)
            return f"{quoted.group()} [{ids[id(passage)]}]"

        messages = layout.messages
        if rng.random() < 0.1:  # as with the chat template's `documents`, which knows no instructions
            messages = [*system, *messages[1:]]
        return Conversation(messages, answer(turns[0]), [(turn.question, answer(turn)) for turn in turns[1:]])

    def _join(self, sentences: list[str]) -> str:
        rng = self.rng
        separator = rng.choice((" ", " ", " ", "\n", "\n\n"))
        text = sentences[0]
        for before, sentence in itertools.pairwise(sentences):
            a_line = before[-1] not in ".!?" or sentence[0] in "-|"
            text += ("\n" if a_line and separator == " " else separator) + sentence
        if rng.random() < 0.15:
            text = textwrap.fill(
                text, rng.randint(50, 120), replace_whitespace=False, break_long_words=False, break_on_hyphens=False
            )
        if rng.random() < 0.12:
            heading = " ".join(rng.sample(THINGS + ADJECTIVES, rng.randint(1, 3))).capitalize()
            text = f"{'#' * rng.randint(1, 3)} {heading}\n\n{text}"
        return text

    def _file_name(self) -> str:
        rng = self.rng
        stem = rng.choice((self.words.name().lower(), rng.choice(THINGS), f"{rng.choice(THINGS)}-{rng.randint(1, 99)}"))
        return f"{stem}.{rng.choice(('md', 'txt', 'pdf', 'html'))}"


def segments(conversation: Conversation) -> list[tuple[str, bool]]:
    """Return the conversation's text in pieces, and whether each is one the model has to say."""
    tags = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    pieces = [(f"{tags[message['role']]}{message['content']}{END}", False) for message in conversation.messages]
    pieces += [(ASSISTANT, False), (f"{conversation.answer}{END}", True)]
    for question, answer in conversation.more:
        pieces += [(f"{USER}{question}{END}{ASSISTANT}", False), (f"{answer}{END}", True)]
    return pieces


def _bag(text: str) -> set[str]:
    return {match.group().lower() for match in _WORD.finditer(text)}
