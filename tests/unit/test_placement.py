"""Placement is a pure function of what a Router booked and what heartbeats say."""

from __future__ import annotations

import random

from deployments.fleet.placement import DECODE_STREAM_TOKENS, Booking, Ledger, ReplicaLoad, cost, rank


def ledger() -> Ledger:
    return Ledger(rng=random.Random(0))


def decoding(book: Ledger, replica: str) -> list[Booking]:
    """Return four requests that `replica` has given their first token."""
    bookings = [book.book(100, 1) for _ in range(4)]
    for booking in bookings:
        book.place(booking, [replica])
        booking.prefilled()
    return bookings


def test_the_idle_replica_comes_first() -> None:
    loads = {"a": ReplicaLoad(prefill_tokens=500, streams=1), "b": ReplicaLoad()}
    assert rank(["a", "b"], loads, 100, rng=random.Random(0)) == ["b", "a"]


def test_an_unknown_replica_counts_as_idle() -> None:
    loads = {"a": ReplicaLoad(streams=1)}
    assert rank(["a", "new"], loads, 10, rng=random.Random(0))[0] == "new"


def test_one_long_prompt_weighs_as_much_as_many_short_ones() -> None:
    loads = {"long": ReplicaLoad(prefill_tokens=4000, streams=1), "short": ReplicaLoad(prefill_tokens=80, streams=8)}
    assert rank(["long", "short"], loads, 10, rng=random.Random(0)) == ["short", "long"]


def test_streams_another_router_placed_count_but_our_own_are_not_counted_twice() -> None:
    book = ledger()
    decoding(book, "ours")
    for replica in ("ours", "theirs"):
        book.report(replica, running=4, waiting=0, kv_cache_usage=0.1)
    loads = book.loads()
    assert cost(loads["ours"], 0) == cost(loads["theirs"], 0) > 0


def test_streams_of_ours_that_have_ended_do_not_pass_for_anothers_until_the_next_heartbeat() -> None:
    book = ledger()
    bookings = decoding(book, "a")
    book.report("a", running=4, waiting=2, kv_cache_usage=0.0)
    for booking in bookings:
        booking.release()
    assert book.loads()["a"] == ReplicaLoad(other_waiting=2)


def test_chats_that_end_together_are_followed_by_as_many() -> None:
    book = ledger()
    ended, _ = decoding(book, "a"), decoding(book, "b")
    for booking in ended:
        booking.release()
    assert [book.place(book.book(64, 1), ["a", "b"])[0] for _ in range(4)] == ["a"] * 4


def test_a_replica_about_to_preempt_comes_last() -> None:
    loads = {"full": ReplicaLoad(kv_cache_usage=0.99), "busy": ReplicaLoad(prefill_tokens=2000, streams=6)}
    assert rank(["full", "busy"], loads, 100, rng=random.Random(0)) == ["busy", "full"]


def test_an_unfit_replica_has_no_place_even_if_it_is_the_only_one() -> None:
    loads = {"hung": ReplicaLoad(unfit=True), "busy": ReplicaLoad(prefill_tokens=100_000, streams=64)}
    assert rank(["hung", "busy"], loads, 10, rng=random.Random(0)) == ["busy"]
    assert rank(["hung"], loads, 10, rng=random.Random(0)) == []


def test_a_suspended_replica_is_fit_again_when_it_reports() -> None:
    book = ledger()
    booking = book.book(10, 1)
    book.place(booking, ["a"])
    book.suspend("a")
    assert book.loads()["a"] == ReplicaLoad(prefill_tokens=10, streams=1, unfit=True)
    book.report("a", running=1, waiting=0, kv_cache_usage=0.1)
    assert not book.loads()["a"].unfit


def test_ties_are_spread() -> None:
    rng = random.Random(1)
    firsts = {rank(["a", "b", "c"], {}, 10, rng=rng)[0] for _ in range(60)}
    assert firsts == {"a", "b", "c"}


def test_a_place_is_booked_before_the_next_request_is_ranked() -> None:
    book = ledger()
    chosen = [book.place(book.book(100, 1), ["a", "b"])[0] for _ in range(10)]
    assert chosen.count("a") == chosen.count("b") == 5


def test_long_and_short_requests_mixed_end_up_with_even_work() -> None:
    book, rng = ledger(), random.Random(2)
    for _ in range(200):
        book.place(book.book(rng.choice([20, 2000]), 1), ["a", "b", "c"])
    work = [load.prefill_tokens for load in book.loads().values()]
    assert max(work) - min(work) <= 2000 + DECODE_STREAM_TOKENS * 20
    costs = [cost(load, 0) for load in book.loads().values()]
    assert max(costs) - min(costs) <= 2000 + DECODE_STREAM_TOKENS, "no more than one request"


def test_a_finished_request_leaves_nothing_behind() -> None:
    book = ledger()
    booking = book.book(100, 2)
    book.place(booking, ["a"])
    booking.prefilled()
    assert book.loads()["a"] == ReplicaLoad(prefill_tokens=0, streams=2)
    booking.release()
    booking.release()
    assert book.loads() == {}


def test_a_booking_follows_the_request_to_the_replica_that_accepted_it() -> None:
    book = ledger()
    booking = book.book(100, 1)
    first = book.place(booking, ["a", "b"])[0]
    other = "b" if first == "a" else "a"
    booking.settle(other)
    assert book.loads() == {other: ReplicaLoad(prefill_tokens=100, streams=1)}


def test_a_ranking_after_the_request_was_taken_or_given_up_books_nothing() -> None:
    book = ledger()
    taken, given_up = book.book(100, 1), book.book(100, 1)
    book.place(taken, ["a"])
    taken.settle("a")
    assert book.place(taken, ["a", "b"]) == ["b", "a"]
    assert book.loads() == {"a": ReplicaLoad(prefill_tokens=100, streams=1)}
    taken.release()
    given_up.release()
    for booking in (taken, given_up):
        assert book.place(booking, ["a"]) == ["a"]
        booking.settle("a")
    assert book.loads() == {}


def test_a_lost_replica_is_forgotten_with_its_last_booking() -> None:
    book = ledger()
    booking = book.book(10, 1)
    book.place(booking, ["a"])
    book.report("a", running=3, waiting=1, kv_cache_usage=0.5)
    book.forget("a")
    assert book.loads()["a"] == ReplicaLoad(prefill_tokens=10, streams=1)
    booking.release()
    assert book.loads() == {}


def test_a_replica_that_is_unfit_stays_so_when_its_last_booking_ends() -> None:
    book = ledger()
    booking = book.book(10, 1)
    book.place(booking, ["a"])
    book.suspend("a")
    booking.release()
    assert book.place(book.book(10, 1), ["a"]) == []
