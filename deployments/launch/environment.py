"""What Ray, Serve, HAProxy and vLLM read from the environment: under `make serve`, and on the nodes of a cluster.

Of `make serve`: everything in `defaults` gives way to what the user has set; what `forced` returns does not.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deployments.config import LONGEST_STREAM_S
from deployments.launch.preflight import free_port

RUN_ID: Final = "GROUNDSWELL_RUN_ID"
"""In the environment of every process of a run, and only there: how they are found again."""


def for_run(run_id: str, run_folder: Path, config_folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a run: `environ`, our defaults where it says nothing, and what must be so.

    Args:
        run_id: Marks the run's processes.
        run_folder: The run's own folder, readable by its owner alone.
        config_folder: Where the config's imports start.
        environ: The user's environment.
    """
    result = {**defaults(run_folder), **environ}
    result.pop("RAY_AUTH_TOKEN", None)  # it would win over the file
    return {**result, **forced(run_id, run_folder), "PYTHONPATH": _path(config_folder, environ)}


def everywhere() -> dict[str, str]:
    """Return what is right for one machine and for a cluster alike."""
    return {
        # Speed: HAProxy in front, gRPC between the deployments. Both are read once, when Serve starts.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # HAProxy's actor has three times this long to start; Serve's 5 s are too short on a machine that is busy.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        # Ray lowers its workers' priority (nice 15), and with it that of engines and Routers: on a machine that does
        # anything else they would come last, and a batch waits for the slowest of its threads.
        "RAY_worker_niceness": "0",
        # The controller looks at everything ten times a second unless told otherwise: 7% of a core.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # A reload of HAProxy must not cut a stream that the old worker still carries.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": f"{LONGEST_STREAM_S:.0f}",
        # When a replica dies, what it started dies with it (Ray's default, said here because we rely on it).
        "RAY_process_group_cleanup_enabled": "1",
        # Nothing is reported to anybody.
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def on_a_cluster(scripts: Path) -> dict[str, str]:
    """Return what each node of a cluster needs in the environment of `ray start`.

    Not there, for Serve's own value is the right one: how long a Router that leaves goes on listening (a balancer
    outside must notice), and how often a replica is tried again (its node may be what failed).

    Args:
        scripts: Where this package's commands are installed, the same on every node.
    """
    return {
        **everywhere(),
        # HAProxy as `launch.haproxy` starts it. Without it a client that hangs up during its upload is not heard.
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(scripts / "groundswell-haproxy"),
        # So long workers wait for a head that is gone, and what runs there answers. After the 60 s of Ray they end.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        # Replicas unpickle what reaches their gRPC port: only with the token, which comes as the cluster's secrets do.
        "RAY_AUTH_MODE": "token",
    }


def as_exports(variables: Mapping[str, str]) -> str:
    """Return lines for a shell to `eval`."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def defaults(run_folder: Path) -> dict[str, str]:
    """Return what we set unless the user did."""
    return {
        **everywhere(),
        # A thread carries hundreds of thousands of events a second; more of them would only take turns on few cores.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, (os.cpu_count() or 1) // 4))),
        # Nobody but our own HAProxy has to notice that a Router leaves. It is told within a second; a request that it
        # sends on a connection which an idle Router is closing at that moment would be lost.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1.5",
        # A model that cannot be loaded fails the same way the second and the third time.
        "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
        # What HAProxy writes, and its admin socket, which anybody on the machine may use where it lies by default.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(run_folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_folder / "server-state"),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(run_folder / "haproxy-on-loopback"),
        # Sockets between an engine's processes. One that is killed leaves them, and nobody empties the temp folder.
        "VLLM_RPC_BASE_PATH": str(run_folder),
        # Ports that are the same for every Ray on a machine unless somebody moves them.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port(preferred=9101)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port(preferred=8404)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port(preferred=8500)),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port(preferred=9500)),
        "DASHBOARD_METRIC_PORT": str(free_port(preferred=44227)),
        "AUTOSCALER_METRIC_PORT": str(free_port(preferred=44217)),
        # Despite its name this is what makes Ray use 127.0.0.1 as the node's address, also on Linux. With it, every
        # port of Ray that knows the node's address listens on loopback only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def forced(run_id: str, run_folder: Path) -> dict[str, str]:
    """Return what a run sets in any case: what finds its processes, and what keeps strangers out of them."""
    return {
        RUN_ID: run_id,
        # Ray and vLLM rename their processes, and would write the new name over the environment, run id and all.
        "SPT_NOENV": "1",
        # Replicas unpickle what reaches their gRPC port, which listens on every address: only with the token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(run_folder)),
    }


def token_path(run_folder: Path) -> Path:
    """Return where the run's token lies."""
    return run_folder / "ray-token"


def write_files(run_folder: Path) -> None:
    """Write what the environment points at: the token, and the script that starts HAProxy."""
    descriptor = os.open(token_path(run_folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    write_haproxy(run_folder / "haproxy-on-loopback")


def write_haproxy(path: Path) -> None:
    """Write the script that Serve is to take for HAProxy."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("haproxy.py"))]
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o700)


def _path(config_folder: Path, environ: Mapping[str, str]) -> str:
    return os.pathsep.join(filter(None, [str(config_folder), environ.get("PYTHONPATH", "")]))
