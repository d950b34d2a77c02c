"""What calls between deployments come to, and what a caller hears when there is no answer."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.errors import BadRequest, DocumentsUnavailable, NotFound, Overloaded, PublicError
from deployments.outcomes import Refusal, outcome_of, value_of
from deployments.serve_calls import Calls, PoolingCalls
from tests.unit.recording import until

pytestmark = pytest.mark.asyncio


async def test_a_value_passes_through() -> None:
    async def call() -> int:
        return 7

    assert value_of(await outcome_of(call())) == 7


@pytest.mark.parametrize(
    "error",
    [BadRequest("wrong", param="query"), NotFound("none"), Overloaded("full", retry_after_s=5)],
)
async def test_a_refusal_arrives_as_it_was_raised(error: PublicError) -> None:
    async def call() -> None:
        raise error

    outcome = pickle.loads(pickle.dumps(await outcome_of(call())))
    with pytest.raises(type(error)) as raised:
        value_of(outcome)
    assert raised.value.body() == error.body()
    assert raised.value.headers() == error.headers()


async def test_a_failure_is_opaque() -> None:
    async def call() -> None:
        raise RuntimeError("secret path /etc/x")

    outcome = await outcome_of(call())
    assert isinstance(outcome, Refusal)
    assert "secret" not in outcome.message


async def test_a_cancellation_is_no_outcome() -> None:
    task = asyncio.ensure_future(outcome_of(asyncio.sleep(60)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class StubResponse:
    """As much of Serve's `DeploymentResponse` as a caller uses."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.cancelled = False

    def __await__(self) -> Any:
        return self._answer.__await__()

    def cancel(self) -> None:
        self.cancelled = True


class StubHandle:
    """A handle whose one method does what a test says."""

    def __init__(self, act: Any) -> None:
        self.asked: list[Any] = []
        self.responses: list[StubResponse] = []

        def remote(*args: Any, **kwargs: Any) -> StubResponse:
            self.asked.append((args, kwargs))
            self.responses.append(StubResponse(act()))
            return self.responses[-1]

        self.call = self.embed = self.score = SimpleNamespace(remote=remote)


def calls(handle: Any, timeout_s: float = 5) -> Any:
    return Calls(handle, "The Retriever", timeout_s=timeout_s)


async def test_methods_are_called_by_name() -> None:
    async def answer() -> str:
        return "found"

    handle: Any = StubHandle(answer)
    assert await calls(handle).search("me", ["vs_1"], max_results=3) == "found"
    assert handle.asked == [(("search", "me", ["vs_1"]), {"max_results": 3})]
    assert not handle.responses[0].cancelled
    assert await PoolingCalls(handle, "The model", timeout_s=1).embed(("a",)) == "found"
    assert handle.asked[1] == ((["a"],), {})


async def test_a_call_that_takes_too_long_is_a_503_and_is_cancelled() -> None:
    handle: Any = StubHandle(lambda: asyncio.sleep(60))
    with pytest.raises(DocumentsUnavailable, match=r"The Retriever did not answer within 0\.01 s") as late:
        await calls(handle, 0.01).file("me", "file-1")
    assert late.value.retry_after_s
    assert handle.responses[0].cancelled


async def test_a_deployment_that_is_down_is_a_503_and_a_full_one_a_429() -> None:
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, RayServeException

    for raised, expected in (
        (RayActorError(), DocumentsUnavailable),
        (RayServeException("gone"), DocumentsUnavailable),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), Overloaded),
    ):

        async def fail(error: Exception = raised) -> None:
            raise error

        with pytest.raises(expected):
            await calls(StubHandle(fail)).file("me", "file-1")


async def test_a_caller_that_goes_away_cancels_its_call() -> None:
    handle: Any = StubHandle(lambda: asyncio.sleep(60))
    task = asyncio.ensure_future(calls(handle).file("me", "file-1"))
    await until(lambda: handle.responses)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.responses[0].cancelled
