"""Admission: bounded, and honest about when to come back."""

from __future__ import annotations

import pytest

from deployments.errors import Overloaded
from deployments.fleet.admission import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


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


def test_a_request_that_was_let_in_is_let_in_whole() -> None:
    admission = Admission(2, clock=Clock())
    reservation = admission.reserve(1)
    for _ in range(5):
        reservation.take(1)
    assert admission.in_flight == 5
    reservation.release()
    admission.leave(5)
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
