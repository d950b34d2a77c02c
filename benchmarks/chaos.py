"""What clients get when things break under load: two real engines, one Router, and a signal.

    python -m benchmarks.chaos                 # twenty losses of engines, one of the Router, and clients that hang up
    python -m benchmarks.chaos --quick         # each fault once
    python -m benchmarks.chaos --minutes 25    # no further fault that would not end by then

Every prompt is asked undisturbed first. Decoding is greedy, in float32 on CPUs: what a client gets through a fault must
be the same tokens and the same text. Where it is not, the engine is asked how likely it finds both tokens at the place
where the answers part: a continuation computes in one prefill what the first run computed token by token, so that last
bits differ, and a tie may fall the other way. Faults are signals to single processes, and some are none:

    actor     SIGKILL to the replica        its EngineCore and Worker die with it
    core      SIGKILL to EngineCore
    worker    SIGKILL to a Worker           where vLLM has given it a process of its own
    hang      SIGSTOP to EngineCore         work, and no step; noticed after `engine_stall_timeout_s`, 10 here
    silence   SIGSTOP to the replica        no heartbeat; noticed after `heartbeat_timeout_s`, 10 by default
    router    SIGKILL to the Router         its clients lose their connections, or get an HTTP error: nothing can spare
                                            them that
    queued    clients hang up whose requests wait for an engine, others' being worked on
    prefill   clients hang up while engines read their prompts
    decode    clients hang up while their answers come, streams and plain ones

Places of those who hang up should be free within `PROMISED_FREE_S`, and are seen to be up to `SEEN_LATE_S` later.

A fault's row is written when all of it has been seen. Whatever ends the run, the table of what was seen is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import math
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp
import psutil

from benchmarks import console
from benchmarks.client import WORDS
from benchmarks.replicas import cores, engines, routers, workers
from benchmarks.servers import (
    MODEL_NAME,
    EngineSettings,
    Groundswell,
    ServerError,
    has_cuda_build,
    make_model,
    settings,
    while_served,
)
from deployments.launch.environment import RUN_ID
from deployments.launch.processes import is_alive

ENGINES: Final = 2
TIE_NATS: Final = 1e-3
BACK_WITHIN_S: Final = 300.0
ANSWERED_WITHIN_S: Final = 240.0
FREE_WITHIN_S: Final = 60.0
SETTLED_S: Final = 3.0
"""Streams wait for an engine when engines are full, which half of them make so, or when none has begun for so long."""
PREFILL_TOKENS: Final = 256
"""Of prompts, in one step of an engine: long ones take several."""
LONG_WORDS: Final = 800
METRICS_LAG_S: Final = 30.0
"""Ray's endpoint shows a count within this: it is told every 10 s."""
LONGEST_METRICS_LAG_S: Final = 45.0
"""On cores that are busy."""
HEARTBEAT_S: Final = 0.1
VIEW_S: Final = 0.2
"""How old `/fleet` may be."""
LOOK_S: Final = 0.1
SEEN_LATE_S: Final = HEARTBEAT_S + VIEW_S + LOOK_S
PROMISED_FREE_S: Final = 1.0
"""Within which the place of a client that hung up is free."""
HANG_UPS: Final = ("queued", "prefill", "decode")
QUICK: Final = (*HANG_UPS, "actor", "core", "worker", "hang", "silence", "router")
"""Every fault once, so that a run that is stopped early has seen each kind."""
FULL: Final = (*QUICK, *HANG_UPS * 4, *("actor", "core", "worker") * 4, "actor", "hang", "silence")
LOSES_NO_ENGINE: Final = (*HANG_UPS, "router")


@dataclass
class Answer:
    """One request, as its client saw it.

    Attributes:
        tokens: Ids of the answer's tokens.
        text: Their text.
        usage: As the server counted them.
        times: When something of the answer arrived.
        status: HTTP's; 0 if none came.
        problem: Why it is not whole.
        hung_up: Whether its client left before the end.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    usage: int = 0
    times: list[float] = field(default_factory=list)
    status: int = 0
    problem: str | None = None
    hung_up: bool = False
    done: bool = False


@dataclass
class Row:
    """One kind of fault, over its injections. Rows add up: numbers by their sum, times (`_s`) by the longest.

    Attributes:
        injected: How often.
        left_out: How often not, for want of time.
        no_victim: How often not, for want of a process of that kind.
        in_flight: Requests under way at that moment, streams and plain ones; of clients that hang up, theirs alone.
        continued: Requests that went on at another engine, by the Router's count.
        restarted: Those that began again there.
        refused: Answered with an HTTP error.
        broken: Ended in an error event or a broken connection.
        tokens_off: Tokens missing, doubled or different in answers that claim to be whole.
        ties: Answers not counted there, which part at two tokens that the engine finds equally likely, within
            `TIE_NATS`.
        longest_pause_s: The longest time any client that got its answer waited for the next token.
        error_after_s: The longest time until a client was told that its stream is broken.
        free_after: Of each injection, seconds until `/fleet` showed that Router and engines held nothing for a client
            that had hung up: up to `SEEN_LATE_S` more than it took.
        whole_again_s: Until all engines, or the Router, were back.
    """

    injected: int = 0
    left_out: int = 0
    no_victim: int = 0
    in_flight: int = 0
    continued: int = 0
    restarted: int = 0
    refused: int = 0
    broken: int = 0
    tokens_off: int = 0
    ties: int = 0
    longest_pause_s: float = 0.0
    error_after_s: float = 0.0
    free_after: tuple[float, ...] = ()
    whole_again_s: float = 0.0

    def __add__(self, other: Row) -> Row:
        def total(name: str) -> Any:
            one, another = getattr(self, name), getattr(other, name)
            return max(one, another) if name.endswith("_s") else one + another

        return Row(**{each.name: total(each.name) for each in fields(Row)})


class NotBack(Exception):
    """Something that was broken did not come back."""


def prompts(number: int, seed: int, *, words: int = 30) -> list[str]:
    """Return prompts of which no two are the same."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(number)]


async def ask(session: aiohttp.ClientSession, url: str, prompt: str, tokens: int, stream: bool, answer: Answer) -> None:
    """Fill `answer` as it comes; whatever goes wrong is its `problem`."""
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "return_token_ids": True,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    answer.times.append(time.monotonic())
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            answer.status = response.status
            if response.status != 200:
                answer.problem = (await response.text())[:200]
                return
            if stream:
                await _read_events(response, answer)
            else:
                _take(await response.json(), answer)
    except asyncio.CancelledError:
        answer.hung_up = True
        raise
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
        answer.problem = f"{type(error).__name__}: {error}"  # the last of them: no answer of OpenAI's shape
    finally:
        answer.times.append(time.monotonic())
        answer.done = True


async def _read_events(response: aiohttp.ClientResponse, answer: Answer) -> None:
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        if line.strip() == b"data: [DONE]":
            return
        event = json.loads(line[5:])
        if "error" in event:
            answer.problem = event["error"]["message"]
            return
        answer.times.append(time.monotonic())
        _take(event, answer)
    answer.problem = "the stream ended without [DONE]"


def _take(event: dict[str, Any], answer: Answer) -> None:
    for choice in event["choices"]:
        answer.tokens += choice.get("token_ids") or []
        answer.text += choice.get("text") or ""
    if event.get("usage"):
        answer.usage = event["usage"]["completion_tokens"]


class HouseLike(Protocol):
    """What `run` needs of the server under test."""

    url: str

    def strike(self, fault: str) -> Strike | None:
        """Return what breaks one thing; None where there is none of its kind. Who it is takes a while to look up."""

    async def whole(self, since: float, lost: Sequence[psutil.Process] = ()) -> float:
        """Wait until those are gone and the Router knows all engines; return how long that took. Raises `NotBack`."""

    async def free(self, since: float, left: int = 0) -> float:
        """Wait until Router and engines have at most `left` requests; return how long that took. Raises `NotBack`."""

    def gap(self, prompt: str, said: Sequence[int], one: int, other: int) -> float:
        """Return how much likelier, in nats, the engine finds one token than another after a prompt and an answer."""

    def recovered(self) -> dict[str, int]:
        """Return how many requests were continued and restarted so far, by the Routers' own counts, each by name."""


class Strike(Protocol):
    """Breaks one thing when it is called, at once.

    Attributes:
        lost: All processes that end by it.
    """

    lost: Sequence[psutil.Process]

    def __call__(self) -> None:
        """Do it. Raises `NotBack` where there is nothing left to break."""

    def end(self) -> None:
        """End a process that was stopped: it would wake up, or be replaced after three health checks of 30 s."""


class Signal:
    """A strike at a process.

    Args:
        victim: The process it hits.
        number: The signal.
        lost: All that end by it.
    """

    def __init__(self, victim: psutil.Process, number: int, lost: Sequence[psutil.Process]) -> None:
        self._victim, self._number, self.lost = victim, number, lost

    def __call__(self) -> None:
        try:
            self._victim.send_signal(self._number)
        except psutil.NoSuchProcess:
            raise NotBack("what was to be broken had ended by itself") from None

    def end(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._victim.kill()


class House:
    """The server under test, and its processes."""

    def __init__(self, server: Groundswell, rng: random.Random) -> None:
        self.url, self._rng = server.url, rng
        ids: set[str] = set()
        for process in server.processes():
            with contextlib.suppress(psutil.Error):
                ids |= {process.environ().get(RUN_ID, "")} - {""}
        if not ids:
            raise ServerError("the processes of the server cannot be found")
        self.run_id = ids.pop()

    def strike(self, fault: str) -> Strike | None:
        candidates, number = {
            "actor": (engines, signal.SIGKILL),
            "core": (cores, signal.SIGKILL),
            "worker": (workers, signal.SIGKILL),
            "hang": (cores, signal.SIGSTOP),
            "silence": (engines, signal.SIGSTOP),
            "router": (routers, signal.SIGKILL),
        }[fault]
        found = candidates(self.run_id)
        if not found:
            return None
        victim = self._rng.choice(found)
        lost = [victim]
        with contextlib.suppress(psutil.Error):
            lost += [each for each in victim.parents() if any("ServeReplica:" in word for word in each.cmdline())]
        return Signal(victim, number, lost)

    async def whole(self, since: float, lost: Sequence[psutil.Process] = ()) -> float:
        while time.monotonic() - since < BACK_WITHIN_S:
            if not any(map(is_alive, lost)) and await asyncio.to_thread(self._engines) == ENGINES == len(
                cores(self.run_id)
            ):
                return time.monotonic() - since
            await asyncio.sleep(0.5)
        raise NotBack(f"not whole again within {BACK_WITHIN_S:.0f} s")

    async def free(self, since: float, left: int = 0) -> float:
        # What is told before may be from before.
        await asyncio.sleep(max(0.0, since + HEARTBEAT_S + VIEW_S - time.monotonic()))
        while time.monotonic() - since < FREE_WITHIN_S:
            (model,) = json.loads(await asyncio.to_thread(self._read, "/fleet"))["models"]
            if max(model["running"] + model["waiting"], model["this_router"]["in_flight"]) <= left:
                return time.monotonic() - since
            await asyncio.sleep(LOOK_S)
        raise NotBack(f"there is still work for clients that hung up {FREE_WITHIN_S:.0f} s ago")

    def _engines(self) -> int:
        try:
            return int(json.loads(self._read("/health", timeout_s=5))["replicas"][MODEL_NAME])
        except (NotBack, ValueError, KeyError):
            return 0

    def gap(self, prompt: str, said: Sequence[int], one: int, other: int) -> float:
        asked = self._post("/tokenize", {"model": MODEL_NAME, "prompt": prompt})["tokens"]
        body = {"prompt": [*asked, *said], "max_tokens": 1, "temperature": 0, "logprobs": 5}
        answer = self._post("/v1/completions", {**body, "model": MODEL_NAME, "return_tokens_as_token_ids": True})
        (likely,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        return likelier(likely, one, other)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return json.loads(self._read(path, json.dumps(body).encode(), timeout_s=60))

    def _read(self, path: str, body: bytes | None = None, *, timeout_s: float = 20) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return bytes(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise NotBack(f"{path} does not answer: {error}") from None

    def recovered(self) -> dict[str, int]:
        for _ in range(2):  # an exporter that is late, on busy cores, need not end everything
            with contextlib.suppress(NotBack):
                return counts(self._read("/metrics").decode())
            time.sleep(2)
        return counts(self._read("/metrics").decode())


def likelier(top: Mapping[str, float], one: int, other: int) -> float:
    """Return how many nats likelier one token is than another, by `top_logprobs`; not a number if neither is in it."""
    return top.get(f"token_id:{one}", -math.inf) - top.get(f"token_id:{other}", -math.inf)


def counts(exported: str) -> dict[str, int]:
    """Return the requests recovered so far, of each series in what Prometheus would read: a Router has its own."""
    found = {}
    for line in exported.splitlines():
        if line.startswith("ray_groundswell_fleet_recovered_requests_total{"):
            name, _, value = line.rpartition(" ")
            found[name] = int(float(value))
    return found


def gained(before: Mapping[str, int], now: Mapping[str, int], how: str) -> int:
    """Return how many requests were recovered in between in one way; what dead Routers had counted may have gone."""
    return sum(max(0, n - before.get(name, 0)) for name, n in now.items() if re.search(rf'how="{how}"', name))


async def load(
    url: str,
    asked: Sequence[str],
    tokens: int,
    plain: int,
    wait_for: int,
    then: Callable[[], None],
) -> tuple[list[Answer], list[Answer], float]:
    """Ask everything at once, the last `plain` prompts without streaming; call `then` when all streams have begun.

    Returns:
        All answers; those that were under way when `then` was called; that moment.
    """
    async with _asking(url, asked, tokens, plain) as (answers, jobs):
        await _begun(answers[: len(asked) - plain], wait_for)
        under_way = [answer for answer in answers if not answer.done]
        moment = time.monotonic()
        then()
        await asyncio.wait(jobs)
    return answers, under_way, moment


@asynccontextmanager
async def _asking(
    url: str, asked: Sequence[str], tokens: int, plain: int
) -> AsyncIterator[tuple[list[Answer], list[asyncio.Task[None]]]]:
    """Ask everything at once, the last `plain` prompts without streaming; who still waits in the end hangs up."""
    answers = [Answer() for _ in asked]
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=ANSWERED_WITHIN_S)
    ) as session:
        jobs = [
            asyncio.create_task(ask(session, url, prompt, tokens, i < len(asked) - plain, answer))
            for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True))
        ]
        try:
            yield answers, jobs
        finally:
            for job in jobs:
                job.cancel()
            ended = await asyncio.gather(*jobs, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, Exception):
                raise failure


async def _begun(streams: Sequence[Answer], tokens: int) -> None:
    """Wait until each stream has brought so many tokens, or is over."""
    while any(len(stream.tokens) < tokens and not stream.done for stream in streams):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def hang_up(house: HouseLike, place: str, asked: Sequence[str], tokens: int, plain: int) -> Row:
    """Have clients hang up whose requests are at one place, and see how soon nobody works for them.

    Args:
        house: The server, with room in its engines for all who ask here, and no more.
        place: One of `HANG_UPS`.
        asked: Their prompts.
        tokens: Of each answer.
        plain: How many of them do not stream.

    Raises:
        NotBack: Somebody is still worked for after `FREE_WITHIN_S`, or a request failed that nobody disturbed.
    """
    if place == "queued":  # engines take half of these at once
        asked, plain = [*asked, *asked] * ENGINES, 0
    elif place == "prefill":
        asked, tokens, plain = prompts(len(asked), seed=2, words=LONG_WORDS), min(tokens, LONG_WORDS), 0
    async with _asking(house.url, asked, tokens, plain) as (answers, jobs):
        streams = answers[: len(asked) - plain]
        if place == "queued":
            begun, since = 0, time.monotonic()
            while begun == 0 or (begun < len(streams) // 2 and time.monotonic() - since < SETTLED_S):
                await asyncio.sleep(0.01)
                now = sum(bool(stream.tokens) or stream.done for stream in streams)
                if now > begun:
                    begun, since = now, time.monotonic()
        elif place == "prefill":  # the first has been read: the next one is being read
            while not any(stream.tokens or stream.done for stream in streams):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        else:
            await _begun(streams, tokens // 20)
        leaving = [
            job for job, a in zip(jobs, answers, strict=True) if not a.done and not (place == "queued" and a.tokens)
        ]
        staying = sum(not job.done() for job in jobs) - len(leaving)
        moment = time.monotonic()
        for job in leaving:
            job.cancel()
        free_after_s = await house.free(moment, staying)
    failed = [answer.problem for answer in answers if answer.problem]
    if failed:
        raise NotBack(f"a request failed that nobody disturbed: {failed[0]}")
    await house.free(time.monotonic())
    return Row(injected=1, in_flight=len(leaving), free_after=(free_after_s,))


def judge(
    row: Row,
    answers: Sequence[Answer],
    undisturbed: Sequence[Answer],
    moment: float,
    gap: Callable[[int, int, int, int], float],
) -> None:
    """Add what clients got to a row.

    `gap(index, place, one, other)` returns how much likelier, in nats, the engine finds one token than another, behind
    the first `place` undisturbed tokens of the answer with that index.
    """
    for index, (answer, model) in enumerate(zip(answers, undisturbed, strict=True)):
        if answer.hung_up:
            continue
        if answer.status not in (0, 200):
            row.refused += 1
        elif answer.problem is not None:
            row.broken += 1
            row.error_after_s = max(row.error_after_s, answer.times[-1] - moment)
        else:
            place = parting(answer, model)
            whole = len(answer.tokens) == len(model.tokens) and answer.usage == model.usage
            if whole and place < len(model.tokens):
                tie = abs(gap(index, place, model.tokens[place], answer.tokens[place])) < TIE_NATS
                row.ties += tie
                row.tokens_off += 0 if tie else off(answer, model)
            else:
                row.tokens_off += off(answer, model)
            if len(answer.times) > 2:  # a plain answer comes at once, however long that takes
                pauses = [b - a for a, b in zip(answer.times, answer.times[1:], strict=False) if b > moment]
                row.longest_pause_s = max([row.longest_pause_s, *pauses])


def off(answer: Answer, model: Answer) -> int:
    """Return how many tokens of a whole answer are not as they were undisturbed, `usage` included.

    The same tokens with another text count as one.
    """
    wrong = max(len(answer.tokens), len(model.tokens)) - parting(answer, model) + abs(answer.usage - model.usage)
    return wrong or int(answer.text != model.text)


def parting(answer: Answer, model: Answer) -> int:
    """Return how many tokens two answers have in common at their beginning."""
    pairs = enumerate(zip(answer.tokens, model.tokens, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(answer.tokens), len(model.tokens)))


async def run(
    house: HouseLike,
    faults: Sequence[str],
    clients: int,
    tokens: int,
    say: Callable[[str], None],
    rows: dict[str, Row],
    *,
    until: float | None = None,
) -> None:
    """Ask undisturbed, then break one thing after the other, always under load and always from a whole house.

    What is found goes into `rows`, by fault, each injection when all of it has been seen. Faults that would not be over
    by `until` (of `time.monotonic`), if they take as long as the longest so far, are left out, and counted as that.
    """
    asked = prompts(clients, seed=1)
    plain = clients // 4
    await house.whole(time.monotonic())
    undisturbed, _, _ = await load(house.url, asked, tokens, plain, 0, lambda: None)
    again, _, _ = await load(house.url, asked, tokens, plain, 0, lambda: None)
    lost = [answer.problem for answer in [*undisturbed, *again] if answer.problem]
    if lost:
        raise NotBack(f"undisturbed requests failed: {lost[0]}")
    say(f"undisturbed, twice: {sum(off(a, b) for a, b in zip(again, undisturbed, strict=True))} tokens differ")
    longest_s = 0.0
    for number, fault in enumerate(faults, 1):
        started = time.monotonic()
        if until is not None and started + longest_s > until:
            say(f"{len(faults) - number + 1} faults are left out: there is no time for another")
            for left in faults[number - 1 :]:
                rows[left] = rows.get(left, Row()) + Row(left_out=1)
            return
        if fault in HANG_UPS:
            row = await hang_up(house, fault, asked, tokens, plain)
            rows[fault] = rows.get(fault, Row()) + row
            say(f"{number:3} of {len(faults)}  {fault:8} {_brief(row)}")
            continue
        strike = house.strike(fault)
        if strike is None:
            say(f"{number:3} of {len(faults)}  {fault:8} left out: there is no such process here")
            rows[fault] = rows.get(fault, Row()) + Row(no_victim=1)
            continue
        before = await asyncio.to_thread(house.recovered)
        answers, under_way, moment = await load(house.url, asked, tokens, plain, tokens // 20, strike)
        ended = time.monotonic()
        row = Row(injected=1, in_flight=len(under_way))
        if fault == "silence":
            strike.end()
        row.whole_again_s = await house.whole(moment, strike.lost)

        def gap(index: int, place: int, one: int, other: int) -> float:
            nats = house.gap(asked[index], undisturbed[index].tokens[:place], one, other)
            say(f"answer {index} parts after {place} tokens, where the two tokens are {nats:.6f} nats apart")
            return nats

        judge(row, answers, undisturbed, moment, gap)
        if fault not in LOSES_NO_ENGINE:
            row.continued, row.restarted = await _moved(house, before, ended)
        rows[fault] = rows.get(fault, Row()) + row
        problems = [answer.problem for answer in answers if answer.problem]
        longest_s = max(longest_s, time.monotonic() - started)
        say(f"{number:3} of {len(faults)}  {fault:8} {_brief(row)} {problems[:1] or ''}")


async def _moved(house: HouseLike, before: Mapping[str, int], ended: float) -> tuple[int, int]:
    """Return the requests continued and restarted since `before` was read, once Ray's endpoint must know them.

    After the last answer, which came when it `ended`, nothing is counted any more.
    """
    while True:
        await asyncio.sleep(max(METRICS_LAG_S - (time.monotonic() - ended), METRICS_LAG_S / 15))
        now = await asyncio.to_thread(house.recovered)
        moved = gained(before, now, "continued"), gained(before, now, "restarted")
        if any(moved) or time.monotonic() - ended > LONGEST_METRICS_LAG_S:
            return moved


def _brief(row: Row) -> str:
    def shown(value: float | tuple[float, ...]) -> str:
        return str(value) if isinstance(value, int) else f"{value if isinstance(value, float) else max(value):.1f} s"

    return ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {shown(value)}"
        for name, value in asdict(row).items()
        if value and name != "injected"
    )


def table(rows: dict[str, Row]) -> str:
    """Return the rows as Markdown."""
    head = (
        "| fault | injected | left out | in flight | continued | restarted | refused | broken | tokens off | ties "
        "| longest pause, s | error after, s | free after, s: p50, max | whole again, s |\n" + "|---" * 14 + "|"
    )
    lines = [
        f"| {fault} | {r.injected} | {r.left_out + r.no_victim} | {r.in_flight} | {_counted(fault, r.continued)} "
        f"| {_counted(fault, r.restarted)} | {r.refused} | {r.broken} | {r.tokens_off} | {r.ties} "
        f"| {_seconds(r.longest_pause_s)} | {_seconds(r.error_after_s)} | {_spread(r.free_after)} "
        f"| {_seconds(r.whole_again_s, '.0f')} |"
        for fault, r in rows.items()
    ]
    return "\n".join([head, *lines])


def _counted(fault: str, number: int) -> str:
    return "" if fault in LOSES_NO_ENGINE else str(number)


def _seconds(value: float, form: str = ".1f") -> str:
    return format(value, form) if value else ""


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}, {max(values):.1f}" if values else ""


def good(rows: dict[str, Row]) -> bool:
    """Whether there is something to see, and nothing was lost but what a Router's death must lose.

    Nor was the place of a client that hung up kept too long. A fault that hit nobody's request shows nothing, and is
    not good either; nor is one that found nothing to break. Want of time excuses a fault: somebody has set the time.
    """
    return any(row.injected for row in rows.values()) and all(
        row.no_victim == 0 and (_endured(fault, row) if row.injected else row.left_out > 0)
        for fault, row in rows.items()
    )


def _endured(fault: str, row: Row) -> bool:
    return (
        row.tokens_off == 0
        and (row.refused == row.broken == 0 or fault == "router")
        and row.in_flight > 0
        and (fault in LOSES_NO_ENGINE or row.continued + row.restarted > 0)
        and max(row.free_after, default=0.0) <= PROMISED_FREE_S + SEEN_LATE_S
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if it was not `good`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Break things under load.")
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--faults", help="which, separated by commas")
    parser.add_argument("--clients", type=int, default=16, help="requests at once, a quarter of them without streaming")
    parser.add_argument("--tokens", type=int, default=1200, help="of each answer")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of victims")
    parser.add_argument(
        "--minutes", type=float, help="leave out faults that would not end within so many, start included"
    )
    console.add_json(parser)
    given = parser.parse_args(arguments)
    faults = tuple(given.faults.split(",")) if given.faults else QUICK if given.quick else FULL
    if unknown := set(faults) - set(FULL):
        parser.error(f"there is no fault {sorted(unknown)[0]!r}; there are {', '.join(QUICK)}")
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    console.stop_in_order()
    model = make_model()
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="groundswell-chaos-") as folder:
        base = settings(model, gpu=has_cuda_build())
        # So narrow that requests queue and prompts take steps; with a Worker to kill, which a single one would not be.
        narrow = {"max_num_seqs": given.clients, "max_num_batched_tokens": PREFILL_TOKENS}
        server = Groundswell(
            EngineSettings({**base.engine_args, **narrow, "distributed_executor_backend": "mp"}, base.environment),
            Path(folder),
            engines=ENGINES,
            fleet={"engine_stall_timeout_s": 10, "heartbeat_interval_s": HEARTBEAT_S},
            router={"max_queue_wait_s": ANSWERED_WITHIN_S},
        )

        def work() -> None:
            console.say(f"ready after {server.startup_s:.0f} s")
            house = House(server, random.Random(given.seed))
            asyncio.run(run(house, faults, given.clients, given.tokens, console.say, rows, until=until))

        def report() -> None:
            if rows:
                console.say(f"\n{table(rows)}")
                console.report({fault: asdict(row) for fault, row in rows.items()}, given.json)
                sys.stdout.flush()

        ended = while_served("chaos", server, work, report, (ServerError, NotBack))
    return ended or (0 if good(rows) else 1)


if __name__ == "__main__":
    sys.exit(main())
