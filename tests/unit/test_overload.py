"""`benchmarks.overload`: what it makes of what clients got, and what it sends, against a stub of the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from benchmarks import overload
from benchmarks.overload import Answer, Measured, Options, Phase, Sent, as_json, measure, normal_after_s, promised, rows
from benchmarks.servers import ServerError
from tests.unit.stub_server import served

OPTIONS = Options("", tokens=11)
BEFORE, AFTER = Phase(2.0, 0.0, 10.0), Phase(2.0, 10.0, 20.0)


def answered(at_s: float, ttft_s: float = 1.0) -> Sent:
    return Sent(at_s, Answer(ttft_s=ttft_s, tpot_s=0.1), tokens=11)


def refused(at_s: float) -> Sent:
    return Sent(at_s, Answer(retry_after_s=3.0), tokens=11)


@pytest.mark.parametrize(
    ("begin_s", "end_s", "tokens"), [(0.0, 10.0, 11.0), (1.5, 10.0, 5.5), (0.0, 1.0, 0.0), (2.0, 9.0, 0.0)]
)
def test_tokens_count_for_when_they_came(begin_s: float, end_s: float, tokens: float) -> None:
    assert answered(0.0).tokens_within(begin_s, end_s) == pytest.approx(tokens)


def test_what_was_refused_or_broke_brought_no_token() -> None:
    assert refused(0.0).tokens_within(0.0, 10.0) == 0
    assert Sent(0.0, Answer(broken="HTTP 500"), tokens=11).tokens_within(0.0, 10.0) == 0


def test_all_is_normal_where_nobody_is_refused_and_most_are_as_fast_as_they_were() -> None:
    before = [answered(i / 2) for i in range(20)]
    late = [answered(10 + i / 2, 1.0 if i >= 4 else 5.0) for i in range(20)]
    # Three seconds are six requests, and from the third on most of those are as fast as before.
    assert normal_after_s([*before, *late], BEFORE, AFTER) == 1.0
    shut = [refused(10 + i / 2) if i < 4 else answered(10 + i / 2) for i in range(20)]
    assert normal_after_s([*before, *shut], BEFORE, AFTER) == 2.0
    assert normal_after_s([*before, *(answered(10 + i / 2, 5.0) for i in range(20))], BEFORE, AFTER) is None
    assert normal_after_s(before, BEFORE, AFTER) is None, "nobody was there to be as fast as before"
    assert normal_after_s(late, BEFORE, AFTER) is None, "nothing says how fast they were before"


def measured() -> Measured:
    names = list(OPTIONS.loads)
    phases = {name: Phase(1.0, 10.0 * i, 10.0 * (i + 1)) for i, name in enumerate(names)}
    usual, full, over, after = ([answered(10.0 * i + n / 2) for n in range(10)] for i in range(4))
    shut = [refused(20.0 + n / 2) for n in range(30)]
    rss = [(5.0, 400), (25.0, 900), (35.0, 500)]
    sent = [*usual, *full[:5], *over, *shut[:10], *after]
    return Measured(3.0, phases, sent, [(at_s, mb * 1_000_000) for at_s, mb in rss], whole=True)


def test_each_phase_has_what_was_sent_in_it() -> None:
    usual, full, over, _ = rows(measured()).values()
    assert (usual["sent"], full["sent"], over["sent"], over["refused"]) == (10, 5, 20, 10)
    assert (over["goodput_tokens_per_s"], over["share_of_peak"], full["share_of_peak"]) == (11.0, 1.0, 0.5)
    assert (over["ttft_p50_s"], over["tpot_p99_s"], over["retry_after_p50_s"]) == (1.0, 0.1, 3.0)
    assert (usual["retry_after_p50_s"], full["router_rss_mb"], over["router_rss_mb"]) == (None, None, 900)


def test_what_is_promised_is_said_one_by_one() -> None:
    seen = promised(OPTIONS, measured())
    assert seen == {
        "share_of_peak": 1.0,
        "normal_after_s": 0.0,
        "refused_before_any_stream": 10,
        "broken": {},
        "router_rss_mb": {"before": 400, "most": 900, "end": 500},
    }
    said = overload.table(OPTIONS, measured())
    assert "| 4x | 1.0 | 11 | 100% | 50% | 3 | 0 | 1.00 | 1.00 | 100.0 | 100.0 | 900 |" in said
    assert "400 MB before, 900 MB at most, 500 MB when all was over" in said


def test_a_run_that_was_cut_says_what_it_has() -> None:
    cut = measured()
    cut.phases = {name: phase for name, phase in list(cut.phases.items())[:2]}
    cut.whole = False
    said = overload.table(OPTIONS, cut)
    assert "| 1x |" in said
    assert "not while it was looked" in said
    numbers = json.loads(json.dumps(as_json(OPTIONS, cut), allow_nan=False))
    assert (numbers["whole"], numbers["share_of_peak"], list(numbers["phases"])) == (False, None, ["0.7x", "1x"])


class StubServer:
    """A stub of a server: so many requests at once, each as long as it says; what is more is refused as it is told."""

    def __init__(self) -> None:
        self.url, self.open, self.most = "", 0, 0
        self.refusal: dict[str, Any] = {"status": 429, "headers": {"retry-after": "2"}}
        self.error_in_stream = False
        self.missing = 0
        self.key: str | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        if self.open >= 2:
            return web.Response(**self.refusal)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            tokens = (await request.json())["max_tokens"] - self.missing
            for _ in range(tokens):
                await response.write(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
                await asyncio.sleep(0.02)
            if self.error_in_stream:
                await response.write(b'data: {"error":{"message":"All engines are busy."}}\n\n')
            await response.write(b'data: {"id":"1","choices":[],"usage":{"completion_tokens":%d}}\n\n' % tokens)
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.open -= 1


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[StubServer]:
    server = StubServer()
    async with served(server.answer) as server.url:
        yield server


@pytest.mark.asyncio
async def test_requests_come_at_all_loads_one_after_the_other_and_memory_is_looked_at(stub: StubServer) -> None:
    seen, options = Measured(), Options(stub.url, capacity=2, tokens=2, seconds=0.7)
    await measure(options, lambda line: None, seen, rss=lambda: 5_000_000)
    assert seen.whole
    assert not seen.broken
    assert list(seen.phases) == ["0.7x", "1x", "4x", "0.7x after"]
    assert [phase.rate / seen.pace for phase in seen.phases.values()] == pytest.approx([0.7, 1.0, 4.0, 0.7])
    over = rows(seen)["4x"]
    assert over["sent"] > rows(seen)["1x"]["sent"]
    assert over["refused"] > 0
    assert over["tpot_p50_s"] >= 0.02
    assert promised(options, seen)["router_rss_mb"] == {"before": 5.0, "most": 5.0, "end": 5.0}


@pytest.mark.asyncio
async def test_a_server_with_keys_is_measured_with_one_and_not_without(stub: StubServer) -> None:
    stub.key = "gs-a"
    options = Options(stub.url, capacity=2, tokens=1, seconds=0.2)
    with pytest.raises(ServerError, match="401"):
        await measure(options, lambda line: None, Measured())
    seen = Measured()
    await measure(options, lambda line: None, seen, key="gs-a")
    assert seen.whole
    assert not seen.broken


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ({"status": 429}, "without a Retry-After"),
        ({"status": 429, "headers": {"retry-after": "soon"}}, "without a Retry-After"),
        ({"status": 500}, "HTTP 500"),
        ({"status": 503, "headers": {"retry-after": "1"}, "text": "The engines failed"}, "HTTP 503 The engines failed"),
    ],
)
async def test_only_a_429_that_names_a_time_is_a_refusal(stub: StubServer, refusal: dict[str, Any], said: str) -> None:
    stub.open, stub.refusal = 2, refusal
    async with aiohttp.ClientSession() as session:
        answer = await overload.send(session, stub.url, "tiny", 2, "seed")
    assert said in str(answer.broken)
    assert answer.retry_after_s is None


@pytest.mark.asyncio
async def test_a_refusal_in_a_stream_that_has_begun_is_none(stub: StubServer) -> None:
    stub.error_in_stream = True
    async with aiohttp.ClientSession() as session:
        answer = await overload.send(session, stub.url, "tiny", 2, "seed")
    assert "a stream that had begun ended in" in str(answer.broken)


@pytest.mark.asyncio
async def test_a_stream_that_ends_before_its_last_token_is_broken(stub: StubServer) -> None:
    stub.missing = 1
    async with aiohttp.ClientSession() as session:
        answer = await overload.send(session, stub.url, "tiny", 3, "seed")
    assert answer == Answer(broken="RequestFailed: 2 tokens in place of 3")


@pytest.mark.parametrize("stopped", [SystemExit(143), KeyboardInterrupt(), ServerError("gone")])
def test_whatever_ends_it_what_was_seen_is_printed(
    stopped: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def cut(options: Options, say: object, seen: Measured, **_: object) -> None:
        seen.phases, seen.sent = measured().phases, measured().sent
        raise stopped

    monkeypatch.setattr(overload, "go_first", lambda: None)
    monkeypatch.setattr(overload, "measure", cut)
    monkeypatch.setattr(overload, "routers_rss", lambda url: lambda: None)
    monkeypatch.setattr(overload.console, "stop_in_order", lambda: None)
    report = tmp_path / "overload.json"
    try:
        code = overload.main(["--url", "http://127.0.0.1:1", "--tokens", "11", "--json", str(report)])
    except SystemExit as left:
        code = int(str(left.code))
    assert code != 0
    assert "| 4x |" in capsys.readouterr().out
    assert not json.loads(report.read_text())["whole"]
