"""`python -m benchmarks`: the comparison as a table, then the same numbers as one JSON line, and as pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import compare, console, plots
from benchmarks.servers import ServerError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a server did not start or a request failed."""
    given = _parser().parse_args(arguments)
    options = compare.Options(
        tuple(given.systems),
        tuple(given.workloads),
        given.replicas,
        given.rounds,
        given.in_turn,
        given.ttft_slo,
        given.tpot_slo,
        given.capacity,
        dict(given.engine_arg),
    )
    console.stop_in_order()
    try:
        measured = compare.compare(options, console.say)
    except ServerError as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 1
    print(f"\n{compare.table(options, measured)}")
    numbers = compare.as_json(options, measured)
    console.report(numbers, given.json)
    if given.plots is not None:
        for file in plots.draw(numbers, given.plots):
            print(file)
    failed = any(case.failed for m in measured.values() for case in m.cases.values())
    return 1 if failed or numbers["left_out"] else 0


def _parser() -> argparse.ArgumentParser:
    defaults = compare.Options()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Groundswell against what it would replace, over HTTP."
    )
    parser.add_argument("--systems", nargs="+", choices=compare.SYSTEMS, default=list(defaults.systems))
    parser.add_argument("--workloads", nargs="+", choices=compare.WORKLOADS, default=list(defaults.workloads))
    parser.add_argument("--replicas", type=int, default=defaults.replicas, help="engines of each system")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="turns of each system")
    parser.add_argument("--in-turn", action="store_true", help="keep only one system up at a time (slow)")
    parser.add_argument(
        "--ttft-slo", type=float, default=defaults.ttft_slo_s, help="seconds: a good request's first token"
    )
    parser.add_argument(
        "--tpot-slo", type=float, default=defaults.tpot_slo_s, help="seconds: each further token of a good request"
    )
    parser.add_argument(
        "--capacity",
        type=float,
        help="requests/s that are 100%%; else what the bare server does in chat-32, asked first",
    )
    parser.add_argument(
        "--engine-arg",
        type=console.name_and_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="vLLM's, for all; the value as JSON, or a word",
    )
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw pictures there (needs matplotlib)")
    console.add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
