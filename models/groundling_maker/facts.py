"""Statements of facts and the questions that ask for them, as templates.

`{e}` is an entity, `{a}` an attribute, `{v}` a value. A template that begins with `!` is kept for the evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from models.groundling_maker.words import COLOURS, MATERIALS, ORGANISATIONS, Words

STATEMENTS = """The {a} of {e} is {v}.
The {a} of {e} is {v}.
{e} has a {a} of {v}.
For {e}, the {a} is {v}.
The {a} at {e} was set to {v}.
{v} is the {a} of {e}.
{e} lists {v} as its {a}.
The records give {v} as the {a} of {e}.
As for the {a}, {e} has {v}.
Everyone knows that the {a} of {e} is {v}.
Since {y}, the {a} of {e} has been {v}.
{e} changed its {a} to {v} in {y}.
{e} ({a}: {v}) is mentioned twice in the notes.
{e}'s {a} is {v}.
{e}'s {a} is {v}, and nobody wants to change it.
With {v} as its {a}, {e} is well known in {n}.
When you visit {e}, remember that the {a} is {v}.
The {a} is {v} for {e}.
{e} uses {v} for the {a}.
{a} of {e}: {v}
- {e}: {a} {v}
{e}, {a} = {v}
| {e} | {a} | {v} |
Note: {e} needs {v} as {a}.
Set the {a} of {e} to {v}.
Until further notice {e} keeps {v} as the {a}.
!According to {n}, {e} has {v} as its {a}.
!The {a} which {e} was given is {v}.
!It was agreed that for {e} the {a} should be {v}.""".split("\n")

QUESTIONS = """What is the {a} of {e}?
What is the {a} of {e}?
what is the {a} of {e}
What's {e}'s {a}?
Which {a} does {e} have?
What {a} does {e} have?
Tell me the {a} of {e}.
{e} {a}?
{a} of {e}?
{a} {e}
Do you know the {a} of {e}?
For {e}, what is the {a}?
I need the {a} of {e}.
Please give me {e}'s {a}.
What should the {a} of {e} be?
Could you look up the {a} of {e}?
What do the documents say about the {a} of {e}?
How is the {a} of {e} set?
!Can you find out which {a} {e} has?
!I would like to know the {a} of {e}.
!What was given as the {a} for {e}?""".split("\n")

# Relations that people put in other words than "the x of y": statements, questions, the kind of entity and of value.
RELATIONS = """
org person | {e} was founded by {v}.; Long ago, {v} founded {e}.; {v} is the founder of {e}. | Who founded {e}?; Who is the founder of {e}?; {e} was founded by whom?
org year | {e} was founded in {v}.; In {v}, {e} was founded in a barn.; {e} has existed since it was founded in {v}. | When was {e} founded?; In which year was {e} founded?; Since when does {e} exist?
thing amount | {e} weighs {v}.; The weight of {e} is {v}.; Together with its case, {e} weighs {v}. | How much does {e} weigh?; What does {e} weigh?; How heavy is {e}?
thing amount | {e} costs {v}.; You can buy {e} for {v}.; The price of {e} is {v}. | How much does {e} cost?; What does {e} cost?; What is the price of {e}?
thing amount | {e} is {v} tall.; With {v}, {e} is as tall as a house.; The height of {e} is {v}. | How tall is {e}?; What is the height of {e}?; How high is {e}?
org time | {e} opens at {v}.; Every morning {e} opens its doors at {v}.; The doors of {e} open at {v}. | When does {e} open?; At what time does {e} open?; How early does {e} open?
org time | {e} closes at {v}.; On most days {e} closes at {v}.; Nobody is left in {e} after it closes at {v}. | When does {e} close?; At what time does {e} close?; How late can I visit {e} before it closes?
person name | {e} lives in {v}.; {e} moved to {v} and lives there.; The home of {e} is in {v}. | Where does {e} live?; In which town does {e} live?; Where is the home of {e}?
person date | {e} was born on {v}.; {e} was born in {n} on {v}.; Born on {v}, {e} grew up in {n}. | When was {e} born?; What is the birthday of {e}?; On which day was {e} born?
person org | {e} works at {v}.; {e} has worked at {v} since {y}.; You will find {e} at work in {v}. | Where does {e} work?; Who employs {e}?; At which company does {e} work?
person person | {e} is married to {v}.; In {y}, {e} married {v}.; {v} is the spouse of {e}. | Who is {e} married to?; Whom did {e} marry?; Who is the spouse of {e}?
thing name | {e} was built in {v}.; {e} stands in {v}.; You can see {e} in {v}. | Where is {e}?; Where can I see {e}?; Where does {e} stand?
thing person | {e} was designed by {v}.; {v} designed {e} in {y}.; The design of {e} is by {v}. | Who designed {e}?; Who made the design of {e}?; Whose design is {e}?
thing person | {e} was painted by {v}.; {v} painted {e}.; It was {v} who painted {e}. | Who painted {e}?; Which painter painted {e}?; By whom was {e} painted?
thing person | {e} belongs to {v}.; {v} owns {e}.; The owner of {e} is {v}. | Who owns {e}?; To whom does {e} belong?; Who is the owner of {e}?
thing colour | {e} is painted {v}.; They painted {e} {v} in {y}.; The colour of {e} is {v}. | What colour is {e}?; In which colour is {e} painted?; What is the colour of {e}?
thing colour | {e} is made of {v}.; {e} was built of {v} in {y}.; The material of {e} is {v}. | What is {e} made of?; Which material is {e} made of?; Of what was {e} built?
thing number | {e} has {v} rooms.; There are {v} rooms in {e}.; {e} was built with {v} rooms. | How many rooms does {e} have?; How many rooms are there in {e}?; What is the number of rooms in {e}?
org number | {e} employs {v} people.; {v} people work for {e}.; {e} has {v} employees. | How many people work for {e}?; How many employees does {e} have?; How many people does {e} employ?
thing amount | {e} runs for {v}.; {e} stops after {v}.; After {v}, {e} stops by itself. | How long does {e} run?; When does {e} stop?; After how long does {e} stop?
thing number | {e} listens on port {v}.; The port of {e} is {v}.; Connect to {e} on port {v}. | On which port does {e} listen?; What is the port of {e}?; Which port does {e} use?
thing person | {e} was repaired by {v}.; {v} repaired {e} in {y}.; It took {v} a month to repair {e}. | Who repaired {e}?; Who was it that repaired {e}?; By whom was {e} repaired?
person thing | {e} lost {v}.; In {y}, {e} lost {v} in {n}.; {v} was lost by {e}. | What did {e} lose?; What was lost by {e}?; Which thing has {e} lost?
person thing | {e} found {v}.; Near {n}, {e} found {v}.; It was {e} who found {v}. | What did {e} find?; What has {e} found?; Which thing did {e} find?
person number | {e} scored {v} points.; With {v} points, {e} came first.; {e} won the game with {v} points. | How many points did {e} score?; How many points does {e} have?; With how many points did {e} win?
person thing | {e} invented {v}.; {v} was invented by {e}.; In {y}, {e} invented {v}. | What did {e} invent?; What was invented by {e}?; Which thing did {e} invent?
person time | {e} arrives at {v}.; We expect {e} to arrive at {v}.; The train brings {e} at {v}. | When does {e} arrive?; At what time do we expect {e}?; When will {e} be here?
!thing name | {e} was shipped to {v}.; {v} is where {e} was shipped.; They shipped {e} from {n} to {v}. | Where was {e} shipped?; To which town was {e} shipped?
!person name | {e} teaches in {v}.; In {v}, {e} teaches at the school.; {e} has been teaching in {v} since {y}. | Where does {e} teach?; In which town does {e} teach?
!thing amount | {e} holds {v}.; There is room for {v} in {e}.; Up to {v} fit into {e}. | How much does {e} hold?; How much fits into {e}?
"""  # noqa: E501


@dataclass(frozen=True)
class Relation:
    """A way to say something of an entity."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    entity: str
    value: str


@dataclass(frozen=True)
class Fact:
    """A sentence, and questions whose only answer it is."""

    entity: str
    attribute: str
    value: str
    sentence: str
    questions: tuple[str, ...]


def _parse(line: str) -> tuple[bool, Relation]:
    kinds, statements, questions = line.lstrip("!").split(" | ")
    entity, value = kinds.split()
    return line.startswith("!"), Relation(
        tuple(part.strip() for part in statements.split("; ")),
        tuple(part.strip() for part in questions.split("; ")),
        entity,
        value,
    )


def _split(templates: list[str]) -> tuple[list[str], list[str]]:
    return [t for t in templates if t[0] != "!"], [t[1:] for t in templates if t[0] == "!"]


_SEEN_STATEMENTS, _UNSEEN_STATEMENTS = _split(STATEMENTS)
_SEEN_QUESTIONS, _UNSEEN_QUESTIONS = _split(QUESTIONS)
_RELATIONS = [_parse(line) for line in RELATIONS.strip().split("\n")]


class FactWriter:
    """Writes facts that share entities and attributes, so that both must be read to tell them apart."""

    def __init__(self, rng: random.Random, *, unseen: bool = False) -> None:
        self.rng = rng
        self.unseen = unseen
        self.words = Words(rng, unseen=unseen)
        self.statements = _UNSEEN_STATEMENTS if unseen else _SEEN_STATEMENTS
        self.questions = _UNSEEN_QUESTIONS if unseen else _SEEN_QUESTIONS
        self.relations = [relation for kept, relation in _RELATIONS if kept == unseen]

    def world(self, count: int) -> tuple[list[Fact], list[tuple[str, ...]]]:
        """Return `count` facts, and questions that none of them answers though they share its words."""
        rng = self.rng
        if rng.random() < 0.35:
            kind = rng.choice(("org", "thing", "person"))
            relations = [relation for relation in self.relations if relation.entity == kind]
            relations = relations or self.relations
            chosen = rng.sample(relations, min(len(relations), rng.randint(1, 3)))
            entities = self._distinct(lambda: self._of_kind(chosen[0].entity), max(2, count))
            makers: list[Callable[[str], Fact]] = [lambda e, r=r: self._related(e, r) for r in chosen]  # type: ignore[misc]
        else:
            entities = self._distinct(self.words.entity, max(2, count))
            attributes = self._distinct(self.words.attribute, rng.randint(1, 4))
            makers = [lambda e, a=a: self._attributed(e, a) for a in attributes]  # type: ignore[misc]
        entities = entities[: max(1, min(len(entities), rng.randint(1, count + 1)))]
        cells = [(entity, make) for entity in entities for make in makers]
        rng.shuffle(cells)
        while len(cells) < count + 1:  # more of the same things
            extra = self.words.entity()
            if extra not in {entity for entity, _ in cells}:
                cells += [(extra, make) for make in makers]
        made = [make(entity) for entity, make in cells]
        return made[:count], [fact.questions for fact in made[count : count + 8]]

    def _attributed(self, entity: str, attribute: str) -> Fact:
        value = self.words.value()
        questions = tuple(self._fill(q, entity, attribute, value) for q in self.rng.sample(self.questions, 3))
        sentence = self._fill(self.rng.choice(self.statements), entity, attribute, value)
        return Fact(entity, attribute, value, sentence, questions)

    def _related(self, entity: str, relation: Relation) -> Fact:
        value = self._of_kind(relation.value)
        sentence = self._fill(self.rng.choice(relation.statements), entity, "", value)
        questions = tuple(self._fill(question, entity, "", value) for question in relation.questions)
        return Fact(entity, relation.questions[0], value, sentence, questions)

    def _fill(self, template: str, entity: str, attribute: str, value: str) -> str:
        text = template.format(e=entity, a=attribute, v=value, y=self.words.year(), n=self.words.name())
        if text[0].islower() and not template[0].islower():
            text = text[0].upper() + text[1:]
        return text

    def _of_kind(self, kind: str) -> str:
        words, rng = self.words, self.rng
        match kind:
            case "org":
                return words.entity() if rng.random() < 0.3 else f"{words.name()} {rng.choice(ORGANISATIONS)}"
            case "thing":
                return words.entity()
            case "colour":
                return rng.choice(COLOURS + MATERIALS)
            case _:
                return str(getattr(words, kind)())

    def _distinct(self, draw: Callable[[], str], count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[draw()] = None
        return list(found)
