"""Calls to other deployments of the app, by their Serve handles. The adapter for what answers with outcomes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from deployments.errors import DocumentsUnavailable, Overloaded
from deployments.outcomes import value_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from ray.serve.handle import DeploymentHandle

    from deployments.tracing import Tracing


logger = logging.getLogger("ray.serve.groundswell.calls")


class Calls:
    """A deployment's `call(method, …)` as methods of this object.

    Args:
        handle: The deployment.
        what: What it is to a client, as the beginning of a sentence.
        timeout_s: After which a call is given up, and cancelled.
        tracing: Has a span around each call, and another on the other side.

    Raises:
        PublicError: From any method: what the other side refused with, `DocumentsUnavailable` if it does not answer,
            `Overloaded` if too many wait for it.
    """

    def __init__(
        self, handle: DeploymentHandle, what: str, *, timeout_s: float, tracing: Tracing | None = None
    ) -> None:
        self._handle, self._what, self._timeout_s, self._tracing = handle, what, timeout_s, tracing

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._tracing is None:
            return await answered(self._handle.call.remote(method, *args, **kwargs), self._what, self._timeout_s)
        with self._tracing.span(f"call {method}"):
            call = self._handle.call.remote(method, *args, trace_headers=self._tracing.headers(), **kwargs)
            return await answered(call, self._what, self._timeout_s)


class PoolingCalls:
    """The pooling methods of an Engine deployment.

    Args:
        handle: The deployment.
        timeout_s: After which a call is given up, and cancelled.
    """

    def __init__(self, handle: DeploymentHandle, what: str, *, timeout_s: float) -> None:
        self._handle, self._what, self._timeout_s = handle, what, timeout_s

    async def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return a vector for each text; see `Engine.embed`."""
        return await answered(self._handle.embed.remote(list(texts)), self._what, self._timeout_s)

    async def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """Return a score for each text; see `Engine.score`."""
        return await answered(self._handle.score.remote(query, list(texts)), self._what, self._timeout_s)


class ServeDetails:
    """Serve's account of one of its applications, as its controller gives it.

    Args:
        timeout_s: How long to wait for the controller.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def get(self) -> dict[str, Any] | None:
        """Return it; None where the controller does not answer now."""
        from ray.exceptions import RayError
        from ray.serve.context import _get_global_client
        from ray.serve.exceptions import RayServeException

        try:
            client: Any = _get_global_client()
            async with asyncio.timeout(self._timeout_s):
                details: dict[str, Any] = await client._controller.get_serve_instance_details.remote()
                return details
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("Serve's controller does not say how the fleet is: %s", type(error).__name__)
            return None


async def answered(response: Any, what: str, timeout_s: float) -> Any:
    """Wait for a call that answers with an outcome; return its value.

    Raises:
        PublicError: See `Calls`.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import BackPressureError, RayServeException

    done = False
    try:
        async with asyncio.timeout(timeout_s):
            outcome = await response
        done = True
        return value_of(outcome)
    except TimeoutError:
        raise DocumentsUnavailable(f"{what} did not answer within {timeout_s:g} s.", retry_after_s=2) from None
    except BackPressureError:
        raise Overloaded(f"{what} has too much to do.", retry_after_s=2) from None
    except (RayError, RayServeException) as error:
        raise DocumentsUnavailable(f"{what} does not answer now.", retry_after_s=2) from error
    finally:
        if not done:
            response.cancel()
