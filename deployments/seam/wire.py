"""vLLM's structs as bytes: requests to an engine, deltas back.

vLLM's own msgpack codec is used (`vllm/v1/serial_utils.py`), because it carries tensors and arrays without pickle; its
pickle fallback exists only under `VLLM_ALLOW_INSECURE_SERIALIZATION`, which is refused here. Encoders keep state, so a
codec is made inside an `__init__`, never at module level of a file whose class becomes a deployment.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from vllm import envs
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from deployments.errors import ConfigError
from deployments.messages import VERSION

Frames = Sequence[bytes | bytearray | memoryview]


class Delta(msgspec.Struct, array_like=True, gc=False):
    """What one engine step added to one stream.

    Attributes:
        stream: Drawn by the Router for one attempt at one request.
        execution: Drawn by the Engine for one run of it.
        sequence: Counts the deltas of an execution from 0, without gaps.
        output: vLLM's own output; its `request_id` holds the index of the sequence within the request.
    """

    stream: int
    execution: int
    sequence: int
    output: EngineCoreOutput


class DeltaBatch(msgspec.Struct, array_like=True, gc=False):
    """All deltas of one engine step for one Router."""

    version: int
    weight_version: str | None
    deltas: list[Delta]


class Codec:
    """Encodes and decodes both directions. Not thread-safe.

    Raises:
        ConfigError: vLLM is told to allow pickle on the wire.
    """

    def __init__(self) -> None:
        if envs.VLLM_ALLOW_INSECURE_SERIALIZATION:
            raise ConfigError("VLLM_ALLOW_INSECURE_SERIALIZATION is set: it would unpickle what comes from the network")
        self._encoder = MsgpackEncoder()
        self._requests = MsgpackDecoder(list[EngineCoreRequest])
        self._batches = MsgpackDecoder(DeltaBatch)

    def encode_requests(self, requests: list[EngineCoreRequest]) -> list[bytes]:
        """Return frames for `decode_requests`: the structs first, then the buffers they point to."""
        return [bytes(frame) for frame in self._encoder.encode(requests)]

    def decode_requests(self, frames: Frames) -> list[EngineCoreRequest]:
        requests: list[EngineCoreRequest] = self._requests.decode(frames)
        return requests

    def encode_deltas(self, weight_version: str | None, deltas: list[Delta]) -> Frames:
        frames: Frames = self._encoder.encode(DeltaBatch(VERSION, weight_version, deltas))
        return frames

    def decode_deltas(self, frames: Frames) -> DeltaBatch:
        """Raises `msgspec.MsgspecError` for anything that is not a batch of this version."""
        batch: DeltaBatch = self._batches.decode(frames)
        if batch.version != VERSION:
            raise msgspec.ValidationError(f"delta batch of version {batch.version}, expected {VERSION}")
        return batch
