"""Groundswell beside what somebody would use instead, over HTTP: same model, engine settings, client and requests.

The systems take turns, A B C A B C. All stay up, and each one's idle CPU is measured too, because whatever an idle one
uses is taken from the others; with `in_turn` only one is up at a time, and is started for each of its turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.client import WORDS, Load, Result
from benchmarks.peers import BalancedVllm, DirectRayServeLlm, FastRayServeLlm, RayServeLlm
from benchmarks.servers import (
    MODEL_NAME,
    ROOT,
    BareVllm,
    EngineSettings,
    Groundswell,
    Server,
    ServerError,
    has_cuda_build,
    make_model,
    settings,
)
from benchmarks.usage import CpuByName, Meter

IDLE_S: Final = 5.0
SYSTEMS: Final = ("groundswell", "bare", "ray-llm", "ray-llm-fast", "ray-llm-direct")
MAX_MODEL_LEN: Final = 4096


@dataclass(frozen=True)
class Workload:
    """What clients send.

    Attributes:
        title: For people.
        prompt_tokens: Of each prompt, about.
        tokens: Of each answer, exactly.
        clients: Requests in flight; 0 for Poisson arrivals.
        requests: Of each client in a round; of all of them, with Poisson arrivals.
        share: Of what the bare server can do, for Poisson arrivals.
    """

    title: str
    prompt_tokens: int
    tokens: int
    clients: int
    requests: int
    share: float = 0.0


WORKLOADS: Final[Mapping[str, Workload]] = {
    "chat-1": Workload("chat, 1 client", 128, 128, 1, 24),
    "chat-8": Workload("chat, 8 clients", 128, 128, 8, 4),
    "chat-32": Workload("chat, 32 clients", 128, 128, 32, 3),
    "chat-64": Workload("chat, 64 clients", 128, 128, 64, 2),
    "long": Workload("long prompts, 8 clients", 2000, 64, 8, 3),
    "short": Workload("short answers, 32 clients", 64, 8, 32, 12),
    "poisson-50": Workload("arrivals at 50%", 128, 128, 0, 120, 0.5),
    "poisson-80": Workload("arrivals at 80%", 128, 128, 0, 160, 0.8),
    "poisson-110": Workload("arrivals at 110%", 128, 128, 0, 220, 1.1),
}
CAPACITY_OF: Final = "chat-32"
"""Whose requests per second, at the bare server and before all else, are 100%."""


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        systems: Of `SYSTEMS`; ratios are to the bare server.
        workloads: Of `WORKLOADS`.
        replicas: Engines of each system.
        rounds: Turns of each system.
        in_turn: Start a system for each of its turns, and stop it after: slow, for machines that hold only one.
        ttft_slo_s: A request is good if its first token took no longer,
        tpot_slo_s: and each further one no longer than this.
        capacity: Requests a second that are 100%; None to find out.
        engine_args: vLLM's, for all systems, beside those they have anyway.
    """

    systems: tuple[str, ...] = ("groundswell", "bare")
    workloads: tuple[str, ...] = ("chat-32", "chat-1")
    replicas: int = 1
    rounds: int = 3
    in_turn: bool = False
    ttft_slo_s: float = 1.0
    tpot_slo_s: float = 0.1
    capacity: float | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """All rounds of one workload on one system.

    Attributes:
        rate: Arrivals a second; 0 for clients that wait for their answers.
    """

    rate: float = 0.0
    results: list[Result] = field(default_factory=list)
    cpu_s: Counter[str] = field(default_factory=Counter)

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(r.tokens / r.wall_s for r in self.results)

    @property
    def requests_per_s(self) -> float:
        return statistics.median(r.completed / r.wall_s for r in self.results)

    @property
    def failed(self) -> int:
        return sum(r.failed for r in self.results)

    @property
    def rejected(self) -> float:
        """Share of the requests that were refused for overload."""
        return sum(r.rejected for r in self.results) / max(
            1, sum(r.completed + sum(r.errors.values()) for r in self.results)
        )

    @property
    def errors(self) -> Counter[str]:
        return sum((Counter(r.errors) for r in self.results), Counter())

    def goodput(self, options: Options) -> float:
        """Return good requests per second."""
        return statistics.median(r.good(options.ttft_slo_s, options.tpot_slo_s) / r.wall_s for r in self.results)

    def ttft_s(self, percentile: int) -> float:
        return quantile([value for r in self.results for value in r.ttft_s], percentile)

    def tpot_s(self, percentile: int) -> float:
        return quantile([value for r in self.results for value in r.tpot_s], percentile)

    @property
    def client_cores(self) -> float:
        return sum(r.client_cpu_s for r in self.results) / sum(r.wall_s for r in self.results)

    def cpu_s_per_1000_tokens(self) -> CpuByName:
        tokens = sum(r.tokens for r in self.results)
        return {name: 1000 * spent / tokens for name, spent in self.cpu_s.most_common()} if tokens else {}

    def as_json(self, options: Options) -> dict[str, Any]:
        return {
            "arrivals_per_s": round(self.rate, 2),
            "tokens_per_s": [round(r.tokens / r.wall_s, 1) for r in self.results],
            "requests_per_s": round(self.requests_per_s, 2),
            "goodput": round(self.goodput(options), 2),
            "rejected": round(self.rejected, 4),
            "ttft_p50_s": round(self.ttft_s(50), 4),
            "ttft_p99_s": round(self.ttft_s(99), 4),
            "tpot_p50_s": round(self.tpot_s(50), 5),
            "tpot_p99_s": round(self.tpot_s(99), 5),
            "prompt_tokens": round(sum(r.prompt_tokens for r in self.results) / max(1, self.completed), 1),
            "completed": self.completed,
            "failed": self.failed,
            "errors": dict(self.errors),
            "client_cores": round(self.client_cores, 3),
            "cpu_s_per_1000_tokens": {k: round(v, 3) for k, v in self.cpu_s_per_1000_tokens().items()},
        }

    @property
    def completed(self) -> int:
        return sum(r.completed for r in self.results)


@dataclass
class Measured:
    """One system's numbers."""

    cases: dict[str, Case] = field(default_factory=dict)
    idle_cores: CpuByName = field(default_factory=dict)
    peak_rss_bytes: dict[str, int] = field(default_factory=dict)
    first_token_s: list[float] = field(default_factory=list)


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


def system(name: str, shared: EngineSettings, folder: Path, replicas: int) -> Server:
    """Return one of `SYSTEMS`."""
    if name == "groundswell":
        return Groundswell(shared, folder, engines=replicas)
    if name == "bare":
        return BareVllm(shared, folder) if replicas == 1 else BalancedVllm(shared, folder, engines=replicas)
    peers = {"ray-llm": RayServeLlm, "ray-llm-fast": FastRayServeLlm, "ray-llm-direct": DirectRayServeLlm}
    return peers[name](shared, folder, engines=replicas)


def words_for(model: Path, tokens: int) -> int:
    """Return how many of `WORDS` make a prompt of about so many tokens."""
    from tokenizers import Tokenizer

    each = Tokenizer.from_file(str(model / "tokenizer.json")).encode(" ".join(WORDS * 20), add_special_tokens=False)
    return max(1, round(tokens * 20 * len(WORDS) / len(each.ids)))


def compare(options: Options, say: Callable[[str], None]) -> dict[str, Measured]:
    """Start the systems, load them in turns, stop them.

    Args:
        options: What to compare.
        say: Told what happens, line by line.

    Returns:
        The numbers of each system, by name.

    Raises:
        ServerError: None of them started, or what are 100% could not be found.
    """
    model = make_model()
    with tempfile.TemporaryDirectory(prefix="groundswell-bench-") as folder:
        base = settings(model, gpu=has_cuda_build(), max_model_len=MAX_MODEL_LEN)
        shared = EngineSettings({**base.engine_args, **options.engine_args}, base.environment)
        servers = {name: system(name, shared, Path(folder), options.replicas) for name in options.systems}
        run = _Run(options, model, {name: Measured() for name in servers}, say)
        try:
            if options.capacity is None and any(WORKLOADS[workload].share for workload in options.workloads):
                run.find_capacity(servers)
            if not options.in_turn:
                for name, server in servers.items():
                    run.start(name, server)
            for turn in range(options.rounds):
                for names in _groups(options):
                    for name, server in servers.items():
                        if not run.start(name, server):
                            continue
                        for workload in names:
                            run.turn(name, server, workload, turn)
                        if options.in_turn:
                            run.idle(name, server)
                            server.stop()
            for name, server in servers.items():
                if server.processes():
                    run.idle(name, server)
        finally:
            for server in servers.values():
                server.stop()
    if not run.left:
        raise ServerError("no system started")
    return run.left


def _groups(options: Options) -> Iterable[tuple[str, ...]]:
    """Return what a system does in one turn: one workload, or all of them where it must be started for it."""
    return [options.workloads] if options.in_turn else [(workload,) for workload in options.workloads]


class _Run:
    """One comparison under way."""

    def __init__(
        self, options: Options, model: Path, measured: dict[str, Measured], say: Callable[[str], None]
    ) -> None:
        self._options, self._model, self.measured, self._say = options, model, measured, say
        self._capacity = options.capacity or 0.0
        self._out: set[str] = set()

    @property
    def left(self) -> dict[str, Measured]:
        """The numbers of those systems that started every time."""
        return {name: measured for name, measured in self.measured.items() if name not in self._out}

    def start(self, name: str, server: Server) -> bool:
        """Start a system unless it runs, until its first token is back; one that once did not start is left out."""
        if name in self._out:
            return False
        if server.processes():
            return True
        begin = time.monotonic()
        try:
            server.start()
            if refused := send(Load(server.url, MODEL_NAME, 1, 1, 1)).errors:
                raise ServerError(f"it does not answer: {next(iter(refused))}")
        except ServerError as problem:
            self._out.add(name)
            self._say(f"{name} is left out: {problem}")
            server.stop()
            return False
        self.measured[name].first_token_s.append(time.monotonic() - begin)
        self._say(f"{name}: first token after {time.monotonic() - begin:.0f} s")
        send(Load(server.url, MODEL_NAME, 32, 1, 32, seed=-1))  # warms caches, connections and code
        return True

    def find_capacity(self, servers: Mapping[str, Server]) -> None:
        """Find the requests per second that are 100%, once: arrivals are the same for all systems and in all rounds.

        Raises:
            ServerError: None of the systems started, or one of the requests failed.
        """
        name = next((name for name in sorted(servers, key="bare".__ne__) if self.start(name, servers[name])), None)
        if name is None:
            raise ServerError("no system started")
        result = send(self._load(servers[name], CAPACITY_OF, turn=-1))
        if result.errors:
            raise ServerError(f"requests failed while {name} had nothing else to do: {next(iter(result.errors))}")
        self._capacity = result.completed / result.wall_s
        self._say(f"{self._capacity:.2f} requests a second are 100%: so many {name} does in {CAPACITY_OF}")
        if self._options.in_turn:
            servers[name].stop()
            self.measured[name].first_token_s.clear()  # the others are not started once more either

    def idle(self, name: str, server: Server) -> None:
        """Measure what a system uses when nobody asks it anything."""
        with Meter(server.processes) as meter:
            time.sleep(IDLE_S)
        self.measured[name].idle_cores = {process: spent / IDLE_S for process, spent in meter.cpu_s.items()}

    def turn(self, name: str, server: Server, workload: str, turn: int) -> None:
        """Send one round of a workload to a system."""
        what, load = WORKLOADS[workload], self._load(server, workload, turn)
        with Meter(server.processes) as meter:
            result = send(load)
        measured = self.measured[name]
        case = measured.cases.setdefault(workload, Case(load.rate))
        case.results.append(result)
        case.cpu_s.update(meter.cpu_s)
        for process, rss in meter.peak_rss_bytes.items():
            measured.peak_rss_bytes[process] = max(rss, measured.peak_rss_bytes.get(process, 0))
        self._say(
            f"round {turn + 1}  {what.title:<26} {name:<15} {result.tokens / result.wall_s:8.1f} tokens/s"
            f"  {result.completed} completed, {result.rejected} rejected, {result.failed} failed"
        )
        for reason, count in result.errors.items():
            self._say(f"    {count} x {reason}")

    def _load(self, server: Server, workload: str, turn: int) -> Load:
        what = WORKLOADS[workload]
        return Load(
            server.url,
            MODEL_NAME,
            what.clients or 1,
            what.requests,
            what.tokens,
            prompt_words=words_for(self._model, what.prompt_tokens),
            seed=1000 * turn + sorted(WORKLOADS).index(workload),
            rate=what.share * self._capacity,
        )


def table(options: Options, measured: Mapping[str, Measured]) -> str:
    """Return the numbers for people; in brackets the ratio to the bare server's."""
    names = list(measured)
    lines: list[str] = []

    def row(label: str, values: Sequence[float], digits: int = 1, *, ratio: bool = True) -> None:
        base = values[names.index("bare")] if "bare" in names and len(names) > 1 and ratio else 0.0
        cells = (f"{v:.{digits}f}" + (f" ({v / base:.2f})" if base else "") for v in values)
        lines.append(f"{label:<32}" + "".join(f"{cell:>18}" for cell in cells))

    lines.append(f"{'':<32}" + "".join(f"{name:>18}" for name in names))
    for workload in options.workloads:
        cases = [measured[name].cases[workload] for name in names]
        lines.append(WORKLOADS[workload].title)
        if WORKLOADS[workload].share:
            row("    arrivals/s", [c.rate for c in cases], 2, ratio=False)
        row("    output tokens/s", [c.tokens_per_s for c in cases])
        row("    requests/s", [c.requests_per_s for c in cases], 2)
        row("    good requests/s", [c.goodput(options) for c in cases], 2)
        row("    TTFT p50, ms", [1000 * c.ttft_s(50) for c in cases])
        row("    TTFT p99, ms", [1000 * c.ttft_s(99) for c in cases])
        row("    TPOT p50, ms", [1000 * c.tpot_s(50) for c in cases], 2)
        row("    TPOT p99, ms", [1000 * c.tpot_s(99) for c in cases], 2)
        row("    rejected, %", [100 * c.rejected for c in cases], ratio=False)
        row("    failed requests", [c.failed for c in cases], 0, ratio=False)
        row("    the client's own CPU, cores", [c.client_cores for c in cases], 2, ratio=False)
    # Together, one starts beside those that run already, and from a page cache that they have filled.
    starts = [statistics.median(measured[name].first_token_s) for name in names]
    row("first token after a start, s", starts, 0, ratio=options.in_turn)
    busiest = options.workloads[0]
    for name, m in measured.items():
        cpu = m.cases[busiest].cpu_s_per_1000_tokens()
        lines += ["", f"{name + ', by process':<42}{'CPU s/1000':>12}{'peak RSS':>12}{'idle':>8}"]
        lines += [f"    {WORKLOADS[busiest].title:<38}{'tokens':>12}{'MB':>12}{'cores':>8}"]
        for process in sorted(m.peak_rss_bytes, key=lambda p: -cpu.get(p, 0.0)):
            megabytes = m.peak_rss_bytes[process] / 1e6
            idle = m.idle_cores.get(process, 0.0)
            lines.append(f"    {process:<38}{cpu.get(process, 0.0):>12.3f}{megabytes:>12.0f}{idle:>8.3f}")
        lines.append(f"    {'all':<38}{sum(cpu.values()):>12.3f}{'':>12}{sum(m.idle_cores.values()):>8.3f}")
    if missing := left_out(options, measured):
        lines += ["", f"left out: {', '.join(missing)}"]
    return "\n".join(lines)


def left_out(options: Options, measured: Mapping[str, Measured]) -> list[str]:
    """Return the systems that were to be compared and did not start every time."""
    return [name for name in options.systems if name not in measured]


def as_json(options: Options, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the numbers for programs."""
    systems = {
        name: {
            "workloads": {workload: case.as_json(options) for workload, case in m.cases.items()},
            "peak_rss_mb": {k: round(v / 1e6) for k, v in m.peak_rss_bytes.items()},
            "idle_cores": {k: round(v, 3) for k, v in m.idle_cores.items()},
            "first_token_s": [round(v, 1) for v in m.first_token_s],
        }
        for name, m in measured.items()
    }
    missing = left_out(options, measured)
    return {"benchmark": "compare", **asdict(options), "systems": systems, "left_out": missing}
