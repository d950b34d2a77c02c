"""What lives as long as one HTTP request, for code that vLLM's serving classes stand between.

The dispatcher opens a scope; whoever runs below it, in tasks of the same context, finds it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from deployments.errors import PublicError


class RequestScope:
    """Things kept by name until the request ends, and what must happen then.

    Attributes:
        deadline: When the request must end, by the event loop's clock, and with which error.
    """

    def __init__(self, deadline: tuple[float, PublicError] | None = None) -> None:
        self.deadline = deadline
        self.kept: dict[str, Any] = {}
        self._at_end: list[Callable[[], None]] = []

    def at_end(self, callback: Callable[[], None]) -> None:
        self._at_end.append(callback)

    def end(self) -> None:
        while self._at_end:
            self._at_end.pop()()


_current: Final[ContextVar[RequestScope | None]] = ContextVar("groundswell_request_scope", default=None)


def current() -> RequestScope | None:
    """Return the scope of the HTTP request being served here, if one is."""
    return _current.get()


@contextmanager
def request_scope(deadline: tuple[float, PublicError] | None = None) -> Iterator[RequestScope]:
    """Open a scope for one HTTP request."""
    scope = RequestScope(deadline)
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)
        scope.end()
