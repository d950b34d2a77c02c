"""One start of Ray for all tests with stub engines: several models of them, behind two real Routers.

Started as `make serve` starts: on loopback, with HAProxy, gRPC and Ray's token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from deployments.access import keys
from deployments.config import FleetConfig
from models import tiny_random
from tests.e2e.serving import ROOT, Served, serving, wait_for
from tests.serve import orders

LIMIT_S = 90
"""Generous: tests are about what happens and in which order."""
PREFIX = "/of/stubs"
"""Where the API is, beside another application: the end-to-end tests have it at the root."""
ROUTERS = 2
MAX_QUEUED = 4
ELASTIC_BATCH = 4


def stub(name: str, folder: Path, *, batch: int, deployment: dict[str, Any], **env: float) -> dict[str, Any]:
    """Return the configuration of one model.

    Args:
        name: Of the model.
        folder: Where the model's tokenizer lies, beside notes and orders.
        batch: Requests an engine runs at once.
        deployment: Serve's options.
        env: The stub's settings, without `STUB_`.
    """
    return {
        "name": name,
        "engine_args": {"model": str(folder / "model"), "max_model_len": 4096, "max_num_seqs": batch},
        "deployment": {"ray_actor_options": {"num_cpus": 0, "num_gpus": 0}, **deployment},
        "env": {"STUB_FOLDER": str(folder), **{f"STUB_{key}": str(value) for key, value in env.items()}},
    }


def scaled(low: int, high: int, **more: float) -> dict[str, Any]:
    return {"autoscaling_config": {"min_replicas": low, "max_replicas": high, "downscale_delay_s": 3, **more}}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


@dataclass
class Stubs:
    """The running app.

    Attributes:
        url: Of its API.
        folder: Notes and orders.
        config: What is deployed.
        served: Its processes.
        key_file: Where the API keys stand.
        key: One of them, without limits.
    """

    url: str
    folder: Path
    config: dict[str, Any]
    served: Served
    key_file: Path
    key: str

    def get(self, path: str, key: str | None = None) -> requests.Response:
        """Get a path, with a key: an empty one is none."""
        return requests.get(self.url + path, headers=bearer(self.key if key is None else key), timeout=LIMIT_S)

    def ask(
        self,
        model: str,
        *,
        tokens: int = 4,
        stream: bool = False,
        timeout_s: float | None = None,
        key: str | None = None,
        **body: Any,
    ) -> requests.Response:
        """Ask for a chat completion, or for a completion where `prompt` is given; with a deadline, if one is."""
        path = "completions" if "prompt" in body else "chat/completions"
        if "prompt" not in body:
            body.setdefault("messages", [{"role": "user", "content": "Hello"}])
        body |= {"model": model, "max_tokens": tokens, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        headers = bearer(self.key if key is None else key)
        if timeout_s is not None:
            headers["x-request-timeout-seconds"] = str(timeout_s)
        return requests.post(f"{self.url}/v1/{path}", json=body, headers=headers, stream=stream, timeout=LIMIT_S)

    def engines(self, model: str) -> int:
        """Return how many engines the Router that answers knows."""
        return int(self.get("/health").json()["replicas"][model])

    def fleet(self, model: str) -> dict[str, Any]:
        """Return what the Router that answers shows of a model on the page."""
        return next(dict(each) for each in self.get("/fleet").json()["models"] if each["model"] == model)

    def views(self) -> list[dict[str, Any]]:
        """Return what Routers answer at `/fleet`, asked at once: HAProxy sends one request where it has no stream."""
        with ThreadPoolExecutor(8 * ROUTERS) as pool:
            return [answer.json() for answer in pool.map(self.get, ["/fleet"] * 8 * ROUTERS)]

    def wait_until_known(self, model: str, running: dict[str, int]) -> None:
        """Wait until all Routers have heard since now that these engines run so many requests each."""
        since = time.time() + FleetConfig().heartbeat_interval_s  # what was on its way has come by then

        def known() -> bool:
            told = [
                (view["router"], {row["replica"]: row.get("running") for row in each["replicas"]})
                for view in self.views()
                for each in view["models"]
                if each["model"] == model and view["at"] > since
            ]
            return len({router for router, _ in told}) == ROUTERS and all(
                rows.items() >= running.items() for _, rows in told
            )

        wait_for(known, f"all Routers know {running}")

    def in_flight(self, model: str) -> int:
        """Return how many of the model's requests all Routers hold together; -1 where not all have been heard."""
        held = {
            view["router"]: each["this_router"]["in_flight"]
            for view in self.views()
            for each in view["models"]
            if each["model"] == model
        }
        return sum(held.values()) if len(held) == ROUTERS else -1

    def notes(self, model: str) -> dict[str, orders.Notes]:
        return orders.read(self.folder, model)

    def running(self, model: str) -> int:
        """Return how many requests the model's engines have."""
        return sum(note.running for note in self.notes(model).values())

    def wait_for_engines(self, model: str, number: int) -> None:
        """Wait until all Routers know exactly so many engines, and those live: of a death they hear a little later."""
        in_a_row = 0

        def settled() -> bool:
            nonlocal in_a_row
            joined = [len(note.joined) for note in self.notes(model).values()]  # dead Routers count too
            known = len(joined) == number and all(routers >= ROUTERS for routers in joined)
            in_a_row = in_a_row + 1 if known and self.engines(model) == number else 0
            return in_a_row > 2 * ROUTERS

        wait_for(settled, f"{number} engines of {model}")


@pytest.fixture(scope="package")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    folder = tmp_path_factory.mktemp("stubs")
    tiny_random.write(folder / "model")
    models = [
        stub("pair", folder, batch=64, deployment={"num_replicas": 2}, TOKEN_S=0.02, PREFILL_S=0.0005),
        stub("elastic", folder, batch=ELASTIC_BATCH, deployment=scaled(1, 2, upscale_delay_s=6), TOKEN_S=0.25),
        stub("zero", folder, batch=16, deployment=scaled(0, 1)),
    ]
    key_file, key = folder / "keys.yaml", keys.new_key()
    keys.add_to_file(key_file, "tests", keys.hash_of(key))
    router = {
        "deployment": {"num_replicas": ROUTERS},
        "keys": {"file": str(key_file), "reread_interval_s": 0.5},
        "max_queued_requests": MAX_QUEUED,
        "fleet": {"engine_stall_timeout_s": 10, "heartbeat_timeout_s": 10},
    }
    application = {
        "name": "stubs",
        "route_prefix": PREFIX,
        "import_path": "tests.serve.stub_app:build",
        "args": {"app": {"models": models, "router": router}},
    }
    other = {"name": "other", "route_prefix": "/", "import_path": "tests.serve.stub_app:at_the_root"}
    file, config = folder / "config.yaml", {"applications": [application, other]}
    file.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
        with serving(file, tmp_path_factory.mktemp("state")) as served:
            yield Stubs(f"http://127.0.0.1:{served.port}{PREFIX}", folder, config, served, key_file, key)
