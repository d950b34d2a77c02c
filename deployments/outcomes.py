"""What a call from one deployment to another comes to: a value, or a refusal that a client may read.

Exceptions do not cross processes: Ray's carry remote tracebacks, and some cannot be unpickled. Knows no Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final, TypeVar

from deployments import errors

logger = logging.getLogger("ray.serve.groundswell")

T = TypeVar("T")

_KINDS: Final[dict[str, type[errors.PublicError]]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.PublicError)
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A `PublicError` on its way: `kind` is its class."""

    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


async def outcome_of(call: Awaitable[T]) -> T | Refusal:
    """Wait for a call; return what it returns, or why it was refused. A failure is logged here, and opaque there."""
    try:
        return await call
    except errors.PublicError as error:
        return Refusal(type(error).__name__, error.message, error.param, error.retry_after_s)
    except Exception:
        logger.exception("A call failed")
        return Refusal(errors.PublicError.__name__, errors.OPAQUE)


def value_of(outcome: T | Refusal) -> T:
    """Return the value.

    Raises:
        PublicError: It was refused.
    """
    if isinstance(outcome, Refusal):
        raise _KINDS[outcome.kind](outcome.message, param=outcome.param, retry_after_s=outcome.retry_after_s)
    return outcome
