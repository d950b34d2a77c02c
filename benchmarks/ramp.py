"""How engines follow a load that rises and falls, from none and back to none: a table, a plot, one JSON line.

    make ramp                                             # starts Groundswell with real engines, none at first
    python -m benchmarks.ramp --autoscaling metrics_interval_s=10     # with another of Serve's options
    python -m benchmarks.ramp --ttft-target 1.0           # with a target of `models[].scaling`

One request wakes the first engine. Its pace is measured with as many clients as Serve aims at for one engine. Then
requests arrive at random, an open loop, in steps of that pace up and down again. When all is done the engines go, and
one request more wakes one again. Nothing is told to the server: what runs and should is read from what it prints. A run
that is stopped, or fails, prints and writes what it has seen by then.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks import console
from benchmarks.overload import Answer, Sent, all_whole, percentile, send
from benchmarks.servers import (
    MODEL_NAME,
    ROOT,
    EngineSettings,
    Groundswell,
    ServerError,
    has_cuda_build,
    make_model,
    while_served,
)
from benchmarks.servers import settings as engine_settings

STEPS: Final = (0.3, 0.6, 1.0, 1.4, 1.8, 1.8, 1.4, 1.0, 0.6, 0.3)
"""Offered load, in paces of one engine."""
LIMIT_S: Final = 240.0
"""What waiting for engines to come or go may take."""
RESULTS: Final = ROOT / "benchmarks" / "results"
_COUNTS = re.compile(rf"Engine-{MODEL_NAME} (\d+)/(\d+)")


@dataclass(frozen=True)
class Options:
    """What is sent.

    Attributes:
        capacity: Sequences one engine works on at once.
        engines: At most.
        tokens: Output tokens of each request.
        seconds: Length of each step.
        threads: Of each engine on CPUs.
        autoscaling: Serve's options other than the app's defaults.
        scaling: Targets of `models[].scaling`.
    """

    capacity: int = 8
    engines: int = 2
    tokens: int = 64
    seconds: float = 20.0
    threads: int = 1
    autoscaling: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Moment:
    """What held at one moment.

    Attributes:
        at_s: Seconds since the start.
        running: Engines that run.
        wanted: Engines there should be.
        ongoing: Requests that were sent and not answered.
    """

    at_s: float
    running: int
    wanted: int
    ongoing: int


@dataclass
class Ramp:
    """What came of it.

    Attributes:
        pace: Requests a second of one engine.
        steps: Begin, end and offered requests a second of each.
        from_zero_s: To the first token with no engine there: the first time, and after the last had gone.
        to_zero_s: From the last answer to the last engine's end.
    """

    pace: float = 0.0
    steps: list[tuple[float, float, float]] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    from_zero_s: list[float] = field(default_factory=list)
    to_zero_s: float = 0.0

    @property
    def broken(self) -> list[str]:
        return [sent.answer.broken for sent in self.sent if sent.answer.broken is not None]


def counts(log: str) -> tuple[int, int] | None:
    """Return how many engines run and how many should, by the last line that says so."""
    found = _COUNTS.findall(log)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


class Run:
    """One ramp against a server that has just started.

    Args:
        server: Which.
        options: What is sent.
        say: Hears how far it is.
        ramp: Filled as it goes.
    """

    def __init__(self, server: Groundswell, options: Options, say: Callable[[str], None], ramp: Ramp) -> None:
        self._server, self._options, self._say, self._ramp = server, options, say, ramp
        self._begin, self._ongoing = time.perf_counter(), 0

    async def run(self) -> None:
        """Run it all.

        Raises:
            ServerError: A request failed that had no load beside it, or engines without work did not go.
        """
        timeout = aiohttp.ClientTimeout(total=LIMIT_S)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
            self._watching(),
        ):
            await self._from_zero(session)
            await self._measure_pace(session)
            await self._up_and_down(session)
            await self._until_none()
            await self._from_zero(session)

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()

    async def _watch(self) -> None:
        while True:
            running, wanted = counts(self._server.log.read_text(errors="replace")) or (0, 0)
            self._ramp.moments.append(Moment(self._now, running, wanted, self._ongoing))
            await asyncio.sleep(0.5)

    @property
    def _now(self) -> float:
        return time.perf_counter() - self._begin

    async def _send(self, session: aiohttp.ClientSession, seed: str) -> Answer:
        at_s = self._now
        self._ongoing += 1
        answer = await send(session, self._server.url, MODEL_NAME, self._options.tokens, seed)
        self._ongoing -= 1
        self._ramp.sent.append(Sent(at_s, answer))
        return answer

    async def _from_zero(self, session: aiohttp.ClientSession) -> None:
        answer = await self._send(session, f"from zero {self._now}")
        all_whole([answer])
        assert answer.ttft_s is not None
        self._ramp.from_zero_s.append(answer.ttft_s)
        self._say(f"from zero: first token after {answer.ttft_s:.0f} s")

    async def _measure_pace(self, session: aiohttp.ClientSession) -> None:
        clients = max(1, math.floor(0.7 * self._options.capacity))
        for attempt in range(2):  # the first time warms everything up
            begin = self._now

            async def client(number: int, attempt: int = attempt) -> list[Answer]:
                return [await self._send(session, f"pace {attempt} {number} {i}") for i in range(4)]

            answers = await asyncio.gather(*map(client, range(clients)))
            all_whole(answer for each in answers for answer in each)
            self._ramp.pace = 4 * clients / (self._now - begin)
        self._say(f"one engine's pace: {self._ramp.pace:.1f} requests a second with {clients} clients")

    async def _up_and_down(self, session: aiohttp.ClientSession) -> None:
        rng, sent = random.Random(7), 0
        async with asyncio.TaskGroup() as tasks:
            for number, times in enumerate(STEPS):
                begin, rate = self._now, times * self._ramp.pace
                due = begin
                while due - begin < self._options.seconds:
                    await asyncio.sleep(max(0.0, due - self._now))
                    tasks.create_task(self._send(session, f"{number} {sent}"))
                    sent += 1
                    due += rng.expovariate(rate)
                self._ramp.steps.append((begin, self._now, rate))
                last = self._ramp.moments[-1]
                self._say(f"{times:g}x: {last.running} of {last.wanted} engines, {last.ongoing} requests ongoing")

    async def _until_none(self) -> None:
        begin = self._now
        while self._ramp.moments[-1].running > 0:
            if self._now - begin > LIMIT_S:
                raise ServerError("engines without work did not go")
            await asyncio.sleep(0.5)
        self._ramp.to_zero_s = self._now - begin
        self._say(f"no engine {self._ramp.to_zero_s:.0f} s after the last answer")


def rows(ramp: Ramp) -> list[dict[str, Any]]:
    """Return one row for each step: requests by when they were sent, engines as they were meanwhile."""
    made = []
    for begin, end, rate in ramp.steps:
        answers = [sent.answer for sent in ramp.sent if begin <= sent.at_s < end]
        moments = [moment for moment in ramp.moments if begin <= moment.at_s < end]
        ttft = [answer.ttft_s for answer in answers if answer.ttft_s is not None]
        made.append(
            {
                "offered_per_s": rate,
                "ongoing": sum(m.ongoing for m in moments) / max(1, len(moments)),
                "wanted": [min((m.wanted for m in moments), default=0), max((m.wanted for m in moments), default=0)],
                "running": [min((m.running for m in moments), default=0), max((m.running for m in moments), default=0)],
                "ttft_p50_s": percentile(ttft, 0.5),
                "ttft_p99_s": percentile(ttft, 0.99),
                "rejected_share": sum(a.retry_after_s is not None for a in answers) / max(1, len(answers)),
            }
        )
    return made


def table(ramp: Ramp) -> str:
    """Return the steps as a table."""
    lines = [f"{'req/s':>7}{'ongoing':>9}{'wanted':>8}{'running':>9}{'TTFT p50':>11}{'p99':>9}{'rejected':>10}"]
    for row in rows(ramp):
        wanted, running = (_span(row[name]) for name in ("wanted", "running"))
        lines.append(
            f"{row['offered_per_s']:>7.1f}{row['ongoing']:>9.1f}{wanted:>8}{running:>9}"
            f"{row['ttft_p50_s']:>9.2f} s{row['ttft_p99_s']:>7.2f} s{row['rejected_share']:>10.0%}"
        )
    waits = [f"{name} {s:.0f} s" for name, s in zip(("from zero", "again"), ramp.from_zero_s, strict=False)]
    lines.append(f"\n{', '.join(waits)}" + (f"; to zero {ramp.to_zero_s:.0f} s" if ramp.to_zero_s else ""))
    if ramp.broken:
        lines.append(f"{len(ramp.broken)} requests were neither answered nor refused, one by {ramp.broken[0]}")
    return "\n".join(lines)


def _span(bounds: Sequence[int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}-{high}"


def plot(ramp: Ramp, path: Path) -> None:
    """Write the whole run as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (load, engines, ttft, refused) = pyplot.subplots(
        4, 1, sharex=True, figsize=(10, 10), height_ratios=[3, 2, 3, 1.5], constrained_layout=True
    )
    times = [moment.at_s for moment in ramp.moments]
    for begin, end, rate in ramp.steps:
        load.plot([begin, end], [rate, rate], color="tab:blue", label="offered, requests/s" if rate else None)
    load.plot(
        times, [moment.ongoing for moment in ramp.moments], color="tab:gray", linewidth=1, label="ongoing requests"
    )
    engines.step(times, [moment.wanted for moment in ramp.moments], where="post", color="tab:orange", label="wanted")
    engines.step(times, [moment.running for moment in ramp.moments], where="post", color="tab:green", label="running")
    answered = [(sent.at_s, sent.answer.ttft_s) for sent in ramp.sent if sent.answer.ttft_s is not None]
    ttft.scatter(
        [at_s for at_s, _ in answered],
        [ttft_s for _, ttft_s in answered],
        s=4,
        color="tab:purple",
        label="time to the first token, s",
    )
    ttft.set_yscale("log")
    shares = rows(ramp)
    refused.bar(
        [begin for begin, _, _ in ramp.steps],
        [100 * row["rejected_share"] for row in shares],
        width=[end - begin for begin, end, _ in ramp.steps],
        align="edge",
        color="tab:red",
        label="refused, %",
    )
    engines.set_ylabel("engines")
    for axis in (load, engines, ttft, refused):
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(dict(zip(labels, handles, strict=True)).values(), dict(zip(labels, handles, strict=True)).keys())
        axis.grid(visible=True, alpha=0.3)
    refused.set_xlabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def as_json(options: Options, ramp: Ramp) -> dict[str, Any]:
    """Return the same numbers for machines."""
    return {
        **asdict(options),
        "pace_per_s": ramp.pace,
        "steps": rows(ramp),
        "from_zero_s": ramp.from_zero_s,
        "to_zero_s": ramp.to_zero_s,
        "broken": ramp.broken,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if the server did not start, or a request was neither answered nor refused."""
    given = _parser().parse_args(arguments)
    console.stop_in_order()
    targets = {"ttft_target_s": given.ttft_target, "queued_prompt_tokens": given.queued_prompt_tokens}
    scaling = {name: value for name, value in targets.items() if value is not None}
    options = Options(
        capacity=given.capacity,
        engines=given.engines,
        tokens=given.tokens,
        seconds=given.seconds,
        threads=given.threads,
        autoscaling=dict(given.autoscaling),
        scaling=scaling or None,
    )
    ramp = Ramp()
    with tempfile.TemporaryDirectory(prefix="groundswell-ramp-") as folder:
        server = _server(options, Path(folder))

        def work() -> None:
            console.say(f"ready after {server.startup_s:.0f} s, with no engine")
            asyncio.run(Run(server, options, console.say, ramp).run())

        def report() -> None:
            if ramp.sent:
                _report(options, ramp, given)

        ended = while_served("ramp", server, work, report)
    return ended or (1 if ramp.broken else 0)


def _report(options: Options, ramp: Ramp, given: argparse.Namespace) -> None:
    console.say(f"\n{table(ramp)}")
    console.report(as_json(options, ramp), given.json)
    sys.stdout.flush()
    plot(ramp, given.plot)
    console.say(f"\n{given.plot}")


def _server(options: Options, folder: Path) -> Groundswell:
    model = make_model()
    base = engine_settings(model, gpu=has_cuda_build())
    environment = {**base.environment, **({} if has_cuda_build() else {"OMP_NUM_THREADS": str(options.threads)})}
    return Groundswell(
        EngineSettings({**base.engine_args, "max_num_seqs": options.capacity}, environment),
        folder,
        engines=options.engines,
        autoscaling={"min_replicas": 0, **options.autoscaling},
        scaling=options.scaling,
    )


def _parser() -> argparse.ArgumentParser:
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ramp", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capacity", type=int, default=defaults.capacity, help="requests an engine takes at once")
    parser.add_argument("--engines", type=int, default=defaults.engines, help="at most")
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="output tokens of each request")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="length of each step")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="of each engine on CPUs")
    parser.add_argument(
        "--autoscaling", type=console.name_and_value, action="append", default=[], metavar="NAME=VALUE", help="Serve's"
    )
    parser.add_argument("--ttft-target", type=float, help="`scaling.ttft_target_s`")
    parser.add_argument("--queued-prompt-tokens", type=int, help="`scaling.queued_prompt_tokens`")
    parser.add_argument("--plot", type=Path, default=RESULTS / "ramp.local.png", help="where to write the picture")
    console.add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
