"""Whether the Router forgets what it has served: its resident memory over many short requests.

python -m benchmarks.memory                                # starts Groundswell, measures, stops it
python -m benchmarks.memory --further-models 4             # what each model beside the first costs a Router
python -m benchmarks.memory --url http://127.0.0.1:8000    # one that runs on this machine
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks import console, usage
from benchmarks.client import Load, Result
from benchmarks.compare import send
from benchmarks.servers import MODEL_NAME, Groundswell, ServerError, has_cuda_build, make_model, settings
from deployments.launch.environment import RUN_ID
from deployments.launch.processes import members

SETTLED_AFTER = 2_000
"""By then every code path, cache and pool has been used; what grows later, grows for ever."""


class NoRouter(Exception):
    """No Router of a `groundswell serve` on this machine answers there."""


def run(requests: int, concurrency: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Start Groundswell, measure it, stop it."""
    model = make_model()
    with tempfile.TemporaryDirectory(prefix="groundswell-bench-") as folder:
        server = Groundswell(settings(model, gpu=has_cuda_build()), Path(folder))
        try:
            server.start()
            say(f"ready after {server.startup_s:.0f} s")
            return measure(server.url, MODEL_NAME, requests, concurrency, say)
        finally:
            server.stop()


def further(models: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Start Groundswell with one model and again with some more; return what a Router takes for each of those.

    None of them has an engine: it is the Router's own share of a model that is measured.
    """
    model = make_model()
    rss: dict[int, float] = {}
    not_whole = 0
    for number in (0, models):
        with tempfile.TemporaryDirectory(prefix="groundswell-bench-") as folder:
            server = Groundswell(settings(model, gpu=has_cuda_build()), Path(folder), further_models=number)
            try:
                server.start()
                not_whole += _sent(Load(server.url, MODEL_NAME, 4, 50, tokens=1, stream=False), say).not_whole
                rss[number] = sum(p.memory_info().rss for p in routers(server.url)) / 1e6
                say(f"{1 + number} models: Router RSS {rss[number]:.1f} MB")
            finally:
                server.stop()
    each = (rss[models] - rss[0]) / models
    numbers = {"models": models, "mb_each": round(each, 1), "not_whole": not_whole}
    return {"benchmark": "memory of further models", **numbers}


def _sent(load: Load, say: Callable[[str], None]) -> Result:
    result = send(load)
    for reason, count in result.errors.items():
        say(f"    {count} x {reason}")
    return result


def measure(url: str, model: str, requests: int, concurrency: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Send short requests to a running Groundswell on this machine and watch its Router.

    Raises:
        NoRouter: There is none at `url`.
    """
    found = routers(url)

    def rss() -> int:
        return sum(router.memory_info().rss for router in found)

    points = [(0, rss())]
    not_whole = 0
    say(f"{'requests':>10}{'Router RSS, MB':>18}{'requests/s':>14}{'not whole':>11}")
    say(f"{0:>10}{points[0][1] / 1e6:>18.1f}")
    step = max(concurrency, min(SETTLED_AFTER, requests) // 2)
    done = 0
    while done < requests:
        each = -(-min(step, requests - done) // concurrency)
        result = _sent(Load(url, model, concurrency, each, tokens=1, seed=done, stream=False), say)
        done += each * concurrency
        not_whole += result.not_whole
        points.append((done, rss()))
        say(f"{done:>10}{points[-1][1] / 1e6:>18.1f}{result.completed / result.wall_s:>14.1f}{result.not_whole:>11}")
    settled = next(value for count, value in points if count >= min(SETTLED_AFTER, requests))
    return {
        "benchmark": "memory",
        "requests": done,
        "not_whole": not_whole,
        "router_rss_mb": {
            "start": round(points[0][1] / 1e6, 1),
            f"after_{SETTLED_AFTER}": round(settled / 1e6, 1),
            "end": round(points[-1][1] / 1e6, 1),
        },
        "all_rss_mb": [(count, round(value / 1e6, 1)) for count, value in points],
    }


def routers(url: str) -> list[psutil.Process]:
    """Return the Routers of the run that listens at `url`.

    Raises:
        NoRouter: There is none on this machine.
    """
    found = [p for p in _processes(url) if usage.name(p) == "Router replica"]
    if not found:
        raise NoRouter(f"there is no Router of a `groundswell serve` on this machine behind {url}")
    return found


def _processes(url: str) -> list[psutil.Process]:
    """Return the processes of the run that listens at `url`."""
    port = urllib.parse.urlsplit(url).port or 80
    listening = psutil.net_connections(kind="tcp")
    pids = {c.pid for c in listening if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid}
    for pid in pids:
        if run_id := psutil.Process(pid).environ().get(RUN_ID):
            return members(run_id)
    return []


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if Groundswell did not start or a request did not come back whole."""
    given = _parser().parse_args(arguments)
    console.stop_in_order()
    try:
        if given.further_models:
            numbers = further(given.further_models, console.say)
        elif given.url is None:
            numbers = run(given.requests, given.concurrency, console.say)
        else:
            numbers = measure(given.url.rstrip("/"), given.model, given.requests, given.concurrency, console.say)
    except (ServerError, NoRouter) as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 1
    console.report(numbers, given.json)
    return 1 if numbers["not_whole"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="The Router's memory over many short requests."
    )
    parser.add_argument("--url", help="a running Groundswell on this machine; without it, one is started")
    parser.add_argument("--model", default=MODEL_NAME, help="its name at --url")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument(
        "--further-models", type=int, default=0, help="measure instead what so many models beside the first cost"
    )
    console.add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
