"""Anthropic's messages, with errors that keep their status, headers and silence, and are of Anthropic's types.

vLLM's own routes catch whatever is raised, log it with a traceback, answer with the exception's words, and lose its
headers: a refusal would cost more than its 429 saves and name no `Retry-After`. These do the same and let it through.
vLLM's types of errors are its own (`BadRequestError`; `internal_error` for all that ends a stream), and a body that is
no request has OpenAI's error object.

Source: `vllm/entrypoints/anthropic/api_router.py`.
"""

# No `from __future__ import annotations`: FastAPI looks names up where vLLM's decorators are defined.

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final, NoReturn

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.validation import validation_exception_handler
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation

from deployments import request_scope
from deployments.errors import OPAQUE, PublicError, messages_error
from deployments.seam.engine_client import PublicHTTPError

_PATH: Final = "/v1/messages"
_STATUS: Final = "status of what ends the messages' stream"


async def _create(request: AnthropicMessagesRequest, raw_request: Request) -> Response:
    serving = raw_request.app.state.anthropic_serving_messages
    return await _answer(serving.create_messages(request, raw_request))


async def _count(request: AnthropicCountTokensRequest, raw_request: Request) -> Response:
    serving = raw_request.app.state.anthropic_serving_messages
    return await _answer(serving.count_tokens(request, raw_request))


async def _answer(work: Awaitable[Any]) -> Response:
    try:
        made = await work
    except Exception as error:
        if as_public(error) is not None:
            raise
        made = create_error_response(error)
    if isinstance(made, ErrorResponse):
        return _refusal(made.error.code, made.error.message)
    if isinstance(made, BaseModel):
        return JSONResponse(made.model_dump(exclude_none=True))
    return StreamingResponse(_in_anthropics_types(made), media_type="text/event-stream")


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse(messages_error(status, message), status)


async def _in_anthropics_types(events: AsyncIterator[str]) -> AsyncIterator[str]:
    async for event in events:
        if event.startswith("event: error\n"):
            scope = request_scope.current()
            status = 500 if scope is None else scope.kept.get(_STATUS, 500)
            said = json.loads(event.partition("data: ")[2])["error"]["message"]
            event = f"event: error\ndata: {json.dumps(messages_error(status, said))}\n\n"
        yield event


class _Route(APIRoute):
    """A route whose body is refused in Anthropic's words."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                theirs = await validation_exception_handler(request, error)
                return _refusal(theirs.status_code, json.loads(theirs.body)["error"]["message"])

        return answer


def as_public(error: Exception) -> PublicHTTPError | None:
    """Return what a client may hear of an exception: None where vLLM has chosen the words, as for a bad request."""
    if isinstance(error, PublicHTTPError):
        return error
    if create_error_response(error).error.code == 500:  # nobody foresaw it
        return PublicHTTPError(PublicError(OPAQUE))
    return None


def _raise(error: str | Exception, *_: Any, **__: Any) -> NoReturn:
    """Let a failure out of the chat's stream under these messages, which would take an error event for a broken one."""
    raised = (as_public(error) or error) if isinstance(error, Exception) else PublicHTTPError(PublicError(error))
    if (scope := request_scope.current()) is not None:
        scope.kept[_STATUS] = create_error_response(raised).error.code
    raise raised


def take_over(app: FastAPI) -> None:
    """Put these routes in the place of vLLM's, where the model has them."""
    serving = getattr(app.state, "anthropic_serving_messages", None)
    if serving is None:
        return
    serving.create_streaming_error_response = _raise
    ours: dict[str, Callable[..., Any]] = {_PATH: _create, f"{_PATH}/count_tokens": _count}
    for index, route in enumerate(app.router.routes):
        if isinstance(route, APIRoute) and route.path in ours:
            app.router.routes[index] = _Route(
                route.path,
                with_cancellation(load_aware_call(ours[route.path])),
                methods=route.methods,
                dependencies=route.dependencies,
                responses=route.responses,
                response_model=None,
            )
