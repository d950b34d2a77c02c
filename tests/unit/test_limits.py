"""Limits of a key: buckets that fill evenly, by a clock that the test moves."""

from __future__ import annotations

import pytest

from deployments.access.keys import KeyLimits
from deployments.access.limits import Bucket, Meter, duration
from deployments.errors import RateLimited, TokensLimited
from tests.unit.recording import Clock


def meter(clock: Clock, **limits: int) -> Meter:
    return Meter(KeyLimits(**limits), clock=clock)


def test_a_minutes_requests_may_come_at_once_and_then_one_after_another() -> None:
    clock = Clock()
    mine = meter(clock, requests_per_minute=3)
    for _ in range(3):
        mine.enter(None)
    with pytest.raises(RateLimited) as caught:
        mine.enter(None)
    assert caught.value.retry_after_s == pytest.approx(20)
    clock.now += 19.9
    with pytest.raises(RateLimited):
        mine.enter(None)
    clock.now += 0.1
    mine.enter(None)


def test_retry_after_is_honest() -> None:
    clock = Clock()
    mine = meter(clock, tokens_per_minute=600)
    mine.enter(500)
    with pytest.raises(TokensLimited) as caught:
        mine.enter(400)
    assert caught.value.retry_after_s == pytest.approx(30)
    clock.now += 30
    mine.enter(400)


def test_what_was_estimated_gives_way_to_what_was_used() -> None:
    mine = meter(Clock(), tokens_per_minute=1000)
    mine.enter(900)
    assert mine.headers()["x-ratelimit-remaining-tokens"] == "100"
    mine.leave(900, 50)
    assert mine.headers()["x-ratelimit-remaining-tokens"] == "950"


def test_an_answer_longer_than_the_limit_is_paid_for_by_those_after_it() -> None:
    clock = Clock()
    mine = meter(clock, tokens_per_minute=600)
    mine.enter(10)
    mine.leave(10, 1200)
    assert mine.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(TokensLimited) as caught:
        mine.enter(0)
    assert caught.value.retry_after_s == pytest.approx(60.1)
    clock.now += 60.2
    mine.enter(0)


def test_a_prompt_above_the_limit_waits_for_a_full_bucket_rather_than_for_ever() -> None:
    clock = Clock()
    mine = meter(clock, tokens_per_minute=60)
    mine.enter(600)
    with pytest.raises(TokensLimited):
        mine.enter(1)
    assert float(mine.headers()["x-ratelimit-reset-tokens"].split("m")[0]) == 10


def test_requests_open_at_once_are_counted_and_freed() -> None:
    mine = meter(Clock(), max_concurrent_requests=2)
    mine.enter(None)
    mine.enter(5)
    with pytest.raises(RateLimited, match="2 requests open"):
        mine.enter(None)
    mine.leave(5, 9)
    mine.enter(None)


def test_a_refused_request_uses_nothing_up() -> None:
    mine = meter(Clock(), requests_per_minute=5, tokens_per_minute=100)
    mine.enter(100)
    before = mine.headers()
    for _ in range(10):
        with pytest.raises(TokensLimited):
            mine.enter(100)
    assert mine.headers() == before


def test_requests_that_use_no_tokens_pass_while_tokens_are_owed() -> None:
    mine = meter(Clock(), tokens_per_minute=100)
    mine.enter(100)
    mine.enter(None)


def test_headers_name_what_is_limited_and_nothing_else() -> None:
    assert meter(Clock()).headers() == {}
    mine = meter(Clock(), requests_per_minute=60, max_concurrent_requests=1)
    mine.enter(7)
    assert mine.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
    }


def test_a_changed_limit_keeps_what_was_used() -> None:
    clock = Clock()
    mine = meter(clock, requests_per_minute=10)
    for _ in range(4):
        mine.enter(None)
    mine.update(KeyLimits(requests_per_minute=100))
    assert mine.headers()["x-ratelimit-remaining-requests"] == "96"
    mine.update(KeyLimits(requests_per_minute=2))
    assert mine.headers()["x-ratelimit-remaining-requests"] == "0"
    mine.update(KeyLimits())
    assert mine.headers() == {}


def test_a_bucket_never_holds_more_than_a_minutes_worth() -> None:
    clock = Clock()
    bucket = Bucket(10, clock=clock)
    clock.now += 1e6
    assert bucket.level == 10
    bucket.take(-5)
    assert bucket.level == 10


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.25, "250ms"), (1.2, "1s"), (59, "59s"), (90, "1m30s"), (360, "6m0s")]
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
