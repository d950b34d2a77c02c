"""`benchmarks.data_path`, `in_process` and `memory`: what does not come back whole is seen. And `in_process` runs."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("psutil")
pytest.importorskip("vllm")

import psutil

from benchmarks import data_path, in_process, memory
from benchmarks.client import Load, RequestFailed, Result
from benchmarks.data_path import Numbers
from benchmarks.stubs import __main__ as stubs
from benchmarks.stubs import core
from benchmarks.usage import Meter

REFUSED = {"Rejected: HTTP 429": 3}
TEXT = b'data: {"id":"1","choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"id":"1","choices":[],"usage":{"completion_tokens":2}}\n\n'
ERROR = b'data: {"error":{"message":"The engine failed."}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_a_side_that_refuses_half_in_half_of_the_time_does_not_look_as_good_as_the_other() -> None:
    whole, half = Result(wall_s=2.0, completed=6), Result(wall_s=1.0, completed=3, rejected=3, errors=REFUSED)
    said = data_path.table({"bare": {"short": Numbers([whole], [{}])}, "router": {"short": Numbers([half], [{}])}})
    rows = {line[:38].strip(): line[38:].split() for line in said.splitlines()}
    assert rows["requests/s"] == ["3.0", "3.0", "1.00"]
    assert rows["requests not whole"] == ["0", "3"]
    assert Numbers([whole, half], [{}, {}]).as_json()["not_whole"] == 3


def test_the_bare_server_writes_no_line_for_each_request_either(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(core, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(runpy, "run_module", lambda *_, **__: ran.append(sys.argv))
    stubs.main(["bare", "--port", "1"])
    assert ran == [["api_server", "--port", "1", "--disable-uvicorn-access-log"]]


class StubProcess:
    """A stub of a process with that command, which holds so much memory and has used so much CPU."""

    def __init__(self, command: str, rss: int, cpu_s: float = 0.0) -> None:
        self.command, self.rss, self.cpu_s = command, rss, cpu_s

    def cmdline(self) -> list[str]:
        return self.command.split()

    def memory_info(self) -> Any:
        if not self.rss:
            raise psutil.NoSuchProcess(1)
        return SimpleNamespace(rss=self.rss)

    def cpu_times(self) -> tuple[float, ...]:
        return (self.cpu_s, 0.0, 0.0, 0.0)


def test_memory_of_one_name_adds_up_at_each_moment_and_new_processes_are_seen() -> None:
    first, second = (StubProcess("ray::ServeReplica:app:Engine", rss) for rss in (700, 100))
    late = StubProcess("ray::IDLE", 30)
    running: list[Any] = [first, second]
    with Meter(lambda: running, interval_s=3600) as meter:
        first.rss, second.rss = 200, 500  # together less than before
        first.cpu_s = late.cpu_s = 2.0
        running.append(late)
    assert meter.peak_rss_bytes == {"Engine replica": 800, "ray IDLE": 30}
    assert meter.cpu_s == {"Engine replica": 2.0, "ray IDLE": 2.0}


def test_a_process_that_has_ended_takes_no_memory() -> None:
    with Meter(lambda: [StubProcess("ray::IDLE", 0), StubProcess("ray::IDLE", 5)], interval_s=3600) as meter:  # type: ignore[list-item]
        pass
    assert meter.peak_rss_bytes == {"ray IDLE": 5}


Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def answering(*parts: bytes, status: int = 200) -> Any:
    """Return an app that sends those parts, whatever it is asked."""

    async def app(scope: Any, receive: Any, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


@pytest.mark.asyncio
async def test_a_whole_answer_in_one_process_is_counted_however_it_is_cut() -> None:
    for parts in (
        [TEXT, TEXT, USAGE, DONE],
        [TEXT + TEXT + USAGE + DONE],
        [TEXT, TEXT + USAGE[:20], USAGE[20:] + DONE],
    ):
        events, first_s = await in_process.ask(answering(*parts), b"{}", 2)
        assert events == 4
        assert first_s is not None


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("app", "reason"),
    [
        (answering(TEXT), "the stream ended with"),
        (answering(TEXT, TEXT, ERROR, DONE), "the stream ended with"),
        (answering(), "the stream ended with"),
        (answering(TEXT, USAGE.replace(b"2", b"1"), DONE), "1 tokens in place of 2"),
        (answering(b"busy", status=429), "HTTP 429 busy"),
    ],
    ids=["ends early", "error", "nothing", "short", "refused"],
)
async def test_an_answer_in_one_process_that_is_not_whole_ends_the_run(app: Any, reason: str) -> None:
    with pytest.raises(RequestFailed, match=reason):
        await in_process.load(app, 1, 1, 2, seed=0)


@pytest.mark.asyncio
async def test_an_answer_in_one_process_without_text_has_no_time_to_its_first_token() -> None:
    cost = await in_process.load(answering(USAGE, DONE), 2, 1, 2, seed=0)
    assert cost.events == 2
    assert math.isnan(cost.ttft_ms)


@pytest.mark.parametrize("arguments", [["--further-models", "2"], ["--url", "http://127.0.0.1:1", "--requests", "8"]])
def test_a_memory_that_was_measured_with_requests_that_were_refused_is_no_success(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Server:
        url, startup_s = "http://127.0.0.1:1", 1.0

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def start(self) -> None:
            pass

        def stop(self) -> None:
            pass

    def send(load: Load) -> Result:
        return Result(wall_s=1.0, completed=5, rejected=3, errors=REFUSED)

    router = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1_000_000))
    monkeypatch.setattr(memory, "Groundswell", Server)
    monkeypatch.setattr(memory, "make_model", lambda: Path("tiny"))
    monkeypatch.setattr(memory, "routers", lambda url: [router])
    monkeypatch.setattr(memory, "send", send)
    monkeypatch.setattr(memory.console, "stop_in_order", lambda: None)
    assert memory.main(arguments) == 1
    assert "3 x Rejected: HTTP 429" in capsys.readouterr().out


def test_both_apps_answer_in_one_process() -> None:
    command = [sys.executable, "-m", "benchmarks.in_process", "--rounds", "1"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    cases = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))["cases"]
    assert cases.keys() == in_process.CASES.keys()
    for case, (_, _, tokens) in in_process.CASES.items():
        for app in ("router", "bare"):
            assert 1 <= cases[case][app]["events"] <= tokens + 3, "a role, the tokens, their number, an end"
