"""`groundswell serve CONFIG`: serve a config on this machine; `ingest`, `search`, `ask`: use a running server.

Exit codes: 0 after Ctrl-C or when all went well, 1 with one sentence on stderr if it did not, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from deployments import documents_cli
from deployments.launch import preflight, supervisor


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = _parser().parse_args(arguments)
    if hasattr(options, "run"):
        return documents_cli.run(options)
    try:
        config = preflight.read_config(options.config, port=options.port)
        supervisor.clean_up()
        check(config)
        supervisor.serve(config, dashboard=options.dashboard, verbose=options.verbose)
    except preflight.CannotStart as problem:
        print(f"groundswell: {problem}", file=sys.stderr)
        return 1
    return 0


def check(config: preflight.ServeConfig) -> None:
    """Check everything that can be known before Ray starts.

    Raises:
        CannotStart: With the first reason why it cannot work.
    """
    preflight.check_ray_address(os.environ)
    preflight.check_port(config.host, config.port)
    preflight.check_vllm(find_spec("vllm") is not None)
    for model in config.models:
        make_example_model(model, config.folder)
        preflight.check_model(model, config.folder, environ=os.environ)
    preflight.check_memory(
        config.models, config.folder, available_bytes=preflight.available_bytes(), gpu=preflight.has_gpu()
    )


def make_example_model(model: preflight.ServedModel, folder: Path) -> None:
    """Make the example model that the default config names, unless it is there: it takes a second."""
    path = preflight.local_path(model.reference, folder)
    if path is None or path.exists() or path.name != "tiny-random":
        return
    script = path.with_name("tiny_random.py")
    if script.is_file():
        print(f"Writing {path} (random weights: it answers gibberish)", flush=True)
        subprocess.run([sys.executable, str(script), str(path)], check=True, stdout=subprocess.DEVNULL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="groundswell", description="A fleet of vLLM engines behind one OpenAI API.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a Serve config file on this machine until Ctrl-C")
    serve.add_argument("config", type=Path, metavar="CONFIG", help="such as serve_config.yaml")
    serve.add_argument("--port", type=int, help="HTTP port instead of the config's; 0 takes a free one")
    serve.add_argument("--dashboard", action="store_true", help="start Ray's dashboard too (about 1 GB of memory)")
    serve.add_argument("--verbose", action="store_true", help="show the logs of all processes")
    documents_cli.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
