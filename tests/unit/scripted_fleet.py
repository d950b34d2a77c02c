"""vLLM's real app over a fleet that says what the test has it say: its events are vLLM's own, and no engine runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists

from deployments.dispatch import App
from deployments.errors import EngineUnavailable, Overloaded
from deployments.seam.args import frontend_config, parse_args, resolve_speculators, speculates
from deployments.seam.engine_client import FleetClient, RequestSubmission
from deployments.seam.frontend import build_model_app
from models import tiny_random


class StubReservation:
    def release(self) -> None:
        pass


class StubFlight:
    """A stub flight: delivers the script, some tokens at a time, to each sequence in turn."""

    def __init__(self, fleet: ScriptedFleet, submission: RequestSubmission) -> None:
        self._fleet, self._submission = fleet, submission
        self.replica = "r0" if fleet.takes else None
        self.closed = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._fly())

    async def _fly(self) -> None:
        fleet = self._fleet
        if fleet.silent:
            await asyncio.Event().wait()
        scripts = [fleet.tokens(fleet.answers[i % len(fleet.answers)]) for i in range(self._submission.sequences)]
        whole, cut = scripts[0], fleet.cut_after
        while any(scripts):
            if cut is not None and self._submission.progress >= cut:
                cut = None
                fleet.recovered.append(self._submission.recover())
                scripts[0] = whole[self._submission.progress :]
            for index, script in enumerate(scripts):
                if script:
                    said, scripts[index] = script[: fleet.step], script[fleet.step :]
                    reason = None if scripts[index] else FinishReason.STOP
                    output = EngineCoreOutput(str(index), said, self._logprobs(said), finish_reason=reason)
                    self._submission.deliver(output, None)
            await asyncio.sleep(fleet.pause_s)
            if fleet.fails_after is not None and self._submission.progress >= fleet.fails_after:
                return self._submission.fail(EngineUnavailable("The engines failed."))
            if fleet.hangs:
                await asyncio.Event().wait()

    def _logprobs(self, said: list[int]) -> LogprobsLists | None:
        params = self._submission._requests[0].sampling_params
        if params is None or params.logprobs is None:
            return None
        ids, zeros = np.array(said)[:, None], np.zeros((len(said), 1), dtype=np.float32)
        return LogprobsLists(ids, zeros, np.ones(len(said), dtype=np.int32))

    def close(self) -> None:
        self.closed.set()
        self.task.cancel()


class ScriptedFleet:
    """A stub fleet.

    Attributes:
        answers: What sequence 0, 1, … says.
        step: Tokens in one delta.
        hangs: Whether it falls silent after the first delta.
        silent: Whether it never says anything.
        takes: Whether an engine has its requests.
        cut_after: After how many tokens of its only sequence an engine fails, once.
        recovered: How requests began again at another.
        full: Whether it refuses requests.
        retry_after_s: When it then wants to be asked again.
        pause_s: Between two deltas.
        fails_after: After how many tokens a request ends in an error.
        prompts: What it was asked, as text.
        started: Set when a request arrives.
    """

    tokenizer: Any

    def __init__(self) -> None:
        self.answers: Sequence[str] = ["An answer."]
        self.step = 1
        self.hangs = self.silent = self.full = False
        self.takes = True
        self.retry_after_s = 7.0
        self.pause_s = 0.0
        self.fails_after: int | None = None
        self.cut_after: int | None = None
        self.recovered: list[str] = []
        self.prompts: list[str] = []
        self.flights: list[StubFlight] = []
        self.started = asyncio.Event()

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return [*ids, self.tokenizer.eos_token_id]

    def admit(self, n: int) -> StubReservation:
        if self.full:
            raise Overloaded("It is full.", retry_after_s=self.retry_after_s)
        return StubReservation()

    def start(self, submission: RequestSubmission, reservation: Any) -> StubFlight:
        self.prompts.append(self.tokenizer.decode(submission._requests[0].prompt_token_ids))
        self.flights.append(StubFlight(self, submission))
        self.started.set()
        return self.flights[-1]


async def scripted_app(
    folder: Path, fleet: ScriptedFleet | None = None, **options: Any
) -> tuple[App, ScriptedFleet, FleetClient]:
    """Return vLLM's app for the tiny model, the fleet under it, and the client between them.

    Args:
        fleet: One of the test's own.
        options: More engine and front-end arguments.
    """
    engine_args = {"model": str(tiny_random.write(folder)), "dtype": "float32", "max_model_len": 2048}
    with mock.patch.dict(os.environ, VLLM_TARGET_DEVICE="cpu"):  # as in a Router
        args = resolve_speculators(parse_args("tiny", engine_args | options, {}))
        fleet = fleet or ScriptedFleet()
        client = FleetClient(fleet, frontend_config(args), ("generate",), speculates=speculates(args))
        fleet.tokenizer = client.renderer.tokenizer
        return await build_model_app(args, client), fleet, client
