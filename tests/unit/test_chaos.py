"""`make chaos`: what it makes of what clients got, against a stub of the server. Nothing is killed here."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from aiohttp import web

from benchmarks import chaos
from benchmarks.chaos import (
    ENGINES,
    FULL,
    HANG_UPS,
    LOSES_NO_ENGINE,
    QUICK,
    Answer,
    NotBack,
    Row,
    Strike,
    counts,
    gained,
    good,
    judge,
    likelier,
)
from tests.unit.stub_server import served

CLIENTS, TOKENS = 4, 40
UNDISTURBED = Answer([1, 2, 3], "one two three", 3, [0.0, 1.0, 2.0], 200)


def judged(answer: Answer, *, nats: float = 1.0) -> Row:
    row = Row()
    judge(row, [answer], [UNDISTURBED], 0.5, lambda *_: nats)
    return row


@pytest.mark.parametrize(
    ("tokens", "text", "usage", "off"),
    [
        ([1, 2, 3], "one two three", 3, 0),
        ([1, 2], "one two", 3, 1),
        ([1, 2, 2, 3], "one two two three", 3, 2),
        ([1, 2, 3], "one two three", 4, 1),
        ([1, 2, 3], "one two thre", 3, 1),
        ([1, 9, 9], "one nine nine", 3, 2),
    ],
    ids=["as it was", "missing", "doubled", "usage", "text", "different"],
)
def test_an_answer_that_claims_to_be_whole_must_be_the_undisturbed_one(
    tokens: list[int], text: str, usage: int, off: int
) -> None:
    row = judged(Answer(tokens, text, usage, [0.0, 1.0, 4.0], 200))
    assert (row.tokens_off, row.ties, row.broken, row.refused, row.longest_pause_s) == (off, 0, 0, 0, 3.0)


def test_answers_that_part_at_a_tie_are_counted_by_themselves() -> None:
    row = judged(Answer([1, 9, 9], "one nine nine", 3, [0.0], 200), nats=1e-6)
    assert (row.tokens_off, row.ties) == (0, 1)


def test_a_tie_excuses_no_missing_token() -> None:
    assert judged(Answer([1, 9], "one nine", 2, [0.0], 200), nats=0.0).tokens_off > 0


def test_what_is_not_whole_is_refused_or_broken_and_who_hung_up_is_neither() -> None:
    assert judged(Answer(status=503, problem="no engine", times=[1.0])).refused == 1
    broken = judged(Answer([1], status=200, problem="the stream ended without [DONE]", times=[0.0, 2.5]))
    assert (broken.broken, broken.error_after_s) == (1, 2.0)
    assert judged(Answer([1], status=200, hung_up=True)) == Row()


def test_each_routers_count_is_its_own_and_a_dead_ones_may_go() -> None:
    name = 'ray_groundswell_fleet_recovered_requests_total{{how="{}",model="tiny",WorkerId="{}"}} {}'
    before = counts("\n".join([name.format("continued", "a", 7.0), "# HELP something", "other_total{} 3.0"]))
    now = counts("\n".join([name.format("continued", "b", 3.0), name.format("restarted", "b", 1.0)]))
    assert (gained(before, now, "continued"), gained(before, now, "restarted")) == (3, 1)
    assert gained(now, now, "continued") == 0


def test_tokens_are_tied_only_where_the_engine_finds_both_likely() -> None:
    top = {"token_id:1": -0.7, "token_id:2": -0.7, "token_id:3": -2.7}
    assert likelier(top, 1, 2) == 0
    assert likelier(top, 1, 3) == pytest.approx(2)
    for one, other in ((1, 9), (9, 1), (8, 9)):
        assert not abs(likelier(top, one, other)) < chaos.TIE_NATS


def test_rows_of_a_fault_add_up() -> None:
    both = Row(injected=1, in_flight=8, continued=4, longest_pause_s=2.0) + Row(injected=1, in_flight=7, broken=1)
    assert both == Row(injected=2, in_flight=15, continued=4, broken=1, longest_pause_s=2.0)
    assert (Row(free_after=(0.8,)) + Row(free_after=(1.9, 0.9))).free_after == (0.8, 1.9, 0.9)


def test_how_soon_places_were_free_is_told_by_its_median_and_its_worst() -> None:
    rows = {"decode": Row(injected=3, in_flight=9, free_after=(0.8, 1.9, 0.9))}
    assert "| decode | 3 | 0 | 9 |  |  | 0 | 0 | 0 | 0 |  |  | 0.9, 1.9 |  |" in chaos.table(rows)


def test_only_a_routers_death_may_break_streams_and_what_hit_nobody_is_not_good() -> None:
    hit = Row(injected=1, in_flight=8, continued=4)
    assert good({"actor": hit, "router": Row(injected=1, in_flight=8, broken=6, refused=2)})
    for bad in (Row(broken=1), Row(refused=1), Row(tokens_off=1)):
        assert not good({"actor": hit + bad})
    assert not good({"actor": Row(injected=1, in_flight=8)}), "no request was at the engine that was lost"
    assert not good({"decode": Row(injected=1)})
    left = Row(injected=1, in_flight=8, free_after=(0.3,))
    assert good({"decode": left})
    assert not good({"decode": left + Row(free_after=(chaos.PROMISED_FREE_S + chaos.SEEN_LATE_S + 0.1,))})
    assert not good({})


def test_a_fault_that_was_left_out_is_shown_and_only_want_of_time_excuses_it() -> None:
    hit = Row(injected=1, in_flight=8, continued=4)
    late, missing = Row(left_out=4), Row(no_victim=1)
    assert good({"actor": hit, "core": late, "hang": hit + late})
    assert not good({"core": late}), "nothing was seen"
    for bad in (missing, hit + missing, late + missing, Row()):
        assert not good({"actor": hit, "core": bad})
    shown = chaos.table({"core": late, "worker": hit + missing}).splitlines()
    assert [line.split(" | ")[:3] for line in shown[-2:]] == [["| core", "0", "4"], ["| worker", "1", "1"]]


def test_a_full_run_loses_twenty_engines_and_begins_with_each_fault_once() -> None:
    assert sum(fault not in LOSES_NO_ENGINE for fault in FULL) == 20
    assert FULL[: len(QUICK)] == QUICK
    assert set(FULL) == set(QUICK)


class StubHouse:
    """A stub server whose streams do as they are told, and a house whose faults cost no process.

    Attributes:
        on_fault: Called when a fault strikes.
        back: Whether the house is whole again after a fault.
        error: Ends all streams that run.
        streams: Those that are open, waiting ones too.
        begun: Those of them that have brought a token.
        left: With what each wait for free places was called, and how many streams had begun by then.
    """

    def __init__(self) -> None:
        self.url = ""
        self.on_fault: Callable[[str], None] = lambda fault: None
        self.back = True
        self.error: str | None = None
        self.doubles = False
        self.struck: list[str] = []
        self.streams = self.plain = self.begun = self.moved = 0
        self.left: list[tuple[int, int]] = []
        self.slots, self.prefill = asyncio.Semaphore(ENGINES * CLIENTS), asyncio.Lock()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        tokens = [(len(body["prompt"]) + i) % 1000 for i in range(body["max_tokens"])]
        usage = {"completion_tokens": len(tokens)}
        if not body["stream"]:
            self.plain += 1
            try:
                await asyncio.sleep(0.2)
            finally:
                self.plain -= 1
            return web.json_response({"choices": [{"token_ids": tokens, "text": str(tokens)}], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def say(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        self.streams += 1
        begun = 0
        try:
            async with self.slots:
                async with self.prefill:
                    await asyncio.sleep(1e-5 * len(body["prompt"]))
                for token in tokens:
                    if self.error is not None:
                        await say({"error": {"message": self.error}})
                        break
                    self.begun, begun = self.begun + (not begun), 1
                    await say({"choices": [{"token_ids": [token] * (1 + self.doubles), "text": f"{token} "}]})
                    await asyncio.sleep(0.005)
                else:
                    await say({"choices": [], "usage": usage})
                await response.write(b"data: [DONE]\n\n")
        finally:
            self.begun -= begun
            self.streams -= 1
        return response

    def strike(self, fault: str) -> Strike | None:
        house = self

        class Struck:
            lost: Sequence[psutil.Process] = ()

            def __call__(self) -> None:
                house.struck.append(fault)
                house.on_fault(fault)

            def end(self) -> None:
                pass

        return None if fault == "worker" else Struck()

    async def whole(self, since: float, lost: Sequence[psutil.Process] = ()) -> float:
        if self.struck and not self.back:
            raise NotBack("not whole again")
        return time.monotonic() - since

    async def free(self, since: float, left: int = 0) -> float:
        self.left.append((left, self.begun))
        async with asyncio.timeout(10):
            while self.streams + self.plain > left:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return time.monotonic() - since

    def gap(self, prompt: str, said: Sequence[int], one: int, other: int) -> float:
        return 5.0

    def recovered(self) -> dict[str, int]:
        return {'{how="continued"}': self.moved}


@pytest_asyncio.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StubHouse]:
    monkeypatch.setattr(chaos, "METRICS_LAG_S", 0.0)
    monkeypatch.setattr(chaos, "LONGEST_METRICS_LAG_S", 0.0)
    stub = StubHouse()
    async with served(stub.complete, "/v1/completions") as stub.url:
        yield stub


async def ran(house: StubHouse, *faults: str, until: float | None = None) -> tuple[dict[str, Row], list[str]]:
    rows: dict[str, Row] = {}
    said: list[str] = []
    await chaos.run(house, faults, CLIENTS, TOKENS, said.append, rows, until=until)
    return rows, said


@pytest.mark.asyncio
async def test_faults_strike_while_all_streams_run_and_are_counted_each_by_itself(house: StubHouse) -> None:
    def on_fault(fault: str) -> None:
        assert house.streams == CLIENTS - 1, "the last client does not stream"
        house.moved += 2 * (fault == "actor")

    house.on_fault = on_fault
    rows, said = await ran(house, "actor", "worker", "actor")
    assert rows["worker"] == Row(no_victim=1)
    assert (rows["actor"].injected, rows["actor"].continued) == (2, 4)
    assert rows["actor"].in_flight >= 2 * (CLIENTS - 1)
    assert good({"actor": rows["actor"]})
    assert not good(rows)
    assert any("no such process" in line for line in said)


@pytest.mark.asyncio
async def test_clients_hang_up_in_the_queue_while_others_are_read_and_while_they_are_answered(
    house: StubHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "SETTLED_S", 0.3)
    rows: dict[str, Row] = {}
    await chaos.run(house, HANG_UPS, CLIENTS, 400, lambda line: None, rows)
    slots = ENGINES * CLIENTS
    assert [rows[place].in_flight for place in HANG_UPS] == [slots, CLIENTS, CLIENTS]
    (queued_left, queued_begun), _, (prefill_left, prefill_begun), _, (decode_left, decode_begun), _ = house.left
    assert (queued_left, queued_begun) == (slots, slots), "those who are served stay, and the others go"
    assert prefill_left == decode_left == 0
    assert 0 < prefill_begun < CLIENTS, "some have been read, and some not"
    assert decode_begun == CLIENTS - 1
    assert all(len(rows[place].free_after) == 1 for place in HANG_UPS)
    assert good(rows)


@pytest.mark.asyncio
async def test_a_place_that_stays_taken_is_no_success(house: StubHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(since: float, left: int = 0) -> float:
        raise NotBack("there is still work")

    monkeypatch.setattr(house, "free", never)
    rows: dict[str, Row] = {}
    with pytest.raises(NotBack):
        await chaos.run(house, ["decode"], CLIENTS, TOKENS, lambda line: None, rows)
    assert rows == {}


@pytest.mark.asyncio
async def test_a_stream_that_breaks_is_seen(house: StubHouse) -> None:
    def on_fault(fault: str) -> None:
        house.error, house.moved = "the engine failed", 1

    house.on_fault = on_fault
    rows, said = await ran(house, "core")
    assert rows["core"].broken == CLIENTS - 1
    assert "the engine failed" in said[-1]
    assert not good(rows)


@pytest.mark.asyncio
async def test_tokens_that_come_twice_are_seen(house: StubHouse) -> None:
    def on_fault(fault: str) -> None:
        house.doubles, house.moved = True, 1

    house.on_fault = on_fault
    rows, _ = await ran(house, "core")
    assert rows["core"].tokens_off >= CLIENTS - 1


@pytest.mark.asyncio
async def test_what_was_seen_before_something_did_not_come_back_is_kept(house: StubHouse) -> None:
    def on_fault(fault: str) -> None:
        house.moved, house.back = house.moved + 1, fault != "hang"

    house.on_fault = on_fault
    rows: dict[str, Row] = {}
    with pytest.raises(NotBack):
        await chaos.run(house, ["actor", "hang", "actor"], CLIENTS, TOKENS, lambda line: None, rows)
    assert list(rows) == ["actor"]
    assert rows["actor"].injected == 1


@pytest.mark.asyncio
async def test_a_fault_that_would_not_end_in_time_is_left_out(house: StubHouse) -> None:
    rows, said = await ran(house, "actor", "decode", "actor", until=time.monotonic())
    assert rows == {"actor": Row(left_out=2), "decode": Row(left_out=1)}
    assert "3 faults are left out" in said[-1]


@pytest.mark.parametrize("stopped", [SystemExit(143), KeyboardInterrupt(), NotBack("gone")])
def test_whatever_ends_it_the_table_is_printed_and_the_server_stopped(
    stopped: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    order = []

    class Server:
        startup_s = 1.0

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def start(self) -> None:
            order.append("started")

        def stop(self) -> None:
            order.append("table" if "| actor | 1 | 0 | 8 | 4 |" in capsys.readouterr().out else "no table")
            order.append("stopped")

    async def run(*arguments: Any, **_: Any) -> None:
        arguments[5]["actor"] = Row(injected=1, in_flight=8, continued=4)
        raise stopped

    monkeypatch.setattr(chaos, "Groundswell", Server)
    monkeypatch.setattr(chaos, "House", lambda *_: None)
    monkeypatch.setattr(chaos, "make_model", lambda: Path("tiny"))
    monkeypatch.setattr(chaos, "run", run)
    monkeypatch.setattr(chaos.console, "stop_in_order", lambda: None)
    report = tmp_path / "chaos.json"
    try:
        code = chaos.main(["--json", str(report)])
    except SystemExit as left:
        code = int(str(left.code))
    assert code != 0
    assert order == ["started", "table", "stopped"]
    assert json.loads(report.read_text())["actor"]["continued"] == 4


def test_a_fault_that_does_not_exist_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        chaos.main(["--faults", "actor,flood"])
    assert left.value.code == 2
    assert "flood" in capsys.readouterr().err


@pytest.mark.asyncio
async def test_what_went_wrong_first_is_what_is_told(house: StubHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> None:
        raise RuntimeError("of a client")

    monkeypatch.setattr(chaos, "ask", fails)
    with pytest.raises(NotBack, match="of the house"):
        async with chaos._asking(house.url, ["a"], 1, 0):
            await asyncio.sleep(0)
            raise NotBack("of the house")
    with pytest.raises(RuntimeError, match="of a client"):
        async with chaos._asking(house.url, ["a"], 1, 0):
            await asyncio.sleep(0)
