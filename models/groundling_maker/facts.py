"""Statements of facts and the questions that ask for them, as templates.

`{e}` is an entity, `{a}` an attribute, `{v}` a value. A template that begins with `!` is kept for the evaluation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from models.groundling_maker.words import COLOURS, MATERIALS, ORGANISATIONS, Words

RELATIONS_SHARE = 0.45  # of the worlds: relations, not attributes
VERB_SHARE = 0.65  # of the relations: made of a verb
LOOSE_SHARE = 0.15  # of the attributes' facts: words of prose around entity, attribute and value
OPENING_SHARE, ENDING_SHARE = 0.35, 0.25  # of the other statements
ALIKE_SHARE, MOST_ALIKE = 0.5, 3  # of the worlds: all in a few bare wordings, so that many sentences begin alike

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
In the end {e} got {v} for a {a}.
{e} and its {a}: {v}.
Ask {e} about the {a} and you will hear {v}.
We measured the {a} of {e}: {v}.
The {a} ({v}) is all that {e} shows.
{v}, that is the {a} of {e}.
{e} comes with {v} for its {a}.
{e} comes with the {a} {v}.
Whoever needs {e} must know its {a}, {v}.
{n} gave {e} the {a} {v}.
{n} wrote down {v} for {e} under {a}.
Under {a}, {e} shows {v}.
Only {e} uses {v} as {a}.
No other place than {e} has a {a} of {v}.
A {a} of {v} is what makes {e} special.
Nothing but {v} works as the {a} of {e}.
{v} became the {a} of {e} in {y}.
{v} remains the {a} for {e}.
{v}: {a} of {e}
{a} = {v} ({e})
{a}: {v} [{e}]
{e}: {v} is the {a}, see {n}.
{e} / {a} / {v}
* {a} of {e} -> {v}
{e}, whose {a} is {v}, was seen in {n}.
{e} with the {a} {v} belongs to {n}.
Because of its {a}, {v}, {e} was moved to {n}.
If the {a} of {e} is not {v}, call {n}.
You need {v} when {e} asks for the {a}.
To change the {a} of {e} from {v}, write to {n}.
The {a} that {e} needs is {v}.
The present {a} of {e}, {v}, is older than {n}.
Its {a} is {v}, which {e} has kept since {y}.
There is a {a} of {v} at {e}.
There, {e} still shows {v} as {a}.
Our {a} for {e} reads {v}.
Write {v} where {e} wants a {a}.
Take {v} as {a} when you are at {e}.
Use {v} for the {a} of {e} and tell {n}.
People at {e} call {v} their {a}.
Every {a} of {e} is {v}.
This {a}, {v}, was made for {e}.
At {e} they call the {a} {v}.
From {y} to today the {a} at {e} was {v}.
How {e} came to {v} as its {a} is a long story.
What {e} has for a {a} is {v}.
One reads {v} as the {a} on {e}.
Between us, the {a} of {e} is {v}.
Before {y} nobody knew that {e} had {v} as {a}.
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
{e}: {a}?
{e}, which {a}?
And the {a} of {e}?
Who knows the {a} of {e}?
Where do I find the {a} of {e}?
Remind me of {e}'s {a}
Show the {a} of {e}
Name the {a} that {e} uses.
Look for the {a} at {e}.
About {e}: what's the {a}?
In {e}, what is used as {a}?
Has {e} got a {a}?
Is there a {a} for {e}?
Quote the sentence on the {a} of {e}.
I forgot {e}'s {a}, what was it?
We need to know {e}'s {a}.
My question is about {e} and its {a}.
What do I enter when {e} asks for the {a}?
Under which {a} does {e} run?
what {a} is it for {e}
{a} for {e} please
the {a} of {e}
Any idea what {a} {e} uses?
How do they call the {a} of {e}?
!Can you find out which {a} {e} has?
!I would like to know the {a} of {e}.
!What was given as the {a} for {e}?""".split("\n")

# What may stand before a statement, and after it in the place of its full stop.
OPENINGS = """As everyone can see, |By now, |Officially, |On paper, |For the time being, |From {y} on, |As {n} wrote, |
{n} told us that |{n} thinks that |They say that |It seems that |It turned out that |We found that |Please note that |
Remember that |Be aware that |Reminder: |Important: |NB: |Fact: |{n}: |Update of {y}: |Since the fire of {y}, |
After the last change, |During the visit of {n}, |Even in {n}, people know that |Thanks to {n}, |Unlike others, |
Strange but true, |Contrary to what {n} said, |Last week we learned that |Once again, |Today |Still, |And |But |So |
Besides, |(1) |2. |a) |Q3: |Step 4: |See {n}: |Chapter {y}: |In short, |To be exact, |Here |Also, |Then |Now |Perhaps |
Under the rules of {y}, |With the help of {n}, """.replace("\n", "").split("|")
ENDINGS = """, says {n}.|, if the notes are right.| as of {y}.|, as before.|, see {n}.| (see {n}).| (since {y}).|!|;|
, and {n} agrees.|, but this may change.|, although {n} wanted something else.| until {y}.|, which is rare.|
, as you know.|, which surprised {n}.| for now.|, at least in {n}.|, more or less.|, or so they say.
""".replace("\n", "").split("|")

# Verbs as base, third person, past and participle; statements and questions are made of them below.
VERBS = """
build builds built built|buy buys bought bought|sell sells sold sold|open opens opened opened|
close closes closed closed|carry carries carried carried|send sends sent sent|bring brings brought brought|
clean cleans cleaned cleaned|paint paints painted painted|draw draws drew drawn|write writes wrote written|
read reads read read|check checks checked checked|test tests tested tested|measure measures measured measured|
count counts counted counted|store stores stored stored|keep keeps kept kept|hide hides hid hidden|
move moves moved moved|lift lifts lifted lifted|push pushes pushed pushed|pull pulls pulled pulled|
drive drives drove driven|ride rides rode ridden|fly flies flew flown|sail sails sailed sailed|
follow follows followed followed|guard guards guarded guarded|watch watches watched watched|
call calls called called|visit visits visited visited|meet meets met met|invite invites invited invited|
choose chooses chose chosen|prefer prefers preferred preferred|avoid avoids avoided avoided|
collect collects collected collected|gather gathers gathered gathered|catch catches caught caught|
cook cooks cooked cooked|eat eats ate eaten|drink drinks drank drunk|grow grows grew grown|plant plants planted planted|
feed feeds fed fed|wash washes washed washed|wear wears wore worn|sew sews sewed sewn|cut cuts cut cut|
break breaks broke broken|mend mends mended mended|fix fixes fixed fixed|replace replaces replaced replaced|
rent rents rented rented|lend lends lent lent|borrow borrows borrowed borrowed|steal steals stole stolen|
return returns returned returned|pay pays paid paid|earn earns earned earned|spend spends spent spent|
win wins won won|lose loses lost lost|find finds found found|seek seeks sought sought|
plan plans planned planned|start starts started started|stop stops stopped stopped|finish finishes finished finished|
cancel cancels cancelled cancelled|delay delays delayed delayed|manage manages managed managed|
direct directs directed directed|lead leads led led|support supports supported supported|fund funds funded funded|
film films filmed filmed|record records recorded recorded|sing sings sang sung|play plays played played|
publish publishes published published|print prints printed printed|copy copies copied copied|
translate translates translated translated|review reviews reviewed reviewed|approve approves approved approved|
reject rejects rejected rejected|report reports reported reported|describe describes described described|
mention mentions mentioned mentioned|install installs installed installed|configure configures configured configured|
deploy deploys deployed deployed|update updates updated updated|restart restarts restarted restarted|
scan scans scanned scanned|load loads loaded loaded|download downloads downloaded downloaded|
encrypt encrypts encrypted encrypted|compress compresses compressed compressed|index indexes indexed indexed|
block blocks blocked blocked|remove removes removed removed|add adds added added|join joins joined joined|
burn burns burned burned|freeze freezes froze frozen|melt melts melted melted|bury buries buried buried|
discover discovers discovered discovered|observe observes observed observed|
train trains trained trained|hire hires hired hired|cure cures cured cured|rescue rescues rescued rescued|
praise praises praised praised|thank thanks thanked thanked|blame blames blamed blamed|trust trusts trusted trusted|
"""
_SIGNS = (", ", ", ", ": ", " - ", " ")
_WORD = re.compile(r"[A-Za-z]+|\d+")
_PLACES = "in near behind at outside under from above through into".split()
# Statements and questions of a verb (base `{0}`, third person `{1}`, past `{2}`, participle `{3}`, place `{p}`) and the
# kind of the value, as in `RELATIONS`.
VERB_RELATIONS = """
thing | {{e}} {2} {{v}}.; {{e}} {1} {{v}}.; {{v}} was {3} by {{e}}.; It was {{e}} who {2} {{v}}.; {{e}} has {3} {{v}} since {{y}}.; Only {{e}} {1} {{v}} these days.; {{e}} will {0} {{v}} in {{y}}. | What did {{e}} {0}?; What was {3} by {{e}}?; What has {{e}} {3}?; What does {{e}} {0}?; Which thing did {{e}} {0}?; Say what {{e}} {2}
person | {{v}} {2} {{e}}.; {{v}} {1} {{e}}.; {{e}} was {3} by {{v}}.; {{e}} had been {3} by {{v}}.; It is {{v}} who {1} {{e}}.; {{v}} has {3} {{e}} in {{n}}.; Both times {{v}} {2} {{e}}. | Who {2} {{e}}?; By whom was {{e}} {3}?; Who was it that {2} {{e}}?; Who {1} {{e}}?; Who has {3} {{e}}?; {{e}} was {3} by whom?
name | {{e}} was {3} {p} {{v}}.; They {2} {{e}} {p} {{v}}.; {p} {{v}}, {{e}} was {3}.; In {{y}} they {2} {{e}} {p} {{v}}.; {{n}} {2} {{e}} {p} {{v}}.; One can {0} {{e}} {p} {{v}}. | Where was {{e}} {3}?; Where did they {0} {{e}}?; {p} which town was {{e}} {3}?; Where can one {0} {{e}}?; Where has {{e}} been {3}?
date | {{e}} was {3} on {{v}}.; On {{v}} they {2} {{e}}.; {{n}} {2} {{e}} on {{v}}.; {{v}} is the day when {{e}} was {3}.; They want to {0} {{e}} on {{v}}. | When was {{e}} {3}?; On which day was {{e}} {3}?; When did they {0} {{e}}?; What is the day on which {{e}} was {3}?
amount | {{e}} {1} {{v}}.; {{e}} {2} {{v}} in {{y}}.; {{v}} were {3} by {{e}}.; {{e}} can {0} {{v}}.; With ease {{e}} {1} {{v}}. | How much does {{e}} {0}?; How much did {{e}} {0}?; How much can {{e}} {0}?; How much is {3} by {{e}}?
amount | To {0} {{e}} takes {{v}}.; It takes {{v}} to {0} {{e}}.; {{e}} can be {3} for {{v}}.; {{n}} asks {{v}} to {0} {{e}}. | How much does it take to {0} {{e}}?; What does it take to {0} {{e}}?; For how much can {{e}} be {3}?
"""  # noqa: E501

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


def _of_verb(rng: random.Random, entity: str) -> Relation:
    """Return a relation made of a verb."""
    kind, statements, questions = rng.choice(_VERB_RELATIONS).split(" | ")
    verb, place = rng.choice(_VERBS), rng.choice(_PLACES)

    def filled(templates: str) -> tuple[str, ...]:
        texts = (template.strip().format(*verb, p=place) for template in templates.split("; "))
        return tuple(text[0].upper() + text[1:] for text in texts)

    return Relation(filled(statements), filled(questions), entity, kind)


def _split(templates: list[str]) -> tuple[list[str], list[str]]:
    return [t for t in templates if t[0] != "!"], [t[1:] for t in templates if t[0] == "!"]


_SEEN_STATEMENTS, _UNSEEN_STATEMENTS = _split(STATEMENTS)
_SEEN_QUESTIONS, _UNSEEN_QUESTIONS = _split(QUESTIONS)
_VERBS = [tuple(verb.split()) for verb in VERBS.replace("\n", "").strip("|").split("|")]
_VERB_RELATIONS = VERB_RELATIONS.strip().split("\n")
_RELATIONS = [_parse(line) for line in RELATIONS.strip().split("\n")]


class FactWriter:
    """Writes facts that share entities and attributes, so that both must be read to tell them apart.

    `prose` gives sentences, whose pieces are put around facts, so that no wording can be relied upon.
    """

    def __init__(self, rng: random.Random, prose: Callable[[], str], *, unseen: bool = False) -> None:
        self.rng = rng
        self.prose = prose
        self.unseen = unseen
        self.words = Words(rng, unseen=unseen)
        self.statements = _UNSEEN_STATEMENTS if unseen else _SEEN_STATEMENTS
        self.questions = _UNSEEN_QUESTIONS if unseen else _SEEN_QUESTIONS
        self.relations = [relation for kept, relation in _RELATIONS if kept == unseen]
        self.bare = unseen  # whether this world's statements stand as they are, nothing around them
        self.worded = self.statements  # of those, what this world uses

    def world(self, count: int) -> tuple[list[Fact], list[tuple[str, ...]]]:
        """Return `count` facts, and questions that none of them answers though they share its words."""
        rng = self.rng
        if not self.unseen:
            self.bare = rng.random() < ALIKE_SHARE
            self.worded = rng.sample(self.statements, rng.randint(1, MOST_ALIKE)) if self.bare else self.statements
        if rng.random() < (RELATIONS_SHARE if not self.unseen else 0.35):
            kind = rng.choice(("org", "thing", "person"))
            relations = [relation for relation in self.relations if relation.entity == kind]
            relations = relations or self.relations
            chosen = rng.sample(relations, min(len(relations), rng.randint(1, 3)))
            if not self.unseen:
                chosen = [_of_verb(rng, kind) if rng.random() < VERB_SHARE else each for each in chosen]
                if self.bare:
                    chosen = [replace(each, statements=(rng.choice(each.statements),)) for each in chosen]
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
        if not self.bare and self.rng.random() < LOOSE_SHARE:
            questions = (*questions[:2], self._fill(self._loose(["{e}", "{a}"], "?"), entity, attribute, value))
            statement = self._loose(["{e}", "{a}", "{v}"], ".")
        else:
            statement = self._in_context(self.rng.choice(self.worded))
        sentence = self._fill(statement, entity, attribute, value)
        return Fact(entity, attribute, value, sentence, questions)

    def _related(self, entity: str, relation: Relation) -> Fact:
        value = self._of_kind(relation.value)
        sentence = self._fill(self._in_context(self.rng.choice(relation.statements)), entity, "", value)
        questions = tuple(self._fill(question, entity, "", value) for question in relation.questions)
        return Fact(entity, relation.questions[0], value, sentence, questions)

    def _in_context(self, statement: str) -> str:
        """Return the statement's template, sometimes with something before it or after it."""
        rng = self.rng
        if self.bare:
            return statement
        if rng.random() < OPENING_SHARE:
            opening = (
                rng.choice(OPENINGS) if rng.random() < 0.6 else self._piece(1, 4).capitalize() + rng.choice(_SIGNS)
            )
            if opening[-2:] in (", ", "t ") and statement[0].isupper():
                statement = statement[0].lower() + statement[1:]
            statement = opening + statement
        if statement[-1] == "." and rng.random() < ENDING_SHARE:
            ending = rng.choice(ENDINGS) if rng.random() < 0.6 else f"{rng.choice(_SIGNS)}{self._piece(1, 5)}."
            statement = statement[:-1] + ending
        return statement

    def _loose(self, slots: list[str], end: str) -> str:
        """Return a template whose slots stand in any order among pieces of prose."""
        self.rng.shuffle(slots)
        parts = [f"{self._piece(0, 3)} {slot}" for slot in slots]
        text = " ".join(" ".join([*parts, self._piece(0, 3)]).split())
        return text[0].upper() + text[1:] + end

    def _piece(self, fewest: int, most: int) -> str:
        """Return some words of prose in a row."""
        words = _WORD.findall(self.prose())
        count = self.rng.randint(fewest, most)
        start = self.rng.randrange(max(1, len(words) - count + 1))
        return " ".join(words[start : start + count]) or ("it" if fewest else "")

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
