"""Changes to the store that are made to their end, whatever becomes of who asked for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from deployments.errors import PublicError

logger = logging.getLogger("ray.serve.groundswell.indexer")

T = TypeVar("T")


class Changes(asyncio.Lock):
    """A lock under which one change at a time is made, and made whole.

    A caller may leave while it waits for its turn. From then on its change takes several commits, which nothing cuts in
    half but their own failure. No more than one change is ever without its caller.

    Args:
        failed: Told when a change has failed, perhaps halfway; a refusal is none.
    """

    def __init__(self, failed: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._failed = failed
        self._making: asyncio.Task[Any] | None = None  # a task that nobody holds can vanish

    async def make(self, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Make a change when its turn has come; return what it returns."""
        begun = change()
        try:
            await self.acquire()
        except BaseException:
            begun.close()
            raise
        making = self._making = asyncio.get_running_loop().create_task(begun)
        making.add_done_callback(self._ended)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_alone)
            raise

    def _ended(self, making: asyncio.Task[Any]) -> None:
        self._making = None
        self.release()
        if making.cancelled() or (making.exception() and not isinstance(making.exception(), PublicError)):
            self._failed()


def _alone(made: asyncio.Task[Any]) -> None:
    """Log the failure of a change whose caller is not there to hear of it."""
    if not made.cancelled() and (error := made.exception()) is not None:
        logger.error("A change failed after its caller had left", exc_info=error)
