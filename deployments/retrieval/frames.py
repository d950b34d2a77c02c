"""What the Indexer and its parsing children say to each other: length-prefixed msgpack. No pickle from a child."""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from deployments.retrieval.records import Chunk, ErrorCode

MAX_FRAME_BYTES: Final = 64 * 2**20
LENGTH: Final = struct.Struct(">I")


class Job(msgspec.Struct, tag="job"):
    """Read this file and cut it."""

    path: str
    filename: str
    max_tokens: int
    overlap_tokens: int


class Chunks(msgspec.Struct, tag="chunks"):
    """Some of the file's chunks, in order."""

    chunks: list[Chunk]


class Done(msgspec.Struct, tag="done"):
    """All chunks have been sent. Seconds of the child's own time."""

    parse_s: float
    chunk_s: float


class Failed(msgspec.Struct, tag="failed"):
    """The file cannot be read.

    Attributes:
        code: `server_error` if it is not the file's fault.
        last: The child ends itself, because it can no longer be relied on.
    """

    code: ErrorCode
    message: str
    last: bool = False


class Settings(msgspec.Struct):
    """What a child is started with, as JSON on its command line."""

    memory_bytes: int
    max_chars: int
    parent: int
    tokenizer: str | None = None


Answer = Chunks | Done | Failed


def framed(message: msgspec.Struct) -> bytes:
    """Return a message as it goes through the pipe."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body
