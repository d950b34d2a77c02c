"""What the command lines share."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option that `report` takes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line here too")


def name_and_value(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, the value as JSON, or as a word if it is none.

    Raises:
        argparse.ArgumentTypeError: There is no name or no value.
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def report(numbers: Mapping[str, Any], file: Path | None) -> None:
    """Print `numbers` as one JSON line; write it to `file` too, if there is one."""
    line = json.dumps(numbers)
    print(f"\n{line}")
    if file is not None:
        file.write_text(line + "\n")


def stop_in_order() -> None:
    """Have SIGTERM end the program as Ctrl-C does, so that it stops the servers it has started."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
