"""What becomes of requests when more come than engines can do, over HTTP only.

python -m benchmarks.overload                                # starts Groundswell, measures, stops it
python -m benchmarks.overload --url http://127.0.0.1:8000    # one that runs; with keys, name one in GROUNDSWELL_API_KEY

The pace of the engines is measured first, with as many clients as they take at once. Then requests arrive at random,
first at a part of that pace, then at all of it, at four times it, and at that part again: an open loop, in which
nobody waits for anybody, and without a break, so that the last phase begins with the queue that the overload has left.
Whatever ends the run, what was seen until then is printed.

Each phase's numbers are of the requests that were sent in it. Its goodput is what came in it of answers that came back
whole, whenever they were asked for. The Router's memory is seen where it runs on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil
import uvloop

from benchmarks import console
from benchmarks.client import WORDS, RequestFailed, go_first, usage_at_end
from benchmarks.memory import NoRouter, routers
from benchmarks.servers import MODEL_NAME, EngineSettings, Groundswell, ServerError, has_cuda_build, make_model
from benchmarks.servers import settings as engine_settings

DRAIN_LIMIT_S: Final = 120.0
SAMPLES_S: Final = 0.5
NORMAL_FOR_S: Final = 3.0
"""Of that many seconds' requests all must be let in, and most as fast as before, for all to be normal again."""
STEP_S: Final = 0.5
KEY_VARIABLE: Final = "GROUNDSWELL_API_KEY"


@dataclass(frozen=True)
class Options:
    """What is sent.

    Attributes:
        url: The server, without `/v1`.
        capacity: Requests that its engines work on at once.
        tokens: Output tokens of each request.
        seconds: Length of each phase.
        usual: The load before and after, in paces of the engines. Less than one: at their very pace a queue stays.
        times: The overload, likewise.
    """

    url: str
    model: str = MODEL_NAME
    capacity: int = 8
    tokens: int = 64
    seconds: float = 20.0
    usual: float = 0.7
    times: float = 4.0

    @property
    def loads(self) -> dict[str, float]:
        """The phases by name, in paces of the engines."""
        usual = f"{self.usual:g}x"
        return {usual: self.usual, "1x": 1.0, f"{self.times:g}x": self.times, f"{usual} after": self.usual}


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        ttft_s: To the first text, of one that was let in and came back whole.
        tpot_s: From there to the last text, by each token after the first.
        retry_after_s: What it heard that was not let in: before any stream began, or it is broken.
        broken: What else went wrong.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    retry_after_s: float | None = None
    broken: str | None = None


@dataclass(frozen=True)
class Sent:
    """One request.

    Attributes:
        at_s: When it was sent.
        answer: What came of it.
        tokens: Of its answer, if that is whole.
    """

    at_s: float
    answer: Answer
    tokens: int = 1

    def tokens_within(self, begin_s: float, end_s: float) -> float:
        """Return how many tokens came between two moments, as if they had come evenly from the first to the last."""
        if self.answer.ttft_s is None:
            return 0.0
        first_s, gap_s = self.at_s + self.answer.ttft_s, self.answer.tpot_s or 0.0
        last_s = first_s + gap_s * (self.tokens - 1)
        if last_s <= first_s:
            return float(self.tokens) if begin_s <= first_s < end_s else 0.0
        return self.tokens * max(0.0, min(end_s, last_s) - max(begin_s, first_s)) / (last_s - first_s)


@dataclass(frozen=True)
class Phase:
    """When requests arrived at one rate.

    Attributes:
        rate: Requests a second that arrived.
    """

    rate: float
    begin_s: float
    end_s: float

    def holds(self, at_s: float) -> bool:
        return self.begin_s <= at_s < self.end_s


@dataclass
class Measured:
    """What was seen so far. All moments are seconds of one clock.

    Attributes:
        pace: Requests a second that engines finish with as many clients as they take; 0 until it is known.
        phases: By name; the last one may be cut short.
        sent: All requests of those that have been answered, refused or broken off.
        rss_bytes: Moments, and the Routers' resident memory then; empty where it cannot be seen.
        whole: Whether the run came to its end.
    """

    pace: float = 0.0
    phases: dict[str, Phase] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)
    whole: bool = False

    @property
    def broken(self) -> Counter[str]:
        return Counter(sent.answer.broken for sent in self.sent if sent.answer.broken is not None)


async def measure(
    options: Options,
    say: Callable[[str], None],
    measured: Measured,
    *,
    rss: Callable[[], int | None] = lambda: None,
    key: str | None = None,
) -> None:
    """Run all phases; what is seen goes into `measured` as it comes. `rss` returns the Routers' resident bytes now."""
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=DRAIN_LIMIT_S),
            headers={} if key is None else {"authorization": f"Bearer {key}"},
        ) as session,
        _watching(measured, rss),
    ):
        for _ in range(2):  # the first time warms everything up
            measured.pace = await _pace(session, options)
        say(f"{measured.pace:.1f} requests a second with {options.capacity} clients")
        await _phases(session, options, say, measured)
    measured.whole = True


async def _phases(
    session: aiohttp.ClientSession, options: Options, say: Callable[[str], None], measured: Measured
) -> None:
    async with asyncio.TaskGroup() as requests:

        async def one(seed: str) -> None:
            at_s = time.perf_counter()
            answer = await send(session, options.url, options.model, options.tokens, seed)
            measured.sent.append(Sent(at_s, answer, options.tokens))

        for name, times in options.loads.items():
            rng, rate = random.Random(name), times * measured.pace
            begin_s = due_s = time.perf_counter()
            end_s = begin_s + options.seconds
            measured.phases[name] = Phase(rate, begin_s, end_s)
            while due_s < end_s:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                requests.create_task(one(f"{name}/{due_s}"))
                due_s += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, end_s - time.perf_counter()))
            say(f"{name}: {sum(measured.phases[name].holds(sent.at_s) for sent in measured.sent)} requests are over")


@asynccontextmanager
async def _watching(measured: Measured, rss: Callable[[], int | None]) -> AsyncIterator[None]:
    """Look at the Routers' memory from now on, and once more at the end; cut a phase that did not come to its end."""

    def look() -> bool:
        seen = rss()
        if seen is not None:
            measured.rss_bytes.append((time.perf_counter(), seen))
        return seen is not None

    async def watch() -> None:
        while look():  # noqa: ASYNC110
            await asyncio.sleep(SAMPLES_S)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        look()
        now_s = time.perf_counter()
        measured.phases |= {n: replace(p, end_s=min(p.end_s, now_s)) for n, p in measured.phases.items()}


async def _pace(session: aiohttp.ClientSession, options: Options) -> float:
    started = time.perf_counter()

    async def client(number: int) -> list[Answer]:
        seeds = [f"{number}/{i}/{started}" for i in range(3)]
        return [await send(session, options.url, options.model, options.tokens, seed) for seed in seeds]

    answers = [a for each in await asyncio.gather(*map(client, range(options.capacity))) for a in each]
    all_whole(answers)
    return len(answers) / (time.perf_counter() - started)


def all_whole(answers: Iterable[Answer]) -> None:
    """Raise `ServerError` unless all of these came back whole."""
    lost = [answer.broken or "refused" for answer in answers if answer.ttft_s is None]
    if lost:
        raise ServerError(f"requests failed while nothing was overloaded: {lost[0]}")


async def send(session: aiohttp.ClientSession, url: str, model: str, tokens: int, seed: str) -> Answer:
    """Ask for a streamed answer of exactly `tokens` tokens, with a prompt that `seed` draws."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": " ".join(random.Random(seed).choices(WORDS, k=40))}],
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first_s = last_s = 0.0
    before, last = b"", b""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            if response.status == 429:
                await response.read()
                return Answer(retry_after_s=_retry_after(response))
            if response.status != 200:
                raise ValueError(f"HTTP {response.status} {(await response.text())[:80]}")
            async for line in response.content:
                if line.startswith(b"data: "):
                    before, last = last, line.strip()
                    if line.startswith(b'data: {"error"'):
                        raise ValueError(f"a stream that had begun ended in {line[6:]!r}")
                    if b'"content":"' in line and b'"content":""' not in line:
                        last_s = time.perf_counter()
                        first_s = first_s or last_s
        usage_at_end(before, last, tokens)
        if not first_s:
            raise RequestFailed("an answer without text")
    except (aiohttp.ClientError, TimeoutError, RequestFailed, ValueError, OSError) as error:
        return Answer(broken=f"{type(error).__name__}: {error}"[:160])
    return Answer(first_s - started, (last_s - first_s) / (tokens - 1) if tokens > 1 else 0.0)


def _retry_after(response: aiohttp.ClientResponse) -> float:
    try:
        return float(response.headers["retry-after"])
    except (KeyError, ValueError):
        raise ValueError("HTTP 429 without a Retry-After in seconds") from None


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of them do not exceed; not a number without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _percentile(values: Sequence[float], share: float) -> float | None:
    """Return the same, for JSON, which knows no such number."""
    return percentile(values, share) if values else None


def rows(measured: Measured) -> dict[str, dict[str, Any]]:
    """Return one row for each phase."""
    made: dict[str, dict[str, Any]] = {}
    for name, phase in measured.phases.items():
        answers = [sent.answer for sent in measured.sent if phase.holds(sent.at_s)]
        ttft = [answer.ttft_s for answer in answers if answer.ttft_s is not None]
        tpot = [answer.tpot_s for answer in answers if answer.tpot_s is not None]
        retry = [answer.retry_after_s for answer in answers if answer.retry_after_s is not None]
        rss = [rss for at_s, rss in measured.rss_bytes if phase.holds(at_s)]
        tokens = sum(sent.tokens_within(phase.begin_s, phase.end_s) for sent in measured.sent)
        made[name] = {
            "offered_per_s": phase.rate,
            "sent": len(answers),
            "goodput_tokens_per_s": tokens / max(SAMPLES_S, phase.end_s - phase.begin_s),
            "refused": len(retry),
            "broken": sum(answer.broken is not None for answer in answers),
            "ttft_p50_s": _percentile(ttft, 0.5),
            "ttft_p99_s": _percentile(ttft, 0.99),
            "tpot_p50_s": _percentile(tpot, 0.5),
            "tpot_p99_s": _percentile(tpot, 0.99),
            "retry_after_p50_s": _percentile(retry, 0.5),
            "router_rss_mb": max(rss) / 1e6 if rss else None,
        }
    peak = max((row["goodput_tokens_per_s"] for row in made.values()), default=0.0)
    for row in made.values():
        row["share_of_peak"] = row["goodput_tokens_per_s"] / peak if peak else None
    return made


def normal_after_s(sent: Sequence[Sent], before: Phase, after: Phase) -> float | None:
    """Return how long after an overload all was as before it; None if it was not while that could be seen.

    It is where of the next `NORMAL_FOR_S` seconds' requests each was let in, and half of them had their first text no
    later than all but the slowest twentieth of those before the overload.

    Args:
        sent: All requests.
        before: A phase of the same load.
        after: The phase that begins when the overload ends.
    """
    usual_s = percentile([s.answer.ttft_s for s in sent if before.holds(s.at_s) and s.answer.ttft_s is not None], 0.95)
    for step in range(int((after.end_s - after.begin_s - NORMAL_FOR_S) / STEP_S) + 1):
        begin_s = after.begin_s + step * STEP_S
        ttft = [s.answer.ttft_s for s in sent if begin_s <= s.at_s < begin_s + NORMAL_FOR_S]
        let_in = [each for each in ttft if each is not None]
        if let_in and len(let_in) == len(ttft) and percentile(let_in, 0.5) <= usual_s:
            return step * STEP_S
    return None


def table(options: Options, measured: Measured) -> str:
    """Return the phases as Markdown, and what was promised of them."""
    head = (
        "| load | requests/s | goodput, tokens/s | of its peak | refused | Retry-After, s | broken "
        "| TTFT p50, s | p99, s | TPOT p50, ms | p99, ms | Router, MB |\n" + "|---" * 12 + "|"
    )
    lines = []
    for name, row in rows(measured).items():
        cells = [
            name,
            f"{row['offered_per_s']:.1f}",
            f"{row['goodput_tokens_per_s']:.0f}",
            _shown(row["share_of_peak"], ".0%"),
            f"{row['refused'] / max(1, row['sent']):.0%}",
            _shown(row["retry_after_p50_s"], ".0f"),
            str(row["broken"]),
            *(_shown(row[f"ttft_{which}_s"], ".2f") for which in ("p50", "p99")),
            *(_shown(row[f"tpot_{which}_s"], ".1f", 1e3) for which in ("p50", "p99")),
            _shown(row["router_rss_mb"], ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, *lines, "", *_promises(options, measured)])


def _shown(value: float | None, form: str, times: float = 1.0) -> str:
    return "" if value is None else format(times * value, form)


def promised(options: Options, measured: Measured) -> dict[str, Any]:
    """Return what was promised of an overload: each as it was seen, None where it was not.

    The Routers' memory is that before the overload, the largest from its beginning on, and that when all was over.
    """
    usual, _, over, after = options.loads
    phases, by_phase = measured.phases, rows(measured)
    rss = measured.rss_bytes
    back_s = normal_after_s(measured.sent, phases[usual], phases[after]) if after in phases else None
    before = [b / 1e6 for at_s, b in rss if over not in phases or at_s < phases[over].begin_s]
    since = [b / 1e6 for at_s, b in rss if over in phases and at_s >= phases[over].begin_s]
    return {
        "share_of_peak": by_phase[over]["share_of_peak"] if over in by_phase else None,
        "normal_after_s": back_s,
        "refused_before_any_stream": sum(sent.answer.retry_after_s is not None for sent in measured.sent),
        "broken": dict(measured.broken),
        "router_rss_mb": {
            "before": max(before, default=None),
            "most": max(since, default=None),
            "end": since[-1] if since else None,
        },
    }


def _promises(options: Options, measured: Measured) -> list[str]:
    seen = promised(options, measured)
    rss = {name: _shown(mb, ".0f") or "?" for name, mb in seen["router_rss_mb"].items()}
    back_s, broken = seen["normal_after_s"], seen["broken"]
    back = "not while it was looked" if back_s is None else f"{back_s:.1f} s after the overload"
    return [
        f"goodput in overload  {_shown(seen['share_of_peak'], '.0%') or '?'} of its peak",
        f"refused              {seen['refused_before_any_stream']}, before any stream began and with Retry-After",
        f"broken               {sum(broken.values())} {broken or ''}".rstrip(),
        f"all as before        {back}",
        f"the Router's memory  {rss['before']} MB before, {rss['most']} MB at most, {rss['end']} MB when all was over",
    ]


def as_json(options: Options, measured: Measured) -> dict[str, Any]:
    """Return the same numbers for machines."""
    return {
        "benchmark": "overload",
        **asdict(options),
        "whole": measured.whole,
        "pace_per_s": measured.pace,
        "phases": rows(measured),
        **promised(options, measured),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if it did not come to its end, or a request was neither answered nor refused.

    A refusal counts as one only where it came before any stream, as a 429 with a Retry-After.
    """
    given = _parser().parse_args(arguments)
    console.stop_in_order()
    options = Options(
        (given.url or "").rstrip("/"),
        given.model,
        capacity=given.capacity,
        tokens=given.tokens,
        seconds=given.seconds,
        usual=given.usual,
        times=given.times,
    )
    measured = Measured()
    try:
        if given.url:
            _run(options, measured, given.key)
        else:
            _started(options, given.max_queue_wait, measured)
    except ServerError as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        print("benchmarks: stopped", file=sys.stderr)
    finally:
        if measured.phases:
            print(f"\n{table(options, measured)}")
            console.report(as_json(options, measured), given.json)
            sys.stdout.flush()
    return 0 if measured.whole and not measured.broken else 1


def _started(options: Options, max_queue_wait_s: float, measured: Measured) -> None:
    model = make_model()
    base = engine_settings(model, gpu=has_cuda_build())
    settings = EngineSettings({**base.engine_args, "max_num_seqs": options.capacity}, base.environment)
    with tempfile.TemporaryDirectory(prefix="groundswell-bench-") as folder:
        server = Groundswell(settings, Path(folder), router={"max_queue_wait_s": max_queue_wait_s})
        try:
            server.start()
            console.say(f"ready after {server.startup_s:.0f} s")
            _run(replace(options, url=server.url, model=MODEL_NAME), measured)
        finally:
            server.stop()


def _run(options: Options, measured: Measured, key: str | None = None) -> None:
    go_first()
    uvloop.run(measure(options, console.say, measured, rss=routers_rss(options.url), key=key))


def routers_rss(url: str) -> Callable[[], int | None]:
    """Return what returns the resident bytes of the Routers behind `url`, or None where they are not to be seen."""
    try:
        found = routers(url)
    except NoRouter:
        return lambda: None

    def rss() -> int | None:
        try:
            return sum(router.memory_info().rss for router in found)
        except psutil.Error:  # one of them has ended
            return None

    return rss


def _parser() -> argparse.ArgumentParser:
    defaults = Options("")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", help="a server that runs, in place of one that is started")
    parser.add_argument("--key", default=os.environ.get(KEY_VARIABLE), help=f"its API key, else ${KEY_VARIABLE}")
    parser.add_argument("--model", default=defaults.model)
    parser.add_argument("--capacity", type=int, default=defaults.capacity, help="requests its engines take at once")
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="output tokens of each request")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="length of each phase")
    parser.add_argument("--usual", type=float, default=defaults.usual, help="the load before and after, in paces")
    parser.add_argument("--times", type=float, default=defaults.times, help="the overload, in paces of the engines")
    parser.add_argument("--max-queue-wait", type=float, default=2.0, help="`router.max_queue_wait_s` of the server")
    console.add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
