"""`groundswell`: `serve` a config on this machine, make an API `key`, print a cluster node's `environment`, `backup`
the documents; `ingest`, `search`, `ask`: use a running server.

Exit codes: 0 after Ctrl-C or when all went well, 1 with one sentence on stderr if it did not, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from deployments import documents_cli
from deployments.access import keys
from deployments.errors import ConfigError
from deployments.launch import environment, preflight, supervisor
from deployments.outline import has_cuda_build


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except (preflight.CannotStart, ConfigError, OSError) as problem:
        print(f"groundswell: {problem}", file=sys.stderr)
        return 1


def _serve(options: argparse.Namespace) -> None:
    config = preflight.read_config(options.config, port=options.port)
    supervisor.clean_up()
    needs_key = check(config)
    supervisor.serve(config, needs_key=needs_key, dashboard=options.dashboard, verbose=options.verbose)


def _print_environment(options: argparse.Namespace) -> None:
    """Print what each node of a cluster sets before `ray start`."""
    print(environment.as_exports(environment.on_a_cluster(Path(sys.executable).parent)))


def _back_up(options: argparse.Namespace) -> None:
    """Copy a document store, which may be in use."""
    from deployments.retrieval.backup import BackupFailed, back_up

    given = dict(options.storage_option)
    try:
        back_up(options.source, options.target, source_options=given, target_options=given, say=print)
    except BackupFailed as problem:
        raise OSError(str(problem)) from None


def _new_key(options: argparse.Namespace) -> None:
    """Print a new key, the only time anybody sees it, and what the server needs to know of it."""
    key = keys.new_key()
    digest = keys.hash_of(key)
    if options.file is not None:
        keys.add_to_file(options.file, options.name, digest)
        told = f"Its hash was added to {options.file}. A running server takes it up within seconds."
    else:
        told = (
            f"For the key file:\n\n{keys.entry_text(options.name, digest, '.yaml')}\n"
            f"or for the environment:\n\n{keys.VARIABLE}={options.name}:{digest}"
        )
    print(f"The key of {options.name}, which is not kept and not shown again:", file=sys.stderr, flush=True)
    print(key, flush=True)
    print(told, file=sys.stderr)


def check(config: preflight.ServeConfig) -> bool:
    """Check everything that can be known before Ray starts; return whether clients need an API key.

    Raises:
        CannotStart: With the first reason why it cannot work.
    """
    preflight.check_ray_address(os.environ)
    needs_key = preflight.check_keys(config, os.environ)
    preflight.check_port(config.host, config.port)
    preflight.check_vllm(find_spec("vllm") is not None)
    preflight.check_libraries(preflight.has_library, gpu_build=has_cuda_build())
    for model in config.models:
        make_example_model(model, config.folder)
        preflight.check_model(model, config.folder, environ=os.environ)
    preflight.check_memory(
        config.models, config.folder, available_bytes=preflight.available_bytes(), gpu=preflight.has_gpu()
    )
    return needs_key


def make_example_model(model: preflight.ServedModel, folder: Path) -> None:
    """Make the model of random weights where a config names it and it is not there: it takes a second."""
    path = preflight.local_path(model.reference, folder)
    if path is None or path.exists() or path.name != "tiny-random":
        return
    script = path.with_name("tiny_random.py")
    if script.is_file():
        print(f"Writing {path} (random weights: it answers gibberish)", flush=True)
        subprocess.run([sys.executable, str(script), str(path)], check=True, stdout=subprocess.DEVNULL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="groundswell", description="A fleet of vLLM engines behind one OpenAI API.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('groundswell')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a Serve config file on this machine until Ctrl-C")
    serve.add_argument("config", type=Path, metavar="CONFIG", help="such as serve_config.yaml")
    serve.add_argument("--port", type=int, help="HTTP port instead of the config's; 0 takes a free one")
    serve.add_argument("--dashboard", action="store_true", help="start Ray's dashboard too (about 1 GB of memory)")
    serve.add_argument("--verbose", action="store_true", help="show the logs of all processes")
    serve.set_defaults(run=_serve)
    documents_cli.add_commands(commands)
    variables = commands.add_parser("environment", help="print what a cluster's node sets before `ray start`")
    variables.set_defaults(run=_print_environment)
    backup = commands.add_parser("backup", help="copy a document store, which may be in use, to a new place")
    backup.add_argument("source", help="`documents.uri`: a folder, or s3://bucket/prefix")
    backup.add_argument("target", help="likewise; nothing may be there yet")
    backup.add_argument(
        "--storage-option",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as in `documents.storage_options`; what is missing comes from the environment",
    )
    backup.set_defaults(run=_back_up)
    key = commands.add_parser("key", help="make an API key").add_subparsers(required=True, metavar="COMMAND")
    new = key.add_parser("new", help="print a new key, and the hash that the server keeps of it")
    new.add_argument("--name", required=True, type=_name, help="whose it is; one name may have several keys")
    new.add_argument("--file", type=Path, help="key file (JSON, YAML, TOML) to add the hash to")
    new.set_defaults(run=_new_key)
    return parser


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError("NAME=VALUE")
    return name, value


def _name(text: str) -> str:
    try:
        return keys.KeyEntry(name=text, sha256="0" * 64).name
    except ValueError:
        raise argparse.ArgumentTypeError("letters, digits, '.', '_' and '-', 64 at most") from None


if __name__ == "__main__":
    sys.exit(main())
