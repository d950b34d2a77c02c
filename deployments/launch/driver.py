"""The process that starts Ray, deploys and reports. Its parent, the supervisor, ends it; it never ends by itself
unless something failed, and then it leaves one sentence in the run's folder.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from deployments.launch.preflight import CannotStart

OBJECT_STORE_BYTES: Final = 256 * 2**20
"""Requests and tokens do not pass through the object store; Ray wants one."""
POLL_S: Final = 0.5
PROGRESS_INTERVAL_S: Final = 5.0
FAILURE_FILE: Final = "failure"

_SEE_ABOVE: Final = "See root cause above"
_LOGGED = re.compile(r"ERROR .*\] (?P<cause>(?:\w+\.)*\w*(?:Error|Exception): .+)")
_UNPLACED = re.compile(r"Resources required for each replica: (?P<required>.+?), total .*?: (?P<available>.+?)\. Use ")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Settings:
    """What the supervisor hands over.

    Attributes:
        config: The Serve config.
        url: Where clients will reach it.
        models: Names of the models it serves.
        folder: The run's folder.
        dashboard: Whether to start Ray's dashboard (about 1 GB of memory).
        dashboard_port: Where.
        metrics_port: Of Ray's Prometheus endpoint.
        verbose: Whether the logs of all processes come to the terminal.
        needs_key: Whether clients need an API key.
        page: Whether there is a page at `/`.
    """

    config: dict[str, Any]
    url: str
    models: tuple[str, ...]
    folder: str
    dashboard: bool
    dashboard_port: int
    metrics_port: int
    verbose: bool
    needs_key: bool = False
    page: bool = True

    def to_json(self) -> str:
        """Return the settings as the driver reads them from its standard input."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Progress:
    """How far a deployment is.

    Attributes:
        status: The worst of the applications' statuses, in Serve's words.
        message: What Serve says about it.
        replicas: Running and wanted replicas of each deployment.
        waiting: Sentences on deployments whose replicas have long not begun to load: they may find no room.
    """

    status: str
    message: str
    replicas: Mapping[str, tuple[int, int]]
    waiting: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = "  ".join(f"{name} {running}/{target}" for name, (running, target) in self.replicas.items())
        return f"{self.status.lower()}  {counts}".rstrip()


def progress(details: Mapping[str, Any]) -> Progress:
    """Read Serve's own account of its applications (`get_serve_details`)."""
    order = ["DEPLOY_FAILED", "UNHEALTHY", "DELETING", "NOT_STARTED", "DEPLOYING", "RUNNING"]
    applications = list((details.get("applications") or {}).values())
    worst = min(applications, key=lambda a: order.index(a["status"]), default={"status": "NOT_STARTED"})
    deployments = [d for a in applications for d in (a.get("deployments") or {}).items()]
    replicas = {}
    for name, deployment in deployments:
        running = sum(replica["state"] == "RUNNING" for replica in deployment.get("replicas") or [])
        replicas[name] = (running, int(deployment.get("target_num_replicas") or 0))
    ill = [d["message"] for _, d in deployments if d.get("message") and d["status"] in ("DEPLOY_FAILED", "UNHEALTHY")]
    message = ill[0] if ill else worst.get("message") or ""
    waiting = tuple(
        _of_room(name, found["required"], found["available"])
        for name, deployment in deployments
        if (found := _UNPLACED.search(deployment.get("message") or ""))
    )
    status = worst["status"]
    return Progress(str(getattr(status, "value", status)), message, replicas, waiting)


def _of_room(name: str, required: str, available: str) -> str:
    """Return what Serve knows of a replica that has not begun to load.

    Its worker may just be slow to start, and hold what it takes; and of bundles Serve does not say what is free.
    """
    is_bundles = required.startswith("[")
    free = "" if is_bundles else f", and {available} are free here, not counting what it may hold already"
    return f"{name} has not begun to load: one takes {required}{free}"


def cause(message: str) -> str:
    """Return the last line of a traceback as a sentence's end."""
    lines = [line.strip() for line in _ANSI.sub("", message).splitlines()]
    return next((line.rstrip(".") for line in reversed(lines) if line), "no reason was given")


def engine_cause(logs: Path) -> str | None:
    """Return the first exception that an EngineCore or its worker has logged: vLLM's own only says "see above"."""
    for path in sorted([*logs.glob("worker-*.err"), *logs.glob("worker-*.out")]):
        if found := _LOGGED.search(_ANSI.sub("", path.read_text(errors="replace"))):
            return found["cause"].rstrip(".")
    return None


def ready_message(settings: Settings) -> str:
    """Return what somebody needs in order to send the first request."""
    body = {"model": (settings.models or ("…",))[0], "messages": [{"role": "user", "content": "Hello!"}]}
    key = '-H "authorization: Bearer $GROUNDSWELL_API_KEY" ' if settings.needs_key else ""
    curl = (
        f"curl -N {settings.url}/v1/chat/completions {key}-H 'content-type: application/json' "
        f"-d '{json.dumps({**body, 'max_tokens': 64, 'stream': True})}'"
    )
    lines = [
        "",
        f"Groundswell is ready at {settings.url}/v1",
        *([f"  page       {settings.url}/"] if settings.page else []),
        f"  models     {', '.join(settings.models) or 'none'}",
        f"  keys       {'needed' if settings.needs_key else 'none: it listens on loopback only'}",
        f"  metrics    http://127.0.0.1:{settings.metrics_port}/metrics",
    ]
    if settings.dashboard:
        lines.append(f"  dashboard  http://127.0.0.1:{settings.dashboard_port}")
    return "\n".join([*lines, "", f"  {curl}", "", "Ctrl-C stops it."])


def serve(settings: Settings) -> None:
    """Start Ray, deploy, say when it is ready, and report what changes, for ever.

    Raises:
        CannotStart: Ray did not start, or the deployment failed.
    """
    begin = time.monotonic()
    _say(begin, "starting Ray")
    _start_ray(settings)
    client = _start_serve(_fitted(settings.config, begin))
    _say(begin, "loading")
    _wait_until_running(client, begin, Path(settings.folder) / "ray" / "session_latest" / "logs")
    _wait_until_healthy(settings.url)
    print(ready_message(settings), flush=True)
    _report_changes(client)


def _start_ray(settings: Settings) -> None:
    import ray

    try:
        ray.init(
            address="local",
            namespace="serve",
            include_dashboard=settings.dashboard,
            dashboard_host="127.0.0.1",
            dashboard_port=settings.dashboard_port,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=settings.verbose,
            logging_level=logging.WARNING,
            _temp_dir=str(Path(settings.folder) / "ray"),  # not the folder itself: Ray opens it to everybody
            _metrics_export_port=settings.metrics_port,
        )
    except Exception as error:
        traceback.print_exc()
        raise CannotStart(f"Ray did not start: {cause(str(error))}.") from error


def _fitted(config: dict[str, Any], begin: float) -> dict[str, Any]:
    """Return the config with no more engines than Ray has found GPUs for."""
    import ray

    from deployments.launch import gpus
    from deployments.outline import has_cuda_build

    fitted, sentences = gpus.fit(config, ray.cluster_resources().get("GPU", 0), gpu_build=has_cuda_build())
    for sentence in sentences:
        _say(begin, sentence)
    return fitted


def _start_serve(config: dict[str, Any]) -> Any:
    """Start Serve and hand it the config, as `serve run config.yaml` does; return Serve's client."""
    from pydantic import ValidationError
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        schema = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CannotStart(f"The config is not a Serve config: {place}: {error.errors()[0]['msg']}.") from None
    # The controller checks http_options only in passing. grpc_options: none, unless the config asks for gRPC.
    client = serve_start(
        http_options=schema.http_options.model_dump(),
        proxy_location=schema.proxy_location,
        grpc_options=schema.grpc_options.model_dump(),
        global_logging_config=schema.logging_config,
        controller_options=schema.controller_options,
    )
    client.deploy_apps(schema)
    return client


def _wait_until_running(client: Any, begin: float, logs: Path) -> None:
    said_at, said = begin, ""
    explained: set[str] = set()
    while (state := progress(client.get_serve_details())).status != "RUNNING":
        if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            print(state.message, file=sys.stderr, flush=True)
            known = engine_cause(logs) if _SEE_ABOVE in state.message else None
            raise CannotStart(f"The deployment failed: {known or cause(state.message)}.")
        now = time.monotonic()
        if now - said_at >= PROGRESS_INTERVAL_S or (str(state) != said and state.replicas):
            said_at, said = now, str(state)
            _say(begin, said)
        for sentence in state.waiting:
            if sentence not in explained:
                _say(begin, sentence)
        explained.update(state.waiting)
        time.sleep(POLL_S)
    _say(begin, str(state))


def _wait_until_healthy(url: str, limit_s: float = 60.0) -> None:
    """Wait until a request gets through HAProxy, which learns of the Router a moment after Serve says RUNNING."""
    deadline = time.monotonic() + limit_s
    problem = ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):  # it answers, and wants a key that we do not have
                return
            problem = f"HTTP {error.code}"
        except OSError as error:
            problem = str(error)
        time.sleep(POLL_S)
    raise CannotStart(f"{url}/health did not answer 200 within {limit_s:.0f} s: {problem}.")


def _report_changes(client: Any) -> None:
    said = None
    while True:
        state = str(progress(client.get_serve_details()))
        if said is not None and state != said:
            print(f"{time.strftime('%H:%M:%S')}  {state}", flush=True)
        said = state
        time.sleep(2 * POLL_S)


def _say(begin: float, what: str) -> None:
    print(f"{time.monotonic() - begin:4.0f} s  {what}", flush=True)


def main() -> int:
    """Serve what standard input says until killed; return 1 with a sentence in the run's folder if something fails."""
    settings = Settings(**json.load(sys.stdin))
    try:
        serve(settings)
    except CannotStart as error:
        sentence = str(error)
    except Exception as error:
        traceback.print_exc()
        sentence = f"Ray Serve stopped answering: {type(error).__name__}: {cause(str(error))}."
    (Path(settings.folder) / FAILURE_FILE).write_text(sentence)
    return 1


if __name__ == "__main__":
    sys.exit(main())
