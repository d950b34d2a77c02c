"""Admission: bounded, and honest about when to come back."""

from __future__ import annotations

import pytest

from deployments.errors import BadRequest, Overloaded
from deployments.fleet.admission import Admission, Places, Reservation
from tests.unit.recording import Clock


def test_capacity_and_queue_are_one_bound() -> None:
    admission = Admission(2, clock=Clock())
    admission.capacity = 3
    admission.enter(5)
    with pytest.raises(Overloaded) as refused:
        admission.check(1)
    assert refused.value.status == 429
    assert int(refused.value.headers()["retry-after"]) >= 1


def test_requests_wait_for_the_first_engine_within_the_queue() -> None:
    admission = Admission(2, clock=Clock())
    admission.check(2)
    with pytest.raises(Overloaded):
        admission.check(3)


def test_n_counts_as_n_sequences() -> None:
    admission = Admission(4, clock=Clock())
    admission.check(4)
    with pytest.raises(Overloaded):
        admission.check(5)


def test_what_can_never_be_let_in_is_no_overload() -> None:
    admission = Admission(4, clock=Clock())
    admission.capacity = 4
    admission.check(8)
    with pytest.raises(BadRequest) as refused:
        admission.check(9)
    assert refused.value.param == "n"


def test_room_returns_when_a_request_leaves() -> None:
    admission = Admission(1, clock=Clock())
    admission.enter(1)
    admission.leave(1)
    admission.check(1)
    assert admission.in_flight == 0


def test_retry_after_follows_the_pace_of_the_engines() -> None:
    clock = Clock()
    admission = Admission(0, clock=clock)
    admission.enter(40)
    for _ in range(20):
        clock.now += 2
        admission.leave(1)
    with pytest.raises(Overloaded) as refused:
        admission.check(1)
    slow = refused.value.retry_after_s
    assert slow is not None and 20 < slow <= 60


def test_who_was_let_in_is_counted_before_it_starts() -> None:
    admission = Admission(2, clock=Clock())
    reservation = admission.reserve(2)
    with pytest.raises(Overloaded):
        admission.reserve(1)
    reservation.release()
    reservation.release()
    assert admission.in_flight == 0


def test_places_that_were_never_used_say_nothing_about_the_pace() -> None:
    clock = Clock()
    admission = Admission(1, clock=clock)
    for _ in range(10):
        admission.reserve(1).release()
    admission.reserve(1)
    with pytest.raises(Overloaded) as refused:
        admission.check(1)
    assert refused.value.retry_after_s == 5


class Bulk:
    """A request of many prompts.

    Attributes:
        prompts: Their places, taken or waited for.
    """

    def __init__(self, reservation: Reservation, prompts: int, n: int = 1) -> None:
        self.reservation = reservation
        self.prompts = [reservation.take(n) for _ in range(prompts)]

    @property
    def running(self) -> list[Places]:
        return [places for places in self.prompts if places.taken]

    def finish_one(self) -> None:
        first = self.running[0]
        self.prompts.remove(first)
        first.leave()


def test_one_request_of_many_prompts_fills_free_engines_and_shuts_nobody_out() -> None:
    admission = Admission(4, clock=Clock())
    admission.capacity = 8
    bulk = Bulk(admission.reserve(1), 2000)
    assert (len(bulk.running), admission.in_flight) == (9, 9), "engines have one to draw from when another ends"
    assert admission.waiting == 1991
    others = [admission.reserve(1).take(1) for _ in range(4)]
    with pytest.raises(Overloaded):
        admission.reserve(1)
    for left in (8, 7, 6, 5, 5, 5):  # others go first, until none of them waits
        bulk.finish_one()
        assert len(bulk.running) == left
    for places in others:
        places.leave()
    assert len(bulk.running) == 9
    while bulk.prompts:
        bulk.finish_one()
    bulk.reservation.release()
    assert (admission.in_flight, admission.waiting, admission.growing) == (0, 0, {})


def test_a_request_that_was_let_in_goes_on_with_as_much_however_busy_engines_are() -> None:
    admission = Admission(100, clock=Clock())
    admission.capacity = 4
    bulk = Bulk(admission.reserve(2), 5, n=2)
    for _ in range(50):
        admission.reserve(1).take(1)
    assert len(bulk.running) == 2, "there was room for another when it came"
    for _ in range(4):
        bulk.finish_one()
        assert len(bulk.running) == 1
    bulk.finish_one()
    assert admission.in_flight == 50


def test_beside_a_request_of_many_prompts_a_few_may_always_wait_whatever_the_pace() -> None:
    clock = Clock()
    admission = busy(clock, max_wait_s=0.1, per_second=16)
    for _ in range(16):
        admission.leave(1)
    Bulk(admission.reserve(1), 100)
    assert admission.in_flight == 18
    for _ in range(4):
        admission.reserve(1)
    with pytest.raises(Overloaded):
        admission.reserve(1)


def test_a_request_of_many_prompts_leaves_the_queue_to_others_however_large_the_fleet() -> None:
    admission = Admission(4, clock=Clock())
    admission.capacity = 4096
    bulk = Bulk(admission.reserve(1), 10_000)
    for _ in range(4):
        admission.reserve(1)
        bulk.finish_one()
    with pytest.raises(Overloaded):
        for _ in range(5):
            admission.reserve(1)


def test_two_requests_of_many_prompts_share_what_is_free() -> None:
    admission = Admission(4, clock=Clock())
    admission.capacity = 8
    first = Bulk(admission.reserve(1), 100)
    second = Bulk(admission.reserve(1), 100)
    assert (len(first.running), len(second.running)) == (9, 1)
    for _ in range(20):
        first.finish_one()
        second.finish_one()
    assert {len(first.running), len(second.running)} == {4, 5}


def test_a_key_has_its_even_share_for_many_prompts_too() -> None:
    admission = Admission(100, clock=Clock())
    admission.capacity = 8
    for _ in range(50):
        admission.reserve(1, "greedy").take(1)
    bulk = Bulk(admission.reserve(1, "polite"), 100)
    assert len(bulk.running) == 4
    bulk.finish_one()
    assert len(bulk.running) == 4
    assert admission._held["polite"] == 4
    bulk.reservation.release()
    for places in reversed(bulk.prompts):
        places.leave()
    assert (admission._held, admission.in_flight) == ({"greedy": 50}, 50)


def test_before_any_engine_is_there_only_what_was_let_in_is_held() -> None:
    admission = Admission(8, clock=Clock())
    bulks = [Bulk(admission.reserve(1, key), 10) for key in (None, "ann")]
    assert admission.in_flight == 2
    admission.capacity = 6
    assert [len(bulk.running) for bulk in bulks] == [3, 3]


def test_what_waits_and_is_given_up_leaves_nothing_behind() -> None:
    admission = Admission(8, clock=Clock())
    admission.capacity = 2
    bulk = Bulk(admission.reserve(1), 10)
    for places in bulk.prompts[2:]:
        places.leave(worked=False)
    assert (admission.in_flight, admission.growing) == (2, {})
    for places in bulk.prompts[:2]:
        places.leave()
    bulk.reservation.release()
    assert admission.in_flight == 0


def busy(clock: Clock, *, max_wait_s: float, per_second: int, capacity: int = 16) -> Admission:
    """Return an admission whose engines have been busy for a while, at that pace, and still are."""
    admission = Admission(1000, max_wait_s=max_wait_s, clock=clock)
    admission.capacity = capacity
    admission.enter(capacity)
    for _ in range(100):
        clock.now += 1 / per_second
        admission.leave(1)
        admission.enter(1)
    return admission


def test_nobody_is_let_in_who_would_wait_too_long() -> None:
    admission = busy(Clock(), max_wait_s=10, per_second=2)
    for _ in range(20):
        admission.reserve(1)
    with pytest.raises(Overloaded, match="would wait for about") as refused:
        admission.reserve(1)
    assert refused.value.retry_after_s == pytest.approx(1)
    with pytest.raises(Overloaded) as refused:
        admission.check(21)
    assert refused.value.retry_after_s == pytest.approx(10.5, rel=0.05)


@pytest.mark.parametrize("capacity", [16, 256])
def test_the_first_of_a_batch_to_end_do_not_make_engines_look_slow(capacity: int) -> None:
    clock = Clock()
    admission = Admission(1000, max_wait_s=4, clock=clock)
    admission.capacity = capacity
    admission.enter(capacity + capacity // 3)
    for _ in range(5):
        clock.now += 5  # sequences end as they began, together
        for _ in range(capacity):
            admission.leave(1)
            admission.reserve(1).take(1)


def test_at_four_times_what_engines_can_do_the_let_in_wait_no_longer_and_engines_are_never_idle() -> None:
    clock = Clock()
    admission = busy(clock, max_wait_s=3, per_second=10)
    waiting: list[float] = []
    waits: list[float] = []
    refused = 0
    for tick in range(1000):  # a tenth of a second each: one ends, four come
        clock.now += 0.1
        admission.leave(1)
        if waiting:
            waits.append(clock.now - waiting.pop(0))
        elif tick > 10:
            raise AssertionError("an engine has nothing to do")
        for _ in range(4):
            try:
                admission.reserve(1)
            except Overloaded:
                refused += 1
            else:
                waiting.append(clock.now)
    assert max(waits) <= 3.2
    assert refused == pytest.approx(3000, rel=0.05)


def test_a_pause_does_not_make_engines_look_slow() -> None:
    clock = Clock()
    admission = busy(clock, max_wait_s=10, per_second=10)
    admission.leave(16)
    clock.now += 3600
    for _ in range(100):
        admission.reserve(1)


def test_what_ends_while_engines_are_idle_does_not_make_them_look_fast() -> None:
    clock = Clock()
    admission = busy(clock, max_wait_s=10, per_second=1)
    admission.leave(8)
    for _ in range(500):
        admission.reserve(1)
        admission.leave(1)
    with pytest.raises(Overloaded):
        for _ in range(30):
            admission.enter(1)
            admission.check(1)


def test_a_few_may_always_wait_however_slow_engines_are() -> None:
    admission = busy(Clock(), max_wait_s=1, per_second=1, capacity=64)
    for _ in range(8):
        admission.reserve(1)
    with pytest.raises(Overloaded):
        admission.reserve(1)


def test_while_engines_start_only_the_count_bounds() -> None:
    clock = Clock()
    admission = busy(clock, max_wait_s=1, per_second=1)
    admission.capacity = 0
    for _ in range(500):
        admission.reserve(1)


def test_a_greedy_keys_queue_does_not_shut_a_polite_key_out() -> None:
    admission = Admission(8, clock=Clock())
    admission.capacity = 8
    greedy = [admission.reserve(1, "greedy") for _ in range(16)]
    with pytest.raises(Overloaded):
        admission.reserve(1, "greedy")
    polite = [admission.reserve(1, "polite") for _ in range(4)]
    with pytest.raises(Overloaded):
        admission.reserve(1, "polite")
    admission.reserve(2, "third")
    with pytest.raises(Overloaded):
        admission.reserve(1, "third")
    for reservation in (*greedy, *polite):
        reservation.release()
        reservation.release()
    assert admission.in_flight == 2
    assert admission._held == {"third": 2}


def test_a_polite_key_is_not_held_to_a_wait_that_is_anothers() -> None:
    admission = busy(Clock(), max_wait_s=1, per_second=1, capacity=16)
    with pytest.raises(Overloaded):
        for _ in range(100):
            admission.reserve(1, "greedy")
    admission.reserve(1, "polite")


def test_many_keys_at_once_have_one_place_each() -> None:
    admission = Admission(0, clock=Clock())
    admission.capacity = 2
    for i in range(50):
        admission.reserve(1, f"key {i}")
        with pytest.raises(Overloaded):
            admission.reserve(2, f"key {i}")
