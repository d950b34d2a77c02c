"""The Router: the ingress. vLLM's own API for each model, over its Fleet. Needs no GPU and no living engine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, cast

from deployments import grpc_wakeups, outline, request_scope
from deployments import messages as m
from deployments.access.fair_share import FairShare
from deployments.access.gate import Gate
from deployments.access.keys import KeyRing, key_ring
from deployments.config import AppConfig, AssistantConfig, ModelConfig
from deployments.dispatch import Answer, App, Dispatcher, below_prefix
from deployments.errors import EngineFailure, EngineUnavailable, ModelNotFound
from deployments.fleet.client import Exchange, Fleet, Ticket
from deployments.fleet.placement import Ledger
from deployments.fleet.replica_watch import watch
from deployments.fleet.view import Cached, Deployment, View, deployments_of
from deployments.grounding.asgi import GroundedApp, Limits
from deployments.grounding.file_search import Retriever
from deployments.grounding.layout import escaper
from deployments.metrics import NodeMetrics, RayMetrics, endpoint_of_this_node
from deployments.serve_calls import Calls, ServeDetails
from deployments.tracing import TracedApp, Tracing
from deployments.web.page import Page

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

    from deployments.retrieval.api import IndexerApi, RetrieverApi

logger = logging.getLogger("ray.serve.groundswell.router")

grpc_wakeups.install()

_FLEET_METRICS_PERIOD_S = 5.0
_JOIN_RETRY_S = 2.0
_ACCOUNT_FOR_S = 1.0
"""How old Serve's account in `/fleet` may be. However many look, the controller is asked no more often."""
_VIEW_FOR_S = 0.2
"""How old the rest of it may be."""


class Router:
    """Made a deployment in `app.py`.

    Args:
        config: The whole app's configuration.
        engines: Handles to the Engine deployments, by model name.
        documents: Handles to the Indexer and the Retriever, where there is a document store.
    """

    def __init__(
        self,
        config: AppConfig,
        engines: dict[str, DeploymentHandle],
        documents: tuple[DeploymentHandle, DeploymentHandle] | None = None,
    ) -> None:
        # With vLLM's CUDA build on a node without a GPU, this is what makes a Router start.
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"
        os.environ.update(config.router.env)
        self._config, self._engines, self._documents = config, engines, documents
        self._metrics = RayMetrics()
        self._tracing = Tracing.start(config.tracing, "router") if config.tracing is not None else None
        self._models: list[_Model] = []
        self._page = Page() if config.router.page else None
        self._keys = key_ring(config.router, os.environ)
        if self._keys is None:
            logger.warning("There are no API keys: whoever reaches the HTTP port may use it")
        elif any("allowed_origins" in outline.options(model) for model in config.models):
            logger.warning("`allowed_origins` lets no page in: a browser asks first, without a key, and hears 401")

    async def __serve_build_asgi_app__(self) -> App:
        """Called by Serve, once, on the replica's event loop."""
        import ray

        from deployments.seam import logs

        logs.join_serves()
        from deployments.seam import frontend
        from deployments.seam.wire import Codec

        exchange = Exchange(
            self._config.router.fleet,
            ray.util.get_node_ip_address(),
            Codec().decode_deltas,
            metrics=self._metrics,
        )
        for model in self._config.models:
            self._models.append(_Model(model, self._config, exchange, self._engines[model.name], self._metrics))
            await self._models[-1].prepare()
        self._tasks = [asyncio.get_running_loop().create_task(self._report())]
        by_name = {name: model for model in self._models for name in model.names}

        # Documents: in front of every model's app stands one that answers from them, where that is asked for.
        retriever: Retriever | None = self._retriever()
        assistants = {assistant.name: assistant for assistant in self._config.assistants}

        def resolve(name: str) -> App | Awaitable[App] | None:
            assistant = assistants.get(name)
            model = by_name.get(name if assistant is None else assistant.model)
            if model is None:
                return None
            return grounded(model.built, model, assistant) if model.built is not None else built(model, assistant)

        async def built(model: _Model, assistant: AssistantConfig | None) -> App:
            return grounded(await model.app(), model, assistant)

        def grounded(app: App, model: _Model, assistant: AssistantConfig | None) -> App:
            return GroundedApp(
                app,
                model.limits(),
                retriever,
                self._config.grounding,
                metrics=self._metrics,
                assistant=assistant,
                owner_of=str if self._keys is None else self._keys.owner_of,
            )

        dispatcher = Dispatcher(
            resolve,
            [*by_name, *assistants],
            frontend.MOUNTED - {"/v1/models"},
            {
                "/health": self._health,
                "/ping": self._health,
                "/version": _version,
                "/v1/models": self._list_models,
                "/metrics": NodeMetrics(endpoint_of_this_node).answer,
                "/fleet": self._fleet_view(),
            },
            lookups={"/v1/models/": self._find_model},
            max_body_bytes=self._config.router.max_body_bytes,
            min_body_bytes_per_s=self._config.router.min_body_bytes_per_s,
            max_items=self._config.router.max_items,
            mounted=self._mounted(),
            request_timeout_s=self._config.router.request_timeout_s,
            max_unread_s=self._config.router.max_unread_s,
            count=lambda path, status: self._metrics.inc("router_http_requests", path=path, status=str(status)),
        )
        return self._guarded(dispatcher, frontend.MOUNTED)

    def _guarded(self, app: App, model_paths: Collection[str]) -> App:
        """Put the gate in front, and keep its keys as their file has them."""
        config, keys = self._config.router, self._keys
        if keys is not None and config.keys is not None:
            self._tasks.append(asyncio.get_running_loop().create_task(_refresh(keys, config.keys.reread_interval_s)))
        gate = Gate(
            app if self._tracing is None else TracedApp(app, self._tracing),
            keys,
            model_paths,
            max_header_count=config.max_header_count,
            max_header_bytes=config.max_header_bytes,
            metrics=self._metrics,
            open_pages=() if self._page is None else self._page.paths,
        )
        return below_prefix(gate)

    def _retriever(self) -> Any:
        """Return the Retriever, as those who ask it call it; None without a document store."""
        if self._config.documents is None or self._documents is None:
            return None
        timeout_s = self._config.documents.search_timeout_s + 1
        return Calls(self._documents[1], "The Retriever", timeout_s=timeout_s, tracing=self._tracing)

    def _mounted(self) -> dict[str, App]:
        page = {} if self._page is None else dict.fromkeys(self._page.prefixes, self._page)
        return page | self._document_paths()

    def _document_paths(self) -> dict[str, App]:
        if self._config.documents is None or self._documents is None:
            return {}
        from deployments.retrieval.api import PREFIXES, documents_app

        config = self._config.documents
        app: Any = documents_app(
            cast("IndexerApi", Calls(self._documents[0], "The Indexer", timeout_s=config.write_timeout_s)),
            cast("RetrieverApi", self._retriever()),
            config,
            max_body_bytes=self._config.router.max_body_bytes,
            min_body_bytes_per_s=self._config.router.min_body_bytes_per_s,
            owner_of=lambda scope: request_scope.owner(),
            key_of=lambda scope: request_scope.key(),
        )
        return dict.fromkeys(PREFIXES, app)

    async def _health(self) -> tuple[int, str, bytes]:
        """Ready when every model has an engine, or may have none; otherwise 503 that names what is missing."""
        replicas = {model.name: len(model.fleet.replicas) for model in self._models}
        loading = [model.name for model in self._models if not model.ready]
        body: dict[str, Any] = {"status": "loading" if loading else "ok"}
        if self._keys is None or request_scope.caller() is not None:  # names and numbers are not for everybody
            body |= {"replicas": replicas, "loading": loading}
        return (503 if loading else 200), "application/json", json.dumps(body).encode()

    def _fleet_view(self) -> Answer:
        """Return what answers `/fleet`: all replicas of all models, and what they do."""
        from ray import serve

        context = serve.get_replica_context()
        fleets = {model.deployment_name: model.fleet for model in self._models}
        view = View(fleets, context.replica_id.unique_id, clock=time.monotonic, wall=time.time)
        details = ServeDetails(timeout_s=2 * _ACCOUNT_FOR_S)

        async def ask() -> dict[str, Deployment] | None:
            said = await details.get()
            return None if said is None else deployments_of(said, context.app_name)

        account = Cached(ask, _ACCOUNT_FOR_S, clock=time.monotonic)

        async def make() -> bytes:
            return json.dumps(view.body(await account.get())).encode()

        cached = Cached(make, _VIEW_FOR_S, clock=time.monotonic)

        async def answer() -> tuple[int, str, bytes]:
            return 200, "application/json", await cached.get()

        return answer

    async def _list_models(self) -> tuple[int, str, bytes]:
        return 200, "application/json", json.dumps({"object": "list", "data": await self._cards()}).encode()

    async def _find_model(self, name: str) -> tuple[int, str, bytes]:
        card = next((card for card in await self._cards() if card["id"] == name), None)
        if card is None:
            raise ModelNotFound(f"The model `{name[:200]}` does not exist.", param="model")
        return 200, "application/json", json.dumps(card).encode()

    async def _cards(self) -> list[dict[str, Any]]:
        cards = [card for model in self._models for card in await model.cards()]
        return cards + [_card(assistant.name) | {"parent": assistant.model} for assistant in self._config.assistants]

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_FLEET_METRICS_PERIOD_S)
            for model in self._models:
                fleet = model.fleet
                self._metrics.set("fleet_requests_in_flight", fleet.admission.in_flight, model=fleet.model)
                self._metrics.set("fleet_held_back_sequences", fleet.admission.waiting, model=fleet.model)
                self._metrics.set("fleet_known_replicas", len(fleet.replicas), model=fleet.model)


async def _refresh(keys: KeyRing, interval_s: float) -> None:
    while True:
        await asyncio.sleep(interval_s)
        try:
            await asyncio.to_thread(keys.refresh)
        except Exception:
            logger.exception("The key file could not be looked at")


async def _version() -> tuple[int, str, bytes]:
    from importlib.metadata import version

    import vllm

    body = {"version": vllm.__version__, "groundswell": version("groundswell"), "ray": version("ray")}
    return 200, "application/json", json.dumps(body).encode()


class _ServeCalls:
    """Opens Serve calls to one Engine deployment, and says which of its replicas Serve runs."""

    def __init__(
        self, handle: DeploymentHandle, on_replicas: Callable[[frozenset[str]], None], *, join_timeout_s: float
    ) -> None:
        loop = asyncio.get_running_loop()
        watch(handle.deployment_name, lambda replicas: loop.call_soon_threadsafe(on_replicas, replicas))
        self._handle, self._join_timeout_s = handle, join_timeout_s
        self._generate = handle.options(stream=True, method_name="generate")

    def open(self, frames: list[bytes], channel: m.ChannelAddress, stream: int, ticket: Ticket) -> _ServeCall:
        return _ServeCall(self._generate.remote(frames, channel, stream, ticket))

    async def join(self, channel: m.ChannelAddress) -> list[m.EngineDescription]:
        """Have all running replicas connect to the channel; return what those that could say of themselves."""
        from ray.serve.exceptions import DeploymentUnavailableError

        async def answer(result: Any) -> Any:
            async with asyncio.timeout(self._join_timeout_s):
                return await result.get_async()

        try:
            # Not by `results_async`, which waits for all: one replica that is stuck would keep out the rest.
            results = await self._handle.broadcast("join", channel)._fetch_replica_results_async()
        except DeploymentUnavailableError:
            return []
        answers = await asyncio.gather(*map(answer, results), return_exceptions=True)
        for error in (a for a in answers if isinstance(a, Exception)):
            logger.warning("A replica of %s did not join: %s", self._handle.deployment_name, type(error).__name__)
        return [a for a in answers if isinstance(a, m.EngineDescription)]

    async def wake(self, channel: m.ChannelAddress) -> m.EngineDescription:
        """Wait for any replica, as a request would: from zero, this is what starts the first.

        Raises:
            EngineUnavailable: Serve lets no more wait, or the replica died or could not join.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, RayServeException

        try:
            description: m.EngineDescription = await self._handle.join.remote(channel)
        except BackPressureError:
            raise _too_many() from None
        except (RayError, RayServeException, asyncio.CancelledError) as error:
            current = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and current is not None and current.cancelling():
                raise  # who asked has left
            logger.warning("A replica of %s that was waited for did not join: %r", self._handle.deployment_name, error)
            raise EngineUnavailable(
                "The engine that was to start for this request failed.", retry_after_s=_JOIN_RETRY_S
            ) from error
        return description


class _ServeCall:
    """One open call, whose only message is `End`; what Serve raises becomes the engine's failure."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self._ended = False

    async def __aiter__(self) -> AsyncIterator[m.End]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, RayServeException

        try:
            async for message in self._response:
                yield message
            self._ended = True
        except BackPressureError:
            raise _too_many() from None
        except (RayError, RayServeException) as error:
            raise EngineFailure(f"{type(error).__name__} from Serve") from error

    def cancel(self) -> None:
        if not self._ended:
            self._response.cancel()


def _too_many() -> EngineUnavailable:
    return EngineUnavailable("Too many requests wait for this model's engines.", retry_after_s=5)


class _Model:
    """One model's app in this Router, and the fleet under it."""

    def __init__(
        self, model: ModelConfig, config: AppConfig, exchange: Exchange, handle: DeploymentHandle, metrics: RayMetrics
    ) -> None:
        from deployments.seam.args import frontend_config, model_names, parse_args, resolve_speculators
        from deployments.seam.stamps import Stamps

        self.name, self.deployment_name = model.name, model.deployment_name
        self._args: Namespace = resolve_speculators(parse_args(model.name, model.engine_args, model.frontend_args))
        self._vllm_config = frontend_config(self._args)
        self.names = model_names(self._args)
        self._may_be_empty = (model.deployment.get("autoscaling_config") or {}).get("min_replicas") == 0
        self._exchange, self._channel = exchange, exchange.channel.address
        self._calls = _ServeCalls(
            handle, self._on_replicas, join_timeout_s=config.router.fleet.connect_timeout_s + _JOIN_RETRY_S
        )
        self.fleet = Fleet(
            model.name,
            self._calls.open,
            exchange,
            Ledger(rng=random.Random()),
            config.router.fleet,
            max_queued=config.router.max_queued_requests,
            max_queue_wait_s=config.router.max_queue_wait_s,
            metrics=metrics,
            on_missing=self._join_missing,
        )
        # By time of day, which Routers on several nodes share.
        fair_share = FairShare(clock=time.time) if self._args.scheduling_policy == "priority" else None
        self._stamps = Stamps(fair_share, isolate_prefix_cache=config.router.isolate_prefix_cache)
        self._limits: Limits | None = None
        self._lock = asyncio.Lock()
        self._joining: asyncio.Task[None] | None = None
        self.built: FastAPI | None = None

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on now, or wake an engine."""
        return bool(self.fleet.replicas) or self._may_be_empty

    @property
    def _only_an_engine_knows(self) -> bool:
        """Whether tasks or context length are settled by the first engine alone."""
        return self._vllm_config.model_config.runner_type == "pooling" or self._args.max_model_len in (-1, "auto")

    async def prepare(self) -> None:
        """Build the app now, unless that hangs on an engine."""
        if not self._only_an_engine_knows:
            await self._build(None)

    async def app(self) -> App:
        """Return the app, building it at first need; for some models that waits for their first engine.

        Raises:
            Overloaded: As many wait as may: the app, which would say so, is not there yet.
            EngineUnavailable: The engine failed.
        """
        if self.built is None:
            place = self.fleet.admit(1)
            try:
                await self._build(await self._calls.wake(self._channel))
            finally:
                place.release()
        assert self.built is not None
        return self.built

    def limits(self) -> Limits:
        """Return what holds for a request before the app sees it. Known once `app` has returned."""
        assert self._limits is not None
        return self._limits

    async def _build(self, description: m.EngineDescription | None) -> None:
        from deployments.seam.args import speculates
        from deployments.seam.engine_client import FleetClient
        from deployments.seam.frontend import build_model_app, special_tokens, token_counter

        async with self._lock:
            if self.built is not None:
                return
            tasks: tuple[Any, ...] = ("generate",)
            if description is not None:
                self._vllm_config.model_config.max_model_len = description.max_model_len
                tasks = description.supported_tasks
            client = FleetClient(self.fleet, self._vllm_config, tasks, self._stamps, speculates=speculates(self._args))
            self._limits = Limits(
                self.name,
                client.let_in,
                token_counter(client),
                client.model_config.max_model_len,
                escaper(special_tokens(client)),
            )
            self.built = await build_model_app(self._args, client)

    def _on_replicas(self, replicas: frozenset[str]) -> None:
        """Serve's set of running replicas changed."""
        self.fleet.set_replicas(replicas)
        self._join_missing()

    def _join_missing(self) -> None:
        if self._joining is None or self._joining.done():
            self._joining = asyncio.get_running_loop().create_task(self._join())

    async def _join(self) -> None:
        """Have replicas join the channel until none is missing."""
        while self.fleet.missing:
            try:
                for description in await self._calls.join(self._channel):
                    if description.replica in self._exchange.channel.replicas:  # or it means a connection we dropped
                        self.fleet.joined(description)
                    await self._build(description)
            except Exception:
                logger.exception("Replicas of %s could not be joined to the token channel", self.name)
            if self.fleet.missing:
                await asyncio.sleep(_JOIN_RETRY_S)

    async def cards(self) -> list[dict[str, Any]]:
        """Return OpenAI's model objects; of a model whose app still waits for an engine, the names alone."""
        from deployments.seam.frontend import list_models

        if self.built is not None:
            return await list_models(self.built)
        return [_card(name) for name in self.names]


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "groundswell"}
