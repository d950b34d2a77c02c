"""`python -m benchmarks`: the comparison as a table, then the same numbers as one JSON line."""

from __future__ import annotations

import argparse
import sys

from benchmarks import compare, console
from benchmarks.servers import ServerError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a server did not start or a request failed."""
    given = _parser().parse_args(arguments)
    options = compare.Options(given.clients, given.requests, given.tokens, given.rounds, given.in_turn)
    console.stop_in_order()
    try:
        measured = compare.compare(options, console.say)
    except ServerError as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 1
    print(f"\n{compare.table(options, measured)}")
    console.report(compare.as_json(options, measured), given.json)
    return 1 if any(m.many.failed or m.one.failed for m in measured.values()) else 0


def _parser() -> argparse.ArgumentParser:
    defaults = compare.Options()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Groundswell with one engine against vLLM's own server, over HTTP."
    )
    parser.add_argument("--clients", type=int, default=defaults.clients, help="concurrent clients of the main case")
    parser.add_argument("--requests", type=int, default=defaults.requests, help="requests of each client in a round")
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="turns of each server")
    parser.add_argument("--in-turn", action="store_true", help="keep only one server up at a time (slow)")
    console.add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
