"""`make ramp`: what it sends and waits for, against a stub of the server, and what it makes of what it saw."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks.overload import Answer, Sent
from benchmarks.ramp import STEPS, Moment, Options, Ramp, Run, counts, plot, rows, table
from benchmarks.servers import ServerError
from tests.unit.stub_server import served


@pytest.fixture
def ramp() -> Ramp:
    answers = [
        (1, Answer(ttft_s=0.5)),
        (2, Answer(ttft_s=1.5)),
        (11, Answer(retry_after_s=3.0)),
        (12, Answer(ttft_s=9)),
    ]
    return Ramp(
        pace=4.0,
        steps=[(0.0, 10.0, 2.0), (10.0, 20.0, 6.0)],
        sent=[Sent(float(at), answer) for at, answer in answers],
        moments=[Moment(5.0, 1, 1, 2), Moment(12.0, 1, 2, 8), Moment(18.0, 2, 2, 12)],
        from_zero_s=[31.0, 29.0],
        to_zero_s=61.0,
    )


def test_a_request_counts_for_the_step_in_which_it_was_sent(ramp: Ramp) -> None:
    first, second = rows(ramp)
    assert (first["ttft_p50_s"], first["rejected_share"], first["ongoing"]) == (1.5, 0.0, 2.0)
    assert (second["ttft_p50_s"], second["rejected_share"], second["ongoing"]) == (9, 0.5, 10.0)


def test_engines_are_given_as_they_were_during_the_step(ramp: Ramp) -> None:
    assert [row["running"] for row in rows(ramp)] == [[1, 1], [1, 2]]
    lines = table(ramp).splitlines()
    assert lines[2].split()[2:4] == ["2", "1-2"]
    assert lines[-1] == "from zero 31 s, again 29 s; to zero 61 s"


def test_the_last_line_that_counts_engines_is_the_one_that_holds() -> None:
    log = "12:00:00  running  Router 1/1  Engine-tiny 0/1\nx\n12:00:09  running  Router 1/1  Engine-tiny 1/2\n"
    assert counts(log) == (1, 2)
    assert counts("  0 s  starting Ray\n") is None


def test_the_picture_is_one(ramp: Ramp, tmp_path: Path) -> None:
    plot(ramp, tmp_path / "ramp.png")
    assert (tmp_path / "ramp.png").read_bytes().startswith(b"\x89PNG")


class StubServer:
    """A stub of a server that scales: an engine for its first request, two for four at once, none when quiet."""

    def __init__(self, folder: Path) -> None:
        self.log, self.url = folder / "groundswell.log", ""
        self.engines, self.open, self.asked, self.room = 0, 0, 0, 6

    def scale(self, engines: int) -> None:
        if engines != self.engines:
            self.engines = engines
            with self.log.open("a") as log:
                log.write(f"12:00:00  running  Router 1/1  Engine-tiny {engines}/{engines}\n")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        if self.open >= self.room:
            return web.Response(status=429, headers={"retry-after": "1"})
        self.open += 1
        self.scale(max(self.engines, 2 if self.open >= 4 else 1))
        try:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            await asyncio.sleep(0.05)
            events = [{"choices": [{"delta": {"content": "a"}}]}]
            events.append(
                {"id": "1", "choices": [], "usage": {"completion_tokens": (await request.json())["max_tokens"]}}
            )
            lines = [*(json.dumps(event, separators=(",", ":")) for event in events), "[DONE]"]
            await response.write("".join(f"data: {line}\n\n" for line in lines).encode())
            return response
        finally:
            self.open -= 1
            if not self.open:
                asyncio.get_running_loop().call_later(0.3, self.rest)

    def rest(self) -> None:
        if not self.open:
            self.scale(0)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.log.write_text("  0 s  starting Ray\n")
        async with served(self.answer) as self.url:
            yield


@pytest.mark.asyncio
async def test_what_a_run_that_is_stopped_has_seen_is_kept(tmp_path: Path) -> None:
    stub, seen = StubServer(tmp_path), Ramp()
    server: Any = stub

    def stop(_: str) -> None:
        if len(seen.steps) == 2:
            run.cancel()

    async with stub.running(), asyncio.timeout(60):
        run = asyncio.create_task(Run(server, Options(capacity=4, seconds=0.2), stop, seen).run())
        await asyncio.wait([run])
    assert len(seen.steps) == 2
    shown = table(seen).splitlines()
    assert len(shown) == 1 + len(seen.steps) + 2
    assert shown[-1].startswith("from zero ") and "again" not in shown[-1]
    plot(seen, tmp_path / "ramp.png")
    assert (tmp_path / "ramp.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_answered_is_shown(ramp: Ramp) -> None:
    ramp.sent.append(Sent(13.0, Answer(broken="TimeoutError: ")))
    assert table(ramp).splitlines()[-1] == "1 requests were neither answered nor refused, one by TimeoutError: "


@pytest.mark.asyncio
async def test_a_pace_of_requests_that_were_refused_is_none(tmp_path: Path) -> None:
    stub, seen = StubServer(tmp_path), Ramp()
    stub.room = 1
    server: Any = stub
    async with stub.running():
        with pytest.raises(ServerError, match="requests failed while nothing was overloaded: refused"):
            await Run(server, Options(capacity=4, seconds=0.2), lambda line: None, seen).run()
    assert (seen.pace, seen.steps) == (0, [])


@pytest.mark.asyncio
async def test_it_goes_up_and_down_and_waits_until_the_last_engine_has_gone(tmp_path: Path) -> None:
    stub = StubServer(tmp_path)
    server: Any = stub
    async with stub.running():
        await Run(server, Options(capacity=4, seconds=0.5, tokens=1), lambda line: None, seen := Ramp()).run()
    assert seen.broken == []
    assert len(seen.steps) == len(STEPS)
    assert len(seen.from_zero_s) == 2
    running = {moment.running for moment in seen.moments}
    assert min(running) == 0 < max(running)
    assert len(seen.sent) == stub.asked
    rates = [rate for _, _, rate in seen.steps]
    assert max(rates) / min(rates) == pytest.approx(max(STEPS) / min(STEPS))
    assert all(row["ttft_p50_s"] >= 0.05 for row in rows(seen) if row["ttft_p50_s"] == row["ttft_p50_s"])
