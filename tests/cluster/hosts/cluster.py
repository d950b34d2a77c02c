"""A Ray cluster on the hosts of `machines`: joined with `ray start`, deployed to with `serve deploy`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import requests
import yaml

from deployments.access import keys
from deployments.launch.environment import on_a_cluster, write_haproxy
from models import tiny_random
from tests.cluster.hosts.machines import Host, Hosts
from tests.e2e.serving import ROOT

GCS_PORT: Final = 6379
DASHBOARD_PORT: Final = 8265
HTTP_PORT: Final = 8000
REDIS_PORT: Final = 6380
OBJECT_STORE_BYTES: Final = 80 * 2**20
_BIN: Final = Path(sys.executable).parent


def missing() -> str | None:
    """Return why there can be no cluster here, if so."""
    return None if shutil.which("redis-server") else "redis-server is not installed"


class Cluster:
    """A head, workers, and Redis beside them, which keeps what must outlive the head.

    Attributes:
        hosts: What it runs on.
        token: Ray's, which every node, driver and caller of the dashboard must show.
        key: Of the API.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.token = secrets.token_hex(32)
        self.key = keys.new_key()
        folder = hosts.folder
        self._token_file, self._key_file, self._haproxy = folder / "token", folder / "keys.yaml", folder / "haproxy"
        self._token_file.touch(0o600)
        self._token_file.write_text(self.token)
        keys.add_to_file(self._key_file, "tester", keys.hash_of(self.key))
        write_haproxy(self._haproxy)
        self._redis_password = secrets.token_hex(16)

    def _environment(self) -> dict[str, str]:
        """Return what Ray is started with on each host."""
        folder = self.hosts.folder
        others = ("RAY_", "GROUNDSWELL_", "XDG_", "PYTHONDONTWRITEBYTECODE")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        own = on_a_cluster(_BIN) | {
            # Some forty processes start, and each would compile torch, Ray and vLLM: half of what importing them costs.
            "PYTHONPYCACHEPREFIX": str(ROOT / ".pytest_cache" / "bytecode"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_TOKEN_PATH": str(self._token_file),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(self._haproxy),  # the same, of this tree
            "GROUNDSWELL_OWN_NODE_FIRST": "1",
            "RAY_raylet_start_wait_time_s": "120",  # a busy machine
            # What lies in /tmp otherwise. On all nodes it goes by what the head has, with the node's id below that.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "VLLM_RPC_BASE_PATH": str(folder),
        }
        return inherited | own

    def boot(self, name: str) -> Host:
        """Start a host, without Ray."""
        return self.hosts.boot(name, self._environment())

    def start_redis(self) -> None:
        """Start a host that runs Redis alone."""
        host = self.boot("redis")
        address = ["--bind", host.address, "--port", str(REDIS_PORT), "--requirepass", self._redis_password]
        unsaved = ["--dir", str(host.folder), "--save", "", "--appendonly", "no"]
        host.start("redis-server", *address, *unsaved, stdout=subprocess.DEVNULL)

    def keep_logs(self) -> None:
        """Copy all logs to where GROUNDSWELL_TEST_LOGS names a folder for them."""
        if kept := os.environ.get("GROUNDSWELL_TEST_LOGS"):
            for name in self.hosts.by_name:
                for logs in (self.hosts.folder / name).glob("ray/session_2*/logs"):
                    shutil.copytree(logs, Path(kept) / name / "logs", dirs_exist_ok=True)

    def start_head(self) -> Host:
        """Start the head, or start it again. It offers no CPU: no engine is placed there."""
        host = self.boot("head")
        self._ray_start(
            host,
            *("--head", "--port", str(GCS_PORT), "--num-cpus", "0", "--redis-password", self._redis_password),
            *("--dashboard-host", host.address, "--dashboard-port", str(DASHBOARD_PORT)),
            environment={"RAY_REDIS_ADDRESS": f"{self.hosts['redis'].address}:{REDIS_PORT}"},
        )
        return host

    def start_worker(self, name: str) -> Host:
        """Start a host and join it to the cluster."""
        host = self.boot(name)
        self._ray_start(host, "--address", self.gcs, "--num-cpus", "2")
        return host

    def _ray_start(self, host: Host, *options: str, environment: dict[str, str] | None = None) -> None:
        started = host.run(*ray_start(host), *options, environment=environment or {})
        assert started.returncode == 0, started.stdout

    def deploy(self) -> None:
        """Have `serve deploy` deploy the app: engines on two workers, a Router on each node."""
        folder = self.hosts.folder
        engine_args = {"model": str(tiny_random.write(folder / "model")), "dtype": "float32"}
        model = {
            "name": "tiny",
            "engine_args": engine_args | {"max_model_len": 1024, "enforce_eager": True},
            "deployment": {"num_replicas": 2, "max_replicas_per_node": 1},
        }
        router = {
            "deployment": {"num_replicas": 3, "max_replicas_per_node": 1},
            "keys": {"file": str(self._key_file)},
        }
        application = {
            "name": "groundswell",
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": {"models": [model], "router": router},
        }
        config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": HTTP_PORT},
            "applications": [application],
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        deployed = self.hosts["w1"].run(
            str(_BIN / "serve"), "deploy", str(folder / "config.yaml"), "--address", self.dashboard
        )
        assert deployed.returncode == 0, deployed.stdout

    @property
    def gcs(self) -> str:
        return f"{self.hosts['head'].address}:{GCS_PORT}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.hosts['head'].address}:{DASHBOARD_PORT}"

    def ask_dashboard(self, path: str, token: str | None) -> requests.Response:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return requests.get(self.dashboard + path, headers=headers, timeout=30)

    def nodes(self) -> dict[str, str]:
        """Return the state of each node by its address; of one that was there before, as it is now."""
        rows = self.ask_dashboard("/api/v0/nodes?limit=100", self.token).json()["data"]["result"]["result"]
        return {row["node_ip"]: row["state"] for row in sorted(rows, key=lambda row: row["state"] == "ALIVE")}

    def serve(self) -> dict[str, Any]:
        """Return Serve's own account of what it runs: empty while the dashboard or Serve's controller is on its way."""
        try:
            answer = self.ask_dashboard("/api/serve/applications/", self.token)
            answer.raise_for_status()
            details: dict[str, Any] = answer.json()
        except requests.RequestException:
            return {}
        return details

    def _app(self) -> dict[str, Any]:
        app: dict[str, Any] = self.serve().get("applications", {}).get("groundswell", {})
        return app

    def is_up(self) -> bool:
        """Whether the app runs; fails where Serve has given it up."""
        app = self._app()
        assert app.get("status") != "DEPLOY_FAILED", app
        return app.get("status") == "RUNNING"

    def replicas(self, deployment: str) -> dict[str, str]:
        """Return the id of the running replica on each host of a deployment, by the host's name."""
        names = {host.address: name for name, host in self.hosts.by_name.items()}
        found = self._app().get("deployments", {}).get(deployment, {}).get("replicas", [])
        return {names[r["node_ip"]]: r["replica_id"] for r in found if r["state"] == "RUNNING"}

    def proxies(self) -> set[str]:
        """Return the names of the hosts with a healthy HAProxy."""
        names = {host.address: name for name, host in self.hosts.by_name.items()}
        return {names[p["node_ip"]] for p in self.serve().get("proxies", {}).values() if p["status"] == "HEALTHY"}

    def url(self, name: str) -> str:
        """Return where a host serves the API."""
        return f"http://{self.hosts[name].address}:{HTTP_PORT}"


@contextlib.contextmanager
def cluster(hosts: Hosts, *, workers: Sequence[str]) -> Iterator[Cluster]:
    """Have a cluster on `hosts` until the block is left."""
    made = Cluster(hosts)
    try:
        made.start_redis()
        made.start_head()
        for worker in workers:
            made.start_worker(worker)
        yield made
    finally:
        made.keep_logs()


def ray_start(host: Host) -> list[str]:
    """Return the command that starts Ray on a host, as far as it is the same for all."""
    own = ["--node-ip-address", host.address, "--temp-dir", str(host.folder / "ray")]
    # Ports that are given need not be waited for: a busy machine may need more than the 15 s after which Ray gives up.
    ports = ["--dashboard-agent-grpc-port", "52366", "--runtime-env-agent-port", "52367"]
    ports += ["--metrics-export-port", "8080"]
    store = ["--object-store-memory", str(OBJECT_STORE_BYTES)]
    return [str(_BIN / "ray"), "start", *own, *ports, *store, "--disable-usage-stats"]
