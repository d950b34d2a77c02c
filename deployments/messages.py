"""What Router and Engine say to each other. Imported by both; knows neither, nor Ray, nor vLLM.

Two paths: the Serve call (`End` alone), and the token channel (everything else). Structs are frozen, encoded as msgpack
arrays, and begin with a version on the wire; there is no pickle on the channel.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

VERSION: Final = 2

# The first frame of each message on the channel: one byte, so that a reader can choose the decoder.
HELLO: Final = b"h"
WELCOME: Final = b"w"
DELTAS: Final = b"d"
HEARTBEAT: Final = b"b"
ABORT: Final = b"a"
PING: Final = b"p"
STRANGER: Final = b"s"


class ChannelAddress(msgspec.Struct, frozen=True):
    """Where a Router's token channel listens, and the key to it. Travels inside Serve calls only.

    Attributes:
        router: Random id of the Router replica.
        endpoint: `tcp://host:port`.
        server_key: The Router's CURVE public key, which only those who were told can use; None on loopback.
        secret: Presented in `Hello`; a peer without it is ignored.
    """

    router: str
    endpoint: str
    server_key: bytes | None
    secret: bytes


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """An engine replica introduces itself on the channel."""

    version: int
    replica: str
    secret: bytes


class Totals(msgspec.Struct, frozen=True, array_like=True):
    """What one engine replica has done since it started. Differences of two are what it did in between.

    Attributes:
        generated_tokens: Of all answers.
        prompt_tokens: Of prompts whose first token is there; those from the prefix cache count too.
        first_tokens: Requests that have had their first token.
        first_token_s: Seconds they waited for it, all together, from their arrival in a Router.
        prefix_queries: Prompt tokens that were looked up in the prefix cache.
        prefix_hits: Those that were found.
    """

    generated_tokens: int = 0
    prompt_tokens: int = 0
    first_tokens: int = 0
    first_token_s: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0

    def __sub__(self, earlier: Totals) -> Totals:
        return Totals(*(a - b for a, b in zip(_values(self), _values(earlier), strict=True)))

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(totals: Totals) -> tuple[Any, ...]:
    return msgspec.structs.astuple(totals)


class Heartbeat(msgspec.Struct, frozen=True, array_like=True):
    """How one engine replica is doing.

    Attributes:
        replica: Serve's replica id.
        model: The name of the model it serves.
        running: Requests in the running batch.
        waiting: Requests in EngineCore's queue.
        kv_cache_usage: 0 to 1.
        seconds_since_step: How long ago EngineCore finished a step, by the replica's own clock.
        unfinished: Requests that still want steps. Hung = some unfinished, and no step for too long.
        totals: What it has done so far.
    """

    version: int
    replica: str
    model: str
    running: int
    waiting: int
    kv_cache_usage: float
    seconds_since_step: float
    unfinished: int
    totals: Totals = Totals()


class Abort(msgspec.Struct, frozen=True, array_like=True):
    """A Router wants no more of a stream, e.g. because a stop string was found in its text.

    Attributes:
        index: Which sequence of the request (`n > 1`); -1 for all of them.
    """

    version: int
    stream: int
    index: int = -1


class End(msgspec.Struct, frozen=True):
    """Only message of the Serve call.

    Attributes:
        last_sequence: Sequence number of the last delta sent; -1 when there was none.
        outcome: `finished`, `aborted`, `refused` (the request is at fault) or `failed` (the engine is).
        message: For people, for `refused` and `failed`.
        param: The request field at fault, for `refused`.
    """

    last_sequence: int
    outcome: str
    message: str = ""
    param: str | None = None


FINISHED: Final = "finished"
ABORTED: Final = "aborted"
REFUSED: Final = "refused"
FAILED: Final = "failed"


class EngineDescription(msgspec.Struct, frozen=True):
    """What only a running engine knows. Answer of `Engine.join()`."""

    replica: str
    max_model_len: int
    max_num_seqs: int
    supported_tasks: tuple[str, ...]
