"""What becomes of requests when more come than engines can do, over HTTP only.

python -m benchmarks.overload                                # starts Groundswell, measures, stops it
python -m benchmarks.overload --url http://127.0.0.1:8000    # one that runs; with keys, name one in GROUNDSWELL_API_KEY

The pace of the engines is measured first, with as many clients as they take at once. Then requests arrive at random, at
that pace, at four times that pace, and at that pace again: an open loop, in which nobody waits for anybody.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import console
from benchmarks.client import WORDS
from benchmarks.servers import MODEL_NAME, ROOT, EngineSettings, Groundswell, ServerError, has_cuda_build, make_model
from benchmarks.servers import settings as engine_settings

DRAIN_LIMIT_S = 120.0
KEY_VARIABLE = "GROUNDSWELL_API_KEY"


@dataclass(frozen=True)
class Options:
    """What is sent.

    Attributes:
        url: The server, without `/v1`.
        capacity: Requests that its engines work on at once.
        tokens: Output tokens of each request.
        seconds: Length of each phase.
        times: How often the engines' pace comes in the phase of overload.
    """

    url: str
    model: str = MODEL_NAME
    capacity: int = 8
    tokens: int = 64
    seconds: float = 20.0
    times: float = 4.0


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        ttft_s: To the first text, of one that was let in and came back whole.
        retry_after_s: What it heard that was not let in.
        broken: What else went wrong.
    """

    ttft_s: float | None = None
    retry_after_s: float | None = None
    broken: str | None = None


@dataclass
class Phase:
    """What came of one phase.

    Attributes:
        rate: Requests a second that arrived.
        wall_s: From the first arrival to the last answer.
        ttft_s: Of those that were let in.
        retry_after_s: What those heard that were not.
        broken: What else went wrong, by reason: there should be nothing.
    """

    rate: float
    sent: int = 0
    wall_s: float = 0.0
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        """Output tokens a second of requests that came back whole."""
        return self.tokens / self.wall_s if self.wall_s else 0.0

    @property
    def rejected(self) -> float:
        return len(self.retry_after_s) / self.sent if self.sent else 0.0

    def count(self, answer: Answer, tokens: int) -> None:
        """Add a request's answer, of `tokens` tokens if it is one."""
        if answer.ttft_s is not None:
            self.ttft_s.append(answer.ttft_s)
            self.tokens += tokens
        elif answer.retry_after_s is not None:
            self.retry_after_s.append(answer.retry_after_s)
        else:
            self.broken[str(answer.broken)] += 1


async def measure(options: Options, say: Callable[[str], None], key: str | None = None) -> dict[str, Phase]:
    """Run all phases.

    Raises:
        ServerError: Requests failed while nothing was overloaded.
    """
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=DRAIN_LIMIT_S),
        headers={} if key is None else {"authorization": f"Bearer {key}"},
    ) as session:
        for _ in range(2):  # the first time warms everything up
            pace = await _pace(session, options)
        say(f"{pace:.1f} requests a second with {options.capacity} clients")
        phases = {}
        for name, times in (("1x", 1.0), (f"{options.times:g}x", options.times), ("1x after", 1.0)):
            phases[name] = await _phase(session, options, times * pace)
            say(f"{name}: {phases[name].sent} requests")
        return phases


async def _pace(session: aiohttp.ClientSession, options: Options) -> float:
    phase = Phase(0)
    started = time.perf_counter()

    async def client(number: int) -> None:
        for i in range(3):
            await _send(session, options, f"{number}/{i}/{started}", phase)

    await asyncio.gather(*(client(number) for number in range(options.capacity)))
    if phase.broken or phase.retry_after_s:
        raise ServerError(f"requests failed while nothing was overloaded: {phase.broken}")
    return phase.sent / (time.perf_counter() - started)


async def _phase(session: aiohttp.ClientSession, options: Options, rate: float) -> Phase:
    phase, rng, tasks = Phase(rate), random.Random(rate), []
    started = time.perf_counter()
    at = started
    while at - started < options.seconds:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(_send(session, options, f"{rate}/{len(tasks)}", phase)))
        at += rng.expovariate(rate)
    await asyncio.gather(*tasks)
    phase.wall_s = time.perf_counter() - started
    return phase


async def _send(session: aiohttp.ClientSession, options: Options, seed: str, phase: Phase) -> None:
    phase.sent += 1
    phase.count(await send(session, options.url, options.model, options.tokens, seed), options.tokens)


async def send(session: aiohttp.ClientSession, url: str, model: str, tokens: int, seed: str) -> Answer:
    """Ask for a streamed answer of exactly `tokens` tokens, with a prompt that `seed` draws."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": " ".join(random.Random(seed).choices(WORDS, k=40))}],
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    started = time.perf_counter()
    first, last = 0.0, b""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            if response.status == 429:
                await response.read()
                return Answer(retry_after_s=float(response.headers["retry-after"]))
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}")
            async for line in response.content:
                if line.startswith(b"data: "):
                    last = line
                    if not first and b'"content":"' in line and b'"content":""' not in line:
                        first = time.perf_counter()
        if last.strip() != b"data: [DONE]" or not first:
            raise ValueError(f"the stream ended with {last[:80]!r}")
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, OSError) as error:
        return Answer(broken=f"{type(error).__name__}: {error}"[:120])
    return Answer(ttft_s=first - started)


def percentile(values: list[float], share: float) -> float:
    """Return the value that `share` of them do not exceed; not a number without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def table(phases: dict[str, Phase]) -> str:
    """Return the phases as a table."""
    columns = {
        "req/s": 8,
        "goodput tok/s": 15,
        "rejected": 10,
        "TTFT p50": 10,
        "p99": 8,
        "retry-after": 13,
        "broken": 8,
    }
    lines = [f"{'load':<10}" + "".join(f"{name:>{width}}" for name, width in columns.items())]
    for name, phase in phases.items():
        p50, p99 = percentile(phase.ttft_s, 0.5), percentile(phase.ttft_s, 0.99)
        retry = percentile(phase.retry_after_s, 0.5)
        lines.append(
            f"{name:<10}{phase.rate:>8.1f}{phase.goodput:>15.0f}{phase.rejected:>10.0%}{p50:>8.2f} s{p99:>6.2f} s"
            f"{retry:>11.0f} s{sum(phase.broken.values()):>8}"
        )
    return "\n".join(lines)


def as_json(options: Options, phases: dict[str, Phase]) -> dict[str, Any]:
    """Return the same numbers for machines."""
    return {
        "capacity": options.capacity,
        "tokens": options.tokens,
        "phases": {
            name: {
                "rate": phase.rate,
                "sent": phase.sent,
                "goodput_tokens_per_s": phase.goodput,
                "rejected_share": phase.rejected,
                "ttft_p50_s": percentile(phase.ttft_s, 0.5),
                "ttft_p99_s": percentile(phase.ttft_s, 0.99),
                "retry_after_s": {str(k): n for k, n in sorted(Counter(phase.retry_after_s).items())},
                "broken": dict(phase.broken),
            }
            for name, phase in phases.items()
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if the server did not start, or a request was neither answered nor refused."""
    given = _parser().parse_args(arguments)
    console.stop_in_order()
    wanted = {"capacity": given.capacity, "tokens": given.tokens, "seconds": given.seconds, "times": given.times}
    try:
        if given.url:
            options = Options(given.url.rstrip("/"), given.model, **wanted)
            phases = asyncio.run(measure(options, console.say, given.key))
        else:
            options, phases = _started(wanted, given.max_queue_wait)
    except ServerError as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 1
    print(f"\n{table(phases)}")
    console.report(as_json(options, phases), given.json)
    return 1 if any(phase.broken for phase in phases.values()) else 0


def _started(wanted: dict[str, Any], max_queue_wait_s: float) -> tuple[Options, dict[str, Phase]]:
    model = ROOT / "models" / "tiny-random"
    make_model(model)
    base = engine_settings(model, gpu=has_cuda_build())
    settings = EngineSettings({**base.engine_args, "max_num_seqs": wanted["capacity"]}, base.environment)
    with tempfile.TemporaryDirectory(prefix="groundswell-bench-") as folder:
        server = Groundswell(settings, Path(folder), router={"max_queue_wait_s": max_queue_wait_s})
        try:
            server.start()
            console.say(f"ready after {server.startup_s:.0f} s")
            options = Options(server.url, **wanted)
            return options, asyncio.run(measure(options, console.say))
        finally:
            server.stop()


def _parser() -> argparse.ArgumentParser:
    defaults = Options("")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", help="a server that runs, in place of one that is started")
    parser.add_argument("--key", default=os.environ.get(KEY_VARIABLE), help=f"its API key, else ${KEY_VARIABLE}")
    parser.add_argument("--model", default=defaults.model)
    parser.add_argument("--capacity", type=int, default=defaults.capacity, help="requests its engines take at once")
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="output tokens of each request")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="length of each phase")
    parser.add_argument("--times", type=float, default=defaults.times, help="the overload, in paces of the engines")
    parser.add_argument("--max-queue-wait", type=float, default=2.0, help="`router.max_queue_wait_s` of the server")
    console.add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
