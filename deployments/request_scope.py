"""What lives as long as one HTTP request, for code that vLLM's serving classes stand between.

The dispatcher opens a scope; whoever runs below it, in tasks of the same context, finds it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from deployments.errors import PublicError


@dataclass
class Caller:
    """Who asks, where there are keys.

    Attributes:
        name: The key's name.
        owner: Whose files and vector stores it sees.
        may_set_priority: Whether the request's own `priority` counts.
        tokens: What the request has used so far, prompt and answer.
    """

    name: str
    owner: str | None
    may_set_priority: bool = False
    tokens: int = 0


class RequestScope:
    """Things kept by name until the request ends, and what must happen then.

    Attributes:
        caller: Who asks.
        deadline: When the request must end, by the event loop's clock, and with which error.
    """

    def __init__(self, caller: Caller | None = None, deadline: tuple[float, PublicError] | None = None) -> None:
        self.caller, self.deadline = caller, deadline
        self.kept: dict[str, Any] = {}
        self._over = False
        self._at_end: list[Callable[[], None]] = []

    @property
    def over(self) -> bool:
        """Whether the request has ended. What it left running should too."""
        return self._over

    def at_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the request ends: now, where it has."""
        if self._over:
            callback()
        else:
            self._at_end.append(callback)

    def not_at_end(self, callback: Callable[[], None]) -> None:
        """Take back what was given to `at_end`, if it is still to come."""
        if callback in self._at_end:
            self._at_end.remove(callback)

    def end(self) -> None:
        self._over = True
        while self._at_end:
            self._at_end.pop()()


_current: Final[ContextVar[RequestScope | None]] = ContextVar("groundswell_request_scope", default=None)


def current() -> RequestScope | None:
    """Return the scope of the HTTP request being served here, if one is."""
    return _current.get()


def caller() -> Caller | None:
    """Return who asks; None where there are no keys, or none was needed."""
    scope = _current.get()
    return None if scope is None else scope.caller


def owner() -> str | None:
    """Return whose files and vector stores the request may see: None means those that are nobody's."""
    asking = caller()
    return None if asking is None else asking.owner


def key() -> str | None:
    """Return the name of the key that asks; None where there are no keys, or none was needed."""
    asking = caller()
    return None if asking is None else asking.name


@contextmanager
def request_scope(
    asking: Caller | None = None, *, deadline: tuple[float, PublicError] | None = None
) -> Iterator[RequestScope]:
    """Open a scope for one HTTP request; one within another has the same caller."""
    scope = RequestScope(asking or caller(), deadline)
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)
        scope.end()
