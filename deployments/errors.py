"""Errors that own their HTTP status and their public words.

Anything else that escapes becomes an opaque 500: what a client reads is only ever a message written here on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

OPAQUE: Final = "The server had an internal error."
"""What clients read of anything that nobody foresaw."""
_MESSAGES: Final = "/v1/messages"
"""Anthropic's API, and what is below it."""
_MESSAGES_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def messages_error(status: int, message: str) -> dict[str, Any]:
    """Return the error object of Anthropic's API, whose types go by the status."""
    kind = _MESSAGES_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


class ConfigError(ValueError):
    """The deployment's configuration cannot work. Raised while deploying, never while serving."""


class EngineFailure(Exception):
    """The engine's fault, or the way to it: the request itself is as good as before."""


class PublicError(Exception):
    """An error a client may read.

    Args:
        message: What went wrong and, where there is one, the way out. No paths, no tracebacks.
        param: The request field at fault, as in OpenAI's error object.
        retry_after_s: Honest number of seconds after which a retry may succeed.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self, path: str = "") -> dict[str, Any]:
        """Return the error object that clients of the API at `path` know: Anthropic's or, of all else, OpenAI's."""
        if path.startswith(_MESSAGES):
            return messages_error(self.status, self.message)
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the HTTP headers that belong to this error."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


class BadRequest(PublicError):
    status, type = 400, "invalid_request_error"


class Unauthorized(PublicError):
    """No key, or none of ours. Never says which part of it was wrong."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "www-authenticate": "Bearer"}


class NotFound(PublicError):
    status, type = 404, "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(PublicError):
    status, type = 405, "invalid_request_error"


class PayloadTooLarge(PublicError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class HeadersTooLarge(PublicError):
    status, type, code = 431, "invalid_request_error", "request_headers_too_large"


class RateLimited(PublicError):
    """A key has used what it may; `type` says of what, as OpenAI does."""

    status, type, code = 429, "requests", "rate_limit_exceeded"


class TokensLimited(RateLimited):
    type = "tokens"


class NotSupportedByFleet(PublicError):
    """A feature that needs state in one engine, which a fleet does not have."""

    status, type, code = 501, "not_implemented_error", "not_supported_by_fleet"


class RequestTimeout(PublicError):
    """The request's deadline has come. Its client set it, or we did: the same again would take as long."""

    status, type, code = 408, "timeout_error", "request_timeout"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "x-should-retry": "false"}  # OpenAI's clients would try twice more


class BodyStalled(PublicError):
    """The request's body does not come, or hardly. Sent again, it may."""

    status, type, code = 408, "timeout_error", "body_stalled"


class Overloaded(PublicError):
    """The Router holds as much work as it may: refused before any of it was done."""

    status, type, code = 429, "overloaded_error", "overloaded"


class EngineUnavailable(PublicError):
    """No engine can take or finish the request now; a retry may."""

    status, type, code = 503, "server_error", "engine_unavailable"


class DocumentsUnavailable(PublicError):
    """The document store, or the way to it, does not answer now; a retry may help."""

    status, type, code = 503, "server_error", "documents_unavailable"
