"""Names and values to write facts with: random, so that they can only be copied."""

from __future__ import annotations

import random
from collections.abc import Callable

_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t th tr v w y z".split()
_VOWELS = "a e i o u a e i o ai ea ou".split()
_CODAS = " l m n r s t k nd rt x ck".split(" ")
# Syllables of the training set alone, that there be many of them.
_MORE_ONSETS = "sc sm sn kn wr ph gn rh ts zh vl fj zw dw mc schr str".split()
_MORE_VOWELS = "oo ee y ia oa au ei ie eo ua".split()
_MORE_CODAS = "ng st sk mp lt ft ss ll p g d b f lm rn ns".split()
# Syllables that no name of the training set has.
_UNSEEN_ONSETS = "bl cr gl sk sl sp sw tw wh".split()

COLOURS = "red blue green yellow white black grey brown orange purple pink silver golden".split()
MATERIALS = "copper oak glass steel cotton clay marble paper rubber wool bronze leather".split()
ADJECTIVES = """old new small large spare main northern southern inner outer upper lower second third daily
weekly public private quiet heavy light backup primary local remote central early late wooden narrow round
hidden empty open""".split()
THINGS = """server folder bridge garden station tower library harbour kitchen office archive lamp engine boat
garage door printer clock cabinet warehouse gate road museum school market factory pump cable battery router
database report project team ship train camera telescope mill farm hotel theatre chapel lighthouse tunnel
workshop greenhouse""".split()
ORGANISATIONS = """Tavern Tower Bakery Institute Society Club Hotel Press Museum Works Brothers Valley Bridge
Harbour Hall Laboratory College Railway Clinic Foundation Street Square Mill""".split()
PLACE_NOUNS = "valley island village lake river mountain castle district bay forest".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty ninety".split()
UNITS = """metres kilometres kilograms grams litres seconds minutes hours days weeks degrees volts watts bytes
tokens pages euros dollars crowns boxes people requests""".split()

# Attributes, and those that only the evaluation asks for.
ATTRIBUTES = """gate code, colour, height, weight, price, owner, serial number, password, address, opening time,
width, depth, length, age, capacity, speed, temperature, budget, phone extension, room number, deadline,
launch date, supplier, author, manager, architect, keeper, nickname, motto, version, default port, time limit,
batch size, timeout, retry count, log level, region, floor, shelf, postal code, entry fee, annual rent,
top speed, fuel, material, origin, inventor, patron, mascot, first owner, last inspection, next meeting,
license plate, wing, contact, account number, order number, checksum, file name, storage key, channel,
frequency, voltage, pressure, cover colour, page count, population, area, currency, successor, sponsor, guard,
repair cost, delivery day, warranty, queue length, memory limit, user name, home town""".replace("\n", " ").split(", ")
# Attributes are also made of two words, of which these are the first and the second.
_KINDS = """ticket water paper signal music winter summer cargo guest member night morning storage memory disk
network thread session request backup test target start end base edge cell light sound air ground ice salt sugar
coffee cotton grain stone glass safety travel union child staff army court church crew team user admin root
daily first last next best worst total mean highest lowest usual default secret common legal moral local global
front rear left right upper lower main spare junior senior deputy honorary""".split()
_MEASURES = """count limit rate level size code key name label type class path date day hour price cost tax fine rent
score rank grade weight width depth length range area volume load speed power pressure colour shape form sign seal
flag badge title rule order group league leader keeper officer clerk nurse judge pilot driver singer teacher partner
rival friend tool device part cover lid handle wheel lock wire pipe filter sensor screen button format protocol
interval window threshold quota budget balance share bonus reward prize song dish snack tree
flower animal bird stone""".split()
UNSEEN_ATTRIBUTES = """locker number, altitude, chief engineer, membership fee, closing date, scale, birthplace,
cache size, insurance number, favourite drink, tide level, restart delay, donor,
paint colour""".replace("\n", " ").split(", ")


class Words:
    """Draws names and values. `unseen` draws from what training never saw, where there is such a thing."""

    def __init__(self, rng: random.Random, *, unseen: bool = False) -> None:
        self.rng = rng
        self.unseen = unseen

    def name(self) -> str:
        """Return an invented name, such as `Mardon`."""
        rng = self.rng
        if not self.unseen and rng.random() < 0.4:
            return self._odd_name()
        onsets = _UNSEEN_ONSETS if self.unseen else _ONSETS
        count = rng.choices((1, 2, 3), (2, 6, 2))[0]
        syllables = [rng.choice(onsets) + rng.choice(_VOWELS) + rng.choice(_CODAS)]
        syllables += [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count - 1)]
        return "".join(syllables).capitalize()

    def _odd_name(self) -> str:
        """Return a name of rarer syllables."""
        rng = self.rng
        sounds = (_ONSETS + _MORE_ONSETS, _VOWELS + _MORE_VOWELS, _CODAS + _MORE_CODAS)
        count = rng.choices((1, 2, 3), (3, 5, 1))[0]
        return "".join(rng.choice(each) for _ in range(count) for each in sounds).capitalize()

    def person(self) -> str:
        """Return a name or two."""
        return self.name() if self.rng.random() < 0.3 else f"{self.name()} {self.name()}"

    def entity(self) -> str:
        """Return something that can have attributes."""
        rng = self.rng
        return rng.choice(
            (
                self.person,
                lambda: f"{self.name()} {rng.choice(ORGANISATIONS)}",
                lambda: f"the {self.name()} {rng.choice(ORGANISATIONS)}",
                lambda: f"the {rng.choice(ADJECTIVES)} {rng.choice(THINGS)}",
                lambda: f"the {rng.choice(COLOURS + MATERIALS)} {rng.choice(THINGS)}",
                lambda: f"the {rng.choice(PLACE_NOUNS)} of {self.name()}",
                lambda: f"the {rng.choice(THINGS)} in {self.name()}",
                lambda: f"{rng.choice(THINGS)} {rng.randint(2, 99)}",
                lambda: f"{rng.choice(('model', 'unit', 'room', 'product', 'order'))} {self.code()}",
                lambda: self.name(),
            )
        )()

    def attribute(self) -> str:
        """Return an attribute's name, sometimes with an adjective."""
        rng = self.rng
        if not self.unseen and rng.random() < 0.5:
            first = rng.choice((rng.choice(THINGS), rng.choice(_KINDS), rng.choice(_KINDS), self.name().lower()))
            return f"{first} {rng.choice(_MEASURES)}"
        attribute = rng.choice(UNSEEN_ATTRIBUTES if self.unseen else ATTRIBUTES)
        draw = rng.random()
        if draw < 0.2:
            return f"{rng.choice(ADJECTIVES)} {attribute}"
        if draw < 0.3:
            return f"{self.name().lower()} {attribute.split()[-1]}"
        return attribute

    def code(self) -> str:
        """Return letters and digits, such as `KX-41`."""
        rng = self.rng
        letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
        return f"{letters}{rng.choice(('', '-'))}{rng.randint(2, 999)}"

    def number(self) -> str:
        """Return a number of one to five digits."""
        return str(self.rng.randint(2, 10 ** self.rng.randint(1, 5)))

    def date(self) -> str:
        """Return a day, with or without a year."""
        rng = self.rng
        day = f"{rng.randint(1, 30)} {rng.choice(MONTHS)}"
        return rng.choice((day, f"{day} {self.year()}", f"{rng.choice(MONTHS)} {self.year()}", rng.choice(DAYS)))

    def year(self) -> str:
        """Return a year."""
        return str(self.rng.randint(1500, 2060))

    def time(self) -> str:
        """Return a time of the day."""
        rng = self.rng
        return rng.choice((f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}", f"{rng.choice(NUMBERS)} o'clock"))

    def amount(self) -> str:
        """Return a number with a unit."""
        return f"{self.rng.choice((self.number(), self.number(), self.rng.choice(NUMBERS)))} {self.rng.choice(UNITS)}"

    def value(self) -> str:
        """Return what an attribute can be."""
        rng = self.rng
        kinds: tuple[Callable[[], str], ...] = (
            self.number,
            self.number,
            self.amount,
            self.amount,
            self.code,
            self.name,
            self.person,
            self.date,
            self.time,
            lambda: rng.choice(COLOURS + MATERIALS),
            lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(COLOURS + MATERIALS)}",
            lambda: f"{self.name()} {rng.choice(ORGANISATIONS)}",
            lambda: f"{self.name().lower()}_{rng.choice(THINGS)}",
        )
        unseen: tuple[Callable[[], str], ...] = (
            lambda: f"{rng.randint(0, 9)}.{rng.randint(0, 40)}.{rng.randint(0, 20)}",
            lambda: f"{self.number()} per cent",
            lambda: f"{self.name().lower()}@{self.name().lower()}.org",
            lambda: f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
        )
        return rng.choice(kinds + unseen if self.unseen else kinds)()
