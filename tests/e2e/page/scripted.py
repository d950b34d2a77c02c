"""All of a Router but Ray and engines, on a port: gate, dispatcher, page, grounding, vLLM's app, a real document store.

The model is a script, so what it says, cites and how it fails is known. `/fleet` answers what the test has it answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.access.gate import Gate
from deployments.access.keys import KeyEntry, Keys, hash_of
from deployments.config import DocumentsConfig, GroundingConfig
from deployments.dispatch import Dispatcher
from deployments.grounding.asgi import GroundedApp, Limits
from deployments.metrics import NoMetrics
from deployments.retrieval.api import PREFIXES, documents_app
from deployments.web.page import Page
from tests.unit.retrievers import HouseRetriever

if TYPE_CHECKING:
    import uvicorn

KEY = "gs-ann-0123456789"
START_LIMIT_S = 240
READY: dict[str, Any] = {
    "object": "fleet",
    "at": 0,
    "router": "r1",
    "serve": "ok",
    "models": [
        {
            "model": "tiny",
            "target": 1,
            "bounds": [1, 2],
            "states": {"ready": 1},
            "running": 0,
            "waiting": 0,
            "tokens_per_s": 0,
            "prompt_tokens_per_s": 0,
            "ttft_s": None,
            "kv_cache_usage": 0.0,
            "prefix_hit_rate": None,
            "this_router": {"in_flight": 0, "waiting": 0},
            "replicas": [],
            "replicas_left_out": 0,
        }
    ],
    "deployments": [],
}


class Scripted:
    """The running server.

    Attributes:
        url: Where it is.
        fleet: What the model says, and what it was asked.
        fleet_view: What `/fleet` answers.
        keys: Set to have callers need a key.
    """

    url: str
    fleet: Any
    fleet_view: dict[str, Any]
    gate: Gate
    _server: uvicorn.Server
    _failure: BaseException | None = None

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, threading.Event()
        self.fleet_view = READY
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def need_key(self, needed: bool) -> None:
        self.gate._keys = Keys([KeyEntry(name="ann", sha256=hash_of(KEY))]) if needed else None

    def reset(self) -> None:
        """Make it as new, for the next test; documents stay."""
        self.need_key(False)
        self.fleet_view = READY
        fleet = self.fleet
        fleet.answers, fleet.step, fleet.pause_s = ["An answer."], 1, 0.0
        fleet.hangs = fleet.full = False
        fleet.retry_after_s = 7.0
        fleet.fails_after = fleet.cut_after = None
        fleet.prompts.clear()
        fleet.flights.clear()

    def run(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self._failure = error
            self._started.set()
            raise

    async def _run(self) -> None:
        import uvicorn

        from deployments.seam.frontend import token_counter
        from tests.e2e.page.citing_fleet import CitingFleet
        from tests.unit.house import house
        from tests.unit.scripted_fleet import scripted_app

        app, fleet, client = await scripted_app(
            self._folder / "tiny",
            CitingFleet(),
            reasoning_parser="deepseek_v3",
            enable_auto_tool_choice=True,
            tool_call_parser="hermes",
        )
        self.fleet = fleet
        async with house(self._folder / "documents") as made:
            reading, documents = HouseRetriever(made), DocumentsConfig(uri=str(self._folder / "documents"))
            limits = Limits("tiny", client.let_in, token_counter(client), 2048)
            grounded = GroundedApp(app, limits, reading, GroundingConfig(search_timeout_s=30), metrics=NoMetrics())  # type: ignore[arg-type]
            stores = documents_app(
                made.ingestion,  # type: ignore[arg-type]
                reading,  # type: ignore[arg-type]
                documents,
                max_body_bytes=10**6,
                owner_of=lambda scope: None,
            )
            page = Page()
            paths = ["/v1/chat/completions"]
            dispatcher = Dispatcher(
                lambda name: grounded if name == "tiny" else None,
                ["tiny"],
                paths,
                {"/v1/models": _models, "/fleet": self._fleet_view, "/health": _models},
                max_body_bytes=10**6,
                mounted=dict.fromkeys(page.prefixes, page) | dict.fromkeys(PREFIXES, stores),
            )
            self.gate = Gate(
                dispatcher,
                None,
                paths,
                max_header_count=100,
                max_header_bytes=2**15,
                metrics=NoMetrics(),
                open_pages=page.paths,
            )
            self._server = uvicorn.Server(uvicorn.Config(self.gate, log_level="warning", timeout_graceful_shutdown=1))
            serving = asyncio.create_task(self._server.serve(sockets=[self._listening]))
            while not self._server.started and not serving.done():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            self._started.set()
            await serving
        client.shutdown()

    async def _fleet_view(self) -> tuple[int, str, bytes]:
        return 200, "application/json", json.dumps(self.fleet_view).encode()

    def wait(self) -> None:
        assert self._started.wait(START_LIMIT_S)
        assert self._failure is None, self._failure

    def stop(self) -> None:
        self._server.should_exit = True


async def _models() -> tuple[int, str, bytes]:
    card = {"id": "tiny", "object": "model", "created": 0, "owned_by": "vllm"}
    return 200, "application/json", json.dumps({"object": "list", "data": [card]}).encode()


@contextmanager
def scripted(folder: Path) -> Iterator[Scripted]:
    """Serve it until the block is left."""
    server = Scripted(folder)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()
        thread.join(20)
