"""Groundswell with one engine replica beside the bare vLLM server: what the fleet costs when it is a fleet of one.

Both engines get the same model, arguments and environment, both servers the same requests in the same order, in turns:
A B A B. Both stay up, and an idle one is measured too, because whatever it used would be taken from the other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.client import Load, Result
from benchmarks.servers import MODEL_NAME, ROOT, BareVllm, Groundswell, Server, has_cuda_build, make_model, settings
from benchmarks.usage import CpuByName, Meter

IDLE_S = 5.0
SINGLE_CLIENT_REQUESTS = 6


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        clients: Concurrent clients of the main case.
        requests: Requests of each, per round.
        tokens: Output tokens of each request.
        rounds: Turns of each server.
        in_turn: Start a server for each of its turns, and stop it after: slow, for machines that hold only one.
    """

    clients: int = 32
    requests: int = 4
    tokens: int = 128
    rounds: int = 3
    in_turn: bool = False


@dataclass
class Case:
    """All rounds of one load on one server."""

    results: list[Result] = field(default_factory=list)
    cpu_s: Counter[str] = field(default_factory=Counter)

    @property
    def tokens_per_s(self) -> list[float]:
        return [r.tokens / r.wall_s for r in self.results]

    @property
    def tokens(self) -> int:
        return sum(r.tokens for r in self.results)

    @property
    def failed(self) -> int:
        return sum(r.failed for r in self.results)

    @property
    def errors(self) -> Counter[str]:
        return sum((Counter(r.errors) for r in self.results), Counter())

    def ttft_s(self, percentile: int) -> float:
        return quantile([value for r in self.results for value in r.ttft_s], percentile)

    def tpot_s(self, percentile: int) -> float:
        return quantile([value for r in self.results for value in r.tpot_s], percentile)

    @property
    def client_cores(self) -> float:
        return sum(r.client_cpu_s for r in self.results) / sum(r.wall_s for r in self.results)

    def cpu_s_per_1000_tokens(self) -> CpuByName:
        return {name: 1000 * spent / self.tokens for name, spent in self.cpu_s.most_common()} if self.tokens else {}


@dataclass
class Measured:
    """One server's numbers."""

    many: Case = field(default_factory=Case)
    one: Case = field(default_factory=Case)
    idle_cores: CpuByName = field(default_factory=dict)
    peak_rss_bytes: dict[str, int] = field(default_factory=dict)
    startup_s: float = 0.0


def quantile(values: Sequence[float], percentile: int) -> float:
    """Return a percentile, or NaN of nothing: every request failed."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percentile - 1]


def send(load: Load) -> Result:
    """Run a load in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.client", json.dumps(asdict(load))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return Result(**json.loads(done.stdout))


def compare(options: Options, say: Callable[[str], None]) -> dict[str, Measured]:
    """Start the servers, load them in turns, stop them.

    Args:
        options: What to compare.
        say: Told what happens, line by line.

    Returns:
        The numbers of each server, by name.
    """
    model = ROOT / "models" / "tiny-random"
    make_model(model)
    with tempfile.TemporaryDirectory(prefix="groundswell-bench-") as folder:
        shared = settings(model, gpu=has_cuda_build())
        servers: list[Server] = [Groundswell(shared, Path(folder)), BareVllm(shared, Path(folder))]
        measured = {server.name: Measured() for server in servers}
        try:
            if not options.in_turn:
                for server in servers:
                    _start(server, options, measured[server.name], say)
            for turn in range(options.rounds):
                for server in servers:
                    _start(server, options, measured[server.name], say)
                    for case in ("many", "one"):
                        _turn(server, case, turn, options, measured[server.name], say)
                    if turn == options.rounds - 1:
                        _idle(server, measured[server.name])
                    if options.in_turn:
                        server.stop()
        finally:
            for server in servers:
                server.stop()
    return measured


def _start(server: Server, options: Options, measured: Measured, say: Callable[[str], None]) -> None:
    if server.processes():
        return
    server.start()
    measured.startup_s = server.startup_s
    say(f"{server.name}: ready after {server.startup_s:.0f} s")
    send(Load(server.url, MODEL_NAME, options.clients, 1, 32, seed=-1))  # warms caches, connections and code


def _idle(server: Server, measured: Measured) -> None:
    with Meter(server.processes) as meter:
        time.sleep(IDLE_S)
    measured.idle_cores = {name: spent / IDLE_S for name, spent in meter.cpu_s.items()}


def _turn(
    server: Server, case: str, turn: int, options: Options, measured: Measured, say: Callable[[str], None]
) -> None:
    load = Load(server.url, MODEL_NAME, options.clients, options.requests, options.tokens, seed=turn)
    if case == "one":
        load = replace(load, clients=1, requests=SINGLE_CLIENT_REQUESTS, seed=1000 + turn)
    with Meter(server.processes) as meter:
        result = send(load)
    into: Case = getattr(measured, case)
    into.results.append(result)
    into.cpu_s.update(meter.cpu_s)
    for name, rss in meter.peak_rss_bytes.items():
        measured.peak_rss_bytes[name] = max(rss, measured.peak_rss_bytes.get(name, 0))
    say(
        f"round {turn + 1}  {server.name:<12} {load.clients:>3} clients  {result.tokens / result.wall_s:7.1f} tokens/s"
        f"  {result.completed} completed, {result.failed} failed"
    )
    for reason, count in result.errors.items():
        say(f"    {count} x {reason}")


def table(options: Options, measured: dict[str, Measured]) -> str:
    """Return the numbers for people."""
    ours, bare = measured.values()
    lines = [f"{'':<42}{'groundswell':>12}{'bare vLLM':>12}{'ratio':>8}"]

    def row(label: str, value: Callable[[Measured], float], digits: int = 1, *, ratio: bool = True) -> None:
        a, b = value(ours), value(bare)
        share = f"{a / b:8.2f}" if ratio and b else ""
        lines.append(f"{label:<42}{a:>12.{digits}f}{b:>12.{digits}f}{share}")

    for title, pick in _cases(options):
        row(f"{title}: output tokens/s", lambda m, p=pick: statistics.median(p(m).tokens_per_s))  # type: ignore[misc]
        row("    TTFT p50, ms", lambda m, p=pick: 1000 * p(m).ttft_s(50))  # type: ignore[misc]
        row("    TTFT p99, ms", lambda m, p=pick: 1000 * p(m).ttft_s(99))  # type: ignore[misc]
        row("    TPOT p50, ms", lambda m, p=pick: 1000 * p(m).tpot_s(50))  # type: ignore[misc]
        row("    failed requests", lambda m, p=pick: p(m).failed, 0, ratio=False)  # type: ignore[misc]
        row("    the client's own CPU, cores", lambda m, p=pick: p(m).client_cores, 2, ratio=False)  # type: ignore[misc]
    row("start-up, s", lambda m: m.startup_s, 0)
    for name, m in measured.items():
        cpu = m.many.cpu_s_per_1000_tokens()
        lines += ["", f"{name + ', by process':<42}{'CPU s/1000':>12}{'peak RSS':>12}{'idle':>8}"]
        lines += [f"{'':<42}{'tokens':>12}{'MB':>12}{'cores':>8}"]
        for process in sorted(m.peak_rss_bytes, key=lambda p: -cpu.get(p, 0.0)):
            megabytes = m.peak_rss_bytes[process] / 1e6
            idle = m.idle_cores.get(process, 0.0)
            lines.append(f"    {process:<38}{cpu.get(process, 0.0):>12.3f}{megabytes:>12.0f}{idle:>8.3f}")
        lines.append(f"    {'all':<38}{sum(cpu.values()):>12.3f}{'':>12}{sum(m.idle_cores.values()):>8.3f}")
    return "\n".join(lines)


def _cases(options: Options) -> list[tuple[str, Callable[[Measured], Case]]]:
    return [(f"{options.clients} clients", lambda m: m.many), ("1 client", lambda m: m.one)]


def as_json(options: Options, measured: dict[str, Measured]) -> dict[str, Any]:
    """Return the numbers for programs."""
    servers: dict[str, Any] = {}
    for name, m in measured.items():
        cases = {}
        for case in (m.many, m.one):
            cases["many" if case is m.many else "one"] = {
                "tokens_per_s": [round(v, 1) for v in case.tokens_per_s],
                "ttft_p50_s": round(case.ttft_s(50), 4),
                "ttft_p99_s": round(case.ttft_s(99), 4),
                "tpot_p50_s": round(case.tpot_s(50), 5),
                "failed": case.failed,
                "errors": dict(case.errors),
                "client_cores": round(case.client_cores, 3),
                "cpu_s_per_1000_tokens": {k: round(v, 3) for k, v in case.cpu_s_per_1000_tokens().items()},
            }
        servers[name] = {
            **cases,
            "peak_rss_mb": {k: round(v / 1e6) for k, v in m.peak_rss_bytes.items()},
            "idle_cores": {k: round(v, 3) for k, v in m.idle_cores.items()},
            "startup_s": round(m.startup_s, 1),
        }
    ours, bare = measured.values()
    ratio = statistics.median(ours.many.tokens_per_s) / statistics.median(bare.many.tokens_per_s)
    return {"benchmark": "compare", **asdict(options), "tokens_per_s_ratio": round(ratio, 3), "servers": servers}
