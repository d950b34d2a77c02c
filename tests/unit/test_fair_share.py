"""Fair shares, with a simulated engine: so many requests at once, and a queue by priority, as vLLM's is."""

from __future__ import annotations

import heapq
from collections import defaultdict
from statistics import mean

import pytest

from deployments.access.fair_share import LEVEL, MOST_AHEAD_S, FairShare, Turn
from tests.unit.recording import Clock

SERVICE_S = 1.0
TOKENS = 128


class Engine:
    """A simulated engine: `slots` requests at once, each a second long, two more that wait in it by priority, and the
    rest in the queues of the Routers, which take turns."""

    def __init__(self, slots: int, *, fair: bool = True, routers: int = 1) -> None:
        self.clock = Clock()
        self.shares = [FairShare(clock=self.clock) for _ in range(routers)]
        self._free, self._fair, self._count, self._next = slots, fair, 0, 0
        self._queues: list[list[tuple[tuple[int, float], int, str, float, Turn]]] = [[] for _ in range(routers)]
        self._waiting: list[tuple[int, int, str, float, Turn]] = []
        self._running: list[tuple[float, int, Turn]] = []
        self.waits: dict[str, list[float]] = defaultdict(list)
        self.started: list[tuple[float, str]] = []

    def send(self, name: str, router: int = 0) -> None:
        turn = self.shares[router].join(name, 10, TOKENS)
        self._count += 1
        entry = (turn.order if self._fair else (0, 0.0), self._count, name, self.clock.now, turn)
        heapq.heappush(self._queues[router], entry)
        self._start()

    def _start(self) -> None:
        while True:
            while len(self._waiting) < 2 and any(self._queues):
                self._next = (self._next + 1) % len(self._queues)
                if self._queues[self._next]:
                    _, count, name, sent, turn = heapq.heappop(self._queues[self._next])
                    heapq.heappush(self._waiting, (turn.priority if self._fair else 0, count, name, sent, turn))
            if not self._free or not self._waiting:
                return
            _, count, name, sent, turn = heapq.heappop(self._waiting)
            self._free -= 1
            self.waits[name].append(self.clock.now - sent)
            self.started.append((self.clock.now, name))
            turn.serve(1)
            heapq.heappush(self._running, (self.clock.now + SERVICE_S, count, turn))

    def run_until(self, end: float) -> None:
        while self._running and self._running[0][0] <= end:
            self.clock.now, _, turn = heapq.heappop(self._running)
            turn.serve(TOKENS - 1)
            turn.leave()
            self._free += 1
            self._start()
        self.clock.now = end

    def served(self, since: float, until: float) -> dict[str, int]:
        counts: dict[str, int] = defaultdict(int)
        for at, name in self.started:
            if since <= at < until:
                counts[name] += 1
        return counts


def greedy_and_polite(*, fair: bool) -> Engine:
    engine = Engine(4, fair=fair)
    for _ in range(200):
        engine.send("greedy")
    for second in range(20):
        engine.run_until(1000 + second + 0.5)
        engine.send("polite")
    engine.run_until(1100)
    return engine


def test_a_polite_key_does_not_wait_behind_a_greedy_one() -> None:
    fcfs, fair = greedy_and_polite(fair=False), greedy_and_polite(fair=True)
    assert mean(fcfs.waits["polite"]) > 30
    assert max(fair.waits["polite"]) <= SERVICE_S
    assert len(fair.waits["greedy"]) == len(fcfs.waits["greedy"]) == 200


def test_a_greedy_key_gets_what_others_leave() -> None:
    served = greedy_and_polite(fair=True).served(1001, 1020)
    assert served["polite"] == 19
    assert served["greedy"] == 4 * 19 - 19


def test_two_greedy_keys_share_evenly_from_the_moment_the_second_comes() -> None:
    engine = Engine(4)
    for _ in range(300):
        engine.send("first")
    engine.run_until(1010)
    for _ in range(100):
        engine.send("second")
    engine.run_until(1040)
    served = engine.served(1011, 1040)
    assert abs(served["first"] - served["second"]) <= 0.2 * served["first"]


def test_using_what_nobody_wanted_is_not_held_against_a_key() -> None:
    engine = Engine(4)
    for second in range(100):
        engine.run_until(1000 + second)
        for _ in range(4):
            engine.send("early")
        if second % 10 == 0:
            engine.send("now and then")
    for _ in range(40):
        engine.send("late")
        engine.send("early")
    engine.run_until(1120)
    served = engine.served(1100, 1115)
    assert served["early"] >= 0.35 * (served["early"] + served["late"])


def test_a_greedy_key_is_not_starved_by_many_polite_ones() -> None:
    engine = Engine(4)
    for _ in range(100):
        engine.send("greedy")
    for second in range(60):
        engine.run_until(1000 + second)
        for i in range(8):  # twice what the engine can do
            engine.send(f"polite {i}")
    served = engine.served(1010, 1060)
    assert served["greedy"] >= 4 * 50 / 9 * 0.5


def test_priorities_of_several_routers_compare() -> None:
    engine = Engine(4, routers=2)
    for _ in range(100):
        engine.send("greedy", router=0)
        engine.send("greedy", router=1)
    engine.run_until(1010)
    for router in (0, 1):
        engine.send("polite", router)
    engine.run_until(1015)
    assert max(engine.waits["polite"]) <= SERVICE_S


def test_nobody_is_put_off_for_longer_than_the_bound() -> None:
    clock = Clock()
    share = FairShare(clock=clock)
    turns = [share.join("greedy", 10_000, None) for _ in range(1000)]
    assert turns[-1].starts_at == clock.now + MOST_AHEAD_S
    assert turns[-1].priority < turns[0].priority + 1000 * (MOST_AHEAD_S + 1)


def test_a_key_alone_is_stamped_with_now_when_nothing_waits() -> None:
    clock = Clock()
    share = FairShare(clock=clock)
    for _ in range(5):
        turn = share.join("only", 10, 50)
        assert turn.priority == 1_000_000
        turn.serve(50)
        turn.leave()
        turn.leave()


@pytest.mark.parametrize(("level", "sign"), [(-1, -1), (1, 1), (-(10**18), -1), (10**18, 1)])
def test_a_level_comes_before_every_share_and_fits_an_integer_of_64_bits(level: int, sign: int) -> None:
    clock = Clock()
    clock.now = 1.8e9
    share = FairShare(clock=clock)
    plain, mine = share.join("a", 1, 1), share.join("a", 1, 1, level=level)
    assert sign * (mine.priority - plain.priority) > LEVEL / 2
    assert (mine.order < plain.order) == (sign < 0)
    assert -(2**63) <= mine.priority < 2**63


def test_nothing_is_kept_of_keys_that_have_left() -> None:
    share = FairShare(clock=Clock())
    stays = share.join("stays", 1, 1)
    for i in range(100):
        turn = share.join(f"key {i}", 1, 1)
        turn.serve(1)
        turn.leave()
    late = share.join("stays", 10**6, 1)
    late.serve(1)
    last = share.join("last", 1, 1)
    last.leave()
    assert len(share._flows) <= 2
    for turn in (stays, late):
        turn.leave()
    assert not share._flows
