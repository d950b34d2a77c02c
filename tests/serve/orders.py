"""How tests and stub engines talk, past the app under test: settings and orders in, notes out."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from deployments.config import FleetConfig, ModelConfig
from deployments.fleet.channel import Frames

DIE_FIRST = "die-first"
"""Die before the first token of a request."""
DIE_LATER = "die-later"
"""Die after some tokens of a request."""
HANG = "hang"
"""Never produce the first token of a request."""
HANG_LATER = "hang-later"
"""Produce some tokens of a request, and never another one."""
FREEZE = "freeze"
"""After some tokens of a request stop the whole process for a while: no token, no heartbeat, no answer."""
HURRY = "hurry"
"""While this lies there, tokens take `HURRIED_S`. Nobody takes it away."""
HURRIED_S = 0.001
SOME_TOKENS = 3
REACHES_S = 3
"""After that the tokens so far have reached the client: it is for the test to say that they did."""
FROZEN_S = 20
TOKENS = 1000, 900
"""The first of the pieces of words that answers are made of, and their number."""


@dataclass(frozen=True)
class Settings:
    """A stub engine's settings, from its model's `env`.

    Attributes:
        batch: Requests that run at once; the rest waits in the engine.
        token_s: Seconds for a token of an answer.
        prefill_s: Seconds for a token of a prompt; one prompt after another.
        kv_cache_usage: What heartbeats say.
        stall_s: From the fleet's configuration: what counts as hung.
    """

    batch: int
    token_s: float
    prefill_s: float
    kv_cache_usage: float
    stall_s: float

    @classmethod
    def of(cls, model: ModelConfig, fleet: FleetConfig) -> Settings:
        token_s, prefill_s, usage = (
            float(model.env.get(f"STUB_{name}", 0)) for name in ("TOKEN_S", "PREFILL_S", "KV_CACHE_USAGE")
        )
        return cls(int(model.engine_args["max_num_seqs"]), token_s, prefill_s, usage, fleet.engine_stall_timeout_s)


@dataclass
class Notes:
    """What one stub replica has done so far, written to a file with every change.

    Attributes:
        folder: Where notes and orders lie.
        running: Requests it has now.
        requests: All it was ever given.
        prompt_tokens: Of all those.
        routers: Ids of the Routers they came from.
        joined: Ids of the Routers that know this replica.
    """

    folder: str
    model: str
    replica: str
    pid: int
    running: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    routers: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, model: ModelConfig) -> Notes:
        """Return the notes of the replica this process is."""
        from ray import serve

        replica = serve.get_replica_context().replica_id.unique_id
        return cls(model.env["STUB_FOLDER"], model.name, replica, os.getpid())

    def join(self, router: str) -> None:
        self.joined = sorted({*self.joined, router})
        self._write()

    def begin(self, router: str, prompt_tokens: int) -> None:
        self.running += 1
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.routers = sorted({*self.routers, router})
        self._write()

    def finish(self) -> None:
        self.running -= 1
        self._write()

    def _write(self) -> None:
        path = Path(self.folder) / f"{self.model}-{self.replica}.json"
        path.with_suffix(".new").write_text(json.dumps(asdict(self)))
        path.with_suffix(".new").rename(path)


class Wire:
    """The little that a stub needs of vLLM's structs: the size of a request, and a token for an answer."""

    def __init__(self) -> None:
        from vllm.v1.engine import EngineCoreOutput, FinishReason

        from deployments.seam.wire import Codec, Delta

        self._codec, self._delta, self._output, self._length = Codec(), Delta, EngineCoreOutput, FinishReason.LENGTH

    def read(self, frames: list[bytes]) -> tuple[int, int]:
        """Return how many tokens the one sequence of a request brings, and how many it wants."""
        (request,) = self._codec.decode_requests(frames)
        assert request.prompt_token_ids is not None and request.sampling_params is not None
        return len(request.prompt_token_ids), request.sampling_params.max_tokens or 0

    def token(self, stream: int, execution: int, sequence: int, prompt_tokens: int, wanted: int) -> Frames:
        """Return the token that stands at this position, counted with the prompt, and at no position near it."""
        first, number = TOKENS
        reason = self._length if sequence + 1 == wanted else None
        output = self._output("0", [first + (prompt_tokens + sequence) * 7 % number], finish_reason=reason)
        return self._codec.encode_deltas(None, [self._delta(stream, execution, sequence, output)])


async def obey(notes: Notes, produced: int) -> None:
    """Do what is ordered at this point of a request, if anything is. Called before each token."""
    if produced == 0 and _take(notes, DIE_FIRST):
        os._exit(1)
    if produced == 0 and _take(notes, HANG):
        await asyncio.Event().wait()
    if produced == SOME_TOKENS and _take(notes, HANG_LATER):
        await asyncio.Event().wait()
    if produced == SOME_TOKENS and _take(notes, FREEZE):
        await asyncio.sleep(REACHES_S)
        time.sleep(FROZEN_S)  # noqa: ASYNC251
    if produced == SOME_TOKENS and _take(notes, DIE_LATER):
        await asyncio.sleep(REACHES_S)
        os._exit(1)


async def make(notes: Notes, settings: Settings) -> None:
    """Take the time that a token takes."""
    await asyncio.sleep(HURRIED_S if _order(notes, HURRY).exists() else settings.token_s)


def read(folder: Path, model: str) -> dict[str, Notes]:
    """Return the notes of those of a model's replicas that live and have joined a Router."""
    notes = [Notes(**json.loads(path.read_text())) for path in folder.glob(f"{model}-*.json")]
    return {note.replica: note for note in notes if _lives(note.pid)}


def give(folder: Path, model: str, order: str) -> Path:
    """Leave an order for the one replica of `model` that takes it first, unless none does; its file is gone then."""
    path = folder / f"{model}-{order}"
    path.touch()
    return path


def _order(notes: Notes, order: str) -> Path:
    return Path(notes.folder) / f"{notes.model}-{order}"


def _take(notes: Notes, order: str) -> bool:
    try:
        _order(notes, order).unlink()
    except FileNotFoundError:
        return False
    return True


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
