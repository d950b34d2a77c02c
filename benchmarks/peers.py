"""What somebody would use instead, each as its own documentation has it, with the engine that all of them share."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.servers import MODEL_NAME, BareVllm, EngineSettings, Server
from deployments.launch.environment import defaults

LOGICAL_CPUS = 16
"""What Ray is told it has, so that two replicas and an ingress can be placed on any machine."""


class BalancedVllm(BareVllm):
    """Some bare servers behind HAProxy, which sends each request to the one with the fewest connections."""

    def __init__(self, settings: EngineSettings, folder: Path, *, engines: int = 2) -> None:
        super().__init__(settings, folder)
        self._engines = engines

    def command(self, port: int) -> list[str]:
        python, _, _, *flags = super().command(0)
        return [python, "-m", "benchmarks.balanced", str(port), str(self._engines), str(self.folder), *flags]


class RayServeLlm(Server):
    """`ray.serve.llm.build_openai_app` as it comes.

    Its processes keep their priority, as Groundswell's do; Ray would lower that of its workers.
    """

    name = "ray-llm"

    def __init__(self, settings: EngineSettings, folder: Path, *, engines: int = 1) -> None:
        super().__init__(settings, folder)
        self._engines = engines
        # Not in `folder`: Ray's sockets and HAProxy's lie deep under it, and a socket's path may have 97 bytes.
        self._scratch = Path(tempfile.gettempdir()) / f"gw{secrets.token_hex(4)}"

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "benchmarks.ray_llm", str(port), json.dumps(self.config()), str(self._scratch)]

    def config(self) -> dict[str, Any]:
        """Return the `LLMConfig`."""
        engine = {k: v for k, v in self.settings.engine_args.items() if k not in ("model", "served_model_name")}
        return {
            "model_loading_config": {
                "model_id": MODEL_NAME,
                "model_source": str(self.settings.engine_args["model"]),
            },
            "engine_kwargs": engine,
            "placement_group_config": {"bundles": [{"CPU": 1}]},
            "deployment_config": {"num_replicas": self._engines, "max_ongoing_requests": 1000},
            "runtime_env": {"env_vars": dict(self.settings.environment)},
            "log_engine_metrics": True,
        }

    def start(self) -> None:
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        super().start()

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """Return where files and ports lie that are the same for every Ray on a machine; no option of speed."""
        ours = defaults(self._scratch)
        places = ("_LOC", "_PATH", "_BASE", "_FILE", "_PORT")
        moved = {k: v for k, v in ours.items() if k.endswith(places) and k != "RAY_SERVE_HAPROXY_BINARY_PATH"}
        patience = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
        return {**moved, patience: ours[patience], "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}

    def is_ready(self) -> bool:
        """It has no path for health of its own: it is ready when it has answered a request."""
        body = {"model": MODEL_NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class FastRayServeLlm(RayServeLlm):
    """With the two flags that Ray's guide to throughput names."""

    name = "ray-llm-fast"

    def environment(self) -> dict[str, str]:
        fast = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
        return {**super().environment(), **fast}


class DirectRayServeLlm(FastRayServeLlm):
    """And with direct streaming: HAProxy asks a router for a replica, and streams from that replica."""

    name = "ray-llm-direct"

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}
