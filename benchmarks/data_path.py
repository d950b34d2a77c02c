"""What the data path costs without engines: every token is a STUB's invention, everything above EngineCore is real.

    python -m benchmarks.data_path            # the token channel alone; the Router against vLLM's own app
    python -m benchmarks.data_path --serve    # and the Router on Ray Serve, as `make serve` runs it

Both sides stand on the same stub of EngineCore (`benchmarks.stubs.core`), under vLLM's own `AsyncLLM`: in the bare
server's process, and in an Engine's, from where tokens go through the token channel to the Router. A step takes
`--step` seconds and gives each running request a token. The sides take turns; the figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import console
from benchmarks.client import Load, Result
from benchmarks.compare import quantile, send
from benchmarks.servers import MODEL_NAME, ROOT, BareVllm, EngineSettings, Groundswell, Server, ServerError, make_model
from benchmarks.stubs.core import STEP_S
from benchmarks.usage import Meter
from deployments.config import MAX_NUM_SEQS

CHANNEL: Final = 32, 128, 100
"""Streams, deltas of each, and how often."""


@dataclass(frozen=True)
class Case:
    """One load.

    Attributes:
        title: For people.
        clients: Requests in flight.
        requests: Of each client.
        tokens: Of each request.
    """

    title: str
    clients: int
    requests: int
    tokens: int


CASES: Final[Mapping[str, Case]] = {
    "one": Case("1 client, 1 token", 1, 100, 1),
    "short": Case("32 clients, 1 token", 32, 20, 1),
    "chat": Case("32 clients, 128 tokens", 32, 4, 128),
    "full": Case("128 clients, 128 tokens", 128, 2, 128),
}


@dataclass
class Numbers:
    """All rounds of one case on one side."""

    results: list[Result] = field(default_factory=list)
    cpu_s: list[dict[str, float]] = field(default_factory=list)

    def median(self, value: Callable[[Result], float]) -> float:
        return statistics.median(map(value, self.results))

    def ttft_s(self, percentile: int) -> float:
        return quantile([value for r in self.results for value in r.ttft_s], percentile)

    @property
    def not_whole(self) -> int:
        """Requests that did not come back whole: nothing here may be refused either."""
        return sum(r.not_whole for r in self.results)

    def cpu_us(self, per: Callable[[Result], int]) -> dict[str, float]:
        """Return microseconds of each process for each of something."""
        names = sorted({name for spent in self.cpu_s for name in spent})
        both = list(zip(self.results, self.cpu_s, strict=True))
        return {n: 1e6 * statistics.median(spent.get(n, 0.0) / max(1, per(r)) for r, spent in both) for n in names}

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(self.median(lambda r: r.tokens / r.wall_s), 1),
            "events_per_s": round(self.median(lambda r: r.events / r.wall_s), 1),
            "requests_per_s": round(self.median(lambda r: r.completed / r.wall_s), 1),
            "ttft_p50_ms": round(1000 * self.ttft_s(50), 2),
            "ttft_p99_ms": round(1000 * self.ttft_s(99), 2),
            "not_whole": self.not_whole,
            "cpu_us_per_token": {k: round(v, 2) for k, v in self.cpu_us(lambda r: r.tokens).items() if v >= 0.01},
        }


class StubbedBare(BareVllm):
    """vLLM's own server around a stub core."""

    def command(self, port: int) -> list[str]:
        python, _, _, *flags = super().command(port)
        return [python, "-m", "benchmarks.stubs", "bare", *flags]


class StubbedRouter(Server):
    """The Router under uvicorn, the Engine in a process of its own, and no Ray."""

    name = "router"

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "benchmarks.stubs", "router", str(self.settings.engine_args["model"]), str(port)]


class StubbedServe(Groundswell):
    """The app as `make serve` runs it, but for what is under its Engines."""

    name = "router on Serve"

    def config(self, port: int) -> dict[str, Any]:
        config = super().config(port)
        (app,) = config["applications"]
        app |= {"import_path": "benchmarks.stubs.app:build", "args": {"app": app["args"]}}
        return config


def settings(step_s: float) -> EngineSettings:
    """Return what both sides' engines have in common."""
    model = make_model()
    args = {
        "model": str(model),
        "served_model_name": MODEL_NAME,
        "max_model_len": 2048,
        "max_num_seqs": MAX_NUM_SEQS,
        "dtype": "float32",
    }
    return EngineSettings(args, {STEP_S: str(step_s)})


def channel(step_s: float) -> float:
    """Return deltas per second from a stub engine, as fast as it can, to the Fleet of another process."""
    command = [sys.executable, "-m", "benchmarks.stubs", "channel", str(make_model()), *map(str, CHANNEL)]
    environment = {**os.environ, STEP_S: str(step_s), "PYTHONPATH": str(ROOT)}
    quiet = subprocess.DEVNULL
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, stderr=quiet)
    numbers = json.loads(done.stdout)
    return float(numbers["deltas"] / numbers["wall_s"])


def run(
    sides: list[type[Server]], cases: list[str], rounds: int, step_s: float, say: Callable[[str], None]
) -> dict[str, dict[str, Numbers]]:
    """Start all sides, load them in turns, stop them; return numbers by side and case."""
    shared = settings(step_s)
    with tempfile.TemporaryDirectory(prefix="groundswell-bench-") as folder:
        servers = [side(shared, Path(folder)) for side in sides]
        measured = {server.name: {case: Numbers() for case in cases} for server in servers}
        try:
            for server in servers:
                server.start()
                say(f"{server.name}: ready after {server.startup_s:.0f} s")
                send(Load(server.url, MODEL_NAME, 32, 4, 16, seed=-1))
            for turn in range(rounds):
                for name in cases:
                    for server in servers:
                        _turn(server, name, turn, measured[server.name][name], say)
        finally:
            for server in servers:
                server.stop()
    return measured


def _turn(server: Server, name: str, turn: int, into: Numbers, say: Callable[[str], None]) -> None:
    case = CASES[name]
    load = Load(server.url, MODEL_NAME, case.clients, case.requests, case.tokens, seed=turn)
    with Meter(server.processes) as meter:
        result = send(load)
    into.results.append(result)
    into.cpu_s.append(meter.cpu_s)
    say(
        f"round {turn + 1}  {case.title:<24} {server.name:<16} {result.completed / result.wall_s:8.1f} requests/s"
        f"  {result.events / result.wall_s:9.1f} events/s  {result.not_whole} not whole"
    )
    for reason, count in result.errors.items():
        say(f"    {count} x {reason}")


def table(measured: Mapping[str, Mapping[str, Numbers]]) -> str:
    """Return the numbers for people."""
    names = list(measured)
    lines = []

    def row(label: str, values: Sequence[float], digits: int = 1, *, ratio: bool = True) -> None:
        ratios = "".join(f"{v / values[0]:>8.2f}" if values[0] and ratio else "" for v in values[1:])
        lines.append(f"{label:<38}" + "".join(f"{v:>17.{digits}f}" for v in values) + ratios)

    lines.append(f"{'':<38}" + "".join(f"{name:>17}" for name in names) + f"{'ratios':>8}")
    for case in next(iter(measured.values())):
        sides = [measured[name][case] for name in names]
        lines.append(CASES[case].title)
        if CASES[case].tokens == 1:
            row("    requests/s", [s.median(lambda r: r.completed / r.wall_s) for s in sides])
        else:
            row("    tokens/s", [s.median(lambda r: r.tokens / r.wall_s) for s in sides])
            row("    events/s", [s.median(lambda r: r.events / r.wall_s) for s in sides])
        row("    TTFT p50, ms", [1000 * s.ttft_s(50) for s in sides], 2)
        row("    TTFT p99, ms", [1000 * s.ttft_s(99) for s in sides], 2)
        row("    requests not whole", [s.not_whole for s in sides], 0, ratio=False)
        what = "request" if CASES[case].tokens == 1 else "token"
        for name, side in zip(names, sides, strict=True):
            spent = side.cpu_us(lambda r: r.completed if what == "request" else r.tokens)  # noqa: B023
            shown = "  ".join(f"{k} {v:.0f}" for k, v in sorted(spent.items(), key=lambda kv: -kv[1]) if v >= 0.5)
            lines.append(f"    {name}: CPU us per {what}: {shown}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a server did not start or a request failed."""
    given = _parser().parse_args(arguments)
    console.stop_in_order()
    sides: list[type[Server]] = [StubbedBare, StubbedRouter]
    if given.serve:
        sides.append(StubbedServe)
    try:
        settings(0)  # writes the model
        deltas = [channel(0) for _ in range(given.rounds)] if "channel" in given.only else []
        if deltas:
            console.say(f"the token channel alone: {statistics.median(deltas):.0f} deltas/s")
        cases = [name for name in CASES if name in given.only]
        measured = run(sides, cases, given.rounds, given.step, console.say) if cases else {}
    except ServerError as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 1
    if measured:
        print(f"\n{table(measured)}")
    numbers = {
        "benchmark": "data_path",
        "step_s": given.step,
        "rounds": given.rounds,
        "cases": {name: asdict(CASES[name]) for name in cases},
        "channel_deltas_per_s": [round(value) for value in deltas],
        "sides": {side: {name: n.as_json() for name, n in by_case.items()} for side, by_case in measured.items()},
    }
    console.report(numbers, given.json)
    return 1 if any(n.not_whole for by_case in measured.values() for n in by_case.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_path", description="The data path on stubs of engines, against vLLM's own app."
    )
    parser.add_argument("--serve", action="store_true", help="also the Router on Ray Serve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", type=float, default=0.005, help="seconds between two steps of the stub")
    everything = ["channel", *CASES]
    parser.add_argument("--only", nargs="+", choices=everything, default=everything, help="some of the cases")
    console.add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
