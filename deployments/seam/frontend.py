"""vLLM's own API app, for one model, over any `EngineClient`.

Source: `vllm/entrypoints/launchers/app.py` (`build_app`) and `launchers/api_server/app_state.py` (`init_app_state`).
"""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.tasks import SupportedTask
from vllm.utils.import_utils import resolve_obj_by_qualname

from deployments.errors import OPAQUE, NotFound, PublicError
from deployments.seam import messages_api, short_work
from deployments.seam.engine_client import FleetClient, PublicHTTPError
from deployments.seam.messages_api import as_public

_COUNTED_TEXTS: Final = 1024

MOUNTED: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v2/embed",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/generative_scoring",
        "/tokenize",
        "/detokenize",
        "/v1/models",
    }
)
"""vLLM's routes that a fleet serves as one engine would. `/v1/models` is merged over all models by the Router."""

NOT_MOUNTED: Final = {
    "one engine's state": (
        "/load",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/kv_event_sources",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/inference/v1/generate",
        "/inference/v1/abort_requests",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/start_profile",
        "/stop_profile",
    ),
    "the Router answers it for all models": ("/health", "/version", "/metrics", "/ping"),
    "another server's door to the same models": ("/invocations",),
    "a step of a pipeline we do not run": (
        "/v1/chat/completions/render",
        "/v1/messages/render",
        "/v1/completions/render",
        "/v1/responses/render",
        "/v1/chat/completions/derender",
        "/v1/completions/derender",
    ),
    "not tried over a fleet yet": ("/tokenizer_info", "/v1/chat/completions/batch", "/v1/systemone"),
    "one model's documentation would be taken for all": ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
}
"""vLLM's routes that are left out, by reason. The seam's test fails on a route that is in neither list."""


async def build_model_app(args: Namespace, client: FleetClient) -> FastAPI:
    """Return vLLM's app for one model.

    Args:
        args: From `parse_args`.
        client: The fleet as an `EngineClient`.
    """
    tasks: tuple[SupportedTask, ...] = client.supported_tasks
    short_work.do_at_once(client.renderer, trusts_templates=args.trust_request_chat_template)
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in MOUNTED]
    messages_api.take_over(app)
    for name in ("openai_serving_chat", "openai_serving_completion"):
        if (serving := getattr(app.state, name, None)) is not None:
            serving.create_streaming_error_response = partial(_last_event, serving.create_streaming_error_response)
    # Of middleware, CORS and the user's own, where a function is in a `BaseHTTPMiddleware`. The load is counted by the
    # Router, answers get their `x-request-id` from Serve, and vLLM's scaling middleware guards what is not there.
    kept = (CORSMiddleware, BaseHTTPMiddleware, *map(resolve_obj_by_qualname, args.middleware))
    app.user_middleware[:] = [middleware for middleware in app.user_middleware if middleware.cls in kept]
    app.add_exception_handler(PublicHTTPError, _public_error)
    app.add_exception_handler(Exception, _opaque)
    app.add_exception_handler(404, partial(_not_for_this_model, args.served_model_name[0]))
    app.middleware_stack = None
    app.add_middleware(_Outspoken)
    return app


class _Outspoken:
    """Raises what a client may read, where vLLM's app ends a stream by an exception and Starlette hides it in another.

    Args:
        app: Everything else.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            public = _public_in(error)
            if public is None:
                raise
            raise public from error


def _public_in(error: BaseException | None) -> PublicError | None:
    """Return what was behind an exception, if it is for clients. A group is the context of what is taken out of it."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, PublicHTTPError):
            return error.error
        seen.add(id(error))
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
    return None


def _last_event(theirs: Callable[..., str], message: str | Exception, *args: Any, **kwargs: Any) -> str:
    """Return the error that ends a stream: the same object that a plain answer would have been."""
    if isinstance(message, Exception):
        message = as_public(message) or message
    if isinstance(message, PublicHTTPError):
        return json.dumps(message.error.body())
    return theirs(message, *args, **kwargs)


async def _public_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, PublicHTTPError)
    return _response(exc.error, request)


async def _opaque(request: Request, exc: Exception) -> JSONResponse:
    """Answer for what nobody foresaw: vLLM would put the exception's own words there. It is raised on, and logged."""
    return _response(PublicError(OPAQUE), request)


async def _not_for_this_model(name: str, request: Request, exc: Exception) -> JSONResponse:
    """Answer for a path that some models serve, and this one does not: vLLM mounts what the model can do."""
    return _response(NotFound(f"The model `{name}` does not serve {request.url.path}.", param="model"), request)


def _response(error: PublicError, request: Request) -> JSONResponse:
    return JSONResponse(error.body(request.url.path), status_code=error.status, headers=error.headers())


async def list_models(app: FastAPI) -> list[dict[str, Any]]:
    """Return OpenAI's model objects of one model's app, LoRA adapters included."""
    listed = await app.state.openai_serving_models.show_available_models()
    return [card.model_dump() for card in listed.data]


def special_tokens(client: FleetClient) -> set[str]:
    """Return the texts that the model's tokenizer takes for one token wherever they stand, as those between turns."""
    tokenizer = client.renderer.tokenizer
    return set() if tokenizer is None else {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}


def token_counter(client: FleetClient) -> Callable[[str], int]:
    """Return a function that counts a text's tokens, in any thread, and remembers: the same passages come again.

    Its tokenizer is its own: those of vLLM's renderer are borrowed by threads of vLLM's.
    """
    tokenizer = copy.deepcopy(client.renderer.tokenizer)

    @lru_cache(maxsize=_COUNTED_TEXTS)
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return count
